"""What an image gives: detections or a class map, with the next steps (filter, draw, COCO, save) as methods.

Knows arrays and names; must not know bundles, back ends or the network's input.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from meta_deploy.bundle.files import atomic_write
from meta_deploy.errors import InputError
from meta_deploy.imaging.images import ImageLike, read_image
from meta_deploy.tasks.masks import Mask

Size = tuple[int, int]


@dataclass(frozen=True)
class Timings:
    """Milliseconds spent on one image: preprocessing (decoding apart), the model, postprocessing.

    In a batch, the model's time is the batch's divided by its images.
    """

    pre: float = 0.0
    model: float = 0.0
    post: float = 0.0


@dataclass(frozen=True)
class Detections:
    """The objects found in one image, by falling score.

    `size` is the image's (height, width); `boxes` (N, 4) float32 xyxy in its pixels; `scores` (N,) float32;
    `labels` (N,) int32, indices into `classes`; `segments` the N masks in compact form, or None where the
    model gives boxes only; `path` the file it was read from, if any.
    """

    size: Size
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    segments: tuple[Mask, ...] | None = None
    path: str | None = None
    timings: Timings = field(default_factory=Timings)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """Each detection's class name."""
        return [self.classes[label] for label in self.labels]

    @property
    def masks(self) -> np.ndarray | None:
        """The masks at the image's size, bool (N, H, W), made anew on each access; None without masks."""
        if self.segments is None:
            return None
        masks = np.zeros((len(self), *self.size), bool)
        for out, segment in zip(masks, self.segments, strict=True):
            out[:] = segment.full()
        return masks

    def filter(self, score: float) -> Detections:
        """Those of at least this score."""
        keep = np.flatnonzero(self.scores >= score)
        segments = None if self.segments is None else tuple(self.segments[i] for i in keep)
        return replace(
            self,
            boxes=self.boxes[keep],
            scores=self.scores[keep],
            labels=self.labels[keep],
            segments=segments,
        )

    def draw(self, image: ImageLike | None = None) -> np.ndarray:
        """The image with masks, boxes, names and scores on it: RGB uint8 (H, W, 3).

        Without `image` it is read from `path`. A small image comes back enlarged by a whole factor, so that
        the names can be read.

        Raises:
            ImageError: the image cannot be read.
            InputError: it is not the size of the one these detections are of, or there is none.
        """
        from meta_deploy.tasks.draw import draw_detections

        return draw_detections(_pixels(image, self.path, self.size), self)

    def save(self, path: str | os.PathLike[str], image: ImageLike | None = None) -> None:
        """Write the drawn image, in the format of `path`'s suffix, whole or not at all. Raises as `draw`."""
        save_image(path, self.draw(image))

    def to_coco(self, image_id: int | str, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO result records (image_id, category_id, bbox xywh, score, segmentation RLE), one a detection.

        `category_ids` gives each class's id; None: COCO's own for COCO's 80 classes, else label + 1.
        """
        ids = coco_category_ids(self.classes) if category_ids is None else category_ids
        records: list[dict[str, Any]] = []
        for i, (x0, y0, x1, y1) in enumerate(self.boxes.tolist()):
            record: dict[str, Any] = {
                "image_id": image_id,
                "category_id": int(ids[self.labels[i]]),
                "bbox": [round(edge, 3) for edge in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(float(self.scores[i]), 6),
            }
            if self.segments is not None:
                record["segmentation"] = self.segments[i].rle()
            records.append(record)
        return records

    def to_dict(self) -> dict[str, Any]:
        """For JSON: path, size [H, W], detections (label, name, score, box xyxy, mask as COCO RLE), ms."""
        found: list[dict[str, Any]] = []
        for i, box in enumerate(self.boxes.tolist()):
            entry: dict[str, Any] = {
                "label": int(self.labels[i]),
                "name": self.classes[self.labels[i]],
                "score": round(float(self.scores[i]), 6),
                "box": [round(edge, 3) for edge in box],
            }
            if self.segments is not None:
                entry["mask"] = self.segments[i].rle()
            found.append(entry)
        return {"path": self.path, "size": list(self.size), "detections": found, "timings": _ms(self.timings)}


@dataclass(frozen=True)
class Segmentation:
    """The class of every pixel of one image.

    `labels` is int16 (H, W), indices into `classes`; `path` the file it was read from, if any.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    path: str | None = None
    timings: Timings = field(default_factory=Timings)

    @property
    def size(self) -> Size:
        """The image's (height, width)."""
        return self.labels.shape[0], self.labels.shape[1]

    def filter(self, score: float) -> Segmentation:
        """Itself: a class map has no scores. There so that both results are used alike."""
        return self

    @property
    def areas(self) -> dict[int, int]:
        """The pixels of each label that occurs, the largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        return {int(i): int(counts[i]) for i in np.argsort(-counts, kind="stable") if counts[i]}

    def draw(self, image: ImageLike | None = None) -> np.ndarray:
        """The image tinted by class, with a legend: RGB uint8 (H, W, 3). As `Detections.draw`."""
        from meta_deploy.tasks.draw import draw_segmentation

        return draw_segmentation(_pixels(image, self.path, self.size), self)

    def save(self, path: str | os.PathLike[str], image: ImageLike | None = None) -> None:
        """Write the drawn image, in the format of `path`'s suffix, whole or not at all. Raises as `draw`."""
        save_image(path, self.draw(image))

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
            "timings": _ms(self.timings),
        }

    def _mask(self, label: int) -> Mask:
        return Mask.from_full(self.labels == label)


_COCO_GAPS = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83))


def coco_category_ids(classes: Sequence[str]) -> list[int]:
    """Each class's COCO id: 1 to 90 with COCO's gaps where these are its 80 classes, else label + 1."""
    if len(classes) == 80 and classes[0] == "person" and classes[-1] == "toothbrush":
        return [i for i in range(1, 91) if i not in _COCO_GAPS]
    return list(range(1, len(classes) + 1))


def save_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write RGB uint8 (H, W, 3) in the format of the path's suffix, whole or not at all.

    Raises:
        InputError: the suffix is no image format's, or the file cannot be written.
    """
    from PIL import Image

    suffix = os.path.splitext(path)[1].lower()
    form = Image.registered_extensions().get(suffix)
    if form not in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        raise InputError(f"cannot write '{path}': '{suffix}' is no image suffix known here; use .jpg or .png")
    options = {"quality": 92} if form in ("JPEG", "WEBP") else {}
    with atomic_write(path) as stream:
        Image.fromarray(image).save(stream, format=form, **options)


def _pixels(image: ImageLike | None, path: str | None, size: Size) -> np.ndarray:
    source = path if image is None else image
    if source is None:
        raise InputError("these results have no path to read the image from; pass the image to draw on")
    pixels = read_image(source)
    if pixels.shape[:2] != size:
        raise InputError(
            f"the image to draw on is {pixels.shape[1]}x{pixels.shape[0]}, and the results are of one of "
            f"{size[1]}x{size[0]}; pass that one"
        )
    return pixels


def _ms(timings: Timings) -> dict[str, float]:
    return {f"{name}_ms": round(getattr(timings, name), 3) for name in ("pre", "model", "post")}
