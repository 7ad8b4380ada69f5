"""What meta-infer leaves behind: overlays, COCO results, the printed lines and the JSON document.

Knows files and streams; must not know how a result is computed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from meta_deploy.bundle.claims import Claims
from meta_deploy.bundle.files import atomic_write, reason, scratch_folder
from meta_deploy.cli.terminal import say, tell
from meta_deploy.errors import InputError
from meta_deploy.imaging.depth import Note
from meta_deploy.imaging.sources import Source
from meta_deploy.imaging.video import VideoWriter
from meta_deploy.runtime import document
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.runtime.stream import Frame
from meta_deploy.tasks.detection import Detections
from meta_deploy.tasks.raw import Arrays
from meta_deploy.tasks.results import ImageResult, Result

MAX_NAME = 255  # bytes of a file's name, on every file system in use


@contextlib.contextmanager
def folder_for(path: str | None) -> Iterator[Path | None]:
    """A folder that can be written to, made if need be; what was made and stayed empty is removed again.

    Raises:
        InputError: it is a file, or cannot be made or written to.
    """
    if path is None:
        yield None
        return
    folder = Path(path)
    missing: list[Path] = []
    try:
        try:
            missing = [p for p in (folder, *folder.parents) if not p.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with scratch_folder(folder):
                pass
        except FileExistsError as error:
            raise InputError(f"--out '{path}' is a file; name a folder") from error
        except OSError as error:
            there = next(p for p in (folder, *folder.parents) if os.path.exists(p))
            raise InputError(f"cannot write to --out '{path}': {reason(error, there)}") from error
        yield folder
    finally:
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()


class Overlays:
    """Writes the overlay of every frame, or its arrays, in the background. A context manager."""

    MOST_WAITING = 4

    def __init__(
        self,
        folder: Path | None,
        sources: Sequence[Source],
        claims: Claims,
        raw: bool = False,
        older: Sequence[str | None] = (),
    ):
        """`claims`: what must not be written over; `raw`: the results are arrays.

        `older`: files that are written anew when all is done. What an earlier run left there is removed
        before the first overlay, to which it does not belong: an interrupted run does not come so far.
        """
        self._folder = folder
        self._older = [path for path in older if path is not None]
        self._names = overlay_names(folder, sources, claims, raw) if folder else {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._waiting: deque[Future] = deque()
        self._video: VideoFile | None = None

    def add(self, frame: Frame, shown: Result) -> Path | None:
        """Write one frame's, soon; returns where. Raises what went wrong with an earlier one."""
        if self._folder is None:
            return None
        target = self._names[frame.source]
        if self._video is not None and self._video.target != target:
            self._end_video(None)
        if isinstance(shown, Arrays):
            self._submit(shown.save, target)
        elif frame.index is None:
            self._remove_older()
            self._submit(_draw_image, target, frame, shown)
        else:
            if self._video is None:
                self._video = VideoFile(target, frame.fps or 25.0)
            self._submit(_draw_frame, self._video, frame, shown)
        return target

    def _submit(self, *task: Any) -> None:
        self._waiting.append(self._pool.submit(*task))
        while len(self._waiting) > self.MOST_WAITING:
            self._waiting.popleft().result()

    def _end_video(self, error: BaseException | None) -> None:
        while self._waiting and error is None:
            self._waiting.popleft().result()
        video, self._video = self._video, None
        if video is not None:
            if error is None:
                self._remove_older()
            video.close(error)

    def _remove_older(self) -> None:
        while self._older:
            with contextlib.suppress(OSError):
                os.unlink(os.path.realpath(self._older.pop()))

    def __enter__(self) -> Overlays:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._end_video(None)
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._pool.shutdown(cancel_futures=True)
            if error is not None:
                self._end_video(error)


def _draw_image(target: Path, frame: Frame, shown: ImageResult) -> None:
    assert frame.picture is not None
    shown.save(target, frame.picture.whole)


