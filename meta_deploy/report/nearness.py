"""How far an entry's scores and logits are from the first entry's, beside what its results come to.

Knows results and arrays; must not know what made them.
"""

from __future__ import annotations

import numpy as np

from meta_deploy.report.disagreement import SURE
from meta_deploy.tasks.comparison import Floats, box_ious
from meta_deploy.tasks.detection import Detections
from meta_deploy.tasks.results import Result

LOGITS = 8  # images whose logits are compared; they are run once more for it
_PAIR_IOU = 0.5


class Nearness:
    """Gathers one entry's differences, image by image."""

    def __init__(self) -> None:
        self._scores: list[float] = []
        self._logits = Floats()

    def add(self, first: Result, result: Result) -> None:
        """One image's results: the scores of detections that both have."""
        if isinstance(first, Detections) and isinstance(result, Detections):
            self._scores += score_differences(first, result)

    def add_logits(self, first: np.ndarray | None, logits: np.ndarray | None) -> None:
        """One image's logits (1, classes, h, w); those of other shapes cannot be compared."""
        if first is not None and logits is not None and first.shape == logits.shape:
            self._logits.add(first.astype(np.float64), logits.astype(np.float64))

    def figures(self) -> dict[str, float]:
        """Fields of `schema.Accuracy`; without what was not met."""
        found = {}
        if self._scores:
            found["mean_score_difference"] = float(np.mean(self._scores))
            found["max_score_difference"] = max(self._scores)
        if self._logits.rms:
            found["logit_error"] = max(self._logits.rms)
        return found


def score_differences(first: Detections, other: Detections) -> list[float]:
    """Of detections of both, paired by class and an IoU of at least 0.5, the best overlap first.

    Only those of `first` with a score of at least SURE are looked for.
    """
    first = first.filter(SURE)
    if first.classes != other.classes or not len(first.scores) or not len(other.scores):
        return []
    overlap = box_ious(first.boxes, other.boxes)
    overlap[first.labels[:, None] != other.labels[None]] = 0
    found = []
    for _ in range(min(overlap.shape)):
        i, j = np.unravel_index(overlap.argmax(), overlap.shape)
        if overlap[i, j] < _PAIR_IOU:
            break
        found.append(abs(float(first.scores[i]) - float(other.scores[j])))
        overlap[i], overlap[:, j] = 0, 0
    return found
