"""Training pictures by number: COCO-format data with augmentation, or generated scenes.

Knows numpy, OpenCV and COCO's format, nothing of models. Sample k is a pure function of k and the seed, so
that training resumes where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from pycocotools import mask as rle

from tools import scenes

SMALLEST = 6  # visible pixels that an object must have to be learned
EMPTY = 0.1  # share of samples without anything to see
LIKELY_SIZE = (14.0, 64.0)  # bounds of a picture's median object after magnification: square root of pixels


@dataclass(frozen=True)
class Sample:
    """A picture with its objects.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        boxes: (G, 4) float32, xyxy in pixels, tight (right and bottom exclusive).
        labels: (G,) int64, from 0.
        masks: (G, H, W) uint8, 0 or 1.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


class Source(Protocol):
    """Where samples come from."""

    classes: tuple[str, ...]

    def sample(self, k: int, size: int) -> Sample:
        """Training sample number k, (size, size) pixels."""

    def validation(self) -> tuple[dict[str, Any], list[tuple[int, np.ndarray]]]:
        """COCO ground truth, and each picture's id with its pixels (H, W, 3) uint8."""


class Scenes:
    """Generated scenes of drawn shapes."""

    classes = scenes.CLASSES

    def __init__(self, seed: int = 0, size: int = 320) -> None:
        self.first, self.size = scenes.TRAINING_SEEDS.start + seed * 100_000_000, size

    def sample(self, k: int, size: int) -> Sample:
        scene = scenes.generate(self.first + k, (size, size))
        return Sample(scene.image, scene.boxes, scene.labels, scene.masks.view(np.uint8))

    def validation(self) -> tuple[dict[str, Any], list[tuple[int, np.ndarray]]]:
        seeds, size = scenes.VALIDATION_SEEDS, (self.size, self.size)
        return scenes.coco_dataset(seeds, size), [(s, scenes.generate(s, size).image) for s in seeds]


class CocoFolder:
    """A folder with `instances_train.json`, `instances_val.json` and their pictures in `train/` and `val/`.

    Where images name their `kind`, every kind is drawn as often as the square root of its number of pictures
    asks, so that rare kinds are learned too. Crowds are left out. One sample in ten shows nothing at all.

    Args:
        folder: as above.
        magnify: smallest and largest magnification of a picture; log-uniform between.
        seed: of the augmentation.
    """

    def __init__(self, folder: Path, magnify: tuple[float, float] = (0.5, 2.0), seed: int = 0) -> None:
        self.folder, self.magnify, self.seed = folder, magnify, seed
        data = json.loads((folder / "instances_train.json").read_text())
        categories = sorted(data["categories"], key=lambda category: category["id"])
        self.classes = tuple(category["name"] for category in categories)
        label_of = {category["id"]: k for k, category in enumerate(categories)}
        self.pictures = [
            _Picture(folder / "train" / image["file_name"], objects, label_of)
            for image, objects in with_objects(data)
        ]
        kinds = [image.get("kind", "") for image, _ in with_objects(data)]
        weights = np.array([kinds.count(kind) ** -0.5 for kind in kinds])
        self.chance = weights / weights.sum()

    def sample(self, k: int, size: int) -> Sample:
        rng = np.random.default_rng((self.seed, k))
        if rng.random() < EMPTY:
            return _empty(rng, size)
        picture = self.pictures[rng.choice(len(self.pictures), p=self.chance)]
        low, high = (value / picture.object_size for value in LIKELY_SIZE)
        factor = float(np.clip(np.exp(rng.uniform(*np.log(self.magnify))), low, high))
        matrix = _random_view(rng, picture.image.shape[:2], factor, size)
        image = cv2.warpAffine(
            picture.image,
            matrix,
            (size, size),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
        )
        masks, labels, boxes = [], [], []
        for mask, corner, label in picture.objects:
            moved = matrix.copy()
            moved[:, 2] += matrix[:, :2] @ np.array(corner, float)
            seen = _warp_mask(mask, moved, size)
            if seen is not None:
                masks.append(seen)
                labels.append(label)
                boxes.append(_tight_box(seen))
        return Sample(
            recolour(rng, image),
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(labels, np.int64),
            np.stack(masks) if masks else np.zeros((0, size, size), np.uint8),
        )

    def validation(self) -> tuple[dict[str, Any], list[tuple[int, np.ndarray]]]:
        truth = json.loads((self.folder / "instances_val.json").read_text())
        return truth, [(i["id"], read(self.folder / "val" / i["file_name"])) for i in truth["images"]]


class _Picture:
    """A decoded picture; its objects as masks cut to their boxes: (mask, (x, y), label)."""

    def __init__(self, path: Path, annotations: Sequence[dict[str, Any]], label_of: dict[int, int]) -> None:
        self.image = read(path)
        self.objects: list[tuple[np.ndarray, tuple[int, int], int]] = []
        for annotation in annotations:
            mask = decode(annotation["segmentation"], *self.image.shape[:2])
            if mask.any():
                x1, y1, x2, y2 = (int(edge) for edge in _tight_box(mask))
                cut = np.ascontiguousarray(mask[y1:y2, x1:x2])
                self.objects.append((cut, (x1, y1), label_of[annotation["category_id"]]))
        areas = [int(mask.sum()) for mask, _, _ in self.objects]
        self.object_size = float(np.sqrt(np.median(areas))) if areas else 30.0


