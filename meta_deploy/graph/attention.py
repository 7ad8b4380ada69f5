"""Attention in a graph: MatMul, Softmax, MatMul over q, k and v of four axes. Found here, for all passes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, made_by, read_elsewhere, shown
from meta_deploy.graph.graph import constant_value, is_op, producer, sole_consumer, static_shape
from meta_deploy.graph.moves import Factors, chain_before, follow


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T * scale + bias) v.

    Attributes:
        q, k, v: (B, heads, N, d), before any scaling and transposing.
        scale: the factor on the products, 1 without one.
        last: the MatMul that makes the output (B, heads, N, d).
        k_transposed: k is (B, heads, d, N) instead, made by a Transpose of another order than that.
        bias: a constant that is added to the scaled products, (B or 1, heads or 1, N, N), of which leading
            axes of one may be missing; None without one.
    """

    q: gs.Tensor
    k: gs.Tensor
    v: gs.Tensor
    scale: float
    last: gs.Node
    k_transposed: bool = False
    bias: gs.Constant | None = None


def find_attention(graph: gs.Graph, softmax: gs.Node, biased: bool = False) -> Attention | None:
    """The attention around a Softmax; tells why not where a MatMul reads it and there is none.

    Pattern: q, k and v (B, heads, N, d), the scale a constant on q, k or their product, or none; with
    `biased`, also an Add of a constant bias or mask.
    Check: nothing else reads what lies between, the softmax goes over the keys, sizes
    but the batch are known.
    """
    weights = softmax.outputs[0]
    last = next((n for n in weights.outputs if is_op(n, "MatMul") and n.inputs[0] is weights), None)
    if last is None:
        return None
    found = _attention(graph, softmax, last, biased)
    if isinstance(found, str):
        declined(softmax, found)
        return None
    return found


def _attention(graph: gs.Graph, softmax: gs.Node, last: gs.Node, biased: bool) -> Attention | str:
    """The attention that these two are of, or why they are of none."""
    axis = softmax.attrs.get("axis", -1 if graph.opset >= 13 else 1)
    if axis not in (-1, 3):
        return f"the softmax goes over axis {axis}, not over the last of four"
    scores, bias = _unbiased(graph, softmax.inputs[0]) if biased else (softmax.inputs[0], None)
    product, scale = _unscaled(graph, scores)
    matmul = producer(product, "MatMul")
    if matmul is None:
        return f"{made_by(product)}, not from the product of q and k"
    q, q_scale = _unscaled(graph, matmul.inputs[0])
    transposed, k_scale = _unscaled(graph, matmul.inputs[1])
    for tensor, reader in ((softmax.outputs[0], last), (product, product.outputs[0]), (transposed, matmul)):
        if not sole_consumer(graph, tensor):
            return read_elsewhere(graph, tensor, reader)
    untransposed = _untransposed(graph, transposed)
    if untransposed is None and not _is_transposed(transposed):
        return f"{made_by(transposed)}, and is not a k of known shape with its last two axes swapped"
    k, k_before = (transposed, 1.0) if untransposed is None else _unscaled(graph, untransposed)
    v = last.inputs[1]
    shapes = [static_shape(tensor) for tensor in (q, k, v)]
    if untransposed is None:
        shapes[1] = [shapes[1][a] for a in (0, 1, 3, 2)]  # type: ignore[index]
    for name, tensor, shape in zip("qkv", (q, k, v), shapes, strict=True):
        if shape is None or len(shape) != 4 or 0 in shape:
            return f"{name} is {shown(tensor)}, not of four known sizes"
    if q.dtype != np.float32:
        return f"q is of type {np.dtype(q.dtype)}, not float32"
    (b, h, n, d), keys, values = shapes  # type: ignore[misc]
    if keys != values or keys[:2] != [b, h] or keys[3] != d:  # type: ignore[index]
        return f"q {shown(q)}, k {shown(k)} and v {shown(v)} are not of one batch, heads and width"
    scale = float(np.float32(scale * q_scale * k_scale * k_before))
    if not scale or not math.isfinite(scale):
        return f"the scale is {scale}"
    if bias is not None and not isinstance(bias, gs.Constant):
        return f"{made_by(bias)}, and fusing pays with a constant bias alone"
    if bias is not None and not _fits(bias, [b, h, n, keys[2]]):  # type: ignore[index]
        return f"the bias {shown(bias)} is not one for each query and key"
    return Attention(q, k, v, scale, last, untransposed is None, bias)


