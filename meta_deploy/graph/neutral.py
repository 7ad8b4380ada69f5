"""Operators that do nothing, and padding that a convolution can do itself; a part of the clean-up."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.graph import constant_value, is_op, producer, replace, sole_consumer, static_shape

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

    PyTorch writes it for attention with a mask, which may hide all keys; of a constant one it is known.
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
        scores, mask = add.inputs if isinstance(add.inputs[1], gs.Constant) else add.inputs[::-1]
        hidden = constant_value(mask)
        if (
            hidden is None
            or not hidden.ndim
            or not np.isfinite(hidden).any(-1).all()
            or np.isnan(hidden).any()
            or np.isposinf(hidden).any()
        ):
            return False
    return producer(scores, "MatMul") is not None


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


def _read_unexpanded(node: gs.Node) -> None:
    """Let an operator of two tensors read before an Expand where it broadcasts to the same shape itself."""
    for place in (0, 1):
        expand, other = producer(node.inputs[place], "Expand"), static_shape(node.inputs[1 - place])
        if expand is None or not other or not static_shape(expand.inputs[0]):
            continue
        if other == static_shape(node.inputs[place]) == static_shape(node.outputs[0]):
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
