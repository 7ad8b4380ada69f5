"""What is true of images: a COCO file, or a folder of label images. Knows these files; judges nothing."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from meta_deploy.errors import InputError
from meta_deploy.tasks.results import coco_category_ids

_LABELS = (".png", ".tif", ".tiff")


class Annotations(ABC):
    """What is true of images."""

    path: str

    @abstractmethod
    def _knows(self, image: str) -> bool:
        """Whether there is an annotation of this image."""

    def known(self, images: Sequence[str]) -> list[str]:
        """Those of the images that are annotated.

        Raises:
            InputError: none is.
        """
        found = [image for image in images if self._knows(image)]
        if not found:
            raise InputError(
                f"'{self.path}' annotates none of the {len(images)} images, such as "
                f"'{os.path.basename(images[0])}'; give the annotations of these images"
            )
        return found

    def check(self, images: Sequence[str]) -> None:
        """Read what is read image by image. Raises InputError now and not after minutes."""
        return

    @abstractmethod
    def digest(self, images: Sequence[str]) -> str:
        """A sha256 of what is said of these images."""


class CocoAnnotations(Annotations):
    """A COCO instances file; images are known by their file's name."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.content = json.loads(Path(path).read_text())
            self.ids = {os.path.basename(i["file_name"]): i["id"] for i in self.content["images"]}
            self.categories = {c["name"]: c["id"] for c in self.content["categories"]}
            for annotation in self.content["annotations"]:
                _ = annotation["image_id"], annotation["category_id"], annotation["bbox"]
        except OSError as error:
            raise InputError(f"cannot read '{path}': {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"'{path}' is not a COCO file: it needs images, categories and annotations with boxes"
            ) from error

    def _knows(self, image: str) -> bool:
        return os.path.basename(image) in self.ids

    def part(self, images: Sequence[str]) -> dict[str, Any]:
        """The annotations of these images alone."""
        ids = {self.ids[os.path.basename(image)] for image in images}
        return {
            "images": [i for i in self.content["images"] if i["id"] in ids],
            "categories": self.content["categories"],
            "annotations": [a for a in self.content["annotations"] if a["image_id"] in ids],
        }

    def digest(self, images: Sequence[str]) -> str:
        return hashlib.sha256(json.dumps(self.part(images), sort_keys=True).encode()).hexdigest()

    def category_ids(self, classes: Sequence[str]) -> list[int]:
        """Each class's id by its name; by its number where no name is a category's."""
        if not self.categories.keys() & set(classes):
            return coco_category_ids(classes)
        return [self.categories.get(name, -1 - label) for label, name in enumerate(classes)]


class LabelImages(Annotations):
    """A folder of label images: the class of each pixel as a number, 255 where it does not count."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.files = {p.stem: p for p in sorted(Path(path).iterdir()) if p.suffix.lower() in _LABELS}

    def _knows(self, image: str) -> bool:
        return Path(image).stem in self.files

    def check(self, images: Sequence[str]) -> None:
        for image in images:
            self.labels(image)

    def digest(self, images: Sequence[str]) -> str:
        sha = hashlib.sha256()
        for image in images:
            sha.update(self.files[Path(image).stem].read_bytes())
        return sha.hexdigest()

    def labels(self, image: str) -> np.ndarray:
        """(H, W). Raises InputError where it is no image of labels."""
        file = self.files[Path(image).stem]
        try:
            with Image.open(file) as opened:
                labels = np.asarray(opened)
        except OSError as error:
            raise InputError(f"cannot read the labels '{file}': {error}") from error
        if labels.ndim != 2 or labels.dtype.kind not in "ui":
            raise InputError(f"'{file}' has colours and not a class number for each pixel")
        return labels


def open_annotations(path: str | os.PathLike[str]) -> Annotations:
    """A COCO file, or a folder of label images.

    Raises:
        InputError: it is neither.
    """
    return LabelImages(str(path)) if os.path.isdir(path) else CocoAnnotations(str(path))
