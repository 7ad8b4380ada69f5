"""Chains of Reshape, Transpose, Squeeze, Unsqueeze and Flatten become one Reshape-Transpose-Reshape, or less.

A chain only renames where elements are: it is a factorization of the axes and an order of the factors. Axes
of length one have no part in that. All sizes but the batch must be known.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import is_op, is_output, replace, sole_consumer, static_shape, until_done
from meta_deploy.graph.moves import MOVES, add_move, chain_before, fewest, moves_of


def collapse_chains(graph: gs.Graph) -> int:
    """Replace every chain of moves by the fewest that do the same, where that is fewer.

    Pattern: moves in a row, each read by the next alone.
    Check: all sizes are known, but for the batch, and none is zero.

    Returns:
        Nodes removed.
    """
    return until_done(graph, _collapse_all)  # a computed shape may have been another reader between


def _collapse_all(graph: gs.Graph, fresh: Callable[[str], str]) -> int:
    ends = [node for node in graph.nodes if is_op(node, *MOVES) and _ends_chain(graph, node)]
    return sum(_collapse(graph, node, fresh) for node in ends)


def _ends_chain(graph: gs.Graph, node: gs.Node) -> bool:
    """Whether no move alone goes on from this one."""
    out = node.outputs[0]
    if not sole_consumer(graph, out):
        return True
    return not is_op(out.outputs[0], *MOVES) or out.outputs[0].inputs[0] is not out


def _collapse(graph: gs.Graph, last: gs.Node, fresh: Callable[[str], str]) -> int:
    end = last.outputs[0]
    start, chain = chain_before(graph, end)
    moves = moves_of(start, chain)
    if moves is None:
        if len(chain) > 1:
            unknown = (t for t in (start, *(node.outputs[0] for node in chain)) if not static_shape(t))
            declined(last, f"{shown(next(unknown, end))} is not of known shape, or without elements")
        return 0
    plan = fewest(static_shape(start) or [], moves)
    left = len(plan) or int(is_output(graph, end))  # an Identity keeps the name
    if left >= len(chain):
        return 0
    last.outputs.clear()
    tensor = start
    for i, (op, values, shape) in enumerate(plan, 1):
        out = end if i == len(plan) else gs.Variable(fresh(f"{end.name}/move"), start.dtype, shape)
        add_move(graph, op, values, tensor, out, fresh)
        tensor = out
    if not plan:
        replace(graph, end, start)
    return len(chain) - left
