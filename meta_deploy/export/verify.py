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
from meta_deploy.models.ops.boxes import INVALID
from meta_deploy.targets.target import Arrays, Runner

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
MATCH_IOU = 0.9  # boxes that overlap by this, with one label, are one box
# A matched pair's scores are at most this many times their tolerance apart; boxes this near to a cut-off need
# no partner. Proposals have logits instead.
NEAR = 10.0


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
    comparison = Comparison(tolerance, getattr(model.config, "score_threshold", 0.0))
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


class Comparison:
    """Gathers differences batch by batch; `stages` sums them up.

    `tolerance` is one of `TOLERANCES`; `score_threshold` where the model cuts its list of detections off.
    """

    def __init__(self, tolerance: dict[str, float], score_threshold: float = 0.0) -> None:
        self.tolerance = tolerance
        self.score_threshold = score_threshold
        self.map_errors: list[float] = []
        self.map_rms: list[float] = []
        self.proposals = _Matches("logits")
        self.detections = _Matches("scores")
        self.same_label: list[float] = []

    def add(self, expected: dict[str, np.ndarray], actual: dict[str, np.ndarray]) -> None:
        """One batch of both sides' outputs, by name; of the stages only those that `actual` has count."""
        for name, value in expected.items():
            if name in actual and name.startswith(("feature_", "logits")):
                scale = max(float(np.abs(value).max()), 1e-12)
                difference = actual[name] - value
                self.map_errors.append(_finite(float(np.abs(difference).max()) / scale))
                norm = max(float(np.linalg.norm(value)), 1e-12)
                self.map_rms.append(_finite(float(np.linalg.norm(difference)) / norm))
        if "logits" in expected:
            same = expected["logits"].argmax(1) == actual["logits"].argmax(1)
            self.same_label.append(float(same.mean()))
        if "proposals" in actual:
            for b in range(len(expected["proposals"])):
                self.proposals.add(self._proposals(expected, b), self._proposals(actual, b))
        if "boxes" in expected:
            for b in range(len(expected["boxes"])):
                self.detections.add(self._detections(expected, b), self._detections(actual, b))

    def _proposals(self, side: dict[str, np.ndarray], b: int) -> Boxes:
        return Boxes(
            side["proposals"][b], side["proposal_logits"][b], INVALID, NEAR * self.tolerance["logits"]
        )

    def _detections(self, side: dict[str, np.ndarray], b: int) -> Boxes:
        boxes, scores, labels, masks = (side[name][b] for name in ("boxes", "scores", "labels", "masks"))
        # Who reads the outputs goes by their count.
        scores = np.where(np.arange(len(scores)) < side["num_detections"][b], scores, -np.inf)
        return Boxes(boxes, scores, self.score_threshold, NEAR * self.tolerance["scores"], labels, masks)

    def stages(self) -> dict[str, dict[str, Any]]:
        """Figures, tolerance and verdict per stage."""
        tolerance = self.tolerance
        stages: dict[str, dict[str, Any]] = {}
        if self.map_errors:
            figures = {"max_relative_error": max(self.map_errors), "rms_relative_error": max(self.map_rms)}
            name, limit = ("max", "maps") if "maps" in tolerance else ("rms", "maps_rms")
            limits = {f"{name}_relative_error": tolerance[limit]}
            passed = all(figures[key] <= limits[key] for key in limits)
            stages["maps"] = {**figures, "tolerance": limits, "passed": passed}
        if self.same_label:
            agreement = float(np.mean(self.same_label))
            stages["pixels"] = {
                "agreement": agreement,
                "tolerance": {"agreement": tolerance["agreement"]},
                "passed": agreement >= tolerance["agreement"],
            }
        if self.proposals.images:
            stages["proposals"] = self.proposals.stage({**tolerance, "agreement": tolerance["proposals"]})
        if self.detections.images:
            stages["detections"] = self.detections.stage(tolerance)
        return stages


def _finite(error: float) -> float:
    return error if np.isfinite(error) else float("inf")


