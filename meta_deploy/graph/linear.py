"""Linear maps over channels with constant weights, whatever operators write them: read and written here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.graph import constant_value, is_op, producer, sole_consumer

FLOATS = (np.float16, np.float32, np.float64)


@dataclass
class Linear:
    """y = W x + b over the channels of x: a convolution, or a product with a matrix, with its bias.

    Attributes:
        node: the Conv, ConvTranspose, MatMul or Gemm.
        add: the Add that its bias is in, if that is a node of its own.
        x, y: input; output, of `add` if there is one.
        weight: (out, in) for MatMul and Gemm, as stored for convolutions: (out, in / group, *kernel), or
            (in, out / group, *kernel) for ConvTranspose.
        bias: (out,) or None.
    """

    node: gs.Node
    add: gs.Node | None
    x: gs.Tensor
    y: gs.Tensor
    weight: np.ndarray
    bias: np.ndarray | None

    @property
    def is_conv(self) -> bool:
        return self.node.op in ("Conv", "ConvTranspose")

    @property
    def group(self) -> int:
        return int(self.node.attrs.get("group", 1)) if self.is_conv else 1

    @property
    def out_channels(self) -> int:
        return self.weight.shape[1] * self.group if self.node.op == "ConvTranspose" else self.weight.shape[0]

    @property
    def pointwise(self) -> bool:
        """Whether an output depends on the input at its own place alone: a matrix or a 1x1 convolution."""
        return not self.is_conv or (self.node.op == "Conv" and _is_pointwise(self.node, self.weight))


def _is_pointwise(node: gs.Node, weight: np.ndarray) -> bool:
    ones = all(size == 1 for size in weight.shape[2:])
    plain = all(step == 1 for step in node.attrs.get("strides", [1]))
    unpadded = not any(node.attrs.get("pads", [0])) and node.attrs.get("auto_pad", "NOTSET") in (
        "NOTSET",
        "VALID",
    )
    return ones and plain and (unpadded or node.attrs.get("auto_pad", "").startswith("SAME"))


def linear_from(graph: gs.Graph, y: gs.Tensor) -> Linear | None:
    """The linear map that makes a tensor; its bias' Add is part of it if nothing else reads between."""
    node = producer(y)
    if node is None:
        return None
    if is_op(node, "Add"):
        for product, bias in (node.inputs, node.inputs[::-1]):
            inner = producer(product)
            if inner is None or not sole_consumer(graph, product):
                continue
            found = _read(inner)
            if found is None or found.bias is not None:
                continue
            vector = _per_channel(bias, found)
            if vector is not None:
                return Linear(found.node, node, found.x, y, found.weight, vector)
        return None
    return _read(node)


def linear_of(graph: gs.Graph, node: gs.Node) -> Linear | None:
    """The linear map that a node is the product of, its bias' Add included where that alone reads it."""
    found = _read(node)
    if found is None or found.bias is not None or not sole_consumer(graph, found.y):
        return found
    whole = linear_from(graph, found.y.outputs[0].outputs[0]) if is_op(found.y.outputs[0], "Add") else None
    return whole if whole is not None and whole.node is node else found


def _read(node: gs.Node) -> Linear | None:
    """The linear map of one node, without an Add behind it."""
    if not is_op(node, "Conv", "ConvTranspose", "MatMul", "Gemm"):
        return None
    weight = constant_value(node.inputs[1])
    bias = constant_value(node.inputs[2]) if has_input(node, 2) else None
    if weight is None or weight.dtype not in FLOATS or (bias is None and has_input(node, 2)):
        return None
    if node.op == "MatMul":
        if weight.ndim != 2:
            return None
        weight = weight.T
    elif node.op == "Gemm":
        attrs = node.attrs
        if attrs.get("transA", 0) or attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0:
            return None
        weight = weight if attrs.get("transB", 0) else weight.T
        if bias is not None and (bias := per_channel(bias, 2, 1, len(weight))) is None:
            return None
    return Linear(node, None, node.inputs[0], node.outputs[0], weight, bias)


