"""The projection to q, k and v goes into ONNX Runtime's `Attention`, which writes each head where it is read.

An operator of ONNX Runtime's own (domain com.microsoft): for that target only. In 8 bits the product is worth
more apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.affine import RESHAPES
from meta_deploy.graph.explain import declined, made_by, read_elsewhere, shown
from meta_deploy.graph.graph import (
    CONTRIBUTED,
    IdentitySet,
    fresh_names,
    is_op,
    own_nodes,
    producer,
    sole_consumer,
    static_shape,
    tidy,
)
from meta_deploy.graph.linear import has_input, linear_from

_BIAS = 5  # the place of what is added to the products; of MultiHeadAttention's inputs and of Attention's


@dataclass(frozen=True)
class Projection:
    """q, k and v as one linear map of tokens x (B, N, C): weight (out, C), bias (out,)."""

    x: gs.Tensor
    weight: np.ndarray
    bias: np.ndarray


def pack_attention(graph: gs.Graph) -> int:
    """Replace MatMul, Add, Split and MultiHeadAttention by Attention.

    Pattern: q, k and v are the parts of a Split of the channels of tokens (B, N, C) times a constant matrix,
    of all channels or of each head's (with Reshapes before and after), or such products of the same tokens.
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


def _projection(graph: gs.Graph, node: gs.Node, inside: IdentitySet) -> Projection | str:
    """The linear map that makes q, k and v; or why there is none."""
    parts = node.inputs[:3]
    if any(has_input(node, place) for place in range(3, len(node.inputs)) if place != _BIAS):
        return f"{shown(node)} has a cache, or a mask of keys"
    if len(IdentitySet(parts)) < 3 or parts[0].shape[-1] != parts[1].shape[-1]:
        return f"q {shown(parts[0])}, k {shown(parts[1])} and v are not three tensors, two of one width"
    for tensor in parts:
        if not sole_consumer(graph, tensor):
            return read_elsewhere(graph, tensor, node)
    pieces = [_with_heads(graph, tensor, inside) for tensor in parts]
    maps: list[Projection] = []
    for piece in pieces:
        split = producer(piece, "Split")
        found = _of_part(graph, split, piece, pieces, inside) if split else _of_tokens(graph, piece, inside)
        if isinstance(found, str):
            return found
        maps.append(found)
    if any(each.x is not maps[0].x for each in maps):
        return f"q, k and v are not of the same tokens: {made_by(parts[0])}"
    return Projection(
        maps[0].x,
        np.concatenate([each.weight for each in maps]),
        np.concatenate([each.bias for each in maps]),
    )


def _with_heads(graph: gs.Graph, tensor: gs.Tensor, inside: IdentitySet) -> gs.Tensor:
    """What a tensor (B, N, C) is before a Reshape that merged heads and their channels, if one did."""
    node, shape = producer(tensor), static_shape(tensor)
    if node is None or not is_op(node, *RESHAPES) or node not in inside or not sole_consumer(graph, tensor):
        return tensor
    before = static_shape(node.inputs[0])
    return tensor if not before or not shape or before[:2] != shape[:2] else node.inputs[0]


def _of_part(
    graph: gs.Graph, split: gs.Node, part: gs.Tensor, parts: Sequence[gs.Tensor], inside: IdentitySet
) -> Projection | str:
    """The linear map of a part of a Split, which cuts channels or those of each head and makes no others."""
    packed = split.inputs[0]
    if split not in inside or any(all(out is not each for each in parts) for out in split.outputs):
        return f"q, k and v are not all the parts of one Split: {made_by(part)}"
    shape, tokens = static_shape(packed), _with_heads(graph, packed, inside)
    for tensor in (tokens, packed, part):
        if not sole_consumer(graph, tensor):
            return read_elsewhere(graph, tensor, tensor.outputs[0])
    axis = split.attrs.get("axis", 0) % max(len(shape or ()), 1)
    if not shape or axis < 2:
        return f"{shown(packed)} is not cut along the channels of tokens"
    whole = _of_tokens(graph, tokens, inside)
    if isinstance(whole, str):
        return whole
    ends = np.cumsum([int(tensor.shape[axis]) for tensor in split.outputs])
    channels = np.split(np.arange(len(whole.weight)).reshape(shape[2:]), ends[:-1], axis - 2)
    rows = next(rows for rows, out in zip(channels, split.outputs, strict=True) if out is part).reshape(-1)
    return Projection(whole.x, whole.weight[rows], whole.bias[rows])


def _of_tokens(graph: gs.Graph, y: gs.Tensor, inside: IdentitySet) -> Projection | str:
    """The linear map over tokens that makes a tensor; or why there is none."""
    linear, shape = linear_from(graph, y), static_shape(y)
    if linear is None or linear.node.op != "MatMul" or linear.node not in inside:
        return f"{made_by(y)}, not from tokens times a constant matrix"
    if shape is None or len(shape) != 3 or len(linear.x.shape or ()) != 3:
        return f"{shown(y)} is not of three known sizes"
    bias = np.zeros(linear.out_channels) if linear.bias is None else linear.bias
    return Projection(linear.x, linear.weight, bias)


def _rewrite(graph: gs.Graph, node: gs.Node, found: Projection, fresh: Callable[[str], str]) -> None:
    widths = [int(part.shape[-1]) for part in node.inputs[:3]]
    out, dtype, factors = node.outputs[0], found.weight.dtype, _factors(node, widths)
    values = {"weight": (found.weight * factors[:, None]).T, "bias": found.bias * factors}
    constants = [
        gs.Constant(fresh(f"{out.name}/{name}"), np.ascontiguousarray(array, dtype))
        for name, array in values.items()
    ]
    inputs = [found.x, *constants]
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
