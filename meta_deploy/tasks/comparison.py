"""How far two sides' outputs are apart: maps, boxes, pixels, arrays. Sums up batch by batch.

Knows arrays and tolerances; must not know what made them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

MATCH_IOU = 0.9  # boxes that overlap by this, with one label, are one box
# A matched pair's scores are at most this many times their tolerance apart; boxes this near to a cut-off need
# no partner. Proposals have logits instead.
NEAR = 10.0
PADDING = -1.0e4  # the logit of a proposal that is only padding
Arrays = Mapping[str, np.ndarray]


class Comparison(ABC):
    """Gathers differences batch by batch; `stages` sums them up.

    `tolerance` is what a precision must keep:
        maps: the largest difference, over the map's largest value.
        maps_rms: the norm of the difference, over the map's; where single values may be far off.
        agreement: the share of boxes (of pixels, of elements) that both sides have; `proposals` likewise.
        logits, scores, box_iou, mask_iou: means over the matched boxes.
    """

    def __init__(self, tolerance: Mapping[str, float]) -> None:
        self.tolerance = tolerance

    @abstractmethod
    def add(self, expected: Arrays, actual: Arrays) -> None:
        """One batch of both sides' outputs, by name; of the stages only those that `actual` has count."""

    @abstractmethod
    def stages(self) -> dict[str, dict[str, Any]]:
        """Figures, tolerance and verdict of each stage."""


class Floats:
    """Differences of float arrays, relative to the array's size."""

    def __init__(self) -> None:
        self.most: list[float] = []
        self.rms: list[float] = []

    def add(self, expected: np.ndarray, actual: np.ndarray) -> None:
        difference = actual - expected
        scale = max(float(np.abs(expected).max()), 1e-12)
        norm = max(float(np.linalg.norm(expected)), 1e-12)
        self.most.append(_finite(float(np.abs(difference).max()) / scale))
        self.rms.append(_finite(float(np.linalg.norm(difference)) / norm))

    def stage(self, tolerance: Mapping[str, float]) -> dict[str, Any]:
        figures = {"max_relative_error": max(self.most), "rms_relative_error": max(self.rms)}
        name, limit = ("max", "maps") if "maps" in tolerance else ("rms", "maps_rms")
        limits = {f"{name}_relative_error": tolerance[limit]}
        passed = all(figures[key] <= limits[key] for key in limits)
        return {**figures, "tolerance": limits, "passed": passed}


class Shares:
    """The share of elements that are the same, a mean over batches."""

    def __init__(self) -> None:
        self.same: list[float] = []

    def add(self, same: np.ndarray) -> None:
        self.same.append(float(same.mean()) if same.size else 1.0)

    def stage(self, tolerance: Mapping[str, float]) -> dict[str, Any]:
        agreement, least = float(np.mean(self.same)), tolerance["agreement"]
        return {"agreement": agreement, "tolerance": {"agreement": least}, "passed": agreement >= least}


class MapsComparison(Comparison):
    """Compares the maps that all our models have: features, and logits where there are any."""

    def __init__(self, tolerance: Mapping[str, float]) -> None:
        super().__init__(tolerance)
        self.maps = Floats()

    def add(self, expected: Arrays, actual: Arrays) -> None:
        for name, value in expected.items():
            if name in actual and name.startswith(("feature_", "logits")):
                self.maps.add(value, actual[name])

    def stages(self) -> dict[str, dict[str, Any]]:
        return {"maps": self.maps.stage(self.tolerance)} if self.maps.most else {}


class SegmentationComparison(MapsComparison):
    """Compares class maps too."""

    def __init__(self, tolerance: Mapping[str, float]) -> None:
        super().__init__(tolerance)
        self.pixels = Shares()

    def add(self, expected: Arrays, actual: Arrays) -> None:
        super().add(expected, actual)
        self.pixels.add(expected["logits"].argmax(1) == actual["logits"].argmax(1))

    def stages(self) -> dict[str, dict[str, Any]]:
        return {**super().stages(), "pixels": self.pixels.stage(self.tolerance)}


class DetectionComparison(MapsComparison):
    """Compares proposals and detections too. `score_threshold` is where the model cuts its list off."""

    def __init__(self, tolerance: Mapping[str, float], score_threshold: float = 0.0) -> None:
        super().__init__(tolerance)
        self.score_threshold = score_threshold
        self.proposals = Matches("logits")
        self.detections = Matches("scores")

    def add(self, expected: Arrays, actual: Arrays) -> None:
        super().add(expected, actual)
        if "proposals" in actual:
            for b in range(len(expected["proposals"])):
                self.proposals.add(self._proposals(expected, b), self._proposals(actual, b))
        for b in range(len(expected["boxes"])):
            self.detections.add(self._detections(expected, b), self._detections(actual, b))

    def _proposals(self, side: Arrays, b: int) -> Boxes:
        near = NEAR * self.tolerance["logits"]
        return Boxes(side["proposals"][b], side["proposal_logits"][b], PADDING, near)

    def _detections(self, side: Arrays, b: int) -> Boxes:
        boxes, scores, labels = (side[name][b] for name in ("boxes", "scores", "labels"))
        masks = side["masks"][b] if "masks" in side else None
        # Who reads the outputs goes by their count.
        scores = np.where(np.arange(len(scores)) < side["num_detections"][b], scores, -np.inf)
        return Boxes(boxes, scores, self.score_threshold, NEAR * self.tolerance["scores"], labels, masks)

    def stages(self) -> dict[str, dict[str, Any]]:
        stages, tolerance = super().stages(), self.tolerance
        if self.proposals.images:
            stages["proposals"] = self.proposals.stage({**tolerance, "agreement": tolerance["proposals"]})
        if self.detections.images:
            stages["detections"] = self.detections.stage(tolerance)
        return stages


class RawComparison(Comparison):
    """Compares arrays of any names: floats by their differences, the rest by the share that is equal."""

    def __init__(self, tolerance: Mapping[str, float]) -> None:
        super().__init__(tolerance)
        self.outputs: dict[str, Floats | Shares] = {}

    def add(self, expected: Arrays, actual: Arrays) -> None:
        for name, one in expected.items():
            other = actual.get(name, np.empty(()))  # what is absent differs
            alike = name in actual and one.shape == other.shape
            if one.dtype.kind == "f":
                floats = self.outputs.setdefault(name, Floats())
                assert isinstance(floats, Floats)
                floats.add(*_comparable(one, other) if alike else (np.zeros(1), np.full(1, np.inf)))
            else:
                shares = self.outputs.setdefault(name, Shares())
                assert isinstance(shares, Shares)
                shares.add(one == other if alike else np.zeros(1, bool))

    def stages(self) -> dict[str, dict[str, Any]]:
        return {name: gathered.stage(self.tolerance) for name, gathered in self.outputs.items()}


def _comparable(expected: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, without the NaNs and infinities that they share; of none left, one zero."""
    one, other = expected.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
    finite = ~((one == other) & np.isinf(one) | np.isnan(one) & np.isnan(other))
    one, other = one[finite], other[finite]
    return (one, other) if len(one) else (np.zeros(1), np.zeros(1))


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


class Matches:
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

    def stage(self, tolerance: Mapping[str, float]) -> dict[str, Any]:
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
