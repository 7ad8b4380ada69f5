"""Seconds of runs in turns, and what of a difference is noise. Knows runs and clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

ROUNDS, SECONDS = 15, 20.0
_MAD = 1.4826  # times the median deviation is the standard deviation, of a normal distribution
_MEDIAN = 1.2533  # the standard error of a median over that of a mean, likewise

Feed = Mapping[str, np.ndarray]
Run = Callable[[Feed], Any]


def interleaved(
    runs: Sequence[Run], feed: Feed, rounds: int = ROUNDS, seconds: float = SECONDS
) -> list[list[float]]:
    """Seconds of each run, round by round, so that other load on the machine falls on all alike.

    At least three rounds, and no new one after so many `seconds`.
    """
    for run in runs:
        run(feed)  # the first run of a session makes its memory
    times: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (len(times) < rounds and time.perf_counter() < end):
        times.append([_seconds(run, feed) for run in runs])
    return times


def median_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The median and its standard error, both deaf to a few outliers."""
    median = float(np.median(values))
    spread = float(np.median(np.abs(np.asarray(values) - median)))
    return median, _MEDIAN * _MAD * spread / len(values) ** 0.5


def facts_of(times: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of rounds of seconds, (low precision, float32) each: medians `ratio`, `ms` and `fp32_ms`."""
    ratios = [low / full for low, full in times]
    ms = 1000 * np.median(times, axis=0)
    return {
        "ratio": round(float(np.median(ratios)), 3),
        "ms": round(float(ms[0]), 2),
        "fp32_ms": round(float(ms[1]), 2),
    }


def _seconds(run: Run, feed: Feed) -> float:
    start = time.perf_counter()
    run(feed)
    return time.perf_counter() - start
