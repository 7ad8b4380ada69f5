"""A layer norm written out in elementary operators becomes one LayerNormalization (opset 17), float32.

A graph of opset 13 to 16 becomes one of 17 for it, where that changes no operator's meaning.

Knows operators of ONNX and no model. Joining moves, and norms of one tensor, is left to other passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, made_by, read_elsewhere, shown
from meta_deploy.graph.graph import (
    IdentitySet,
    constant_value,
    is_batch,
    is_op,
    is_output,
    own_nodes,
    producer,
    sole_consumer,
    until_done,
)
from meta_deploy.graph.linear import has_input
from meta_deploy.graph.moves import permutation

_SINCE, _UNCHANGED = 17, 13  # between these opsets only two operators change their meaning, see _rises


@dataclass
class Norm:
    """y = (x - mean) / sqrt(variance + epsilon).

    Attributes:
        x, y: input and output.
        axes: that mean and variance go over, in order; their sizes are known.
        epsilon: positive.
    """

    x: gs.Tensor
    y: gs.Tensor
    axes: list[int]
    epsilon: float

    @property
    def to_last(self) -> list[int]:
        """The permutation that puts the axes last; in order if they are."""
        return [*(a for a in range(len(self.x.shape)) if a not in self.axes), *self.axes]

    @property
    def is_last(self) -> bool:
        return self.to_last == sorted(self.to_last)


@dataclass
class End:
    """What a norm ends in: its output after a scale and a bias, if it has such, of the normalized axes.

    Attributes:
        moves: the Transposes that read it and move the normalized axes last.
        alone: whether there are such and nothing else reads it.
    """

    tensor: gs.Tensor
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    moves: list[gs.Node] = field(default_factory=list)
    alone: bool = False


def fuse_layer_norm(graph: gs.Graph) -> int:
    """Replace (x - mean) / sqrt(variance + epsilon), times a scale, plus a bias, by LayerNormalization.

    Pattern: ReduceMean, Sub, Pow or Mul, ReduceMean, Add, Sqrt, then Div or Reciprocal and Mul; the mean and
    what it is taken from may be there twice. Scale and bias are constants; several of them give one operator
    each.
    Check: nothing else reads what lies between. Where the axes are not the last ones, a Transpose from there
    makes x, or nothing but a Transpose to there reads the output.
    Rewrite: such a Transpose is left out, and one on the other side added unless it is left out there, too.

    Returns:
        Places changed.
    """
    changes = until_done(graph, _fuse_all)
    if changes:
        _raise_opset(graph)
    return changes


def _fuse_all(graph: gs.Graph, fresh: Callable[[str], str]) -> int:
    inside = own_nodes(graph)
    count = 0
    for node in list(graph.nodes):
        norm = _match(graph, node, inside) if is_op(node, "Sqrt") else None
        if norm is None:
            continue
        ends = _ends(graph, norm, inside)
        if not _rises(graph):
            declined(node, f"LayerNormalization came with opset 17, and the graph is of opset {graph.opset}")
        elif norm.is_last or _source(norm) is not None or all(end.alone for end in ends):
            for end in ends:
                _rewrite(graph, norm, end, fresh)
            count += len(ends)
        else:
            axes = f"axes {norm.axes} of {shown(norm.x)} are not the last ones"
            declined(node, f"{axes}, and no Transpose before or behind makes them so")
    return count


def _rises(graph: gs.Graph) -> bool:
    """Whether a graph is of LayerNormalization's opset or can be, each operator meaning the same there."""
    if graph.opset >= _SINCE:
        return True
    nodes = [node for g in (graph, *graph.subgraphs(recursive=True)) for node in g.nodes]
    return graph.opset >= _UNCHANGED and not any(
        (is_op(node, "RoiAlign") and graph.opset < 16)  # its default mode is another then
        or (is_op(node, "BatchNormalization") and graph.opset < 14 and len(node.outputs) > 1)
        for node in nodes
    )


def _raise_opset(graph: gs.Graph) -> None:
    """To LayerNormalization's, if it is older; graphs inside go with it."""
    for part in (graph, *graph.subgraphs(recursive=True)):
        part.opset = max(part.opset, _SINCE)
        for domain in part.import_domains or ():
            if domain.domain in ("", "ai.onnx"):
                domain.version = max(domain.version, _SINCE)


def _match(graph: gs.Graph, sqrt: gs.Node, inside: IdentitySet) -> Norm | None:
    """The norm around a square root; tells why not if it is the root of a mean of squares."""
    added = producer(sqrt.inputs[0], "Add")
    for variance, constant in () if added is None else (added.inputs, added.inputs[::-1]):
        mean = producer(variance, "ReduceMean")
        square = None if mean is None else producer(mean.inputs[0])
        squared = None if square is None else _squared(square)
        if mean is None or square is None or squared is None:
            continue
        found = _norm(graph, [sqrt, added, mean, square], squared, constant, inside)
        if isinstance(found, Norm):
            return found
        declined(sqrt, found)
    return None


