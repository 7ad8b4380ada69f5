"""MatMul, Softmax, MatMul become ONNX Runtime's fused attention, which never holds the whole weight matrix.

`MultiHeadAttention` is an operator of ONNX Runtime's own (domain com.microsoft): for that target only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.attention import Attention, find_attention
from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import (
    CONTRIBUTED,
    fresh_names,
    import_domain,
    is_batch,
    is_op,
    own_nodes,
    static_shape,
    tidy,
)
from meta_deploy.graph.moves import add_move
from meta_deploy.graph.rowwise import node_places, transposed


def fuse_attention(graph: gs.Graph) -> int:
    """Replace softmax(q * scale @ k^T + bias) @ v of three or four axes by MultiHeadAttention.

    Pattern and check: see `find_attention`; the number of heads is known.
    Rewrite: heads move beside d, as the operator takes them, and back; `collapse-chains` joins these moves
    with the ones around, to which they go past norms of q and k. A scale for each head goes on q.

    Returns:
        Places changed.
    """
    fresh = fresh_names(graph)
    inside, places = own_nodes(graph), node_places(graph)
    changes = 0
    for node in list(graph.nodes):
        found = find_attention(graph, node, fusing=True) if is_op(node, "Softmax") else None
        if found is None:
            continue
        if found.last not in inside:
            declined(node, "it is used inside a branch or a loop")
        elif is_batch(found.q.shape[1]):
            declined(node, f"the number of heads of {shown(found.q)} is not known")
        else:
            _rewrite(graph, found, places, fresh)
            changes += 1
    if changes:
        import_domain(graph, CONTRIBUTED)
        tidy(graph)
    return changes


def _rewrite(graph: gs.Graph, found: Attention, places: dict[int, int], fresh: Callable[[str], str]) -> None:
    out, q, k, v = found.last.outputs[0], found.q, found.k, found.v
    (b, *heads, n, _), width = static_shape(q), static_shape(v)[-1]  # type: ignore[misc, index]
    if found.k_transposed:
        order = [*range(len(k.shape) - 2), len(k.shape) - 1, len(k.shape) - 2]
        swapped = gs.Variable(fresh(f"{out.name}/k/swapped"), k.dtype, [k.shape[axis] for axis in order])
        add_move(graph, "Transpose", order, k, swapped, fresh)
        k = swapped
    inputs = [q, k, v]
    if heads:
        q, k, v = (transposed(graph, x, (0, 2, 1, 3), places, fresh) for x in inputs)
        q = q if found.head_scales is None else _scaled(graph, q, found.head_scales, fresh)
        inputs = [_joined(graph, x, fresh) for x in (q, k, v)]
    if found.bias is not None:  # in the place after those of a bias of q, k and v, and of a mask of keys
        bias = gs.Constant(fresh(f"{out.name}/bias"), found.bias.astype(q.dtype))
        inputs += [gs.Variable.empty(), gs.Variable.empty(), bias]
    h = heads[0] if heads else 1
    attributes = {"num_heads": h, "scale": found.scale}
    found.last.outputs.clear()
    joined = gs.Variable(fresh(f"{out.name}/joined"), q.dtype, [b, n, h * width]) if heads else out
    graph.nodes.append(
        gs.Node("MultiHeadAttention", joined.name, attributes, inputs, [joined], domain=CONTRIBUTED)
    )
    out.shape = [b, *heads, n, width]
    if heads:
        split = gs.Variable(fresh(f"{out.name}/split"), q.dtype, [b, n, h, width])
        add_move(graph, "Reshape", [b, n, h, width], joined, split, fresh)
        add_move(graph, "Transpose", [0, 2, 1, 3], split, out, fresh)


def _scaled(graph: gs.Graph, q: gs.Tensor, scales: np.ndarray, fresh: Callable[[str], str]) -> gs.Tensor:
    """q (B, N, heads, d) with each head multiplied by its scale."""
    constant = gs.Constant(fresh(f"{q.name}/scales"), scales.reshape(-1, 1).astype(q.dtype))
    scaled = gs.Variable(fresh(f"{q.name}/scaled"), q.dtype, q.shape)
    graph.nodes.append(gs.Node("Mul", scaled.name, {}, [q, constant], [scaled]))
    return scaled


def _joined(graph: gs.Graph, x: gs.Tensor, fresh: Callable[[str], str]) -> gs.Tensor:
    """(B, N, heads, d) -> (B, N, heads * d)."""
    b, n, h, d = x.shape
    joined = gs.Variable(fresh(f"{x.name}/joined"), x.dtype, [b, n, h * d])
    add_move(graph, "Reshape", [b, n, h * d], x, joined, fresh)
    return joined
