"""What an export tells while it runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Listeners to an export. The command line prints what they hear; by default nobody listens.

    Attributes:
        note: called with a line worth reading.
        start: called with the name of a stage that begins.
        end: called with the name of the stage that ended, and its seconds.
        count: called with (done, total) inside a stage that can count.
        written: called when the bundle is in its place, before an interrupt can come.
        seconds: stage -> seconds, of the stages that ended.
    """

    note: Callable[[str], None] = lambda line: None
    start: Callable[[str], None] = lambda stage: None
    end: Callable[[str, float], None] = lambda stage, seconds: None
    count: Callable[[int, int], None] = lambda done, total: None
    written: Callable[[], None] = lambda: None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the export, told at its start and its end."""
        self.start(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.end(name, self.seconds[name])
