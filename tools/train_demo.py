"""Train the demo model, `meta-nano-mask-rcnn`, from scratch, on scenes that are made while it trains.

    python tools/train_demo.py --out runs/demo --minutes 90            (add --resume after a stop)

Knows data, optimizer and schedule; the losses are in `detection_losses`, the pictures in `scenes`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from meta_deploy.models.heads.mask_rcnn import MaskRCNNConfig
from meta_deploy.models.registry import build_model, config_to_dict, get_config
from meta_deploy.report.accuracy import coco_ap
from tools.detection_losses import LossSettings, Truth, detection_losses
from tools.scenes import CLASSES, TRAINING_SEEDS, VALIDATION_SEEDS, coco_dataset, generate

MODEL = "meta-nano-mask-rcnn"
EMA_DECAY = 0.999
WARMUP = 0.03  # of the whole training


# --- data -------------------------------------------------------------------------------------------------


class SceneBatches(torch.utils.data.Dataset):
    """Batch number k of the training: a function of k alone, so that resuming goes on where it stopped."""

    def __init__(self, batch: int, size: int, first_seed: int) -> None:
        self.batch, self.size, self.first_seed = batch, size, first_seed

    def __getitem__(self, k: int) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        first = self.first_seed + k * self.batch
        scenes = [generate(seed, (self.size, self.size)) for seed in range(first, first + self.batch)]
        images = torch.from_numpy(np.stack([scene.image for scene in scenes]))  # (B, H, W, 3) uint8
        truths = [
            (
                torch.from_numpy(scene.boxes),
                torch.from_numpy(scene.labels),
                torch.from_numpy(scene.masks.view(np.uint8)),
            )
            for scene in scenes
        ]
        return images, truths


def quiet_worker(_: int) -> None:
    """A loader process gives way to everything else, and OpenCV starts no threads in it."""
    os.nice(5)
    cv2.setNumThreads(1)


def loader(args: argparse.Namespace, size: int, first_step: int) -> torch.utils.data.DataLoader:
    """Batches of pictures of one size, from number `first_step` on, made by other processes."""
    steps = range(first_step, (len(TRAINING_SEEDS) // 2) // args.batch)
    dataset = SceneBatches(args.batch, size, TRAINING_SEEDS.start + args.seed * 100_000_000)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=args.workers,
        worker_init_fn=quiet_worker,
        prefetch_factor=4 if args.workers else None,
    )


def normalize(images: Tensor, config: MaskRCNNConfig) -> Tensor:
    """(B, H, W, 3) uint8 RGB -> (B, 3, H, W) float32 in channels-last memory."""
    return ((images.float() - torch.tensor(config.mean)) / torch.tensor(config.std)).permute(0, 3, 1, 2)


# --- training state ---------------------------------------------------------------------------------------


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels; none for biases, norms and embeddings."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim > 1 and "embed" not in name]
    others = [p for name, p in named if not (p.ndim > 1 and "embed" not in name)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: torch.nn.Module, step: int) -> None:
    """Move the average of every float tensor of the state, batch-norm statistics included."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)
        else:
            ema[name].copy_(value)


def save(data: dict[str, Any], path: Path) -> None:
    """Write to a temporary file and rename it: a stop at any point leaves the old or the new one whole."""
    temporary = path.with_suffix(".tmp")
    torch.save(data, temporary)
    os.replace(temporary, path)


def save_checkpoint(path: Path, ema: dict[str, Tensor], config: MaskRCNNConfig) -> None:
    """What `meta-export --ckpt` reads: plain tensors, numbers and strings."""
    model = {name: value.clone().contiguous() for name, value in ema.items()}
    save({"model": model, "config": config_to_dict(config), "classes": list(CLASSES)}, path)


# --- evaluation ---------------------------------------------------------------------------------------------


