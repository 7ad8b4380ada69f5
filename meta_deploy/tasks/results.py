"""What results of all tasks share: where from, how long it took, drawing, saving, COCO's category ids.

Knows arrays and names; must not know bundles, back ends or the network's input.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import numpy as np
from PIL import Image

from meta_deploy.bundle.files import atomic_write
from meta_deploy.bundle.manifest import Size
from meta_deploy.errors import InputError
from meta_deploy.imaging.images import ImageLike, is_large, one_at_a_time, read_canvas

SHOWN = 5  # classes that a line names


@dataclass(frozen=True)
class Timings:
    """Milliseconds spent on one image: preprocessing (decoding apart), the model, postprocessing.

    In a batch, the model's time is the batch's divided by its images.
    """

    pre: float = 0.0
    model: float = 0.0
    post: float = 0.0

    def __add__(self, other: Timings) -> Timings:
        return Timings(self.pre + other.pre, self.model + other.model, self.post + other.post)

    @property
    def total(self) -> float:
        return self.pre + self.model + self.post

    def to_dict(self) -> dict[str, float]:
        return {f"{name}_ms": round(getattr(self, name), 3) for name in ("pre", "model", "post")}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Result(ABC):
    """What a model says of one image or one set of arrays. `repr` is one line, in words.

    `path` is the file it was read from, if any, and `depth` the bits that its samples were taken to have, if
    that was set.
    """

    path: str | None = None
    depth: int | None = None
    timings: Timings = field(default_factory=Timings)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """For JSON."""

    @abstractmethod
    def filter(self, score: float) -> Result:
        """What has at least this score; itself where nothing has one."""

    def apart(self) -> Result:
        """The same with one thing at each pixel, as label images and tables have it."""
        return self

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a file, whole or not at all."""


class ImageResult(Result):
    """What a model says of one image, which has a `size` (height, width)."""

    columns: ClassVar[tuple[str, ...]]  # of `table`

    if TYPE_CHECKING:  # a field of some, computed by others

        @property
        def size(self) -> Size: ...

    @abstractmethod
    def to_coco(self, image_id: int | str, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO result records. `category_ids` gives each class's id; None: `coco_category_ids`."""

    @abstractmethod
    def _drawn(self, picture: Image.Image) -> Image.Image:
        """The result on an RGB picture of its size, which may be drawn on."""

    @abstractmethod
    def label_image(self) -> np.ndarray:
        """What is at each pixel, as a number: uint16 (H, W). Raises InputError where that cannot be told."""

    @abstractmethod
    def table(self, image: ImageLike | None = None) -> list[dict[str, Any]]:
        """What was found, as rows of `columns`. Takes and raises what `draw` does."""

    def save_labels(self, path: str | os.PathLike[str]) -> None:
        """Write the label image as a 16-bit grey .png or .tif, whole or not at all. Raises InputError."""
        if os.path.splitext(path)[1].lower() not in (".png", ".tif", ".tiff"):
            raise InputError(f"cannot write '{path}': a label image is a .png or a .tif")
        save_image(path, Image.fromarray(self.label_image()))

    def draw(self, image: ImageLike | None = None) -> np.ndarray:
        """The result drawn on its image: RGB uint8 (H, W, 3).

        Without `image` it is read from `path`. A small image comes back enlarged by a whole factor, so that
        the names can be read.

        Raises:
            ImageError: the image cannot be read.
            InputError: it is not the size of the one this is the result of, or there is none.
        """
        return np.array(self._drawn(self._canvas(image)))

    def save(self, path: str | os.PathLike[str], image: ImageLike | None = None) -> None:
        """Write the drawn image, in the format of `path`'s suffix, whole or not at all. Raises as `draw`."""
        with one_at_a_time(self.size):
            save_image(path, self._drawn(self._canvas(image)))

    def _canvas(self, image: ImageLike | None) -> Image.Image:
        source = self.path if image is None else image
        if source is None:
            raise InputError("these results have no path to read the image from; pass the image to draw on")
        canvas = read_canvas(source, self.depth)
        if canvas.size != self.size[::-1]:
            raise InputError(
                f"the image to draw on is {canvas.width}x{canvas.height}, and the results are of one of "
                f"{self.size[1]}x{self.size[0]}; pass that one"
            )
        return canvas


def listed(parts: Sequence[str]) -> str:
    """The first few, and an ellipsis where there are more."""
    return ", ".join([*parts[:SHOWN], *(["…"] if len(parts) > SHOWN else [])])


_COCO_GAPS = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83))


def coco_category_ids(classes: Sequence[str]) -> list[int]:
    """Each class's COCO id: 1 to 90 with COCO's gaps where these are its 80 classes, else label + 1."""
    if len(classes) == 80 and classes[0] == "person" and classes[-1] == "toothbrush":
        return [i for i in range(1, 91) if i not in _COCO_GAPS]
    return list(range(1, len(classes) + 1))


def save_image(path: str | os.PathLike[str], image: np.ndarray | Image.Image) -> None:
    """Write RGB uint8 (H, W, 3), or an RGB picture, in the format of the path's suffix, whole or not at all.

    Raises:
        InputError: the suffix is no image format's, or the file cannot be written.
    """
    suffix = os.path.splitext(path)[1].lower()
    form = Image.registered_extensions().get(suffix)
    if form not in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        raise InputError(f"cannot write '{path}': '{suffix}' is no image suffix known here; use .jpg or .png")
    options = {"quality": 92} if form in ("JPEG", "WEBP") else {}
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if form == "PNG" and is_large(picture.size):
        options["compress_level"] = 1  # several times faster, a little larger
    with atomic_write(path) as stream:
        try:
            picture.save(_WithoutNumber(stream), format=form, **options)  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None):
                raise  # the disk's fault, and not the format's
            raise InputError(f"cannot write '{path}' as {form}: {error}; use .png") from error


class _WithoutNumber:
    """A file without its number: encoders that write to that by themselves take a full disk for a success."""

    def __init__(self, stream: BinaryIO):
        self.write, self.seek, self.tell, self.flush = stream.write, stream.seek, stream.tell, stream.flush
