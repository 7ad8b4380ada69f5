"""Attention in a graph: MatMul, Softmax, MatMul over q, k and v of four axes. Found here, for all passes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from meta_deploy.graph.affine import MOST, RESHAPES, affine_before
from meta_deploy.graph.explain import declined, made_by, read_elsewhere, shown
from meta_deploy.graph.graph import constant_value, is_op, producer, sole_consumer, static_shape
from meta_deploy.graph.moves import Factors, chain_before, follow


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T * scale + bias + added) v.

    Attributes:
        q, k, v: (B, heads, N, d), before any scaling and transposing.
        scale: the factor on the products, 1 without one.
        last: the MatMul that makes the output (B, heads, N, d).
        k_transposed: k is (B, heads, d, N) instead, made by a Transpose of another order than that.
        head_scales: another factor on the products for each head, (heads); None where all are alike.
        bias: what is added to the scaled products, (B or 1, heads or 1, N, N); None without one. Where the
            batch is not known, B are the windows of one image, and each image has the same.
        added: computed tensors, whose sum is added to the scaled products reshaped to it: of all their
            elements, or, without a Reshape, (B or 1, heads or 1, N, N).
    """

    q: gs.Tensor
    k: gs.Tensor
    v: gs.Tensor
    scale: float
    last: gs.Node
    k_transposed: bool = False
    head_scales: np.ndarray | None = None
    bias: np.ndarray | None = None
    added: tuple[gs.Tensor, ...] = ()


def find_attention(graph: gs.Graph, softmax: gs.Node, fusing: bool = False) -> Attention | None:
    """The attention around a Softmax; tells why not where a MatMul reads it and there is none.

    Pattern: q, k and v (B, heads, N, d), the scale a constant on q, k or their product, or none. With
    `fusing`, what a fused operator takes as well: what is added to the products (a bias, a mask, with a
    Reshape between; constants or computed), a scale for each head, values of another width than the keys,
    float16, and q, k and v of three axes, (B, N, d), where there is one head, or of five, where there are
    windows, (B, windows, heads, N, d) or (B, heads, windows, N, d), and nothing is added.
    Check: nothing else reads what lies between, the softmax goes over the keys, sizes
    but the batch are known.
    """
    weights = softmax.outputs[0]
    last = next((n for n in weights.outputs if is_op(n, "MatMul") and n.inputs[0] is weights), None)
    if last is None:
        return None
    found = _attention(graph, softmax, last, fusing)
    if isinstance(found, str):
        declined(softmax, found)
        return None
    return found


def _attention(graph: gs.Graph, softmax: gs.Node, last: gs.Node, fusing: bool) -> Attention | str:
    """The attention that these two are of, or why they are of none."""
    rank = len(last.inputs[1].shape or ()) if fusing else 4
    axis = softmax.attrs.get("axis", -1 if graph.opset >= 13 else 1)
    if rank not in (3, 4, 5) or axis not in (-1, rank - 1):
        return f"the softmax goes over axis {axis}, not over the last of four"
    scores = _scores(graph, softmax.inputs[0], fusing)
    if isinstance(scores, str):
        return scores
    if rank == 5 and (scores.bias is not None or scores.added):
        return f"something is added to products of five axes, {shown(scores.product)}"
    matmul = producer(scores.product, "MatMul")
    if matmul is None:
        return f"{made_by(scores.product)}, not from the product of q and k"
    q, q_scale = _unscaled(graph, matmul.inputs[0])
    transposed, k_scale = _unscaled(graph, matmul.inputs[1])
    between = (softmax.outputs[0], last), (scores.product, scores.product.outputs[0]), (transposed, matmul)
    for tensor, reader in between:
        if not sole_consumer(graph, tensor):
            return read_elsewhere(graph, tensor, reader)
    untransposed = _untransposed(graph, transposed, rank)
    if untransposed is None and not _is_transposed(graph, transposed, rank):
        return f"{made_by(transposed)}, and is not a k of known shape with its last two axes swapped"
    k, k_before = (transposed, 1.0) if untransposed is None else _unscaled(graph, untransposed)
    v = last.inputs[1]
    shapes = [static_shape(tensor) for tensor in (q, k, v)]
    if untransposed is None:
        shapes[1] = [*shapes[1][:-2], shapes[1][-1], shapes[1][-2]]  # type: ignore[index]
    for name, tensor, shape in zip("qkv", (q, k, v), shapes, strict=True):
        if shape is None or len(shape) != rank or 0 in shape:
            return f"{name} is {shown(tensor)}, not of four known sizes"
    if q.dtype != np.float32 and not (fusing and q.dtype == np.float16):
        return f"q is of type {np.dtype(q.dtype)}, not float32"
    (*outer, n, d), keys, values = shapes  # type: ignore[misc]
    m, width = keys[-2], values[-1] if fusing else d  # type: ignore[index]
    if keys != [*outer, m, d] or values != [*outer, m, width]:
        return f"q {shown(q)}, k {shown(k)} and v {shown(v)} are not of one batch, heads and width"
    scale = float(np.float32(scores.scale * q_scale * k_scale * k_before))
    if not scale or not math.isfinite(scale):
        return f"the scale is {scale}"
    if scores.bias is not None and scores.bias.shape[-2:] != (n, m):
        return f"the bias {list(scores.bias.shape)} is not one for each query and key"
    return Attention(
        q, k, v, scale, last, untransposed is None, scores.head_scales, scores.bias, scores.added
    )


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


@dataclass(frozen=True)
class _Scores:
    """What the softmax reads: product * scale * head_scales + bias + added, as in `Attention`."""

    product: gs.Tensor
    scale: float
    head_scales: np.ndarray | None = None
    bias: np.ndarray | None = None
    added: tuple[gs.Tensor, ...] = ()