def _draw_frame(video: VideoFile, frame: Frame, shown: ImageResult) -> None:
    video.write(shown.draw(frame.image), frame.time or Fraction(0), frame.duration)


def overlay_names(
    folder: Path, sources: Sequence[Source], claims: Claims, raw: bool = False
) -> dict[Source, Path]:
    """A file in `folder` for each source's overlay or arrays, none of which is in use; they are then."""
    if raw:
        return _names(folder, sources, claims, "outputs", lambda source: ".npz")
    return _names(folder, sources, claims, "overlay", _overlay_suffix)


def _overlay_suffix(source: Source) -> str:
    if source.video:
        return ".mp4"
    return ".jpg" if source.path.suffix.lower() in (".jpg", ".jpeg") else ".png"


def _names(
    folder: Path, sources: Sequence[Source], claims: Claims, what: str, suffix_of: Callable[[Source], str]
) -> dict[Source, Path]:
    names: dict[Source, Path] = {}
    numbers: Counter[tuple[str, str]] = Counter()  # of the names tried so far
    for source in sources:
        suffix, stem = suffix_of(source), source.path.stem
        while True:
            numbers[stem, suffix] += 1
            number = numbers[stem, suffix]
            end = f"-{what}{'' if number == 1 else f'-{number}'}{suffix}"
            path = folder / f"{_fitting(stem, MAX_NAME - len(end))}{end}"
            if claims.user(path) is None:
                break
        claims.add(path, f"the {what} of another" if what != "overlay" else "an overlay")
        names[source] = path
    return names


def _fitting(stem: str, room: int) -> str:
    """The start of a file's stem that takes at most `room` bytes on disk, whole characters only."""
    while len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return stem


class VideoFile:
    """An MP4 written frame by frame, in place only when whole."""

    def __init__(self, target: Path, fps: float):
        self.target = target
        self._stack = contextlib.ExitStack()
        self._writer = VideoWriter(self._stack.enter_context(atomic_write(target)), fps)

    def write(self, image: np.ndarray, time: Fraction, duration: Fraction | None) -> None:
        """Append an RGB uint8 frame (H, W, 3), shown `time` seconds after the first."""
        with self._said():
            self._writer.write(image, time, duration)

    def close(self, error: BaseException | None = None) -> None:
        """Put the file in its place, or with an `error` remove it."""
        if error is not None:
            with contextlib.suppress(Exception):
                self._writer.close()
            self._stack.__exit__(type(error), error, error.__traceback__)
            return
        with self._stack, self._said():
            self._writer.close()

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = reason(error, self.target.parent)
            raise InputError(f"cannot write the video '{self.target}': {why}") from error


class CocoFile:
    """COCO results, streamed to a file that appears when whole. A context manager; None writes nothing."""

    def __init__(self, path: str | None, sources: Sequence[Source]):
        self._stack = contextlib.ExitStack()
        self._stream: BinaryIO | None = None
        if path is not None:
            self._stream = self._stack.enter_context(atomic_write(path))
            self._stream.write(b"[")
        self._place = {source: place for place, source in enumerate(sources, 1)}
        stems = [source.path.stem for source in sources]
        plain = not any(source.video for source in sources) and all(
            s.isascii() and s.isdigit() for s in stems
        )
        self._by_name = plain and len({int(stem) for stem in stems}) == len(stems)
        self._frames = 0
        self._first = True

    def add(self, frame: Frame) -> None:
        """Write one frame's records, each with the file's name besides COCO's fields."""
        if self._stream is None or not isinstance(frame.result, ImageResult):
            return
        for record in frame.result.to_coco(self._image_id(frame)):
            record["file_name"] = frame.source.path.name
            if frame.index is not None:
                record["frame"] = frame.index
            self._stream.write(b"\n" if self._first else b",\n")
            self._stream.write(json.dumps(record).encode())
            self._first = False

    def _image_id(self, frame: Frame) -> int:
        if self._by_name:
            return int(frame.source.path.stem)
        if frame.index:  # a video's frames after its first push the following numbers up
            self._frames += 1
        return self._place[frame.source] + self._frames

    def __enter__(self) -> CocoFile:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._stream is not None and exc[0] is None:
            self._stream.write(b"\n]\n")
        self._stack.__exit__(*exc)


