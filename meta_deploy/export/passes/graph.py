"""ONNX model to graph-surgeon graph and back, and what passes ask of a graph. Knows no pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, ShapeInferencePass

# Its remarks go to standard output, which is the commands' own; what is an error it raises as well.
G_LOGGER.severity = G_LOGGER.CRITICAL + 1

_MAKE_SEQUENCES = (
    *(
        "SplitToSequence",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceInsert",
        "SequenceErase",
        "SequenceMap",
    ),
)
IR_VERSION = 10  # graph-surgeon's default is newer than ONNX Runtime may accept


def to_graph(proto: onnx.ModelProto) -> gs.Graph:
    """A model as a graph to edit, local functions inlined and constants as initializers."""
    return gs.import_onnx(ir.to_proto(normalized(proto)))


def normalized(proto: onnx.ModelProto) -> ir.Model:
    """A copy of a model with local functions inlined, constants as initializers, and shapes inferred.

    graph-surgeon reads a Constant node's `value_floats` as float64, and not every Constant can be lifted.
    """
    model = ir.from_proto(proto)
    InlinePass()(model)
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and "value_floats" in node.attributes:
            numbers = np.array(node.attributes.pop("value_floats").as_floats(), np.float32)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(numbers))
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ShapeInferencePass()(model)
    # PyTorch and graph-surgeon take a sequence for a tensor; left unsaid, its type is inferred.
    for node in model.graph.all_nodes():
        if node.op_type in _MAKE_SEQUENCES:
            for output in node.outputs:
                output.type = output.shape = None
    return model


def to_proto(graph: gs.Graph) -> onnx.ModelProto:
    """The inverse of `to_graph`."""
    graph.ir_version = IR_VERSION
    return gs.export_onnx(graph)


def producer(tensor: gs.Tensor, op: str | None = None) -> gs.Node | None:
    """The node that makes a tensor, if there is one and it is an `op`."""
    node = tensor.inputs[0] if tensor.inputs else None
    return node if node is not None and (op is None or is_op(node, op)) else None


def is_op(node: gs.Node, *ops: str) -> bool:
    """Whether a node is one of these operators of ONNX itself, not somebody's own of that name."""
    return node.op in ops and node.domain in (None, "", "ai.onnx")


def sole_consumer(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether one node alone reads a tensor, which is not an output of the graph either."""
    return len(tensor.outputs) == 1 and all(output is not tensor for output in graph.outputs)


def constant_value(tensor: gs.Tensor) -> np.ndarray | None:
    """A constant's value, None for what is computed."""
    return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else None


def static_shape(tensor: gs.Tensor) -> list[int] | None:
    """A tensor's shape where all of it is known before running."""
    shape = tensor.shape
    if shape is None or not all(isinstance(size, (int, np.integer)) for size in shape):
        return None
    return [int(size) for size in shape]


def fresh_names(graph: gs.Graph) -> Callable[[str], str]:
    """What turns a wish for a tensor's name into a name that nothing in the graph has yet."""
    taken = set(graph.tensors())
    for subgraph in _subgraphs(graph):
        taken.update(subgraph.tensors())

    def fresh(name: str) -> str:
        candidate, count = name, 1
        while candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        taken.add(candidate)
        return candidate

    return fresh


def _subgraphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    for node in graph.nodes:
        yield from node.subgraphs(recursive=True)


def detach(graph: gs.Graph, node: gs.Node) -> None:
    """Let a node read nothing any more if nothing reads it, nor an Add behind it, and so on backwards."""
    outputs = {id(output) for output in graph.outputs}
    stack = [node, *(reader for tensor in node.outputs for reader in tensor.outputs)]
    while stack:
        node = stack.pop()
        if all(not tensor.outputs and id(tensor) not in outputs for tensor in node.outputs):
            makers = [maker for tensor in node.inputs for maker in tensor.inputs]
            node.inputs.clear()
            stack.extend(makers)


def until_done(graph: gs.Graph, once: Callable[[gs.Graph, Callable[[str], str]], int]) -> int:
    """Run a rewrite, which is given a maker of new names, until it finds nothing; its changes in all.

    Again and again, because what a change leaves dead may have been another reader in the way.
    """
    fresh = fresh_names(graph)
    changes = 0
    while count := once(graph, fresh):
        changes += count
        tidy(graph)
    return changes


def tidy(graph: gs.Graph) -> None:
    """Drop what no output needs and put every node after those that it reads, else in the order as it was.

    graph-surgeon's `cleanup` takes time in the square of the readers of a shared constant, and its `toposort`
    recurses as deep as the new nodes go.
    """
    inside = {id(node) for node in graph.nodes}

    def makers(node: gs.Node) -> list[gs.Node]:
        outer = (tensor for g in node.subgraphs() for tensor in g._foreign_tensors().values())
        return [m for tensor in (*node.inputs, *outer) for m in tensor.inputs if id(m) in inside]

    needed: set[int] = set()
    stack = [node for output in graph.outputs for node in output.inputs]
    while stack:
        node = stack.pop()
        if id(node) not in needed:
            needed.add(id(node))
            stack.extend(makers(node))
    _drop([node for node in graph.nodes if id(node) not in needed])

    placed: set[int] = set()
    order: list[gs.Node] = []
    stack = [node for node in graph.nodes[::-1] if id(node) in needed]
    while stack:
        node = stack[-1]
        waiting = [] if id(node) in placed else [m for m in makers(node) if id(m) not in placed]
        if waiting:
            stack.extend(waiting[::-1])
            continue
        stack.pop()
        if id(node) not in placed:
            placed.add(id(node))
            order.append(node)
    graph.nodes = order


def _drop(nodes: list[gs.Node]) -> None:
    """Detach nodes from their tensors, all at once."""
    dropped = {id(node) for node in nodes}
    for readers in {id(t): t.outputs for node in nodes for t in node.inputs}.values():
        list.__setitem__(readers, slice(None), [node for node in readers if id(node) not in dropped])
    for node in nodes:
        list.clear(node.inputs)
        node.outputs.clear()