def has_input(node: gs.Node, index: int) -> bool:
    """Whether an optional input is given."""
    return len(node.inputs) > index and not node.inputs[index].is_empty()


def _per_channel(tensor: gs.Tensor, linear: Linear) -> np.ndarray | None:
    """A constant that is added to a linear map's output as one value a channel: (out,), else None."""
    value = constant_value(tensor)
    if value is None or linear.y.shape is None:
        return None
    rank = len(linear.y.shape)
    return per_channel(value, rank, 1 if linear.is_conv else rank - 1, linear.out_channels)


def per_channel(value: np.ndarray, rank: int, axis: int, channels: int) -> np.ndarray | None:
    """A constant that broadcasts over a tensor of this rank as one value a channel: (channels,), or None."""
    if value.ndim > rank:
        return None
    full = value.reshape((1,) * (rank - value.ndim) + value.shape)
    if full.size not in (1, channels) or full.shape[axis] != full.size:
        return None
    return np.broadcast_to(full.reshape(-1), (channels,))


def channel_axis(linear: Linear) -> int | None:
    """Which axis of its output a linear map's channels are; None where the graph does not tell."""
    if linear.is_conv or linear.node.op == "Gemm":
        return 1
    return len(linear.y.shape) - 1 if linear.y.shape else None


def by_input(linear: Linear, values: np.ndarray) -> np.ndarray:
    """One value for each input channel, in a shape that multiplies the weight."""
    weight, group = linear.weight, linear.group
    if linear.node.op == "ConvTranspose":
        return values.reshape(-1, *(1,) * (weight.ndim - 1))
    full = np.repeat(values.reshape(group, -1), len(weight) // group, axis=0)
    return full.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))


def by_output(linear: Linear, values: np.ndarray) -> np.ndarray:
    """One value for each output channel, in a shape that multiplies the weight."""
    weight, group = linear.weight, linear.group
    if linear.node.op == "ConvTranspose":
        full = np.repeat(values.reshape(group, -1), len(weight) // group, axis=0)
        return full.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))
    return values.reshape(-1, *(1,) * (weight.ndim - 1))


def representable(linear: Linear, *arrays: np.ndarray | None) -> bool:
    """Whether new weights are finite in the type of the old."""
    with np.errstate(over="ignore"):
        return all(np.isfinite(a.astype(linear.weight.dtype)).all() for a in arrays if a is not None)


def set_weights(
    graph: gs.Graph, linear: Linear, weight: np.ndarray, bias: np.ndarray | None, fresh: Callable[[str], str]
) -> None:
    """Give a linear map other weights of the same shape, as new constants: the old may be shared.

    With a bias where there was none a MatMul gets an Add behind it; without one the old bias stays.
    """
    node, dtype = linear.node, linear.weight.dtype
    if node.op == "MatMul" or (node.op == "Gemm" and not node.attrs.get("transB", 0)):
        weight = weight.T
    node.inputs[1] = gs.Constant(fresh(f"{linear.y.name}/weight"), np.ascontiguousarray(weight, dtype))
    if bias is None:
        return
    values = np.ascontiguousarray(bias, dtype)
    if linear.add is not None and linear.is_conv:
        values = values.reshape(1, -1, *(1,) * (linear.weight.ndim - 2))
    constant = gs.Constant(fresh(f"{linear.y.name}/bias"), values)
    if linear.add is not None:
        index = next(i for i, tensor in enumerate(linear.add.inputs) if tensor is not node.outputs[0])
        linear.add.inputs[index] = constant
    elif node.op == "MatMul":
        product = gs.Variable(fresh(f"{linear.y.name}/product"), linear.y.dtype, linear.y.shape)
        node.outputs = [product]
        graph.nodes.append(gs.Node("Add", constant.name, {}, [product, constant], [linear.y]))
    elif len(node.inputs) > 2:
        node.inputs[2] = constant
    else:
        node.inputs.append(constant)
