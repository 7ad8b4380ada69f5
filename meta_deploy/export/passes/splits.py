"""Slices that take an axis apart, entry by entry, become one Split: q, k and v out of a packed projection.

Static shapes only.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.export.passes.chains import MOVES, chain_before, follow
from meta_deploy.export.passes.graph import constant_value, static_shape


def slices_to_split(graph: gs.Graph) -> int:
    """Replace Slice(x, [i], [i + 1], [a]) with Squeeze([a]), for every i of axis a, by a single Split.

    Pattern: all consumers of x are such pairs, one for each index of one axis.
    Rewrite: moves that every entry goes through alike are done before the cut. The axis is moved before
    another one and merged with it, so that Split's parts need no Squeeze; before which one is chosen so that
    the moves before the cut, taken together, are fewest.

    Returns:
        Places changed.
    """
    outputs = {id(output) for output in graph.outputs}
    changes = 0
    for node in list(graph.nodes):
        for x in node.outputs:
            if id(x) not in outputs and (found := _match(x, outputs)):
                _rewrite(graph, x, *found)
                changes += 1
    if changes:
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return changes


def _match(x: gs.Tensor, outputs: set[int]) -> tuple[int, list[gs.Tensor]] | None:
    """The axis, and for each index of it the tensor that holds that entry."""
    shape = static_shape(x)
    if shape is None or len(x.outputs) < 2:
        return None
    entries: dict[int, gs.Tensor] = {}
    axes = set()
    for piece in x.outputs:
        if piece.op != "Slice" or piece.inputs[0] is not x or len(piece.outputs[0].outputs) != 1:
            return None
        squeeze = piece.outputs[0].outputs[0]
        cut = _entry(piece, shape)
        if cut is None or squeeze.op != "Squeeze" or id(piece.outputs[0]) in outputs:
            return None
        axis, index = cut
        if len(squeeze.inputs) < 2 or (axes_squeezed := constant_value(squeeze.inputs[1])) is None:
            return None
        if [a % len(shape) for a in np.atleast_1d(axes_squeezed).tolist()] != [axis]:
            return None
        axes.add(axis)
        entries[index] = squeeze.outputs[0]
    if len(axes) != 1 or len(shape) < 2:
        return None
    axis = axes.pop()
    if len(x.outputs) != shape[axis] or sorted(entries) != list(range(shape[axis])):
        return None
    return axis, [entries[i] for i in range(shape[axis])]


def _entry(piece: gs.Node, shape: list[int]) -> tuple[int, int] | None:
    """(axis, index) where a Slice takes one entry of one axis."""
    values = [constant_value(tensor) for tensor in piece.inputs[1:]]
    if len(values) < 3 or any(v is None or v.size != 1 for v in values):
        return None
    start, end, axis, *step = (int(v.item()) for v in values if v is not None)
    axis %= len(shape)
    start, end = (max(0, min(i + shape[axis] if i < 0 else i, shape[axis])) for i in (start, end))
    return (axis, start) if end - start == 1 and step in ([], [1]) else None


def _rewrite(graph: gs.Graph, x: gs.Tensor, axis: int, entries: list[gs.Tensor]) -> None:
    outputs = {id(output) for output in graph.outputs}
    for entry in entries:
        entry.inputs.clear()
    if _same_move(entries, outputs):
        x, axis = _axis_first(graph, x, axis), 0
    while (move := _same_move(entries, outputs)) is not None:
        x = _before_the_cut(graph, x, move)
        entries = [entry.outputs[0].outputs[0] for entry in entries]
        for entry in entries:
            entry.inputs.clear()
    _split(graph, x, axis, entries)


def _same_move(entries: list[gs.Tensor], outputs: set[int]) -> gs.Node | None:
    """The Transpose or Reshape that alone reads each entry, if it is the same for all; the first one's."""
    if any(id(entry) in outputs or len(entry.outputs) != 1 for entry in entries):
        return None
    moves = [entry.outputs[0] for entry in entries]
    first, shape = moves[0], static_shape(moves[0].outputs[0])
    if shape is None or first.op not in ("Transpose", "Reshape"):
        return None
    for entry, move in zip(entries, moves, strict=True):
        same = move.op == first.op and move.attrs.get("perm") == first.attrs.get("perm")
        if not same or move.inputs[0] is not entry or static_shape(move.outputs[0]) != shape:
            return None
    return first


def _axis_first(graph: gs.Graph, x: gs.Tensor, axis: int) -> gs.Tensor:
    perm = [axis, *(a for a in range(len(x.shape)) if a != axis)]
    out = gs.Variable(f"{x.name}/first", x.dtype, [x.shape[p] for p in perm])
    graph.nodes.append(gs.Node("Transpose", out.name, {"perm": perm}, [x], [out]))
    return out


def _before_the_cut(graph: gs.Graph, x: gs.Tensor, move: gs.Node) -> gs.Tensor:
    """Do to all entries at once, stacked along axis 0, what `move` does to one."""
    target = [x.shape[0], *(static_shape(move.outputs[0]) or [])]
    out = gs.Variable(f"{move.outputs[0].name}/stacked", x.dtype, target)
    if move.op == "Transpose":
        perm = move.attrs.get("perm", list(range(len(target) - 1))[::-1])
        graph.nodes.append(gs.Node("Transpose", out.name, {"perm": [0, *(p + 1 for p in perm)]}, [x], [out]))
    else:
        shape = gs.Constant(f"{out.name}/shape", np.array(target, np.int64))
        graph.nodes.append(gs.Node("Reshape", out.name, {}, [x, shape], [out]))
    return out


def _split(graph: gs.Graph, x: gs.Tensor, axis: int, entries: list[gs.Tensor]) -> None:
    shape = static_shape(x)
    assert shape is not None
    others = [a for a in range(len(shape)) if a != axis]
    neighbour = min(range(len(others)), key=lambda i: _moves_with(graph, x, axis, others[i]))
    perm = [*others[:neighbour], axis, *others[neighbour:]]
    merged = [shape[a] for a in others]
    merged[neighbour] *= shape[axis]

    moved = gs.Variable(f"{x.name}/moved", x.dtype, [shape[p] for p in perm])
    packed = gs.Variable(f"{x.name}/packed", x.dtype, merged)
    target = gs.Constant(f"{packed.name}/shape", np.array(merged, np.int64))
    for entry in entries:
        entry.dtype, entry.shape = x.dtype, [shape[a] for a in others]
    attributes = {"axis": neighbour, "num_outputs": len(entries)}
    graph.nodes += [
        gs.Node("Transpose", moved.name, {"perm": perm}, [x], [moved]),
        gs.Node("Reshape", packed.name, {}, [moved, target], [packed]),
        gs.Node("Split", f"{x.name}/split", attributes, [packed], entries),
    ]


def _moves_with(graph: gs.Graph, x: gs.Tensor, axis: int, neighbour: int) -> tuple[int, int]:
    """How many moves there are before the cut with this choice; of equals, the last axis."""
    start, chain = chain_before(graph, x)
    factors = follow(start, chain)
    if factors is None:
        return len(MOVES), -neighbour
    order = [a for a in range(len(factors.axes)) if a != axis]
    at = order.index(neighbour)
    axes = [factors.axes[a] for a in order]
    axes[at] = factors.axes[axis] + axes[at]
    factors.axes = axes
    return len(factors.moves()), -neighbour
