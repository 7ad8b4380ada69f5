"""Where data movements take elements: followed by arrays that say where each comes from. Knows no pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.graph import constant_value, is_batch, is_op, static_shape
from meta_deploy.graph.linear import has_input
from meta_deploy.graph.moves import MOVES

NOWHERE = -1  # stands for zeros that were put in


def is_move(node: gs.Node) -> bool:
    return is_op(node, *MOVES, "Split", "Slice", "Pad")


def parts_of(move: gs.Node, array: np.ndarray) -> list[np.ndarray] | None:
    """What a data movement makes of an array, one for each output; None where the graph does not tell.

    Of an unknown batch the array is of one image, as all have to be moved alike.
    """
    shapes = [static_shape(tensor, batch=1) for tensor in move.outputs]
    if any(shape is None for shape in shapes) or not _moves_images_alike(move):
        return None
    if move.op == "Transpose":
        parts = [array.transpose(move.attrs.get("perm"))]
    elif move.op == "Slice":
        parts = _sliced(move, array)
    elif move.op == "Pad":
        parts = _padded(move, array)
    elif move.op == "Split":
        axis = move.attrs.get("axis", 0)
        ends = np.cumsum([shape[axis] for shape in shapes])  # type: ignore[index]
        parts = np.split(array, ends[:-1], axis)
    else:
        parts = [array.reshape(shapes[0])] if math.prod(shapes[0]) == array.size else []  # type: ignore
    return parts if [list(part.shape) for part in parts] == shapes else None


def moved(node: gs.Node, arrays: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """The same, of a Concat of several arrays too."""
    if not is_op(node, "Concat"):
        return parts_of(node, arrays[0]) if is_move(node) else None
    shape, rank = static_shape(node.outputs[0], batch=1), arrays[0].ndim
    axis = node.attrs["axis"] % rank
    if shape is None or is_batch(node.outputs[0].shape[axis]):
        return None
    joined = np.concatenate(arrays, axis)
    return [joined] if list(joined.shape) == shape else None


def _moves_images_alike(move: gs.Node) -> bool:
    """Whether a data movement of known shapes leaves an unknown batch as it is, if there is one.

    On an axis that is longer than the batch the images come one after another, and do so afterwards.
    """
    before, *after = (static_shape(tensor) or [] for tensor in (move.inputs[0], *move.outputs))
    axis = next((axis for axis, size in enumerate(before) if is_batch(size)), None)
    if axis is None or move.op == "Transpose":
        return True
    if is_op(move, "Split", "Slice", "Pad"):
        return all(shape[axis] == before[axis] for shape in after)
    place = next((place for place, size in enumerate(after[0]) if is_batch(size)), 0)
    return math.prod(after[0][:place]) == math.prod(before[:axis])


def _sliced(move: gs.Node, array: np.ndarray) -> list[np.ndarray]:
    values = [constant_value(tensor) for tensor in move.inputs[1:]]
    if len(values) < 2 or any(value is None for value in values):
        return []
    starts, ends, *rest = (value.tolist() for value in values if value is not None)
    axes = rest[0] if rest else range(len(starts))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    index = [slice(None)] * array.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, end, step)
    return [array[tuple(index)]]


def _padded(move: gs.Node, array: np.ndarray) -> list[np.ndarray]:
    pads = constant_value(move.inputs[1]) if has_input(move, 1) else None
    fill = constant_value(move.inputs[2]) if has_input(move, 2) else np.zeros(1)
    axes = constant_value(move.inputs[3]) if has_input(move, 3) else np.arange(array.ndim)
    if move.attrs.get("mode", "constant") != "constant" or pads is None or fill is None or axes is None:
        return []
    if fill.any() or (pads < 0).any():
        return []
    widths = np.zeros((array.ndim, 2), np.int64)
    widths[axes] = pads.reshape(2, -1).T
    return [np.pad(array, widths, constant_values=NOWHERE)]
