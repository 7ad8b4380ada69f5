"""Replacing a folder in one step: whoever looks finds the old one or the new one.

Knows paths and signals; must not know what is in the folders.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from meta_deploy.bundle.files import ASIDE, scratch_folder, scratch_path, sync_folder

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


class Replacement:
    """A folder in the making.

    Attributes:
        out: what it is put in place of.
        new: where its files go.
    """

    def __init__(self, out: Path, scratch: Path):
        self.out, self._aside = out, scratch / ASIDE
        self.new = scratch / "new"
        self.new.mkdir()

    def commit(self, committed: Callable[[], None] = lambda: None) -> None:
        """Put the new folder in place of the old one, durably.

        SIGINT and SIGTERM come before or after this, never in between; `committed` is called in between, once
        the new folder is there.

        Raises:
            OSError: it cannot be put there; the old one is.
        """
        sync_folder(self.new)
        with _signals_held():
            self._put()
            committed()
        sync_folder(self.out.parent)

    def _put(self) -> None:
        if not self.out.exists():
            self.new.rename(self.out)
        elif not _exchange(self.new, self.out):
            self._aside.mkdir()
            old = self._aside / self.out.name  # from where the next process puts it back
            self.out.rename(old)
            try:
                self.new.rename(self.out)
            except OSError:
                old.rename(self.out)
                raise


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Replacement]:
    """A replacement for the folder `out`, a real path, which only one process or thread at a time has.

    On Linux, where the file system can (ext4, XFS, Btrfs, tmpfs), the two folders change names in one step.
    Elsewhere the old one is moved aside first, and for that moment nothing is at `out`; if the process is
    killed right then, the next writer to the same parent puts the old one back. Parents that are missing are
    made, and removed again if nothing was put there.

    Raises:
        BlockingIOError: another is replacing it.
        OSError: nothing can be written beside it.
    """
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(out.parent, owner=out.name) as scratch:
            yield Replacement(out, scratch)
    finally:
        for folder in missing:  # only those still empty go
            with contextlib.suppress(OSError):
                folder.rmdir()


def moved_aside(path: Path) -> bool:
    """Whether the folder at `path` is moved aside right now, to make place for its replacement."""
    out = Path(os.path.realpath(path))
    return (scratch_path(out.parent, out.name) / ASIDE / out.name).exists()


def _exchange(a: Path, b: Path) -> bool:
    """Let two names change places; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:  # a C library that is older than the call
        return False
    return renameat2(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the end of the block."""
    came: list[int] = []
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # others get none
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is not None:  # else it is not Python's
                    stack.callback(signal.signal, number, before)
                    signal.signal(number, lambda number, frame: came.append(number))
        yield
    for late in came:
        signal.raise_signal(late)
