"""MatMul, Softmax, MatMul become ONNX Runtime's fused attention, which never holds the whole weight matrix.

`MultiHeadAttention` is an operator of ONNX Runtime's own (domain com.microsoft): for that target only.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from meta_deploy.export.passes.graph import constant_value, producer, sole_consumer, static_shape

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
    changes = 0
    for node in list(graph.nodes):
        if node.op == "Softmax" and (found := _match(graph, node)):
            _rewrite(graph, *found)
            changes += 1
    if changes:
        graph.import_domains = _with_domain(graph)
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return changes


Attention = tuple[gs.Tensor, gs.Tensor, gs.Tensor, float, gs.Node]  # q, k, v, scale, the last MatMul


def _match(graph: gs.Graph, softmax: gs.Node) -> Attention | None:
    weights = softmax.outputs[0]
    if softmax.attrs.get("axis", -1) not in (-1, 3) or not sole_consumer(graph, weights):
        return None
    last = weights.outputs[0]
    if last.op != "MatMul" or last.inputs[0] is not weights:
        return None
    product, scale = _unscaled(graph, softmax.inputs[0])
    matmul = producer(product, "MatMul")
    if matmul is None or not sole_consumer(graph, product):
        return None
    q, q_scale = _unscaled(graph, matmul.inputs[0])
    transposed, k_scale = _unscaled(graph, matmul.inputs[1])
    transpose = producer(transposed, "Transpose")
    if (
        transpose is None
        or transpose.attrs.get("perm") != [0, 1, 3, 2]
        or not sole_consumer(graph, transposed)
    ):
        return None
    k, v = transpose.inputs[0], last.inputs[1]
    shapes = [static_shape(tensor) for tensor in (q, k, v)]
    if any(shape is None or len(shape) != 4 for shape in shapes) or q.dtype != np.float32:
        return None
    (b, h, _, d), keys, values = shapes  # type: ignore[misc]
    if keys != values or keys[:2] != [b, h] or keys[3] != d:  # type: ignore[index]
        return None
    return q, k, v, scale * q_scale * k_scale, last


def _unscaled(graph: gs.Graph, tensor: gs.Tensor) -> tuple[gs.Tensor, float]:
    """What a tensor is before a constant multiplies it, and the constant; (tensor, 1) where none does."""
    node = producer(tensor)
    if node is None or node.op not in ("Mul", "Div") or not sole_consumer(graph, tensor):
        return tensor, 1.0
    for x, factor in (node.inputs, node.inputs[::-1])[: 2 if node.op == "Mul" else 1]:
        value = constant_value(factor)
        if value is not None and value.size == 1 and value.item() != 0:
            number = float(value.item())
            return x, number if node.op == "Mul" else 1 / number
    return tensor, 1.0


def _rewrite(graph: gs.Graph, q: gs.Tensor, k: gs.Tensor, v: gs.Tensor, scale: float, last: gs.Node) -> None:
    out = last.outputs[0]
    b, h, n, d = static_shape(q)  # type: ignore[misc]
    inputs = [_joined(graph, f"{out.name}/{name}", x) for name, x in (("q", q), ("k", k), ("v", v))]
    joined = gs.Variable(f"{out.name}/joined", np.float32, [b, n, h * d])
    attributes = {"num_heads": h, "scale": scale}
    graph.nodes.append(
        gs.Node("MultiHeadAttention", joined.name, attributes, inputs, [joined], domain=DOMAIN)
    )
    split = gs.Variable(f"{out.name}/split", np.float32, [b, n, h, d])
    shape = gs.Constant(f"{split.name}/shape", np.array([b, n, h, d], np.int64))
    last.outputs.clear()
    out.shape = [b, h, n, d]
    graph.nodes.append(gs.Node("Reshape", split.name, {}, [joined, shape], [split]))
    graph.nodes.append(gs.Node("Transpose", f"{out.name}/heads", {"perm": [0, 2, 1, 3]}, [split], [out]))


def _joined(graph: gs.Graph, name: str, x: gs.Tensor) -> gs.Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    b, h, n, d = static_shape(x)  # type: ignore[misc]
    moved = gs.Variable(f"{name}/moved", x.dtype, [b, n, h, d])
    joined = gs.Variable(f"{name}/joined", x.dtype, [b, n, h * d])
    shape = gs.Constant(f"{name}/shape", np.array([b, n, h * d], np.int64))
    graph.nodes.append(gs.Node("Transpose", moved.name, {"perm": [0, 2, 1, 3]}, [x], [moved]))
    graph.nodes.append(gs.Node("Reshape", joined.name, {}, [moved, shape], [joined]))
    return joined


def _with_domain(graph: gs.Graph) -> list:
    """The graph's operator sets, the fused operator's among them."""
    domains = list(graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)])
    if all(domain.domain != DOMAIN for domain in domains):
        domains.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return domains
