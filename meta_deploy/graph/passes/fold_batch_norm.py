"""Batch normalization at inference is a scale and a shift a channel: they go into linear maps beside it.

Knows BatchNormalization and linear maps, no model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, made_by, read_elsewhere, shown
from meta_deploy.graph.graph import (
    IdentitySet,
    constant_value,
    is_op,
    is_output,
    own_nodes,
    sole_consumer,
    stand_in,
    until_done,
)
from meta_deploy.graph.linear import (
    FLOATS,
    Linear,
    by_input,
    by_output,
    channel_axis,
    linear_from,
    linear_of,
    representable,
    set_weights,
)
from meta_deploy.graph.moves import chain_before, follow

UNKNOWN = "it trains, or its parameters are not constants of one value a channel"
Weights = tuple[np.ndarray, np.ndarray | None]  # weight, bias


def fold_batch_norm(graph: gs.Graph) -> int:
    """Fold each BatchNormalization into the linear map before it, else into all those that read it.

    Check: its parameters are constants, it does not train. Before it: nothing else reads what the linear map
    makes; there may be moves between that leave the channels whole. After it: everything that reads it is a
    linear map that has no padding to shift, being pointwise, or there is nothing to shift.

    Returns:
        Nodes of that kind removed.
    """
    return until_done(graph, _fold_all)


@np.errstate(divide="ignore", over="ignore", invalid="ignore")  # what is not finite is declined
def _fold_all(graph: gs.Graph, fresh: Callable[[str], str]) -> int:
    """One round: into linear maps before, from the first on, then of those left into linear maps after."""
    inside = own_nodes(graph)
    norms = [node for node in graph.nodes if is_op(node, "BatchNormalization")]
    left = [node for node in norms if not _folds(node, _fold_back(graph, node, fresh))]
    folded = sum(_folds(node, _fold_on(graph, node, inside, fresh)) for node in left[::-1])
    return len(norms) - len(left) + folded


def _folds(norm: gs.Node, reason: str | None) -> bool:
    """Whether there is no reason against it; tells it if there is."""
    if reason is not None:
        declined(norm, reason)
    return reason is None


def _affine(norm: gs.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """(scale, shift), one value a channel, in float64; None where training or not constant."""
    values = [constant_value(tensor) for tensor in norm.inputs[1:5]]
    if norm.attrs.get("training_mode", 0) or any(not output.is_empty() for output in norm.outputs[1:]):
        return None
    if any(v is None or v.dtype not in FLOATS or v.ndim != 1 for v in values):
        return None
    gamma, beta, mean, variance = (v.astype(np.float64) for v in values if v is not None)
    scale = gamma / np.sqrt(variance + norm.attrs.get("epsilon", 1e-5))
    return scale, beta - mean * scale


def _fold_back(graph: gs.Graph, norm: gs.Node, fresh: Callable[[str], str]) -> str | None:
    """Fold a norm into the linear map before it; None when that is done, else why not."""
    x, affine = norm.inputs[0], _affine(norm)
    if affine is None:
        return UNKNOWN
    start, moves = chain_before(graph, x)
    linear = linear_from(graph, start)
    if linear is None or not _on_axis_1(linear, moves):
        return f"{made_by(x)}, no linear map of constant weights with its channels on axis 1"
    for tensor, reader in ((x, norm), (start, moves[0] if moves else norm)):
        if not sole_consumer(graph, tensor):
            return read_elsewhere(graph, tensor, reader)
    scale, shift = affine
    weight = linear.weight * by_output(linear, scale)
    bias = shift if linear.bias is None else linear.bias * scale + shift
    if not representable(linear, weight, bias):
        return f"new weights of {shown(linear.node)} would overflow"
    set_weights(graph, linear, weight, bias, fresh)
    stand_in(norm, x)
    return None


def _on_axis_1(linear: Linear, moves: list[gs.Node]) -> bool:
    """Whether the channels of a linear map are axis 1 after moves: whole, and alone."""
    axis = channel_axis(linear)
    if not moves or axis is None:
        return axis == 1
    factors = follow(linear.y, moves)
    return (
        factors is not None
        and len(factors.axes) > 1
        and bool(factors.axes[1])
        and factors.axes[1] == factors.origin[axis]
    )


def _fold_on(graph: gs.Graph, norm: gs.Node, inside: IdentitySet, fresh: Callable[[str], str]) -> str | None:
    """Fold a norm into the linear maps that read it; None when that is done, else why not."""
    out, affine = norm.outputs[0], _affine(norm)
    if affine is None:
        return UNKNOWN
    if not out.outputs or is_output(graph, out):
        return read_elsewhere(graph, out)
    plans = []
    for reader in out.outputs:
        linear = _reader(graph, reader, inside)
        if linear is None:
            return f"{shown(reader)}, which reads it, is no linear map of constant weights in this graph"
        plan = _after(linear, *affine)
        if plan is None:
            return f"{shown(reader)}, which reads it, is not pointwise over axis 1: its shift cannot pass"
        if not representable(linear, *plan):
            return f"new weights of {shown(reader)} would overflow"
        plans.append((linear, *plan))
    x, norm.inputs[0] = norm.inputs[0], gs.Variable.empty()
    for linear, weight, bias in plans:
        linear.node.inputs[0] = x
        set_weights(graph, linear, weight, bias, fresh)
        inside.add(linear.y.inputs[0])  # with a new bias there may be a new Add
    return None


def _reader(graph: gs.Graph, node: gs.Node, inside: IdentitySet) -> Linear | None:
    """The linear map that a node is; an Add of its bias elsewhere is none of it."""
    if node not in inside:
        return None
    linear = linear_of(graph, node)
    if linear is not None and linear.add is not None and linear.add not in inside:
        return linear_from(graph, node.outputs[0])
    return linear


def _after(linear: Linear, scale: np.ndarray, shift: np.ndarray) -> Weights | None:
    """Weight and bias for an input that is not scaled and shifted before; None where there are none."""
    if channel_axis(linear) != 1 or (shift.any() and not linear.pointwise):
        return None
    weight = linear.weight * by_input(linear, scale)
    if not shift.any():
        return weight, linear.bias
    shifted = linear.weight * by_input(linear, shift)
    return weight, shifted.reshape(len(weight), -1).sum(1) + (0 if linear.bias is None else linear.bias)
