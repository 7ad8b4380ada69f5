"""What takes an axis apart, entry by entry, becomes one Split: q, k and v out of a packed projection.

PyTorch's exporters write it as Slices and Squeezes, as a Split and Squeezes, or as Gathers. All sizes but the
batch must be known.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import (
    IdentitySet,
    constant_value,
    fresh_names,
    is_op,
    is_output,
    made_in,
    own_nodes,
    sole_consumer,
    static_shape,
    tidy,
)
from meta_deploy.graph.moves import MOVES, add_move, chain_before, follow

_Entry = tuple[int, int, gs.Tensor]  # axis, index, and the tensor with that entry


def slices_to_split(graph: gs.Graph) -> int:
    """Replace what takes every entry i of axis a of x, without that axis, by a single Split.

    Pattern: all consumers of x are Gather(i, axis=a), or Slice([i], [i + 1], [a]) and Squeeze([a]), one for
    each index of one axis; or the only one is a Split into entries, with a Squeeze for each.
    Rewrite: moves that every entry goes through alike are done before the cut. The axis is moved before
    another one and merged with it, so that Split's parts need no Squeeze; before which one is chosen so that
    the moves before the cut, taken together, are fewest.

    Returns:
        Places changed.
    """
    fresh = fresh_names(graph)
    inside = own_nodes(graph)
    changes = 0
    for x in [*graph.inputs, *made_in(graph)]:
        if not is_output(graph, x) and (found := _match(graph, x, inside)):
            _rewrite(graph, x, *found, inside, fresh)
            changes += 1
    if changes:
        tidy(graph)
    return changes


def _match(graph: gs.Graph, x: gs.Tensor, inside: IdentitySet) -> tuple[int, list[gs.Tensor]] | None:
    """The axis, and for each index of it the tensor with that entry; tells why not where some are taken."""
    shape = static_shape(x)
    if shape is None or 0 in shape or len(shape) < 2:
        return None
    taken: list[_Entry] = []
    others = []
    for piece in x.outputs:
        entries = _entries(graph, piece, shape, inside) if piece in inside and piece.inputs[0] is x else []
        taken += entries
        if not entries:
            others.append(piece)
    if len(taken) < 2:
        return None
    axes, indices = {axis for axis, _, _ in taken}, sorted(index for _, index, _ in taken)
    axis = min(axes)
    if others:
        reason = f"{shown(others[0])} does something else with it"
    elif len(axes) > 1:
        reason = f"they are along axes {sorted(axes)}"
    elif len(taken) != shape[axis] or indices != list(range(len(taken))):
        reason = f"{len(taken)} of them take entries {indices} of axis {axis}"
    else:
        return axis, [tensor for _, _, tensor in sorted(taken, key=lambda entry: entry[1])]
    declined(taken[0][2].inputs[0], f"its fellows do not take {shown(x)} apart: {reason}")
    return None


def _entries(graph: gs.Graph, piece: gs.Node, shape: list[int], inside: IdentitySet) -> list[_Entry]:
    """The entries of one axis that a node takes out of a tensor of this shape; none where it does not."""
    if is_op(piece, "Gather"):
        return _gathered(piece, shape)
    if is_op(piece, "Slice") and (cut := _entry(piece, shape)) is not None:
        axis, parts = cut[0], [(cut[1], piece.outputs[0])]
    elif is_op(piece, "Split"):
        axis = piece.attrs.get("axis", 0) % len(shape)
        if len(piece.outputs) != shape[axis]:
            return []
        parts = list(enumerate(piece.outputs))
    else:
        return []
    squeezed = [(axis, index, _squeezed(graph, part, axis, len(shape), inside)) for index, part in parts]
    return [] if any(tensor is None for _, _, tensor in squeezed) else squeezed  # type: ignore[return-value]


def _gathered(gather: gs.Node, shape: list[int]) -> list[_Entry]:
    """The entry that a Gather by one constant number takes, which leaves out the axis."""
    index = constant_value(gather.inputs[1])
    axis = gather.attrs.get("axis", 0) % len(shape)
    if index is None or index.ndim or not -shape[axis] <= index.item() < shape[axis]:
        return []
    return [(axis, int(index.item()) % shape[axis], gather.outputs[0])]


def _squeezed(
    graph: gs.Graph, tensor: gs.Tensor, axis: int, rank: int, inside: IdentitySet
) -> gs.Tensor | None:
    """A tensor without its axis, if nothing reads it but the Squeeze that removes that."""
    squeeze = tensor.outputs[0] if sole_consumer(graph, tensor) else None
    if squeeze is None or not is_op(squeeze, "Squeeze") or squeeze not in inside:
        return None
    axes = constant_value(squeeze.inputs[1]) if len(squeeze.inputs) == 2 else None
    if axes is None or [a % rank for a in axes.flatten().tolist()] != [axis]:
        return None
    return squeeze.outputs[0]


def _entry(piece: gs.Node, shape: list[int]) -> tuple[int, int] | None:
    """(axis, index) where a Slice takes one entry of one axis."""
    values = [constant_value(tensor) for tensor in piece.inputs[1:]]
    if len(values) < 3 or any(v is None or v.size != 1 for v in values):
        return None
    start, end, axis, *step = (int(v.item()) for v in values if v is not None)
    axis %= len(shape)
    start, end = (max(0, min(i + shape[axis] if i < 0 else i, shape[axis])) for i in (start, end))
    return (axis, start) if end - start == 1 and step in ([], [1]) else None


def _rewrite(
    graph: gs.Graph,
    x: gs.Tensor,
    axis: int,
    entries: list[gs.Tensor],
    inside: IdentitySet,
    fresh: Callable[[str], str],
) -> None:
    for piece in list(x.outputs):
        piece.inputs[0] = gs.Variable.empty()
    for entry in entries:
        entry.inputs.clear()
    if _same_move(graph, entries, inside):
        x, axis = _axis_first(graph, x, axis, fresh), 0
    while (move := _same_move(graph, entries, inside)) is not None:
        x = _before_the_cut(graph, x, move, fresh)
        entries = [entry.outputs[0].outputs[0] for entry in entries]
        for entry in entries:
            entry.inputs.clear()
    _split(graph, x, axis, entries, fresh)


def _same_move(graph: gs.Graph, entries: list[gs.Tensor], inside: IdentitySet) -> gs.Node | None:
    """The Transpose or Reshape that alone reads each entry, if it is the same for all; the first one's."""
    if not all(sole_consumer(graph, entry) for entry in entries):
        return None
    moves = [entry.outputs[0] for entry in entries]
    first, shape = moves[0], static_shape(moves[0].outputs[0])
    if not shape or not is_op(first, "Transpose", "Reshape"):  # a scalar could not be stacked and split
        return None
    for entry, move in zip(entries, moves, strict=True):
        same = is_op(move, first.op) and move.attrs.get("perm") == first.attrs.get("perm")
        if not same or move not in inside:
            return None
        if move.inputs[0] is not entry or static_shape(move.outputs[0]) != shape:
            return None
    return first


