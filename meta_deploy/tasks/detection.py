"""Boxes with a class and a score: the task, and its result.

Knows arrays; must not know files, back ends or how a result is drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import Size
from meta_deploy.errors import InputError
from meta_deploy.imaging.images import ImageLike, one_at_a_time
from meta_deploy.imaging.preprocess import Placement
from meta_deploy.tasks.comparison import Comparison, DetectionComparison
from meta_deploy.tasks.draw import draw_detections
from meta_deploy.tasks.masks import Mask
from meta_deploy.tasks.measure import COLUMNS, apart, label_image, measure
from meta_deploy.tasks.results import ImageResult, Timings, coco_category_ids, listed
from meta_deploy.tasks.task import Output, Task, check_classes, check_finite
from meta_deploy.tasks.tiles import Seen, Tile, is_cut, join_objects


@dataclass(frozen=True, eq=False, repr=False)
class Detections(ImageResult):
    """The objects found in one image, by falling score.

    `size` is the image's (height, width); `boxes` (N, 4) float32 xyxy in its pixels; `scores` (N,) float32;
    `labels` (N,) int32, indices into `classes`; `segments` the N masks in compact form, or None where the
    model gives boxes only.

    Indexing gives Detections again (`found[found.scores > 0.5]`, `found[:3]`, `found[0]`), and iterating
    gives one for each object.
    """

    columns = ("object", "class", "score", *COLUMNS)

    size: Size
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    segments: tuple[Mask, ...] | None = None

    def __repr__(self) -> str:
        counts = [f"{count} {name}" for name, count in Counter(self.names).most_common()]
        noun = "object" if len(self) == 1 else "objects"
        return f"{len(self)} {noun}" + (f": {listed(counts)}" if counts else "")

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detections]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Sequence[bool] | np.ndarray) -> Detections:
        """Those at `index`: a number, a slice, numbers, or a boolean for each. Raises IndexError."""
        chosen = np.atleast_1d(np.arange(len(self))[index])
        if chosen.ndim != 1:
            raise IndexError(f"detections have one dimension, and {index!r} gives {chosen.ndim}")
        return replace(
            self,
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            segments=None if self.segments is None else tuple(self.segments[i] for i in chosen),
        )

    @staticmethod
    def merge(results: Iterable[Detections]) -> Detections:
        """The objects of several results of one image, by falling score; their times add up.

        `path` stays where all have the same. Nothing is suppressed: an object found twice is there twice.

        Raises:
            InputError: none given, images of different sizes, different classes, or masks in some only.
        """
        results = list(results)
        if not results:
            raise InputError("there is nothing to merge; give at least one result")
        first = results[0]
        for name, told in {"size": "sizes", "classes": "classes"}.items():
            if other := [r for r in results if getattr(r, name) != getattr(first, name)]:
                raise InputError(
                    f"cannot merge results of different {told}, {getattr(first, name)} and "
                    f"{getattr(other[0], name)}; merge what one model says of one image"
                )
        masks = [result.segments for result in results if result.segments is not None]
        if 0 < len(masks) < len(results):
            raise InputError("cannot merge results with masks and without; merge those of one kind")
        whole = replace(
            first,
            boxes=np.concatenate([result.boxes for result in results]),
            scores=np.concatenate([result.scores for result in results]),
            labels=np.concatenate([result.labels for result in results]),
            segments=tuple(mask for segments in masks for mask in segments) if masks else None,
            path=first.path if all(result.path == first.path for result in results) else None,
            timings=sum((result.timings for result in results), Timings()),
        )
        return whole[np.argsort(-whole.scores, kind="stable")]

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
        return self[self.scores >= score]

    def apart(self) -> Detections:
        """These with each pixel in one object, that of the better score, as label images and tables have it.

        Objects that others cover by more than half, or that have no pixel, are left out (`measure.apart`).
        Without masks nothing changes.
        """
        if self.segments is None:
            return self
        ordered = self[np.argsort(-self.scores, kind="stable")]
        assert ordered.segments is not None
        left = apart(ordered.segments, self.size)
        return replace(ordered[list(left)], segments=tuple(left.values()))

    def label_image(self) -> np.ndarray:
        """The number of the object at each pixel, as `apart` gives them: uint16 (H, W), 0 for none.

        Raises:
            InputError: there are no masks, or more objects than 16 bits can number.
        """
        if (segments := self.apart().segments) is None:
            raise InputError("a label image needs masks, and this model gives boxes only")
        return label_image(segments, self.size)

    def table(self, image: ImageLike | None = None) -> list[dict[str, Any]]:
        """A row an object, as `apart` gives them: its number from 1, class, score, `measure.COLUMNS`."""
        found = self.apart()
        segments = found.segments or [None] * len(found)
        with one_at_a_time(self.size):
            picture = self._canvas(image)
            return [
                {"object": i + 1, "class": name, "score": round(float(found.scores[i]), 6)}
                | measure(found.boxes[i], segments[i], picture)
                for i, name in enumerate(found.names)
            ]

    def to_supervision(self) -> Any:
        """As `supervision.Detections`, class names in its `data`. Raises InputError: not installed."""
        try:
            import supervision
        except ImportError as error:
            raise InputError(f"supervision cannot be imported ({error}); pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels.astype(int),
            data={"class_name": np.array(self.names, dtype=str)},
        )

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
        return {
            "path": self.path,
            "size": list(self.size),
            "detections": found,
            "timings": self.timings.to_dict(),
        }

    def _drawn(self, picture: Image.Image) -> Image.Image:
        return draw_detections(picture, self.boxes, self.scores, self.labels, self.names, self.segments)


class Detection(Task):
    """Boxes without masks."""

    name = "detection"
    columns = Detections.columns
    outputs: ClassVar[Mapping[str, Output]] = {
        "num_detections": Output("int32", ("batch",)),
        "boxes": Output("float32", ("batch", "most", 4)),
        "scores": Output("float32", ("batch", "most")),
        "labels": Output("int32", ("batch", "most")),
    }

    def decode(
        self,
        bundle: Bundle,
        outputs: Mapping[str, np.ndarray],
        index: int,
        placement: Placement,
        padded: Size,
        score_threshold: float,
    ) -> Detections:
        """Entries of at least the threshold whose box is not empty, in the network's order.

        Boxes are divided by the scale and clipped to the image.
        """
        count = min(max(int(outputs["num_detections"][index]), 0), outputs["boxes"].shape[1])
        boxes, scores, labels = (outputs[name][index, :count] for name in ("boxes", "scores", "labels"))
        check_finite(bundle, boxes, scores)
        raw = boxes.astype(np.float32) / np.array(placement.scale * 2, np.float32)
        height, width = placement.original
        boxes = np.clip(raw, 0, np.array([width, height] * 2, np.float32))
        solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        solid &= np.isfinite(raw).all(axis=1)
        keep = np.flatnonzero((scores >= score_threshold) & (labels >= 0) & solid)
        check_classes(bundle, int(labels[keep].max(initial=-1)) + 1)
        return Detections(
            placement.original,
            boxes[keep],
            scores[keep].astype(np.float32),
            labels[keep].astype(np.int32, copy=False),
            bundle.classes,
            self.masks(bundle, outputs, index, keep, raw, placement.original),
        )

    def masks(
        self,
        bundle: Bundle,
        outputs: Mapping[str, np.ndarray],
        index: int,
        keep: np.ndarray,
        boxes: np.ndarray,
        size: Size,
    ) -> tuple[Mask, ...] | None:
        """Masks of the entries `keep`, whose `boxes` are in the image's pixels and not clipped to it."""
        return None

    def join(self, size: Size, tiles: Sequence[Tile], results: Sequence[Detections]) -> Detections:
        found = []
        for number, (tile, result) in enumerate(zip(tiles, results, strict=True)):
            boxes = result.boxes + np.array([tile.left, tile.top] * 2, np.float32)
            segments = result.segments or [None] * len(result)
            for i, segment in enumerate(segments):
                mask = None
                if segment is not None:
                    mask = (segment.crop(), segment.top + tile.top, segment.left + tile.left)
                cut = is_cut(boxes[i], tile, size)
                found.append(
                    Seen(number, boxes[i], float(result.scores[i]), int(result.labels[i]), mask, cut)
                )
        objects = join_objects(tiles, found, size)
        masked = all(result.segments is not None for result in results)
        return Detections(
            size,
            np.array([seen.box for seen, _ in objects], np.float32).reshape(-1, 4),
            np.array([seen.score for seen, _ in objects], np.float32),
            np.array([seen.label for seen, _ in objects], np.int32),
            results[0].classes,
            tuple(mask for _, mask in objects if mask is not None) if masked else None,
        )

    def comparison(self, tolerance: Mapping[str, float], score_threshold: float = 0.0) -> Comparison:
        return DetectionComparison(tolerance, score_threshold)
