"""Linear maps of tokens change places with the window moves beside them, so that moves meet moves.

A product over the last axis is the same whatever becomes of the other axes: before a window partition or
after it. Before the padding and after the cropping it is the smaller one, too.

All sizes but the batch must be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, read_elsewhere, shown
from meta_deploy.graph.graph import (
    IdentitySet,
    constant_value,
    is_op,
    own_nodes,
    producer,
    sole_consumer,
    static_shape,
    until_done,
)
from meta_deploy.graph.linear import Linear, has_input, linear_of
from meta_deploy.graph.moves import MOVES, Move, add_move, chain_after, chain_before, fewest, permutation


def move_linears(graph: gs.Graph) -> int:
    """Do a MatMul before moves that lead to it, or after moves that follow, where moves then meet.

    Pattern: moves, MatMul by a constant matrix (and its bias' Add), moves; each read by the next alone. Moves
    are Reshape, Transpose, Squeeze, Unsqueeze, Flatten, zero Pad and Slice.
    Check: those passed leave the last axis alone, and are more than Reshapes, by which nothing is gained.
    Rewrite: at the place where fewest moves are left once chains are collapsed, and of such the one where the
    product is smallest; it never grows. Padding is zeros in front of the product and its bias behind it, so
    that behind a Pad the bias is added last.

    Returns:
        Products moved.
    """
    return until_done(graph, _move_all)  # one that has moved may have been in the way of the next


def _move_all(graph: gs.Graph, fresh: Callable[[str], str]) -> int:
    inside = own_nodes(graph)
    changes = 0
    for node in list(graph.nodes):
        if not is_op(node, "MatMul") or (linear := linear_of(graph, node)) is None:
            continue
        if linear.add is not None and linear.add not in inside:
            continue
        line = _line(graph, linear, inside)
        _tell_stopped(graph, linear, line)
        place = _best_place(line)
        if place < line.place:
            _hoist(graph, linear, line.passable[place : line.place], fresh)
        elif place > line.place:
            _sink(graph, linear, line.passable[line.place : place], fresh)
        changes += place != line.place
    return changes


@dataclass(frozen=True)
class Line:
    """A product and the moves around it, in a row.

    Attributes:
        linear: the product.
        passable: the moves that it may change places with, first to last.
        place: how many of these come before it.
        before, after: the moves beyond, which those meet.
    """

    linear: Linear
    passable: list[gs.Node]
    place: int
    before: list[gs.Node]
    after: list[gs.Node]


def _line(graph: gs.Graph, linear: Linear, inside: IdentitySet) -> Line:
    leading: list[gs.Node] = []
    x, y = linear.x, linear.y
    while (node := producer(x)) is not None and sole_consumer(graph, x) and _keeps_channels(node):
        leading.append(node)
        x = node.inputs[0]
    following: list[gs.Node] = []
    while sole_consumer(graph, y) and (reader := y.outputs[0]) in inside:
        # The zeros of a Pad would become the bias.
        if reader.inputs[0] is not y or not _keeps_channels(reader) or is_op(reader, "Pad"):
            break
        following.append(reader)
        y = reader.outputs[0]
    before = chain_before(graph, x)[1] if sole_consumer(graph, x) else []
    after = chain_after(graph, y)[1]
    return Line(
        linear,
        [*leading[::-1], *following],
        len(leading),
        before if _is_known(before) else [],
        after if _is_known(after) and all(node in inside for node in after) else [],
    )


def _tell_stopped(graph: gs.Graph, linear: Linear, line: Line) -> None:
    """Tell what keeps a product from a move beside it whose shapes are not known, or that others read."""
    x = line.passable[0].inputs[0] if line.place else linear.x
    y = line.passable[-1].outputs[0] if len(line.passable) > line.place else linear.y
    before = producer(x)
    for move in (before, y.outputs[0] if sole_consumer(graph, y) else None):
        if move is not None and is_op(move, *MOVES, "Pad", "Slice"):
            unknown = [t for t in (move.inputs[0], move.outputs[0]) if not static_shape(t)]
            if unknown:
                declined(
                    linear.node, f"{shown(move)} is in the way: {shown(unknown[0])} is not of known shape"
                )
    if before is not None and not sole_consumer(graph, x) and _keeps_channels(before):
        reader = linear.node if x is linear.x else line.passable[0]
        declined(linear.node, f"{shown(before)} is in the way: {read_elsewhere(graph, x, reader)}")


def _is_known(chain: list[gs.Node]) -> bool:
    return all(static_shape(tensor) for node in chain for tensor in (node.inputs[0], node.outputs[0]))


def _best_place(line: Line) -> int:
    """Where fewest moves are left, and the product is smallest; where it is if no other place is better."""
    place = line.place
    if not line.passable:
        return place
    best = _cost(line, place)
    for other in range(len(line.passable) + 1):
        low, high = sorted((line.place, other))
        if not any(is_op(node, "Transpose", "Pad", "Slice") for node in line.passable[low:high]):
            continue
        if _rows(line, other) <= _rows(line, line.place) and _cost(line, other) < best:
            best, place = _cost(line, other), other
    return place


def _rows(line: Line, place: int) -> int:
    """Of how many vectors the product is at this place."""
    tensor = line.passable[place - 1].outputs[0] if place else line.passable[0].inputs[0]
    return math.prod((static_shape(tensor) or [])[:-1])


def _cost(line: Line, place: int) -> tuple[int, int]:
    """Moves left around the product at this place, each chain of them collapsed; the product's rows."""
    out, channels = line.linear.weight.shape
    steps = [
        *((node, None) for node in line.before),
        *((node, channels) for node in line.passable[:place]),
        (None, None),
        *((node, out) for node in line.passable[place:]),
        *((node, None) for node in line.after),
    ]
    left, shape, chain = 0, list[int](), list[Move]()
    for node, width in [*steps, (None, None)]:
        if node is None or is_op(node, "Pad", "Slice"):
            left += len(fewest(shape, chain))
            chain = []
            continue
        before, after = (_with_channels(tensor, width) for tensor in (node.inputs[0], node.outputs[0]))
        shape = shape if chain else before
        chain.append(
            ("Transpose", permutation(node), after) if node.op == "Transpose" else ("Reshape", after, after)
        )
    return left, _rows(line, place)


def _with_channels(tensor: gs.Tensor, channels: int | None) -> list[int]:
    """A tensor's shape, with another number of channels if one is given."""
    shape = static_shape(tensor) or []
    return shape if channels is None else [*shape[:-1], channels]


def _keeps_channels(node: gs.Node) -> bool:
    """Whether a node moves, pads with zeros or cuts a tensor, and leaves its last axis as it is."""
    if not is_op(node, *MOVES, "Pad", "Slice"):
        return False
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    if not before or not after or before[-1] != after[-1] or 0 in before or 0 in after:
        return False
    if node.op == "Transpose":
        return node.attrs.get("perm", [0])[-1] == len(before) - 1
    if node.op == "Pad":
        return _pads_zeros(node, len(before))
    if node.op == "Slice":
        axes = constant_value(node.inputs[3]) if has_input(node, 3) else np.arange(len(before))
        return axes is not None and all(axis % len(before) != len(before) - 1 for axis in axes.tolist())
    return True


def _pads_zeros(node: gs.Node, rank: int) -> bool:
    """Whether a Pad of opset 11 or later puts zeros around other axes than the last."""
    pads = constant_value(node.inputs[1]) if has_input(node, 1) else None
    if pads is None or node.attrs.get("mode", "constant") != "constant":
        return False
    value = constant_value(node.inputs[2]) if has_input(node, 2) else np.zeros(1)
    axes = constant_value(node.inputs[3]) if has_input(node, 3) else np.arange(rank)
    if value is None or value.any() or axes is None:
        return False
    begins, ends = np.split(pads, 2)
    return not any(b or e for a, b, e in zip(axes, begins, ends, strict=True) if a % rank == rank - 1)


def _hoist(graph: gs.Graph, linear: Linear, moves: list[gs.Node], fresh: Callable[[str], str]) -> None:
    """moves, product, bias -> product, bias, moves; the bias behind the last Pad if there is one."""
    padded = 1 + max((i for i, node in enumerate(moves) if is_op(node, "Pad")), default=-1)
    tensor = _multiply(graph, moves[0].inputs[0], linear, fresh)
    tensor = _repeat(graph, moves[:padded], tensor, linear.out_channels, fresh)
    tensor = _add_bias(graph, tensor, linear, fresh)
    _repeat(graph, moves[padded:], tensor, linear.out_channels, fresh)
    _end_in(graph, linear.y)


def _sink(graph: gs.Graph, linear: Linear, moves: list[gs.Node], fresh: Callable[[str], str]) -> None:
    """product, bias, moves -> moves, product, bias."""
    tensor = _repeat(graph, moves, linear.x, linear.weight.shape[1], fresh)
    _add_bias(graph, _multiply(graph, tensor, linear, fresh), linear, fresh)
    _end_in(graph, moves[-1].outputs[0])


def _end_in(graph: gs.Graph, out: gs.Tensor) -> None:
    """Let the newest node make `out`, instead of what does."""
    out.inputs.clear()
    graph.nodes[-1].outputs = [out]


def _multiply(graph: gs.Graph, x: gs.Tensor, linear: Linear, fresh: Callable[[str], str]) -> gs.Tensor:
    shape = _with_channels(x, linear.out_channels)
    product = gs.Variable(fresh(f"{linear.y.name}/product"), linear.weight.dtype, shape)
    graph.nodes.append(gs.Node("MatMul", product.name, {}, [x, linear.node.inputs[1]], [product]))
    return product


def _add_bias(graph: gs.Graph, x: gs.Tensor, linear: Linear, fresh: Callable[[str], str]) -> gs.Tensor:
    if linear.add is None or linear.bias is None:
        return x
    bias = next(tensor for tensor in linear.add.inputs if isinstance(tensor, gs.Constant))
    if len(bias.shape) > 1:  # it may have more axes than x has here
        bias = gs.Constant(fresh(f"{linear.y.name}/bias"), np.ascontiguousarray(linear.bias))
    out = gs.Variable(fresh(f"{linear.y.name}/linear"), x.dtype, x.shape)
    graph.nodes.append(gs.Node("Add", out.name, {}, [x, bias], [out]))
    return out


def _repeat(
    graph: gs.Graph, moves: list[gs.Node], tensor: gs.Tensor, channels: int, fresh: Callable[[str], str]
) -> gs.Tensor:
    """Do the same moves to a tensor of so many channels."""
    for node in moves:
        shape = _with_channels(node.outputs[0], channels)
        out = gs.Variable(fresh(f"{node.outputs[0].name}/moved"), tensor.dtype, shape)
        if is_op(node, "Transpose", "Pad", "Slice"):
            inputs = [tensor, *node.inputs[1:]]
            graph.nodes.append(gs.Node(node.op, out.name, dict(node.attrs), inputs, [out]))
        else:
            add_move(graph, "Reshape", shape, tensor, out, fresh)
        tensor = out
    return tensor
