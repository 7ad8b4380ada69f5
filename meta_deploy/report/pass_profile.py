"""Where a run's time goes before the first graph pass and after each, by ONNX Runtime's profiler.

Knows passes and profiles; must not know where a graph comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from meta_deploy.graph.graph import to_proto
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.report.profile import profile
from meta_deploy.report.schema import PassProfile
from meta_deploy.targets import TARGETS
from meta_deploy.targets.target import Target

_RUNS = 5  # of which the fastest counts, as the graphs are not run in turns
TARGET = "onnxruntime"


def by_pass(
    graph: Callable[[str], onnx.ModelProto],
    feed: Mapping[str, np.ndarray],
    options: Callable[[], Any],
    folder: Path,
) -> tuple[PassProfile, ...]:
    """Run ONNX Runtime's passes one after another, and the graph between them.

    Args:
        graph: makes the graph with operators of a form (`Target.operators`).
        feed: its inputs by name.
        options: makes a session's options.
        folder: for the files on the way.

    Returns:
        A row for the graph as it is, whose name is empty, and one for each pass. A pass that changes nothing
        has the times of the row before it.
    """
    target: Target = TARGETS[TARGET]
    rows: list[PassProfile] = []

    def see(name: str, changes: int, between: gs.Graph) -> None:
        if rows and not changes:
            rows.append(PassProfile(name=name, changes=0, ms=rows[-1].ms, classes=rows[-1].classes))
            return
        found = profile(to_proto(between).SerializeToString(), feed, options(), folder, _RUNS, best=True)
        rows.append(PassProfile(name=name, changes=changes, ms=found.ms, classes=found.classes))

    run_passes(graph(target.operators[0]), target.passes, target.prices, seen=see)
    return tuple(rows)
