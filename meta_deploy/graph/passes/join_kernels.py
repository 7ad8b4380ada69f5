"""Convolutions of one map by kernels of several sizes, and linear maps of its tokens, become one convolution.

Smaller kernels get a border of zeros: more multiply-adds for fewer launches, which pays on a GPU where maps
are small. All sizes but the batch must be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import IdentitySet, fresh_names, is_op, made_in, own_nodes, static_shape, tidy
from meta_deploy.graph.linear import Linear, linear_of
from meta_deploy.graph.moves import MOVES, add_move, chain_before, follow
from meta_deploy.graph.prices import CPU, Cost

_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
# What a kernel does beside its own work, with what it has read or is about to write.
_PASSING = (
    *("Relu", "LeakyRelu", "Gelu", "Erf", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Clip", "Elu"),
    *("Split", "Identity", "Cast", *MOVES),
)


def join_kernels(graph: gs.Graph, cost: Cost = CPU) -> int:
    """Join what is computed of one map along the outputs' channels, with the largest kernel.

    Pattern: Conv of a map (B, C, H, W), in one group, of an odd kernel whose padding keeps H and W; MatMul of
    tokens (B, …, C) whose move that map is.
    Check: weights are constant, and kernels differ in size (`merge-siblings` joins those that do not); a
    product less is worth more than the multiply-adds by zeros, and than a copy of each part that another
    product reads.

    Returns:
        Products saved.
    """
    if graph.opset < 13:  # Split takes its sizes otherwise
        return 0
    tidy(graph)  # what no output needs is no part
    fresh, inside = fresh_names(graph), own_nodes(graph)
    changes = 0
    for x in [*graph.inputs, *made_in(graph)]:
        parts = [linear for linear in _linears(graph, x, inside) if _keeps_size(linear)]
        if not parts:
            continue
        tokens = _tokens(graph, x)
        if tokens is not None:
            parts += [one for one in _linears(graph, tokens, inside) if one.node.op == "MatMul"]
        kernels = {(one.node.op, _kernel(one)) for one in parts}
        if len(kernels) < 2 or len({one.weight.dtype for one in parts}) > 1:
            continue
        if (reason := _against(x, parts, cost)) is not None:
            declined(parts[0].node, reason)
            continue
        _join(graph, x, parts, fresh)
        changes += len(parts) - 1
    if changes:
        tidy(graph)
    return changes


def _linears(graph: gs.Graph, x: gs.Tensor, inside: IdentitySet) -> list[Linear]:
    """The linear maps of a tensor in this graph, with their biases."""
    found = []
    for node in IdentitySet(x.outputs):
        linear = linear_of(graph, node) if node in inside and is_op(node, "Conv", "MatMul") else None
        if linear is not None and linear.x is x and (linear.add is None or linear.add in inside):
            found.append(linear)
    return found


def _keeps_size(linear: Linear) -> bool:
    """Whether an output of a convolution is as large as its input, each place in the middle of a kernel."""
    attrs, kernel = linear.node.attrs, linear.weight.shape[2:]
    plain = all(step == 1 for name in ("strides", "dilations") for step in attrs.get(name, ()))
    pads = list(attrs.get("pads", [0] * 2 * len(kernel)))
    centered = pads == [size // 2 for size in kernel] * 2 and all(size % 2 for size in kernel)
    explicit = attrs.get("auto_pad", "NOTSET") == "NOTSET"
    return linear.node.op == "Conv" and linear.group == 1 and plain and explicit and centered


def _kernel(linear: Linear) -> tuple[int, ...]:
    """Its size; empty for a product of tokens."""
    return linear.weight.shape[2:]


def _tokens(graph: gs.Graph, x: gs.Tensor) -> gs.Tensor | None:
    """The tokens (B, …, C) that a map (B, C, …) is made of by moves; None if it is not."""
    start, chain = chain_before(graph, x)
    factors = follow(start, chain) if chain else None
    if factors is None or len(factors.origin) < 3:
        return None
    batch, *space, channels = factors.origin
    order = [factor for axis in factors.axes for factor in axis]
    wanted = [*batch, *channels, *(factor for axis in space for factor in axis)]
    return start if channels and factors.axes[:2] == [batch, channels] and order == wanted else None


def _against(x: gs.Tensor, parts: Sequence[Linear], cost: Cost) -> str | None:
    """What speaks against one convolution: that it costs more."""
    shape = static_shape(x, batch=1)
    if shape is None:
        return f"the shape of {shown(x)} is not known"
    batch, _, *space = shape
    kernel, places = _largest(parts), batch * math.prod(space)
    outs = [[batch, one.out_channels, *space] for one in parts]
    before = sum(cost.of(places * one.weight.size, shape, out) for one, out in zip(parts, outs, strict=True))
    channels = sum(one.out_channels for one in parts)
    macs = places * channels * shape[1] * math.prod(kernel)
    after = cost.of(macs, shape, [batch, channels, *space])
    after += sum(cost.of(0, out, out) for one, out in zip(parts, outs, strict=True) if _feeds_product(one.y))
    if after < before:
        return None
    others = " and ".join(shown(one.node) for one in parts[1:])
    return f"one convolution costs {after:.3g} multiply-adds, and with {others} apart it is {before:.3g}"


def _feeds_product(y: gs.Tensor) -> bool:
    """Whether a product reads a tensor with nothing between that has a kernel of its own."""
    readers = [y]
    while readers:
        for node in readers.pop().outputs:
            if is_op(node, *_PRODUCTS):
                return True
            if is_op(node, *_PASSING):
                readers += node.outputs
    return False


def _largest(parts: Sequence[Linear]) -> list[int]:
    """A kernel that every part's fits into."""
    return [max(sizes) for sizes in zip(*filter(None, map(_kernel, parts)), strict=True)]


