"""The projection to q, k and v goes into ONNX Runtime's `Attention`, which writes each head where it is read.

An operator of ONNX Runtime's own (domain com.microsoft): for that target only. In 8 bits the product is worth
more apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, made_by, read_elsewhere, shown
from meta_deploy.graph.graph import (
    CONTRIBUTED,
    IdentitySet,
    fresh_names,
    own_nodes,
    producer,
    sole_consumer,
    static_shape,
    tidy,
)
from meta_deploy.graph.linear import Linear, has_input, linear_from

_BIAS = 5  # the place of what is added to the products; of MultiHeadAttention's inputs and of Attention's


def pack_attention(graph: gs.Graph) -> int:
    """Replace MatMul, Add, Split and MultiHeadAttention by Attention.

    Pattern: q, k and v are the parts of a Split of the channels of tokens (B, N, C) times a constant matrix.
    Check: nothing else reads what lies between; the attention has no other inputs than these and a bias.

    Returns:
        Attentions changed.
    """
    fresh, inside = fresh_names(graph), own_nodes(graph)
    changes = 0
    for node in list(graph.nodes):
        if node.op != "MultiHeadAttention" or node.domain != CONTRIBUTED or node not in inside:
            continue
        found = _projection(graph, node, inside)
        if isinstance(found, str):
            declined(node, found)
            continue
        _rewrite(graph, node, found, fresh)
        changes += 1
    if changes:
        tidy(graph)
    return changes


def _projection(graph: gs.Graph, node: gs.Node, inside: IdentitySet) -> Linear | str:
    """The linear map that q, k and v are parts of; or why they are of none."""
    parts, split = node.inputs[:3], producer(node.inputs[0], "Split")
    if any(has_input(node, place) for place in range(3, len(node.inputs)) if place != _BIAS):
        return f"{shown(node)} has a cache, or a mask of keys"
    if split is None or split not in inside or len(IdentitySet([*parts, *split.outputs])) != 3:
        return f"q, k and v are not the three parts of one Split: {made_by(node.inputs[0])}"
    for tensor in (split.inputs[0], *parts):
        if not sole_consumer(graph, tensor):
            return read_elsewhere(graph, tensor, *tensor.outputs[:1])
    packed = split.inputs[0]
    linear, shape = linear_from(graph, packed), static_shape(packed)
    if shape is None or len(shape) != 3 or split.attrs.get("axis", 0) % 3 != 2:
        return f"{shown(packed)} is not of three known sizes, or not cut along the last"
    if linear is None or linear.node.op != "MatMul" or len(linear.x.shape or ()) != 3:
        return f"{made_by(packed)}, not from tokens times a constant matrix"
    if parts[0].shape[-1] != parts[1].shape[-1] or linear.node not in inside:
        return f"q {shown(parts[0])} and k {shown(parts[1])} are not of one width"
    return linear


def _rewrite(graph: gs.Graph, node: gs.Node, linear: Linear, fresh: Callable[[str], str]) -> None:
    split, parts = producer(node.inputs[0], "Split"), node.inputs[:3]
    assert split is not None
    ends = np.cumsum([0, *(int(tensor.shape[-1]) for tensor in split.outputs)])
    places = [next(i for i, tensor in enumerate(split.outputs) if tensor is part) for part in parts]
    order = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in places])
    widths = [int(part.shape[-1]) for part in parts]
    bias = np.zeros(linear.out_channels) if linear.bias is None else linear.bias
    out, dtype, factors = node.outputs[0], linear.weight.dtype, _factors(node, widths)
    values = {"weight": (linear.weight[order] * factors[:, None]).T, "bias": bias[order] * factors}
    constants = [
        gs.Constant(fresh(f"{out.name}/{name}"), np.ascontiguousarray(array, dtype))
        for name, array in values.items()
    ]
    inputs = [linear.x, *constants]
    if has_input(node, _BIAS):
        inputs += [gs.Variable.empty(), gs.Variable.empty(), node.inputs[_BIAS]]
    attributes = {"num_heads": node.attrs["num_heads"], "qkv_hidden_sizes": widths}
    node.outputs.clear()
    graph.nodes.append(gs.Node("Attention", node.name, attributes, inputs, [out], domain=CONTRIBUTED))


def _factors(node: gs.Node, widths: list[int]) -> np.ndarray:
    """What q, k and v are multiplied by, so that the scale is the operator's own: 1 / sqrt(width of a head).

    OpenVINO's reader of the operator knows no other.
    """
    own = 1 / math.sqrt(widths[0] / node.attrs["num_heads"])
    factor = node.attrs.get("scale", own) / own
    factors = np.ones(sum(widths))
    if not math.isclose(factor, 1, rel_tol=1e-6):
        factors[: widths[0]] = factor
    return factors
