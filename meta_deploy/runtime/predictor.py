"""The one call from an image to its result: a bundle opened, with everything between in its order.

Knows the order of the runtime's parts; must not know how any of them does its work.
"""

from __future__ import annotations

import numbers
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, islice
from time import perf_counter
from typing import TypeVar

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import LEAST_TILE, MOST_TILE, Size
from meta_deploy.bundle.shipped import locate
from meta_deploy.errors import InputError
from meta_deploy.imaging.depth import check_depth
from meta_deploy.imaging.given import given_image
from meta_deploy.imaging.images import ImageLike, ImageWarning, Picture, load
from meta_deploy.imaging.preprocess import Placement, Preprocessor, covering, resized
from meta_deploy.targets import open_backend
from meta_deploy.targets.target import Backend
from meta_deploy.tasks import get_task
from meta_deploy.tasks.results import Result, Timings
from meta_deploy.tasks.tiles import tiles_of, windows_of

MAX_THREADS = 1024
_Item = TypeVar("_Item")


class Predictor:
    """Runs a bundle on images. May be called from several threads; a context manager.

    >>> with Predictor("my-bundle") as predictor:
    ...     predictor("photo.jpg").save("overlay.png")
    """

    def __init__(
        self,
        bundle: Bundle | str | os.PathLike[str] | None = None,
        backend: str | Backend = "auto",
        score_threshold: float | None = None,
        threads: int | None = None,
        depth: int | None = None,
        tile: int | None = None,
        tile_overlap: int | None = None,
        slide: bool | int = False,
    ):
        """Open a bundle on a back end: a folder, or the name of one in the package (None: "nuclei").

        `backend` is a name, or a back end that is open already.

        `score_threshold` is the least score of a detection, 0 to 1 (None: what the bundle says, usually 0.3;
        0: all that the bundle gives, as average precision needs them); `threads` the
        CPU threads of the model, 1 to 1024 (None: all CPUs that affinity and a container's quota leave to
        this process; half of them for a predictor opened beside another, a third for the next, …); `depth`
        the bits that samples of 16-bit, 32-bit and float images really have (None: see `read_image`).

        `tile` is the side in pixels of the overlapping tiles that larger images are run in, at the resolution
        that they have, their results joined; 0: every image as a whole, resized to the model's input; None:
        what the bundle says. Neighbours share at least `tile_overlap` pixels (None: a quarter of the side).
        An object larger than that may be cut by every tile, and is then put together from its parts.

        `slide` runs class maps as MMSegmentation's `slide` mode does: the image is resized to just cover the
        model's input, and windows of the input's size slide over it by that many pixels (True: two thirds of
        its shorter side), their logits averaged where they overlap. Then there are no tiles.

        Raises:
            BundleError: not a bundle, or one altered or too new.
            BackendError: the back end is not installed, or cannot run this bundle here.
            InputError: a threshold, thread count, depth, tile, overlap or step out of range, tiles for a
                bundle whose results cannot be joined, or windows for one that gives no class maps.
        """
        if score_threshold is not None and not _is_number(score_threshold, 0, 1):
            raise InputError(f"score_threshold must be a number from 0 to 1, not {score_threshold!r}")
        if threads is not None and not _is_number(threads, 1, MAX_THREADS, numbers.Integral):
            raise InputError(f"threads must be a whole number from 1 to {MAX_THREADS}, not {threads!r}")
        check_depth(depth)
        self.depth = depth
        if isinstance(backend, Backend):
            self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(locate(bundle))
            self._backend = backend
        elif isinstance(bundle, Bundle):
            self.bundle, self._backend = bundle, open_backend(bundle, backend, threads)
        else:
            self.bundle, self._backend = Bundle.use(
                locate(bundle), lambda opened: (opened, open_backend(opened, backend, threads))
            )
        self.score_threshold = self.bundle.shown_score if score_threshold is None else score_threshold
        self._task = get_task(self.bundle.task)
        self.tile, self.tile_overlap = _chosen_tile(tile, tile_overlap, self.bundle.tile)
        if self.tile is not None and not self._task.joins:
            raise InputError(
                f"tiles are for objects and classes; bundle '{self.bundle.path}' gives plain arrays"
            )
        if self.bundle.takes_images:
            self._preprocess = Preprocessor(self.bundle.input, self.bundle.preprocess)
        self.slide = self._step(slide)
        if self.slide is not None:
            if tile or tile_overlap is not None:
                raise InputError("an image is run in tiles or in sliding windows, not both; choose one")
            self.tile, self.tile_overlap = None, 0

    @property
    def backend(self) -> str:
        """The back end in use, such as onnxruntime."""
        return self._backend.name

    @property
    def runs_on(self) -> str:
        """Library and device in words, and in brackets why nothing better was there for `auto`."""
        note = f" ({self._backend.note})" if self._backend.note else ""
        return self._backend.runs_on + note

    def __repr__(self) -> str:
        return f"Predictor of {self.bundle!r}, runs on {self._backend.runs_on}"

    def __call__(self, image: ImageLike) -> Result:
        """One image: a path, an encoded file's bytes or an open file of them, a Pillow image, or an RGB
        uint8 array (H, W, 3).

        Returns:
            What the bundle's task gives: Detections, a Segmentation, or of a raw bundle Arrays.

        Raises:
            ImageError: it cannot be read.
            InputError: the bundle takes arrays and says nothing of images; use `run`.
        """
        return self.batch([image])[0]

    def read(self, image: ImageLike) -> Picture:
        """An image for `batch`, by this predictor's `depth`; a very large one no larger than the model needs.

        Raises:
            As for one image.
        """
        _ = self.bundle.input  # an error where the bundle takes arrays only
        if self.slide is not None:
            return load(image, self.depth, lambda height, width: covering((height, width), self._window))
        if self.tile is not None:
            return load(image, self.depth)
        return load(image, self.depth, lambda height, width: self._preprocess.place(height, width).resized)

    def batch(self, images: Sequence[ImageLike | Picture]) -> list[Result]:
        """Several images, in groups as large as the bundle's batch takes; the results in the same order.

        A raw bundle gets them one by one, since which of its outputs belongs to which is not known.

        Raises:
            As for one image.
        """
        images = [image if isinstance(image, Picture) else given_image(image) for image in images]
        results: Iterator[Result]
        if (step := self.slide) is not None:
            results = (self._in_windows(self._picture(image), step) for image in images)
        elif self.tile is not None:
            results = self._tiled(images, self.tile)
        else:
            return self._as_wholes(images, self.score_threshold)
        return [replace(result, path=_path(image)) for image, result in zip(images, results, strict=True)]

    def _tiled(self, images: Sequence[ImageLike | Picture], side: int) -> Iterator[Result]:
        """Images that one tile holds together, as wholes; the others each in its tiles."""
        pictures = (self._picture(image) for image in images)
        for fits, group in groupby(pictures, lambda picture: max(picture.size) <= side):
            if fits:
                yield from self._as_wholes(group, self.score_threshold)
            else:
                yield from (self._in_tiles(picture, side) for picture in group)

    def _in_tiles(self, picture: Picture, side: int) -> Result:
        tiles = tiles_of(picture.size, side, self.tile_overlap)
        # What is joined must not hang on what is shown of it.
        threshold = min(self.score_threshold, self.bundle.score_threshold)
        results = self._as_wholes([tile.of(picture.pixels) for tile in tiles], threshold)
        began = perf_counter()
        joined = self._task.join(picture.size, tiles, results).filter(self.score_threshold)
        took = Timings(post=1000 * (perf_counter() - began))
        timings = sum((result.timings for result in results), took)
        return replace(joined, timings=timings, depth=picture.depth)

    @property
    def _window(self) -> Size:
        return self.bundle.input.size.opt

    def _step(self, slide: bool | int) -> int | None:
        """By how many pixels windows slide; None: there are none."""
        if slide is False:
            return None
        if not self._task.slides:
            raise InputError(
                f"sliding windows are for class maps; bundle '{self.bundle.path}' is for {self.bundle.task}"
            )
        shorter = min(self._window)
        if slide is True:
            return shorter * 2 // 3
        if not _is_number(slide, 1, shorter, numbers.Integral):
            raise InputError(f"windows slide by 1 to {shorter} pixels, not {slide!r}")
        return slide

    def _in_windows(self, picture: Picture, step: int) -> Result:
        began = perf_counter()
        size = covering(picture.size, self._window)
        windows = windows_of(size, self._window, step)
        pixels = resized(picture.pixels, size)
        timings, outputs = Timings(pre=1000 * (perf_counter() - began)), []
        for group in _groups(windows, self.bundle.input.batch.max):
            arrays, _, _, took = self._outputs([window.of(pixels) for window in group])
            outputs += [{name: array[i] for name, array in arrays.items()} for i in range(len(group))]
            timings += took
        began = perf_counter()
        result = self._task.average(self.bundle, picture.size, size, windows, outputs)
        timings += Timings(post=1000 * (perf_counter() - began))
        return replace(result, timings=timings, depth=picture.depth)

    def _as_wholes(self, images: Iterable[ImageLike | Picture], threshold: float) -> list[Result]:
        results: list[Result] = []
        size = 1 if self.bundle.task == "raw" else self.bundle.input.batch.max
        for group in _groups(images, size):
            results.extend(self._group(group, threshold))
        return results

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The graph itself: arrays by the names of its inputs, to arrays by the names of its outputs.

        Raises:
            BackendError: a name, dtype or shape that the graph does not take.
        """
        return self._backend.run({name: np.asarray(array) for name, array in arrays.items()})

    def _group(self, images: Sequence[ImageLike | Picture], threshold: float) -> Iterator[Result]:
        pictures = [self._picture(image) for image in images]
        outputs, placements, padded, took = self._outputs(
            [picture.pixels for picture in pictures], [picture.size for picture in pictures]
        )
        for index, (image, placement) in enumerate(zip(images, placements, strict=True)):
            before = perf_counter()
            result = self._task.decode(self.bundle, outputs, index, placement, padded, threshold)
            after = perf_counter()
            timings = Timings(took.pre / len(images), took.model / len(images), (after - before) * 1000)
            yield replace(result, path=_path(image), timings=timings, depth=pictures[index].depth)

    def _outputs(
        self, pixels: Sequence[np.ndarray], sizes: Sequence[Size] | None = None
    ) -> tuple[dict[str, np.ndarray], list[Placement], Size, Timings]:
        """A batch run: its outputs, where its images lie in the input, that one's size, and the time it took.

        `sizes` are those of the images that the pixels are of, where they were reduced.
        """
        began = perf_counter()
        batch, placements = self._preprocess(pixels, sizes)
        prepared = perf_counter()
        outputs = self.run({self.bundle.input.name: self._padded(batch)})
        took = Timings(pre=1000 * (prepared - began), model=1000 * (perf_counter() - prepared))
        return outputs, placements, (batch.shape[2], batch.shape[3]), took

    def _picture(self, image: ImageLike | Picture) -> Picture:
        """An image, read if it is not yet; what was decided about it is a warning then."""
        if isinstance(image, Picture):
            return image
        picture = self.read(image)
        for note in picture.notes:
            warnings.warn(note.text, ImageWarning, stacklevel=5)
        return picture

    def _padded(self, batch: np.ndarray) -> np.ndarray:
        """The batch, filled up with zeros to the least that the graph takes."""
        lacking = self.bundle.input.batch.min - len(batch)
        if lacking <= 0:
            return batch
        return np.concatenate([batch, np.zeros((lacking, *batch.shape[1:]), np.float32)])

    def close(self) -> None:
        """Free the model."""
        self._backend.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _groups(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Items in groups of at most `size`, in order."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def _path(image: ImageLike | Picture) -> str | None:
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else None


def _chosen_tile(side: int | None, overlap: int | None, own: int | None) -> tuple[int | None, int]:
    """The side of the tiles (None: no tiles) and their overlap; `own` is the bundle's. Raises InputError."""
    if side is None:
        side = own
    elif not any(_is_number(side, *range_, numbers.Integral) for range_ in ((0, 0), (LEAST_TILE, MOST_TILE))):
        raise InputError(
            f"the tile size must be a whole number from {LEAST_TILE} to {MOST_TILE}, or 0 for none, "
            f"not {side!r}"
        )
    if not side:
        if overlap is not None:
            raise InputError("a tile overlap needs a tile size; give that too")
        return None, 0
    overlap = side // 4 if overlap is None else overlap
    if not _is_number(overlap, 0, side - 1, numbers.Integral):
        raise InputError(f"the tile overlap must be a whole number from 0 to {side - 1}, not {overlap!r}")
    return side, overlap


def _is_number(value: object, low: int, high: int, kind: type = numbers.Real) -> bool:
    """Whether it is a number of this kind in the range; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]