def _scores(graph: gs.Graph, tensor: gs.Tensor, fusing: bool) -> _Scores | str:
    """What a tensor is of the product of q and k, or why it is not told."""
    if not fusing:
        return _Scores(*_unscaled(graph, tensor))
    whole, (tensor, added) = tensor, _sum_before(graph, tensor)
    found = affine_before(graph, tensor)
    if found is None or (added and static_shape(found.start) != static_shape(whole)):
        return f"{made_by(tensor)}, and is not the product of q and k with constants of a known size"
    if added and found.addend.any():
        return f"to {shown(found.start)} both a constant and {shown(added[-1])} are added"
    shape = found.start.shape
    factor, addend = (_narrowed(array) for array in (found.factor, found.addend))
    if np.isnan(addend).any() or not np.isfinite(factor).all():
        return f"the constants on {shown(found.start)} are not finite"
    heads = factor.shape[1:2] if len(shape) == 4 else ()
    if factor.size > 1 and factor.shape != (1, *heads, 1, 1):
        return f"the scale {list(factor.shape)} on {shown(found.start)} is not one for each head"
    bias = None
    if addend.any():
        bias = np.broadcast_to(addend, (*addend.shape[:-2], *shape[-2:]))
        if bias.size > MOST:
            return f"the bias on {shown(found.start)} is too large to be written out"
        with np.errstate(over="ignore"):  # two masks of the least number are -inf together
            bias = bias.reshape(bias.shape[0], *bias.shape[1:-2] or (1,), *bias.shape[-2:]).astype(np.float32)
    if factor.size == 1:
        return _Scores(found.start, float(factor.item()), None, bias, added)
    return _Scores(found.start, 1.0, factor.reshape(-1).astype(np.float32), bias, added)


def _sum_before(graph: gs.Graph, tensor: gs.Tensor) -> tuple[gs.Tensor, tuple[gs.Tensor, ...]]:
    """The scaled product that a sum is of, and what is added to it, at least one computed; else the tensor.

    The sum may be of another shape than the product, by Reshapes before and after; then it takes all of its
    elements from what is added. Relative positions of Segment Anything are written so.
    """
    summed = _unreshaped(graph, tensor)
    shape, x, added = static_shape(summed), summed, list[gs.Tensor]()
    while (node := producer(x, "Add")) is not None and sole_consumer(graph, x):
        pairs = (node.inputs, node.inputs[::-1])
        found = next(
            (pair for pair in pairs if static_shape(pair[0]) == shape and _is_product(graph, pair[0])), None
        )
        if found is None:
            break
        x, other = found
        added.append(other)
    shapes = [static_shape(other) for other in added]
    if not shape or None in shapes or all(isinstance(other, gs.Constant) for other in added):
        return tensor, ()
    product = _unreshaped(graph, x)
    whole = list(np.broadcast_shapes((1,) * len(shape), *map(tuple, shapes)))  # type: ignore[arg-type]
    if static_shape(product) == shape:
        fits = whole[-2:] == shape[-2:] and all(a in (1, b) for a, b in zip(whole, shape, strict=True))
    else:
        fits = whole == shape
    return (product, tuple(added)) if fits else (tensor, ())


def _unreshaped(graph: gs.Graph, tensor: gs.Tensor) -> gs.Tensor:
    """What a tensor is before Reshapes, each read by the next alone."""
    while (node := producer(tensor)) is not None and is_op(node, *RESHAPES) and sole_consumer(graph, tensor):
        tensor = node.inputs[0]
    return tensor


def _is_product(graph: gs.Graph, tensor: gs.Tensor, depth: int = 8) -> bool:
    """Whether a tensor is a product with a computed one, but for scales, sums and Reshapes.

    A linear map has its constant on the right; on the left are queries that are learned.
    """
    node = producer(tensor)
    if node is None or not depth:
        return False
    if is_op(node, "MatMul"):
        return not isinstance(node.inputs[1], gs.Constant)
    if is_op(node, *RESHAPES):
        return _is_product(graph, node.inputs[0], depth - 1)
    if not is_op(node, "Add", "Mul", "Div"):
        return False
    shape = static_shape(tensor)
    alike = [x for x in node.inputs if not isinstance(x, gs.Constant) and static_shape(x) == shape]
    return any(_is_product(graph, x, depth - 1) for x in alike)


def _narrowed(array: np.ndarray) -> np.ndarray:
    """An array without repetition along the axes where all is the same."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if array.shape[axis] > 1 and (array == first).all():
            array = first
    return array


def _untransposed(graph: gs.Graph, tensor: gs.Tensor, rank: int) -> gs.Tensor | None:
    """What a tensor is before its last two axes change places; PyTorch does it with three axes at times."""
    _, chain = chain_before(graph, tensor)
    for i in range(len(chain))[::-1][:3]:
        start = chain[i].inputs[0]
        shape, factors = static_shape(start), follow(start, chain[i:])
        if shape is None or factors is None or len(shape) != rank:
            continue
        swapped = Factors(shape)
        swapped.transpose([*range(rank - 2), rank - 1, rank - 2])
        if factors.moves() == swapped.moves():
            return start
    return None


def _is_transposed(graph: gs.Graph, tensor: gs.Tensor, rank: int) -> bool:
    """Whether a Transpose, and moves after it, make a tensor of known sizes: another one costs nothing."""
    shape, (_, chain) = static_shape(tensor), chain_before(graph, tensor)
    return any(is_op(node, "Transpose") for node in chain) and shape is not None and len(shape) == rank


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
