"""Many images and videos through a predictor: the next are read while one is computed, few held at a time.

Knows the order of things; must not know what becomes of the results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from time import perf_counter

import numpy as np

from meta_deploy.errors import ImageError, InputError
from meta_deploy.imaging.depth import Note
from meta_deploy.imaging.images import Picture, load, read_image
from meta_deploy.imaging.sources import Source
from meta_deploy.imaging.video import Video
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.tasks.raw import Arrays, read_arrays
from meta_deploy.tasks.results import Result, Timings

READERS = 2


@dataclass(frozen=True)
class Frame:
    """An image, one frame of a video, or a file of arrays.

    It is read (`picture` or `arrays`) or failed (`error`). `index` counts a video's frames from 0, those that
    cannot be read too, and is None for an image; a frame is shown `time` seconds after the first, for
    `duration` seconds where the video says so. `result` is there once predicted.
    """

    source: Source
    index: int | None = None
    picture: Picture | None = None
    arrays: Mapping[str, np.ndarray] | None = None
    error: InputError | None = None
    result: Result | None = None
    fps: float | None = None
    time: Fraction | None = None
    duration: Fraction | None = None

    @property
    def image(self) -> np.ndarray | None:
        """RGB uint8 (H, W, 3); read again where the picture is a reduced one."""
        if self.picture is None:
            return None
        if not self.picture.reduced:
            return self.picture.pixels
        return read_image(self.source.path, self.picture.depth)

    @property
    def notes(self) -> tuple[Note, ...]:
        """What was decided that the file leaves open."""
        return self.picture.notes if self.picture else ()


def predict(predictor: Predictor, sources: Iterable[Source], batch: int = 1) -> Iterator[Frame]:
    """Every image, video frame and file of arrays of `sources`, in order, with its result or its error.

    `batch` of them go through the model at a time. What cannot be read raises nothing: it comes out with
    its error, and the others are done.
    """
    group: list[Frame] = []
    for frame in read_ahead(sources, depth=batch + READERS, read=predictor.read):
        group.append(frame)
        if sum(frame.error is None for frame in group) == batch:
            yield from _predict_group(predictor, group)
            group = []
    yield from _predict_group(predictor, group)


def _predict_group(predictor: Predictor, group: list[Frame]) -> Iterator[Frame]:
    results = iter(predictor.batch([frame.picture for frame in group if frame.picture is not None]))
    for frame in group:
        if frame.picture is not None:
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


def read_ahead(
    sources: Iterable[Source], depth: int, read: Callable[[Path], Picture] = load
) -> Iterator[Frame]:
    """The images, frames and arrays of `sources` in order, up to `depth` read before they are asked for.

    `read` reads images.
    """
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
    pending: deque[tuple[Source, Future]] = deque()
    try:
        for source in sources:
            if not source.video:
                task = read_arrays if source.arrays else read
                pending.append((source, pool.submit(task, source.path)))  # type: ignore[arg-type]
            while pending and (source.video or len(pending) > depth):
                yield _frame(*pending.popleft())
            if source.video:
                yield from _video_frames(source)
        while pending:
            yield _frame(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _frame(source: Source, content: Future) -> Frame:
    try:
        return Frame(source, **{"arrays" if source.arrays else "picture": content.result()})
    except InputError as error:
        return Frame(source, error=error)


def _video_frames(source: Source) -> Iterator[Frame]:
    """A video's frames; one is decoded ahead."""
    index = None
    try:
        # The thread that decodes ends before the video closes under it, wherever an interrupt comes.
        with Video(source.path) as video, ThreadPoolExecutor(1, thread_name_prefix="decode") as decoder:
            frames = iter(video)
            notes = (Note("video", "HDR", video.warning),) if video.warning else ()
            ahead = decoder.submit(next, frames, None)
            while (frame := ahead.result()) is not None:
                ahead = decoder.submit(next, frames, None)
                index, size = frame.index, (frame.image.shape[0], frame.image.shape[1])
                picture = Picture(frame.image, size, notes)
                yield Frame(source, index, picture, fps=video.fps, time=frame.time, duration=frame.duration)
    except ImageError as error:
        yield Frame(source, index, error=error)
