"""Rotary positions of queries and keys become ONNX Runtime's RotaryEmbedding (Su et al., arXiv:2104.09864).

However an exporter writes the rotation, each number that comes out is the sum of two that go in, with
constant factors. These are computed; if they are cosines and sines of pairs (class tokens: 1 and 0), they
become the operator's tables. It is ONNX Runtime's own (domain com.microsoft): for that target only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, made_by, shown
from meta_deploy.graph.graph import (
    CONTRIBUTED,
    constant_value,
    fresh_names,
    import_domain,
    is_batch,
    is_op,
    own_nodes,
    producer,
    static_shape,
    tidy,
)
from meta_deploy.graph.moves import Factors, add_move, chain_before, follow, permutation
from meta_deploy.graph.rowwise import node_places, regions_before

_MOST = 2**22  # numbers of a tensor that is rotated
_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
_KNOWN = (*_RESHAPES, "Transpose", "Slice", "Split", "Concat", "Neg", "Mul", "Add", "Sub")

Terms = list[tuple[np.ndarray, np.ndarray]]  # factors, and which of the start's numbers they multiply


@dataclass(frozen=True)
class Rotation:
    """x with each head's pairs of numbers turned.

    Attributes:
        start: x, (B, heads, N, d), or (B, N, heads, d).
        order: what makes (B, N, heads, d) of it.
        cos, sin: (N, d / 2) in float64.
        interleaved: pairs are neighbours; else d / 2 apart.
    """

    start: gs.Tensor
    order: tuple[int, ...]
    cos: np.ndarray
    sin: np.ndarray
    interleaved: bool


def fuse_rotary(graph: gs.Graph) -> int:
    """Replace the rotation of a MultiHeadAttention's q or k by RotaryEmbedding.

    Pattern: moves that join the heads, before them Slices, Splits, Concats, Negs, products with constants
    and sums, all of one tensor of the same shape.
    Check: what they compute is a rotation of pairs, the same for all images and heads.

    Returns:
        Rotations replaced.
    """
    fresh, inside = fresh_names(graph), own_nodes(graph)
    places = node_places(graph)
    tables: dict[tuple, gs.Tensor] = {}
    changes = 0
    for node in list(graph.nodes):
        if node.op != "MultiHeadAttention" or node.domain != CONTRIBUTED or node not in inside:
            continue
        for i in (0, 1):
            found = _rotation(graph, node.inputs[i], places)
            if isinstance(found, str):
                declined(node, found)
            elif found is not None:
                node.inputs[i] = _write(graph, found, node.inputs[i], tables, fresh)
                changes += 1
    if changes:
        import_domain(graph, CONTRIBUTED)
        tidy(graph)
    return changes


def _rotation(graph: gs.Graph, joined: gs.Tensor, places: dict[int, int]) -> Rotation | str | None:
    """The rotation before the moves that join heads; why not, where there is something like it; or None."""
    first, chain = chain_before(graph, joined)
    if producer(first, "Concat") is None and producer(first, "Add") is None:
        return None
    # What writes the rotation may end in a Reshape, too.
    tensors = first, *(node.outputs[0] for node in chain)
    orders = [_order(tensor, chain[i:]) for i, tensor in enumerate(tensors)]
    y, order = next(((y, order) for y, order in zip(tensors, orders, strict=True) if order), (first, None))
    region = _region(y, places)
    if region is None:
        return None
    if order is None:
        return f"the moves from {shown(y)} to {shown(joined)} do more than join the heads"
    start, nodes = region
    shape = static_shape(y, 1)
    if shape is None or math.prod(shape) > _MOST or shape[-1] % 2 or y.dtype not in (np.float32, np.float16):
        return f"{shown(y)} is not of a known shape, of an even width, or too large"
    terms = _evaluated(start, y, nodes)
    if terms is None:
        return f"{made_by(y)}, which is not computed of {shown(start)} with constants in a known way"
    for interleaved in (True, False):
        tables = _tables(terms, shape, order, interleaved)
        if tables is not None:
            return Rotation(start, order, *tables, interleaved)
    return f"{made_by(y)}, which is no rotation of pairs of {shown(start)}, the same for all heads"


def _order(y: gs.Tensor, chain: list[gs.Node]) -> tuple[int, ...] | None:
    """What makes (B, N, heads, d) of a tensor, of which a chain of moves makes (B, N, heads * d)."""
    shape, factors = static_shape(y), follow(y, chain)
    if shape is None or len(shape) != 4 or factors is None or is_batch(shape[1]) or is_batch(shape[2]):
        return None
    for order in ((0, 2, 1, 3), (0, 1, 2, 3)):
        b, n, h, d = (shape[axis] for axis in order)
        wanted = Factors(shape)
        wanted.transpose(order)
        if wanted.reshape([b, n, h * d]) and wanted.moves() == factors.moves():
            return order
    return None


def _region(y: gs.Tensor, places: dict[int, int]) -> tuple[gs.Tensor, list[gs.Node]] | None:
    """The nearest tensor of its shape that all of `y` is computed of, by a sum, and the nodes between."""
    found = regions_before(y, _KNOWN, places)
    return next(((x, nodes) for x, nodes in found if any(is_op(n, "Add", "Sub") for n in nodes)), None)


# --- what is computed -------------------------------------------------------------------------------------


def _evaluated(start: gs.Tensor, y: gs.Tensor, nodes: list[gs.Node]) -> Terms | None:
    """`y` as sums of the start's numbers with factors, by `nodes` in reverse; None where one is not known."""
    shape = static_shape(start, 1)
    if shape is None:
        return None
    known: dict[int, Terms] = {
        id(start): [(np.ones(shape), np.arange(math.prod(shape), dtype=np.int32).reshape(shape))]
    }
    for node in nodes[::-1]:
        outputs = _outputs(node, known)
        if outputs is None:
            return None
        for tensor, terms in zip(node.outputs, outputs, strict=True):
            if any(list(factors.shape) != static_shape(tensor, 1) for factors, _ in terms):
                return None
            known[id(tensor)] = terms
    return known[id(y)]


