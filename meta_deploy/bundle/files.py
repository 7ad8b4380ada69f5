"""Writing an output file so that it is there whole or not at all, and what a killed process leaves cleared.

Knows paths only; must not know what is written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from meta_deploy.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX = ".meta-deploy-"
ASIDE = "aside"
_LOCK = ".lock"
_LONGEST_SUFFIX = 20
_PATIENCE = 0.2  # seconds; clearing a leftover away takes less
_cleared: set[Path] = set()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path of the same suffix, made durable and moved to `path` at the end.

    After an exception what was at `path` is there as before.

    Raises:
        InputError: the file cannot be written: no such folder, no permission, disk full.
    """
    target = check_writable(path)
    mode = None
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(target.stat().st_mode)
    try:
        with scratch_folder(target.parent) as folder:
            # Writers may choose the format by the suffix; what else is in a name, some interpret.
            temp = folder / f"new{target.suffix[:_LONGEST_SUFFIX]}"
            yield temp
            with temp.open("r+b") as stream:
                os.fsync(stream.fileno())
            if mode is not None:  # whoever may read the old one may read the new one
                with contextlib.suppress(OSError):
                    temp.chmod(mode)
            os.replace(temp, target)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise InputError(f"cannot write '{path}': {reason(error, target.parent)}") from error


def reason(error: OSError, folder: Path) -> str:
    """Why nothing was written in a folder that is there, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.strerror}; free space or choose another place"
    if isinstance(error, (FileNotFoundError, PermissionError)):  # as in /proc and /sys
        return f"no file can be made in '{folder}'; choose another place"
    return f"{error.strerror or error}; choose another place"


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
    with contextlib.suppress(FileNotFoundError):
        mode = Path(path).stat().st_mode  # not of the real path: a pipe's names nothing
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise InputError(f"cannot write '{path}': it is {kind}; name a file")
    if not target.parent.is_dir():
        raise InputError(f"cannot write '{path}': there is no folder '{target.parent}'; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write '{path}': no permission in '{target.parent}'; choose another place")


@contextlib.contextmanager
def scratch_folder(folder: Path, owner: str | None = None) -> Iterator[Path]:
    """A hidden folder in `folder` for what is not whole yet. It is removed at the end.

    It is locked while this process lives, so that what a killed process left is known by its free lock,
    also where ids of processes say nothing: on a disk that several containers or machines share. The first
    call for a folder clears such leftovers away. Where a file system has no locks, they stay.

    `owner` names what only one at a time may have such a folder for.

    Raises:
        BlockingIOError: another has the folder of this owner.
        OSError: it cannot be made.
    """
    if owner is not None or folder not in _cleared:
        _clear(folder)
        _cleared.add(folder)
    path, lock = _make(folder, owner)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            _remove(path)
        if lock is not None:
            os.close(lock)
        with contextlib.suppress(OSError):
            path.rmdir()  # NFS keeps a file that is open until now


def scratch_path(folder: Path, owner: str | None) -> Path:
    """Where `owner` has its scratch folder; None: a path of nobody's."""
    name = secrets.token_hex(8) if owner is None else hashlib.sha256(os.fsencode(owner)).hexdigest()[:16]
    return folder / f"{PREFIX}{name}"


def _make(folder: Path, owner: str | None) -> tuple[Path, int | None]:
    """A new scratch folder, and the descriptor that holds its lock."""
    end = time.monotonic() + _PATIENCE
    while True:
        path = scratch_path(folder, owner)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            if _clear_one(path):
                continue
        else:
            # Another may find it before it is locked, and clear it away.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                return path, _lock(path)
        if time.monotonic() > end:
            raise BlockingIOError(None, "another process is writing it")
        time.sleep(0.01)


def _lock(path: Path) -> int | None:
    """Lock a scratch folder until the descriptor is closed. None: there are no locks here.

    Raises:
        BlockingIOError: another holds it.
        FileNotFoundError: it is gone.
    """
    if fcntl is None:
        return None
    # A file, as network file systems lock no folders.
    descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path / _LOCK)):
            raise FileNotFoundError(path)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and not isinstance(error, (BlockingIOError, FileNotFoundError)):
            return None
        raise
    return descriptor


def _clear(folder: Path) -> None:
    """Remove the scratch folders whose processes have died."""
    with os.scandir(folder) as entries:
        left = [Path(entry.path) for entry in entries if entry.name.startswith(PREFIX)]
    for path in left:
        _clear_one(path)


def _clear_one(path: Path) -> bool:
    """Remove a scratch folder unless its process lives; whether it is gone."""
    try:
        lock = _lock(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    if lock is None:
        return False
    try:
        with contextlib.suppress(OSError):
            _remove(path)
    finally:
        os.close(lock)
    return not path.exists()


def _remove(path: Path) -> None:
    """Remove a scratch folder, once what was moved aside and not replaced is back in its place."""
    for old in (path / ASIDE).glob("*"):
        if not os.path.lexists(path.parent / old.name):
            old.rename(path.parent / old.name)
    shutil.rmtree(path, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Make a folder's entries durable, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
