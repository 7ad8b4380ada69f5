"""Clean-up by libraries: folds constants, merges duplicates, drops identities and dead nodes.

Measured on META-T Mask R-CNN at 512x512 (benchmarks/README.md): onnxscript's folding with onnx-ir's
clean-ups, then graph-surgeon's folding (which evaluates with ONNX Runtime what is too large for the first),
takes two seconds; onnxslim 11 s and onnxscript's full optimizer 21 s remove little more.
"""

import math
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript import optimizer

from meta_deploy.graph.graph import (
    IdentitySet,
    bodies,
    constant_value,
    fresh_names,
    from_model,
    is_batch,
    is_op,
    is_output,
    made_in,
    producer,
    replace,
    static_shape,
    take_over,
    to_model,
    to_proto,
)
from meta_deploy.graph.neutral import drop_neutral
from meta_deploy.graph.sizes import FEW, RANDOM, infer_open_sizes
from meta_deploy.ort import onnxruntime

_DOMAIN = "meta_deploy.pins"


def clean_up(graph: gs.Graph, model: ir.Model | None = None) -> int:
    """The same function of the same inputs, in fewer nodes, in place.

    Args:
        graph: to clean up.
        model: the same, if onnx-ir has it already, which saves writing and reading it; is changed.

    Returns:
        Nodes removed.
    """
    before = len(graph.nodes)
    known = _sizes_inferred(graph)  # first, as what they make constant need not be cleaned twice
    _clean(graph, known.model if known else model or to_model(graph))
    # What is gone may tell sizes that were open; then more is constant.
    while known := _sizes_inferred(graph):
        if not known.decides:
            take_over(graph, from_model(known.model))
            break
        _clean(graph, known.model)
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
        should_exclude_node=lambda node: node.domain == _DOMAIN or node.op in RANDOM,
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
    return shape is not None and shape.is_static() and math.prod(shape.numpy()) <= FEW


# --- sizes ------------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """A graph with sizes that were open before; whether something computes with these."""

    model: ir.Model
    decides: bool


def _sizes_inferred(graph: gs.Graph) -> _Known | None:
    """The graph with more sizes known than before; None where inference tells none."""
    if all(_is_known(tensor) for each in _all_graphs(graph) for tensor in made_in(each)):
        return None
    proto = to_proto(graph)
    learned = infer_open_sizes(proto)
    return _Known(ir.from_proto(proto), _decide(proto.graph, learned)) if learned else None


def _all_graphs(graph: gs.Graph) -> list[gs.Graph]:
    return [graph, *graph.subgraphs(recursive=True)]


def _is_known(tensor: gs.Tensor) -> bool:
    shape = tensor.shape
    return shape is not None and all(isinstance(size, (int, np.integer)) for size in shape)


def _decide(graph: onnx.GraphProto, names: set[str]) -> bool:
    """Whether something computes with sizes of these: a Shape, or the Reshape that makes them so."""
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in names:
            return True
        if node.op_type == "Reshape" and node.input[-1] not in constants and node.output[0] in names:
            return True
        if any(_decide(body, names) for body in bodies(node)):
            return True
    return False


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