def _outputs(node: gs.Node, known: dict[int, Terms]) -> list[Terms] | None:
    """The terms of each output of a node."""
    inputs = [known.get(id(tensor)) for tensor in node.inputs]
    if is_op(node, "Add", "Sub"):
        a, b = inputs
        if a is None or b is None:
            return None
        return [[*a, *((-factors if node.op == "Sub" else factors, taken) for factors, taken in b)]]
    if is_op(node, "Mul"):
        x, constant = (inputs[0], node.inputs[1]) if inputs[0] is not None else (inputs[1], node.inputs[0])
        value = constant_value(constant)
        if x is None or value is None:
            return None
        return [[(factors * value.astype(np.float64), taken) for factors, taken in x]]
    if is_op(node, "Concat"):
        return _concat(node, inputs)
    if inputs[0] is None:
        return None
    if is_op(node, "Neg"):
        return [[(-factors, taken) for factors, taken in inputs[0]]]
    moves = _moves(node)
    if moves is None:
        return None
    return [[(move(factors), move(taken)) for factors, taken in inputs[0]] for move in moves]


def _concat(node: gs.Node, inputs: list[Terms | None]) -> list[Terms] | None:
    """Parts side by side; one of fewer terms has others with factors of zero."""
    parts = [part for part in inputs if part is not None]
    if len(parts) < len(inputs):
        return None
    count, axis = max(map(len, parts)), node.attrs["axis"]
    full: list[Terms] = []
    for part in parts:
        factors, taken = part[0]
        full.append(part + [(np.zeros_like(factors), taken)] * (count - len(part)))
    joined: Terms = []
    for column in zip(*full, strict=True):
        joined.append(
            (np.concatenate([f for f, _ in column], axis), np.concatenate([t for _, t in column], axis))
        )
    return [joined]


def _moves(node: gs.Node) -> list[Callable[[np.ndarray], np.ndarray]] | None:
    """What makes each output of a node that only takes and moves numbers; None where that is not constant."""
    shapes = [static_shape(tensor, 1) for tensor in node.outputs]
    if any(shape is None for shape in shapes):
        return None
    if is_op(node, *_RESHAPES):
        return [lambda array: array.reshape(shapes[0])]
    if is_op(node, "Transpose"):
        return [lambda array: array.transpose(permutation(node))]
    if is_op(node, "Split"):
        axis = node.attrs.get("axis", 0)
        ends = np.cumsum([shape[axis] for shape in shapes if shape is not None])
        return [functools.partial(_part, ends=ends[:-1], axis=axis, i=i) for i in range(len(shapes))]
    numbers = [constant_value(tensor) for tensor in node.inputs[1:]]
    if not is_op(node, "Slice") or len(numbers) < 2 or any(number is None for number in numbers):
        return None
    starts, ends, *others = (number.tolist() for number in numbers if number is not None)
    axes = others[0] if others else range(len(starts))
    steps = others[1] if len(others) > 1 else [1] * len(starts)
    if min(steps) < 1:
        return None
    taken = dict(zip(axes, map(slice, starts, ends, steps), strict=True))

    def cut(array: np.ndarray) -> np.ndarray:
        rank = array.ndim
        slices = {axis % rank: part for axis, part in taken.items()}
        return array[tuple(slices.get(axis, slice(None)) for axis in range(rank))]

    return [cut]


