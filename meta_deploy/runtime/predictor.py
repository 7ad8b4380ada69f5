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
from meta_deploy.bundle.manifest import Size
from meta_deploy.bundle.shipped import locate
from meta_deploy.errors import InputError
from meta_deploy.imaging.depth import check_depth
from meta_deploy.imaging.given import given_image
from meta_deploy.imaging.images import ImageLike, ImageWarning, Picture
from meta_deploy.imaging.preprocess import Placement
from meta_deploy.runtime.processor import Processor, check_threshold, is_number
from meta_deploy.targets import open_backend
from meta_deploy.targets.target import Backend
from meta_deploy.tasks.results import Result, Timings
from meta_deploy.tasks.tiles import Tile

MAX_THREADS = 1024
_Item = TypeVar("_Item")


class Predictor(Processor):
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
        check_threshold(score_threshold)
        if threads is not None and not is_number(threads, 1, MAX_THREADS, numbers.Integral):
            raise InputError(f"threads must be a whole number from 1 to {MAX_THREADS}, not {threads!r}")
        check_depth(depth)
        if isinstance(backend, Backend):
            opened = bundle if isinstance(bundle, Bundle) else Bundle.open(locate(bundle))
            self._backend = backend
        elif isinstance(bundle, Bundle):
            opened, self._backend = bundle, open_backend(bundle, backend, threads)
        else:
            opened, self._backend = Bundle.use(
                locate(bundle), lambda found: (found, open_backend(found, backend, threads))
            )
        super().__init__(opened, score_threshold, depth, tile, tile_overlap, slide)

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

    def batch(self, images: Sequence[ImageLike | Picture]) -> list[Result]:
        """Several images, in groups as large as the bundle's batch takes; the results in the same order.

        A raw bundle gets them one by one, since which of its outputs belongs to which is not known.

        Raises:
            As for one image.
        """
        images = [image if isinstance(image, Picture) else given_image(image) for image in images]
        results: Iterator[Result]
        if self.slide is not None:
            results = (self._in_windows(self._picture(image)) for image in images)
        elif self.tile is not None:
            results = self._tiled(images)
        else:
            return self._as_wholes(images, self.score_threshold)
        return [replace(result, path=_path(image)) for image, result in zip(images, results, strict=True)]

    def outputs(
        self, pieces: Sequence[np.ndarray], sizes: Sequence[Size] | None = None, batch: int | None = None
    ) -> list[dict[str, np.ndarray]]:
        """The graph's outputs for each piece, by name, without the batch dimension (raw bundles: with it).

        `pieces` are RGB uint8 (h, w, 3), of images or parts of `sizes` (height, width) before they were
        resized; None: they were not. They are run `batch` at a time (None: as many as the bundle takes),
        only those together that have the same size in the input, so that none depends on its neighbours; by
        a raw bundle one by one.

        Raises:
            BackendError: the back end fails.
        """
        batch = 1 if self._whole_runs else batch or self.bundle.input.batch.max
        sizes = [(piece.shape[0], piece.shape[1]) for piece in pieces] if sizes is None else sizes
        padded = [self.input_size(size) for size in sizes]
        found: dict[int, dict[str, np.ndarray]] = {}
        for _, alike in groupby(sorted(range(len(pieces)), key=padded.__getitem__), padded.__getitem__):
            for group in _groups(alike, batch):
                arrays, *_ = self._outputs([pieces[i] for i in group], [sizes[i] for i in group])
                for place, i in enumerate(group):
                    found[i] = arrays if self._whole_runs else {n: a[place] for n, a in arrays.items()}
        return [found[i] for i in range(len(pieces))]

    def input_size(self, size: Size) -> Size:
        """The (height, width) of the input that an image, or piece of one, of this size is run in."""
        return self._preprocess.padded_size([self._preprocess.place(*size)])

    def _tiled(self, images: Sequence[ImageLike | Picture]) -> Iterator[Result]:
        """Images that one tile holds together, as wholes; the others each in its tiles."""
        pictures = ((picture, self._areas(picture.size)) for picture in map(self._picture, images))
        for whole, group in groupby(pictures, lambda pair: pair[1] is None):
            if whole:
                yield from self._as_wholes((picture for picture, _ in group), self.score_threshold)
            else:
                yield from (self._in_tiles(picture, tiles) for picture, tiles in group if tiles)

    def _in_tiles(self, picture: Picture, tiles: Sequence[Tile]) -> Result:
        results = self._as_wholes(self._cut(picture), self._joined_threshold)
        began = perf_counter()
        joined = self._joined(picture.size, tiles, results)
        took = Timings(post=1000 * (perf_counter() - began))
        timings = sum((result.timings for result in results), took)
        return replace(joined, timings=timings, depth=picture.depth)

    def _in_windows(self, picture: Picture) -> Result:
        began = perf_counter()
        windows = self._cut(picture)
        timings, outputs = Timings(pre=1000 * (perf_counter() - began)), []
        for group in _groups(windows, self.bundle.input.batch.max):
            arrays, _, _, took = self._outputs(group)
            outputs += [{name: array[i] for name, array in arrays.items()} for i in range(len(group))]
            timings += took
        began = perf_counter()
        result = self._averaged(picture.size, outputs)
        timings += Timings(post=1000 * (perf_counter() - began))
        return replace(result, timings=timings, depth=picture.depth)

    def _as_wholes(self, images: Iterable[ImageLike | Picture], threshold: float) -> list[Result]:
        results: list[Result] = []
        size = 1 if self._whole_runs else self.bundle.input.batch.max
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
