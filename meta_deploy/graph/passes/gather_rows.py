"""Parts of one tensor, cut and put together in another order, are taken from it at once.

A shifted window is four Slices and two Concats, which copy the map twice, and a Transpose; it is one Gather
of tokens. Every second pixel beside its neighbours is one Transpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import (
    BATCH,
    IdentitySet,
    fresh_names,
    is_batch,
    is_op,
    is_output,
    producer,
    static_shape,
    tidy,
)
from meta_deploy.graph.moves import MOVES, add_move
from meta_deploy.graph.places import NOWHERE, moved
from meta_deploy.graph.rowwise import node_places
from meta_deploy.graph.traffic import RENAMES

_PARTS = (*MOVES, "Slice", "Split", "Concat")
_SHORTEST = 16  # numbers of a row: for fewer, looking up where it is takes longer than copying it
_MOST = 1 << 26  # numbers of a tensor that are followed


@dataclass(frozen=True)
class Region:
    """Nodes between two tensors that only move the one's elements to make the other.

    Attributes:
        x, y: these tensors.
        nodes: in the graph's order.
    """

    x: gs.Tensor
    y: gs.Tensor
    nodes: list[gs.Node]


@dataclass(frozen=True)
class Rows:
    """Where a tensor's rows come from: `width` elements each, that are neighbours in another tensor too.

    Attributes:
        places: of each row in the other tensor, in rows.
        count: rows that the other tensor has.
    """

    width: int
    places: np.ndarray
    count: int


def gather_rows(graph: gs.Graph) -> int:
    """Make a tensor by one move, where Slices, Splits, Concats and moves make it of one other tensor.

    Pattern: such nodes, a Concat among them, all of whose results lead to one tensor and nowhere else.
    Check: all sizes but the batch are known, images are moved alike, and fewer bytes are copied.
    Rewrite: a Reshape, Transpose, Reshape where that does the same, else a Gather of rows; the constant that
    says which is shared by all that are alike.

    Returns:
        Places changed.
    """
    places, fresh = node_places(graph), fresh_names(graph)
    indices: dict[tuple[tuple[int, ...], bytes], gs.Constant] = {}
    seen = IdentitySet[gs.Node]()
    changes = 0
    for node in list(graph.nodes)[::-1]:
        if node in seen or not is_op(node, *_PARTS) or len(node.outputs) != 1:
            continue
        region = _region(graph, node, places)
        for each in region.nodes if region is not None else []:
            seen.add(each)
        if region is None or not any(is_op(each, "Concat") for each in region.nodes):
            continue
        reason = _rewrite(graph, region, indices, fresh)
        if reason is None:
            changes += 1
        else:
            declined(node, reason)
    if changes:
        tidy(graph)
    return changes


def _region(graph: gs.Graph, last: gs.Node, places: Mapping[int, int]) -> Region | None:
    """The nodes that lead to the last one's output alone; None where they start from several tensors."""
    nodes, sources = IdentitySet([last]), IdentitySet[gs.Tensor]()
    frontier = list(_moved_by(last))
    while frontier:
        makers = [(places.get(id(producer(tensor)), -1), tensor) for tensor in frontier]
        tensor = max(makers, key=lambda pair: pair[0])[1]
        frontier = [each for each in frontier if each is not tensor]
        maker = producer(tensor)
        if maker is None or id(maker) not in places or not _leads_to(graph, maker, nodes):
            sources.add(tensor)
        elif maker not in nodes:
            nodes.add(maker)
            frontier += _moved_by(maker)
    if len(sources) != 1:
        return None
    ordered = sorted(nodes, key=lambda node: places[id(node)])
    return Region(next(iter(sources)), last.outputs[0], ordered)


def _moved_by(node: gs.Node) -> list[gs.Tensor]:
    """What a node moves, without the sizes and axes by which."""
    return list(node.inputs) if is_op(node, "Concat") else node.inputs[:1]


def _leads_to(graph: gs.Graph, node: gs.Node, nodes: IdentitySet[gs.Node]) -> bool:
    """Whether a node only moves, and nothing but these nodes reads what it makes."""
    return is_op(node, *_PARTS) and all(
        not is_output(graph, tensor) and all(reader in nodes for reader in tensor.outputs)
        for tensor in node.outputs
    )


def _rewrite(
    graph: gs.Graph,
    region: Region,
    indices: dict[tuple[tuple[int, ...], bytes], gs.Constant],
    fresh: Callable[[str], str],
) -> str | None:
    """Make y of x at once; or why not."""
    rows = _rows(region)
    if isinstance(rows, str):
        return rows
    order = _order(rows)
    if order is None and rows.width < _SHORTEST:
        return f"rows of {rows.width} numbers of {shown(region.x)} stay together, too few for a Gather"
    copied = [t for n in region.nodes if not is_op(n, *RENAMES) for t in n.outputs]
    size = math.prod(static_shape(region.y, batch=1) or [])
    if sum(math.prod(static_shape(tensor, batch=1) or []) for tensor in copied) <= size:
        return f"of {shown(region.x)} no more is copied than there is"
    region.y.inputs.clear()
    if order is None:
        _gather(graph, region, rows, indices, fresh)
    else:
        _permute(graph, region, rows.width, *order, fresh)
    return None


