"""Reading images, and finding them and videos: whatever the file holds comes out as RGB uint8 (H, W, 3).

Knows files and their formats; must not know bundles or models.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from meta_deploy.bundle.manifest import Size
from meta_deploy.errors import ImageError, InputError
from meta_deploy.imaging.depth import Note, check_depth, to_8_bits
from meta_deploy.imaging.formats import HEAD, described

MAX_PIXELS = (
    178_956_970  # Pillow's own limit; a photo of 100 megapixels passes, a decompression bomb does not
)
LARGE = 1 << 25  # pixels; no usual photo has more
_STRIP = 1 << 20  # pixels converted at a time
_LARGE_LOCK = threading.RLock()
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
    source: ImageLike, depth: int | None = None, wanted: Callable[[int, int], Size] | None = None
) -> Picture:
    """As `read_image`, with what there is to say of it.

    `wanted` tells for an image's height and width the size that it will be resized to. An image of more
    than LARGE pixels is then reduced by a whole factor while it is read, each new pixel the mean of those it
    stands for, where at least twice the wanted size is left both ways: it is never whole in an array.
    """
    check_depth(depth)
    if isinstance(source, np.ndarray):
        pixels = _check_array(source)
        return Picture(pixels, (pixels.shape[0], pixels.shape[1]))
    with _opened(source) as file, one_at_a_time(file.size):
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
    with _opened(source) as file, one_at_a_time(file.size):
        image = file.decode(depth)
        return image.copy() if image is source else image


def is_large(size: Size) -> bool:
    """Whether an image of this size is reduced while it is read, and worked on in strips."""
    return size[0] * size[1] > LARGE


def one_at_a_time(size: Size) -> contextlib.AbstractContextManager:
    """A lock, for an image of this size, if that is large: several might not fit into memory together."""
    return _LARGE_LOCK if is_large(size) else contextlib.nullcontext()


class _File:
    """An image that Pillow or OpenCV has opened, and its content where there is one: what both know of it."""

    def __init__(self, name: str, image: Image.Image | None, stream: BinaryIO | None):
        self.name = name
        self.notes: list[Note] = []
        self._image = image
        self._stream = stream
        self._tags = self._read_tags()
        if image is not None:
            self.size: Size = (image.height, image.width)
        else:
            self.size = (self._tag(257, 0), self._tag(256, 0))
        _check_size(self.size[1], self.size[0], name)
        self._refuse_thumbnail()

    def decode(self, depth: int | None = None, factor: int = 1) -> Image.Image:
        """The picture in RGB, upright, reduced by a whole factor."""
        try:
            image, left = self._load(depth, factor)
            # Orientation before the mode: converting drops it for some.
            if left > 1:
                image = _reduced(image, left)
            if self.orientation in _TURNS:
                image = image.transpose(_TURNS[self.orientation])
            return image if image.mode == "RGB" else image.convert("RGB")
        except (MemoryError, ImageError):
            raise
        except Exception as error:  # decoders raise much: OSError, SyntaxError, struct.error, zlib.error
            raise ImageError(f"{self.name} is damaged or cut short ({error}); get the file again") from error

    def _load(self, depth: int | None, factor: int) -> tuple[Image.Image, int]:
        """The decoded picture with 8 bits a sample, and by how much it is still to be reduced."""
        if self._pages() > 1:
            self.notes.append(Note("pages", "first", f"{self.name} has several pages; the first is taken"))
        samples, declared = self._deep_samples()
        if samples is not None:
            inverted = self._tag(262, 1) == 0
            shallow, note = to_8_bits(samples, depth, declared, inverted)
            if note is not None:
                self.notes.append(replace(note, text=f"{self.name} {note.text}"))
            return Image.fromarray(shallow), factor
        image, left = self._image, factor
        assert image is not None
        if factor > 1 and self._stream is not None:  # not a caller's own image
            width = image.width
            image.draft(image.mode, (width // factor, image.height // factor))  # JPEG alone can
            left = factor // round(width / image.width)
        image.load()
        return image, left

    def _deep_samples(self) -> tuple[np.ndarray | None, int | None]:
        """Samples (H, W) or RGB and their declared bits, if they have more than 8 bits; else None."""
        image = self._image
        if self._tags is not None:
            bits, kind = max(_tuple(self._tags.get(258, 1))), self._tag(339, 1)
            colours = self._tag(262, 1)
            if (bits <= 8 and kind == 1) or (image is not None and colours > 2):
                return None, None
            most = max((int(v) for t in (281, 341) for v in _tuple(self._tags.get(t, ()))), default=0)
            declared = most.bit_length() if kind != 3 and most > 0 else bits if bits < 16 else None
            return self._by_opencv(bits), declared
        assert image is not None
        if image.format == "PNG" and self._stream is not None:
            bits, significant = _png_depth(self._stream)
            return (self._by_opencv(bits), significant) if bits > 8 else (None, None)
        if image.mode == "F" or image.mode.startswith("I"):
            image.load()
            # Other formats' decoders fill all 16 bits (JPEG 2000, PGM); an image in memory may be anything.
            return np.asarray(image).astype(
                _UNSIGNED.get(image.mode, np.float32)
            ), 16 if image.format else None
        return None, None

    def _by_opencv(self, bits: int) -> np.ndarray:
        """The samples as they are stored, which Pillow would cut to 8 bits or does not know.

        OpenCV is there anyway and knows all compressions, for which tifffile would need imagecodecs.
        """
        import cv2

        assert self._stream is not None
        self._stream.seek(0)
        content = np.frombuffer(self._stream.read(), np.uint8)
        try:
            samples = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
        except cv2.error as error:
            raise ImageError(f"{self.name} is damaged or of a kind not read here; {_CONVERT}") from error
        if samples is None or samples.dtype.itemsize * 8 < bits or samples.shape[:2] != self.size:
            raise ImageError(
                f"{self.name} has {bits}-bit{' float' if self._tag(339, 1) == 3 else ''} samples "
                f"and is damaged or of a kind not read here; {_CONVERT}"
            )
        return samples if samples.ndim == 2 else np.ascontiguousarray(samples[:, :, 2::-1])

    def _read_tags(self) -> Any:
        """The first page's tags of a TIFF file, which are also there for one that Pillow does not know."""
        from PIL.TiffImagePlugin import ImageFileDirectory_v2

        if self._image is not None:
            return getattr(self._image, "tag_v2", None) if self._stream is not None else None
        assert self._stream is not None
        self._stream.seek(0)
        head = self._stream.read(8)
        head += self._stream.read(8) if head[2:4] in (b"+\0", b"\0+") else b""
        tags = ImageFileDirectory_v2(head)
        self._stream.seek(tags.next)
        tags.load(self._stream)  # type: ignore[arg-type]
        return tags

    def _tag(self, number: int, otherwise: int) -> int:
        """A TIFF tag's value, the first of several."""
        values = _tuple(self._tags.get(number, otherwise)) if self._tags is not None else ()
        with contextlib.suppress(TypeError, ValueError, ArithmeticError):  # of another type than it should be
            return int(values[0]) if values else otherwise
        return otherwise

    @functools.cached_property
    def orientation(self) -> int:
        """By EXIF, 1 to 8. Pillow decodes a PNG for it."""
        with contextlib.suppress(Exception):  # broken EXIF data is no reason to fail
            return int(self._tag(274, 1) if self._image is None else self._image.getexif().get(0x0112, 1))
        return 1

    def _pages(self) -> int:
        with contextlib.suppress(Exception):
            return getattr(self._image, "n_frames", 1) if self._tags is not None else 1
        return 1

    def _refuse_thumbnail(self) -> None:
        """A raw file of a camera is a TIFF whose first page is a thumbnail, the sensor's data in another."""
        thumbnail = self._tag(254, 0) & 1 and self._tag(330, 0)
        if self._tag(50706, 0) or self._tag(262, 1) in (32803, 34892) or thumbnail:
            raise ImageError(
                f"{self.name} is a camera's raw file; develop it to TIFF or JPEG first, with rawpy"
            )


