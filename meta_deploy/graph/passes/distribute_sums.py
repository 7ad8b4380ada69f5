"""A 1x1 convolution of a sum becomes the sum of 1x1 convolutions, which fold into what makes each term.

What a pyramid's lateral convolution reads is such a sum: of a convolution, a transposed one and resized maps.
The convolution then runs before the resizing, on the smaller map. All sizes but the batch must be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, read_elsewhere, shown
from meta_deploy.graph.graph import (
    IdentitySet,
    constant_value,
    fresh_names,
    is_batch,
    is_op,
    own_nodes,
    producer,
    sole_consumer,
    static_shape,
    tidy,
)
from meta_deploy.graph.linear import Linear, has_input, linear_from, linear_of, representable
from meta_deploy.graph.prices import CPU, Cost

MOST_TERMS = 16


@dataclass(frozen=True)
class Term:
    """One term of the sum, and how the convolution gets past it.

    Attributes:
        x: the term.
        price: of the nodes that come, less that of those that go.
        linear: the convolution that it folds into, if it does.
        resize: the Resize that it goes before, if it does.
    """

    x: gs.Tensor
    price: float
    linear: Linear | None = None
    resize: gs.Node | None = None


def distribute_sums(graph: gs.Graph, cost: Cost = CPU) -> int:
    """Take a 1x1 convolution into the terms of the sum that it reads, if that is cheaper.

    Pattern: Conv 1x1 over a tree of Adds of tensors of one shape.
    Check: nothing else reads the sums; a term that folds is read by its Add alone. Resize keeps batch and
    channels, and does not extrapolate: its weights then add up to one (ONNX Resize), so the bias may pass it.
    Rewrite: kernels multiply, the bias goes to the first term.

    Returns:
        Convolutions taken apart.
    """
    tidy(graph)  # what no output needs is no reader
    changes = 0
    while count := _distribute_all(graph, cost):  # again: before a Resize there may be another sum
        changes += count
    return changes


def _distribute_all(graph: gs.Graph, cost: Cost) -> int:
    fresh = fresh_names(graph)
    changes = 0
    for node in graph.nodes[:]:
        if not is_op(node, "Conv") or not node.outputs or (fuse := linear_of(graph, node)) is None:
            continue
        if fuse.pointwise and fuse.group == 1 and fuse.weight.ndim == 4:
            terms = _terms(graph, fuse, cost)
            if terms:
                _rewrite(graph, fuse, terms, fresh)
                tidy(graph)
                changes += 1
    return changes


def _terms(graph: gs.Graph, fuse: Linear, cost: Cost) -> list[Term] | None:
    """The terms of the sum that a convolution reads, if it is worth taking it into them."""
    shape, out = static_shape(fuse.x), static_shape(fuse.y)
    if producer(fuse.x, "Add") is None:
        return None
    if shape is None or out is None or 0 in shape:
        declined(fuse.node, f"{shown(fuse.x if not shape or 0 in shape else fuse.y)} is not of known shape")
        return None
    inside = own_nodes(graph)
    if fuse.add is not None and fuse.add not in inside:
        return None
    tensors, stack = [], [fuse.x]
    while stack:
        x = stack.pop()
        add = producer(x, "Add")
        whole = add is not None and sole_consumer(graph, x) and linear_from(graph, x) is None
        if add is not None and whole and all(static_shape(t) == shape for t in add.inputs):
            stack.extend(add.inputs[::-1])
        else:
            tensors.append(x)
    if not 1 < len(tensors) <= MOST_TERMS or len(IdentitySet(tensors)) < len(tensors):
        if linear_from(graph, fuse.x) is None:
            declined(fuse.node, _no_terms(graph, fuse, tensors))
        return None
    terms = [_cheapest(graph, x, fuse, cost) for x in tensors]
    shape, out = _one_image(fuse.x), _one_image(fuse.y)
    adds = (len(terms) - 1) * (cost.of(0, out, out, out) - cost.of(0, shape, shape, shape))
    saved = _conv_price(fuse, shape, out, cost) + _add_price(fuse, cost)
    if (price := sum(term.price for term in terms) + adds) >= saved:
        declined(fuse.node, f"taken apart it costs {price:.3g} multiply-adds, and as it is {saved:.3g}")
        return None
    kernel = fuse.weight[:, :, 0, 0].astype(np.float64)
    folded = [_folded(kernel, term.linear) for term in terms if term.linear is not None]
    if not all(representable(fuse, *weights) for weights in folded):
        declined(fuse.node, "folded weights would overflow")
        return None
    return terms


def _no_terms(graph: gs.Graph, fuse: Linear, tensors: list[gs.Tensor]) -> str:
    """Why a sum is not taken apart into these."""
    if len(tensors) > MOST_TERMS:
        return f"the sum has {len(tensors)} terms, more than {MOST_TERMS}"
    if len(tensors) > 1:
        return "a term is in the sum twice"
    if not sole_consumer(graph, fuse.x):
        return read_elsewhere(graph, fuse.x, fuse.node)
    return f"the terms of {shown(fuse.x)} are not all of its shape"


def _cheapest(graph: gs.Graph, x: gs.Tensor, fuse: Linear, cost: Cost) -> Term:
    """How the convolution gets past one term."""
    shape, out = _one_image(x), _one_image(fuse.y)
    ways = [Term(x, _conv_price(fuse, shape, out, cost))]
    if not sole_consumer(graph, x):
        return ways[0]
    resize = producer(x, "Resize")
    if resize is not None and _keeps_constants(resize) and _same_maps(resize):
        small = _one_image(resize.inputs[0])
        moved = [small[0], out[1], *small[2:]]
        price = _conv_price(fuse, small, moved, cost) + cost.of(0, moved, out) - cost.of(0, small, shape)
        ways.append(Term(x, price, resize=resize))
    linear = linear_from(graph, x)
    if linear is not None and linear.is_conv and linear.group == 1:
        source = static_shape(linear.x, batch=1)
        if source is not None:
            # Each output, or input for the transposed one, meets the whole kernel.
            places = math.prod((shape if linear.node.op == "Conv" else source)[2:]) * shape[0]
            macs = places * linear.weight.size
            price = cost.of(macs // shape[1] * out[1], source, out) - cost.of(macs, source, shape)
            ways.append(Term(x, price - _add_price(linear, cost), linear))
    return min(ways, key=lambda term: term.price)


def _add_price(linear: Linear, cost: Cost) -> float:
    """What the Add of a bias costs, if that is a node of its own."""
    y = static_shape(linear.y, batch=1)
    return 0.0 if linear.add is None or y is None else cost.of(0, y, y)


def _conv_price(fuse: Linear, shape: list[int], out: list[int], cost: Cost) -> float:
    return cost.of(math.prod(out) * fuse.weight.shape[1], shape, out)


def _one_image(x: gs.Tensor) -> list[int]:
    """A known shape, of one image where the batch is not known: for prices."""
    shape = static_shape(x, batch=1)
    assert shape is not None
    return shape


def _same_maps(resize: gs.Node) -> bool:
    """Whether a Resize is known to keep batch and channels, and its sizes, if it has any, can be written."""
    before, after = static_shape(resize.inputs[0]), static_shape(resize.outputs[0])
    if before is None or after is None or before[:2] != after[:2]:
        return False
    return not (has_input(resize, 3) and any(map(is_batch, after)))


def _keeps_constants(node: gs.Node) -> bool:
    """Whether a Resize gives a constant map back as it is, and works on one map at a time."""
    attrs = node.attrs
    if has_input(node, 2) == has_input(node, 3) or "axes" in attrs or attrs.get("exclude_outside", 0):
        return False
    scales = constant_value(node.inputs[2]) if has_input(node, 2) else np.ones(2)
    stretched = attrs.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    cropped = attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    return scales is not None and bool((scales[:2] == 1).all()) and stretched and not cropped


def _rewrite(graph: gs.Graph, fuse: Linear, terms: list[Term], fresh: Callable[[str], str]) -> None:
    y, dtype = fuse.y, fuse.weight.dtype
    kernel = fuse.weight[:, :, 0, 0].astype(np.float64)
    bias = None if fuse.bias is None else fuse.bias.astype(np.float64)
    y.inputs.clear()
    # A convolution adds in passing what is there already, so it comes last.
    terms = sorted(terms, key=_is_conv)
    total: gs.Tensor | None = None
    for i, term in enumerate(terms):
        # The bias of the whole comes with the first term.
        out = _term(graph, fuse, term, kernel, bias if i == 0 else None, fresh)
        if total is not None:
            result = y if i == len(terms) - 1 else gs.Variable(fresh(f"{y.name}/sum"), dtype, y.shape)
            graph.nodes.append(gs.Node("Add", fresh(f"{y.name}/add"), {}, [total, out], [result]))
            out = result
        total = out


def _term(
    graph: gs.Graph,
    fuse: Linear,
    term: Term,
    kernel: np.ndarray,
    bias: np.ndarray | None,
    fresh: Callable[[str], str],
) -> gs.Tensor:
    """The convolution of one term."""
    if term.resize is not None:
        return _before_resize(graph, fuse, term.resize, kernel, bias, fresh)
    if term.linear is None:
        shape = [term.x.shape[0], len(kernel), *term.x.shape[2:]]
        return _conv(
            graph, fuse, term.x, kernel[..., None, None], bias, shape, {"kernel_shape": [1, 1]}, fresh
        )
    linear = term.linear
    folded, inner = _folded(kernel, linear)
    bias = inner if bias is None else bias if inner is None else bias + inner
    attrs, shape = dict(linear.node.attrs), list(fuse.y.shape)
    return _conv(graph, fuse, linear.x, folded, bias, shape, attrs, fresh, linear.node.op)


def _folded(kernel: np.ndarray, linear: Linear) -> tuple[np.ndarray, np.ndarray | None]:
    """The weights and the bias, in float64, of a convolution with a 1x1 kernel (out, in) behind it."""
    axis = 0 if linear.node.op == "Conv" else 1
    weight = np.moveaxis(np.tensordot(kernel, linear.weight.astype(np.float64), ([1], [axis])), 0, axis)
    return weight, None if linear.bias is None else kernel @ linear.bias.astype(np.float64)


def _is_conv(term: Term) -> bool:
    return term.resize is None and (term.linear is None or term.linear.node.op == "Conv")


def _before_resize(
    graph: gs.Graph,
    fuse: Linear,
    resize: gs.Node,
    kernel: np.ndarray,
    bias: np.ndarray | None,
    fresh: Callable[[str], str],
) -> gs.Tensor:
    x, dtype = resize.inputs[0], fuse.weight.dtype
    shape = [x.shape[0], len(kernel), *x.shape[2:]]
    small = _conv(graph, fuse, x, kernel[..., None, None], bias, shape, {"kernel_shape": [1, 1]}, fresh)
    inputs = [small, *resize.inputs[1:]]
    out = gs.Variable(fresh(f"{fuse.y.name}/resized"), dtype, fuse.y.shape)
    if has_input(resize, 3):
        sizes = gs.Constant(fresh(f"{out.name}/sizes"), np.array(fuse.y.shape, np.int64))
        inputs[3] = sizes
    graph.nodes.append(gs.Node("Resize", out.name, dict(resize.attrs), inputs, [out]))
    return out


def _conv(
    graph: gs.Graph,
    fuse: Linear,
    x: gs.Tensor,
    kernel: np.ndarray,
    bias: np.ndarray | None,
    shape: list[int],
    attrs: dict,
    fresh: Callable[[str], str],
    op: str = "Conv",
) -> gs.Tensor:
    name, dtype = fuse.y.name, fuse.weight.dtype
    out = gs.Variable(fresh(f"{name}/term"), dtype, shape)
    values = [kernel] if bias is None else [kernel, bias]
    constants = [gs.Constant(fresh(f"{out.name}/weights"), np.ascontiguousarray(v, dtype)) for v in values]
    graph.nodes.append(gs.Node(op, out.name, attrs, [x, *constants], [out]))
    return out