def _norm(
    graph: gs.Graph,
    middle: list[gs.Node],
    squared: list[gs.Tensor],
    constant: gs.Tensor,
    inside: IdentitySet,
) -> Norm | str:
    """The norm of these nodes (root, sum with epsilon, mean, square), or why they are of none."""
    sqrt, _, mean, _ = middle
    epsilon, quotient = constant_value(constant), _quotient(sqrt.outputs[0])
    if epsilon is None or epsilon.size != 1 or not 0 < float(epsilon.item()) < math.inf:
        return f"{shown(constant)} is added to the variance, which is no positive number"
    if quotient is None:
        return f"what is made of the root '{sqrt.outputs[0].name}' is not one division by it"
    divided, last = quotient
    parts = [_centred(tensor) for tensor in (divided, *squared)]
    if reason := next((part for part in parts if isinstance(part, str)), None):
        return reason
    centred = [part for part in parts if not isinstance(part, str)]
    x, axes, _ = centred[0]
    if any(c[0] is not x or c[1] != axes for c in centred) or _axes(mean, len(x.shape)) != axes:
        return f"mean and variance of {shown(x)} are not over the same axes of the same tensor"
    if epsilon.ndim > len(x.shape):
        return f"{shown(constant)} has more axes than {shown(x)}"
    nodes = [*middle, *last, *(node for c in centred for node in c[2])]
    if reason := _read_from_outside(graph, nodes, last[-1], inside):
        return reason
    return Norm(x, last[-1].outputs[0], axes, float(np.float32(epsilon.item())))


def _quotient(std: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]] | None:
    """What is divided by a tensor, and the nodes that divide, if nothing else is done with it."""
    node = std.outputs[0] if len(std.outputs) == 1 else None
    if node is not None and is_op(node, "Div") and node.inputs[1] is std:
        return node.inputs[0], [node]
    if node is None or not is_op(node, "Reciprocal") or len(node.outputs[0].outputs) != 1:
        return None
    product = node.outputs[0].outputs[0]
    return (_other(product, node.outputs[0]), [node, product]) if is_op(product, "Mul") else None