def _part(array: np.ndarray, ends: np.ndarray, axis: int, i: int) -> np.ndarray:
    return np.split(array, ends, axis)[i]


def _tables(
    terms: Terms, shape: list[int], order: tuple[int, ...], interleaved: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """(cos, sin), each (N, d / 2), of a rotation; None where the terms are none of such pairs."""
    d = shape[-1]
    rows = np.arange(0, math.prod(shape), d, dtype=np.int32).reshape(*shape[:-1], 1)
    channels = np.arange(d)
    partners = channels ^ 1 if interleaved else (channels + d // 2) % d
    own, other = np.zeros(shape), np.zeros(shape)
    for factors, taken in terms:
        channel = taken - rows
        own += np.where(channel == channels, factors, 0)
        other += np.where(channel == partners, factors, 0)
        if factors[(channel != channels) & (channel != partners)].any():
            return None
    own, other = own.transpose(order), other.transpose(order)  # (B, N, heads, d)
    if (own != own[:1, :, :1]).any() or (other != other[:1, :, :1]).any():
        return None
    c, s = own[0, :, 0], other[0, :, 0]
    first, second = (slice(0, d, 2), slice(1, d, 2)) if interleaved else (slice(0, d // 2), slice(d // 2, d))
    if (c[:, first] != c[:, second]).any() or (s[:, first] != -s[:, second]).any():
        return None
    return c[:, first], s[:, second]


# --- what is written --------------------------------------------------------------------------------------


def _write(
    graph: gs.Graph,
    found: Rotation,
    joined: gs.Tensor,
    tables: dict[tuple, gs.Tensor],
    fresh: Callable[[str], str],
) -> gs.Tensor:
    """The operator on the start with its heads joined; what it makes. Equal `tables` are there once."""
    b, n, h, d = (found.start.shape[axis] for axis in found.order)
    x, name, dtype = found.start, joined.name, joined.dtype

    def table(values: np.ndarray) -> gs.Tensor:
        array = np.ascontiguousarray(values, dtype)
        key = array.dtype, array.shape, array.tobytes()
        return tables.setdefault(key, gs.Constant(fresh(f"{name}/table"), array))

    if found.order != (0, 1, 2, 3):
        moved = gs.Variable(fresh(f"{name}/moved"), dtype, [b, n, h, d])
        add_move(graph, "Transpose", list(found.order), x, moved, fresh)
        x = moved
    plain = gs.Variable(fresh(f"{name}/plain"), dtype, [b, n, h * d])
    add_move(graph, "Reshape", [b, n, h * d], x, plain, fresh)
    rotated = gs.Variable(fresh(f"{name}/rotated"), dtype, [b, n, h * d])
    if (b, n) not in tables:  # OpenVINO mistakes the shorter form, where one number stands for all
        tables[b, n] = _positions(graph, plain, fresh)
    inputs = [plain, tables[b, n], table(found.cos), table(found.sin)]
    attributes = {"interleaved": int(found.interleaved), "num_heads": h}
    graph.nodes.append(
        gs.Node("RotaryEmbedding", rotated.name, attributes, inputs, [rotated], domain=CONTRIBUTED)
    )
    return rotated


def _positions(graph: gs.Graph, x: gs.Tensor, fresh: Callable[[str], str]) -> gs.Tensor:
    """Of each token its place, (B, N), for x of (B, N, ...); computed where the batch is not known."""
    b, n = x.shape[:2]
    places, name = np.arange(n)[None], f"{x.name}/positions"
    if not is_batch(b):
        return gs.Constant(fresh(name), np.repeat(places, b, 0))
    known = {"places": places, "start": np.array([0]), "end": np.array([1]), "tokens": np.array([n])}
    constants = {key: gs.Constant(fresh(f"{name}/{key}"), array) for key, array in known.items()}
    sizes, batch, shape = (
        gs.Variable(fresh(f"{name}/{i}"), np.int64, [size]) for i, size in enumerate((3, 1, 2))
    )
    positions = gs.Variable(fresh(name), np.int64, [b, n])
    graph.nodes += [
        gs.Node("Shape", sizes.name, {}, [x], [sizes]),
        gs.Node("Slice", batch.name, {}, [sizes, constants["start"], constants["end"]], [batch]),
        gs.Node("Concat", shape.name, {"axis": 0}, [batch, constants["tokens"]], [shape]),
        gs.Node("Expand", positions.name, {}, [constants["places"], shape], [positions]),
    ]
    return positions
