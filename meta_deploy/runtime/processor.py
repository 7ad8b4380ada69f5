"""What happens to an image before and after the model: read, cut into the pieces that it sees, put together.

Knows a bundle and how it is to be used; must not know what runs the model, or where.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import LEAST_TILE, MOST_TILE, Size
from meta_deploy.errors import InputError
from meta_deploy.imaging.depth import check_depth
from meta_deploy.imaging.images import ImageLike, Picture, load
from meta_deploy.imaging.preprocess import Placement, Preprocessor, covering, resized
from meta_deploy.tasks import get_task
from meta_deploy.tasks.results import Result, Timings
from meta_deploy.tasks.tiles import Tile, tiles_of, windows_of


@dataclass(frozen=True)
class Prepared:
    """An image on its way: its size, and its pieces or the outputs of each, with the time they took."""

    size: Size
    depth: int | None
    timings: Timings
    pieces: Sequence[np.ndarray] = ()
    outputs: Sequence[Mapping[str, np.ndarray]] = ()


class Processor:
    """All of a prediction but the model, by a bundle and the options of a `Predictor`.

    The three steps are those of a pipeline, whose parts may be in several processes:

    >>> picture = processor.read("photo.jpg")
    >>> outputs = predictor.outputs(processor.pieces(picture), processor.sizes(picture.size))
    >>> processor.result(picture.size, outputs)
    """

    def __init__(
        self,
        bundle: Bundle,
        score_threshold: float | None = None,
        depth: int | None = None,
        tile: int | None = None,
        tile_overlap: int | None = None,
        slide: bool | int = False,
    ):
        """The options are those of a `Predictor`.

        Raises:
            InputError: a threshold, depth, tile, overlap or step out of range, tiles for a bundle whose
                results cannot be joined, or windows for one that gives no class maps.
        """
        check_threshold(score_threshold)
        check_depth(depth)
        self.bundle = bundle
        self.depth = depth
        self.score_threshold = bundle.shown_score if score_threshold is None else score_threshold
        self._task = get_task(bundle.task)
        self.tile, self.tile_overlap = _chosen_tile(tile, tile_overlap, bundle.tile)
        if self.tile is not None and not self._task.joins:
            raise InputError(f"tiles are for objects and classes; bundle '{bundle.path}' gives plain arrays")
        if bundle.takes_images:
            self._preprocess = Preprocessor(bundle.input, bundle.preprocess)
        self.slide = self._step(slide)
        if self.slide is not None:
            if tile or tile_overlap is not None:
                raise InputError("an image is run in tiles or in sliding windows, not both; choose one")
            self.tile, self.tile_overlap = None, 0

    def read(self, image: ImageLike, name: str | None = None) -> Picture:
        """An image by `depth`; a very large one no larger than the model needs.

        `name` is what messages call an encoded file's bytes.

        Raises:
            ImageError: it cannot be read.
            InputError: the bundle takes arrays and says nothing of images.
        """
        _ = self.bundle.input  # an error where the bundle takes arrays only
        if self.slide is not None:
            return load(image, self.depth, lambda *size: covering(size, self._window), name)
        if self.tile is not None:
            return load(image, self.depth, name=name)
        return load(image, self.depth, lambda *size: self._preprocess.place(*size).resized, name)

    def pieces(self, picture: Picture) -> list[np.ndarray]:
        """What the model sees of an image: itself, its tiles or its windows, uint8 (h, w, 3).

        Each has the size that it has in the model's input.

        Raises:
            InputError: there would be too many.
        """
        places = self._places(picture.size)
        return [resized(pixels, p.resized) for pixels, p in zip(self._cut(picture), places, strict=True)]

    def prepare(self, picture: Picture) -> Prepared:
        """`pieces` with what `finish` needs beside their outputs. Raises as `pieces`."""
        began = perf_counter()
        pieces = [np.ascontiguousarray(piece) for piece in self.pieces(picture)]
        return Prepared(picture.size, picture.depth, Timings(pre=1000 * (perf_counter() - began)), pieces)

    def finish(self, image: Prepared, name: str | None = None) -> Result:
        """`result` of an image whose `outputs` are there, with times and `name`. Raises as `result`."""
        began = perf_counter()
        result = self.result(image.size, image.outputs)
        timings = image.timings + Timings(post=1000 * (perf_counter() - began))
        return replace(result, path=name, depth=image.depth, timings=timings)

    def sizes(self, size: Size) -> list[Size]:
        """(height, width) of each piece of an image of this size, before it was resized to the input's."""
        areas = self._areas(size)
        return [size] if areas is None else [(a.bottom - a.top, a.right - a.left) for a in areas]

    def result(self, size: Size, outputs: Sequence[Mapping[str, np.ndarray]]) -> Result:
        """The result of an image of this size, from the outputs of each of its pieces, by name.

        Raises:
            BackendError: values that are not finite.
            BundleError: more classes than the manifest names.
        """
        if self.slide is not None:
            return self._averaged(size, outputs)
        places, tiles = self._places(size), self._areas(size)
        results = [
            self._task.decode(
                self.bundle,
                own if self._whole_runs else {name: array[None] for name, array in own.items()},
                0,
                place,
                self._preprocess.padded_size([place]),
                self.score_threshold if tiles is None else self._joined_threshold,
            )
            for own, place in zip(outputs, places, strict=True)
        ]
        return results[0] if tiles is None else self._joined(size, tiles, results)

    def _places(self, size: Size) -> list[Placement]:
        """Where each piece of an image of this size lies in the model's input."""
        return [self._preprocess.place(*piece) for piece in self.sizes(size)]

    def _areas(self, size: Size) -> list[Tile] | None:
        """The tiles of an image of this size, or its windows once it is resized; None: it is one piece."""
        if self.slide is not None:
            return windows_of(covering(size, self._window), self._window, self.slide)
        if self.tile is None or max(size) <= self.tile:
            return None
        return tiles_of(size, self.tile, self.tile_overlap)

    def _cut(self, picture: Picture) -> list[np.ndarray]:
        """The pixels of each piece, views where they can be."""
        areas, pixels = self._areas(picture.size), picture.pixels
        if areas is None:
            return [pixels]
        if self.slide is not None:
            pixels = resized(pixels, covering(picture.size, self._window))
        return [area.of(pixels) for area in areas]

    @property
    def _whole_runs(self) -> bool:
        """Whether outputs are those of whole runs: of a raw bundle nobody knows which is of which image."""
        return self.bundle.task == "raw"

    @property
    def _joined_threshold(self) -> float:
        """The least score in a tile: what is joined must not hang on what is shown of it."""
        return min(self.score_threshold, self.bundle.score_threshold)

    def _joined(self, size: Size, tiles: Sequence[Tile], results: Sequence[Any]) -> Result:
        return self._task.join(size, tiles, results).filter(self.score_threshold)

    def _averaged(self, size: Size, outputs: Sequence[Mapping[str, np.ndarray]]) -> Result:
        windows, covered = self._areas(size), covering(size, self._window)
        assert windows is not None
        return self._task.average(self.bundle, size, covered, windows, outputs)

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
        if not is_number(slide, 1, shorter, numbers.Integral):
            raise InputError(f"windows slide by 1 to {shorter} pixels, not {slide!r}")
        return slide


