"""Operators that do nothing, and padding that a convolution can do itself; a part of the clean-up."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.graph import (
    IdentitySet,
    constant_value,
    fresh_names,
    is_op,
    producer,
    replace,
    sole_consumer,
    static_shape,
)

_ELEMENTWISE = (
    *("Where", "Not", "And", "Or", "Cast", "Add", "Sub", "Mul", "Div"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
)
_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}


def drop_neutral(graph: gs.Graph) -> None:
    """Let nothing read an Add or Sub of 0, a Mul or Div of 1, a Pad of width zero, or a Concat of one tensor;

    nor a Slice, an Expand or a Resize to the shape that was there already, nor the guard of a softmax whose
    mask hides no whole row. Let Convs do the padding before them, sums and products the broadcasting, and
    Slices what Slices before them do along other axes.

    What is left without readers is not removed yet. The sum of -0 and 0 is 0 and becomes -0, which is equal.
    """
    for node in graph.nodes:
        if not node.outputs:  # folded
            continue
        if (same := _unchanged(node)) is not None:
            replace(graph, node.outputs[0], same)
        elif is_op(node, "Conv"):
            _take_in(graph, node)
        elif is_op(node, *_NEUTRAL):
            _read_unexpanded(node)
        elif is_op(node, "Slice"):
            _take_in_slice(graph, node)


def _unchanged(node: gs.Node) -> gs.Tensor | None:
    """The input that a node's output equals in value and shape, if one is known to."""
    if is_op(node, "Pad"):
        pads = constant_value(node.inputs[1]) if len(node.inputs) > 1 else None
        return node.inputs[0] if pads is not None and not pads.any() else None
    if is_op(node, "Concat"):
        return node.inputs[0] if len(node.inputs) == 1 else None
    if is_op(node, "Slice", "Expand"):
        steps = constant_value(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
        forward = steps is not None and bool((steps == 1).all())
        shape = static_shape(node.outputs[0])
        return node.inputs[0] if forward and shape and shape == static_shape(node.inputs[0]) else None
    if is_op(node, "Resize"):
        shape = static_shape(node.outputs[0])
        return node.inputs[0] if _samples_in_place(node) and shape == static_shape(node.inputs[0]) else None
    if is_op(node, "Where"):
        return node.inputs[2] if _guards_in_vain(node) else None
    if not is_op(node, *_NEUTRAL):
        return None
    a, b = node.inputs
    pairs = [(a, b)] if node.op in ("Sub", "Div") else [(a, b), (b, a)]
    number = _NEUTRAL[node.op]
    return next((x for x, other in pairs if _is_filled(other, number) and _keeps_shape(x, other)), None)


def _guards_in_vain(where: gs.Node) -> bool:
    """Whether a Where replaces the NaNs of a softmax that has none if its scores are finite.

    PyTorch writes it for attention with a mask, which may hide all keys; of some it is known that none does.
    """
    nan, softmax = producer(where.inputs[0], "IsNaN"), producer(where.inputs[2], "Softmax")
    if nan is None or softmax is None or nan.inputs[0] is not where.inputs[2]:
        return False
    shape, scores = static_shape(softmax.outputs[0]), softmax.inputs[0]
    if (
        not shape
        or static_shape(where.outputs[0]) != shape
        or softmax.attrs.get("axis") not in (-1, len(shape) - 1)
    ):
        return False
    add = producer(scores, "Add")
    if add is not None:
        scores, mask = add.inputs if _leaves_a_key(add.inputs[1]) else add.inputs[::-1]
        if not _leaves_a_key(mask):
            return False
    return producer(scores, "MatMul") is not None


def _leaves_a_key(mask: gs.Tensor) -> bool:
    """Whether a mask is known to be finite for a key of each query, and a number or -inf for the others.

    It is a constant, or chosen from finite numbers by what is computed.
    """
    choice = producer(mask, "Where")
    if choice is not None:
        values = [constant_value(tensor) for tensor in choice.inputs[1:]]
        return all(value is not None and np.isfinite(value).all() for value in values)
    hidden = constant_value(mask)
    if hidden is None or not hidden.ndim or np.isnan(hidden).any() or np.isposinf(hidden).any():
        return False
    return bool(np.isfinite(hidden).any(-1).all())


def _is_filled(tensor: gs.Tensor, number: int) -> bool:
    """Whether a tensor is a constant of nothing but this number."""
    if not isinstance(tensor, gs.Constant) or 0 in tensor.shape:
        return False
    values = tensor.values
    return bool(values.flat[0] == number) and bool((values == number).all())


def _samples_in_place(resize: gs.Node) -> bool:
    """Whether a Resize of opset 11 or later takes each number from its own place if the size stays."""
    if len(resize.inputs) < 3 or resize.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return False
    if resize.inputs[2].is_empty():  # by size
        return len(resize.inputs) > 3 and static_shape(resize.outputs[0]) is not None
    scales = constant_value(resize.inputs[2])
    return scales is not None and bool((scales == 1).all()) and static_shape(resize.outputs[0]) is not None


def expand_last(graph: gs.Graph) -> bool:
    """Let element-wise operators of expanded constants compute before the Expand, where all is constant.

    The mask of a transformer is so for any batch: where nothing is hidden, it then turns out to be zeros.

    Returns:
        Whether something was changed; what has become constant is not folded yet.
    """
    fresh, constant = fresh_names(graph), IdentitySet[gs.Tensor]()
    for node in list(graph.nodes):
        if not is_op(node, *_ELEMENTWISE) or not node.outputs:  # folded
            continue
        expands = [producer(tensor, "Expand") for tensor in node.inputs]
        sources = [x if e is None else e.inputs[0] for x, e in zip(node.inputs, expands, strict=True)]
        out = node.outputs[0]
        whole = next((e for e in expands if e and _same_shape(e.outputs[0], out)), None)
        shapes = [static_shape(source) for source in sources]
        known = all(isinstance(x, gs.Constant) or x in constant for x in sources)
        if whole is None or None in shapes or not known:
            continue
        shape = list(np.broadcast_shapes(*map(tuple, shapes)))  # type: ignore[arg-type]
        small = gs.Variable(fresh(f"{out.name}/unexpanded"), out.dtype, shape)
        node.inputs, node.outputs = sources, [small]
        last = gs.Node("Expand", fresh(f"{out.name}/expand"), {}, [small, whole.inputs[1]], [out])
        graph.nodes.insert(graph.nodes.index(node) + 1, last)
        constant.add(small)
    return bool(constant)


def _same_shape(a: gs.Tensor, b: gs.Tensor) -> bool:
    shape = static_shape(a)
    return shape is not None and shape == static_shape(b)


def _read_unexpanded(node: gs.Node) -> None:
    """Let an operator of two tensors read before an Expand where it broadcasts to the same shape itself."""
    for place in (0, 1):
        expand, out = producer(node.inputs[place], "Expand"), static_shape(node.outputs[0])
        if expand is None or not out:
            continue
        shapes = [static_shape(expand.inputs[0]), static_shape(node.inputs[1 - place])]
        if None not in shapes and out == list(np.broadcast_shapes(*map(tuple, shapes))):  # type: ignore[arg-type]
            node.inputs[place] = expand.inputs[0]


def _keeps_shape(x: gs.Tensor, other: gs.Constant) -> bool:
    """Whether x broadcast to a constant's shape is as it was."""
    if x.shape is None or len(other.shape) > len(x.shape):
        return not other.shape
    ends = x.shape[len(x.shape) - len(other.shape) :]
    return all(size in (1, end) for size, end in zip(other.shape, ends, strict=True))


def _take_in_slice(graph: gs.Graph, node: gs.Node) -> None:
    """Have a Slice do what the one before it does for it alone along other axes."""
    before = producer(node.inputs[0], "Slice")
    if before is None or not sole_consumer(graph, node.inputs[0]):
        return
    both = [_cuts(before), _cuts(node)]
    if None in both or set(both[0]) & set(both[1]):  # type: ignore[arg-type]
        return
    cuts = both[0] | both[1]  # type: ignore[operator]
    columns = zip(*((axis, *cut) for axis, cut in cuts.items()), strict=True)
    axes, starts, ends, steps = (np.array(column, np.int64) for column in columns)
    numbers = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    out = node.outputs[0].name
    node.inputs = [before.inputs[0], *(gs.Constant(f"{out}/{name}", v) for name, v in numbers.items())]


def _cuts(node: gs.Node) -> dict[int, tuple[int, int, int]] | None:
    """Start, end and step of a Slice by axis; None where they are not known."""
    values = [constant_value(tensor) for tensor in node.inputs[1:]]
    if len(values) < 2 or node.inputs[0].shape is None or any(value is None for value in values):
        return None
    starts, ends, *others = (value.tolist() for value in values if value is not None)
    axes = others[0] if others else range(len(starts))
    steps = others[1] if len(others) > 1 else [1] * len(starts)
    rank = len(node.inputs[0].shape)
    return {axis % rank: cut for axis, *cut in zip(axes, starts, ends, steps, strict=True)}  # type: ignore[misc]


def _take_in(graph: gs.Graph, conv: gs.Node) -> None:
    """Have a Conv pad with zeros itself, where a Pad before it does for it alone.

    The Conv's padding stays below the extent of its kernel, as not every runtime takes more.
    """
    pad = producer(conv.inputs[0], "Pad")
    if pad is None or not sole_consumer(graph, pad.outputs[0]) or not _pads_zeros(pad):
        return
    pads, kernel = constant_value(pad.inputs[1]), conv.inputs[1].shape
    rank = 0 if kernel is None or not all(isinstance(size, int) for size in kernel) else len(kernel)
    if pads is None or pads.size != 2 * rank or conv.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        return
    before, after = pads[:rank].tolist(), pads[rank:].tolist()
    own = conv.attrs.get("pads") or [0] * 2 * (rank - 2)
    spaces = conv.attrs.get("dilations") or [1] * (rank - 2)
    total = [own_width + width for own_width, width in zip(own, before[2:] + after[2:], strict=True)]
    widest = [(size - 1) * space for size, space in zip(kernel[2:], spaces, strict=True)] * 2
    if min(before + after) < 0 or any(before[:2] + after[:2]) or any(map(int.__gt__, total, widest)):
        return
    conv.attrs["pads"] = total
    conv.inputs[0] = pad.inputs[0]


def _pads_zeros(pad: gs.Node) -> bool:
    """Whether a Pad writes zeros, to all axes in order."""
    zeros = len(pad.inputs) < 3 or pad.inputs[2].is_empty() or _is_filled(pad.inputs[2], 0)
    all_axes = all(axes.is_empty() for axes in pad.inputs[3:])
    return pad.attrs.get("mode", "constant") == "constant" and zeros and all_axes
