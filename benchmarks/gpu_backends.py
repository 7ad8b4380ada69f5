"""A group of back ends on the same photos: opened side by side, held against PyTorch, timed in turns.

    python benchmarks/gpu_backends.py JOB.json ROWS.jsonl

A process of its own for gpu_check.py, as what a GPU's library does may end a process. Knows how each back end
is opened and what it must answer; exports nothing and prints no table.
"""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from benchmarks.common import interleave
from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import MANIFESTS, ModelInfo, Thresholds
from meta_deploy.errors import MetaDeployError
from meta_deploy.export.options import Options
from meta_deploy.export.sources.checkpoint import input_spec, preprocess_rules
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.imaging.images import read_image
from meta_deploy.imaging.preprocess import Preprocessor
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.targets import TARGETS, open_backend
from meta_deploy.tasks import get_task
from meta_deploy.tasks.accuracy import coco_ap
from meta_deploy.tasks.detection import Detections
from meta_deploy.tasks.results import coco_category_ids

CUDA_BROKEN = 3  # exit code: what failed took CUDA with it, for this process
LEAST_ROUNDS = 3
_LONGEST_REASON = 400
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The parts that are arithmetic; between them boxes are sorted and counted, which no compiler helps.
_DENSE = ("backbone", "neck", "rpn_head", "roi_head.bbox_head", "roi_head.mask_head")
_HEADS = ("rpn_head", "roi_head.bbox_head")  # boxes come of what these give

Arrays = dict[str, np.ndarray]
Infer = Callable[[np.ndarray], Arrays]


@dataclass(frozen=True)
class Kind:
    """A back end.

    Attributes:
        title: in tables.
        target: that its bundles are exported for; None: PyTorch itself.
        backend: of `open_backend`.
        on: "gpu", "cpu", or "any" for where PyTorch is: the GPU if there is one.
    """

    title: str
    target: str | None
    backend: str
    on: str

    def on_gpu(self, torch_gpu: bool) -> bool:
        """Whether it computes on a GPU; `torch_gpu`: PyTorch does."""
        return self.on == "gpu" or (self.on == "any" and torch_gpu)

    def precisions(self, torch_gpu: bool) -> tuple[str, ...]:
        """Those that it has, here."""
        if self.target is not None:
            return TARGETS[self.target].precisions
        return tuple(_TYPES) if torch_gpu else ("fp32",)  # on a CPU lower ones are slower


KINDS = {
    "pytorch": Kind("PyTorch eager", None, "", "any"),
    "compile": Kind("torch.compile", None, "", "any"),
    "onnxruntime": Kind("ONNX Runtime (CPU)", "onnxruntime", "onnxruntime", "cpu"),
    "cuda": Kind("ONNX Runtime (CUDA)", "onnxruntime", "cuda", "gpu"),
    "ort-tensorrt": Kind("ONNX Runtime (TensorRT)", "onnxruntime", "tensorrt", "gpu"),
    "tensorrt": Kind("TensorRT", "tensorrt", "tensorrt", "gpu"),
    "tensorrt-rtx": Kind("TensorRT-RTX", "tensorrt-rtx", "tensorrt", "gpu"),
}


# --- what is to be answered ---------------------------------------------------------------------------------


