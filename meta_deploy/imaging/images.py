"""Reading images: whatever the file holds comes out as RGB uint8 (H, W, 3), upright.

Knows what callers hand over and how much memory it may take; must not know bundles or models.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from meta_deploy.bundle.manifest import Size
from meta_deploy.errors import ImageError
from meta_deploy.imaging.depth import Note, check_depth
from meta_deploy.imaging.image_file import check_size, opened

LARGE = 1 << 25  # pixels; no usual photo has more
_LARGE_LOCK = threading.RLock()


class ImageWarning(UserWarning):
    """Something that an image file leaves open was decided."""


ImageLike = str | os.PathLike[str] | bytes | np.ndarray | Image.Image


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as it was read: `pixels` RGB uint8 (H, W, 3), upright, of an image of `size` (height, width).

    The pixels are fewer than the size says where a large image was `reduced` on the way. `notes` tell what
    was decided that the file leaves open; `depth` is what it was read with.
    """

    pixels: np.ndarray
    size: Size
    notes: tuple[Note, ...] = ()
    depth: int | None = None

    @property
    def reduced(self) -> bool:
        return self.pixels.shape[:2] != self.size

    @property
    def whole(self) -> np.ndarray | None:
        """The pixels of the image, (H, W, 3) of its size; None where they are to be read again."""
        return None if self.reduced else self.pixels


def read_image(source: ImageLike, depth: int | None = None) -> np.ndarray:
    """An image as RGB uint8 (H, W, 3), upright by its EXIF orientation.

    `source` is a path, an encoded file's bytes, a Pillow image, or an RGB uint8 array (H, W, 3), returned
    as it is. Grey, palette and CMYK images are converted, alpha is dropped; of an animation or a file of
    several pages the first is taken. More than 8 bits become 8: `depth` is the number of bits that the
    samples really have (1: floats from 0 to 1); None: what the file declares, else the range of its values,
    with a warning (`warnings`) that says so.

    Raises:
        ImageError: missing, empty, truncated, not an image, or of more than MAX_PIXELS pixels.
        InputError: a depth out of range.
    """
    picture = load(source, depth)
    for note in picture.notes:
        warnings.warn(note.text, ImageWarning, stacklevel=2)
    return picture.pixels


def load(
    source: ImageLike,
    depth: int | None = None,
    wanted: Callable[[int, int], Size] | None = None,
    name: str | None = None,
) -> Picture:
    """As `read_image`, with what there is to say of it.

    `wanted` tells for an image's height and width the size that it will be resized to. An image of more
    than LARGE pixels is then reduced by a whole factor while it is read, each new pixel the mean of those it
    stands for, where at least twice the wanted size is left both ways: it is never whole in an array.

    `name` is what messages call an encoded file's bytes: the path that they were read from.
    """
    check_depth(depth)
    if isinstance(source, np.ndarray):
        pixels = _check_array(source)
        return Picture(pixels, (pixels.shape[0], pixels.shape[1]))
    with opened(source, name) as file, one_at_a_time(file.size):
        upright = file.size[::-1] if file.orientation >= 5 else file.size
        factor = 1
        if wanted is not None and is_large(file.size):
            height, width = wanted(*upright)
            factor = max(1, min(upright[0] // (2 * height), upright[1] // (2 * width)))
        image = file.decode(depth, factor)
        return Picture(np.asarray(image), upright, tuple(file.notes), depth)


def read_canvas(source: ImageLike, depth: int | None = None) -> Image.Image:
    """As `read_image`, as a Pillow image in RGB that is not the caller's: to draw on, without a copy more."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(_check_array(source))
    with opened(source) as file, one_at_a_time(file.size):
        image = file.decode(depth)
        return image.copy() if image is source else image


def is_large(size: Size) -> bool:
    """Whether an image of this size is reduced while it is read, and worked on in strips."""
    return size[0] * size[1] > LARGE


def one_at_a_time(size: Size) -> contextlib.AbstractContextManager:
    """A lock, for an image of this size, if that is large: several might not fit into memory together."""
    return _LARGE_LOCK if is_large(size) else contextlib.nullcontext()


def _check_array(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ImageError(
            f"an image array must be RGB uint8 (H, W, 3), not {image.dtype} {image.shape}; convert it"
        )
    check_size(image.shape[1], image.shape[0], "the given array")
    return image
