"""A 1x1 convolution of a sum becomes the sum of 1x1 convolutions, which fold into what makes each term.

What a pyramid's lateral convolution reads is such a sum: of a convolution, a transposed one and resized maps.
So is a Concat of maps, such as those of a SegFormer's head, each of which meets its columns of the kernel.
The convolution then runs before the resizing, on the smaller map. All sizes but the batch must be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from meta_deploy.graph.moves import MOVES, add_move, chain_before
from meta_deploy.graph.places import parts_of
from meta_deploy.graph.prices import CPU, Cost

MOST_TERMS = 16
_MOST = 1 << 24  # numbers of tokens that are followed


@dataclass(frozen=True)
class Term:
    """One term of the sum, and how the convolution gets past it.

    Attributes:
        x: the term.
        kernel: the convolution of it, (out, in).
        price: of the nodes that come, less that of those that go.
        linear: the linear map that it folds into, if it does: a convolution, or a product over tokens that
            become the pixels of x in their order.
        resize: the Resize that it goes before, if it does.
    """

    x: gs.Tensor
    kernel: np.ndarray
    price: float
    linear: Linear | None = None
    resize: gs.Node | None = None


def distribute_sums(graph: gs.Graph, cost: Cost = CPU) -> int:
    """Take a 1x1 convolution into the terms of the sum that it reads, if that is cheaper.

    Pattern: Conv 1x1 over a tree of Adds of tensors of one shape, and of Concats of channels; or over tokens
    of a product.
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
    maker = producer(fuse.x)
    if maker is None or not is_op(maker, "Add", "Concat", *MOVES):
        return None
    if shape is None or out is None or 0 in shape:
        declined(fuse.node, f"{shown(fuse.x if not shape or 0 in shape else fuse.y)} is not of known shape")
        return None
    if fuse.add is not None and fuse.add not in own_nodes(graph):
        return None
    parts, gone = _parts(graph, fuse, cost)
    if len(parts) == 1 and (is_op(maker, "Add", "Concat") or _of_tokens(graph, fuse.x) is None):
        if is_op(maker, "Add") and linear_from(graph, fuse.x) is None:
            declined(fuse.node, _no_terms(graph, fuse, parts))
        return None
    if len(parts) > MOST_TERMS or len(IdentitySet(x for x, _ in parts)) < len(parts):
        declined(fuse.node, _no_terms(graph, fuse, parts))
        return None
    terms = [_cheapest(graph, x, kernel, fuse, cost) for x, kernel in parts]
    shape, out = _one_image(fuse.x), _one_image(fuse.y)
    adds = (len(terms) - 1) * cost.of(0, out, out, out) - gone
    saved = _conv_price(shape, out, cost) + _add_price(fuse, cost)
    if (price := sum(term.price for term in terms) + adds) >= saved:
        declined(fuse.node, f"taken apart it costs {price:.3g} multiply-adds, and as it is {saved:.3g}")
        return None
    folded = [_folded(term.kernel, term.linear) for term in terms if term.linear is not None]
    if not all(representable(fuse, *weights) for weights in folded):
        declined(fuse.node, "folded weights would overflow")
        return None
    return terms


def _parts(graph: gs.Graph, fuse: Linear, cost: Cost) -> tuple[list[tuple[gs.Tensor, np.ndarray]], float]:
    """What a convolution reads, apart, each with its kernel; and the price of what puts them together."""
    parts: list[tuple[gs.Tensor, np.ndarray]] = []
    stack, gone = [(fuse.x, fuse.weight[:, :, 0, 0].astype(np.float64))], 0.0
    while stack:
        x, kernel = stack.pop()
        node, shape = producer(x), static_shape(x)
        whole = node is not None and sole_consumer(graph, x) and linear_from(graph, x) is None
        sizes = [static_shape(tensor) for tensor in node.inputs] if whole and node is not None else []
        if whole and node is not None and is_op(node, "Add") and all(size == shape for size in sizes):
            stack += [(tensor, kernel) for tensor in node.inputs[::-1]]
        elif whole and node is not None and _joins_channels(node, shape, sizes):
            ends = np.cumsum([size[1] for size in sizes if size])[:-1]
            stack += list(zip(node.inputs, np.split(kernel, ends, 1), strict=True))[::-1]
        else:
            parts.append((x, kernel))
            continue
        gone += cost.of(0, _one_image(x), *map(_one_image, node.inputs))
    return parts, gone


