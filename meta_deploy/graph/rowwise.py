"""Regions of a graph between two tensors, and those that treat each row, the last axis, like any other.

A Transpose that leaves the last axis in its place may then as well come before such a region as after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.graph import (
    IdentitySet,
    constant_value,
    is_op,
    producer,
    sole_consumer,
    static_shape,
)
from meta_deploy.graph.moves import add_move

_LONGEST = 40  # nodes of a region
_ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Clip", "Neg", "Abs", "Sqrt", "Reciprocal"),
    *("Relu", "Sigmoid", "Tanh", "Erf", "Gelu", "HardSwish", "Cast"),
)
_REDUCE = ("ReduceL1", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceMax")
_NORMS = ("LayerNormalization", "LpNormalization", "RMSNormalization")
_ROWWISE = (*_ELEMENTWISE, *_REDUCE, *_NORMS, "Expand")


def node_places(graph: gs.Graph) -> dict[int, int]:
    """Where each node is in the graph's order, in which it follows what it reads."""
    return {id(node): i for i, node in enumerate(graph.nodes)}


def regions_before(
    y: gs.Tensor, ops: Collection[str], places: Mapping[int, int]
) -> Iterator[tuple[gs.Tensor, list[gs.Node]]]:
    """Tensors of the shape of `y` that all of it is computed of by these operators, the nearest first.

    With each come the nodes between, the last first.
    """
    shape, nodes, frontier = static_shape(y), IdentitySet[gs.Node](), [y]
    while frontier and len(nodes) < _LONGEST:
        if nodes and len(frontier) == 1 and static_shape(frontier[0]) == shape:
            yield frontier[0], list(nodes)
        makers = [producer(tensor) for tensor in frontier]
        inside = [maker for maker in makers if maker is not None and id(maker) in places]
        last = max(inside, key=lambda maker: places[id(maker)], default=None)
        if last is None or not is_op(last, *ops):
            return
        nodes.add(last)
        left = [tensor for tensor, maker in zip(frontier, makers, strict=True) if maker is not last]
        read = [tensor for tensor in last.inputs if not isinstance(tensor, gs.Constant) and tensor.name]
        frontier = list(IdentitySet([*left, *read]))


def transposed(
    graph: gs.Graph,
    y: gs.Tensor,
    perm: Sequence[int],
    places: Mapping[int, int],
    fresh: Callable[[str], str],
) -> gs.Tensor:
    """`y` transposed, its last axis staying: before the rows' computation where only that leads to it.

    `y` is of known sizes. Where its computation is changed, `y` itself is what is transposed from then on.
    """
    shape = static_shape(y)
    assert shape is not None
    found = [
        (start, nodes)
        for start, nodes in regions_before(y, _ROWWISE, places)
        if sole_consumer(graph, y) and all(_commutes(graph, node, start, y, nodes) for node in nodes)
    ]
    start, nodes = found[-1] if found else (y, [])
    moved = gs.Variable(fresh(f"{start.name}/moved"), start.dtype, [shape[axis] for axis in perm])
    add_move(graph, "Transpose", list(perm), start, moved, fresh)
    for node in nodes:
        for i, tensor in enumerate(node.inputs):
            if tensor is start:
                node.inputs[i] = moved
            elif (
                isinstance(tensor, gs.Constant)
                and (value := _permuted(node, i, tensor.values, perm)) is not None
            ):
                node.inputs[i] = gs.Constant(fresh(f"{tensor.name}/moved"), value)
        out = node.outputs[0]
        out.shape = [out.shape[axis] for axis in perm]
    return y if nodes else moved


def _commutes(
    graph: gs.Graph, node: gs.Node, start: gs.Tensor, y: gs.Tensor, nodes: Sequence[gs.Node]
) -> bool:
    """Whether a node does to rows in any order what it does to them in this one, for readers inside alone."""
    region, out = IdentitySet(nodes), node.outputs[0]
    rank, shape = len(start.shape), static_shape(out)
    if len(node.outputs) > 1 or shape is None or len(shape) != rank:
        return False
    if out is not y and (not out.outputs or any(reader not in region for reader in out.outputs)):
        return False
    if any(out is output for output in graph.outputs):
        return False
    if any(len(t.shape or ()) != rank for t in node.inputs if not isinstance(t, gs.Constant) and t.name):
        return False
    if is_op(node, *_REDUCE):
        given = constant_value(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
        axes = [] if given is None else [int(axis) % rank for axis in given]
        return axes == [rank - 1] and node.attrs.get("keepdims", 1) == 1
    if is_op(node, *_NORMS):
        return int(node.attrs.get("axis", -1)) % rank == rank - 1
    if is_op(node, "Expand"):
        target = constant_value(node.inputs[1])
        return target is not None and target.size == rank
    return all(t.values.ndim <= rank for t in node.inputs if isinstance(t, gs.Constant))


def _permuted(node: gs.Node, place: int, value: np.ndarray, perm: Sequence[int]) -> np.ndarray | None:
    """A constant input for rows in another order; None where it stays."""
    if is_op(node, "Expand"):
        return value[list(perm)]
    if not is_op(node, *_ELEMENTWISE) or is_op(node, "Clip") or value.ndim < 2:
        return None  # a number, one for each place of a row, or no value for rows at all
    return value.reshape((1,) * (len(perm) - value.ndim) + value.shape).transpose(perm)
