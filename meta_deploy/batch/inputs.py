"""What a run is over: images by path or URI, of folders, patterns and lists, and those inside Parquet files.

Knows names and where they lead; reads no image, and must not know Ray.
"""

from __future__ import annotations

import bisect
import fnmatch
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from meta_deploy.batch import remote
from meta_deploy.batch.rows import is_bytes, is_text
from meta_deploy.errors import InputError
from meta_deploy.imaging.sources import ARRAY_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES, expand

LISTS, TABLES = (".txt",), (".parquet", ".pq")
_NAMES = ("path", "uri", "url", "file", "file_name", "filename", "name", "image", "key", "__key__")


@dataclass(frozen=True)
class Group:
    """Images in a row group of a Parquet file; `first` is the place of its first one among all."""

    first: int
    file: str
    group: int
    column: str  # which holds the bytes, or structs with them


@dataclass
class Inputs:
    """The images of a run, each once, in order.

    Attributes:
        names: what results and errors call each: the path or URI; for one of a Parquet file, what its row
            says, else FILE#ROW.
        places: of those that are files, where: an absolute path or a URI; None for those in tables.
        groups: of those in tables, in order.
    """

    names: list[str] = field(default_factory=list)
    places: list[str | None] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """A sha256 of what the images are called, and where they are."""
        digest = hashlib.sha256()
        for text in (*self.names, *self.places, *(f"{g.file}#{g.group}" for g in self.groups)):
            digest.update((text or "").encode(errors="surrogateescape") + b"\n")
        return digest.hexdigest()

    def image_ids(self) -> list[int]:
        """COCO's image ids: the numbers that the files are named by, if all are, else places from 1."""
        stems = [PurePosixPath(name).stem for name in self.names]
        if all(stem.isascii() and stem.isdigit() for stem in stems):
            numbers = [int(stem) for stem in stems]
            if len(set(numbers)) == len(numbers):
                return numbers
        return list(range(1, len(self) + 1))

    def files(self, spans: Sequence[range], rows: int) -> Iterator[tuple[list[int], list[str]]]:
        """Places and where the files are, of those in `spans` that are files, `rows` at a time."""
        for span in spans:
            for start in range(span.start, span.stop, rows):
                chosen = [i for i in range(start, min(start + rows, span.stop)) if self.places[i] is not None]
                if chosen:
                    yield chosen, [str(self.places[i]) for i in chosen]

    def tables(self, spans: Sequence[range]) -> Iterator[tuple[Group, list[int]]]:
        """Row groups, and the places of their images that are in `spans`."""
        if not self.groups:
            return
        firsts, chosen = [group.first for group in self.groups], dict[int, list[int]]()
        for i in (i for span in spans for i in span if self.places[i] is None):
            chosen.setdefault(bisect.bisect_right(firsts, i) - 1, []).append(i)
        yield from ((self.groups[number], own) for number, own in chosen.items())

    def add(self, name: str, place: str) -> None:
        """One more file, unless it is there already. Raises InputError: no file can be called so."""
        if "\0" in name:
            raise InputError(f"'{name}' has a NUL character, which no file's name has; correct it")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the name of '{name}' is not UTF-8, which tables need; rename the file"
            ) from error
        if place not in self._known:
            self._known.add(place)
            self.names.append(name)
            self.places.append(place)


def gather(arguments: Sequence[str], note: Callable[[str], None] = lambda line: None) -> Inputs:
    """The images of files, folders, patterns, lists and Parquet files, by path or by URI.

    A list (.txt) has a path or URI a line, taken as it stands. A Parquet file has a column of paths or URIs,
    or of encoded files (bytes, or a struct with a field `bytes`), with the names in another column if there
    is one. Folders and patterns are those of `sources.expand`; a pattern of a URI is for its last part.

    Raises:
        InputError: nothing there, something that cannot be read, or a video or an array.
    """
    inputs = Inputs()
    for argument in arguments:
        for name in _files_of(argument, note):
            suffix = _suffix(name)
            if suffix in TABLES:
                _add_table(inputs, name)
            elif suffix in LISTS:
                for line in _lines(name):
                    _add(inputs, line)
            else:
                _add(inputs, name)
    if not len(inputs):
        raise InputError(f"there is no image in '{arguments[0]}'; name some")
    return inputs


def _add(inputs: Inputs, name: str) -> None:
    suffix = _suffix(name)
    if suffix in VIDEO_SUFFIXES | ARRAY_SUFFIXES:
        what = "a video" if suffix in VIDEO_SUFFIXES else "arrays"
        raise InputError(f"'{name}' is {what}; with --ray only images are run")
    inputs.add(name, name if remote.is_uri(name) else os.path.abspath(name))


