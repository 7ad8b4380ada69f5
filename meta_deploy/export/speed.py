"""Is what ships faster than float32, on this machine, in the library that runs it? Knows runs and clocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from meta_deploy.bundle.manifest import Profile
from meta_deploy.calib.costs import PAYS
from meta_deploy.calib.timing import facts_of, interleaved
from meta_deploy.export.verify import OnnxRun, Run
from meta_deploy.targets.target import BuildOptions, Target


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
    runs = [shipped or OnnxRun(low, arena=True), opened(target, full, profiles, "fp32")]
    return facts_of(interleaved(runs, feed))


def opened(target: Target, graph: onnx.ModelProto, profiles: Sequence[Profile], precision: str) -> Run:
    """A graph in the library that runs the target's bundles, as these run it; else in ONNX Runtime."""
    if target.estimates:
        return OnnxRun(graph, arena=True)
    built = target.build(graph.SerializeToString(), profiles, BuildOptions(precision))
    return target.runner(built.files, profiles, precision) or OnnxRun(graph, arena=True)


def verdict(facts: Mapping[str, Any], precision: str) -> str:
    """What was measured, in a line."""
    line = f"takes {facts['ratio']:.2f} of fp32's time on this machine ({facts['ms']:.1f} ms)"
    if facts["ratio"] > PAYS:
        return f"warning: {precision} {line}, so it gains none; use --fp32 unless its size is what you want"
    return f"{precision} {line}"
