"""Standard output and standard error: whatever a line holds, and wherever they lead.

Knows streams and lines, and not what they tell.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from meta_deploy.text import escaped


def say(line: str, stream: TextIO | None = None) -> None:
    """Print one line on standard output or on `stream`, beside a progress bar if there is one.

    Names come from outside, so control characters in the line are shown and not obeyed.
    """
    stream = stream or sys.stdout
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(escaped(line), file=stream)
    else:
        print(escaped(line), file=stream, flush=True)


def tell(line: str) -> None:
    """`say` on standard error."""
    say(line, sys.stderr)


class _Unfailing:
    """A stream that a full disk or a closed pipe does not make a reason to stop the work.

    `error` is the first that writing to it raised.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def output_error() -> Exception | None:
    """What kept standard output from being written, if anything did."""
    sys.stdout.flush()
    return getattr(sys.stdout, "error", None)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Streams that take everything: what they cannot encode is escaped, what they cannot write is lost."""
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed (`>&-`): the work is done all the same
                setattr(sys, name, stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
            with contextlib.suppress(
                AttributeError, ValueError, OSError
            ):  # not a stream of a terminal or file
                getattr(sys, name).reconfigure(errors="backslashreplace")
        sys.stdout, sys.stderr = _Unfailing(sys.stdout), _Unfailing(sys.stderr)  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
