"""From the network's outputs back to the original image: boxes, pasted masks, class maps.

Arrays in, arrays out; must not know files, back ends or drawing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from meta_deploy.bundle.manifest import Size
from meta_deploy.imaging.preprocess import Placement
from meta_deploy.tasks.masks import Mask

_NONE = np.empty((0, 0), np.float32)  # no matrix to add to a product


@dataclass(frozen=True)
class Instances:
    """Detections in the image's pixels: boxes (N, 4) xyxy float32, scores (N,) float32, labels (N,) int32."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: tuple[Mask, ...] | None


def detections(
    outputs: dict[str, np.ndarray], index: int, placement: Placement, score: float, mask_threshold: float
) -> Instances:
    """Image `index` of the batch: entries of at least `score` whose box is not empty, in the network's order.

    Boxes are divided by the scale and clipped to the image. Masks are pasted by the box before clipping,
    since that is the box that the network drew them in.
    """
    count = min(max(int(outputs["num_detections"][index]), 0), outputs["boxes"].shape[1])
    scores = outputs["scores"][index, :count]
    labels = outputs["labels"][index, :count]
    scale = np.array(placement.scale * 2, np.float32)
    raw = outputs["boxes"][index, :count].astype(np.float32) / scale
    height, width = placement.original
    boxes = np.clip(raw, 0, np.array([width, height] * 2, np.float32))
    solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])  # false for NaN too
    keep = np.flatnonzero((scores >= score) & (labels >= 0) & solid & np.isfinite(raw).all(axis=1))
    masks = None
    if "masks" in outputs:
        masks = tuple(
            paste_mask(outputs["masks"][index, i], raw[i], placement.original, mask_threshold) for i in keep
        )
    return Instances(
        boxes[keep], scores[keep].astype(np.float32), labels[keep].astype(np.int32, copy=False), masks
    )


def paste_mask(mask: np.ndarray, box: np.ndarray, size: Size, threshold: float) -> Mask:
    """A mask's probabilities (h, w), resampled into `box` (xyxy pixels) of an image of `size` (H, W).

    As MMDetection's `_do_paste_mask`: bilinear at pixel centres (align_corners=False), zero outside, set
    where at least `threshold`. Bilinear sampling is separable, so that it is two matrix products.
    """
    x0, y0, x1, y1 = (float(edge) for edge in box)
    left, right = _span(x0, x1, size[1])
    top, bottom = _span(y0, y1, size[0])
    rows = _bilinear(top, bottom, y0, y1, mask.shape[0])
    columns = _bilinear(left, right, x0, x1, mask.shape[1])
    if not len(rows) or not len(columns):
        return Mask.from_crop(np.zeros((len(rows), len(columns)), bool), top, left, size)
    # OpenCV's product, for numpy's BLAS wakes a thread per core for it and then waits for a busy machine.
    # Transposed: run lengths go down the columns, which then lie together in memory.
    half = cv2.gemm(columns, np.ascontiguousarray(mask, np.float32), 1, _NONE, 0, flags=cv2.GEMM_2_T)
    pasted = cv2.gemm(half, rows, 1, _NONE, 0, flags=cv2.GEMM_2_T)
    return Mask.from_crop((pasted >= threshold).T, top, left, size)


def _span(start: float, stop: float, limit: int) -> tuple[int, int]:
    """The pixels [first, last) that a box's edge touches, one more either way, within the image."""
    first = min(max(math.floor(start) - 1, 0), limit)
    return first, max(min(math.ceil(stop) + 1, limit), first)


def _bilinear(first: int, last: int, start: float, stop: float, count: int) -> np.ndarray:
    """The weights (last - first, count) that sample `count` cells over [start, stop] at pixel centres."""
    centres = np.arange(first, last, dtype=np.float64) + 0.5
    at = (centres - start) / (stop - start) * count - 0.5
    distance = np.abs(at[:, None] - np.arange(count))
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def segmentation(logits: np.ndarray, placement: Placement, padded: Size) -> np.ndarray:
    """Logits (classes, h, w) of one image to its class map, int16 (H, W) in original pixels.

    As MMSegmentation: bilinear to the padded input, the valid part cut out, bilinear to the original size,
    argmax (the first of equals). Class by class, so that memory does not grow with their number.
    """
    height, width = placement.original
    best = np.full((height, width), -np.inf, np.float32)
    labels = np.zeros((height, width), np.int16)
    for label, plane in enumerate(logits):
        scores = _resize(
            _resize(plane, padded)[: placement.resized[0], : placement.resized[1]], (height, width)
        )
        better = scores > best
        np.copyto(best, scores, where=better)
        np.copyto(labels, np.int16(label), where=better)
    return labels


def _resize(plane: np.ndarray, size: Size) -> np.ndarray:
    if plane.shape == size:
        return plane
    return cv2.resize(np.ascontiguousarray(plane, np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
