"""Writing an output file so that it is there whole or not at all.

Knows paths only; must not know what is written.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from meta_deploy.errors import InputError

LONGEST_SUFFIX = 20
_COUNTER = itertools.count()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` (same suffix), renamed to it at the end, removed on any exception.

    Raises:
        InputError: the file cannot be written: no such folder, no permission, disk full.
    """
    target = check_writable(path)
    # The suffix stays, for writers that choose the format by it.
    suffix = target.suffix if len(target.suffix) <= LONGEST_SUFFIX else ""
    temp = target.with_name(f".tmp-{os.getpid()}-{next(_COUNTER)}{suffix}")
    try:
        yield temp
        os.replace(temp, target)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise InputError(
            f"cannot write '{path}': {error.strerror or error}; free space or choose another place"
        ) from error
    finally:
        temp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """As `atomic_path`, with the temporary file open for writing bytes."""
    with atomic_path(path) as temp, temp.open("xb") as stream:
        yield stream


def check_writable(path: str | os.PathLike[str]) -> Path:
    """The real path of a file that can be written, or replaced.

    Raises:
        InputError: it is a folder or a device, or its folder is absent or cannot be written to.
    """
    target = Path(os.path.realpath(path))
    try:
        _check_target(target, path)
    except OSError as error:
        raise InputError(f"cannot write '{path}': {error.strerror}; choose another place") from error
    return target


def _check_target(target: Path, path: str | os.PathLike[str]) -> None:
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "not a regular file"
        raise InputError(f"cannot write '{path}': it is {kind}; name a file")
    if not target.parent.is_dir():
        raise InputError(f"cannot write '{path}': there is no folder '{target.parent}'; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write '{path}': no permission in '{target.parent}'; choose another place")
