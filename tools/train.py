"""Train a model from scratch, or from a checkpoint, on COCO-format data or on generated scenes.

    python tools/train.py meta-nano-mask-rcnn --data DIR --out runs/nuclei --minutes 90
    (the same with --resume goes on after a stop)

Holds data loading, optimizer, schedule and validation. The losses are in `detection_losses` and
`segmentation_losses`, the pictures in `training_data`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from meta_deploy.bundle.files import atomic_path
from meta_deploy.errors import InputError
from meta_deploy.models.checkpoint.load import load_model, load_vit_weights, read_pretrained
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.registry import build_model, config_from_dict, config_to_dict, get_config
from tools.detection_losses import LossSettings, Truth, detection_losses
from tools.segmentation_losses import class_names, class_target, segmentation_losses
from tools.training_data import CocoFolder, Sample, Scenes, Source
from tools.validation import validate_detections, validate_segmentation

EMA_DECAY = 0.999
WARMUP = 0.03  # of the whole training


class Batches(torch.utils.data.Dataset):
    """Batch k: samples k * batch to (k + 1) * batch, stacked."""

    def __init__(self, source: Source, batch: int, size: int, segmentation: bool) -> None:
        self.source, self.batch, self.size, self.segmentation = source, batch, size, segmentation

    def __getitem__(self, k: int) -> tuple[Tensor, Any]:
        samples = [self.source.sample(k * self.batch + i, self.size) for i in range(self.batch)]
        images = torch.from_numpy(np.stack([sample.image for sample in samples]))  # (B, H, W, 3) uint8
        return images, self.targets(samples)

    def targets(self, samples: list[Sample]) -> Any:
        """What the losses want: a class map for all, or boxes, labels and masks of each."""
        if self.segmentation:
            categories = len(self.source.classes)
            return torch.from_numpy(np.stack([class_target(s.masks, s.labels, categories) for s in samples]))
        return pack(samples)


def pack(samples: list[Sample]) -> dict[str, Tensor]:
    """The objects of all samples in few small tensors, as they travel between processes and devices."""
    return {
        "counts": torch.tensor([len(s.boxes) for s in samples]),
        "boxes": torch.from_numpy(np.concatenate([s.boxes for s in samples])),
        "labels": torch.from_numpy(np.concatenate([s.labels for s in samples])),
        "masks": torch.from_numpy(np.concatenate([np.packbits(s.masks, axis=-1) for s in samples])),
    }


def unpack(packed: dict[str, Tensor], width: int, device: torch.device) -> list[Truth]:
    """`pack` undone, on a device; `width` is that of the masks in pixels."""
    counts = packed["counts"].tolist()
    boxes, labels, bits = (packed[k].to(device, non_blocking=True) for k in ("boxes", "labels", "masks"))
    place = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
    masks = (bits[..., None] >> place & 1).flatten(-2)[..., :width]
    return [Truth(*parts) for parts in zip(*(x.split(counts) for x in (boxes, labels, masks)), strict=True)]


def quiet_worker(_: int) -> None:
    """Set up a loader process: low priority, no OpenCV threads."""
    os.nice(5)
    cv2.setNumThreads(1)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices and kernels, none for biases, norms and embeddings."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim > 1 and "embed" not in name]
    others = [p for name, p in named if not (p.ndim > 1 and "embed" not in name)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: torch.nn.Module, step: int) -> None:
    """Update the average of every float tensor of the state, including batch-norm statistics."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    state = model.state_dict()
    floats = [name for name, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([ema[name] for name in floats], [state[name] for name in floats], 1 - decay)
    for name in state.keys() - set(floats):
        ema[name].copy_(state[name])


def start_from(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint's weights; of a model of another task its backbone only."""
    state = load_model(checkpoint).model.state_dict()
    wanted = model.state_dict()
    if {name: value.shape for name, value in state.items()} != {n: v.shape for n, v in wanted.items()}:
        state = {name: value for name, value in state.items() if name.startswith("backbone.")}
        log(f"{checkpoint}: another model; its backbone is loaded, the heads start from random weights")
        state = {name: value for name, value in wanted.items() if not name.startswith("backbone.")} | state
    model.load_state_dict(state)


def freeze_batch_norm(model: torch.nn.Module, ema: dict[str, Tensor]) -> None:
    """Normalize with the averaged statistics from now on, as the exported model does.

    Batches of the largest pictures are small, and pyramid pooling sees one pixel of each picture: what their
    own statistics teach does not hold for a single picture.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.running_mean.copy_(ema[f"{name}.running_mean"])
            module.running_var.copy_(ema[f"{name}.running_var"])


class Training:
    """Model, optimizer, average and progress, saved and restored together."""

    def __init__(self, args: argparse.Namespace, source: Source) -> None:
        self.args, self.source = args, source
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        config = config_to_dict(get_config(args.model)) | args.set
        self.segmentation = config["task"] == "semantic-segmentation"
        self.classes = class_names(source.classes) if self.segmentation else source.classes
        self.config = config_from_dict(config | {"num_classes": len(self.classes)})
        start = read_pretrained(args.backbone_ckpt, args.model) if args.backbone_ckpt else None
        if start is not None and "backbone" not in args.set:
            self.config = start.configure(self.config)
        self.model = build_model(self.config)
        if args.init:
            start_from(self.model, args.init)
        if start is not None:
            for note in load_vit_weights(self.model, start).notes:
                log(note)
        self.model = self.model.to(self.device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, args.weight_decay), lr=args.lr, betas=(0.9, 0.99), fused=True
        )
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.step = 0
        self.samples = 0
        self.seconds = 0.0  # of training, over all runs

    def progress(self) -> float:
        """Progress from 0 to 1, by steps or by time."""
        if self.args.steps:
            return self.step / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def learning_rate(self) -> float:
        """Learning rate: linear warm-up, then cosine decay to a hundredth."""
        done = self.progress()
        if done < WARMUP:
            return self.args.lr * max(done / WARMUP, 0.01)
        wave = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARMUP) / (1 - WARMUP))))
        return self.args.lr * (0.01 + 0.99 * wave)

    def losses(self, images: Tensor, targets: Any) -> dict[str, Tensor]:
        """The losses of a batch of normalized images."""
        if self.segmentation:
            return segmentation_losses(self.model, images, targets.to(self.device))
        truths = unpack(targets, images.shape[-1], self.device)
        settings = LossSettings(
            proposals_pre_nms=self.args.proposals,
            proposals=self.args.proposals,
            rois=self.args.rois,
            roi_positives=self.args.positives,
            masks=self.args.rois // 4,
        )
        return detection_losses(self.model, images, truths, settings)

    def train_step(self, images: Tensor, targets: Any) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        pixels = normalize(images.to(self.device, non_blocking=True), self.config)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            losses = self.losses(pixels, targets)
        total = sum(losses.values())
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
            update_ema(self.ema, self.model, self.step)
        self.step += 1
        self.samples += len(images)
        return {k: float(v.detach()) for k, v in {"total": total, **losses, "gradient": norm}.items()}

    def averaged(self) -> torch.nn.Module:
        """The model with the moving average of the weights, for validation and saving."""
        model = build_model(self.config).eval()
        model.load_state_dict(self.ema)
        return model.to(self.device)

    def save(self, folder: Path) -> None:
        """Write the state to go on from, and the checkpoint for `meta-export --ckpt`."""
        state = {name: getattr(self, name) for name in ("ema", "step", "samples", "seconds")}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"random": torch.get_rng_state()}
        with atomic_path(folder / "state.pth") as temporary:
            torch.save(state, temporary)
        save_checkpoint(self.checkpoint(folder), self.averaged(), self.config, self.classes)

    def checkpoint(self, folder: Path) -> Path:
        """Where `save` writes it; a colon is no part of a file's name everywhere."""
        return folder / f"{self.config.name.replace(':', '-')}.pth"

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema, self.step = state["ema"], state["step"]
        self.samples, self.seconds = state["samples"], state["seconds"]
        torch.set_rng_state(state["random"].cpu())

    def batches(self, size: int) -> Iterator[tuple[Tensor, Any]]:
        """Batches of one size, made by other processes. Larger pictures come in smaller batches."""
        batch = max(2, round(self.args.batch * (self.args.sizes[0] / size) ** 2))  # two for batch norm
        dataset = Batches(self.source, batch, size, self.segmentation)
        first = -(-self.samples // batch)
        return iter(
            torch.utils.data.DataLoader(
                dataset,
                batch_size=None,
                sampler=range(first, 2**31 // batch),
                num_workers=self.args.workers,
                worker_init_fn=quiet_worker,
                prefetch_factor=4 if self.args.workers else None,
                pin_memory=self.device.type == "cuda",
            )
        )

    def validate(self, folder: Path) -> None:
        """Log the accuracy of the averaged weights, and keep it in `log.jsonl`."""
        began = time.perf_counter()
        validate = validate_segmentation if self.segmentation else validate_detections
        report = validate(self.averaged(), self.config, self.source, self.args.validate)
        log(f"validation at step {self.step}: {report} ({time.perf_counter() - began:.0f} s)")
        self.note(folder, {"validation": report})

    def note(self, folder: Path, what: dict[str, Any]) -> None:
        """Append a line to `log.jsonl`."""
        line = {"step": self.step, "minutes": self.seconds / 60, "lr": self.learning_rate(), **what}
        with (folder / "log.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def normalize(images: Tensor, config: Any) -> Tensor:
    """(B, H, W, 3) uint8 RGB -> (B, 3, H, W) float32 in channels-last memory."""
    mean, std = (torch.tensor(values, device=images.device) for values in (config.mean, config.std))
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


def log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


class Every:
    """A timer: true once every so many minutes."""

    def __init__(self, minutes: float) -> None:
        self.seconds, self.last = 60 * minutes, time.perf_counter()

    def due(self) -> bool:
        if time.perf_counter() - self.last < self.seconds:
            return False
        self.last = time.perf_counter()
        return True


class Averages:
    """Running means of the losses between two lines of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = self.pictures = 0
        self.began = time.perf_counter()

    def add(self, parts: dict[str, float], pictures: int) -> None:
        self.steps += 1
        self.pictures += pictures
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        return {name: round(value / self.steps, 4) for name, value in self.sums.items()}

    def rate(self) -> float:
        """Pictures a second."""
        return self.pictures / (time.perf_counter() - self.began)


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    source = Scenes(args.seed) if args.data is None else CocoFolder(args.data, tuple(args.magnify), args.seed)
    training = Training(args, source)
    if args.resume and (args.out / "state.pth").exists():
        training.load(args.out / "state.pth")
        log(f"resumed at step {training.step}, {training.seconds / 60:.1f} min")
    parameters = sum(p.numel() for p in training.model.parameters())
    log(f"{args.model}: {parameters / 1e6:.2f} M parameters, {vars(args)}")
    save, validate = Every(args.save_every), Every(args.validate_every)
    # Small pictures first: they teach the same at a fraction of the cost.
    for stage, size in enumerate(args.sizes, 1):
        end = stage / len(args.sizes)
        if training.progress() >= end:
            continue
        if 1 < stage == len(args.sizes):
            freeze_batch_norm(training.model, training.ema)
        clock, averages = time.perf_counter(), Averages()
        for images, targets in training.batches(size):
            averages.add(training.train_step(images, targets), len(images))
            now = time.perf_counter()
            training.seconds, clock = training.seconds + now - clock, now
            if training.step % args.log_every == 0:
                means = averages.means()
                text = " ".join(f"{name} {value:.3f}" for name, value in means.items())
                log(
                    f"step {training.step} {text} | size {size} lr {training.learning_rate():.2e} "
                    f"{averages.rate():.1f} img/s {training.seconds / 60:.1f} min"
                )
                training.note(args.out, {"losses": means})
                averages = Averages()
            if save.due():
                training.save(args.out)
            if validate.due():
                training.validate(args.out)
                clock = time.perf_counter()
            if training.progress() >= end:
                break
    training.save(args.out)
    training.validate(args.out)
    log(f"done: {training.checkpoint(args.out)}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", help="a name such as meta-nano-mask-rcnn")
    add("--data", type=Path, help="folder of COCO-format data (see training_data); without: generated scenes")
    add("--out", type=Path, required=True, help="folder of the checkpoint, the training state and the log")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for so long, stops not counted")
    length.add_argument("--steps", type=int, help="train for so many steps")
    add("--resume", action="store_true", help="go on from the state in --out, if there is one")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--init", type=Path, help="checkpoint to start from; of another task: its backbone")
    start.add_argument(
        "--backbone-ckpt",
        type=Path,
        help="what to start from: a plain ViT (DeiT, AugReg, MAE, DINO, DINOv2), or timm's own for timm:...",
    )
    add("--set", type=json.loads, default={}, metavar="JSON", help="settings of the model's configuration")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0, help="of the weights and the samples, 0..9")
    add("--batch", type=int, default=8, help="pictures a step at the first of --sizes")
    add("--sizes", type=int, nargs="+", default=[224, 320], help="sides in pixels, for equal shares")
    add("--magnify", type=float, nargs=2, default=[0.5, 2.0], help="bounds of the pictures' magnification")
    add("--proposals", type=int, default=100, help="proposals that the second stage sees in training")
    add("--rois", type=int, default=64, help="regions a picture in the losses")
    add("--positives", type=float, default=0.25, help="largest share of objects among them")
    add("--threads", type=int, default=1, help="of PyTorch")
    add("--workers", type=int, default=1, help="processes that make samples")
    add("--lr", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--clip", type=float, default=5.0, help="largest norm of the gradient")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="products in bfloat16")
    add("--log-every", type=int, default=50, help="steps")
    add("--save-every", type=float, default=3.0, help="minutes")
    add("--validate", type=int, default=50, help="validation pictures, evenly from all of them")
    add("--validate-every", type=float, default=10.0, help="minutes")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    try:
        train(args)
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
