"""Graph passes: graph in, changes made out, one a file. They know ONNX graphs, not models.

`PASSES` names them; which of them run, and in which order, is the targets' affair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir

from meta_deploy.graph.explain import Declined, explaining
from meta_deploy.graph.graph import from_model, normalized, to_proto
from meta_deploy.graph.modules import inherit_modules
from meta_deploy.graph.passes.clean_up import clean_up
from meta_deploy.graph.passes.collapse_chains import collapse_chains
from meta_deploy.graph.passes.convolve_linears import convolve_linears
from meta_deploy.graph.passes.discarded_rows import discarded_rows
from meta_deploy.graph.passes.distribute_sums import distribute_sums
from meta_deploy.graph.passes.flatten_concats import flatten_concats
from meta_deploy.graph.passes.fold_batch_norm import fold_batch_norm
from meta_deploy.graph.passes.fold_branches import fold_branches
from meta_deploy.graph.passes.fold_scales import fold_scales
from meta_deploy.graph.passes.fuse_attention import fuse_attention
from meta_deploy.graph.passes.fuse_layer_norm import fuse_layer_norm
from meta_deploy.graph.passes.fuse_rotary import fuse_rotary
from meta_deploy.graph.passes.gather_rows import gather_rows
from meta_deploy.graph.passes.join_kernels import join_kernels
from meta_deploy.graph.passes.merge_siblings import merge_siblings
from meta_deploy.graph.passes.move_linears import move_linears
from meta_deploy.graph.passes.order_tokens import order_tokens
from meta_deploy.graph.passes.pack_attention import pack_attention
from meta_deploy.graph.passes.plain_attention import plain_attention
from meta_deploy.graph.passes.plain_einsum import plain_einsum
from meta_deploy.graph.passes.share_norms import share_norms
from meta_deploy.graph.passes.slices_to_split import slices_to_split
from meta_deploy.graph.passes.stack_attention import stack_attention
from meta_deploy.graph.prices import CPU, Cost
from meta_deploy.graph.traffic import bytes_known

PASSES: dict[str, Callable[[gs.Graph], int]] = {
    "clean-up": clean_up,
    "plain-attention": plain_attention,
    "plain-einsum": plain_einsum,
    "fuse-layer-norm": fuse_layer_norm,
    "share-norms": share_norms,
    "fold-batch-norm": fold_batch_norm,
    "fold-scales": fold_scales,
    "merge-siblings": merge_siblings,
    "gather-rows": gather_rows,
    "fuse-attention": fuse_attention,
    "fuse-rotary": fuse_rotary,
    "slices-to-split": slices_to_split,
    "collapse-chains": collapse_chains,
    "convolve-linears": convolve_linears,
    "move-linears": move_linears,
    "order-tokens": order_tokens,
    "stack-attention": stack_attention,
    "fold-branches": fold_branches,
    "distribute-sums": distribute_sums,
    "join-kernels": join_kernels,
    "flatten-concats": flatten_concats,
    "discarded-rows": discarded_rows,
    "pack-attention": pack_attention,
}
# These choose between forms by what they cost on the target.
PRICED: dict[str, Callable[[gs.Graph, Cost], int]] = {
    "merge-siblings": merge_siblings,
    "fold-branches": fold_branches,
    "distribute-sums": distribute_sums,
    "join-kernels": join_kernels,
}


@dataclass(frozen=True)
class PassResult:
    """What one pass did: changes made, and what there was before and after.

    Attributes:
        nodes_before: nodes, and so on for after.
        moves_before: Transpose and Reshape nodes.
        bytes_before: what data movement and norms read and write, as far as sizes are known in advance.
        bytes_exact: whether all of these sizes are known, before and after.
        declined: the places near the pass' pattern that it leaves as they are; None where nobody asked.
    """

    name: str
    changes: int
    nodes_before: int
    nodes_after: int
    moves_before: int
    moves_after: int
    bytes_before: int
    bytes_after: int
    bytes_exact: bool
    seconds: float
    declined: list[Declined] | None = None

    def to_dict(self) -> dict[str, object]:
        """As plain values, `declined` among them only where somebody asked."""
        return {key: value for key, value in asdict(self).items() if key != "declined" or value is not None}


def run_passes(
    proto: onnx.ModelProto,
    names: Sequence[str],
    cost: Cost = CPU,
    explain: bool = False,
    seen: Callable[[str, int, gs.Graph], None] = lambda name, changes, graph: None,
) -> tuple[onnx.ModelProto, list[PassResult]]:
    """Run passes one after another.

    Args:
        proto: of any opset; is left as it is.
        names: keys of `PASSES`.
        cost: the target's prices.
        explain: have every pass say what it declined, and why.
        seen: called with the graph before the first pass ("", 0) and after each, with its changes.

    Returns:
        The new graph and a line per pass.
    """
    literal = [normalized(proto)]  # is the graph only before the first pass
    graph = from_model(literal[0])
    results = []
    nodes, moves, moved, exact = _measured(graph)
    seen("", 0, graph)
    for name in names:
        start = time.perf_counter()
        changes = _run(name, graph, cost, literal.pop() if literal else None)
        seconds = round(time.perf_counter() - start, 2)
        seen(name, changes, graph)
        was = nodes, moves, moved, exact
        nodes, moves, moved, exact = _measured(graph)
        results.append(
            PassResult(
                *(name, changes, was[0], nodes, was[1], moves, was[2], moved),
                bytes_exact=was[3] and exact,
                seconds=seconds,
                declined=_declined(name, graph, cost) if explain else None,
            )
        )
    rewritten = to_proto(graph)
    inherit_modules(proto.graph, rewritten.graph)
    return rewritten, results


def _run(name: str, graph: gs.Graph, cost: Cost, model: ir.Model | None = None) -> int:
    """Run a pass; `model` is the graph's, where that is at hand."""
    if name == "clean-up":
        return clean_up(graph, model)
    return PRICED[name](graph, cost) if name in PRICED else PASSES[name](graph)


def _declined(name: str, graph: gs.Graph, cost: Cost) -> list[Declined]:
    """What a pass, which has run, says when it finds no more to do; on a copy, should it find something."""
    with explaining() as told:
        _run(name, graph.copy(), cost)
    return list(told)


def _measured(graph: gs.Graph) -> tuple[int, int, int, bool]:
    """Nodes, those of them that are a Transpose or a Reshape, bytes moved, and whether these are all."""
    moves = sum(node.op in ("Transpose", "Reshape") for node in graph.nodes)
    return len(graph.nodes), moves, *bytes_known(graph)