class Exam:
    """The photos, and what the PyTorch model says of them, in float32 on the CPU.

    Attributes:
        model: the reference.
        images: (N, 3, H, W), as the network takes them.
    """

    def __init__(
        self,
        checkpoint: str,
        size: Sequence[int] | None,
        photos: Sequence[str],
        reference: Path | None = None,
    ) -> None:
        """`size`: of the input, if not the checkpoint's; `reference`: where answers are kept, if anywhere."""
        loaded = load_model(checkpoint)
        self.model, self.config = loaded.model, loaded.config
        self.classes = tuple(loaded.class_names)
        spec = input_spec(size or loaded.config.input_size, Options())
        rules = preprocess_rules(loaded.config, spec)
        preprocessor = Preprocessor(spec, rules)
        self.task = get_task(self.config.task)
        manifest = MANIFESTS[self.config.task](
            model=ModelInfo(name=self.config.name),
            target="pytorch",
            precision="fp32",
            outputs=(),
            input=spec,
            preprocess=rules,
            classes=self.classes,
            thresholds=Thresholds(score=self.config.score_threshold),
        )
        self.bundle = Bundle(Path(checkpoint), manifest)
        self.images, self.placements = preprocessor([read_image(path) for path in photos])
        self.expected = self._reference(reference)
        self.truth = coco_truth(self.detections(self.expected), self.classes)

    def _reference(self, kept: Path | None) -> Arrays:
        if kept is not None and kept.exists():
            with np.load(kept) as stored:
                return dict(stored)
        with torch.inference_mode():
            answers = [self.model(torch.from_numpy(image[None])) for image in self.images]
        arrays = {name: torch.cat([answer[name] for answer in answers]).numpy() for name in answers[0]}
        if kept is not None:
            np.savez(kept, **arrays)
        return arrays

    def batches(self, size: int) -> list[np.ndarray]:
        """Every photo once, the last batch filled up from the first photos."""
        count = len(self.images)
        return [
            self.images[[i % count for i in range(start, start + size)]] for start in range(0, count, size)
        ]

    def sit(self, infer: Infer, size: int) -> Arrays:
        """A back end's answers to every photo, in batches of `size`."""
        answers = [infer(batch) for batch in self.batches(size)]
        return {
            name: np.concatenate([answer[name] for answer in answers])[: len(self.images)]
            for name in self.expected
        }

    def judge(self, answers: Arrays, precision: str) -> dict[str, Any]:
        """Whether answers agree with the reference as an export's must, and their AP with it as the truth."""
        comparison = self.task.comparison(PRECISIONS[precision].tolerances, self.config.score_threshold)
        comparison.add(self.expected, answers)
        stage = comparison.stages()["detections"]
        records = [
            record
            for i, found in enumerate(self.detections(answers))
            for record in found.to_coco(i, coco_category_ids(self.classes))
        ]
        ap = coco_ap(self.truth, records)
        return {
            "passed": stage["passed"],
            "figures": {key: value for key, value in stage.items() if key not in ("passed", "tolerance")},
            "tolerance": stage["tolerance"],
            "ap": {kind: part["AP"] for kind, part in ap.items() if np.isfinite(part["AP"])},
        }

    def detections(self, answers: Arrays) -> list[Detections]:
        """As the predictor makes them, but that it would refuse what is not finite; here that is zero."""
        size, score = self.bundle.input.size.max, self.config.score_threshold
        finite = {name: np.nan_to_num(array, posinf=0, neginf=0) for name, array in answers.items()}
        return [
            self.task.decode(self.bundle, finite, i, placement, size, score)
            for i, placement in enumerate(self.placements)
        ]


def coco_truth(found: Sequence[Detections], classes: Sequence[str]) -> dict[str, Any]:
    """Detections as what should have been found; an image's id is its place."""
    from pycocotools import mask as rle

    ids = coco_category_ids(classes)
    annotations = []
    for i, detections in enumerate(found):
        for record in detections.to_coco(i, ids):
            del record["score"]
            area = float(rle.area(record["segmentation"]))
            annotations.append({**record, "id": len(annotations) + 1, "area": area, "iscrowd": 0})
    return {
        "images": [{"id": i, "height": one.size[0], "width": one.size[1]} for i, one in enumerate(found)],
        "annotations": annotations,
        "categories": [{"id": id_, "name": name} for id_, name in zip(ids, classes, strict=True)],
    }


# --- the back ends ------------------------------------------------------------------------------------------


class TorchModel:
    """The reference model on a device, in a precision, perhaps compiled.

    Weights are of that precision, and autocast keeps in float32 what PyTorch thinks must be; so are boxes,
    which half precision cannot place. Arrays in and out, as of every back end.

    Attributes:
        device_ms: of each call so far the model's time by CUDA's events, copies apart; empty on a CPU.
    """

    def __init__(self, model: nn.Module, precision: str, device: str, compiled: bool = False) -> None:
        self.dtype, self.device = _TYPES[precision], torch.device(device)
        self.model = copy.deepcopy(model).to(self.device, self.dtype).eval()
        self.device_ms: list[float] = []
        if self.dtype != torch.float32:
            for name in _HEADS:
                self.model.get_submodule(name).register_forward_hook(_to_float32)
        if compiled:
            for name in _DENSE:
                self.model.get_submodule(name).compile(dynamic=False)

    def __call__(self, images: np.ndarray) -> Arrays:
        on_gpu = self.device.type == "cuda"
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
        ):
            given = torch.from_numpy(images).to(self.device, self.dtype)
            if not on_gpu:
                return _arrays(self.model(given))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            outputs = self.model(given)
            end.record()
            arrays = _arrays(outputs)
            torch.cuda.synchronize()
        self.device_ms.append(start.elapsed_time(end))
        return arrays


def _to_float32(module: nn.Module, inputs: object, outputs: Any) -> Any:
    return tree_map(lambda tensor: tensor.float(), outputs)


def _arrays(outputs: dict[str, torch.Tensor]) -> Arrays:
    return {
        name: (value.float() if value.is_floating_point() else value).cpu().numpy()
        for name, value in outputs.items()
    }


