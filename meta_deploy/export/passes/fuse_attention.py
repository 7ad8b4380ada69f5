"""MatMul, Softmax, MatMul become ONNX Runtime's fused attention, which never holds the whole weight matrix.

`MultiHeadAttention` is an operator of ONNX Runtime's own (domain com.microsoft): for that target only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from meta_deploy.export.passes.chains import Factors, add_move, chain_before, follow
from meta_deploy.export.passes.graph import (
    constant_value,
    fresh_names,
    is_op,
    producer,
    sole_consumer,
    static_shape,
    tidy,
)

DOMAIN = "com.microsoft"


def fuse_attention(graph: gs.Graph) -> int:
    """Replace softmax(q * scale @ k^T) @ v of four axes by MultiHeadAttention.

    Pattern: q, k and v (B, heads, N, d), the scale a constant on q, k or their product, or none.
    Check: nothing else reads what lies between, the softmax goes over the keys, shapes are known.
    Rewrite: heads move beside d, as the operator takes them, and back; `collapse-chains` joins these moves
    with the ones around.

    Returns:
        Places changed.
    """
    fresh = fresh_names(graph)
    inside = {id(node) for node in graph.nodes}  # and not in a branch or a loop's body
    changes = 0
    for node in list(graph.nodes):
        if is_op(node, "Softmax") and (found := _match(graph, node)) and id(found[-1]) in inside:
            _rewrite(graph, *found, fresh)
            changes += 1
    if changes:
        graph.import_domains = _with_domain(graph)
        tidy(graph)
    return changes


Attention = tuple[gs.Tensor, gs.Tensor, gs.Tensor, float, gs.Node]  # q, k, v, scale, the last MatMul


def _match(graph: gs.Graph, softmax: gs.Node) -> Attention | None:
    weights = softmax.outputs[0]
    axis = softmax.attrs.get("axis", -1 if graph.opset >= 13 else 1)
    if axis not in (-1, 3) or not sole_consumer(graph, weights):
        return None
    last = weights.outputs[0]
    if not is_op(last, "MatMul") or last.inputs[0] is not weights:
        return None
    product, scale = _unscaled(graph, softmax.inputs[0])
    matmul = producer(product, "MatMul")
    if matmul is None or not sole_consumer(graph, product):
        return None
    q, q_scale = _unscaled(graph, matmul.inputs[0])
    transposed, k_scale = _unscaled(graph, matmul.inputs[1])
    k, v = _untransposed(graph, transposed), last.inputs[1]
    if k is None or not sole_consumer(graph, transposed):
        return None
    shapes = [static_shape(tensor) for tensor in (q, k, v)]
    if any(shape is None or len(shape) != 4 or 0 in shape for shape in shapes) or q.dtype != np.float32:
        return None
    (b, h, _, d), keys, values = shapes  # type: ignore[misc]
    if keys != values or keys[:2] != [b, h] or keys[3] != d:  # type: ignore[index]
        return None
    scale = float(np.float32(scale * q_scale * k_scale))
    return (q, k, v, scale, last) if scale and math.isfinite(scale) else None  # 0 says default


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


def _rewrite(
    graph: gs.Graph,
    q: gs.Tensor,
    k: gs.Tensor,
    v: gs.Tensor,
    scale: float,
    last: gs.Node,
    fresh: Callable[[str], str],
) -> None:
    out = last.outputs[0]
    b, h, n, d = static_shape(q)  # type: ignore[misc]
    named = (("q", q), ("k", k), ("v", v))
    inputs = [_joined(graph, f"{out.name}/{name}", x, fresh) for name, x in named]
    joined = gs.Variable(fresh(f"{out.name}/joined"), np.float32, [b, n, h * d])
    attributes = {"num_heads": h, "scale": scale}
    graph.nodes.append(
        gs.Node("MultiHeadAttention", joined.name, attributes, inputs, [joined], domain=DOMAIN)
    )
    split = gs.Variable(fresh(f"{out.name}/split"), np.float32, [b, n, h, d])
    last.outputs.clear()
    out.shape = [b, h, n, d]
    add_move(graph, "Reshape", [b, n, h, d], joined, split, fresh)
    add_move(graph, "Transpose", [0, 2, 1, 3], split, out, fresh)


def _joined(graph: gs.Graph, name: str, x: gs.Tensor, fresh: Callable[[str], str]) -> gs.Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    b, h, n, d = static_shape(x)  # type: ignore[misc]
    moved = gs.Variable(fresh(f"{name}/moved"), x.dtype, [b, n, h, d])
    joined = gs.Variable(fresh(f"{name}/joined"), x.dtype, [b, n, h * d])
    add_move(graph, "Transpose", [0, 2, 1, 3], x, moved, fresh)
    add_move(graph, "Reshape", [b, n, h * d], moved, joined, fresh)
    return joined


def _with_domain(graph: gs.Graph) -> list:
    """The graph's operator sets, the fused operator's among them."""
    domains = list(graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)])
    if all(domain.domain != DOMAIN for domain in domains):
        domains.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return domains