def _other(node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    """The other one of two operands."""
    return node.inputs[1 if node.inputs[0] is tensor else 0]


def _squared(node: gs.Node) -> list[gs.Tensor] | None:
    """What a node is the square of; as a product, of two tensors that have yet to be shown the same."""
    if is_op(node, "Mul"):
        return list(node.inputs)
    exponent = constant_value(node.inputs[1]) if is_op(node, "Pow") else None
    if exponent is None or exponent.size != 1 or exponent.item() != 2 or exponent.ndim > 1:
        return None
    return [node.inputs[0]]


def _is_number(size: object) -> bool:
    """Whether a size is known, and there is something of that size."""
    return isinstance(size, (int, np.integer)) and int(size) > 0 and not is_batch(size)


def _centred(tensor: gs.Tensor) -> tuple[gs.Tensor, list[int], list[gs.Node]] | str:
    """(x, axes, nodes) where these nodes make a tensor of x minus its mean over known axes; or why not."""
    sub = producer(tensor, "Sub")
    mean = producer(sub.inputs[1], "ReduceMean") if sub is not None else None
    if sub is None or mean is None or mean.inputs[0] is not sub.inputs[0]:
        return f"{made_by(tensor)}, and is not a tensor less its mean"
    x = sub.inputs[0]
    if not x.shape or x.dtype != np.float32:
        return f"{shown(x)} is not a float32 tensor of known rank"
    axes = _axes(mean, len(x.shape))
    if not axes or not all(_is_number(x.shape[axis]) for axis in axes):
        return f"the axes of {shown(mean)} are not kept, or they or their sizes in {shown(x)} not known"
    return x, axes, [sub, mean]


def _axes(mean: gs.Node, rank: int) -> list[int] | None:
    """The axes that a ReduceMean goes over and keeps, in order; None where the graph does not tell."""
    axes = mean.attrs.get("axes")
    if has_input(mean, 1):
        value = constant_value(mean.inputs[1])
        if value is None:
            return None
        axes = value.flatten().tolist()
    if not mean.attrs.get("keepdims", 1) or (not axes and mean.attrs.get("noop_with_empty_axes", 0)):
        return None
    return sorted({axis % rank for axis in axes}) if axes else list(range(rank))


def _read_from_outside(
    graph: gs.Graph, nodes: list[gs.Node], last: gs.Node, inside: IdentitySet
) -> str | None:
    """What else reads what these nodes make, the last one's output excepted; None if nothing does."""
    if any(node not in inside for node in nodes):
        return "a part of it is inside a branch or a loop"
    own = IdentitySet(nodes)
    for tensor in (tensor for node in nodes if node is not last for tensor in node.outputs):
        if is_output(graph, tensor) or any(node not in own for node in tensor.outputs):
            return read_elsewhere(graph, tensor, *nodes)
    return None


def _ends(graph: gs.Graph, norm: Norm, inside: IdentitySet) -> list[End]:
    """A norm's output with scale and bias, one for each reader; as it is if one reader wants it so."""
    readers = [] if is_output(graph, norm.y) else norm.y.outputs
    ends = [_end(graph, norm, node, inside) for node in readers]
    found = [end for end in ends if end is not None]
    found = found if found and len(found) == len(ends) else [End(norm.y)]
    for end in found:
        readers = end.tensor.outputs
        moves = [node for node in readers if is_op(node, "Transpose") and node in inside]
        end.moves = [node for node in moves if permutation(node) == norm.to_last]
        end.alone = 0 < len(end.moves) == len(readers) and not is_output(graph, end.tensor)
    return found


def _end(graph: gs.Graph, norm: Norm, node: gs.Node, inside: IdentitySet) -> End | None:
    end = End(norm.y)
    if is_op(node, "Mul") and node in inside:
        end.scale = _constant(norm, _other(node, end.tensor))
        if end.scale is None:
            return None
        end.tensor = node.outputs[0]
        if not sole_consumer(graph, end.tensor):
            return end
        node = end.tensor.outputs[0]
    if is_op(node, "Add") and node in inside:
        end.bias = _constant(norm, _other(node, end.tensor))
        end.tensor = end.tensor if end.bias is None else node.outputs[0]
    return None if end.tensor is norm.y else end


def _constant(norm: Norm, tensor: gs.Tensor) -> np.ndarray | None:
    """A constant that meets a norm's output as one value for each place in the normalized axes; else None."""
    value, rank = constant_value(tensor), len(norm.x.shape)
    if value is None or value.ndim > rank:
        return None
    full = value.reshape((1,) * (rank - value.ndim) + value.shape)
    sizes = [norm.x.shape[axis] for axis in norm.axes]
    if full.size != math.prod(full.shape[a] for a in norm.axes):
        return None
    if any(full.shape[a] not in (1, size) for a, size in zip(norm.axes, sizes, strict=True)):
        return None
    return np.broadcast_to(full.reshape([full.shape[a] for a in norm.axes]), sizes)


def _source(norm: Norm) -> gs.Tensor | None:
    """What x is, but for the Transpose that moves the normalized axes from the end to their places."""
    move = producer(norm.x, "Transpose")
    inverse = np.argsort(norm.to_last).tolist()
    return move.inputs[0] if move is not None and permutation(move) == inverse else None


def _rewrite(graph: gs.Graph, norm: Norm, end: End, fresh: Callable[[str], str]) -> None:
    x, y, perm = norm.x, end.tensor, norm.to_last
    y.inputs.clear()
    if norm.is_last:
        _add_norm(graph, norm, end, x, y, fresh)
        return
    shape = [x.shape[p] for p in perm]
    source = _source(norm)
    if source is None:
        source = gs.Variable(fresh(f"{y.name}/axes_last"), x.dtype, shape)
        graph.nodes.append(gs.Node("Transpose", source.name, {"perm": perm}, [x], [source]))
    ends = [node.outputs[0] for node in end.moves] or [gs.Variable(fresh(f"{y.name}/norm"), x.dtype, shape)]
    for tensor in ends:
        tensor.inputs.clear()
    out, *others = ends
    graph.nodes += [gs.Node("Identity", tensor.name, {}, [out], [tensor]) for tensor in others]
    inverse = np.argsort(perm).tolist()  # dead if nothing else reads y
    graph.nodes.append(gs.Node("Transpose", fresh(f"{y.name}/move"), {"perm": inverse}, [out], [y]))
    _add_norm(graph, norm, end, source, out, fresh)


def _add_norm(
    graph: gs.Graph, norm: Norm, end: End, x: gs.Tensor, y: gs.Tensor, fresh: Callable[[str], str]
) -> None:
    sizes = [norm.x.shape[axis] for axis in norm.axes]
    scale = np.ones(sizes, np.float32) if end.scale is None else end.scale
    inputs = [x, gs.Constant(fresh(f"{y.name}/scale"), np.ascontiguousarray(scale))]
    if end.bias is not None:
        inputs.append(gs.Constant(fresh(f"{y.name}/bias"), np.ascontiguousarray(end.bias)))
    attributes = {"axis": -len(sizes), "epsilon": norm.epsilon}
    graph.nodes.append(gs.Node("LayerNormalization", fresh(f"{y.name}/norm"), attributes, inputs, [y]))