class TableFile:
    """A CSV file with one row per object or class of every image. A context manager; None writes nothing."""

    def __init__(self, path: str | None):
        self._stack = contextlib.ExitStack()
        self._stream = None if path is None else self._stack.enter_context(atomic_write(path))
        self._columns: list[str] = []
        self.count = 0  # of rows

    def begin(self, columns: Sequence[str], label_images: bool) -> None:
        """Write the header: what tells the image, and the `columns` of its rows."""
        self._columns = ["file", "frame", *(["label_image"] if label_images else []), *columns]
        self._write(lambda writer: writer.writeheader())

    def add(self, frame: Frame, shown: Result, label_image: Path | None = None) -> None:
        """Write one frame's rows, with its file's name, its number in a video, and its label image."""
        if self._stream is None or not isinstance(shown, ImageResult):
            return
        assert frame.picture is not None
        where = {"file": str(frame.source.path), "frame": "" if frame.index is None else frame.index}
        if label_image is not None:
            where["label_image"] = str(label_image)
        rows = shown.table(frame.picture.whole)
        self._write(lambda writer: writer.writerows(where | row for row in rows))
        self.count += len(rows)

    def _write(self, fill: Callable[[csv.DictWriter], object]) -> None:
        if self._stream is not None:
            text = io.StringIO(newline="")
            fill(csv.DictWriter(text, self._columns))
            self._stream.write(text.getvalue().encode(errors="backslashreplace"))

    def __enter__(self) -> TableFile:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)


class LabelImages:
    """A 16-bit image of the objects' numbers, or of the classes, of every image; None writes nothing."""

    def __init__(self, folder: Path | None, sources: Sequence[Source], claims: Claims, form: str = "png"):
        self._names = _names(folder, sources, claims, "labels", lambda source: f".{form}") if folder else {}

    def add(self, frame: Frame, shown: Result) -> Path | None:
        """Write one frame's; returns where."""
        if not self._names or not isinstance(shown, ImageResult):
            return None
        target = self._names[frame.source]
        shown.save_labels(target)
        return target