def _join(graph: gs.Graph, x: gs.Tensor, parts: Sequence[Linear], fresh: Callable[[str], str]) -> None:
    batch, _, *space = static_shape(x) or []
    kernel, name, dtype = _largest(parts), parts[0].y.name, parts[0].weight.dtype
    weight = np.concatenate([_bordered(one.weight, kernel) for one in parts])
    inputs = [x, gs.Constant(fresh(f"{name}/weight"), np.ascontiguousarray(weight, dtype))]
    if any(one.bias is not None for one in parts):
        biases = [np.zeros(one.out_channels) if one.bias is None else one.bias for one in parts]
        inputs.append(gs.Constant(fresh(f"{name}/bias"), np.concatenate(biases).astype(dtype)))
    joined = gs.Variable(fresh(f"{name}/joined"), parts[0].y.dtype, [batch, len(weight), *space])
    attrs = {"kernel_shape": kernel, "pads": [size // 2 for size in kernel] * 2}
    graph.nodes.append(gs.Node("Conv", joined.name, attrs, inputs, [joined]))
    outs = []
    for one in parts:
        y = one.y
        y.inputs.clear()
        if one.is_conv:
            outs.append(y)
            continue
        out = gs.Variable(fresh(f"{y.name}/map"), y.dtype, [batch, one.out_channels, *space])
        outs.append(out)
        rows = static_shape(one.x) or []
        if rows[1:-1] != space:
            flat = gs.Variable(fresh(f"{y.name}/rows"), y.dtype, [batch, one.out_channels, *rows[1:-1]])
            add_move(graph, "Reshape", list(flat.shape), out, flat, fresh)
            out = flat
        add_move(graph, "Transpose", [0, *range(2, len(rows)), 1], out, y, fresh)
    sizes = gs.Constant(fresh(f"{name}/sizes"), np.array([one.out_channels for one in parts], np.int64))
    graph.nodes.append(gs.Node("Split", fresh(f"{name}/split"), {"axis": 1}, [joined, sizes], outs))


def _bordered(weight: np.ndarray, kernel: Sequence[int]) -> np.ndarray:
    """Weights of a larger kernel that does the same; of a matrix, too."""
    weight = weight.reshape(*weight.shape[:2], *(weight.shape[2:] or [1] * len(kernel)))
    borders = [(size - own) // 2 for size, own in zip(kernel, weight.shape[2:], strict=True)]
    return np.pad(weight, [(0, 0), (0, 0), *((border, border) for border in borders)])
