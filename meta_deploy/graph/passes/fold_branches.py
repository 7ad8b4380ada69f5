"""Linear maps with nothing between them become one: branches fold into the 1x1 convolution that fuses them.

A convolution after a convolution is a convolution. Where all branches end in linear maps the concatenation is
a sum of such, or one convolution over what the branches start from. All sizes but the batch must be known.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import (
    IdentitySet,
    detach,
    fresh_names,
    is_op,
    own_nodes,
    producer,
    sole_consumer,
    static_shape,
    tidy,
)
from meta_deploy.graph.linear import Linear, linear_from, linear_of, representable
from meta_deploy.graph.prices import CPU, Cost

TO_CHANNELS_FIRST = [0, 3, 1, 2]
MOST_PLANS = 256
LARGEST_KERNEL = 7


@dataclass(frozen=True)
class Term:
    """One branch, folded up to some point: a kernel over the channels of x, and the bias that comes out.

    Attributes:
        x: what the kernel is convolved with: (B, C, H, W), or (B, H, W, C) if `last`.
        last: whether x has its channels last.
        kernel: (out, C, k, k) in float64, k odd; zero padding keeps the size.
        bias: (out,) in float64.
        kept: the price of the nodes of this branch that stay.
    """

    x: gs.Tensor
    last: bool
    kernel: np.ndarray
    bias: np.ndarray
    kept: float

    @property
    def size(self) -> int:
        return self.kernel.shape[-1]


def fold_branches(graph: gs.Graph, cost: Cost = CPU) -> int:
    """Fold linear maps into the 1x1 convolution that reads them, through a Concat or directly.

    Pattern: Conv 1x1 over a Concat of channels; branches that end in convolutions of odd kernels, stride 1
    and zero padding that keeps the size, or in a product of tokens and the Transpose to channels first.
    Check: nothing else reads between, weights are constant; the new form is the cheaper one.
    Rewrite: kernels multiply; the fused convolution's zero padding is that of the first one in each branch,
    so that the result is exact. The terms of one kernel size share a convolution over a Concat, the sizes are
    added; or the small kernels get a border of zeros and all is one convolution.

    Returns:
        Convolutions rewritten.
    """
    tidy(graph)  # in order: what was folded is folded further
    changes = 0
    while count := _fold_all(graph, cost):  # again: a part of a sum may take in more by itself
        changes += count
    return changes


def _fold_all(graph: gs.Graph, cost: Cost) -> int:
    fresh = fresh_names(graph)
    inside = own_nodes(graph)
    changes = 0
    for node in graph.nodes[:]:
        if is_op(node, "Conv") and node.inputs and (found := _match(graph, node, inside, cost)):
            _rewrite(graph, *found, fresh)
            detach(graph, node)  # what is no longer needed is no reader either
            changes += 1
    if changes:
        tidy(graph)
    return changes


Plan = list[list[Term]]  # the terms of each convolution


def _match(graph: gs.Graph, node: gs.Node, inside: IdentitySet, cost: Cost) -> tuple[Linear, Plan] | None:
    """The convolution and the cheapest form of it, if that is not the present one."""
    fuse = linear_of(graph, node)
    if fuse is None or not fuse.pointwise or fuse.group != 1 or fuse.weight.ndim != 4:
        return None
    shape = static_shape(fuse.y, batch=1)
    if shape is None or (fuse.add is not None and fuse.add not in inside):
        return None
    concat = producer(fuse.x, "Concat")
    parts = [fuse.x]
    if concat is not None and sole_consumer(graph, fuse.x) and concat.attrs.get("axis") in (1, -3):
        parts = list(concat.inputs)
    branches, start = [], 0
    for part in parts:
        channels = static_shape(part)
        if channels is None or 0 in channels or isinstance(part, gs.Constant):
            if concat is not None:
                declined(node, f"{shown(part)} is constant, or not of known shape")
            return None
        weight = fuse.weight[:, start : start + channels[1]].astype(np.float64)
        branches.append(_terms(graph, part, weight, cost))
        start += channels[1]
    if all(len(terms) == 1 for terms in branches):
        return None
    if (forms := math.prod(map(len, branches))) > MOST_PLANS:
        declined(node, f"there are {forms} forms to choose from, more than {MOST_PLANS}")
        return None
    present = [[terms[0] for terms in branches]]
    best, price = present, _price(present, shape, cost)
    for terms in itertools.product(*branches):
        sizes = sorted({term.size for term in terms})
        for plan in ([list(terms)], [[t for t in terms if t.size == size] for size in sizes]):
            if (other := _price(plan, shape, cost)) < price:
                best, price = plan, other
    if best is present:
        declined(node, f"it is cheapest as it is: {price:.3g} multiply-adds")
        return None
    if not _representable(best, fuse):
        declined(node, "folded weights would overflow")
        return None
    return fuse, best


def _terms(graph: gs.Graph, x: gs.Tensor, kernel: np.ndarray, cost: Cost) -> list[Term]:
    """A branch in all ways to fold it: not at all, its last map, its last two, ...; what stays is priced."""
    terms = [Term(x, False, kernel, np.zeros(len(kernel)), 0.0)]
    prices: list[float] = []
    while (step := _step(graph, terms[-1], cost)) is not None:
        terms.append(step[0])
        prices.append(step[1])
    # What is not folded stays and costs.
    return [Term(t.x, t.last, t.kernel, t.bias, sum(prices[i:])) for i, t in enumerate(terms)]


def _step(graph: gs.Graph, term: Term, cost: Cost) -> tuple[Term, float] | None:
    """Fold one more linear map into a term; with the price of the nodes that this saves."""
    if term.size != 1 or not sole_consumer(graph, term.x):
        return None
    y, moved = term.x, 0.0
    transpose = None if term.last else producer(y, "Transpose")
    if transpose is not None:
        y = transpose.inputs[0]
        shape = static_shape(y, batch=1)
        if transpose.attrs.get("perm") != TO_CHANNELS_FIRST or shape is None or not sole_consumer(graph, y):
            return None
        moved = cost.of(0, shape, shape)
    linear = linear_from(graph, y)
    if linear is None or linear.is_conv == (term.last or transpose is not None):
        return None
    found = _through_conv(term, linear, cost) if linear.is_conv else _through_product(term, linear, cost)
    return None if found is None else (found[0], found[1] + moved)


def _through_product(term: Term, linear: Linear, cost: Cost) -> tuple[Term, float] | None:
    x_shape, y_shape = static_shape(linear.x, batch=1), static_shape(linear.y, batch=1)
    if x_shape is None or y_shape is None or len(x_shape) != 4:
        return None
    kernel = term.kernel[:, :, 0, 0] @ linear.weight.astype(np.float64)
    price = cost.of(math.prod(y_shape) * x_shape[-1], x_shape, y_shape)
    return Term(linear.x, True, kernel[..., None, None], _bias(term, linear), 0.0), price


def _through_conv(term: Term, linear: Linear, cost: Cost) -> tuple[Term, float] | None:
    attrs, weight = linear.node.attrs, linear.weight
    x_shape, y_shape = static_shape(linear.x, batch=1), static_shape(linear.y, batch=1)
    if linear.node.op != "Conv" or weight.ndim != 4 or x_shape is None or y_shape is None:
        return None
    k = weight.shape[-1]
    same = attrs.get("pads", [0] * 4) == [k // 2] * 4 and attrs.get("auto_pad", "NOTSET") == "NOTSET"
    steps = [*attrs.get("strides", [1]), *attrs.get("dilations", [1])]
    if not same or set(steps) != {1} or weight.shape[-2] != k or k % 2 == 0 or k > LARGEST_KERNEL:
        return None
    group, ins = linear.group, weight.shape[1]
    outer = term.kernel.reshape(len(term.kernel), group, -1).swapaxes(0, 1)  # (group, out, between / group)
    inner = weight.astype(np.float64).reshape(group, -1, ins * k * k)
    kernel = (outer @ inner).swapaxes(0, 1).reshape(-1, group * ins, k, k)
    price = cost.of(math.prod(y_shape) * ins * k * k, x_shape, y_shape)
    return Term(linear.x, False, kernel, _bias(term, linear), 0.0), price


def _bias(term: Term, linear: Linear) -> np.ndarray:
    """What comes out where a linear map's bias goes into a term."""
    inner = 0 if linear.bias is None else term.kernel[:, :, 0, 0] @ linear.bias.astype(np.float64)
    return term.bias + inner


