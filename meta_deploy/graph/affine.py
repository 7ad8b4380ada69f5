"""What constants do to a tensor on its way: multiplied by one, one added, whatever Reshapes are between."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.graph import (
    BATCH,
    constant_value,
    is_batch,
    is_op,
    producer,
    sole_consumer,
    static_shape,
)

MOST = 2**21  # numbers of a constant that is written out, 8 MB
RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")


@dataclass(frozen=True)
class Affine:
    """start * factor + addend, both of them as many axes as `start` and broadcast to its shape.

    Where the batch is not known, they are for one image: with more, axis 0 repeats them.
    """

    start: gs.Tensor
    factor: np.ndarray
    addend: np.ndarray


def affine_before(graph: gs.Graph, tensor: gs.Tensor) -> Affine | None:
    """Follow a tensor back through Adds, Subs, Muls, Divs with constants and Reshapes, to its start.

    Each tensor on the way is read by the next node alone. None where the shape at the end is not that of the
    start, one is not known, or a constant would be larger than `MOST`.
    """
    steps: list[tuple[gs.Node, int]] = []
    end = tensor
    while (step := _step(graph, tensor)) is not None:
        steps.append(step)
        tensor = step[0].inputs[step[1]]
    shape = static_shape(tensor)
    if shape is None or static_shape(end) != shape:
        return None
    numbers = np.ones((1,) * len(shape)), np.zeros((1,) * len(shape))
    current = shape
    for node, place in steps[::-1]:
        after = static_shape(node.outputs[0])
        if after is None:
            return None
        if is_op(node, *RESHAPES):
            if any(map(is_batch, current)) and not (is_batch(current[0]) and is_batch(after[0])):
                return None
            one = [[s // BATCH if is_batch(s) else s for s in sizes] for sizes in (current, after)]
            reshaped = [_reshaped(array, *one) for array in numbers]
            if reshaped[0] is None or reshaped[1] is None:
                return None
            numbers = reshaped[0], reshaped[1]
        elif after != current:
            return None
        else:
            numbers = _applied(node, np.asarray(node.inputs[1 - place].values, np.float64), *numbers)
        current = after
    # The rank may have grown on the way by axes of length one.
    factor, addend = (array.reshape(array.shape[array.ndim - len(shape) :]) for array in numbers)
    return None if max(factor.size, addend.size) > MOST else Affine(tensor, factor, addend)


def _step(graph: gs.Graph, tensor: gs.Tensor) -> tuple[gs.Node, int] | None:
    """What makes a tensor, where that is one of these nodes, and which of its inputs comes from the start."""
    node = producer(tensor)
    if node is None or not sole_consumer(graph, tensor):
        return None
    if is_op(node, *RESHAPES):
        return node, 0
    if is_op(node, "Add", "Mul", "Sub", "Div"):
        for place in (0, 1) if node.op in ("Add", "Mul") else (0,):
            constant = constant_value(node.inputs[1 - place])
            if constant is not None and not isinstance(node.inputs[place], gs.Constant):
                return node, place
    return None


def _reshaped(array: np.ndarray, shape: list[int], after: list[int]) -> np.ndarray | None:
    """A constant that is broadcast to `shape`, reshaped with it; None where that is too large."""
    if array.size == 1:
        return array.reshape((1,) * len(after))
    if math.prod(shape) > MOST:
        return None
    return np.broadcast_to(array, shape).reshape(after)


def _applied(
    node: gs.Node, constant: np.ndarray, factor: np.ndarray, addend: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(all="ignore"):
        if is_op(node, "Add"):
            return factor, addend + constant
        if is_op(node, "Sub"):
            return factor, addend - constant
        if is_op(node, "Mul"):
            return factor * constant, addend * constant
        return factor / constant, addend / constant