def _rows(region: Region) -> Rows | str:
    """Where y's rows come from, of one image where the batch is not known; or why that is not told."""
    x, y = region.x, region.y
    shape = static_shape(x, batch=1)
    if shape is None or not 0 < math.prod(shape) <= _MOST:
        return f"{shown(x)} is not of a known size that can be followed"
    if any(map(is_batch, x.shape)) and not (is_batch(x.shape[0]) and is_batch(y.shape[0])):
        return f"the batch is not the first axis of {shown(x)} and of {shown(y)}"
    arrays = {id(x): np.arange(math.prod(shape), dtype=np.int64).reshape(shape)}
    for node in region.nodes:
        made = moved(node, [arrays[id(tensor)] for tensor in _moved_by(node)])
        if made is None:
            return f"the graph does not tell where {shown(node)} moves elements"
        arrays.update((id(t), array) for t, array in zip(node.outputs, made, strict=True))
    source = arrays[id(y)].reshape(-1)
    starts = np.flatnonzero(np.diff(source, prepend=NOWHERE - 1) != 1)
    width = int(np.gcd.reduce([*starts.tolist(), *source[starts].tolist(), source.size]))
    last = int(y.shape[-1])
    if width % last == 0 and len(y.shape) > 1:
        width = last  # then nothing has to be reshaped behind
    return Rows(width, source[::width] // width, math.prod(shape) // width)


def _order(rows: Rows) -> tuple[list[int], list[int]] | None:
    """The sizes of axes, and the permutation of them, that put all rows in these places; None without one."""
    counts, steps, left = list[int](), list[int](), rows.places
    if left[0] or len(left) != rows.count:
        return None
    while len(left) > 1:
        step = left[1] - left[0]
        ends = np.flatnonzero(np.diff(left) != step)
        count = int(np.gcd.reduce([len(left), *(ends + 1).tolist()])) if len(ends) else len(left)
        if count == 1 or step <= 0:
            return None
        counts, steps, left = [count, *counts], [int(step), *steps], left[::count]
    by_step = sorted(range(len(steps)), key=lambda axis: -steps[axis])
    sizes = [counts[axis] for axis in by_step]
    if [steps[axis] for axis in by_step] != [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]:
        return None
    places = np.arange(rows.count).reshape(sizes)
    perm = [by_step.index(axis) for axis in range(len(counts))]
    return (sizes, perm) if np.array_equal(places.transpose(perm).reshape(-1), rows.places) else None


def _images(x: gs.Tensor) -> list[int]:
    """The axis of the batch where it is not known; windows of an image belong to it."""
    return [BATCH] if is_batch(x.shape[0]) else []


def _permute(
    graph: gs.Graph,
    region: Region,
    width: int,
    sizes: Sequence[int],
    perm: Sequence[int],
    fresh: Callable[[str], str],
) -> None:
    """Reshape to axes of these sizes, permute them, and reshape to y."""
    x, y, images = region.x, region.y, _images(region.x)
    axes, order = [*images, *sizes, width], [*images, *(sizes[axis] for axis in perm), width]
    first = len(images)
    whole = [*range(first), *(first + axis for axis in perm), first + len(perm)]
    apart = gs.Variable(fresh(f"{y.name}/apart"), y.dtype, axes)
    permuted = gs.Variable(fresh(f"{y.name}/permuted"), y.dtype, order)
    add_move(graph, "Reshape", axes, x, apart, fresh)
    add_move(graph, "Transpose", whole, apart, permuted, fresh)
    add_move(graph, "Reshape", list(y.shape), permuted, y, fresh)


def _gather(
    graph: gs.Graph,
    region: Region,
    rows: Rows,
    indices: dict[tuple[tuple[int, ...], bytes], gs.Constant],
    fresh: Callable[[str], str],
) -> None:
    """Take rows of x, whose axes between batch and row become one; y is of that shape, or reshaped to it."""
    x, y, images = region.x, region.y, _images(region.x)
    direct = not images and y.shape[-1] == rows.width and len(y.shape) > 1
    shape = tuple(y.shape[:-1]) if direct else rows.places.shape
    flat = [*images, rows.count, rows.width]
    table = x
    if list(x.shape) != flat:
        table = gs.Variable(fresh(f"{y.name}/rows"), y.dtype, flat)
        add_move(graph, "Reshape", flat, x, table, fresh)
    key = (shape, rows.places.tobytes())
    if key not in indices:
        indices[key] = gs.Constant(fresh(f"{y.name}/places"), rows.places.reshape(shape))
    out = y
    if not direct:
        out = gs.Variable(fresh(f"{y.name}/gathered"), y.dtype, [*images, len(rows.places), rows.width])
        add_move(graph, "Reshape", list(y.shape), out, y, fresh)
    node = gs.Node("Gather", fresh(f"{y.name}/gather"), {"axis": len(images)}, [table, indices[key]], [out])
    graph.nodes.append(node)
