"""Layer norms of one tensor become one: where they differ, by what their readers' weights can take over.

Knows LayerNormalization and linear maps, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import (
    IdentitySet,
    constant_value,
    is_batch,
    is_op,
    is_output,
    own_nodes,
    replace,
    until_done,
)
from meta_deploy.graph.linear import (
    FLOATS,
    Linear,
    by_input,
    has_input,
    linear_of,
    per_channel,
    representable,
    set_weights,
)
from meta_deploy.graph.moves import permutation

MIN_SCALE = 1e-3  # of a norm that others are computed from, relative to its largest
MAX_RATIO = 1e3  # of another norm's scale to that
MAX_LOSS = 10.0  # how much larger rounding errors may be at a reader's output
MAX_TRIED = 4  # norms of one tensor that are tried as the one to keep

Weights = tuple[Linear, np.ndarray, np.ndarray | None]  # weight; bias, if it changes


@dataclass
class Norm:
    """A LayerNormalization.

    Attributes:
        node: it.
        scale, bias: (C,) in float64, where they are constants of one value a channel, the last axis.
        readers: the linear maps that are all that reads it, over its last axis; or why they are not.
    """

    node: gs.Node
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    readers: list[Linear] | str = "its scale or its bias is not a constant of one value a channel"

    @property
    def y(self) -> gs.Tensor:
        return self.node.outputs[0]

    def same_as(self) -> Hashable:
        """What is equal for two norms, of one tensor and with the same attributes, that are the same."""
        if self.scale is not None and self.bias is not None:
            return self.scale.tobytes(), self.bias.tobytes()
        return tuple(_identity(tensor) for tensor in self.node.inputs[1:])


def share_norms(graph: gs.Graph) -> int:
    """Replace LayerNormalizations of one tensor, over the same axes with the same epsilon, by one.

    The same scale and bias: simply one. Else one is kept, g0 n + b0, and for another, g n + b, all readers
    get weights that make the same of it: W (g n + b) = (W r) (g0 n + b0) + W (b - r b0), with r = g / g0.
    Check: the readers are linear maps over the channels; a convolution whose padding would be shifted as well
    only where b = r b0. Rounding errors must not grow much: if that forbids every g0, the one kept is n.

    Returns:
        Norms removed.
    """
    return until_done(graph, _share_all)


def _share_all(graph: gs.Graph, fresh: Callable[[str], str]) -> int:
    inside = own_nodes(graph)
    done = IdentitySet[gs.Tensor]()
    count = 0
    for node in list(graph.nodes):
        if not is_op(node, "LayerNormalization") or node.inputs[0] in done:
            continue
        done.add(node.inputs[0])
        for norms in _groups(node.inputs[0], inside):
            left = _without_same(graph, norms, inside)
            for norm in left if len(left) > 1 else []:
                if norm.scale is not None:
                    norm.readers = _readers(graph, norm, inside)
            count += len(norms) - len(left) + _fold(graph, left, fresh)
    return count


def _groups(x: gs.Tensor, inside: IdentitySet) -> list[list[Norm]]:
    """The norms of a tensor, by what else must be the same for them to be shared; of two at least."""
    groups: dict[Hashable, list[Norm]] = {}
    for node in IdentitySet(x.outputs):  # once, be x its own scale, too
        if not is_op(node, "LayerNormalization") or node not in inside or node.inputs[0] is not x:
            continue
        if any(not tensor.is_empty() for tensor in node.outputs[1:]) or x.shape is None:
            continue
        axis = node.attrs.get("axis", -1) % len(x.shape)
        key = (axis, node.attrs.get("epsilon", 1e-5), node.attrs.get("stash_type", 1))
        groups.setdefault(key, []).append(Norm(node, *_affine(node)))
    for norms in groups.values():
        if len(norms) == 1:
            alone = f"no other norm of {shown(x)} has its axis, epsilon and type"
            declined(norms[0].node, alone if len(groups) > 1 else f"it is the only norm of {shown(x)}")
    return [norms for norms in groups.values() if len(norms) > 1]


def _affine(node: gs.Node) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Scale and bias of a norm, one value a channel; None where they are not constants or more than that."""
    scale = constant_value(node.inputs[1])
    if scale is None or scale.dtype not in FLOATS:
        return None, None
    size = (node.inputs[0].shape or [None])[-1]
    if is_batch(size):
        return None, None
    channels = int(size) if isinstance(size, (int, np.integer)) else scale.size
    bias = constant_value(node.inputs[2]) if has_input(node, 2) else np.zeros(channels)
    if bias is None or (channels == 1 and size != 1):
        return None, None
    pair = [per_channel(value, value.ndim, value.ndim - 1, channels) for value in (scale, bias) if value.ndim]
    if len(pair) < 2 or pair[0] is None or pair[1] is None:
        return None, None
    return pair[0].astype(np.float64), pair[1].astype(np.float64)


