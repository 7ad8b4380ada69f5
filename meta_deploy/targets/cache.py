"""What was built for this machine, kept in the user's cache folder for next time: files that begin with a
record, so that whatever several processes write, both are of one.

Knows folders, sha256 and who may write where; must not know what the files are for.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from meta_deploy.bundle.files import atomic_write
from meta_deploy.errors import InputError

_LONGEST_RECORD = 1 << 20
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def root(folder: str) -> Path:
    """meta-deploy/FOLDER in $XDG_CACHE_HOME, or in ~/.cache. It need not exist.

    Raises:
        InputError: neither is known.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError as error:
        raise InputError("there is no home folder for the cache; set XDG_CACHE_HOME") from error
    return home / "meta-deploy" / folder


def make_folder(folder: str, name: str = "") -> Path:
    """The folder, or the one called `name` in it, made if need be and writable by nobody else.

    Raises:
        InputError: it cannot be made, or others own it or can write to it.
    """
    for path in dict.fromkeys((root(folder), root(folder) / name)):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            trusted = _is_ours(path)
        except OSError as error:
            raise InputError(
                f"cannot make the cache folder '{path}': {error.strerror}; set XDG_CACHE_HOME to another"
            ) from error
        if not trusted:
            raise InputError(
                f"the cache folder '{path}' is another user's or others can write to it, and what is in it "
                "runs as a program; run chmod go-w on it, or set XDG_CACHE_HOME to another"
            )
    return path


def key(*parts: Any) -> str:
    """A file name for what belongs to these parts, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(folder: str, key: str) -> tuple[bytes, dict[str, Any]] | None:
    """A stored file and its record, with the `sha256`; None if anything about them is wrong."""
    try:
        path = root(folder)
        if not _is_ours(path):
            return None
        with (path / f"{key}.bin").open("rb") as stream:
            record = json.loads(stream.readline(_LONGEST_RECORD))
            data = stream.read()
    except (OSError, ValueError, RecursionError, InputError):
        return None
    if not isinstance(record, dict) or record.get("sha256") != hashlib.sha256(data).hexdigest():
        return None
    return data, record


def write(folder: str, key: str, data: bytes, record: dict[str, Any]) -> Path:
    """Store the data after its record, whole or not at all; returns the file.

    Raises:
        InputError: it cannot be written, or the folder is not safe.
    """
    path = make_folder(folder) / f"{key}.bin"
    record = {**record, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    with atomic_write(path) as stream:
        stream.write(json.dumps(record).encode() + b"\n")
        stream.write(data)
    return path


def _is_ours(path: Path) -> bool:
    """Whether the folder belongs to this user and no other may write to it (Windows keeps its own guard)."""
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        return False
    return os.name != "posix" or (status.st_uid == os.getuid() and not status.st_mode & _WRITABLE_BY_OTHERS)
