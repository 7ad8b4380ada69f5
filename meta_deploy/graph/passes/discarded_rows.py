"""Rows that a Where throws away are not computed: the mask head runs on the boxes found, not on the padding.

Needs shapes that are known only at run time, so it is for ONNX Runtime and not for TensorRT.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, made_by, read_elsewhere, shown
from meta_deploy.graph.graph import (
    constant_value,
    is_batch,
    producer,
    sole_consumer,
    static_shape,
    tidy,
)

# Each output row of these depends on the same row of input 0 alone.
_ROW_WISE = ("Conv", "ConvTranspose", "Relu", "Sigmoid", "GatherElements")


def discarded_rows(graph: gs.Graph) -> int:
    """Compute only the rows that are kept of every Where(keep, Reshape(f(Gather(x, index))), 0).

    Pattern: `keep` (B, K, 1, ..), the Reshape from (B * K, 1, ..) to (B, K, ..), f row-wise with at least one
    convolution, the Gather along axis 0.
    Rewrite: f runs on the gathered rows where `keep` holds; a ScatterND puts them back among zeros.

    Returns:
        Places changed.
    """
    changes = 0
    for node in list(graph.nodes):
        if node.op == "Where" and (found := _match(graph, node)):
            _rewrite(graph, node, *found)
            changes += 1
    if changes:
        tidy(graph)
    return changes


def _match(graph: gs.Graph, where: gs.Node) -> tuple[gs.Node, list[gs.Node], gs.Node] | None:
    """The Reshape, the row-wise nodes from last to first, and the Gather that starts them."""
    keep, value, other = where.inputs
    zero = constant_value(other)
    reshape = producer(value, "Reshape")
    if zero is None or zero.any() or reshape is None:
        return None
    if not sole_consumer(graph, value):
        declined(where, read_elsewhere(graph, value, where))
        return None
    flat = reshape.inputs[0]
    if producer(flat, "ScatterND") is not None:  # it is done
        return None
    if not _same_rows(keep.shape, flat.shape, value.shape):
        rows = f"{shown(keep)} does not keep or discard whole rows of {shown(flat)}"
        declined(where, f"{rows}, which become {shown(value)}")
        return None
    nodes: list[gs.Node] = []
    tensor = flat
    while sole_consumer(graph, tensor) and (node := producer(tensor)) is not None:
        if node.op == "Gather" and node.attrs.get("axis", 0) == 0 and nodes:
            if any(n.op in ("Conv", "ConvTranspose") for n in nodes):
                return reshape, nodes, node
            declined(where, f"no convolution lies between {shown(node)} and {shown(reshape)}")
            return None
        if node.op not in _ROW_WISE or (node.op == "GatherElements" and _chooses_rows(node)):
            declined(
                where, f"{shown(node)} does not compute its rows one by one, and is no Gather along axis 0"
            )
            return None
        nodes.append(node)
        tensor = node.inputs[0]
    reader = nodes[-1] if nodes else reshape
    alone = f"{made_by(tensor)}, not from a Gather"
    declined(where, alone if sole_consumer(graph, tensor) else read_elsewhere(graph, tensor, reader))
    return None


def _chooses_rows(gather_elements: gs.Node) -> bool:
    """Whether it goes along axis 0, which may be counted from the end."""
    axis, shape = gather_elements.attrs.get("axis", 0), gather_elements.outputs[0].shape
    return axis == 0 or (axis < 0 and (shape is None or axis + len(shape) == 0))


def _same_rows(keep: list | None, flat: list | None, value: list | None) -> bool:
    """Whether row r of `flat` is entry (r // K, r % K) of `value`, which `keep` has an element for.

    B has to be the same: a `keep` of one image would serve all by broadcasting.
    """
    if keep is None or flat is None or value is None or not len(keep) == len(flat) == len(value) >= 3:
        return False
    if keep[0] is None or not all(isinstance(size, int) for size in value[1:]):
        return False
    if any(map(is_batch, value[2:])):  # inside of a row
        return False
    return list(keep) == [*value[:2]] + [1] * (len(keep) - 2) and list(flat[1:]) == [1, *value[2:]]


def _rewrite(
    graph: gs.Graph, where: gs.Node, reshape: gs.Node, nodes: list[gs.Node], gather: gs.Node
) -> None:
    prefix = where.name or where.outputs[0].name

    def add(op: str, *inputs: gs.Tensor, dtype: type, **attrs) -> gs.Tensor:
        out = gs.Variable(f"{prefix}/kept_{len(graph.nodes)}", dtype=dtype)
        graph.nodes.append(gs.Node(op, out.name, attrs, list(inputs), [out]))
        return out

    def constant(name: str, values: list[int]) -> gs.Tensor:
        return gs.Constant(f"{prefix}/{name}", np.array(values, np.int64))

    keep = add("Reshape", where.inputs[0], constant("all", [-1]), dtype=np.bool_)
    rows = add("Transpose", add("NonZero", keep, dtype=np.int64), dtype=np.int64, perm=[1, 0])  # (kept, 1)
    index = add("Squeeze", rows, constant("last", [1]), dtype=np.int64)

    flat = reshape.inputs[0]
    row = list(flat.shape[1:])
    gathered = gather.outputs[0]
    nodes[-1].inputs[0] = add("Gather", gathered, index, dtype=gathered.dtype, axis=0)
    for node in nodes:
        node.outputs[0].shape = None  # its rows are now the kept ones
        if node.op == "GatherElements":
            chosen = node.inputs[1]
            node.inputs[1] = add("Gather", chosen, index, dtype=chosen.dtype, axis=0)
    known = static_shape(where.inputs[0])
    if known is not None and not any(map(is_batch, known)):
        zeros = gs.Constant(f"{prefix}/zeros", np.zeros([math.prod(known), *row], flat.dtype))
    else:
        inner = constant("inner", row)
        shape = add("Concat", add("Shape", keep, dtype=np.int64), inner, dtype=np.int64, axis=0)
        zero = gs.Constant("zero", np.zeros(1, flat.dtype))
        zeros = add("ConstantOfShape", shape, dtype=flat.dtype, value=zero)
    reshape.inputs[0] = add("ScatterND", zeros, rows, flat, dtype=flat.dtype)
