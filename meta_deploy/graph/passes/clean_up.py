"""Clean-up by libraries: folds constants, merges duplicates, drops identities and dead nodes.

Measured on META-T Mask R-CNN at 512x512 (benchmarks/README.md): onnxscript's folding with onnx-ir's
clean-ups, then graph-surgeon's folding (which evaluates with ONNX Runtime what is too large for the first),
takes two seconds; onnxslim 11 s and onnxscript's full optimizer 21 s remove little more.
"""

import math
import re
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from onnxscript import optimizer

from meta_deploy.graph.graph import (
    IdentitySet,
    constant_value,
    fresh_names,
    from_model,
    is_batch,
    is_op,
    is_output,
    producer,
    replace,
    static_shape,
    take_over,
    to_model,
)
from meta_deploy.graph.neutral import drop_neutral
from meta_deploy.ort import onnxruntime

# What sizes are inferred for where the batch is open. The last is larger than any batch, but not so large
# that inference makes large constants.
_BATCHES = (1, 2, 1014)
_FEW = 64  # numbers that go into a shape
_DOMAIN = "meta_deploy.pins"
_RANDOM = (
    *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"),
)


def clean_up(graph: gs.Graph, model: ir.Model | None = None) -> int:
    """The same function of the same inputs, in fewer nodes, in place.

    Args:
        graph: to clean up.
        model: the same, if onnx-ir has it already, which saves writing and reading it; is changed.

    Returns:
        Nodes removed.
    """
    before = len(graph.nodes)
    _clean(graph, to_model(graph) if model is None else model)
    # What is gone may tell sizes that were open; then more is constant.
    while learned := _infer_open_sizes(model := to_model(graph)):
        if not any(map(_decides, learned)):
            take_over(graph, from_model(model))
            break
        _clean(graph, model)
    return before - len(graph.nodes)


