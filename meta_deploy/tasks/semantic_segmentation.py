"""A class for every pixel: the task, and its result.

Knows arrays; must not know files, back ends or how a result is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import Size
from meta_deploy.imaging.images import ImageLike, is_large
from meta_deploy.imaging.preprocess import Placement
from meta_deploy.tasks.comparison import Comparison, SegmentationComparison
from meta_deploy.tasks.draw import draw_segmentation
from meta_deploy.tasks.masks import Mask
from meta_deploy.tasks.results import ImageResult, coco_category_ids, listed
from meta_deploy.tasks.task import Output, Task, check_classes, check_finite
from meta_deploy.tasks.tiles import Tile, join_maps

BAND = 256  # rows of a large image that are worked on at a time


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation(ImageResult):
    """The class of every pixel of one image: `labels` is int16 (H, W), indices into `classes`."""

    columns = ("label", "class", "area", "fraction")

    labels: np.ndarray
    classes: tuple[str, ...]

    def __repr__(self) -> str:
        pixels = max(self.labels.size, 1)
        return listed([f"{self.classes[i]} {100 * area / pixels:.0f}%" for i, area in self.areas.items()])

    @property
    def size(self) -> Size:
        """The image's (height, width)."""
        return self.labels.shape[0], self.labels.shape[1]

    def filter(self, score: float) -> Segmentation:
        """Itself: a class map has no scores."""
        return self

    @property
    def areas(self) -> dict[int, int]:
        """The pixels of each label that occurs, the largest first."""
        counts = np.zeros(len(self.classes), np.int64)
        for top in range(0, len(self.labels), BAND):  # counting makes each label 8 bytes
            counts += np.bincount(self.labels[top : top + BAND].ravel(), minlength=len(counts))
        return {int(i): int(counts[i]) for i in np.argsort(-counts, kind="stable") if counts[i]}

    def to_coco(self, image_id: int | str, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO stuff-style records (image_id, category_id, segmentation RLE), one a class that occurs."""
        ids = coco_category_ids(self.classes) if category_ids is None else category_ids
        return [
            {"image_id": image_id, "category_id": int(ids[label]), "segmentation": self._mask(label).rle()}
            for label in self.areas
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: path, size [H, W], segments (label, name, pixels, mask as COCO RLE), timings."""
        segments = [
            {"label": label, "name": self.classes[label], "pixels": pixels, "mask": self._mask(label).rle()}
            for label, pixels in self.areas.items()
        ]
        return {
            "path": self.path,
            "size": list(self.size),
            "segments": segments,
            "timings": self.timings.to_dict(),
        }

    def label_image(self) -> np.ndarray:
        """The class of each pixel: uint16 (H, W)."""
        return self.labels.astype(np.uint16)

    def table(self, image: ImageLike | None = None) -> list[dict[str, Any]]:
        """A row a class that occurs: its label, name, pixels, and share of the image."""
        return [
            {"label": label, "class": self.classes[label], "area": area, "fraction": area / self.labels.size}
            for label, area in self.areas.items()
        ]

    def _mask(self, label: int) -> Mask:
        return Mask.from_full(self.labels == label)

    def _drawn(self, picture: Image.Image) -> Image.Image:
        return draw_segmentation(picture, self.labels, self.classes, list(self.areas))


class SemanticSegmentation(Task):
    """A class for every pixel."""

    name = "semantic-segmentation"
    columns = Segmentation.columns
    slides = True
    outputs: ClassVar[Mapping[str, Output]] = {
        "logits": Output("float32", ("batch", "classes", "rows", "columns"))
    }

    def decode(
        self,
        bundle: Bundle,
        outputs: Mapping[str, np.ndarray],
        index: int,
        placement: Placement,
        padded: Size,
        score_threshold: float,
    ) -> Segmentation:
        logits = outputs["logits"][index]
        check_classes(bundle, len(logits))
        check_finite(bundle, logits)
        return Segmentation(class_map(logits, placement, padded), bundle.classes)

    def join(self, size: Size, tiles: Sequence[Tile], results: Sequence[Segmentation]) -> Segmentation:
        labels = join_maps(size, tiles, [result.labels for result in results])
        return Segmentation(labels, results[0].classes)

    def average(
        self,
        bundle: Bundle,
        size: Size,
        resized: Size,
        windows: Sequence[Tile],
        outputs: Sequence[Mapping[str, np.ndarray]],
    ) -> Segmentation:
        logits = [output["logits"] for output in outputs]
        for values in logits:
            check_classes(bundle, len(values))
            check_finite(bundle, values)
        return Segmentation(averaged_class_map(logits, windows, resized, size), bundle.classes)

    def comparison(self, tolerance: Mapping[str, float], score_threshold: float = 0.0) -> Comparison:
        return SegmentationComparison(tolerance)


def class_map(logits: np.ndarray, placement: Placement, padded: Size) -> np.ndarray:
    """Logits (classes, h, w) of one image to its class map, int16 (H, W) in original pixels.

    As MMSegmentation: bilinear to the padded input, the valid part cut out, bilinear to the original size,
    argmax (the first of equals).
    """
    height, width = placement.resized
    return _best(
        lambda label: _resize(logits[label], padded)[:height, :width], len(logits), placement.original
    )


def averaged_class_map(
    logits: Sequence[np.ndarray], windows: Sequence[Tile], resized: Size, original: Size
) -> np.ndarray:
    """Logits (classes, h, w) of windows of a resized image to its class map, int16 (H, W) in original pixels.

    As MMSegmentation's `slide` mode: each window's logits, bilinear to its size, are averaged where windows
    overlap; the average is resized to the original size, bilinear; argmax.
    """
    counts = np.zeros(resized, np.float32)
    for window in windows:
        window.of(counts)[:] += 1

    def average(label: int) -> np.ndarray:
        total = np.zeros(resized, np.float32)
        for window, values in zip(windows, logits, strict=True):
            part = window.of(total)
            part += _resize(values[label], part.shape)
        return total / counts

    return _best(average, len(logits[0]), original)


def _best(plane: Callable[[int], np.ndarray], classes: int, size: Size) -> np.ndarray:
    """The class whose plane, resized to `size`, has the greatest value at each pixel: int16.

    Class by class, so that memory does not grow with their number, and a large image band by band.
    """
    height, width = size
    rows = BAND if is_large(size) else height
    labels = np.zeros((height, width), np.int16)
    best = np.empty((rows, width), np.float32)
    for top in range(0, height, rows):
        band = labels[top : top + rows]
        best[:] = -np.inf
        for label in range(classes):
            scores = _resize_rows(plane(label), size, top, len(band))
            better = scores > best[: len(band)]
            np.copyto(best[: len(band)], scores, where=better)
            np.copyto(band, np.int16(label), where=better)
    return labels


def _resize_rows(plane: np.ndarray, size: Size, top: int, count: int) -> np.ndarray:
    """Rows [top, top + count) of the plane resized to `size`: bilinear at pixel centres, as all of it."""
    if count == size[0]:
        return _resize(plane, size)
    at = (np.arange(top, top + count) + 0.5) * (len(plane) / size[0]) - 0.5
    at = at.clip(0, len(plane) - 1)
    above = at.astype(int)
    below = np.minimum(above + 1, len(plane) - 1)
    weight = (at - above).astype(np.float32)[:, None]
    first = above[0]
    part = _resize(plane[first : below[-1] + 1], (int(below[-1]) + 1 - first, size[1]))
    return part[above - first] * (1 - weight) + part[below - first] * weight


def _resize(plane: np.ndarray, size: Size) -> np.ndarray:
    if plane.shape == size:
        return plane
    return cv2.resize(np.ascontiguousarray(plane, np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
