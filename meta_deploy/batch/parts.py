"""The results of many images in parts, each of so many images in their order, and the list of finished ones.

Knows files and rows; must not know where rows come from, nor what is in them.

A part is written whole before the list names it, so that a run that was stopped, wherever, goes on with the
parts that the list lacks. Rows may come in any order, and more than once: the first is taken.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from meta_deploy.bundle.files import atomic_path, reason, scratch_folder, sync_folder
from meta_deploy.errors import InputError

MANIFEST = "manifest.jsonl"
SCHEMA = 1
Row = TypeVar("Row")


@dataclass(frozen=True)
class Part:
    """A finished part: its number, file, size on disk, images, and those that failed as (name, reason)."""

    part: int
    file: str
    bytes: int
    images: int
    failed: tuple[tuple[str, str], ...] = ()


class Parts(Generic[Row]):
    """The parts of a run in its folder. A context manager; only one process at a time has a folder's.

    Attributes:
        resumed: the images that were done before.
    """

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, Any],
        images: int,
        size: int,
        suffix: str,
        write: Callable[[Path, Sequence[Row]], None],
        failure: Callable[[Row], tuple[str, str] | None],
    ):
        """A new run, or one to go on with.

        Args:
            folder: which is there.
            run: what the results hang on, for JSON; a run goes on only with what it began with.
            images: how many there are.
            size: of a part in images. A run that goes on keeps its own.
            suffix: of the parts' files.
            write: writes the rows of a part to a path.
            failure: the name of a row's image and why it failed; None: it did not.

        Raises:
            InputError: another run's parts are there, or another process writes them.
        """
        self.folder, self._suffix, self._write, self._failure = folder, suffix, write, failure
        self._stack = contextlib.ExitStack()
        try:
            self._stack.enter_context(scratch_folder(folder, owner=MANIFEST))
        except BlockingIOError as error:
            raise InputError(
                f"another process writes results to '{folder}'; wait for it, or name another folder"
            ) from error
        try:
            self._open({"schema": SCHEMA, **run, "images": images}, size)
        except BaseException:
            self._stack.close()
            raise
        self._pending: dict[int, dict[int, Row]] = {}

    def _open(self, run: dict[str, Any], size: int) -> None:
        path = self.folder / MANIFEST
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a line that was being written is none
        try:
            head, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
            found = [Part(**{**line, "failed": tuple(map(tuple, line["failed"]))}) for line in lines]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"'{path}' is damaged ({error}); name another folder") from error
        if head is None and content:
            whole = b""
        if head is not None:
            begun = {key: value for key, value in head.items() if key != "part_size"}
            if other := [key for key in run if begun.get(key) != run[key]]:
                raise InputError(
                    f"'{self.folder}' holds results of another run ({_told(other[0], begun, run)}); "
                    "name another folder"
                )
            size = head["part_size"]
        self.images, self.size = run["images"], size
        self.done = {part.part: part for part in found if self._is_there(part)}
        self.resumed = sum(part.images for part in self.done.values())
        self._manifest = self._stack.enter_context(path.open("r+b" if path.exists() else "x+b"))
        self._manifest.truncate(len(whole))
        self._manifest.seek(len(whole))
        if head is None:
            self._append({**run, "part_size": size})
            sync_folder(self.folder)

    def _is_there(self, part: Part) -> bool:
        with contextlib.suppress(OSError):
            return (self.folder / part.file).stat().st_size == part.bytes
        return False

    def todo(self) -> list[range]:
        """The places of the images that are not done, from 0, in order; ranges that meet are one."""
        ranges: list[range] = []
        for part in range(-(-self.images // self.size)):
            if part in self.done:
                continue
            own = self._range(part)
            if ranges and ranges[-1].stop == own.start:
                own = range(ranges.pop().start, own.stop)
            ranges.append(own)
        return ranges

    def missing(self) -> list[int]:
        """The places of the images for which no row has come."""
        return [i for span in self.todo() for i in span if i not in self._pending.get(i // self.size, ())]

    def add(self, place: int, row: Row) -> Part | None:
        """Take the row of an image; the part that it completes, which is then written.

        Raises:
            InputError: it cannot be written.
        """
        number = place // self.size
        if number in self.done:
            return None
        rows = self._pending.setdefault(number, {})
        rows.setdefault(place, row)
        if len(rows) < len(self._range(number)):
            return None
        part = self._finished(number, [rows[i] for i in self._range(number)])
        del self._pending[number]
        return part

    def _finished(self, number: int, rows: Sequence[Row]) -> Part:
        name = f"part-{number:06d}{self._suffix}"
        with atomic_path(self.folder / name) as temp:
            self._write(temp, rows)
            size = temp.stat().st_size
        failed = tuple(failure for failure in map(self._failure, rows) if failure is not None)
        part = Part(number, name, size, len(rows), failed)
        sync_folder(self.folder)  # before the list names it
        self._append(vars(part))
        self.done[number] = part
        return part

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            self._manifest.write(json.dumps(line).encode() + b"\n")
            self._manifest.flush()
            os.fsync(self._manifest.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write '{self.folder / MANIFEST}': {reason(error, self.folder)}"
            ) from error

    def _range(self, part: int) -> range:
        return range(part * self.size, min((part + 1) * self.size, self.images))

    def __iter__(self) -> Iterator[Part]:
        """The finished parts, in order."""
        return (self.done[number] for number in sorted(self.done))

    def __enter__(self) -> Parts[Row]:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def _told(key: str, begun: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """What differs, in words: short values by themselves, long ones by their name."""
    name, old, new = key.replace("_", " "), begun.get(key), run[key]
    if isinstance(new, str) and len(new) > 40:
        return f"its {name} are others" if name.endswith("s") else f"its {name} is another"
    return f"its {name}: {old}, now: {new}"