def _clean(graph: gs.Graph, model: ir.Model) -> None:
    """Clean up once. `model` is the same as the graph, and is changed."""
    names = _pin(model)
    optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_fills_a_shape)
    for step in (
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        IdentityEliminationPass(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
    ):
        step(model)
    cleaned = from_model(model)
    _write_known_sizes(cleaned)
    onnxruntime.set_default_logger_severity(4)  # folding runs it on fragments, which it comments on
    # Without what graph-surgeon gets wrong: its casts of sizes lose fractions, its Shape ignores `start` and
    # `end`, and its flat If loses an output that passes an outer tensor on.
    cleaned.fold_constants(
        fold_shapes=False,
        flatten_subgraphs=False,
        recurse_subgraphs=False,
        should_exclude_node=lambda node: node.domain == _DOMAIN or node.op in _RANDOM,
    )
    _write_known_targets(cleaned)
    drop_neutral(cleaned)
    cleaned.cleanup(remove_unused_graph_inputs=False)
    _unpin(cleaned, names)
    cleaned.toposort()
    take_over(graph, cleaned)


def _fills_a_shape(node: ir.Node) -> bool | None:
    """Let onnxscript fold a ConstantOfShape of a few numbers too, as these mostly go into other shapes."""
    return True if node.op_type == "ConstantOfShape" and _makes_few(node) else None


def _makes_few(node: ir.Node) -> bool:
    """Whether a node makes no more numbers than go into a shape."""
    shape = node.outputs[0].shape
    return shape is not None and shape.is_static() and math.prod(shape.numpy()) <= _FEW


# --- sizes ------------------------------------------------------------------------------------------------


def _decides(value: ir.Value) -> bool:
    """Whether something computes with a value's sizes: a Shape, or the Reshape that makes it so."""
    maker = value.producer()
    target = maker.inputs[1] if maker is not None and maker.op_type == "Reshape" else None
    computed = target is not None and target.const_value is None
    return computed or any(reader.op_type == "Shape" for reader, _ in value.uses())


def _infer_open_sizes(model: ir.Model) -> list[ir.Value]:
    """Infer the sizes that are open, anew, as inference keeps what it is given; the values that it told of.

    Inference computes with numbers alone, so it is told several for an unknown batch. What is the same for
    all does not depend on it; what grows like it is a multiple of it.
    """
    batch = _batch_of(model)
    open_values = [value for value in _made(model) if _open_sizes(value.shape, batch)]
    if not open_values:
        return []
    told = [_sizes_for(model, batch, number) for number in (_BATCHES if batch else (1,))]
    learned = []
    for value in open_values:
        known = value.shape
        value.shape = _merged(known, [shapes[value] for shapes in told], batch)
        if _open_sizes(value.shape, batch) < _open_sizes(known, batch):
            learned.append(value)
    return learned


def _sizes_for(model: ir.Model, batch: str, number: int) -> dict[ir.Value, ir.Shape | None]:
    """The shape of each value that is not known to the last number, for this one as the batch.

    A copy is folded, node after node, with each one's shape inferred before: so sizes are known that are
    computed from others, however often in a row.
    """
    copy = model.clone()
    for value in copy.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([number if batch and str(dim) == batch else dim for dim in value.shape])
    pairs = [pair for pair in zip(_made(model), _made(copy), strict=True) if not _is_static(pair[0])]
    for _, copied in pairs:
        copied.shape = None
    ShapeInferencePass()(copy)  # of branches and loops, too
    optimizer.fold_constants(copy, onnx_shape_inference=True, should_fold=_makes_few)
    return {value: copied.shape for value, copied in pairs}


def _made(model: ir.Model) -> list[ir.Value]:
    """What the nodes of a model make, those of branches and loops' bodies too."""
    return [value for node in model.graph.all_nodes() for value in node.outputs]


def _batch_of(model: ir.Model) -> str:
    """What the first axis of the first input is called where its size is open; else an empty string."""
    first = next((value.shape[0] for value in model.graph.inputs[:1] if value.shape), None)
    return first.value or "" if isinstance(first, ir.SymbolicDim) else ""


def _is_static(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.is_static()


def _open_sizes(shape: ir.Shape | None, batch: str) -> int:
    """How many sizes are not known, multiples of the batch aside; more than any for an unknown rank."""
    if shape is None:
        return 99
    known = re.compile(rf"\d+|(\d+\*)?{re.escape(batch)}" if batch else r"\d+")
    return sum(not known.fullmatch(str(size)) for size in shape)


def _merged(before: ir.Shape | None, told: list[ir.Shape | None], batch: str) -> ir.Shape | None:
    """A shape with the sizes that inference tells; names of open ones stay, as the exporter's tell more."""
    shapes = [shape for shape in told if shape is not None]
    ranks = {len(shape) for shape in (before, *shapes) if shape is not None}
    if len(shapes) < len(told) or len(ranks) != 1:
        return before
    merged: list[Any] = [None] * len(shapes[0]) if before is None else list(before)
    for axis, sizes in enumerate(zip(*shapes, strict=True)):
        one = sizes[0]
        if not all(isinstance(size, int) for size in sizes):
            continue
        if all(size == one for size in sizes):
            merged[axis] = one
        elif all(size == one * number for size, number in zip(sizes, _BATCHES, strict=True)):
            merged[axis] = batch if one == 1 else f"{one}*{batch}"
    return ir.Shape(merged)


def _write_known_sizes(graph: gs.Graph) -> None:
    """Let nothing read single sizes from a Shape where these are known, though others are not."""
    fresh = fresh_names(graph)
    for node in graph.nodes:
        shape = producer(node.inputs[0], "Shape") if is_op(node, "Gather", "Slice") else None
        if shape is None or not node.outputs or shape.inputs[0].shape is None:
            continue
        sizes = shape.inputs[0].shape[shape.attrs.get("start", 0) : shape.attrs.get("end")]
        taken = _taken(node, np.array(sizes, object))
        if taken is None or not all(isinstance(s, (int, np.integer)) and not is_batch(s) for s in taken.flat):
            continue
        out = node.outputs[0]
        if not is_output(graph, out):
            replace(graph, out, gs.Constant(fresh(f"{out.name}/known"), taken.astype(np.int64)))


def _taken(node: gs.Node, sizes: np.ndarray) -> np.ndarray | None:
    """The sizes that a Gather or a Slice takes; None where what it takes is computed."""
    numbers = [constant_value(tensor) for tensor in node.inputs[1:]]
    if not numbers or any(number is None for number in numbers):
        return None
    first, *others = (number for number in numbers if number is not None)
    if node.op == "Gather":
        inside = bool(((-len(sizes) <= first) & (first < len(sizes))).all())
        return np.array(sizes[first], object) if inside else None
    if not others:
        return None
    step = int(others[2].item()) if len(others) > 2 else 1
    return sizes[int(first.item()) : int(others[0].item()) : step] if step > 0 else None


def _write_known_targets(graph: gs.Graph) -> None:
    """Let no Reshape compute a shape that is known, but for the batch: folding needs all of it."""
    fresh = fresh_names(graph)
    for node in graph.nodes:
        # What was folded has no outputs; before opset 5 the shape is an attribute.
        if not is_op(node, "Reshape") or not node.outputs or len(node.inputs) < 2:
            continue
        if isinstance(node.inputs[1], gs.Constant):
            continue
        if (shape := static_shape(node.outputs[0])) and 0 not in shape:
            node.inputs[1] = gs.Constant(fresh(f"{node.outputs[0].name}/shape"), np.array(shape, np.int64))


def _pin(model: ir.Model) -> list[str]:
    """Put a node of no known operator before each output: libraries mix up outputs of one value.

    Returns:
        The outputs' names.
    """
    names = [output.name or "" for output in model.graph.outputs]
    model.opset_imports[_DOMAIN] = 1
    for index, output in enumerate(list(model.graph.outputs)):
        pin = ir.node("Pin", [output], {"index": index}, domain=_DOMAIN, name=f"{output.name}/pinned")
        (pinned,) = pin.outputs
        pinned.name, pinned.type, pinned.shape = pin.name, output.type, output.shape
        model.graph.append(pin)
        model.graph.outputs[index] = pinned
    return names


def _unpin(graph: gs.Graph, names: list[str]) -> None:
    """The inverse: what reaches each pin gets the output's name, by an Identity if it has to keep another."""
    pinned = list(graph.outputs)
    reached = [tensor.inputs[0].inputs[0] for tensor in pinned]
    named = [tensor for tensor, name in zip(reached, names, strict=True) if tensor.name == name]
    kept = IdentitySet([*graph.inputs, *named])
    for index, (tensor, output, name) in enumerate(zip(reached, pinned, names, strict=True)):
        if tensor.name != name:
            if tensor in kept:
                copy = gs.Variable(name, output.dtype, output.shape)
                graph.nodes.append(gs.Node("Identity", name, {}, [tensor], [copy]))
                tensor = copy
            tensor.name = name
            kept.add(tensor)
        graph.outputs[index] = tensor
    for tensor in pinned:
        pin = tensor.inputs[0]
        pin.inputs.clear()
        pin.outputs.clear()
        graph.nodes.remove(pin)
