"""Is a graph faster in 8 bits, on this machine, in the library that runs it? Knows runs and clocks."""

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
    rest: str,
) -> dict[str, float]:
    """Time a graph in 8 bits and the float32 graph that it was made of, as either would ship, in turns.

    Args:
        target: whose library runs both.
        shipped: what runs the first as built; None where what ships is the graph.
        graphs: both, each with the outputs that ship.
        profiles: of the inputs.
        feed: one run's inputs.
        rest: the precision that the second would ship in.

    Returns:
        ratio: the median over rounds of the first one's time by the other's; ms, rest_ms: both medians.
    """
    low, full = graphs
    runs = [shipped or OnnxRun(low, arena=True), opened(target, full, profiles, rest)]
    return facts_of(interleaved(runs, feed))


def opened(target: Target, graph: onnx.ModelProto, profiles: Sequence[Profile], precision: str) -> Run:
    """A graph in the library that runs the target's bundles, as these run it; else in ONNX Runtime."""
    if target.estimates:
        return OnnxRun(graph, arena=True)
    built = target.build(graph.SerializeToString(), profiles, BuildOptions(precision))
    return target.runner(built, profiles, precision) or OnnxRun(graph, arena=True)


def verdict(facts: Mapping[str, Any], precision: str, rest: str) -> str:
    """What was measured, in a line."""
    line = f"takes {facts['ratio']:.2f} of {rest}'s time on this machine ({facts['ms']:.1f} ms)"
    if facts["ratio"] > PAYS:
        return f"warning: {precision} {line}, so it gains none; use --{rest} unless its size is what you want"
    return f"{precision} {line}"