def paste(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinearly resize a (28, 28) mask into its xyxy box; (height, width) uint8, cut at one half."""
    scale = mask.shape[0] / np.maximum(box[2:] - box[:2], 1e-3)
    offset = (0.5 - box[:2]) * scale - 0.5
    inverse = np.array([[scale[0], 0, offset[0]], [0, scale[1], offset[1]]], np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return (cv2.warpAffine(mask, inverse, (width, height), flags=flags) >= 0.5).astype(np.uint8)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, config: MaskRCNNConfig, seeds: range, size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """COCO AP of the PyTorch model on the scenes of `seeds`, and its detections as COCO results."""
    from pycocotools import mask as rle

    results = []
    for seed in seeds:
        scene = generate(seed, (size, size))
        out = model(normalize(torch.from_numpy(scene.image)[None], config))
        out = {name: value[0].float().numpy() for name, value in out.items()}
        for k in range(int(out["num_detections"])):
            x1, y1, x2, y2 = out["boxes"][k].tolist()
            encoded = rle.encode(np.asfortranarray(paste(out["masks"][k], out["boxes"][k], size, size)))
            results.append(
                {
                    "image_id": seed,
                    "category_id": int(out["labels"][k]) + 1,
                    "score": float(out["scores"][k]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
                }
            )
    return coco_ap(coco_dataset(seeds, (size, size)), results), results


def evaluation_model(config: MaskRCNNConfig, ema: dict[str, Tensor]) -> torch.nn.Module:
    """The averaged model, with fewer proposals than the released one: these pictures hold few objects."""
    quick = replace(config, rpn_pre_nms=200, proposals=100)
    model = build_model(quick).eval()
    model.load_state_dict(ema)
    return model


# --- the loop ------------------------------------------------------------------------------------------


class Training:
    """Model, optimizer, average and progress, saved and restored together."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.config = get_config(MODEL, num_classes=len(CLASSES))
        self.model = build_model(self.config).to(memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, args.weight_decay), lr=args.lr, betas=(0.9, 0.99), fused=True
        )
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.step = 0
        self.seconds = 0.0  # of training, over all runs
        self.settings = LossSettings()

    def progress(self) -> float:
        """0 at the beginning, 1 at the end, by steps or by time."""
        if self.args.steps:
            return self.step / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to a hundredth."""
        done = self.progress()
        if done < WARMUP:
            return self.args.lr * max(done / WARMUP, 0.01)
        wave = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARMUP) / (1 - WARMUP))))
        return self.args.lr * (0.01 + 0.99 * wave)

    def train_step(self, images: Tensor, truths: list[Truth]) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            losses = detection_losses(self.model, normalize(images, self.config), truths, self.settings)
        total = sum(losses.values())
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
            update_ema(self.ema, self.model, self.step)
        self.step += 1
        return {k: float(v.detach()) for k, v in {"total": total, **losses, "gradient": norm}.items()}

    def save(self, path: Path) -> None:
        save(
            {
                "model": self.model.state_dict(),
                "ema": self.ema,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
            },
            path,
        )

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema, self.step, self.seconds = state["ema"], state["step"], state["seconds"]


def log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    state_file, checkpoint = args.out / "state.pth", args.out / f"{MODEL}.pth"
    training = Training(args)
    if args.resume and state_file.exists():
        training.load(state_file)
        log(f"resumed at step {training.step}, {training.seconds / 60:.1f} min")
    parameters = sum(p.numel() for p in training.model.parameters())
    log(f"{MODEL}: {parameters / 1e6:.2f} M parameters, {vars(args)}")

    def write() -> None:
        training.save(state_file)
        save_checkpoint(checkpoint, training.ema, training.config)

    def report_accuracy() -> None:
        began = time.perf_counter()
        model = evaluation_model(training.config, training.ema)
        report, _ = evaluate(model, training.config, VALIDATION_SEEDS, args.sizes[-1])
        parts = [f"{k} AP {r['AP']:.3f} AP50 {r['AP50']:.3f} AP75 {r['AP75']:.3f}" for k, r in report.items()]
        took = time.perf_counter() - began
        log(f"evaluation at step {training.step}: {', '.join(parts)} ({took:.0f} s)")

    every = {"save": Every(60 * args.save_every), "evaluate": Every(60 * args.evaluate_every)}
    sums: dict[str, float]
    # Small pictures first: they teach the same at a fraction of the cost.
    for stage, size in enumerate(args.sizes, 1):
        end = stage / len(args.sizes)
        if training.progress() >= end:
            continue
        clock = window = time.perf_counter()
        sums, summed = {}, 0
        for images, raw in loader(args, size, training.step):
            parts = training.train_step(images, [Truth(*tensors) for tensors in raw])
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value
            summed += 1
            now = time.perf_counter()
            training.seconds, clock = training.seconds + now - clock, now
            if training.step % args.log_every == 0:
                text = " ".join(f"{name} {value / summed:.3f}" for name, value in sums.items())
                rate = summed * args.batch / (now - window)
                minutes, lr = training.seconds / 60, training.learning_rate()
                speed = f"{rate:.1f} img/s {minutes:.1f} min"
                log(f"step {training.step} {text} | size {size} lr {lr:.2e} {speed}")
                sums, summed, window = {}, 0, now
            if every["save"].due():
                write()
            if every["evaluate"].due():
                report_accuracy()
            if training.progress() >= end:
                break
    write()
    report_accuracy()
    log(f"done: {checkpoint}")


class Every:
    """Says once in so many seconds that it is time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.perf_counter()

    def due(self) -> bool:
        if time.perf_counter() - self.last < self.seconds:
            return False
        self.last = time.perf_counter()
        return True


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model on procedural scenes.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the checkpoint and the training state")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for so long, stops not counted")
    length.add_argument("--steps", type=int, help="train for so many steps")
    add("--resume", action="store_true", help="go on from the state in --out, if there is one")
    add("--seed", type=int, default=0, help="of the weights and of the scenes, 0..9")
    add("--batch", type=int, default=8)
    add("--sizes", type=int, nargs="+", default=[224, 320], help="picture sides in pixels, for equal shares")
    add("--threads", type=int, default=1, help="of PyTorch")
    add("--workers", type=int, default=1, help="processes that make scenes")
    add("--lr", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--clip", type=float, default=5.0, help="largest norm of the gradient")
    add(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="convolutions, products in bfloat16",
    )
    add("--log-every", type=int, default=50, help="steps")
    add("--save-every", type=float, default=3.0, help="minutes")
    add("--evaluate-every", type=float, default=10.0, help="minutes")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    train(args)


if __name__ == "__main__":
    main()