def _identity(tensor: gs.Tensor) -> Hashable:
    """A constant's value, else the tensor itself."""
    value = constant_value(tensor)
    return id(tensor) if value is None else (value.dtype.str, value.shape, value.tobytes())


def _without_same(graph: gs.Graph, norms: list[Norm], inside: IdentitySet) -> list[Norm]:
    """Of norms that are the same one is left, which the others' readers read."""
    left: dict[Hashable, Norm] = {}

    def is_fixed(norm: Norm) -> bool:
        return is_output(graph, norm.y) or any(node not in inside for node in norm.y.outputs)

    for norm in sorted(norms, key=is_fixed, reverse=True):
        kept = left.setdefault(norm.same_as(), norm)
        y = norm.y
        if kept is not norm and is_fixed(norm):  # the name stays
            y.inputs.clear()
            graph.nodes.append(gs.Node("Identity", y.name, {}, [kept.y], [y]))
            inside.add(graph.nodes[-1])
        elif kept is not norm:
            replace(graph, y, kept.y)
    return list(left.values())


def _readers(graph: gs.Graph, norm: Norm, inside: IdentitySet) -> list[Linear] | str:
    """The linear maps over its channels that alone read a norm, or its Transpose; or what else reads it."""
    rank = len(norm.node.inputs[0].shape)
    readers: list[Linear] = []
    tensors = [(norm.y, rank - 1)]  # and where the channels are
    while tensors:
        tensor, axis = tensors.pop()
        if is_output(graph, tensor):
            return f"'{tensor.name}' is an output of the graph"
        for node in tensor.outputs:
            if node not in inside:
                return f"'{tensor.name}' is read inside a branch or a loop"
            if is_op(node, "Transpose") and tensor is norm.y:
                tensors.append((node.outputs[0], permutation(node).index(axis)))
                continue
            linear = linear_of(graph, node)
            if linear is None or linear.x is not tensor or axis != (1 if linear.is_conv else rank - 1):
                return f"'{tensor.name}' is read by {shown(node)}, not a linear map of its channels"
            if linear.add is not None and linear.add not in inside:
                return f"the bias of {shown(node)} is added inside a branch or a loop"
            readers.append(linear)
    return readers


@dataclass
class Plan:
    """A norm to keep, or None for a new one without scale and bias, and new weights for others' readers.

    Attributes:
        left: the other norms, and why they stay.
    """

    kept: Norm | None
    folded: list[tuple[Norm, list[Weights]]] = field(default_factory=list)
    left: list[tuple[Norm, str]] = field(default_factory=list)

    @property
    def gain(self) -> int:
        return len(self.folded) - (self.kept is None)


def _fold(graph: gs.Graph, norms: list[Norm], fresh: Callable[[str], str]) -> int:
    """Keep the norm that most others can be computed from, and compute them; returns how many norms fewer."""
    known = sorted((norm for norm in norms if norm.scale is not None), key=_reluctance)
    for norm in norms if len(norms) > 1 else []:
        if norm.scale is None:
            declined(norm.node, str(norm.readers))
    if len(known) < 2:
        return 0
    plans = [_plan(kept, known) for kept in (*known[:MAX_TRIED], None)]
    plan = max(plans, key=lambda plan: plan.gain)
    for norm, reason in plan.left:
        declined(norm.node, reason)
    if plan.gain < 1:
        return 0
    y = plan.kept.y if plan.kept is not None else _plain(graph, known[0].node, fresh)
    for norm, weights in plan.folded:
        replace(graph, norm.y, y)
        for linear, weight, bias in weights:
            set_weights(graph, linear, weight, bias, fresh)
    return plan.gain


