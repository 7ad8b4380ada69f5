"""Many images and videos through a predictor: the next are read while one is computed, few held at a time.

Knows the order of things; must not know what becomes of the results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from meta_deploy.errors import ImageError, InputError
from meta_deploy.imaging.images import Source, Video, read_image
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.tasks.raw import Arrays, read_arrays
from meta_deploy.tasks.results import Result, Timings

READERS = 2


@dataclass(frozen=True)
class Frame:
    """An image, one frame of a video, or a file of arrays.

    It is read (`image`, RGB uint8 (H, W, 3), or `arrays`) or failed (`error`).
    `index` counts a video's frames from 0 and is None for an image; `result` is there once predicted.
    """

    source: Source
    index: int | None = None
    image: np.ndarray | None = None
    arrays: Mapping[str, np.ndarray] | None = None
    error: InputError | None = None
    result: Result | None = None
    fps: float | None = None


def predict(predictor: Predictor, sources: Iterable[Source], batch: int = 1) -> Iterator[Frame]:
    """Every image, video frame and file of arrays of `sources`, in order, with its result or its error.

    `batch` of them go through the model at a time. What cannot be read raises nothing: it comes out with
    its error, and the others are done.
    """
    group: list[Frame] = []
    for frame in read_ahead(sources, depth=batch + READERS):
        group.append(frame)
        if sum(frame.error is None for frame in group) == batch:
            yield from _predict_group(predictor, group)
            group = []
    yield from _predict_group(predictor, group)


def _predict_group(predictor: Predictor, group: list[Frame]) -> Iterator[Frame]:
    results = iter(predictor.batch([frame.image for frame in group if frame.image is not None]))
    for frame in group:
        if frame.image is not None:
            yield replace(frame, result=replace(next(results), path=str(frame.source.path)))
        elif frame.arrays is not None:
            yield _predict_arrays(predictor, frame, frame.arrays)
        else:
            yield frame


def _predict_arrays(predictor: Predictor, frame: Frame, arrays: Mapping[str, np.ndarray]) -> Frame:
    started = perf_counter()
    try:
        outputs = predictor.run(arrays)
    except InputError as error:
        return replace(frame, error=InputError(f"'{frame.source.path}': {error}"))
    timings = Timings(model=1000 * (perf_counter() - started))
    return replace(frame, result=Arrays(outputs, path=str(frame.source.path), timings=timings))


def read_ahead(sources: Iterable[Source], depth: int) -> Iterator[Frame]:
    """The images, frames and arrays of `sources` in order, up to `depth` read before they are asked for."""
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
    pending: deque[tuple[Source, Future]] = deque()
    try:
        for source in sources:
            if not source.video:
                read = read_arrays if source.arrays else read_image
                pending.append((source, pool.submit(read, source.path)))  # type: ignore[arg-type]
            while pending and (source.video or len(pending) > depth):
                yield _frame(*pending.popleft())
            if source.video:
                yield from _video_frames(source, pool)
        while pending:
            yield _frame(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _frame(source: Source, content: Future) -> Frame:
    try:
        return Frame(source, **{"arrays" if source.arrays else "image": content.result()})
    except InputError as error:
        return Frame(source, error=error)


def _video_frames(source: Source, pool: ThreadPoolExecutor) -> Iterator[Frame]:
    """A video's frames; one is decoded ahead."""
    try:
        with Video(source.path) as video:
            frames = iter(video)
            index = 0
            ahead = pool.submit(next, frames, None)
            try:
                while (image := ahead.result()) is not None:
                    ahead = pool.submit(next, frames, None)
                    yield Frame(source, index, image, fps=video.fps)
                    index += 1
            finally:
                wait([ahead])  # before the video closes under it
    except ImageError as error:
        yield Frame(source, error=error)
