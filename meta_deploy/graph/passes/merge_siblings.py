"""Linear maps that read the same tensor become one, whose output is split: q, k and v; classes and boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import IdentitySet, fresh_names, is_op, made_in, own_nodes, static_shape, tidy
from meta_deploy.graph.linear import Linear, linear_of
from meta_deploy.graph.moves import chain_after
from meta_deploy.graph.prices import CPU, Cost


def merge_siblings(graph: gs.Graph, cost: Cost = CPU) -> int:
    """Join convolutions or products of one input and one geometry along their outputs' channels.

    Pattern: Conv (same kernel, strides, padding, dilations; one group), MatMul or Gemm over one tensor.
    Check: weights are constant; reading the input once less is worth more than the Split, where moves that
    follow each part are counted as joined too.

    Returns:
        Linear maps saved.
    """
    if graph.opset < 13:  # Split takes its sizes otherwise
        return 0
    tidy(graph)  # what no output needs is no sibling
    fresh = fresh_names(graph)
    inside = own_nodes(graph)
    changes = 0
    for x in [*graph.inputs, *made_in(graph)]:
        if len(x.outputs) < 2:
            continue
        groups: dict[tuple, list[Linear]] = {}
        for node in IdentitySet(x.outputs):
            if node not in inside or not is_op(node, "Conv", "MatMul", "Gemm"):
                continue
            linear = linear_of(graph, node)
            if linear is None or (linear.add is not None and linear.add not in inside):
                continue
            if linear.group == 1:
                groups.setdefault(_geometry(linear), []).append(linear)
        for group in groups.values():
            if len(group) < 2:
                continue
            if (reason := _against(graph, group, inside, cost)) is not None:
                declined(group[0].node, reason)
                continue
            _merge(graph, group, fresh)
            changes += len(group) - 1
    if changes:
        tidy(graph)
    return changes


def _geometry(linear: Linear) -> tuple:
    """What has to be the same for two linear maps of one input to be parts of one."""
    attrs = linear.node.attrs if linear.is_conv else {}  # Gemm's tell how the weights are stored, no more
    values = sorted((name, str(value)) for name, value in attrs.items())
    return (linear.node.op, linear.weight.shape[1:], *values)


def _against(graph: gs.Graph, group: Sequence[Linear], inside: IdentitySet, cost: Cost) -> str | None:
    """What speaks against one map and a Split: that they cost more; all do the same multiply-adds."""
    x = static_shape(group[0].x, batch=1)
    ys = [static_shape(linear.y, batch=1) for linear in group]
    if x is None or any(y is None for y in ys):
        unknown = [
            tensor for tensor in (group[0].x, *(linear.y for linear in group)) if not static_shape(tensor)
        ]
        return f"the shape of {shown(unknown[0])} is not known"
    moves = [[move for move in chain_after(graph, linear.y)[1] if move in inside] for linear in group]
    joined = sum(map(len, moves)) - max(map(len, moves))
    before = joined * cost.node
    for linear, y in zip(group, ys, strict=True):
        before += cost.of(0, x, y) + (cost.of(0, y, y) if linear.add is not None else 0.0)  # type: ignore[arg-type]
    both = cost.of(0, *ys, *ys)  # type: ignore[arg-type]
    biased = group[0].node.op == "MatMul" and any(linear.bias is not None for linear in group)
    after = cost.of(0, x, *ys) + both * (1 + biased)  # type: ignore[arg-type]
    if after < before:
        return None
    others = " and ".join(shown(linear.node) for linear in group[1:])
    return f"one map and a Split cost {after:.3g} multiply-adds, and with {others} apart it is {before:.3g}"


def _merge(graph: gs.Graph, group: Sequence[Linear], fresh: Callable[[str], str]) -> None:
    first, name = group[0], group[0].y.name
    outs = [linear.y for linear in group]
    shapes = [list(static_shape(y) or []) for y in outs]
    axis = 1 if first.is_conv else len(shapes[0]) - 1
    dtype = first.weight.dtype
    weight = np.concatenate([linear.weight for linear in group])
    biases = [np.zeros(linear.out_channels) if linear.bias is None else linear.bias for linear in group]
    bias = np.concatenate(biases) if any(linear.bias is not None for linear in group) else None
    for y in outs:
        y.inputs.clear()

    shape = [*shapes[0][:axis], weight.shape[0], *shapes[0][axis + 1 :]]
    joined = gs.Variable(fresh(f"{name}/joined"), outs[0].dtype, shape)
    node = first.node
    if node.op == "MatMul":
        weight = weight.T
    inputs = [first.x, gs.Constant(fresh(f"{name}/weight"), np.ascontiguousarray(weight, dtype))]
    vector = None if bias is None else gs.Constant(fresh(f"{name}/bias"), bias.astype(dtype))
    product = joined
    if vector is not None and node.op == "MatMul":
        product = gs.Variable(fresh(f"{name}/product"), outs[0].dtype, shape)
        graph.nodes.append(gs.Node("Add", vector.name, {}, [product, vector], [joined]))
    elif vector is not None:
        inputs.append(vector)
    attrs = {"transB": 1} if node.op == "Gemm" else dict(node.attrs)
    graph.nodes.append(gs.Node(node.op, joined.name, attrs, inputs, [product]))
    sizes = gs.Constant(fresh(f"{name}/sizes"), np.array([shape[axis] for shape in shapes], np.int64))
    graph.nodes.append(gs.Node("Split", fresh(f"{name}/split"), {"axis": axis}, [joined, sizes], outs))
