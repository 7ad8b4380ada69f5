"""Reading images and videos, and finding them: whatever the file holds comes out as RGB uint8 (H, W, 3).

Knows files and their formats; must not know bundles or models.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from meta_deploy.errors import ImageError, InputError

MAX_PIXELS = (
    178_956_970  # Pillow's own limit; a photo of 100 megapixels passes, a decompression bomb does not
)
# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif",
))
VIDEO_SUFFIXES = frozenset((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"))
# fmt: on
ARRAY_SUFFIXES = frozenset((".npz",))
# Named, because Pillow also opens formats that run other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")

ImageLike = str | os.PathLike[str] | bytes | np.ndarray | Image.Image


def read_image(source: ImageLike) -> np.ndarray:
    """An image as RGB uint8 (H, W, 3), upright by its EXIF orientation.

    `source` is a path, an encoded file's bytes, a Pillow image, or an RGB uint8 array (H, W, 3), returned
    as it is. Grey, palette, CMYK and 16-bit images are converted (the high byte kept), alpha is dropped;
    of an animation the first frame is taken.

    Raises:
        ImageError: missing, empty, truncated, not an image, or of more than MAX_PIXELS pixels.
    """
    if isinstance(source, np.ndarray):
        return _check_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, "the given image")
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), len(source), "the given bytes")
    path = Path(source)
    name = f"'{path}'"
    try:
        if not path.exists():
            raise ImageError(f"there is no file {name}; check the path")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise ImageError(f"{name} is {kind}, not an image; name an image file")
        with path.open("rb") as stream:
            return _read(stream, path.stat().st_size, name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot read {name}: {reason}; check the path and its permissions") from error


def _check_array(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ImageError(
            f"an image array must be RGB uint8 (H, W, 3), not {image.dtype} {image.shape}; convert it"
        )
    _check_size(image.shape[1], image.shape[0], "the given array")
    return image


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {width}x{height} pixels, more than the limit of {MAX_PIXELS // 10**6} million; "
            "make it smaller first"
        )


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _read(stream: Any, size: int, name: str) -> np.ndarray:
    if size == 0:
        raise ImageError(f"{name} is empty (0 bytes); get the file again")
    try:
        image = Image.open(stream, formats=_formats())
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} has more than the limit of {MAX_PIXELS // 10**6} million pixels; make it smaller first"
        ) from error
    except Exception as error:  # a broken header can raise anything from a decoder
        raise ImageError(
            f"{name} is not an image that can be read; give a JPEG, PNG, WebP, TIFF, BMP or GIF file"
        ) from error
    with image:
        return _decode(image, name)


def _decode(image: Image.Image, name: str) -> np.ndarray:
    _check_size(image.width, image.height, name)
    try:
        image.load()
        # Orientation before the mode: converting drops it for some. Broken EXIF data is no reason to fail.
        with contextlib.suppress(Exception):
            image = ImageOps.exif_transpose(image)
        return np.asarray(_to_rgb(image))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise much: OSError, SyntaxError, struct.error, zlib.error
        raise ImageError(f"{name} is damaged or cut short ({error}); get the file again") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are 32-bit floats, whose range is unknown")
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to 255
        high = np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8
        image = Image.fromarray(high.astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True)
class Source:
    """One thing named on the command line: an image file, a video, or an .npz file of arrays."""

    path: Path
    video: bool = False

    @property
    def arrays(self) -> bool:
        return self.path.suffix.lower() in ARRAY_SUFFIXES


def expand(arguments: Iterable[str]) -> list[Source]:
    """Arguments (image, video, .npz, folder, or glob pattern) to the files they name, each once, in order.

    A folder gives the images directly in it, sorted, by suffix; without images, the .npz files. A file that
    does not exist is kept, for reading it to say so.

    Raises:
        InputError: a folder without either, a pattern without matches, or an empty name.
    """
    found: dict[str, Source] = {}
    for argument in arguments:
        for path in _matches(argument):
            found.setdefault(os.path.abspath(path), Source(path, path.suffix.lower() in VIDEO_SUFFIXES))
    return list(found.values())


def _matches(argument: str) -> list[Path]:
    if not argument:
        raise InputError("an input's name is empty; name an image, a folder or a pattern")
    path = Path(argument)
    if os.path.isdir(path):  # unlike Path's own, false where it cannot be known: a name too long
        try:
            files = sorted(path.iterdir())
            paths = [p for p in files if _known(p, IMAGE_SUFFIXES)]
            paths = paths or [p for p in files if _known(p, ARRAY_SUFFIXES)]
        except OSError as error:
            raise InputError(f"cannot read the folder '{argument}': {error.strerror}") from error
        if not paths:
            raise InputError(f"there is no image in the folder '{argument}'; name a folder that has some")
        return paths
    if not os.path.exists(path) and glob.has_magic(argument):
        paths = sorted(
            p
            for p in map(Path, glob.glob(argument, recursive=True))
            if _known(p, IMAGE_SUFFIXES | VIDEO_SUFFIXES | ARRAY_SUFFIXES)
        )
        if not paths:
            raise InputError(f"no image or video matches '{argument}'; check the pattern")
        return paths
    return [path]


def _known(path: Path, suffixes: frozenset[str]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and os.path.isfile(path)


class Video:
    """A video file, whose frames come one at a time. A context manager; `fps` and `count` as it claims."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises ImageError when the file is missing or cannot be decoded."""
        import cv2

        self.path = Path(path)
        if not os.path.isfile(self.path):
            raise ImageError(f"there is no file '{path}'; check the path")
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise ImageError(f"'{path}' is not a video that can be read; give an MP4, AVI, MKV or WebM file")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else 25.0
        self.count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frames as RGB uint8 (H, W, 3), in order. Raises ImageError when there is not a single one."""
        empty = True
        while True:
            good, frame = self._capture.read()
            if not good:
                break
            empty = False
            yield frame[:, :, ::-1]
        if empty:
            raise ImageError(f"'{self.path}' holds no frame that can be read; get the file again")

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()
