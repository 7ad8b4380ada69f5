"""Constants beside linear maps go into their weights: LayerScale, a shift, the scale of attention.

Knows linear maps, element-wise arithmetic and data movements, no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, read_elsewhere, shown
from meta_deploy.graph.graph import (
    IdentitySet,
    constant_value,
    is_op,
    is_output,
    own_nodes,
    producer,
    sole_consumer,
    stand_in,
    static_shape,
    until_done,
)
from meta_deploy.graph.linear import (
    FLOATS,
    Linear,
    by_output,
    channel_axis,
    linear_from,
    per_channel,
    representable,
    set_weights,
)
from meta_deploy.graph.places import NOWHERE, is_move, parts_of

MAX_MOVES = 12  # from a linear map to its scale
MAX_READERS = 64  # that are followed to see where else its channels go
MAX_ELEMENTS = 1 << 26  # of a linear map's output whose channels are followed


def fold_scales(graph: gs.Graph) -> int:
    """Fold constants that multiply, divide or shift what a linear map makes into its weight and bias.

    Pattern: Mul or Div by one value a channel, Add or Sub of such; of a Mul or Div, data movements and zeros
    put in may be between, and a product with another tensor too, where the factor is one number.
    Check: nothing else reads the channels that change, the constant gives the result no other shape, and is
    finite and, as a factor, not zero.

    Returns:
        Nodes removed.
    """
    return until_done(graph, _fold_all)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is declined
def _fold_all(graph: gs.Graph, fresh: Callable[[str], str]) -> int:
    inside = own_nodes(graph)
    count = 0
    for node in list(graph.nodes):
        if is_op(node, "Mul", "Div"):
            count += _fold_factor(graph, node, inside, fresh)
        elif is_op(node, "Add", "Sub"):
            count += _fold_shift(graph, node, fresh)
    return count


def _operands(node: gs.Node) -> tuple[gs.Tensor, np.ndarray] | None:
    """What a constant is applied to, and the finite constant, in float64."""
    swap = is_op(node, "Mul", "Add")
    for x, constant in (node.inputs, node.inputs[::-1])[: 2 if swap else 1]:
        value = constant_value(constant)
        if value is not None and value.dtype in FLOATS and np.isfinite(value).all():
            return x, value.astype(np.float64)
    return None


def _fold_shift(graph: gs.Graph, node: gs.Node, fresh: Callable[[str], str]) -> bool:
    found = _operands(node)
    linear = None if found is None else linear_from(graph, found[0])
    # A product of matrices has its bias in an Add: this one, if there is no other.
    if found is None or linear is None or (linear.node.op == "MatMul" and linear.add is None):
        return False
    x, value = found
    shift = _channelwise(value, linear)
    if shift is None or not sole_consumer(graph, x):
        declined(node, _not_a_value_each(value, x) if shift is None else read_elsewhere(graph, x, node))
        return False
    bias = (shift if node.op == "Add" else -shift) + (0 if linear.bias is None else linear.bias)
    if not representable(linear, bias):
        declined(node, f"the new bias of {shown(linear.node)} would overflow")
        return False
    weight = linear.node.inputs[1]  # stays, as it may be shared
    set_weights(graph, linear, linear.weight, bias, fresh)
    linear.node.inputs[1] = weight
    stand_in(node, x)
    return True


def _fold_factor(graph: gs.Graph, node: gs.Node, inside: IdentitySet, fresh: Callable[[str], str]) -> bool:
    found = _operands(node)
    if found is None:
        return False
    x, value = found
    if not value.all() or not sole_consumer(graph, x):
        if linear_from(graph, x) is not None:
            declined(node, read_elsewhere(graph, x, node) if value.all() else "a zero is among the factors")
        return False
    scale = value if node.op == "Mul" else 1 / value
    for linear, factor in _made_by(graph, node, x, scale, inside):
        weight = linear.weight * by_output(linear, factor)
        bias = None if linear.bias is None else linear.bias * factor
        if representable(linear, weight, bias):
            set_weights(graph, linear, weight, bias, fresh)
            stand_in(node, x)
            return True
        declined(node, f"new weights of {shown(linear.node)} would overflow")
    return False


def _not_a_value_each(value: np.ndarray, x: gs.Tensor) -> str:
    return f"a constant of shape {value.shape} is not one value for each channel of {shown(x)}"


def _made_by(
    graph: gs.Graph, node: gs.Node, x: gs.Tensor, scale: np.ndarray, inside: IdentitySet
) -> list[tuple[Linear, np.ndarray]]:
    """Linear maps with a factor for each channel: any one, so scaled, scales x and nothing else.

    Tells why a map that makes x is none of them; `node` is what scales.
    """
    linear = linear_from(graph, x)
    if linear is not None:
        factor = _channelwise(scale, linear)
        if factor is None:
            declined(node, _not_a_value_each(scale, x))
        return [] if factor is None else [(linear, factor)]
    if x.shape is None or scale.ndim > len(x.shape):
        return []
    product = producer(x, "MatMul") if scale.size == 1 else None
    sides = [x] if product is None else [side for side in product.inputs if sole_consumer(graph, side)]
    sources = [_moved_from(graph, node, side, scale, inside) for side in sides]
    return [source for source in sources if source is not None]


def _moved_from(
    graph: gs.Graph, node: gs.Node, x: gs.Tensor, scale: np.ndarray, inside: IdentitySet
) -> tuple[Linear, np.ndarray] | None:
    """The linear map that x is moved from, and for each of its channels by what x scales it; tells why not.

    What has one of these channels and is not x must not be read but by moves that lead to x.
    """
    path = [x]
    while (node := producer(path[-1])) is not None and is_move(node):
        path.append(node.inputs[0])
        if len(path) > MAX_MOVES + 1:
            return None
    linear = linear_from(graph, path[-1])
    if linear is None or len(path) == 1:
        return None if linear is None else (linear, np.full(linear.out_channels, scale.item()))
    channels = _channels_of_elements(linear)
    reached = None if channels is None else _along(path[-2::-1], channels)
    if channels is None or reached is None:
        declined(node, f"the graph does not tell which channels of {shown(linear.y)} are in {shown(x)}")
        return None
    factors = _factors(reached, scale, linear.out_channels)
    if factors is None:
        declined(node, _not_a_value_each(scale, linear.y))
        return None
    chosen = np.zeros(linear.out_channels + 1, bool)
    chosen[_distinct(reached)] = True
    chosen[NOWHERE] = False
    if not _reach_only(graph, linear.y, channels, x, chosen, inside):
        declined(node, f"the channels of {shown(linear.y)} that are in {shown(x)} go elsewhere, too")
        return None
    return linear, factors


def _factors(reached: np.ndarray, scale: np.ndarray, channels: int) -> np.ndarray | None:
    """The factor of each channel, given the channel of each element that a constant scales; 1 for others.

    None where a channel has several, or the constant more elements.
    """
    if np.broadcast_shapes(reached.shape, scale.shape) != reached.shape:
        return None
    values = np.broadcast_to(scale, reached.shape)
    here = tuple(
        slice(None) if a or b else slice(1) for a, b in zip(reached.strides, values.strides, strict=True)
    )
    reached, values = reached[here], values[here]
    factors = np.ones(channels + 1)
    factors[reached] = values
    return factors[:-1] if (factors[reached] == values)[reached != NOWHERE].all() else None


def _along(path: list[gs.Tensor], array: np.ndarray) -> np.ndarray | None:
    """What is left of an array after the moves that make these tensors, one of another."""
    for tensor in path:
        move = tensor.inputs[0]
        parts = parts_of(move, array)
        if parts is None:
            return None
        array = next(part for part, t in zip(parts, move.outputs, strict=True) if t is tensor)
    return array


def _channels_of_elements(linear: Linear) -> np.ndarray | None:
    """For each element of a linear map's output the channel that it is of; None where sizes are not known.

    Of an unknown batch one image is followed, as all are moved alike.
    """
    shape, axis = static_shape(linear.y, batch=1), channel_axis(linear)
    if shape is None or axis is None or not 0 < math.prod(shape) <= MAX_ELEMENTS:
        return None
    numbers = np.arange(linear.out_channels, dtype=np.int32)
    return np.broadcast_to(numbers.reshape(-1, *(1,) * (len(shape) - 1 - axis)), shape)


def _reach_only(
    graph: gs.Graph, y: gs.Tensor, channels: np.ndarray, x: gs.Tensor, chosen: np.ndarray, inside: IdentitySet
) -> bool:
    """Whether the chosen channels of y get nowhere but to x, by moves alone."""
    stack, followed = [(y, channels)], 0
    while stack:
        tensor, held = stack.pop()
        if tensor is x or not chosen[_distinct(held)].any():
            continue
        followed += len(tensor.outputs)
        if is_output(graph, tensor) or followed > MAX_READERS:
            return False
        for reader in tensor.outputs:
            if reader not in inside or not is_move(reader):
                return False
            parts = parts_of(reader, held)
            if parts is None:
                return False
            stack += zip(reader.outputs, parts, strict=True)
    return True


def _distinct(array: np.ndarray) -> np.ndarray:
    """An array without the repetitions that broadcasting made."""
    return array[tuple(slice(None) if stride else slice(1) for stride in array.strides)]


def _channelwise(value: np.ndarray, linear: Linear) -> np.ndarray | None:
    """A constant that meets a linear map's output as one value a channel: (out,), else None."""
    axis = channel_axis(linear)
    if axis is None:
        return None
    rank = linear.weight.ndim if linear.is_conv else axis + 1
    return per_channel(value, rank, axis, linear.out_channels)
