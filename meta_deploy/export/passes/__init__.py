"""Graph passes: graph in, changes made out, one a file. They know ONNX graphs, not models.

`PASSES` names them; `PIPELINES` is the order that each target runs them in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import onnx
import onnx_graphsurgeon as gs

from meta_deploy.export.passes.chains import collapse_chains
from meta_deploy.export.passes.cleanup import clean_up
from meta_deploy.export.passes.discarded_rows import discarded_rows
from meta_deploy.export.passes.fuse_attention import fuse_attention
from meta_deploy.export.passes.graph import to_graph, to_proto
from meta_deploy.export.passes.splits import slices_to_split

PASSES: dict[str, Callable[[gs.Graph], int]] = {
    "clean-up": clean_up,
    "fuse-attention": fuse_attention,
    "slices-to-split": slices_to_split,
    "collapse-chains": collapse_chains,
    "discarded-rows": discarded_rows,
}
PIPELINES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("clean-up", "fuse-attention", "slices-to-split", "collapse-chains", "discarded-rows"),
}


@dataclass(frozen=True)
class PassResult:
    """What one pass did: changes made; nodes, and those of them that only move data, before and after."""

    name: str
    changes: int
    nodes_before: int
    nodes_after: int
    moves_before: int
    moves_after: int
    seconds: float

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def run_passes(proto: onnx.ModelProto, names: list[str]) -> tuple[onnx.ModelProto, list[PassResult]]:
    """Run passes one after another.

    Returns:
        The new graph and a line per pass.
    """
    graph = to_graph(proto)
    results = []
    before, moves = len(graph.nodes), sum(_moves(node.op) for node in graph.nodes)
    for name in names:
        start = time.perf_counter()
        changes = PASSES[name](graph)
        seconds = round(time.perf_counter() - start, 2)
        after, moves_after = len(graph.nodes), sum(_moves(node.op) for node in graph.nodes)
        results.append(PassResult(name, changes, before, after, moves, moves_after, seconds))
        before, moves = after, moves_after
    return to_proto(graph), results


def _moves(op: str) -> bool:
    return op in ("Transpose", "Reshape")