def _axis_first(graph: gs.Graph, x: gs.Tensor, axis: int, fresh: Callable[[str], str]) -> gs.Tensor:
    if axis == 0:
        return x
    perm = [axis, *(a for a in range(len(x.shape)) if a != axis)]
    out = gs.Variable(fresh(f"{x.name}/first"), x.dtype, [x.shape[p] for p in perm])
    add_move(graph, "Transpose", perm, x, out, fresh)
    return out


def _before_the_cut(graph: gs.Graph, x: gs.Tensor, move: gs.Node, fresh: Callable[[str], str]) -> gs.Tensor:
    """Do to all entries at once, stacked along axis 0, what `move` does to one."""
    target = [x.shape[0], *(static_shape(move.outputs[0]) or [])]
    out = gs.Variable(fresh(f"{move.outputs[0].name}/stacked"), x.dtype, target)
    if move.op == "Transpose":
        perm = move.attrs.get("perm", list(range(len(target) - 1))[::-1])
        add_move(graph, "Transpose", [0, *(p + 1 for p in perm)], x, out, fresh)
    else:
        add_move(graph, "Reshape", target, x, out, fresh)
    return out


def _split(
    graph: gs.Graph, x: gs.Tensor, axis: int, entries: list[gs.Tensor], fresh: Callable[[str], str]
) -> None:
    shape = static_shape(x)
    assert shape is not None
    others = [a for a in range(len(shape)) if a != axis]
    neighbour = min(range(len(others)), key=lambda i: _moves_with(graph, x, axis, i))
    perm = [*others[:neighbour], axis, *others[neighbour:]]
    merged = [shape[a] for a in others]
    merged[neighbour] *= shape[axis]

    moved = gs.Variable(fresh(f"{x.name}/moved"), x.dtype, [shape[p] for p in perm])
    packed = gs.Variable(fresh(f"{x.name}/packed"), x.dtype, merged)
    add_move(graph, "Transpose", perm, x, moved, fresh)
    add_move(graph, "Reshape", merged, moved, packed, fresh)
    for entry in entries:
        entry.dtype, entry.shape = x.dtype, [shape[a] for a in others]
    parts = {"num_outputs": len(entries)} if graph.opset >= 18 else {}  # before, equal parts are the default
    graph.nodes.append(
        gs.Node("Split", f"{packed.name}/split", {"axis": neighbour, **parts}, [packed], entries)
    )


def _moves_with(graph: gs.Graph, x: gs.Tensor, axis: int, neighbour: int) -> tuple[int, int]:
    """How many moves there are before the cut with this choice; of equals, the last axis."""
    start, chain = chain_before(graph, x)
    factors = follow(start, chain)
    if factors is None:
        return len(MOVES), -neighbour
    axes = [factors.axes[a] for a in range(len(factors.axes)) if a != axis]
    axes[neighbour] = factors.axes[axis] + axes[neighbour]
    factors.axes = axes
    return len(factors.moves()), -neighbour