def check_threshold(score: float | None) -> None:
    """Raise InputError unless it is a score, or None."""
    if score is not None and not is_number(score, 0, 1):
        raise InputError(f"score_threshold must be a number from 0 to 1, not {score!r}")


def _chosen_tile(side: int | None, overlap: int | None, own: int | None) -> tuple[int | None, int]:
    """The side of the tiles (None: no tiles) and their overlap; `own` is the bundle's. Raises InputError."""
    if side is None:
        side = own
    elif not any(is_number(side, *range_, numbers.Integral) for range_ in ((0, 0), (LEAST_TILE, MOST_TILE))):
        raise InputError(
            f"the tile size must be a whole number from {LEAST_TILE} to {MOST_TILE}, or 0 for none, "
            f"not {side!r}"
        )
    if not side:
        if overlap is not None:
            raise InputError("a tile overlap needs a tile size; give that too")
        return None, 0
    overlap = side // 4 if overlap is None else overlap
    if not is_number(overlap, 0, side - 1, numbers.Integral):
        raise InputError(f"the tile overlap must be a whole number from 0 to {side - 1}, not {overlap!r}")
    return side, overlap


def is_number(value: object, low: int, high: int, kind: type = numbers.Real) -> bool:
    """Whether it is a number of this kind in the range; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]
