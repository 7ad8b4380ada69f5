"""MatMul, Softmax, MatMul become ONNX Runtime's fused attention, which never holds the whole weight matrix.

`MultiHeadAttention` is an operator of ONNX Runtime's own (domain com.microsoft): for that target only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from meta_deploy.graph.attention import Attention, find_attention
from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import fresh_names, is_batch, is_op, own_nodes, static_shape, tidy
from meta_deploy.graph.moves import add_move

DOMAIN = "com.microsoft"


def fuse_attention(graph: gs.Graph) -> int:
    """Replace softmax(q * scale @ k^T + bias) @ v of four axes by MultiHeadAttention.

    Pattern and check: see `find_attention`; the number of heads is known.
    Rewrite: heads move beside d, as the operator takes them, and back; `collapse-chains` joins these moves
    with the ones around.

    Returns:
        Places changed.
    """
    fresh = fresh_names(graph)
    inside = own_nodes(graph)
    changes = 0
    for node in list(graph.nodes):
        found = find_attention(graph, node, biased=True) if is_op(node, "Softmax") else None
        if found is None:
            continue
        if found.last not in inside:
            declined(node, "it is used inside a branch or a loop")
        elif is_batch(found.q.shape[1]):
            declined(node, f"the number of heads of {shown(found.q)} is not known")
        else:
            _rewrite(graph, found, fresh)
            changes += 1
    if changes:
        graph.import_domains = _with_domain(graph)
        tidy(graph)
    return changes


def _rewrite(graph: gs.Graph, found: Attention, fresh: Callable[[str], str]) -> None:
    out = found.last.outputs[0]
    b, h, n, d = static_shape(found.q)  # type: ignore[misc]
    k_order = (0, 3, 1, 2) if found.k_transposed else (0, 2, 1, 3)
    named = (("q", found.q, (0, 2, 1, 3)), ("k", found.k, k_order), ("v", found.v, (0, 2, 1, 3)))
    inputs = [_joined(graph, f"{out.name}/{name}", x, order, fresh) for name, x, order in named]
    if found.bias is not None:  # in the place after those of a bias of q, k and v, and of a mask of keys
        full = found.bias.values.reshape([1] * (4 - found.bias.values.ndim) + list(found.bias.values.shape))
        bias = gs.Constant(fresh(f"{out.name}/bias"), full)
        inputs += [gs.Variable.empty(), gs.Variable.empty(), bias]
    joined = gs.Variable(fresh(f"{out.name}/joined"), np.float32, [b, n, h * d])
    attributes = {"num_heads": h, "scale": found.scale}
    graph.nodes.append(
        gs.Node("MultiHeadAttention", joined.name, attributes, inputs, [joined], domain=DOMAIN)
    )
    split = gs.Variable(fresh(f"{out.name}/split"), np.float32, [b, n, h, d])
    found.last.outputs.clear()
    out.shape = [b, h, n, d]
    add_move(graph, "Reshape", [b, n, h, d], joined, split, fresh)
    add_move(graph, "Transpose", [0, 2, 1, 3], split, out, fresh)


def _joined(
    graph: gs.Graph, name: str, x: gs.Tensor, order: Sequence[int], fresh: Callable[[str], str]
) -> gs.Tensor:
    """(B, heads, N, d), or what `order` makes (B, N, heads, d) of -> (B, N, heads * d)."""
    b, n, h, d = (static_shape(x)[axis] for axis in order)  # type: ignore[index]
    moved = gs.Variable(fresh(f"{name}/moved"), x.dtype, [b, n, h, d])
    joined = gs.Variable(fresh(f"{name}/joined"), x.dtype, [b, n, h * d])
    add_move(graph, "Transpose", list(order), x, moved, fresh)
    add_move(graph, "Reshape", [b, n, h * d], moved, joined, fresh)
    return joined


def _with_domain(graph: gs.Graph) -> list:
    """The graph's operator sets, the fused operator's among them."""
    domains = list(graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)])
    if all(domain.domain != DOMAIN for domain in domains):
        domains.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return domains