def _reluctance(norm: Norm) -> tuple:
    """First what has to be kept, then what had better be, as it would need an Add; there are no ties."""
    values = [] if norm.scale is None or norm.bias is None else [*norm.scale, *norm.bias]
    readers = [] if isinstance(norm.readers, str) else norm.readers
    adds = sum(linear.bias is None and not linear.is_conv for linear in readers)
    return not isinstance(norm.readers, str), -adds, values


def _plan(kept: Norm | None, norms: list[Norm]) -> Plan:
    plan = Plan(kept)
    scale, bias = (kept.scale, kept.bias) if kept is not None else (np.ones(1), np.zeros(1))
    assert scale is not None
    assert bias is not None
    even = np.abs(scale).min() > MIN_SCALE * np.abs(scale).max()
    for norm in norms:
        if norm is kept:
            continue
        uneven = "the scale of the norm to keep is close to zero in some channels"
        weights = _computed_from(norm, scale, bias) if even else uneven
        if isinstance(weights, str):
            plan.left.append((norm, weights))
        else:
            plan.folded.append((norm, weights))
    return plan


def _computed_from(norm: Norm, scale: np.ndarray, bias: np.ndarray) -> list[Weights] | str:
    """Weights with which a norm's readers read another of this scale and bias; or why there are none."""
    if isinstance(norm.readers, str):
        return norm.readers
    assert norm.scale is not None
    assert norm.bias is not None
    ratio = norm.scale / scale
    shift = norm.bias - ratio * bias
    if not np.abs(ratio).max() <= MAX_RATIO:
        return f"its scale is more than {MAX_RATIO:.0f} times that of the norm to keep in some channels"
    before, after = np.abs(norm.scale) + np.abs(norm.bias), np.abs(ratio) * (np.abs(scale) + np.abs(bias))
    result: list[Weights] = []
    for linear in norm.readers:
        weight, size = linear.weight.astype(np.float64), np.abs(linear.weight).astype(np.float64)
        worse = _applied(linear, size, after) > MAX_LOSS * _applied(linear, size, before)
        if worse.any():
            return f"rounding errors of {shown(linear.node)} would grow more than {MAX_LOSS:.0f} times"
        if shift.any() and _is_padded(linear):
            return f"{shown(linear.node)} pads with zeros, which its shift would have to reach"
        new = weight * by_input(linear, ratio)
        moved = None
        if shift.any():
            moved = _applied(linear, weight, shift) + (0 if linear.bias is None else linear.bias)
        if not representable(linear, new, moved):
            return f"new weights of {shown(linear.node)} would overflow"
        result.append((linear, new, moved))
    return result


def _is_padded(linear: Linear) -> bool:
    """Whether some places of a linear map's output have fewer of its weights in them than others."""
    if not linear.is_conv:
        return False
    same = str(linear.node.attrs.get("auto_pad", "NOTSET")).startswith("SAME")
    wide = any(size != 1 for size in linear.weight.shape[2:])
    return linear.node.op == "ConvTranspose" or any(linear.node.attrs.get("pads", [])) or (same and wide)


def _applied(linear: Linear, weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What a linear map with these weights makes of one value for each input channel; no padding, no bias."""
    if linear.node.op == "ConvTranspose":
        split = weight.reshape(linear.group, len(weight) // linear.group, weight.shape[1], -1)
        return np.einsum("giok,gi->go", split, values.reshape(linear.group, -1)).reshape(-1)
    return (weight * by_input(linear, values)).reshape(len(weight), -1).sum(1)


def _plain(graph: gs.Graph, node: gs.Node, fresh: Callable[[str], str]) -> gs.Tensor:
    """What a norm makes of the same tensor without scale and bias."""
    x, scale, y = node.inputs[0], node.inputs[1], node.outputs[0]
    ones = gs.Constant(fresh(f"{x.name}/ones"), np.ones(scale.shape, scale.dtype))
    out = gs.Variable(fresh(f"{x.name}/normalized"), y.dtype, y.shape)
    attributes = dict(node.attrs)
    graph.nodes.append(gs.Node("LayerNormalization", out.name, attributes, [x, ones], [out]))
    return out
