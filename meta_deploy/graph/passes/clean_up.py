"""Clean-up by libraries: folds constants, merges duplicates, drops identities and dead nodes.

Measured on META-T Mask R-CNN at 512x512 (benchmarks/README.md): onnxscript's folding with onnx-ir's
clean-ups, then graph-surgeon's folding (which evaluates with ONNX Runtime what is too large for the first),
takes two seconds; onnxslim 11 s and onnxscript's full optimizer 21 s remove little more.
"""

import numpy as np
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
    fresh_names,
    from_model,
    is_op,
    static_shape,
    take_over,
    to_model,
)
from meta_deploy.ort import onnxruntime

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
    model = to_model(graph) if model is None else model
    names = _pin(model)
    optimizer.fold_constants(model)
    for step in (
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        IdentityEliminationPass(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
    ):
        step(model)
    cleaned = from_model(model)
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
    cleaned.cleanup(remove_unused_graph_inputs=False)
    _unpin(cleaned, names)
    cleaned.toposort()
    take_over(graph, cleaned)
    return before - len(graph.nodes)


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
