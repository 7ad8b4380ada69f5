"""How good results are: against annotations, or against the first entry's results.

Knows results of every task, COCO files and label images; must not know what made the results.
"""

from __future__ import annotations

import contextlib
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from meta_deploy.report.disagreement import SURE
from meta_deploy.report.nearness import LOGITS, Nearness
from meta_deploy.report.schema import Accuracy
from meta_deploy.report.worker import Failed, Worker
from meta_deploy.tasks.accuracy import Pixels, coco_ap
from meta_deploy.tasks.annotations import Annotations, CocoAnnotations, LabelImages
from meta_deploy.tasks.comparison import Floats
from meta_deploy.tasks.detection import Detections
from meta_deploy.tasks.raw import Arrays
from meta_deploy.tasks.results import Result
from meta_deploy.tasks.semantic_segmentation import Segmentation


@contextlib.contextmanager
def noted(errors: dict[str, str], name: str) -> Iterator[None]:
    """A failure of one entry is its own; the rest goes on."""
    try:
        yield
    except Failed as error:
        errors[name] = str(error)


class Judge:
    """Runs every entry on images, and holds its results against the truth or the first entry's.

    Entries whose results are of another kind than what they are held against have no accuracy.
    """

    def __init__(
        self,
        workers: Mapping[str, Worker],
        images: Sequence[str],
        truth: Annotations | None,
        errors: dict[str, str],
        see: Callable[[str, Mapping[str, Result]], None] = lambda image, results: None,
    ) -> None:
        """`errors` takes why an entry is out, by name, and those in it are; `see` is told each image's
        results, the first entry's first.
        """
        self._workers, self._images, self._truth = workers, images, truth
        self._errors, self._see = errors, see
        self._scales: dict[str, Scale] = {}
        self._near = {name: Nearness() for name in workers}

    def look(self, index: int) -> None:
        """Run image `index`; what an entry has just run is not run again."""
        image = self._images[index]
        results: dict[str, Result] = {}
        logits: dict[str, np.ndarray | None] = {}
        for name, worker in self._workers.items():
            if name in self._errors:
                continue
            with noted(self._errors, name):
                result = worker.call("result", index)
                if name not in self._scales:
                    self._scales[name] = _scale(result, self._truth)
                first = next(iter(results.values()), None)
                if self._truth is not None or first is not None:
                    self._scales[name].add(image, result, first)
                if isinstance(result, Segmentation) and index < LOGITS:
                    logits[name] = worker.call("logits", index)
                if first is not None:
                    self._near[name].add(first, result)
                    self._near[name].add_logits(next(iter(logits.values()), None), logits.get(name))
                results[name] = result
        self._see(image, results)

    def accuracies(self) -> dict[str, Accuracy]:
        """The figures of the entries that are not out."""
        images = list(self._images)
        found = {
            name: scale.accuracy(images, self._truth)
            for name, scale in self._scales.items()
            if name not in self._errors
        }
        return {
            name: replace(accuracy, **self._near[name].figures())
            for name, accuracy in found.items()
            if accuracy is not None
        }


class Scale(ABC):
    """Gathers the results of one entry, image by image."""

    @abstractmethod
    def add(self, image: str, result: Any, first: Result | None) -> None:
        """One image's result, and the first entry's, which is the truth without annotations."""

    @abstractmethod
    def accuracy(self, images: list[str], truth: Annotations | None) -> Accuracy | None:
        """The figures over all images; None where nothing could be compared."""


def _scale(result: Result, truth: Annotations | None) -> Scale:
    if isinstance(result, Detections):
        return DetectionScale(truth)
    if isinstance(result, Segmentation):
        return MapScale(truth)
    return ArrayScale()


