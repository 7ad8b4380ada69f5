"""A process of its own for each entry, that does what it is told: so memory is one entry's alone, and what
ends the process ends one entry only.

Knows how a call gets there and back; must not know what is measured.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from meta_deploy.errors import MetaDeployError
from meta_deploy.text import escaped

# The same modules as here, whatever lies in the current folder.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from meta_deploy.report.worker import serve; serve()"


class Failed(MetaDeployError):
    """An entry cannot be opened or run; the message is the reason, in one line."""


class Worker:
    """A process with one `Subject`. A context manager; at its end the process is gone."""

    def __init__(self, path: str, backend: str, threads: int, images: Sequence[str]) -> None:
        """Start the process and open the entry in it; the arguments are those of `Subject`.

        Raises:
            Failed: it cannot be opened.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="meta-deploy-")
        quiet = os.environ.get("META_DEPLOY_DEBUG", "") in ("", "0")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,  # libraries' chatter
        )
        try:
            self._send((path, backend, threads, list(images), self._scratch.name))
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args: Any) -> Any:
        """What a method of the subject gives.

        Raises:
            Failed: what it raises, or that the process has ended.
        """
        return self._send((method, args))

    def _send(self, message: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            value, reason = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise Failed(self._ending()) from error
        if reason is not None:
            raise Failed(reason)
        return value

    def _ending(self) -> str:
        code = self._process.wait()
        if code == -9:
            return "its process was killed, as systems do that run out of memory"
        if code < 0:
            return f"its process crashed ({signal.Signals(-code).name})"
        return f"its process ended with exit code {code}"

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.wait()
        self._scratch.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve() -> None:
    """The process: opens the entry, then answers calls until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no reply
    subject: Any = None
    while True:
        try:
            message = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        value = reason = None
        try:
            if subject is None:
                from meta_deploy.report.subject import Subject

                subject = Subject(*message)
            else:
                method, args = message
                value = getattr(subject, method)(*args)
        except Exception as error:
            reason = _reason(error)
        pickle.dump((value, reason), replies)
        replies.flush()


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    text = escaped(" ".join(str(error).split()))
    return text if isinstance(error, MetaDeployError) else f"{type(error).__name__}: {text}"