@contextlib.contextmanager
def opened(kind: str, precision: str, bundle: str | None, model: nn.Module) -> Iterator[Infer]:
    """A back end ready to be called."""
    if bundle is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield TorchModel(model, precision, device, compiled=kind == "compile")
    else:
        with open_backend(Bundle.open(bundle), KINDS[kind].backend) as backend:
            yield lambda images: backend.run({"images": images})


# --- the GPU's memory ---------------------------------------------------------------------------------------


class Memory:
    """MB of the GPU that one back end takes, from its opening on.

    Of PyTorch it is the most that its tensors held; of others what less is free after they ran.
    """

    def __init__(self, kind: str) -> None:
        self.by_torch = KINDS[kind].target is None and torch.cuda.is_available()
        self.counts = self.by_torch or KINDS[kind].on == "gpu"
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or CUDA's own start would count
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.before = self._now(torch.cuda.memory_allocated)

    def taken(self) -> float | None:
        now = self._now(torch.cuda.max_memory_allocated)
        return None if now is None or self.before is None else now - self.before

    def _now(self, by_torch: Callable[[], int]) -> float | None:
        if not self.counts:
            return None
        if self.by_torch:
            return by_torch() / 1e6
        if torch.cuda.is_available():
            free, whole = torch.cuda.mem_get_info()
            return (whole - free) / 1e6
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            return int(output.splitlines()[0]) * 1.048576
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None


# --- a group ------------------------------------------------------------------------------------------------


def main(job_file: str, rows_file: str) -> int:
    """Write a line for what happens: `at` before a back end is opened, then what was found out about it."""
    job = json.loads(Path(job_file).read_text())
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as in every other one
    torch.backends.cudnn.benchmark = True
    exam = Exam(job["checkpoint"], job["size"], job["photos"], Path(job["reference"]))
    with open(rows_file, "a") as stream, contextlib.ExitStack() as stack:

        def tell(**line: Any) -> None:
            print(json.dumps(line), file=stream, flush=True)

        tell(reference_finds=int(exam.expected["num_detections"].sum()))
        calls: dict[str, Infer] = {}
        for contender in job["contenders"]:
            name = contender["id"]
            tell(at=name)
            try:
                infer, found = check(contender, exam, job["batch"], stack)
            except Exception as error:
                tell(id=name, reason=one_line(error))
                if not usable():
                    return CUDA_BROKEN
                continue
            tell(id=name, **found)
            if found["passed"]:
                calls[name] = infer
        tell(at=None)
        times, failures = timed(calls, exam.batches(job["batch"]), job["runs"], job["seconds"])
        for name, reason in failures.items():
            tell(id=name, reason=reason)
        for name, values in times.items():
            device_ms = getattr(calls[name], "device_ms", [])[-len(values) :]
            tell(id=name, times=values, gpu_ms=float(np.median(device_ms)) if device_ms else None)
    return 0


def check(
    contender: dict[str, Any], exam: Exam, batch: int, stack: contextlib.ExitStack
) -> tuple[Infer, dict[str, Any]]:
    """Open a back end and hold it against the reference; it stays open as long as `stack`."""
    memory = Memory(contender["kind"])
    with contextlib.ExitStack() as own:
        opening = opened(contender["kind"], contender["precision"], contender["bundle"], exam.model)
        infer = own.enter_context(opening)
        answers = exam.sit(infer, batch)
        found = {"memory_mb": memory.taken(), **exam.judge(answers, contender["precision"])}
        if found["passed"]:
            stack.push(own.pop_all())
    return infer, found


class _FailedError(Exception):
    """A back end gave up while it was timed."""


def timed(
    calls: dict[str, Infer], batches: Sequence[np.ndarray], runs: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of each call, in turns over the batches; and why those failed that have none.

    As many rounds as `runs`, or, of slow ones, as fit into `seconds`.
    """
    failures: dict[str, str] = {}

    def call(name: str, turn: int) -> None:
        try:
            calls[name](batches[turn % len(batches)])
        except Exception as error:
            failures[name] = one_line(error)
            raise _FailedError from error

    while left := [name for name in calls if name not in failures]:
        contenders = {name: partial(call, name) for name in left}
        with contextlib.suppress(_FailedError):  # then once more without that one
            warm = interleave(contenders, 2)
            each = max(sum(values[-1] for values in warm.values()) / 1000, 1e-6)
            rounds = min(runs, max(LEAST_ROUNDS, int(seconds / each)))
            return interleave(contenders, rounds), failures
    return {}, failures


def usable() -> bool:
    """Whether CUDA still works in this process, where it is there at all."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def one_line(error: Exception) -> str:
    """An error as the reason of a row."""
    text = " ".join(str(error).split())
    if not isinstance(error, MetaDeployError):
        text = f"{type(error).__name__}: {text}"
    return text[:_LONGEST_REASON]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