def _empty(rng: np.random.Generator, size: int) -> Sample:
    """A sample without objects: black, white or any colour; every other one shaded and with noise."""
    pixels = np.full((size, size, 3), rng.choice([0.0, 1.0, rng.random()]))
    if rng.random() < 0.3:
        pixels += rng.uniform(-0.2, 0.2, 3)
    if rng.random() < 0.5:
        y, x = np.mgrid[0:size, 0:size] / size - 0.5
        pixels += (rng.uniform(-0.5, 0.5) * y + rng.uniform(-0.5, 0.5) * x)[..., None]
        pixels += rng.uniform(0, 0.4) * rng.standard_normal((size, size, 1))
    image = (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
    nothing = np.zeros((0, size, size), np.uint8)
    return Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), nothing)


def with_objects(data: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The images of COCO data, each with its annotations, crowds left out."""
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        if not annotation.get("iscrowd"):
            by_image[annotation["image_id"]].append(annotation)
    return [(image, by_image[image["id"]]) for image in data["images"]]


def evenly_chosen(truth: dict[str, Any], count: int | None) -> dict[str, Any]:
    """COCO data of `count` of the images, evenly from all of them; None: all."""
    images = truth["images"]
    numbers = np.linspace(0, len(images) - 1, min(count or len(images), len(images))).round().astype(int)
    return part_of(truth, [images[k] for k in numbers])


def part_of(truth: dict[str, Any], images: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO data of some of the images."""
    ids = {image["id"] for image in images}
    annotations = [a for a in truth["annotations"] if a["image_id"] in ids]
    return {**truth, "images": images, "annotations": annotations}


def read(path: Path) -> np.ndarray:
    """A picture's pixels: (H, W, 3) uint8, RGB."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise SystemExit(f"cannot read '{path}'")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO's polygons, or run lengths compressed or not, as a mask (H, W) uint8."""
    if isinstance(segmentation, list):
        segmentation = rle.merge(rle.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, height, width)
    return rle.decode(segmentation)


def _random_view(rng: np.random.Generator, shape: tuple[int, ...], factor: float, size: int) -> np.ndarray:
    """The affine map (2, 3) of a random crop, right angle and flip; the picture is magnified by `factor`."""
    height, width = shape
    view = size / factor  # side of the square that is seen, in pixels of the picture

    def centre(side: int) -> float:
        slack = (side - view) / 2
        return side / 2 + rng.uniform(-abs(slack), abs(slack))

    quarter = rng.integers(4)
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarter]
    turn = factor * np.array([[cos, -sin], [sin, cos]], float)
    if rng.random() < 0.5:
        turn[:, 0] *= -1
    offset = size / 2 - turn @ np.array([centre(width), centre(height)])
    # Pixel centres: OpenCV's coordinates are half a pixel from the edges'.
    offset += turn @ np.array([0.5, 0.5]) - 0.5
    return np.column_stack([turn, offset])


def _warp_mask(mask: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray | None:
    """A cut mask placed in the view: (size, size) uint8, or None where hardly anything of it is seen."""
    h, w = mask.shape
    corners = matrix[:, :2] @ np.array([[-1, w, -1, w], [-1, -1, h, h]], float) + matrix[:, 2:]
    if corners.max(axis=1).min() < 0 or corners.min(axis=1).max() > size:
        return None
    soft = cv2.warpAffine(mask * 255, matrix, (size, size), flags=cv2.INTER_LINEAR)
    seen = (soft >= 128).astype(np.uint8)
    return seen if cv2.countNonZero(seen) >= SMALLEST else None


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    x, y, width, height = cv2.boundingRect(mask)
    return x, y, x + width, y + height


def recolour(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Vary stain, brightness, contrast, sharpness and noise of an RGB picture (H, W, 3) uint8.

    Grey pictures stay grey, but for one in ten that takes a colour. Colours are varied in optical density,
    where the amounts of stains add up.
    """
    colour = bool((image[..., 0] != image[..., 2]).any())
    pixels = image.astype(np.float32) / 255
    if rng.random() < 0.1:  # dark on bright and bright on dark
        pixels = 1 - pixels
    if colour or rng.random() < 0.1:
        density = -np.log(np.maximum(pixels, 1 / 255))
        density *= rng.uniform(0.75, 1.33, 3).astype(np.float32)
        if rng.random() < 0.2:
            density[:] = density.mean(axis=2, keepdims=True)
        pixels = np.exp(-density)
    pixels = np.clip(pixels, 0, 1) ** np.float32(np.exp(rng.uniform(-0.5, 0.5)))
    brightest = float(np.quantile(pixels, 0.999))
    gain = np.exp(rng.uniform(np.log(0.5), np.log(max(1.3, min(0.9 / max(brightest, 0.02), 8)))))
    pixels = pixels * gain + rng.uniform(-0.05, 0.1)
    if rng.random() < 0.25:
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.4, 1.3))
    if rng.random() < 0.3:
        noise = rng.standard_normal(image.shape[:2], np.float32) * rng.uniform(0.01, 0.05)
        pixels = pixels + noise[..., None]
    return (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
