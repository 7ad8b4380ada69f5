"""Does the graph that ships answer as the PyTorch model does? Both run on images, stage by stage.

Knows the models' and the runtime's interfaces; no pass and no target.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from meta_deploy.bundle.manifest import InputSpec, Preprocess
from meta_deploy.errors import CheckpointError, VerificationError
from meta_deploy.imaging.images import read_image
from meta_deploy.imaging.preprocess import Preprocessor
from meta_deploy.targets.target import Arrays, Runner
from meta_deploy.tasks import get_task

# What each precision must keep. `maps`: largest difference over the map's largest value; `maps_rms`: norm of
# the difference over the map's, where single values may be far off. `agreement`: share of boxes (pixels, for
# segmentation) that both sides have. The others are means over the matched boxes.
TOLERANCES = {
    "fp32": {
        "maps": 2e-4,
        "agreement": 0.99,
        "proposals": 0.99,
        "logits": 5e-3,
        "scores": 1e-3,
        "box_iou": 0.995,
        "mask_iou": 0.99,
    },
    "fp16": {
        "maps_rms": 0.02,
        "agreement": 0.95,
        "proposals": 0.9,
        "logits": 5e-2,
        "scores": 1e-2,
        "box_iou": 0.98,
        "mask_iou": 0.97,
    },
    "bf16": {
        "maps_rms": 0.1,
        "agreement": 0.85,
        "proposals": 0.75,
        "logits": 0.25,
        "scores": 5e-2,
        "box_iou": 0.95,
        "mask_iou": 0.9,
    },
}


def verify(
    model: nn.Module,
    graph: onnx.ModelProto,
    images: Sequence[Path],
    spec: InputSpec,
    preprocess: Preprocess,
    precision: str,
    runner: Runner | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run the PyTorch model and the ONNX graph on images and compare what both say.

    Args:
        model: the reference, float32, in evaluation mode.
        graph: what will ship, with those intermediate stages as outputs that it still has.
        images: files to read; every batch size between the smallest and the largest is met at its ends.
        spec: the input's dimensions.
        preprocess: the manifest's rules.
        precision: a key of `TOLERANCES`.
        runner: what runs the files that ship, where they are not the graph; without it the graph is run.
        progress: called with (images done, images in all).

    Returns:
        The manifest's `verification`: per stage the figures, the tolerance, and whether it holds.

    Raises:
        VerificationError: a stage is off (its `figures` holds the whole result), or the graph does not run.
        ImageError: an image cannot be read.
        CheckpointError: the model's own features are not finite.
    """
    exported: Runner = runner or _Exported(graph)
    preprocessor = Preprocessor(spec, preprocess)
    tolerance = TOLERANCES[precision]
    config: Any = model.config
    comparison = get_task(config.task).comparison(tolerance, getattr(config, "score_threshold", 0.0))
    done = 0
    with model.get_submodule("backbone").register_forward_hook(_check_finite):
        for paths in _batches(images, spec):
            batch, _ = preprocessor([read_image(path) for path in paths])
            with torch.inference_mode():
                expected = {k: v.numpy() for k, v in model(torch.from_numpy(batch), stages=True).items()}
            comparison.add(expected, exported({spec.name: batch}))
            done += len(paths)
            progress(min(done, len(images)), len(images))

    stages = comparison.stages()
    result = {
        "images": len(images),
        "reference": f"PyTorch {torch.__version__} float32",
        "backend": getattr(exported, "runs_on", f"ONNX Runtime {onnxruntime.__version__} CPU"),
        "stages": stages,
        "passed": all(stage["passed"] for stage in stages.values()),
    }
    if not result["passed"]:
        raise _failure(result)
    return result


def _check_finite(backbone: nn.Module, inputs: object, maps: list[torch.Tensor]) -> None:
    if not all(bool(m.isfinite().all()) for m in maps):
        raise CheckpointError(
            "the checkpoint's own features are not finite on these images; "
            "its weights are damaged or its training diverged: take an earlier one"
        )


def _failure(result: dict[str, Any]) -> VerificationError:
    name, stage = next((n, s) for n, s in result["stages"].items() if not s["passed"])
    figures = ", ".join(f"{k} {_short(v)}" for k, v in stage.items() if k not in ("passed", "tolerance"))
    limits = ", ".join(f"{k} {_short(v)}" for k, v in stage["tolerance"].items())
    error = VerificationError(
        f"the exported model does not match PyTorch on {result['images']} images: {name} are off "
        f"({figures}; wanted: {limits}); no bundle was written"
    )
    error.figures = result  # type: ignore[attr-defined]
    return error


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class _Exported:
    """The graph on ONNX Runtime's CPU."""

    def __init__(self, graph: onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # Memory goes back after each run, for PyTorch to use: side by side a large model needs gigabytes.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # PyTorch's turn comes next
        with self._told():
            self.session = onnxruntime.InferenceSession(
                graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        self.names = [output.name for output in self.session.get_outputs()]

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        with self._told():
            return dict(zip(self.names, self.session.run(None, dict(inputs)), strict=True))

    @staticmethod
    @contextlib.contextmanager
    def _told() -> Iterator[None]:
        """ONNX Runtime's own errors, which have no common class, as ours."""
        try:
            yield
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise VerificationError(
                f"ONNX Runtime cannot run the exported graph: {reason}; no bundle was written"
            ) from error


def _batches(images: Sequence[Path], spec: InputSpec) -> Iterator[list[Path]]:
    """Every image once, in batches of the largest size, then of the smallest, then of the usual one."""
    sizes = [spec.batch.max, spec.batch.min] if not spec.static_batch else []
    start = 0
    while start < len(images) or sizes:
        size = sizes.pop(0) if sizes else spec.batch.opt
        # A short last batch is filled up from the start: a static graph takes no other size.
        yield [images[i % len(images)] for i in range(start, start + size)]
        start += size
