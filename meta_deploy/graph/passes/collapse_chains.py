"""Chains of Reshape, Transpose, Squeeze, Unsqueeze and Flatten become one Reshape-Transpose-Reshape, or less.

A chain only renames where elements are: it is a factorization of the axes and an order of the factors. Axes
of length one have no part in that. All sizes but the batch must be known.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, made_by, shown
from meta_deploy.graph.graph import (
    is_op,
    is_output,
    producer,
    replace,
    sole_consumer,
    static_shape,
    until_done,
)
from meta_deploy.graph.moves import MOVES, Move, add_move, chain_before, fewest, moves_of

_FURTHER = 6  # moves before a chain that are looked at


def collapse_chains(graph: gs.Graph) -> int:
    """Replace every chain of moves by the fewest that do the same, where that is fewer.

    Pattern: moves in a row, each read by the next alone; or that begin earlier, with moves that others read
    too, which stay.
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
    start, plan = _from_further(start, chain, fewest(static_shape(start) or [], moves))
    left = len(plan) or int(is_output(graph, end))  # an Identity keeps the name
    if left >= len(chain):
        declined(last, _fewest_there(graph, start, end, len(chain)))
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


def _from_further(start: gs.Tensor, chain: list[gs.Node], plan: list[Move]) -> tuple[gs.Tensor, list[Move]]:
    """A plan for the chain, or a shorter one from before moves that lead to its start and others read."""
    x, longer = start, chain
    while len(longer) < len(chain) + _FURTHER:
        maker = producer(x)
        if maker is None or not is_op(maker, *MOVES):
            break
        x, longer = maker.inputs[0], [maker, *longer]
        if (moves := moves_of(x, longer)) is None:
            break
        other = fewest(static_shape(x) or [], moves)
        if len(other) < len(plan):
            start, plan = x, other
    return start, plan


def _fewest_there(graph: gs.Graph, start: gs.Tensor, end: gs.Tensor, count: int) -> str:
    """That a chain of so many moves cannot be shorter, and between what it is."""
    maker = producer(start)
    first = made_by(start) if maker is None else shown(maker)
    last = "an output of the graph" if is_output(graph, end) else shown(end.outputs[0])
    others = f" and {len(end.outputs) - 1} more" if len(end.outputs) > 1 else ""
    return f"no fewer than {count} lead from {first} to {last}{others}"
