"""A Concat that another Concat reads becomes part of that, through a Transpose too: every part moves once."""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, read_elsewhere, shown
from meta_deploy.graph.graph import fresh_names, is_op, producer, sole_consumer, static_shape, tidy
from meta_deploy.graph.moves import Move, add_move, chain_before, fewest, permutation


def flatten_concats(graph: gs.Graph) -> int:
    """Put the parts of an inner Concat into the outer one.

    Pattern: Concat, maybe a Transpose, Concat; along one axis, as the Transpose has it.
    Check: nothing else reads between; the parts' own Transposes, which collapse_chains joins with those that
    take the place of the one between, are then no more in number. That needs known shapes.

    Returns:
        Concats removed.
    """
    tidy(graph)  # in order: an inner Concat has all its parts when an outer one takes them
    fresh = fresh_names(graph)
    changes = 0
    for node in graph.nodes[:]:
        while is_op(node, "Concat") and _flatten(graph, node, fresh):
            changes += 1
    if changes:
        tidy(graph)
    return changes


def _flatten(graph: gs.Graph, outer: gs.Node, fresh: Callable[[str], str]) -> bool:
    """Open the first input of a Concat that can be opened."""
    for index, tensor in enumerate(outer.inputs):
        if (parts := _parts(graph, outer, tensor, fresh)) is not None:
            # Inputs are set anew: graph-surgeon keeps the readers of each.
            outer.inputs = [*outer.inputs[:index], *parts, *outer.inputs[index + 1 :]]
            return True
    return False


def _parts(
    graph: gs.Graph, outer: gs.Node, tensor: gs.Tensor, fresh: Callable[[str], str]
) -> list[gs.Tensor] | None:
    """What an input of a Concat is put together from, in the order of the Concat's axes."""
    shape, between = tensor.shape, [tensor]
    if shape is None:
        return None
    axis, perm = outer.attrs["axis"] % len(shape), None
    if (transpose := producer(tensor, "Transpose")) is not None:
        perm = permutation(transpose)
        axis, tensor = perm[axis], transpose.inputs[0]
        between.append(tensor)
    inner = producer(tensor, "Concat")
    if inner is None:
        return None
    reason = _against(graph, outer, between, inner, axis, perm)
    if reason is not None:
        declined(inner, reason)
        return None
    parts = list(inner.inputs)
    inner.inputs.clear()  # it is no reader any more
    return parts if perm is None else [_transposed(graph, part, perm, fresh) for part in parts]


def _against(
    graph: gs.Graph,
    outer: gs.Node,
    between: list[gs.Tensor],
    inner: gs.Node,
    axis: int,
    perm: list[int] | None,
) -> str | None:
    """Why an inner Concat, and maybe a Transpose, do not become part of the outer one; None if they do."""
    for tensor in between:
        if not sole_consumer(graph, tensor):
            return read_elsewhere(graph, tensor, *tensor.outputs[:1])
    if inner.attrs["axis"] % len(between[0].shape) != axis:
        return f"it is along axis {inner.attrs['axis']}, and {shown(outer)} along what is axis {axis} here"
    if perm is None:
        return None
    if unknown := [part for part in inner.inputs if static_shape(part) is None]:
        return f"the shape of {shown(unknown[0])} is not known"
    if (added := sum(_transposes_added(graph, part, perm) for part in inner.inputs)) > 1:
        return f"{added} Transposes of its parts would take the place of {shown(between[0].inputs[0])}"
    return None


def _transposes_added(graph: gs.Graph, part: gs.Tensor, perm: list[int]) -> int:
    """How many Transposes more it takes, once chains are collapsed, to permute a part too."""
    start, chain = chain_before(graph, part) if sole_consumer(graph, part) else (part, [])
    shapes = [static_shape(tensor) for tensor in (start, *(node.outputs[0] for node in chain))]
    if any(shape is None or 0 in shape for shape in shapes):  # then a chain stays as it is
        return 1
    first, *rest = (shape for shape in shapes if shape is not None)
    moves: list[Move] = []
    for node, shape in zip(chain, rest, strict=True):
        reshape = "Reshape", shape, shape
        moves.append(("Transpose", permutation(node), shape) if node.op == "Transpose" else reshape)
    last = (first, *rest)[-1]
    more = [*moves, ("Transpose", perm, [last[p] for p in perm])]
    before, after = (sum(op == "Transpose" for op, _, _ in fewest(first, plan)) for plan in (moves, more))
    return after - before


def _transposed(graph: gs.Graph, x: gs.Tensor, perm: list[int], fresh: Callable[[str], str]) -> gs.Tensor:
    out = gs.Variable(fresh(f"{x.name}/part"), x.dtype, [x.shape[p] for p in perm])
    add_move(graph, "Transpose", perm, x, out, fresh)
    return out