def packed_input(graph: gs.Graph, found: Attention) -> gs.Node | None:
    """The Split that makes q, k and v, in this order and nothing else; tells why not."""
    split, parts = producer(found.q, "Split"), (found.q, found.k, found.v)
    if split is None or len(split.outputs) != 3 or any(split.outputs[i] is not parts[i] for i in range(3)):
        declined(found.last, f"q, k and v are not the three parts of one Split: {made_by(found.q)}")
        return None
    for tensor in parts:
        if not sole_consumer(graph, tensor):
            declined(found.last, read_elsewhere(graph, tensor, tensor.outputs[0]))
            return None
    if not static_shape(split.inputs[0]):
        declined(found.last, f"the shape of {shown(split.inputs[0])} is not known")
        return None
    return split


def attention_count(proto: onnx.ModelProto) -> int:
    """How often softmax(..) v occurs in a model, in any type."""
    softmaxes = {node.output[0] for node in proto.graph.node if node.op_type == "Softmax"}
    return sum(node.op_type == "MatMul" and node.input[0] in softmaxes for node in proto.graph.node)


def _untransposed(graph: gs.Graph, tensor: gs.Tensor) -> gs.Tensor | None:
    """What a tensor is before its last two axes change places; PyTorch does it with three axes at times."""
    _, chain = chain_before(graph, tensor)
    for i in range(len(chain))[::-1][:3]:
        start = chain[i].inputs[0]
        shape, factors = static_shape(start), follow(start, chain[i:])
        if shape is None or factors is None or len(shape) != 4:
            continue
        swapped = Factors(shape)
        swapped.transpose([0, 1, 3, 2])
        if factors.moves() == swapped.moves():
            return start
    return None


def _is_transposed(tensor: gs.Tensor) -> bool:
    """Whether a Transpose makes a tensor of four known sizes: another one after it costs nothing."""
    shape = static_shape(tensor)
    return producer(tensor, "Transpose") is not None and shape is not None and len(shape) == 4


def _unbiased(graph: gs.Graph, tensor: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor | None]:
    """The products of q and k before a bias is added to them, and the bias; (tensor, None) where none is."""
    add = producer(tensor, "Add")
    if add is not None and sole_consumer(graph, tensor):
        for scores, bias in (add.inputs, add.inputs[::-1]):
            if producer(_unscaled(graph, scores)[0], "MatMul") is not None:
                return scores, bias
    return tensor, None


def _fits(bias: gs.Tensor, scores: list[int]) -> bool:
    """Whether a bias has a number for each query and key, for all images and heads alike or for each."""
    shape = static_shape(bias)
    if shape is None or len(shape) > 4:
        return False
    full = [1] * (4 - len(shape)) + shape
    return full[2:] == scores[2:] and all(s in (1, size) for s, size in zip(full, scores, strict=True))


def _unscaled(graph: gs.Graph, tensor: gs.Tensor) -> tuple[gs.Tensor, float]:
    """What a tensor is before a constant multiplies it, and the constant; (tensor, 1) where none does."""
    node = producer(tensor)
    if node is None or not is_op(node, "Mul", "Div") or not sole_consumer(graph, tensor):
        return tensor, 1.0
    for x, factor in (node.inputs, node.inputs[::-1])[: 2 if node.op == "Mul" else 1]:
        value = constant_value(factor)
        shape = static_shape(x)
        # A number with more axes than x would give it those.
        if value is not None and value.size == 1 and value.item() and shape and shape == static_shape(tensor):
            number = float(value.item())
            return x, number if node.op == "Mul" else 1 / number
    return tensor, 1.0