def _files_of(argument: str, note: Callable[[str], None]) -> list[str]:
    if not remote.is_uri(argument):
        if _suffix(argument) in TABLES and not os.path.exists(argument) and glob.has_magic(argument):
            return sorted(glob.glob(argument, recursive=True)) or _nothing(argument)
        return [str(source.path) for source in expand([argument], note)]
    base, query = remote.split(argument)
    folder, _, last = base.rpartition("/")
    if glob.has_magic(last):
        wanted = {_suffix(last)} & set(TABLES) or IMAGE_SUFFIXES
        found = [file for file in remote.listed(folder + query) or [] if _suffix(file) in wanted]
        return [
            file for file in found if fnmatch.fnmatch(PurePosixPath(remote.split(file)[0]).name, last)
        ] or _nothing(argument)
    if _suffix(argument) in {*IMAGE_SUFFIXES, *LISTS, *TABLES}:
        return [argument]  # without asking the store
    found_in = remote.listed(argument)
    if found_in is None:
        return [argument]
    return [file for file in found_in if _suffix(file) in IMAGE_SUFFIXES] or _nothing(argument)


def _nothing(argument: str) -> list[str]:
    raise InputError(f"there is no image in '{argument}'; check the name")


def _suffix(name: str) -> str:
    return PurePosixPath(remote.split(name)[0] if remote.is_uri(name) else name).suffix.lower()


def _lines(name: str) -> list[str]:
    try:
        data = remote.content(name) if remote.is_uri(name) else Path(name).read_bytes()
        # Only what ends a line in a file: a name may hold any other character that Unicode breaks lines at.
        lines = [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    except OSError as error:
        raise InputError(f"cannot read the list '{name}': {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the list '{name}' is not UTF-8 text; write it as that") from error
    return [line for line in lines if line.strip()]


# --- Parquet ----------------------------------------------------------------------------------------------


def opened(name: str) -> pq.ParquetFile:
    """A Parquet file. Raises InputError: it is none, or cannot be read."""
    try:
        system, path = remote.located(name) if remote.is_uri(name) else (LocalFileSystem(), name)
        return pq.ParquetFile(system.open_input_file(path))
    except (OSError, ValueError) as error:  # pyarrow's are either
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot read the Parquet file '{name}': {reason}; check the path") from error


def _add_table(inputs: Inputs, name: str) -> None:
    place = name if remote.is_uri(name) else os.path.abspath(name)
    if place in inputs._known:
        return
    inputs._known.add(place)
    with opened(name) as file:
        schema = file.schema_arrow
        column = _column(schema, _has_bytes)
        names = _column(schema, is_text, _NAMES)
        if column is None:
            if names is None:
                there = ", ".join(f"{field.name} ({field.type})" for field in schema)
                raise InputError(
                    f"'{name}' has no column of images, paths or URIs, only {there}; give one of "
                    "strings, called path"
                )
            for value in file.read([names])[names].to_pylist():
                if not value:
                    raise InputError(f"'{name}' has a row without a path in column {names}; leave it out")
                _add(inputs, value)
            return
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if not count:
                continue
            inputs.groups.append(Group(len(inputs), place, group, column))
            told = file.read_row_group(group, [names])[names].to_pylist() if names else [None] * count
            first = len(inputs) - inputs.groups[_first_of(inputs, place)].first
            inputs.names += [said or f"{name}#{first + i}" for i, said in enumerate(told)]
            inputs.places += [None] * count


def _first_of(inputs: Inputs, place: str) -> int:
    return next(i for i, group in enumerate(inputs.groups) if group.file == place)


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _has_bytes(kind.field(index).type)
    return is_bytes(kind)


def _column(schema: pa.Schema, fits: Callable[[Any], bool], names: Sequence[str] = ()) -> str | None:
    """The column of a kind: the first of these names, or without names the first at all."""
    found = [field.name for field in schema if fits(field.type)]
    if not names:
        return found[0] if found else None
    return next((name for name in names if name in found), None)


def images_of(
    group: Group, places: Sequence[int], rows: int
) -> Iterator[tuple[list[int], list[bytes | None]]]:
    """The encoded files of these places of a row group, with the places, some `rows` at a time."""
    wanted, place = set(places), group.first
    with opened(group.file) as file:
        for batch in file.iter_batches(rows, row_groups=[group.group], columns=[group.column]):
            column = batch.column(0)
            if pa.types.is_struct(column.type):
                column = column.field("bytes")
            chosen = [i for i in range(len(column)) if place + i in wanted]
            if chosen:
                yield [place + i for i in chosen], [column[i].as_py() for i in chosen]
            place += len(column)
