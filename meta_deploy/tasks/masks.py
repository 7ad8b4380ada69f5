"""One instance's mask, kept as run lengths within its box: small in memory, exact, COCO RLE on demand.

Also how a network's mask becomes one. Knows pixels and runs; must not know models or images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from meta_deploy.bundle.manifest import Size

_BAND = 1 << 22  # pixels that are worked on at a time
_NONE = np.empty((0, 0), np.float32)  # no matrix to add to a product


@dataclass(frozen=True)
class Mask:
    """A binary mask over an image of `size` (height, width); all of it lies in one crop.

    The crop is at (`top`, `left`), of `shape` (height, width); `runs` are the lengths, in pixels, of
    alternating runs of 0 and 1 down its columns, beginning with 0 (as in COCO's RLE).
    """

    size: Size
    top: int
    left: int
    shape: Size
    runs: np.ndarray

    @classmethod
    def from_crop(cls, crop: np.ndarray, top: int, left: int, size: Size) -> Mask:
        """From the boolean pixels (h, w) of the part at (`top`, `left`) in an image of `size`."""
        return cls(size, top, left, (crop.shape[0], crop.shape[1]), _runs(crop))

    @classmethod
    def from_full(cls, mask: np.ndarray) -> Mask:
        """From a whole boolean mask (H, W); the crop becomes the tight one."""
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        if not len(rows):
            return cls.from_crop(np.zeros((0, 0), bool), 0, 0, (mask.shape[0], mask.shape[1]))
        top, left = int(rows[0]), int(columns[0])
        crop = mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(bool)
        return cls.from_crop(crop, top, left, (mask.shape[0], mask.shape[1]))

    def crop(self) -> np.ndarray:
        """The crop's pixels, bool (h, w)."""
        values = np.arange(len(self.runs)) % 2 == 1
        return np.repeat(values, self.runs).reshape(self.shape[::-1]).T

    def full(self) -> np.ndarray:
        """The whole mask, bool (H, W)."""
        whole = np.zeros(self.size, bool)
        whole[self.top : self.top + self.shape[0], self.left : self.left + self.shape[1]] = self.crop()
        return whole

    @property
    def area(self) -> int:
        """The number of pixels set."""
        return int(self.runs[1::2].sum())

    def rle(self) -> dict:
        """COCO's compressed RLE of the whole mask: {"size": [H, W], "counts": str}."""
        from pycocotools import mask as coco

        height, width = self.size
        starts, ends = self._pieces()
        # Where the crop's pixels come in the whole image's columns.
        column, row = np.divmod(starts, max(self.shape[0], 1))
        starts, length = (column + self.left) * height + row + self.top, ends - starts
        bounds = np.stack([starts, starts + length], 1).ravel()
        joined = np.flatnonzero(bounds[1:-1:2] == bounds[2::2])  # pieces that meet across columns are one run
        bounds = np.delete(bounds, np.concatenate([2 * joined + 1, 2 * joined + 2]))
        runs = np.diff(np.concatenate([[0], bounds, [height * width]]))
        if runs[-1] == 0:
            runs = runs[:-1]
        encoded = coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
        return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}

    def _pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of the runs of 1 in the crop, down its columns, cut where a column ends; int64."""
        ends = np.cumsum(self.runs, dtype=np.int64)
        starts, ends = ends[0:-1:2], ends[1::2]
        height = max(self.shape[0], 1)
        count = (ends - 1) // height - starts // height + 1
        first = np.repeat(starts, count)
        within = np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
        piece = first // height + within
        return np.maximum(first, piece * height), np.minimum(np.repeat(ends, count), (piece + 1) * height)


def _runs(crop: np.ndarray) -> np.ndarray:
    """Lengths of the runs down the columns of a boolean (h, w), uint32; the first run is of zeros."""
    flat = crop.T.ravel()
    if not len(flat):
        return np.zeros(1, np.uint32)
    ends = []
    for start in range(1, len(flat), _BAND):
        ahead = flat[start : start + _BAND]
        ends.append(np.flatnonzero(ahead != flat[start - 1 : start - 1 + len(ahead)]) + start)
    first = [0, 0] if flat[0] else [0]
    return np.diff(np.concatenate([first, *ends, [len(flat)]])).astype(np.uint32)


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
    crop = np.empty((len(columns), len(rows)), bool)
    band = max(1, _BAND // len(rows))
    for start in range(0, len(columns), band):
        pasted = cv2.gemm(half[start : start + band], rows, 1, _NONE, 0, flags=cv2.GEMM_2_T)
        np.greater_equal(pasted, threshold, out=crop[start : start + band])
    return Mask.from_crop(crop.T, top, left, size)


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