_CONVERT = "convert it to an uncompressed TIFF or a PNG"
_UNSIGNED: dict[str, Any] = {"I;16": np.uint16, "I;16B": np.uint16, "I;16L": np.uint16, "I": np.int32}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list, bytes)) else (value,)


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """RGB, each pixel the mean of `factor` x `factor`; in strips, so that the large image is there once."""
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    rows = factor * max(1, _STRIP // (factor * image.width))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        small.paste(strip.convert("RGB").reduce(factor), (0, top // factor))
    return small


def _png_depth(stream: BinaryIO) -> tuple[int, int | None]:
    """Bits a sample, and how many of them are significant, where an sBIT chunk says so."""
    stream.seek(8)
    bits, significant = 8, None
    while len(head := stream.read(8)) == 8 and head[4:] != b"IDAT":
        length = int.from_bytes(head[:4], "big")
        content = stream.read(length + 4)[:length]
        if head[4:] == b"IHDR":
            bits = content[8]
        elif head[4:] == b"sBIT" and content:
            significant = max(content[:3])
    return bits, significant


@contextlib.contextmanager
def _opened(source: ImageLike) -> Iterator[_File]:
    """The image of a path, bytes, or a Pillow image; closed afterwards, unless it is the caller's."""
    if isinstance(source, Image.Image):
        yield _File("the given image", source, None)
        return
    if isinstance(source, bytes):
        with _identified(io.BytesIO(source), len(source), "the given bytes") as file:
            yield file
        return
    assert not isinstance(source, np.ndarray)
    path = Path(source)
    name = f"'{path}'"
    try:
        if not path.exists():
            raise ImageError(f"there is no file {name}; check the path")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise ImageError(f"{name} is {kind}, not an image; name an image file")
        with path.open("rb") as stream, _identified(stream, path.stat().st_size, name) as file:
            yield file
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot read {name}: {reason}; check the path and its permissions") from error


@contextlib.contextmanager
def _identified(stream: BinaryIO, size: int, name: str) -> Iterator[_File]:
    if size == 0:
        raise ImageError(f"{name} is empty (0 bytes); get the file again")
    _silence()
    try:
        image = Image.open(stream, formats=_formats())
    except Image.DecompressionBombError as error:
        limit = min(MAX_PIXELS, 2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS))
        raise ImageError(
            f"{name} has more than the limit of {limit // 10**6} million pixels; make it smaller first"
        ) from error
    except Exception as error:  # a broken header can raise anything from a decoder
        yield _unidentified(stream, name, error)
        return
    with image:
        yield _File(name, image, stream)


def _unidentified(stream: BinaryIO, name: str, error: Exception) -> _File:
    """A TIFF of a kind that Pillow does not know, or the error that says what the file is."""
    stream.seek(0)
    head = stream.read(HEAD)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and head[8:10] != b"CR":
        with contextlib.suppress(Exception):
            file = _File(name, None, stream)
            if 0 not in file.size:
                return file
    if what := described(head):
        what, _, remedy = what.partition("; ")
        if not remedy.startswith("rename"):
            raise ImageError(f"{name} is {what}, which is not read here; {remedy}") from error
        if "video" in what:
            raise ImageError(f"{name} is {what}, not a picture; {remedy}") from error
        raise ImageError(f"{name} is {what}, which is damaged; get the file again") from error
    raise ImageError(
        f"{name} is not an image that can be read; give a JPEG, PNG, WebP, TIFF, BMP or GIF file"
    ) from error


@functools.cache
def _silence() -> None:
    """Keep decoders' own messages from standard error: what matters of them arrives as an exception."""
    import ctypes

    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    # Pillow has no setting for libtiff, which prints what it finds wrong.
    with contextlib.suppress(OSError, AttributeError):  # where libtiff is not to be seen from outside
        library = ctypes.CDLL(Image.core.__file__)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


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
