"""COCO average precision of detections, by pycocotools; intersection over union of class maps.

Knows COCO's annotation and result formats, and arrays; nothing of models, bundles or images.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

IGNORED = 255  # of label images: a pixel that does not count


def coco_ap(
    ground_truth: dict[str, Any] | str | PathLike[str],
    results: Sequence[dict[str, Any]],
    max_detections: int = 100,
) -> dict[str, dict[str, Any]]:
    """Average precision of `results` against `ground_truth`, as COCO defines it.

    Args:
        ground_truth: a COCO annotation dictionary, or the path of its JSON file.
        results: COCO results: one entry a detection, with `image_id`, `category_id`, `score`, `bbox`
            (xywh, pixels) and, for mask AP, `segmentation` (RLE). Images without an entry count as empty.
        max_detections: the most of an image that count, the best first; COCO's own is 100.

    Returns:
        `{"box": …, "mask": …}`, each `{"AP", "AP50", "AP75", "per_class": {class name: AP}}` in 0..1;
        NaN where the ground truth has no object of a class. `mask` is there when the ground truth has masks;
        detections without one then count as misses.
    """
    from pycocotools.coco import COCO

    if not isinstance(ground_truth, dict):
        ground_truth = json.loads(Path(ground_truth).read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        # COCO wants these; deep-copied because it also writes into what it is given.
        truth.dataset = {"info": {}, "categories": [], **json.loads(json.dumps(ground_truth))}
        truth.createIndex()
        report = {"box": _evaluate(truth, _as_boxes(results), "bbox", max_detections)}
        if any("segmentation" in annotation for annotation in truth.dataset["annotations"]):
            with_mask = [result for result in results if result.get("segmentation") is not None]
            report["mask"] = _evaluate(truth, with_mask, "segm", max_detections)
    return report


def match_counts(
    ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], iou: float = 0.5
) -> dict[int, tuple[int, int, int]]:
    """True positives, false positives and false negatives of each image's masks, all scores counted.

    TP / (TP + FP + FN) is what papers on cells call average precision at one IoU (Schmidt et al., MICCAI
    2018). By falling score, each result takes the object of its class, not taken yet, that it overlaps most,
    if their IoU is at least `iou`. Crowds are left out.

    Args:
        ground_truth: a COCO annotation dictionary with masks as RLE.
        results: COCO results with `segmentation` (RLE).

    Returns:
        (TP, FP, FN) by image id.
    """
    from pycocotools import mask as rle

    def by_image(records: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
        groups: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in ground_truth["images"]}
        for record in records:
            groups[record["image_id"]].append(record)
        return groups

    objects = by_image([a for a in ground_truth["annotations"] if not a.get("iscrowd")])
    found = by_image(sorted(results, key=lambda result: -result["score"]))
    counts = {}
    for image_id, truths in objects.items():
        masks = [result["segmentation"] for result in found[image_id]]
        matched = 0
        if masks and truths:
            overlaps = rle.iou(masks, [truth["segmentation"] for truth in truths], [0] * len(truths))
            same = [
                [result["category_id"] == truth["category_id"] for truth in truths]
                for result in found[image_id]
            ]
            overlaps = np.where(same, overlaps, -1.0)
            for row in overlaps:  # a view: what is taken is struck out below
                best = int(row.argmax())
                if row[best] >= iou:
                    matched += 1
                    overlaps[:, best] = -1.0
        counts[image_id] = (matched, len(masks) - matched, len(truths) - matched)
    return counts


def _as_boxes(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: r[key] for key in ("image_id", "category_id", "score", "bbox")} for r in results]


def _evaluate(
    truth: Any, results: Sequence[dict[str, Any]], kind: str, max_detections: int
) -> dict[str, Any]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if results:
        # loadRes looks at the first entry to learn what it holds, and prefers `bbox`.
        entries = [dict(result) for result in results]
        if kind == "segm":
            for entry in entries:
                entry.pop("bbox", None)
        found = truth.loadRes(entries)
    else:
        found = COCO()
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()

    evaluation = COCOeval(truth, found, kind)
    evaluation.params.maxDets = [max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    # (IoU thresholds 0.50:0.05:0.95, recalls, classes), all areas, max_detections; -1: no object.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]

    def mean(part: np.ndarray) -> float:
        part = part[part > -1]
        return float(part.mean()) if part.size else float("nan")

    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    per_class = {names[id_]: mean(precision[..., k]) for k, id_ in enumerate(evaluation.params.catIds)}
    return {
        "AP": mean(precision),
        "AP50": mean(precision[0]),
        "AP75": mean(precision[5]),
        "per_class": per_class,
    }


class Pixels:
    """How well class maps agree with the truth, from counts of pixels: (true class, class that was found)."""

    def __init__(self) -> None:
        self._counts = np.zeros((0, 0), np.int64)

    def add(self, truth: np.ndarray, found: np.ndarray) -> None:
        """One image's classes, both (H, W)."""
        expected, actual = truth.astype(np.int64).ravel(), found.astype(np.int64).ravel()
        most = int(max(expected.max(initial=-1), actual.max(initial=-1), len(self._counts) - 1)) + 1
        grown = np.zeros((most, most), np.int64)
        grown[: len(self._counts), : len(self._counts)] += self._counts
        self._counts = grown + np.bincount(expected * most + actual, minlength=most * most).reshape(
            most, most
        )

    def add_labels(self, labels: np.ndarray, found: np.ndarray) -> None:
        """The same against a label image, whose `IGNORED` pixels do not count."""
        counted = labels != IGNORED
        self.add(labels[counted], found[counted])

    @property
    def total(self) -> int:
        """The pixels that counted."""
        return int(self._counts.sum())

    @property
    def mean_iou(self) -> float:
        """Over the classes that occur on either side; NaN of no pixels."""
        both = self._counts.diagonal()
        either = self._counts.sum(axis=0) + self._counts.sum(axis=1) - both
        return float((both[either > 0] / either[either > 0]).mean()) if self.total else float("nan")

    @property
    def accuracy(self) -> float:
        """The share of pixels of the right class; NaN of no pixels."""
        return float(self._counts.trace() / self.total) if self.total else float("nan")