class Report:
    """The lines for people, or the document for programs; a progress bar beside either."""

    def __init__(self, sources: Sequence[Source], as_json: bool, intro: str | None = None):
        """`intro` is a line for standard error, before the first result."""
        self.failed = 0
        self._covered = 0
        self._intro = intro
        self._json = as_json
        self._entries: list[str] = []
        self._errors: list[dict[str, str]] = []
        self._times: dict[str, list[float]] = {"pre": [], "model": [], "post": []}
        self._several = len(sources) > 1
        self._total = None if any(source.video for source in sources) else len(sources)
        many = self._several or self._total is None
        self._bar = tqdm(total=self._total, unit="image", disable=None if many else True, leave=False)
        self._video: _VideoLine | None = None
        self._notes = _Notes()

    def add(
        self,
        frame: Frame,
        shown: Result,
        overlay: Path | None,
        labels: Path | None = None,
        found: Result | None = None,
    ) -> None:
        """Take one result in, where its files are, and what it was before what others cover was left out."""
        if self._intro is not None:
            tell(self._intro)
            self._intro = None
        for name, values in self._times.items():
            values.append(getattr(shown.timings, name))
        self._end_video(frame.source)
        self._notes.add(frame.notes)
        if isinstance(found, Detections) and isinstance(shown, Detections):
            self._covered += len(found) - len(shown)
        if self._json:
            fields = shown.to_dict()
            if frame.index is not None:
                fields["frame"] = frame.index
                fields["time"] = round(float(frame.time or 0), 6)
            entry = document.entry(fields, str(overlay) if overlay else None)
            if labels is not None:
                entry["labels"] = str(labels)
            self._entries.append(json.dumps(entry))
        elif frame.index is None:
            files = "".join(f"; {name}" for name in _unlike(frame.source, overlay, labels))
            say(f"{_title(frame.source, shown)}: {shown!r}; {shown.timings.total:.1f} ms{files}")
        else:
            if self._video is None:
                self._video = _VideoLine(frame.source)
            self._video.add(shown)
        self._bar.update()

    def fail(self, frame: Frame) -> None:
        """Say on standard error what could not be read."""
        self.failed += 1
        self._errors.append({"path": str(frame.source.path), "error": str(frame.error)})
        skipped = "; skipped" if self._several and frame.index is None else ""
        tell(f"meta-infer: {frame.error}{skipped}")
        self._bar.update()

    def finish(self, predictor: Predictor, threshold: float, files: Sequence[str]) -> None:
        """The last line, or the document. `files` says in words what was written."""
        done = len(self._times["model"])
        if self._json:
            head = document.head(predictor.bundle, predictor.backend, threshold)
            text = json.dumps(head)[:-1] + ', "images": [' + ",\n".join(self._entries)
            print(text + f'], "errors": {json.dumps(self._errors)}}}')
        if done:
            times = ", ".join(f"{name} {median(values):.1f}" for name, values in self._times.items())
            say("; ".join([*files, f"median ms: {times}"]), sys.stderr if self._json else sys.stdout)
        self._notes.finish()
        if self._covered:
            noun = "detection" if self._covered == 1 else "detections"
            tell(f"meta-infer: left out {self._covered} {noun} that better ones cover by more than half")
        if self.failed and self._several:
            tell(f"meta-infer: {self.failed} could not be read, {done} done")

    def _end_video(self, current: Source | None) -> None:
        if self._video is not None and self._video.source != current:
            say(self._video.text())
            self._video = None

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
        if exc[0] is None:
            self._end_video(None)


class _Notes:
    """Says once of each kind and value what was decided of a picture, and at the end of how many."""

    def __init__(self) -> None:
        self._said: dict[str, Counter[str]] = {}

    def add(self, notes: Sequence[Note]) -> None:
        for note in notes:
            counts = self._said.setdefault(note.kind, Counter())
            if note.value not in counts:
                tell(f"meta-infer: {note.text}")
            counts[note.value] += 1

    def finish(self) -> None:
        for kind, values in self._said.items():
            if kind == "depth" and len(values) > 1:
                told = ", ".join(f"{value} ({count})" for value, count in values.items())
                text = f"pictures were read at different bit depths: {told}; --depth sets one for all"
                tell(f"meta-infer: warning: {text}")


class _VideoLine:
    """Sums up a video's frames."""

    def __init__(self, source: Source):
        self.source = source
        self._frames = self._objects = 0
        self._ms = 0.0
        self._title = ""

    def add(self, shown: Result) -> None:
        self._title = self._title or _title(self.source, shown)
        self._frames += 1
        self._objects += len(shown) if isinstance(shown, Detections) else 0
        self._ms += shown.timings.total

    def text(self) -> str:
        objects = f", {self._objects} objects" if self._objects else ""
        return f"{self._title}: {self._frames} frames{objects}, {self._ms / self._frames:.1f} ms a frame"


def _unlike(source: Source, *paths: Path | None) -> list[str]:
    """The names of those files that do not tell which source they are of, since another has the same stem."""
    return [path.name for path in paths if path and path.stem.rpartition("-")[0] != source.path.stem]


def _title(source: Source, shown: Result) -> str:
    if isinstance(shown, ImageResult):
        return f"{source.path} {shown.size[1]}x{shown.size[0]}"
    return str(source.path)