def _joins_channels(node: gs.Node, shape: list[int] | None, sizes: list[list[int] | None]) -> bool:
    """Whether a node is a Concat of maps of known sizes along their channels."""
    if shape is None or not is_op(node, "Concat") or None in sizes:
        return False
    return node.attrs["axis"] % len(shape) == 1 and not any(isinstance(x, gs.Constant) for x in node.inputs)


def _no_terms(graph: gs.Graph, fuse: Linear, parts: Sequence[object]) -> str:
    """Why a sum is not taken apart into these."""
    if len(parts) > MOST_TERMS:
        return f"the sum has {len(parts)} terms, more than {MOST_TERMS}"
    if len(parts) > 1:
        return "a term is in the sum twice"
    if not sole_consumer(graph, fuse.x):
        return read_elsewhere(graph, fuse.x, fuse.node)
    return f"the terms of {shown(fuse.x)} are not all of its shape"


def _cheapest(graph: gs.Graph, x: gs.Tensor, kernel: np.ndarray, fuse: Linear, cost: Cost) -> Term:
    """How the convolution gets past one term."""
    shape, out = _one_image(x), _one_image(fuse.y)
    ways = [Term(x, kernel, _conv_price(shape, out, cost))]
    if not sole_consumer(graph, x):
        return ways[0]
    resize = producer(x, "Resize")
    if resize is not None and _keeps_constants(resize) and _same_maps(resize):
        small = _one_image(resize.inputs[0])
        moved = [small[0], out[1], *small[2:]]
        price = _conv_price(small, moved, cost) + cost.of(0, moved, out) - cost.of(0, small, shape)
        ways.append(Term(x, kernel, price, resize=resize))
    linear = linear_from(graph, x) or _of_tokens(graph, x)
    if linear is not None and (not linear.is_conv or linear.group == 1):
        source = static_shape(linear.x, batch=1)
        if source is not None:
            # Each output, or input for the transposed one, meets the whole kernel.
            places = math.prod((source if linear.node.op == "ConvTranspose" else shape)[2:]) * shape[0]
            macs = places * linear.weight.size
            price = cost.of(macs // shape[1] * out[1], source, out) - cost.of(macs, source, shape)
            if linear.is_conv:  # else its Add stays one
                price -= _add_price(linear, cost)
            ways.append(Term(x, kernel, price, linear))
    return min(ways, key=lambda term: term.price)


def _of_tokens(graph: gs.Graph, x: gs.Tensor) -> Linear | None:
    """The product over tokens (B, N, C) that moves alone make a map x (B, C, H, W) of, in their order."""
    tokens, chain = chain_before(graph, x)
    before, after = static_shape(tokens, batch=1), static_shape(x, batch=1)
    if not chain or not sole_consumer(graph, tokens) or not before or not after or len(before) != 3:
        return None
    linear = linear_from(graph, tokens)
    if linear is None or linear.node.op != "MatMul" or math.prod(before) > _MOST or len(after) != 4:
        return None
    if after[:2] != [before[0], before[2]] or is_batch(x.shape[0]) != is_batch(tokens.shape[0]):
        return None
    places = np.arange(math.prod(before), dtype=np.int32).reshape(before)
    found = places
    for move in chain:
        if (moved := parts_of(move, found)) is None:
            return None
        found = moved[0]
    return linear if np.array_equal(found, places.transpose(0, 2, 1).reshape(after)) else None


def _add_price(linear: Linear, cost: Cost) -> float:
    """What the Add of a bias costs, if that is a node of its own."""
    y = static_shape(linear.y, batch=1)
    return 0.0 if linear.add is None or y is None else cost.of(0, y, y)


def _conv_price(shape: list[int], out: list[int], cost: Cost) -> float:
    return cost.of(math.prod(out) * shape[1], shape, out)


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
    bias = None if fuse.bias is None else fuse.bias.astype(np.float64)
    y.inputs.clear()
    # A convolution adds in passing what is there already, so it comes last.
    terms = sorted(terms, key=_is_conv)
    total: gs.Tensor | None = None
    for i, term in enumerate(terms):
        # The bias of the whole comes with the first term.
        out = _term(graph, fuse, term, bias if i == 0 else None, fresh)
        if total is not None:
            result = y if i == len(terms) - 1 else gs.Variable(fresh(f"{y.name}/sum"), dtype, y.shape)
            graph.nodes.append(gs.Node("Add", fresh(f"{y.name}/add"), {}, [total, out], [result]))
            out = result
        total = out
    if len(terms) == 1 and total is not None:
        maker = total.inputs[0]
        maker.outputs = [y]


def _term(
    graph: gs.Graph, fuse: Linear, term: Term, bias: np.ndarray | None, fresh: Callable[[str], str]
) -> gs.Tensor:
    """The convolution of one term."""
    kernel = term.kernel
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
    if not linear.is_conv:
        return _over_tokens(graph, fuse, term, folded, bias, fresh)
    attrs, shape = dict(linear.node.attrs), list(fuse.y.shape)
    return _conv(graph, fuse, linear.x, folded, bias, shape, attrs, fresh, linear.node.op)


def _folded(kernel: np.ndarray, linear: Linear) -> tuple[np.ndarray, np.ndarray | None]:
    """The weights and the bias, in float64, of a convolution with a 1x1 kernel (out, in) behind it."""
    axis = 1 if linear.node.op == "ConvTranspose" else 0
    weight = np.moveaxis(np.tensordot(kernel, linear.weight.astype(np.float64), ([1], [axis])), 0, axis)
    return weight, None if linear.bias is None else kernel @ linear.bias.astype(np.float64)


def _is_conv(term: Term) -> bool:
    return term.resize is None and (term.linear is None or term.linear.node.op == "Conv")


def _over_tokens(
    graph: gs.Graph,
    fuse: Linear,
    term: Term,
    weight: np.ndarray,
    bias: np.ndarray | None,
    fresh: Callable[[str], str],
) -> gs.Tensor:
    """The product over the tokens with another weight (out, in), as a map."""
    assert term.linear is not None
    x, name, dtype = term.linear.x, fuse.y.name, fuse.weight.dtype
    shape = [*term.linear.y.shape[:2], len(weight)]

    def made(kind: str, op: str, read: gs.Tensor, values: np.ndarray) -> gs.Tensor:
        out = gs.Variable(fresh(f"{name}/{kind}"), dtype, shape)
        constant = gs.Constant(fresh(f"{out.name}/values"), np.ascontiguousarray(values, dtype))
        graph.nodes.append(gs.Node(op, out.name, {}, [read, constant], [out]))
        return out

    tokens = made("product", "MatMul", x, weight.T)
    tokens = tokens if bias is None else made("tokens", "Add", tokens, bias)
    channels = gs.Variable(fresh(f"{name}/channels"), dtype, [shape[0], shape[2], shape[1]])
    add_move(graph, "Transpose", [0, 2, 1], tokens, channels, fresh)
    out = gs.Variable(fresh(f"{name}/term"), dtype, [term.x.shape[0], len(weight), *term.x.shape[2:]])
    add_move(graph, "Reshape", list(out.shape), channels, out, fresh)
    return out


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
