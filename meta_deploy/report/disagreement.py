"""The images on which entries differ most from the first one, with every entry's result drawn on them.

Knows results of tasks and pixels; must not know what made the results.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from meta_deploy.errors import ImageError
from meta_deploy.report.schema import Disagreement
from meta_deploy.tasks.accuracy import match_counts
from meta_deploy.tasks.detection import Detections
from meta_deploy.tasks.results import Result
from meta_deploy.tasks.semantic_segmentation import Segmentation

SURE = 0.3  # the least score of detections that are compared and drawn
MOST = 3  # images that are shown
LEAST = 1e-3  # disagreement under which an image is not shown
WIDTH = 480  # of an overlay, in pixels
_QUALITY = 80


class Disagreements:
    """Sees the results of each image, and keeps those of the images with most disagreement."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, str, dict[str, float], dict[str, Result]]] = []

    def see(self, image: str, results: Mapping[str, Result]) -> None:
        """The results of the entries that ran on an image, the first entry's first."""
        names = list(results)
        if len(names) < 2:
            return
        apart = {name: disagreement(results[names[0]], results[name]) for name in names[1:]}
        values = {name: value for name, value in apart.items() if value is not None}
        worst = max(values.values(), default=0.0)
        if worst >= LEAST:
            self._kept.append((worst, image, values, dict(results)))
            self._kept = sorted(self._kept, key=lambda kept: -kept[0])[:MOST]

    def drawn(self) -> tuple[Disagreement, ...]:
        """The images, the worst first."""
        return tuple(
            Disagreement(image=image, values=values, overlays=_overlays(image, results))
            for _, image, values, results in self._kept
        )


def disagreement(first: Result, other: Result) -> float | None:
    """How far a result is from the first entry's, 0 to 1; None where they are not of one kind.

    Of detections of a score of at least SURE: 1 - TP / (TP + FP + FN), where a pair has one class and an IoU
    of at least 0.5, of masks where both have them. Of class maps: the share of pixels of another class.
    """
    if isinstance(first, Detections) and isinstance(other, Detections) and first.size == other.size:
        return _apart(first.filter(SURE), other.filter(SURE))
    if isinstance(first, Segmentation) and isinstance(other, Segmentation) and first.size == other.size:
        return float((first.labels != other.labels).mean())
    return None


def _apart(first: Detections, other: Detections) -> float:
    masks = first.segments is not None and other.segments is not None
    truth, found = (_records(result, masks) for result in (first, other))
    tp, fp, fn = match_counts({"images": [{"id": 1}], "annotations": truth}, found)[1]
    return 1 - tp / (tp + fp + fn) if tp + fp + fn else 0.0


def _records(result: Detections, masks: bool) -> list[dict[str, object]]:
    """COCO records; without masks, boxes in their place, which pycocotools takes just so."""
    ids: Sequence[int] = range(1, len(result.classes) + 1)
    records = result.to_coco(1, ids)
    return records if masks else [{**record, "segmentation": record["bbox"]} for record in records]


def _overlays(image: str, results: Mapping[str, Result]) -> dict[str, bytes]:
    """Entry -> JPEG. Without those of an image that cannot be read any more."""
    found = {}
    for name, result in results.items():
        shown = result.filter(SURE) if isinstance(result, Detections) else result
        with contextlib.suppress(ImageError):
            found[name] = _jpeg(shown.draw(image))  # type: ignore[attr-defined]
    return found


def _jpeg(pixels: np.ndarray) -> bytes:
    picture = Image.fromarray(pixels)
    picture.thumbnail((WIDTH, WIDTH))
    stream = io.BytesIO()
    picture.save(stream, "jpeg", quality=_QUALITY)
    return stream.getvalue()
