"""MatMul, Softmax, MatMul become ONNX Runtime's fused attention, which never holds the whole weight matrix.

`MultiHeadAttention` is an operator of ONNX Runtime's own (domain com.microsoft): for that target only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.affine import MOST
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
from meta_deploy.graph.moves import add_move, chain_before, fewest, moves_of
from meta_deploy.graph.rowwise import node_places, transposed


def fuse_attention(graph: gs.Graph) -> int:
    """Replace softmax(q * scale @ k^T + bias) @ v of three to five axes by MultiHeadAttention.

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
        elif any(map(is_batch, found.q.shape[1 : max(2, len(found.q.shape) - 2)])):
            declined(node, f"the number of heads of {shown(found.q)} is not known")
        elif _too_large(found):
            declined(node, f"{shown(found.q)} has windows without heads, or their biases are too large")
        else:
            _rewrite(graph, found, places, fresh)
            changes += 1
    if changes:
        import_domain(graph, CONTRIBUTED)
        tidy(graph)
    return changes


def _rewrite(graph: gs.Graph, found: Attention, places: dict[int, int], fresh: Callable[[str], str]) -> None:
    if found.k_transposed:
        k = found.k
        order = [*range(len(k.shape) - 2), len(k.shape) - 1, len(k.shape) - 2]
        swapped = gs.Variable(fresh(f"{k.name}/swapped"), k.dtype, [k.shape[axis] for axis in order])
        add_move(graph, "Transpose", order, k, swapped, fresh)
        found = replace(found, k=swapped, k_transposed=False)
    if len(found.q.shape) == 5:
        found = _of_four_axes(graph, found, fresh)
    out, q, k, v = found.last.outputs[0], found.q, found.k, found.v
    (b, *heads, n, _), width = static_shape(q), static_shape(v)[-1]  # type: ignore[misc, index]
    inputs, windows, h = [q, k, v], _windows(found), heads[0] if heads else 1
    bias = _bias(graph, found, windows, fresh)  # first, as norms of q may become those of q transposed
    if heads:
        q, k, v = (transposed(graph, x, (0, 2, 1, 3), places, fresh) for x in inputs)
        q = q if found.head_scales is None else _scaled(graph, q, found.head_scales, fresh)
        inputs = [_joined(graph, x, windows, fresh) for x in (q, k, v)]
    if bias is not None:  # in the place after those of a bias of q, k and v, and of a mask of keys
        inputs += [gs.Variable.empty(), gs.Variable.empty(), bias]
    attributes = {"num_heads": windows * h, "scale": found.scale}
    found.last.outputs.clear()
    sizes = [b // windows, n, windows * h * width]
    joined = gs.Variable(fresh(f"{out.name}/joined"), q.dtype, sizes) if heads else out
    graph.nodes.append(
        gs.Node("MultiHeadAttention", joined.name, attributes, inputs, [joined], domain=CONTRIBUTED)
    )
    out.shape = [b, *heads, n, width]
    if windows > 1:
        _apart(graph, joined, [b // windows, n, windows, h, width], (0, 2, 3, 1, 4), out, fresh)
    elif heads:
        _apart(graph, joined, [b, n, h, width], (0, 2, 1, 3), out, fresh)


def _of_four_axes(graph: gs.Graph, found: Attention, fresh: Callable[[str], str]) -> Attention:
    """The same of q, k and v (B * windows, heads, N, d): of the axes of windows and heads in any order.

    Which of them are heads does not matter to the result: those with which fewer moves are left.
    """
    axis = min((2, 1), key=lambda axis: sum(_moves_to(graph, x, axis) for x in (found.q, found.k, found.v)))
    perm = [0, 3 - axis, axis, 3, 4]
    q, k, v = (_windowed(graph, x, perm, fresh) for x in (found.q, found.k, found.v))
    out = found.last.outputs[0]
    b, windows, heads, n = (found.q.shape[i] for i in perm[:4])
    width = found.v.shape[-1]
    joined = gs.Variable(fresh(f"{out.name}/windows"), out.dtype, [b * windows, heads, n, width])
    found.last.outputs.clear()
    found.last.outputs.append(joined)
    out.shape = [found.q.shape[0], *found.q.shape[1:4], width]
    apart = [b, windows, heads, n, width]
    if axis == 2:
        add_move(graph, "Reshape", apart, joined, out, fresh)
    else:
        _apart(graph, joined, apart, tuple(perm), out, fresh)
    return replace(found, q=q, k=k, v=v)


def _moves_to(graph: gs.Graph, x: gs.Tensor, axis: int) -> int:
    """How many moves lead to a tensor of five axes as tokens, their heads, which are this axis, merged."""
    start, chain = chain_before(graph, x)
    b, windows, heads, n, d = (x.shape[i] for i in (0, 3 - axis, axis, 3, 4))
    perm, moved, joined = [0, 3 - axis, 3, axis, 4], [b, windows, n, heads, d], [b * windows, n, heads * d]
    moves = moves_of(start, chain) or []
    return len(
        fewest(static_shape(start) or [], [*moves, ("Transpose", perm, moved), ("Reshape", joined, joined)])
    )


def _windowed(graph: gs.Graph, x: gs.Tensor, perm: list[int], fresh: Callable[[str], str]) -> gs.Tensor:
    """(B, windows, heads, N, d), permuted so, as (B * windows, heads, N, d)."""
    moved = x
    if perm != sorted(perm):
        moved = gs.Variable(fresh(f"{x.name}/windows"), x.dtype, [x.shape[axis] for axis in perm])
        add_move(graph, "Transpose", perm, x, moved, fresh)
    b, windows, *rest = moved.shape
    joined = gs.Variable(fresh(f"{x.name}/joined"), x.dtype, [b * windows, *rest])
    add_move(graph, "Reshape", list(joined.shape), moved, joined, fresh)
    return joined


def _bias(graph: gs.Graph, found: Attention, windows: int, fresh: Callable[[str], str]) -> gs.Tensor | None:
    """What is added to the products, (B or 1, heads or 1, N, M); None where nothing is."""
    name, dtype, bias = f"{found.last.outputs[0].name}/bias", found.q.dtype, found.bias
    if bias is not None:
        if windows > 1:
            heads = found.q.shape[1]
            bias = np.broadcast_to(bias, (windows, heads, *bias.shape[2:])).reshape(1, -1, *bias.shape[2:])
        return gs.Constant(fresh(name), bias.astype(dtype))
    if not found.added:
        return None
    total, *others = found.added
    for other in others:
        shape = list(np.broadcast_shapes(tuple(total.shape), tuple(other.shape)))
        out = gs.Variable(fresh(f"{name}/sum"), dtype, shape)
        graph.nodes.append(gs.Node("Add", out.name, {}, [total, other], [out]))
        total = out
    b, heads, n, m = _four(found, total)
    if list(total.shape) == [b, heads, n, m]:
        return total
    out = gs.Variable(fresh(name), dtype, [b, heads, n, m])
    add_move(graph, "Reshape", list(out.shape), total, out, fresh)
    return out


def _four(found: Attention, total: gs.Tensor) -> list[int]:
    """The shape of what is added as the operator takes it, of four axes."""
    weights = list(found.last.inputs[0].shape)
    rank, shape = len(weights), list(total.shape)
    if math.prod(shape) != math.prod(weights):  # it is broadcast over the batch or the heads
        weights = [1] * (rank - len(shape)) + shape
    return weights if rank == 4 else [weights[0], 1, *weights[1:]]


def _windows(found: Attention) -> int:
    """How many windows of an image count as so many times the heads.

    A bias of each window has to be a constant for all images, however many there are.
    """
    return len(found.bias) if found.bias is not None and is_batch(found.q.shape[0]) else 1


def _too_large(found: Attention) -> bool:
    """Whether windows cannot count as heads."""
    windows, bias = _windows(found), found.bias
    if windows == 1 or bias is None:
        return False
    return len(found.q.shape) < 4 or windows * found.q.shape[1] * math.prod(bias.shape[2:]) > MOST


def _apart(
    graph: gs.Graph,
    x: gs.Tensor,
    shape: list[int],
    perm: tuple[int, ...],
    out: gs.Tensor,
    fresh: Callable[[str], str],
) -> None:
    """Cut x into axes, and permute these; merged again where that is of more axes than `out`."""
    split = gs.Variable(fresh(f"{out.name}/split"), out.dtype, shape)
    add_move(graph, "Reshape", shape, x, split, fresh)
    moved = out
    if len(perm) > len(out.shape):
        moved = gs.Variable(fresh(f"{out.name}/moved"), out.dtype, [shape[axis] for axis in perm])
        add_move(graph, "Reshape", list(out.shape), moved, out, fresh)
    add_move(graph, "Transpose", list(perm), split, moved, fresh)


def _scaled(graph: gs.Graph, q: gs.Tensor, scales: np.ndarray, fresh: Callable[[str], str]) -> gs.Tensor:
    """q (B, N, heads, d) with each head multiplied by its scale."""
    constant = gs.Constant(fresh(f"{q.name}/scales"), scales.reshape(-1, 1).astype(q.dtype))
    scaled = gs.Variable(fresh(f"{q.name}/scaled"), q.dtype, q.shape)
    graph.nodes.append(gs.Node("Mul", scaled.name, {}, [q, constant], [scaled]))
    return scaled


def _joined(graph: gs.Graph, x: gs.Tensor, windows: int, fresh: Callable[[str], str]) -> gs.Tensor:
    """(B * windows, N, heads, d) -> (B, N, windows * heads * d)."""
    b, n, h, d = x.shape
    joined = gs.Variable(fresh(f"{x.name}/joined"), x.dtype, [b // windows, n, windows * h * d])
    if windows > 1:
        moved = gs.Variable(fresh(f"{x.name}/windows"), x.dtype, [b // windows, n, windows, h, d])
        _apart(graph, x, [b // windows, windows, n, h, d], (0, 2, 1, 3, 4), moved, fresh)
        x = moved
    add_move(graph, "Reshape", list(joined.shape), x, joined, fresh)
    return joined