def _price(plan: Plan, shape: list[int], cost: Cost) -> float:
    """What the convolutions of a plan cost, with all that joins them, and what stays before them."""
    b, out, h, w = shape
    total = 0.0
    for terms in plan:
        channels = sum(term.kernel.shape[1] for term in terms)
        size = max(term.size for term in terms)
        x_shape = (b, channels, h, w)
        total += cost.of(b * out * h * w * channels * size * size, x_shape, shape)
        if len(terms) > 1:
            total += cost.of(0, x_shape, x_shape)
        for term in terms:
            x_shape = (b, term.kernel.shape[1], h, w)
            total += term.kept + (cost.of(0, x_shape, x_shape) if term.last else 0.0)
    return total + (len(plan) - 1) * cost.of(0, shape, shape, shape)


def _representable(plan: Plan, fuse: Linear) -> bool:
    """Whether all new weights are finite in the type that they get."""
    terms = [term for terms in plan for term in terms]
    return representable(fuse, _whole_bias(terms, fuse), *(term.kernel for term in terms))


def _whole_bias(terms: list[Term], fuse: Linear) -> np.ndarray:
    own = np.zeros(fuse.out_channels) if fuse.bias is None else fuse.bias.astype(np.float64)
    return own + sum(term.bias for term in terms)


