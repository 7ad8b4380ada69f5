"""Rows that a Where throws away are not computed: the mask head runs on the boxes found, not on the padding.

Needs shapes that are known only at run time, so it is for ONNX Runtime and not for TensorRT.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, made_by, read_elsewhere, shown
from meta_deploy.graph.graph import (
    IdentitySet,
    constant_value,
    is_batch,
    is_op,
    is_output,
    producer,
    sole_consumer,
    static_shape,
    tidy,
)

# Each output row of these depends on the same row of input 0 alone, if they do not choose or cut rows.
_ROW_WISE = ("Conv", "ConvTranspose", "Relu", "Sigmoid", "GatherElements", "Split")
_ELEMENT_WISE = ("Add", "Sub", "Mul", "Div")


def discarded_rows(graph: gs.Graph) -> int:
    """Compute only the rows that are kept of every Where(keep, Reshape(f(Gather(x, index))), 0).

    Pattern: `keep` (B, K, 1, ..), the Reshape from (B * K, 1, ..) to (B, K, ..), f row-wise with at least one
    convolution, in one or several branches, the Gather along axis 0.
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
    nodes, starts = _row_wise_before(graph, reshape)
    start = starts[-1]
    node = producer(start)
    if node is None:
        declined(where, f"{made_by(start)}, not from a Gather")
    elif not _read_only_by(graph, node, nodes):
        declined(where, read_elsewhere(graph, start, *nodes))
    elif not is_op(node, "Gather") or node.attrs.get("axis", 0) != 0:
        declined(where, f"{shown(node)} does not compute its rows one by one, and is no Gather along axis 0")
    elif len(starts) > 1:
        declined(where, f"{shown(reshape)} gets rows of both {shown(starts[0])} and {shown(start)}")
    elif not any(n.op in ("Conv", "ConvTranspose") for n in nodes):
        declined(where, f"no convolution lies between {shown(node)} and {shown(reshape)}")
    else:
        return reshape, nodes[1:], node
    return None


def _row_wise_before(graph: gs.Graph, last: gs.Node) -> tuple[list[gs.Node], list[gs.Tensor]]:
    """`last` and the nodes before it that compute row by row and that nothing but these reads, in that order;
    and the tensors that they begin with."""
    nodes = [last]
    pending = [last.inputs[0]]
    while True:
        for tensor in pending:
            node = producer(tensor)
            if node is not None and _read_only_by(graph, node, nodes) and (rows := _rows_read(node)):
                break
        else:
            return nodes, pending
        nodes.append(node)
        made = IdentitySet(node.outputs)
        pending = list(IdentitySet(tensor for tensor in (*pending, *rows) if tensor not in made))


def _read_only_by(graph: gs.Graph, node: gs.Node, readers: list[gs.Node]) -> bool:
    """Whether nothing but these nodes reads what a node makes."""
    known = IdentitySet(readers)
    return not any(
        is_output(graph, tensor) or any(reader not in known for reader in tensor.outputs)
        for tensor in node.outputs
    )


def _rows_read(node: gs.Node) -> list[gs.Tensor]:
    """The inputs whose rows a node computes the same rows of its outputs from; none if it does not."""
    if is_op(node, *_ROW_WISE):
        chooses = node.op in ("GatherElements", "Split") and _along_rows(node)
        return [] if chooses else [node.inputs[0]]
    if not is_op(node, *_ELEMENT_WISE) or not (shape := node.outputs[0].shape):
        return []
    rows = [tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant)]
    constants = [tensor.shape for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    same = all(t.shape and len(t.shape) == len(shape) and t.shape[0] == shape[0] for t in rows)
    alike = all(len(sizes) < len(shape) or sizes[0] == 1 for sizes in constants)
    return rows if same and alike else []


def _along_rows(node: gs.Node) -> bool:
    """Whether a node chooses or cuts along axis 0, which may be counted from the end."""
    axis, shape = node.attrs.get("axis", 0), node.outputs[0].shape
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
    kept = {id(gathered): add("Gather", gathered, index, dtype=gathered.dtype, axis=0)}
    for node in nodes:
        for tensor in node.outputs:
            tensor.shape = None  # its rows are now the kept ones
        if node.op == "GatherElements" and id(chosen := node.inputs[1]) not in kept:
            kept[id(chosen)] = add("Gather", chosen, index, dtype=chosen.dtype, axis=0)
        for place, tensor in enumerate(node.inputs):
            node.inputs[place] = kept.get(id(tensor), tensor)
    known = static_shape(where.inputs[0])
    if known is not None and not any(map(is_batch, known)):
        zeros = gs.Constant(f"{prefix}/zeros", np.zeros([math.prod(known), *row], flat.dtype))
    else:
        inner = constant("inner", row)
        shape = add("Concat", add("Shape", keep, dtype=np.int64), inner, dtype=np.int64, axis=0)
        zero = gs.Constant("zero", np.zeros(1, flat.dtype))
        zeros = add("ConstantOfShape", shape, dtype=flat.dtype, value=zero)
    reshape.inputs[0] = add("ScatterND", zeros, rows, flat, dtype=flat.dtype)
