"""Is what ships faster than float32, on this machine, in the library that runs it? Knows runs and clocks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from meta_deploy.bundle.manifest import Profile
from meta_deploy.export.verify import OnnxRun, Run
from meta_deploy.targets.target import BuildOptions, Target

ROUNDS, SECONDS = 15, 20.0
PAYS = 0.97  # of float32's time; nearer to it than this, nothing is gained that could be told from noise


def measured(
    target: Target,
    shipped: Run | None,
    graphs: tuple[onnx.ModelProto, onnx.ModelProto],
    profiles: Sequence[Profile],
    feed: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """Time a graph in a low precision and the float32 graph that it was made of, in turns.

    Args:
        target: whose library runs both.
        shipped: what runs the low one as built; None where what ships is the graph.
        graphs: the low one and the float32 one, each with the outputs that ship.
        profiles: of the inputs.
        feed: one run's inputs.

    Returns:
        ratio: the median over rounds of the low one's time by float32's; fp32_ms, ms: the medians of both.
    """
    low, full = graphs
    if shipped is None:
        runs: list[Run] = [OnnxRun(low, arena=True), OnnxRun(full, arena=True)]
    else:
        built = target.build(full.SerializeToString(), profiles, BuildOptions("fp32"))
        base = target.runner(built.files, profiles, "fp32")
        assert base is not None
        runs = [shipped, base]
    times = interleaved(runs, feed)
    ratios = [a / b for a, b in times]
    ms = 1000 * np.median(times, axis=0)
    return {
        "ratio": round(float(np.median(ratios)), 3),
        "ms": round(float(ms[0]), 2),
        "fp32_ms": round(float(ms[1]), 2),
    }


def interleaved(runs: Sequence[Run], feed: Mapping[str, np.ndarray]) -> list[list[float]]:
    """Seconds of each run, round by round, so that other load on the machine falls on all alike."""
    for run in runs:
        run(feed)  # the first run of a session makes its memory
    rounds: list[list[float]] = []
    end = time.perf_counter() + SECONDS
    while len(rounds) < 3 or (len(rounds) < ROUNDS and time.perf_counter() < end):
        rounds.append([_seconds(run, feed) for run in runs])
    return rounds


def _seconds(run: Run, feed: Mapping[str, np.ndarray]) -> float:
    start = time.perf_counter()
    run(feed)
    return time.perf_counter() - start


def verdict(facts: Mapping[str, Any], precision: str) -> str:
    """What was measured, in a line."""
    line = f"takes {facts['ratio']:.2f} of fp32's time on this machine ({facts['ms']:.1f} ms)"
    if facts["ratio"] > PAYS:
        return f"warning: {precision} {line}, so it gains none; use --fp32 unless its size is what you want"
    return f"{precision} {line}"
