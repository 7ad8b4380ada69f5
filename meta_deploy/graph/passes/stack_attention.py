"""Attentions of one shape that stand side by side run as one of a larger batch: fewer, fuller kernels.

The two directions of a cross-shaped attention are such on a square map. All sizes but the batch must be
known.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.attention import Attention, find_attention, packed_input
from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import (
    IdentitySet,
    fresh_names,
    is_op,
    own_nodes,
    producer,
    sole_consumer,
    static_shape,
    tidy,
)
from meta_deploy.graph.moves import add_move, chain_after, chain_before


def stack_attention(graph: gs.Graph) -> int:
    """Join attentions that start from parts of one tensor, along their batch axis.

    Pattern: the outputs of one node, moves, Split into q, k and v, attention; two or more times.
    Check: shapes and scale are the same, so is the Split; only moves lie between, so that none of the
    attentions waits for another.
    Rewrite: one Concat before the attention and one Split behind; the last Reshapes before the one and the
    first behind the other are done together too, where they are alike.

    Returns:
        Attentions saved.
    """
    fresh = fresh_names(graph)
    inside = own_nodes(graph)
    groups: dict[tuple, list[tuple[Attention, gs.Node]]] = {}
    for node in graph.nodes:
        if not is_op(node, "Softmax") or (found := find_attention(graph, node)) is None:
            continue
        split = packed_input(graph, found)
        if split is None or split.attrs.get("axis", 0) % 4 == 0 or found.last not in inside:
            continue
        packed = split.inputs[0]
        start, chain = chain_before(graph, packed)
        source = producer(start)
        if source is None or not sole_consumer(graph, packed) or not _waits_for_one([*chain, split]):
            declined(node, f"more than moves lie between {shown(packed)} and the node that it comes from")
            continue
        shape, parts = static_shape(packed) or [], [part.shape for part in split.outputs]
        key = (id(source), *shape, split.attrs["axis"] % 4, str(parts), found.scale, packed.dtype)
        groups.setdefault(key, []).append((found, split))
    stacked = [group for group in groups.values() if len(group) > 1]
    sources = [key[0] for key in groups]
    for key, ((found, split), *others) in groups.items():
        if not others and sources.count(key[0]) > 1:
            packed = shown(split.inputs[0])
            declined(
                found.last, f"no other attention of the same source has the shapes and scale of {packed}"
            )
    for group in stacked:
        _stack(graph, group, inside, fresh)
    if stacked:
        tidy(graph)
    return sum(len(group) - 1 for group in stacked)


def _waits_for_one(nodes: list[gs.Node]) -> bool:
    """Whether nodes read one tensor each and constants, not a shape that another attention may give."""
    return all(isinstance(tensor, gs.Constant) for node in nodes for tensor in node.inputs[1:])


def _stack(
    graph: gs.Graph, group: list[tuple[Attention, gs.Node]], inside: IdentitySet, fresh: Callable[[str], str]
) -> None:
    (first, split), count = group[0], len(group)
    outs = [found.last.outputs[0] for found, _ in group]
    packed = _concat(graph, [node.inputs[0] for _, node in group], fresh)
    for out in outs:
        out.inputs.clear()
    q, k, v = (_like(tensor, count, fresh) for tensor in (first.q, first.k, first.v))
    graph.nodes.append(
        gs.Node("Split", fresh(f"{q.name}/split"), dict(split.attrs), [packed, *split.inputs[1:]], [q, k, v])
    )
    _split(graph, _attend(graph, q, k, v, first.scale, fresh), outs, inside, fresh)


def _attend(
    graph: gs.Graph, q: gs.Tensor, k: gs.Tensor, v: gs.Tensor, scale: float, fresh: Callable[[str], str]
) -> gs.Tensor:
    """softmax(q k^T * scale) v in plain operators."""
    (b, h, n, d), m = static_shape(q), static_shape(k)[2]  # type: ignore[misc, index]

    def new(name: str, shape: list[int]) -> gs.Variable:
        return gs.Variable(fresh(f"{q.name}/{name}"), q.dtype, shape)

    if scale != 1:
        scaled = new("scaled", [b, h, n, d])
        factor = gs.Constant(fresh(f"{q.name}/scale"), np.array(scale, q.dtype))
        graph.nodes.append(gs.Node("Mul", scaled.name, {}, [q, factor], [scaled]))
        q = scaled
    keys, products = new("keys", [b, h, d, m]), new("products", [b, h, n, m])
    weights, out = new("weights", [b, h, n, m]), new("out", [b, h, n, d])
    add_move(graph, "Transpose", [0, 1, 3, 2], k, keys, fresh)
    graph.nodes.append(gs.Node("MatMul", products.name, {}, [q, keys], [products]))
    graph.nodes.append(gs.Node("Softmax", weights.name, {"axis": -1}, [products], [weights]))
    graph.nodes.append(gs.Node("MatMul", out.name, {}, [weights, v], [out]))
    return out


def _like(tensor: gs.Tensor, count: int, fresh: Callable[[str], str]) -> gs.Variable:
    """A tensor of the same kind with so many times the entries along its first axis."""
    return gs.Variable(
        fresh(f"{tensor.name}/stacked"), tensor.dtype, [count * tensor.shape[0], *tensor.shape[1:]]
    )


def _concat(graph: gs.Graph, tensors: list[gs.Tensor], fresh: Callable[[str], str]) -> gs.Tensor:
    """Join tensors of one shape along axis 0, before the Reshapes that make them if these are alike."""
    makers = [producer(tensor, "Reshape") for tensor in tensors]
    sources = [node.inputs[0] for node in makers if node is not None]
    shape = static_shape(sources[0]) if sources else None
    if len(sources) == len(tensors) and shape and all(static_shape(s) == shape for s in sources):
        joined = _concat(graph, sources, fresh)
        out = _like(tensors[0], len(tensors), fresh)
        add_move(graph, "Reshape", list(out.shape), joined, out, fresh)
        return out
    out = _like(tensors[0], len(tensors), fresh)
    graph.nodes.append(gs.Node("Concat", out.name, {"axis": 0}, list(tensors), [out]))
    return out


def _split(
    graph: gs.Graph,
    stacked: gs.Tensor,
    outs: list[gs.Tensor],
    inside: IdentitySet,
    fresh: Callable[[str], str],
) -> None:
    """The inverse of `_concat`: behind the Reshapes that follow the parts if these are alike."""
    readers = [node for out in outs for node in chain_after(graph, out)[1][:1]]
    firsts = [node.outputs[0] for node in readers if is_op(node, "Reshape") and node in inside]
    shape = static_shape(firsts[0]) if firsts else None
    if len(firsts) == len(outs) and shape and all(static_shape(t) == shape for t in firsts):
        moved = _like(firsts[0], len(outs), fresh)
        add_move(graph, "Reshape", list(moved.shape), stacked, moved, fresh)
        for tensor in firsts:
            tensor.inputs.clear()
        _split(graph, moved, firsts, inside, fresh)
        return
    parts = {"num_outputs": len(outs)} if graph.opset >= 18 else {}  # before, equal parts are the default
    graph.nodes.append(
        gs.Node("Split", fresh(f"{stacked.name}/parts"), {"axis": 0, **parts}, [stacked], outs)
    )
