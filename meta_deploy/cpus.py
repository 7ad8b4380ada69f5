"""How many CPUs this process may use: affinity, and the quota of its control groups. Knows files, no library.

Libraries count the machine's cores, or those of the affinity, and start as many threads. Under a quota
(`docker run --cpus=2`) these use it up in a fraction of each period, and all stand still for the rest.
"""

from __future__ import annotations

import math
import os
import re
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import ClassVar


def cpu_count(root: Path = Path("/")) -> int:
    """CPUs that this process may use, at least 1. A quota of 1.5 counts as 2, which one thread cannot use up.

    `root` is where /proc and /sys are looked for.
    """
    quota = min(_quotas(root), default=math.inf)
    return _affinity() if quota >= _affinity() else max(1, math.ceil(quota))


class Share:
    """The threads of one of the models that are open in this process; to be closed with it.

    Attributes:
        threads: to start; 0 where the library's own choice is right, which is all cores.
    """

    _open: ClassVar[weakref.WeakSet[Share]] = weakref.WeakSet()

    def __init__(self, threads: int | None = None) -> None:
        """`threads`: what was asked for. None: all CPUs for the first model, and half of them, a third, …

        for those that are opened beside it.
        """
        if threads is None:
            count = max(1, cpu_count() // (len(Share._open) + 1))
            threads = 0 if count == _affinity() else count
        self.threads = threads
        Share._open.add(self)

    def close(self) -> None:
        Share._open.discard(self)


def limited_threads() -> int:
    """The threads for one thing at a time; 0 where the library's own choice is right."""
    count = cpu_count()
    return 0 if count == _affinity() else count


def _affinity() -> int:
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """The CPUs that each control group of this process allows, of both versions, from its own to the top."""
    mounts = list(_mounts(root))
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, group = [*line.split(":", 2), "", ""][:3]
        for top, folder, kind, options in mounts:
            v1 = kind == "cgroup" and "cpu" in controllers.split(",") and "cpu" in options
            if (v1 or (kind == "cgroup2" and number == "0")) and (inside := _below(group, top)) is not None:
                place = root / folder.lstrip("/")
                for part in (inside, *inside.parents):
                    quota = (_quota_v1 if v1 else _quota_v2)(place / part)
                    if quota is not None:
                        yield quota


def _mounts(root: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """Of each mounted file system what of it is mounted, where, its kind and options."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        place, system = left.split(), right.split()
        if len(place) > 4 and len(system) > 2 and system[0].startswith("cgroup"):
            yield _plain(place[3]), _plain(place[4]), system[0], system[2].split(",")


def _plain(path: str) -> str:
    """A path without the kernel's escapes, such as \\040 for a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _below(group: str, top: str) -> PurePosixPath | None:
    """The path of a group in what is mounted; in a container of its own what is mounted is the group."""
    try:
        return PurePosixPath(group).relative_to(top)
    except ValueError:
        return PurePosixPath(".") if group == "/" else None


def _quota_v2(folder: Path) -> float | None:
    numbers = _numbers(_read(folder / "cpu.max"))
    return numbers[0] / numbers[1] if len(numbers) == 2 else None


def _quota_v1(folder: Path) -> float | None:
    numbers = _numbers(_read(folder / "cpu.cfs_quota_us") + " " + _read(folder / "cpu.cfs_period_us"))
    return numbers[0] / numbers[1] if len(numbers) == 2 else None


def _numbers(text: str) -> list[int]:
    """The positive whole numbers in a text; "max" and -1, for no quota, are none."""
    return [int(word) for word in text.split() if word.isdecimal() and int(word) > 0]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
