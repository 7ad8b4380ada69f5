"""A Transpose before a Reshape that cuts its axes goes behind it: tokens are cut into rows, then made a map.

TensorRT then reads what a norm or a product has written in that order, and the convolution takes the
Transpose in: XCiT's engine has 200 layers instead of 212, PVT v2's 139 instead of 141. All sizes but the
batch must be known.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, read_elsewhere
from meta_deploy.graph.graph import fresh_names, is_op, is_output, own_nodes, sole_consumer, tidy
from meta_deploy.graph.moves import MOVES, add_move, chain_before, follow


def transpose_last(graph: gs.Graph) -> int:
    """Write Transpose, Reshape as the Reshape and Transpose that do the same, where there are such.

    Check: nothing else reads what is moved, else it would be there in both orders; no other move leads to the
    two or follows, as then `collapse-chains` knows what is fewest.

    Returns:
        Pairs whose order changed.
    """
    fresh, inside = fresh_names(graph), own_nodes(graph)
    changes = 0
    for last in list(graph.nodes):
        if not is_op(last, "Reshape") or last not in inside or _moves_on(last):
            continue
        end = last.outputs[0]
        start, chain = chain_before(graph, end)
        if [node.op for node in chain] != ["Transpose", "Reshape"] or chain[0] not in inside:
            continue
        factors = follow(start, chain)
        plan = factors.moves() if factors else []
        if [move[0] for move in plan] != ["Reshape", "Transpose"]:
            continue
        if not sole_consumer(graph, start) or is_output(graph, start):
            declined(chain[0], read_elsewhere(graph, start, chain[0]))
            continue
        last.outputs.clear()
        rows = gs.Variable(fresh(f"{end.name}/rows"), start.dtype, plan[0][2])
        add_move(graph, plan[0][0], plan[0][1], start, rows, fresh)
        add_move(graph, plan[1][0], plan[1][1], rows, end, fresh)
        changes += 1
    if changes:
        tidy(graph)
    return changes


def _moves_on(node: gs.Node) -> bool:
    return any(is_op(reader, *MOVES) for reader in node.outputs[0].outputs)
