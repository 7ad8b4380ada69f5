"""Objects as numbers: an image of object numbers, and a table with one row per object.

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
COLUMNS = ("area", "centroid_x", "centroid_y", "x_min", "y_min", "x_max", "y_max", "mean_intensity")


def label_image(segments: Sequence[Mask], size: Size) -> np.ndarray:
    """Object numbers from 1, 0 where there is none: uint16 (H, W). Where masks overlap, the first one counts.

    Raises:
        InputError: more objects than 16 bits can number.
    """
    if len(segments) > MOST_LABELS:
        raise InputError(
            f"{len(segments)} objects do not fit a 16-bit label image; raise the score threshold"
        )
    labels = np.zeros(size, np.uint16)
    for number, mask in reversed(list(enumerate(segments, 1))):
        top, left = mask.top, mask.left
        labels[top : top + mask.shape[0], left : left + mask.shape[1]][mask.crop()] = number
    return labels


def measure(box: np.ndarray, mask: Mask | None, picture: Image.Image) -> dict[str, float]:
    """One object's `COLUMNS`, in pixels of its RGB picture.

    Without a mask the object is its box, (4,) xyxy. The middle of the top left pixel is at (0.5, 0.5).
    `mean_intensity` is the mean over the object's pixels and the three channels, 0 to 255; NaN where the
    object has no pixel.
    """
    x0, y0, x1, y1 = (float(edge) for edge in box)
    area: float = round((x1 - x0) * (y1 - y0), 3)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    if mask is None:
        top, left = int(y0), int(x0)
        seen = np.ones((int(np.ceil(y1)) - top, int(np.ceil(x1)) - left), bool)
    else:
        top, left, seen = mask.top, mask.left, mask.crop()
        columns, rows = seen.sum(axis=0), seen.sum(axis=1)
        area = int(rows.sum())
        if area:
            x = float(columns @ np.arange(len(columns))) / area + left + 0.5
            y = float(rows @ np.arange(len(rows))) / area + top + 0.5
    intensity = _mean(picture, seen, top, left)
    values = (round(value, 3) for value in (x, y, x0, y0, x1, y1, intensity))
    return dict(zip(COLUMNS, (area, *values), strict=True))


def _mean(picture: Image.Image, seen: np.ndarray, top: int, left: int) -> float:
    """The mean of the pixels `seen` of the part at (`top`, `left`), looked at in bands; NaN without any."""
    height, width = seen.shape
    total = count = 0
    band = max(1, BAND // max(width, 1))
    for first in range(0, height, band):
        part = seen[first : first + band]
        box = (left, top + first, left + width, top + first + len(part))
        pixels = np.asarray(picture.crop(box))[part]
        total, count = total + int(pixels.sum(dtype=np.int64)), count + pixels.size
    return total / count if count else float("nan")
