"""An image file: what it is, how it is decoded, and what is wrong with it, told by its name.

Knows formats, Pillow and OpenCV; must not know what the pixels are for.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from meta_deploy.bundle.manifest import Size
from meta_deploy.errors import ImageError
from meta_deploy.imaging.depth import Note, to_8_bits
from meta_deploy.imaging.formats import HEAD, described

# Pillow's own limit: a photo of 100 megapixels passes, a decompression bomb does not.
MAX_PIXELS = 178_956_970
_STRIP = 1 << 20  # pixels converted at a time
# Named, because Pillow also opens formats that run other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
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


class ImageFile:
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
            height, width = self._tag(257, 0), self._tag(256, 0)
            self.size = (width, height) if self._tag(274, 1) >= 5 else (height, width)
        check_size(self.size[1], self.size[0], name)
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
        if self._has_pages():
            self.notes.append(Note("pages", "first", f"{self.name} has several pages; the first is taken"))
        samples, declared = self._deep_samples()
        if samples is not None:
            inverted = self._tag(262, 1) == 0
            bits = 8 * samples.dtype.itemsize
            if depth is not None and samples.dtype.kind in "iu" and not 1 < depth <= bits:
                raise ImageError(
                    f"{self.name} holds {bits}-bit integers, which a depth of {depth} does not go with; "
                    f"set 2 to {bits} bits, or none"
                )
            if samples.dtype.kind == "f" and not np.isfinite(samples).any():
                raise ImageError(f"{self.name} holds no finite number, only NaN or infinity; write it again")
            shallow, notes = to_8_bits(samples, depth, declared, inverted)
            self.notes.extend(replace(note, text=f"{self.name} {note.text}") for note in notes)
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
        """Samples (H, W) or RGB and their declared bits where Pillow cannot give all of them; else None."""
        image = self._image
        if self._tags is not None:
            bits, kind = max(_tuple(self._tags.get(258, 1))), self._tag(339, 1)
            colours = self._tag(262, 1)
            if image is not None and ((bits <= 8 and kind == 1) or colours > 2):
                return None, None
            values = (v for t in (281, 341) for v in _tuple(self._tags.get(t, ())))
            most = max((int(v) for v in values if 0 < v < 2**bits), default=0)  # else it says nothing
            declared = most.bit_length() if kind != 3 and most > 0 else bits if bits < 16 else None
            return self._by_opencv(bits), declared
        assert image is not None
        if image.format == "PNG" and self._stream is not None:
            bits, significant = _png_depth(self._stream)
            return (self._by_opencv(bits), significant) if bits > 8 else (None, None)
        if image.mode == "F" or image.mode.startswith("I"):
            image.load()
            samples = np.asarray(image).astype(_UNSIGNED.get(image.mode, np.float32))
            # These decoders fill all 16 bits; an image in memory may be anything.
            return samples, 16 if image.format in ("JPEG2000", "PPM") else None
        return None, None

    def _by_opencv(self, bits: int) -> np.ndarray:
        """The samples as they are stored, which Pillow would cut to 8 bits or does not know.

        OpenCV is there anyway and knows all compressions, for which tifffile would need imagecodecs.
        """
        import cv2

        channels = self._tag(277, 1)
        if channels > 1 and self._tag(284, 1) == 2:  # OpenCV would take the planes for interleaved samples
            raise ImageError(
                f"{self.name} stores {channels} channels one after the other, which is not read at {bits} "
                "bits; save them interleaved, or one of them"
            )
        assert self._stream is not None
        self._stream.seek(0)
        content = np.frombuffer(self._stream.read(), np.uint8)
        try:
            samples = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
        except cv2.error as error:
            raise ImageError(f"{self.name} is damaged or of a kind not read here; {_CONVERT}") from error
        if samples is None and self._is_cut(content):
            raise ImageError(f"{self.name} is cut short; get the file again")
        # Of several channels that are declared grey OpenCV makes one, at 16 bits of the wrong samples.
        if channels not in (1, 3, 4) or (channels > 1 and samples is not None and samples.ndim == 2):
            raise ImageError(
                f"{self.name} has {channels} channels and is not RGB; save one of them, or an RGB picture"
            )
        if samples is None or samples.dtype.itemsize * 8 < bits or samples.shape[:2] != self.size:
            raise ImageError(
                f"{self.name} has {bits}-bit{' float' if self._tag(339, 1) == 3 else ''} samples "
                f"and is damaged or of a kind not read here; {_CONVERT}"
            )
        return samples if samples.ndim == 2 else np.ascontiguousarray(samples[:, :, 2::-1])

    def _is_cut(self, content: np.ndarray) -> bool:
        """Whether a PNG lacks its end, or a TIFF some of the strips or tiles that it lists."""
        if self._tags is None:
            return b"IEND" not in content.tobytes()
        for starts, lengths in ((273, 279), (324, 325)):
            places = zip(*(_tuple(self._tags.get(tag, ())) for tag in (starts, lengths)), strict=False)
            with contextlib.suppress(TypeError):  # of another type than they should be
                if any(start + length > len(content) for start, length in places):
                    return True
        return False

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
        """By EXIF, 1 to 8; 1 for a TIFF, which its decoders turn. Pillow decodes a PNG for it."""
        if self._image is None or self._tags is not None:
            return 1
        with contextlib.suppress(Exception):  # broken EXIF data is no reason to fail
            return int(self._image.getexif().get(0x0112, 1))
        return 1

    def _has_pages(self) -> bool:
        """Whether a TIFF has a second page. Their number would take a look at each."""
        with contextlib.suppress(Exception):
            return self._tags is not None and bool(self._tags.next)
        return False

    def _refuse_thumbnail(self) -> None:
        """A raw file of a camera is a TIFF whose first page is a thumbnail, the sensor's data in another."""
        thumbnail = self._tag(254, 0) & 1 and self._tag(330, 0)
        if self._tag(50706, 0) or self._tag(262, 1) in (32803, 34892) or thumbnail:
            raise ImageError(
                f"{self.name} is a camera's raw file; develop it to TIFF or JPEG first, with rawpy"
            )


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
            significant = max(content[:3]) if 0 < max(content[:3]) <= bits else None
    return bits, significant