class DetectionScale(Scale):
    """Average precision."""

    def __init__(self, truth: Annotations | None) -> None:
        self._truth = truth
        self._records: list[dict[str, Any]] = []
        self._taken: dict[str, Any] = {"images": [], "categories": [], "annotations": []}

    def add(self, image: str, result: Any, first: Result | None) -> None:
        if isinstance(self._truth, CocoAnnotations):
            image_id = self._truth.ids[os.path.basename(image)]
            self._records += result.to_coco(image_id, self._truth.category_ids(result.classes))
        elif self._truth is None and isinstance(first, Detections) and first.size == result.size:
            ids = list(range(1, len(result.classes) + 1))
            image_id = len(self._taken["images"]) + 1
            self._records += result.to_coco(image_id, ids)
            self._take(image_id, first)

    def _take(self, image_id: int, first: Detections) -> None:
        """The first entry's detections as annotations."""
        taken, (height, width) = self._taken, first.size
        names = enumerate(first.classes, 1)
        taken["images"].append({"id": image_id, "height": height, "width": width, "file_name": ""})
        taken["categories"] = [{"id": id_, "name": str(id_)} for id_, _ in names]
        sure = first.filter(SURE)
        for record in sure.to_coco(image_id, [c["id"] for c in taken["categories"]]):
            area = record["bbox"][2] * record["bbox"][3]
            number = len(taken["annotations"]) + 1
            taken["annotations"].append({**record, "id": number, "area": area, "iscrowd": 0})

    def accuracy(self, images: list[str], truth: Annotations | None) -> Accuracy | None:
        if isinstance(truth, CocoAnnotations):
            content, against = truth.part(images), "annotations"
        elif truth is None and self._taken["images"]:
            content, against = self._taken, "the first entry"
        else:
            return None
        # Of another model's detections all are to be found, not only as many as COCO counts.
        most = max(Counter(record["image_id"] for record in self._records).values(), default=0)
        found = coco_ap(content, self._records, *([] if truth else [max(most, 1)]))
        figures = {
            f"{kind}_{key.lower()}": _finite(found[kind][key])
            for kind in ("box", "mask")
            for key in ("AP", "AP50")
            if kind in found
        }
        if not any("segmentation" in record for record in self._records):
            figures = {key: value for key, value in figures.items() if key.startswith("box")}
        return Accuracy(against=against, images=len(content["images"]), **figures)  # type: ignore[arg-type]


class MapScale(Scale):
    """Intersection over union of the classes."""

    def __init__(self, truth: Annotations | None) -> None:
        self._truth = truth
        self._pixels = Pixels()
        self._images = 0

    def add(self, image: str, result: Any, first: Result | None) -> None:
        if isinstance(self._truth, LabelImages):
            labels = self._truth.labels(image)
            if labels.shape != result.size:
                raise Failed(f"the labels of '{image}' are of another size than the image")
        elif self._truth is None and isinstance(first, Segmentation) and first.size == result.size:
            labels = first.labels
        else:
            return
        if self._truth is not None:
            self._pixels.add_labels(labels, result.labels)
        else:
            self._pixels.add(labels, result.labels)
        self._images += 1

    def accuracy(self, images: list[str], truth: Annotations | None) -> Accuracy | None:
        if not self._pixels.total:
            return None
        return Accuracy(
            against="the first entry" if truth is None else "annotations",
            images=self._images,
            mean_iou=self._pixels.mean_iou,
            pixel_accuracy=self._pixels.accuracy,
        )


class ArrayScale(Scale):
    """The largest relative difference of arrays. Annotations say nothing of these."""

    def __init__(self) -> None:
        self._errors = [0.0]
        self._runs = 0

    def add(self, image: str, result: Any, first: Result | None) -> None:
        if not isinstance(first, Arrays):
            return
        self._runs += 1
        for name, expected in first.outputs.items():
            found = result.outputs.get(name)
            if found is None or found.shape != expected.shape or expected.dtype.kind not in "fiub":
                self._errors.append(math.inf)
            elif expected.size:
                floats = Floats()
                floats.add(expected.astype(np.float64), found.astype(np.float64))
                self._errors += floats.most

    def accuracy(self, images: list[str], truth: Annotations | None) -> Accuracy | None:
        if not self._runs:
            return None
        worst = max(self._errors)
        return Accuracy(against="the first entry", images=self._runs, max_relative_error=worst)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
