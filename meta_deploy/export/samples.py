"""Inputs to measure a graph on and to compare it on: images, .npz files, or random numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from meta_deploy.bundle.manifest import InputSpec, Preprocess
from meta_deploy.bundle.shipped import ASSETS
from meta_deploy.errors import InputError
from meta_deploy.imaging.images import read_image
from meta_deploy.imaging.preprocess import Placement, Preprocessor
from meta_deploy.imaging.sources import expand

MOST = 8  # images or .npz files that an export compares on
MOST_CALIBRATION = 512  # that ranges are measured on
_P = TypeVar("_P")  # a path
Feed = dict[str, np.ndarray]


class Samples:
    """Inputs by name, one dictionary a run. May be iterated several times; `noun` is what they are called."""

    noun = "inputs"

    def __init__(self, feeds: Sequence[Mapping[str, np.ndarray]] = ()) -> None:
        self._feeds = feeds

    def __len__(self) -> int:
        return len(self._feeds)

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        yield from self._feeds

    def runs(self) -> int:
        """How many dictionaries there are."""
        return len(self)

    def done(self, runs: int) -> int:
        """How many of these were met in the first `runs` runs."""
        return min(runs, len(self))

    def digests(self) -> list[str]:
        """A sha256 for each of these: what is equal has the same one."""
        return [_digest(feed) for feed in self]

    def settings(self) -> str:
        """What beside them decides the runs' inputs."""
        return ""


class ArraySamples(Samples):
    """.npz files, each read when its turn comes."""

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], Feed]) -> None:
        self._paths, self._read = paths, read

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Feed]:
        yield from map(self._read, self._paths)


class ImageSamples(Samples):
    """Image files, preprocessed. Of a dynamic batch, the largest and the smallest are met."""

    noun = "images"

    def __init__(self, paths: Sequence[Path], spec: InputSpec, preprocess: Preprocess) -> None:
        self._paths, self._spec, self._preprocess = paths, spec, preprocess
        self._name = spec.name
        self._preprocessor = Preprocessor(spec, preprocess)
        self._groups = list(_groups(len(paths), spec))

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Feed]:
        for feed, _ in self.placed():
            yield feed

    def names(self) -> list[str]:
        """The files' paths."""
        return [str(path) for path in self._paths]

    def placed(self) -> Iterator[tuple[Feed, list[tuple[Path, Placement]]]]:
        """Each run with its images: their files, and where they lie in the input."""
        for group in self._groups:
            batch, placements = self._preprocessor([read_image(self._paths[i]) for i in group])
            paths = [self._paths[i] for i in group]
            yield {self._name: batch}, list(zip(paths, placements, strict=True))

    def runs(self) -> int:
        return len(self._groups)

    def done(self, runs: int) -> int:
        return min(sum(map(len, self._groups[:runs])), len(self))

    def digests(self) -> list[str]:
        """Of the files, so that none has to be decoded."""
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in self._paths]

    def settings(self) -> str:
        return json.dumps(msgspec.to_builtins((self._spec, self._preprocess)), sort_keys=True)


def _digest(feed: Mapping[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name in sorted(feed):
        sha.update(f"{name} {feed[name].dtype} {feed[name].shape}".encode())
        sha.update(np.ascontiguousarray(feed[name]).data)
    return sha.hexdigest()


def _groups(count: int, spec: InputSpec) -> Iterator[list[int]]:
    """Every image at least once: a batch of the largest size, one of the smallest, then the usual ones."""
    sizes = [spec.batch.max, spec.batch.min] if not spec.static_batch else []
    start = 0
    while start < count or sizes:
        size = sizes.pop(0) if sizes else spec.batch.opt
        # A short last batch is filled up from the start: a static graph takes no other size.
        yield [i % count for i in range(start, start + size)]
        start += size


def find_files(folder: str | Path | None, most: int = MOST) -> list[Path]:
    """At most so many images or .npz files of a folder, spread over it; without one the package's own images.

    Raises:
        InputError: the folder is missing, or has neither.
        ImageError: one of these images cannot be read.
    """
    if folder is None:
        paths = sorted((ASSETS / "images").glob("*.png"))
    elif not Path(folder).is_dir():
        raise InputError(f"'{folder}' is not a folder; give --calib-images a folder of images")
    else:
        paths = sorted(Path(folder).glob("*.npz")) or [source.path for source in expand([str(folder)])]
    chosen = evenly(paths, most)
    for path in chosen:
        if path.suffix != ".npz":
            read_image(path)  # a broken one is told before the long work, not after it
    return chosen


def evenly(paths: Sequence[_P], most: int = MOST) -> list[_P]:
    """At most so many of these, evenly from all."""
    step = max(1, len(paths) / most)
    return [paths[int(i * step)] for i in range(min(len(paths), most))]
