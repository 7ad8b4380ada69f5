"""MatMul, Softmax, MatMul become ONNX Runtime's fused attention, which never holds the whole weight matrix.

`MultiHeadAttention` is an operator of ONNX Runtime's own (domain com.microsoft): for that target only.
"""

from __future__ import annotations

from collections.abc import Callable

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


def fuse_attention(graph: gs.Graph) -> int:
    """Replace softmax(q * scale @ k^T + bias) @ v of three or four axes by MultiHeadAttention.

    Pattern and check: see `find_attention`; the number of heads is known.
    Rewrite: heads move beside d, as the operator takes them, and back; `collapse-chains` joins these moves
    with the ones around. A scale for each head goes on q.

    Returns:
        Places changed.
    """
    fresh = fresh_names(graph)
    inside = own_nodes(graph)
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
            _rewrite(graph, found, fresh)
            changes += 1
    if changes:
        import_domain(graph, CONTRIBUTED)
        tidy(graph)
    return changes


def _rewrite(graph: gs.Graph, found: Attention, fresh: Callable[[str], str]) -> None:
    out = found.last.outputs[0]
    q = found.q if found.head_scales is None else _scaled(graph, found, fresh)
    named = ("q", q, False), ("k", found.k, found.k_transposed), ("v", found.v, False)
    inputs = [_joined(graph, f"{out.name}/{name}", x, swapped, fresh) for name, x, swapped in named]
    if found.bias is not None:  # in the place after those of a bias of q, k and v, and of a mask of keys
        bias = gs.Constant(fresh(f"{out.name}/bias"), found.bias.astype(q.dtype))
        inputs += [gs.Variable.empty(), gs.Variable.empty(), bias]
    (b, *heads, n, _), width = static_shape(q), static_shape(found.v)[-1]  # type: ignore[misc, index]
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


def _scaled(graph: gs.Graph, found: Attention, fresh: Callable[[str], str]) -> gs.Tensor:
    """q with each head multiplied by its scale."""
    assert found.head_scales is not None
    out = found.last.outputs[0].name
    scales = gs.Constant(fresh(f"{out}/scales"), found.head_scales.reshape(-1, 1, 1).astype(found.q.dtype))
    scaled = gs.Variable(fresh(f"{out}/scaled"), found.q.dtype, found.q.shape)
    graph.nodes.append(gs.Node("Mul", scaled.name, {}, [found.q, scales], [scaled]))
    return scaled


def _joined(
    graph: gs.Graph, name: str, x: gs.Tensor, swapped: bool, fresh: Callable[[str], str]
) -> gs.Tensor:
    """(B, heads, N, d) -> (B, N, heads * d); `swapped`: x has N and d the other way round; or no heads."""
    shape = static_shape(x)
    assert shape is not None
    if len(shape) == 3 and not swapped:
        return x
    order = {(3, True): [0, 2, 1], (4, False): [0, 2, 1, 3], (4, True): [0, 3, 1, 2]}[len(shape), swapped]
    sizes = [shape[axis] for axis in order]
    moved = gs.Variable(fresh(f"{name}/moved"), x.dtype, sizes)
    add_move(graph, "Transpose", order, x, moved, fresh)
    if len(shape) == 3:
        return moved
    b, n, h, d = sizes
    joined = gs.Variable(fresh(f"{name}/joined"), x.dtype, [b, n, h * d])
    add_move(graph, "Reshape", [b, n, h * d], moved, joined, fresh)
    return joined
