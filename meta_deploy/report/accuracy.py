"""COCO average precision of detections, by pycocotools.

Knows COCO's annotation and result formats, nothing of models, bundles or images.
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


def coco_ap(
    ground_truth: dict[str, Any] | str | PathLike[str], results: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Average precision of `results` against `ground_truth`, as COCO defines it.

    Args:
        ground_truth: a COCO annotation dictionary, or the path of its JSON file.
        results: COCO results: one entry a detection, with `image_id`, `category_id`, `score`, `bbox`
            (xywh, pixels) and, for mask AP, `segmentation` (RLE). Images without an entry count as empty.

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
        report = {"box": _evaluate(truth, _as_boxes(results), "bbox")}
        if any("segmentation" in annotation for annotation in truth.dataset["annotations"]):
            with_mask = [result for result in results if result.get("segmentation") is not None]
            report["mask"] = _evaluate(truth, with_mask, "segm")
    return report


def _as_boxes(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: r[key] for key in ("image_id", "category_id", "score", "bbox")} for r in results]


def _evaluate(truth: Any, results: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
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
    evaluation.evaluate()
    evaluation.accumulate()
    # (IoU thresholds 0.50:0.05:0.95, recalls, classes), all areas, 100 detections an image; -1: no object.
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