class Boxes:
    """One image's boxes of one side, those with a score: xyxy, score, label, mask probabilities.

    `score_threshold` is where the model itself cuts the list off; `tolerance` how near two scores of one
    box are.
    """

    def __init__(
        self,
        boxes: np.ndarray,
        scores: np.ndarray,
        score_threshold: float,
        tolerance: float,
        labels: np.ndarray | None = None,
        masks: np.ndarray | None = None,
    ) -> None:
        found = scores > score_threshold
        self.tolerance = tolerance
        self.boxes, self.scores = boxes[found].astype(np.float64), scores[found].astype(np.float64)
        self.labels = np.zeros(len(self.scores)) if labels is None else labels[found]
        self.masks = None if masks is None else masks[found]
        # Which box came last, where the list is full or at the threshold, may hang on rounding.
        last = self.scores.min() if len(scores) and found.all() else score_threshold
        self.cut_off = last + tolerance


class _Matches:
    """Boxes of both sides, matched one to one by overlap and label, over many images."""

    def __init__(self, scores: str) -> None:
        self.scores = scores  # what the boxes are ranked by, a key of the tolerances
        self.images = 0
        self.compared = 0
        self.agreed = 0
        self.box_ious: list[float] = []
        self.mask_ious: list[float] = []
        self.score_differences: list[float] = []

    def add(self, expected: Boxes, actual: Boxes) -> None:
        self.images += 1
        pairs = match(expected, actual)
        ious = box_ious(expected.boxes, actual.boxes)
        for i, j in pairs:
            self.score_differences.append(float(abs(expected.scores[i] - actual.scores[j])))
            self.box_ious.append(float(ious[i, j]))
            if expected.masks is not None and actual.masks is not None:
                a, b = expected.masks[i] >= 0.5, actual.masks[j] >= 0.5
                self.mask_ious.append(float((a & b).sum() / max((a | b).sum(), 1)) if (a | b).any() else 1.0)
        matched = ({i for i, _ in pairs}, {j for _, j in pairs})
        for side, partners in zip((expected, actual), matched, strict=True):
            # A box without a partner counts unless it is at the cut-off; but all can't be without one.
            excused = side.cut_off if pairs or not len(expected.scores) or not len(actual.scores) else -np.inf
            alone = sum(side.scores[i] > excused for i in range(len(side.scores)) if i not in partners)
            self.compared += len(partners) + int(alone)
            self.agreed += len(partners)

    def stage(self, tolerance: dict[str, float]) -> dict[str, Any]:
        agreement = self.agreed / self.compared if self.compared else 1.0
        figures: dict[str, float] = {"agreement": agreement}
        limits = {"agreement": tolerance["agreement"]}
        most = max(self.score_differences, default=0.0)
        passed = agreement >= tolerance["agreement"]
        if self.score_differences:
            figures["mean_score_difference"] = float(np.mean(self.score_differences))
            limits["mean_score_difference"] = tolerance[self.scores]
            passed = passed and figures["mean_score_difference"] <= limits["mean_score_difference"]
        for name, ious in (("box_iou", self.box_ious), ("mask_iou", self.mask_ious)):
            if ious:
                figures[f"mean_{name}"] = float(np.mean(ious))
                limits[f"mean_{name}"] = tolerance[name]
                passed = passed and figures[f"mean_{name}"] >= tolerance[name]
        count = {"compared": self.compared // 2}
        return {**count, **figures, "max_score_difference": most, "tolerance": limits, "passed": passed}


def box_ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair of boxes: (N, 4) and (M, 4) xyxy -> (N, M)."""
    a, b = a[:, None], b[None]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    inter = sides[..., 0] * sides[..., 1]
    area_a, area_b = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b))
    return inter / np.maximum(area_a + area_b - inter, 1e-9)


def match(expected: Boxes, actual: Boxes) -> list[tuple[int, int]]:
    """Pairs (i, j) of boxes of one label, near scores and an IoU of at least `MATCH_IOU`, best first."""
    if not len(expected.scores) or not len(actual.scores):
        return []
    iou = box_ious(expected.boxes, actual.boxes)
    near = np.abs(expected.scores[:, None] - actual.scores[None]) <= expected.tolerance
    iou[(expected.labels[:, None] != actual.labels[None]) | ~near] = 0.0
    candidates = np.argwhere(iou >= MATCH_IOU)
    order = np.argsort(-iou[tuple(candidates.T)], kind="stable")
    pairs: list[tuple[int, int]] = []
    taken_i, taken_j = set(), set()
    for i, j in candidates[order].tolist():
        if i not in taken_i and j not in taken_j:
            pairs.append((i, j))
            taken_i.add(i)
            taken_j.add(j)
    return pairs