def _rewrite(graph: gs.Graph, fuse: Linear, plan: Plan, fresh: Callable[[str], str]) -> None:
    y, dtype = fuse.y, fuse.weight.dtype
    bias = _whole_bias([term for terms in plan for term in terms], fuse)
    y.inputs.clear()
    total: gs.Tensor | None = None
    for i, terms in enumerate(plan):
        size = max(term.size for term in terms)
        kernel = np.concatenate([_padded(term.kernel, size) for term in terms], axis=1)
        inputs = [_channels_first(graph, term, fresh) for term in terms]
        x = inputs[0]
        if len(inputs) > 1:
            b, _, h, w = static_shape(y)  # type: ignore[misc]
            x = gs.Variable(fresh(f"{y.name}/concat"), dtype, [b, kernel.shape[1], h, w])
            graph.nodes.append(gs.Node("Concat", x.name, {"axis": 1}, inputs, [x]))
        values = [("weight", kernel)] + ([("bias", bias)] if i == 0 else [])
        constants = [
            gs.Constant(fresh(f"{y.name}/{name}"), np.ascontiguousarray(value, dtype))
            for name, value in values
        ]
        out = y if len(plan) == 1 else gs.Variable(fresh(f"{y.name}/term"), dtype, y.shape)
        attrs = {"kernel_shape": [size, size], "pads": [size // 2] * 4, "strides": [1, 1], "group": 1}
        graph.nodes.append(gs.Node("Conv", fresh(f"{y.name}/conv"), attrs, [x, *constants], [out]))
        if total is not None:
            result = y if i == len(plan) - 1 else gs.Variable(fresh(f"{y.name}/sum"), dtype, y.shape)
            graph.nodes.append(gs.Node("Add", fresh(f"{y.name}/add"), {}, [total, out], [result]))
            out = result
        total = out


def _padded(kernel: np.ndarray, size: int) -> np.ndarray:
    """A kernel with a border of zeros, up to a size."""
    border = (size - kernel.shape[-1]) // 2
    return np.pad(kernel, ((0, 0), (0, 0), (border, border), (border, border)))


def _channels_first(graph: gs.Graph, term: Term, fresh: Callable[[str], str]) -> gs.Tensor:
    if not term.last:
        return term.x
    b, h, w, c = static_shape(term.x)  # type: ignore[misc]
    out = gs.Variable(fresh(f"{term.x.name}/first"), term.x.dtype, [b, c, h, w])
    graph.nodes.append(gs.Node("Transpose", out.name, {"perm": TO_CHANNELS_FIRST}, [term.x], [out]))
    return out
