"""Seconds of runs in turns, and what of a difference is noise. Knows runs and clocks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

ROUNDS, SECONDS = 15, 20.0
_LEAST = 5  # with fewer the sign test is never sure
_LEVEL = 0.05

Feed = Mapping[str, np.ndarray]
Run = Callable[[Feed], Any]


def interleaved(
    runs: Sequence[Run], feed: Feed, rounds: int = ROUNDS, seconds: float = SECONDS, least: int = _LEAST
) -> list[list[float]]:
    """Seconds of each run, round by round, so that other load on the machine falls on all alike.

    At least five rounds, or `least`, and no new one after so many `seconds`.
    """
    for run in runs:
        run(feed)  # the first run of a session makes its memory
    times: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (len(times) < rounds and time.perf_counter() < end):
        times.append([_seconds(run, feed) for run in runs])
    return times


def is_sure(wins: int, rounds: int) -> bool:
    """Whether one side wins more rounds than chance lets at a level of 5 %: the sign test.

    It is deaf to how far apart times are, which other work on the machine may blow up.
    """
    return sum(math.comb(rounds, k) for k in range(wins, rounds + 1)) <= _LEVEL * 2**rounds


def facts_of_each(times: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    """`facts_of` each of several runs in 8 bits; the last of every round is the one without."""
    return [facts_of([(turn[i], turn[-1]) for turn in times]) for i in range(len(times[0]) - 1)]


def facts_of(times: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of rounds of seconds, (with 8 bits, without) each: medians `ratio`, `ms` and `rest_ms`."""
    ratios = [low / rest for low, rest in times]
    ms = 1000 * np.median(times, axis=0)
    return {
        "ratio": round(float(np.median(ratios)), 3),
        "ms": round(float(ms[0]), 2),
        "rest_ms": round(float(ms[1]), 2),
    }


def _seconds(run: Run, feed: Feed) -> float:
    start = time.perf_counter()
    run(feed)
    return time.perf_counter() - start
