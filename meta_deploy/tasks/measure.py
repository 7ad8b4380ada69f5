"""Objects as numbers: each pixel in one object, an image of object numbers, and a row per object.

Knows pixels and masks; must not know models or files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from meta_deploy.bundle.manifest import Size
from meta_deploy.errors import InputError
from meta_deploy.tasks.masks import Mask

BAND = 1 << 20  # pixels that are measured at a time
MOST_LABELS = np.iinfo(np.uint16).max
OWN = 0.5  # the least share of its pixels that an object has for itself
COLUMNS = ("area", "centroid_x", "centroid_y", "x_min", "y_min", "x_max", "y_max", "mean_intensity")


def apart(segments: Sequence[Mask], size: Size) -> dict[int, Mask]:
    """Masks, the surest first, without the pixels that masks before them have: those left, by their numbers.

    One that is left with no pixel, or with less than `OWN` of its pixels, is none: mostly it is a part of an
    object that was found already. So are objects put together in panoptic segmentation (Kirillov et al., CVPR
    2019).
    """
    taken = np.zeros(size, bool)
    left = {}
    for number, mask in enumerate(segments):
        pixels = mask.crop()
        under = taken[mask.top : mask.top + mask.shape[0], mask.left : mask.left + mask.shape[1]]
        own = pixels & ~under
        if own.any() and np.count_nonzero(own) >= OWN * mask.area:
            under |= own
            left[number] = Mask.from_crop(own, mask.top, mask.left, size)
    return left


def label_image(segments: Sequence[Mask], size: Size) -> np.ndarray:
    """Object numbers from 1, 0 where there is none: uint16 (H, W). The masks have no pixel in common.

    Raises:
        InputError: more objects than 16 bits can number.
    """
    if len(segments) > MOST_LABELS:
        raise InputError(
            f"{len(segments)} objects do not fit a 16-bit label image; raise the score threshold"
        )
    labels = np.zeros(size, np.uint16)
    for number, mask in enumerate(segments, 1):
        top, left = mask.top, mask.left
        labels[top : top + mask.shape[0], left : left + mask.shape[1]][mask.crop()] = number
    return labels


def measure(box: np.ndarray, mask: Mask | None, picture: Image.Image) -> dict[str, float]:
    """One object's `COLUMNS`, in pixels of its RGB picture: of its mask, or without one of its box, xyxy.

    The middle of the top left pixel is at (0.5, 0.5), its edges are at 0 and 1. `mean_intensity` is the mean
    over the object's pixels and the three channels, 0 to 255.
    """
    if mask is None:
        x0, y0, x1, y1 = (float(edge) for edge in box)
        top, left = int(y0), int(x0)
        seen = np.ones((int(np.ceil(y1)) - top, int(np.ceil(x1)) - left), bool)
        area: float = round((x1 - x0) * (y1 - y0), 3)
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
    else:
        top, left, seen = mask.top, mask.left, mask.crop()
        area = mask.area
        (x, x0, x1), (y, y0, y1) = _along(seen.sum(axis=0), left), _along(seen.sum(axis=1), top)
    values = (round(value, 3) for value in (x, y, x0, y0, x1, y1, _mean(picture, seen, top, left)))
    return dict(zip(COLUMNS, (area, *values), strict=True))


def _along(counts: np.ndarray, start: int) -> tuple[float, float, float]:
    """Middle, first and last edge of pixels, so many in each column from `start`, or in each row."""
    at = np.flatnonzero(counts)
    middle = float(counts @ np.arange(len(counts))) / float(counts.sum()) + start + 0.5
    return middle, float(at[0] + start), float(at[-1] + start + 1)


def _mean(picture: Image.Image, seen: np.ndarray, top: int, left: int) -> float:
    """The mean of the pixels `seen` of the part at (`top`, `left`), looked at in bands."""
    height, width = seen.shape
    total = count = 0
    band = max(1, BAND // max(width, 1))
    for first in range(0, height, band):
        part = seen[first : first + band]
        box = (left, top + first, left + width, top + first + len(part))
        pixels = np.asarray(picture.crop(box))[part]
        total, count = total + int(pixels.sum(dtype=np.int64)), count + pixels.size
    return total / count