@contextlib.contextmanager
def opened(
    source: str | os.PathLike[str] | bytes | Image.Image, name: str | None = None
) -> Iterator[ImageFile]:
    """The image of a path, bytes, or a Pillow image; closed afterwards, unless it is the caller's.

    `name` is the path that bytes were read from.
    """
    if isinstance(source, Image.Image):
        yield ImageFile("the given image", source, None)
        return
    if isinstance(source, bytes):
        told = "the given data" if name is None else f"'{name}'"
        with _identified(io.BytesIO(source), len(source), told) as file:
            yield file
        return
    with (
        _readable(source) as (stream, told),
        _identified(stream, os.fstat(stream.fileno()).st_size, told) as file,
    ):
        yield file


def content(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image's file. Raises ImageError: there is none, or it cannot be read."""
    with _readable(path) as (stream, _):
        return stream.read()


@contextlib.contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, str]]:
    """A file open for reading, and what messages call it."""
    path = Path(path)
    name = f"'{path}'"
    try:
        if not path.exists():
            raise ImageError(f"there is no file {name}; check the path")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise ImageError(f"{name} is {kind}, not an image; name an image file")
        with path.open("rb") as stream:
            yield stream, name
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot read {name}: {reason}; check the path and its permissions") from error


@contextlib.contextmanager
def _identified(stream: BinaryIO, size: int, name: str) -> Iterator[ImageFile]:
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
        yield ImageFile(name, image, stream)


def _unidentified(stream: BinaryIO, name: str, error: Exception) -> ImageFile:
    """A TIFF of a kind that Pillow does not know, or the error that says what the file is."""
    stream.seek(0)
    head = stream.read(HEAD)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and head[8:10] != b"CR":
        with contextlib.suppress(Exception):
            file = ImageFile(name, None, stream)
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

    # OpenCV 4 has it at its top, 5 does not. 0 is silent.
    (cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)
    # Pillow has no setting for libtiff, which prints what it finds wrong.
    with contextlib.suppress(OSError, AttributeError):  # where libtiff is not to be seen from outside
        library = ctypes.CDLL(Image.core.__file__)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {width}x{height} pixels, more than the limit of {MAX_PIXELS // 10**6} million; "
            "make it smaller first"
        )
