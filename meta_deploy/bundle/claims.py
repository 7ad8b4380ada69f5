"""Which files a command reads and writes, so that it writes over nothing that it needs or has just written.

Knows paths; must not know what the files are for.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Hashable

from meta_deploy.errors import InputError


class Claims:
    """Files and folders in use. Two names are the same file by links, by hard links, or by case alone."""

    def __init__(self) -> None:
        self._by: dict[Hashable, str] = {}

    def add_streams(self) -> None:
        """Take the files that standard input, output and error are, where they are files."""
        for number, name in enumerate(("standard input", "standard output", "standard error")):
            with contextlib.suppress(OSError):  # closed
                status = os.fstat(number)
                if stat.S_ISREG(status.st_mode):
                    self._by[status.st_dev, status.st_ino] = name

    def add(self, path: str | os.PathLike[str], what: str) -> None:
        """Take a file, or a folder with all that is in it. `what` it is, for messages: "an input"."""
        for key in _keys(os.path.realpath(path)):
            self._by.setdefault(key, what)

    def user(self, path: str | os.PathLike[str]) -> str | None:
        """What uses a file, or a folder that it is in; None: nothing."""
        real = os.path.realpath(path)
        used = (self._by[key] for key in _keys(real) if key in self._by)
        return next(used, None) or self.holder(os.path.dirname(real))

    def holder(self, folder: str | os.PathLike[str]) -> str | None:
        """What uses a folder or one that it is in; None: nothing."""
        real = os.path.realpath(folder)
        while (user := self._by.get(_inode(real))) is None and real != os.path.dirname(real):
            real = os.path.dirname(real)
        return user

    def write(self, path: str | os.PathLike[str], option: str) -> None:
        """Take a file that an option names for writing.

        Raises:
            InputError: it is in use, or "-", which names no file.
        """
        if os.fspath(path) == "-":
            raise InputError(f"{option} '-' names no file; give one")
        if (user := self.user(path)) is not None:
            raise InputError(f"{option} '{path}' would be written over {user}; name another file")
        self.add(path, f"the file of {option}")


def _keys(real: str) -> list[Hashable]:
    """What two names of one file have in common: the file itself, or its folder and its name."""
    folder, name = os.path.split(real)
    return [key for key in (_inode(real), (folder, name.casefold())) if key is not None]


def _inode(real: str) -> Hashable:
    try:
        status = os.stat(real)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
