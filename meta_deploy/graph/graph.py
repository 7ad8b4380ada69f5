"""ONNX model to graph-surgeon graph and back, and what passes ask of a graph. Knows no pattern.

A batch that is known at run time only has a name in a model, and a number in a graph: sizes are then numbers
like any other, and a pass need not know of it.
"""

from __future__ import annotations

import re
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

# Stands for an unknown batch in shapes: a prime larger than any size, so that none divides it. It may go into
# the shapes of variables and the targets of Reshapes, and into no other constant or attribute.
BATCH = 2**31 - 1
BATCH_NAME = "batch"


def to_graph(proto: onnx.ModelProto) -> gs.Graph:
    """A model as a graph to edit, local functions inlined and constants as initializers.

    Where the first input's first axis has a name, that and its multiples are multiples of `BATCH` in all
    shapes of variables.
    """
    return import_numbered(ir.to_proto(normalized(proto)))


def import_numbered(proto: onnx.ModelProto) -> gs.Graph:
    """A model as a graph, with a number for its batch; changes the model's shapes."""
    first = proto.graph.input[0].type.tensor_type.shape.dim[:1] if proto.graph.input else []
    name = next((dim.dim_param for dim in first), "")
    dims = list(_dims(proto.graph))
    another = re.compile(rf"\b{BATCH_NAME}\b")
    if name and (name == BATCH_NAME or not any(another.search(dim.dim_param) for dim in dims)):
        multiple = re.compile(rf"(?:(\d{{1,9}})\*)?{re.escape(name)}")  # as long as int64 holds it
        for dim in dims:
            if found := multiple.fullmatch(dim.dim_param):
                dim.dim_value = BATCH * int(found[1] or 1)
    return gs.import_onnx(proto)


def name_batch(proto: onnx.ModelProto) -> None:
    """The inverse: `BATCH_NAME` in shapes; a Reshape to a batch is one to whatever is left."""
    for dim in _dims(proto.graph):
        if is_batch(dim.dim_value):
            times = dim.dim_value // BATCH
            dim.dim_param = BATCH_NAME if times == 1 else f"{times}*{BATCH_NAME}"
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        target = constants.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type != "Reshape" or node.domain or target is None:
            continue
        sizes = onnx.numpy_helper.to_array(target)
        if any(map(is_batch, sizes.tolist())):
            left = np.where(sizes % BATCH, sizes, -(sizes != 0).astype(np.int64))
            target.CopyFrom(onnx.numpy_helper.from_array(left, target.name))


def is_batch(size: object) -> bool:
    """Whether a size stands for an unknown batch, or a multiple of it; a name does not."""
    return isinstance(size, (int, np.integer)) and int(size) > 0 and int(size) % BATCH == 0


def _dims(graph: onnx.GraphProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    """All dimensions that a graph and the graphs in it tell of."""
    for info in (*graph.input, *graph.value_info, *graph.output):
        yield from info.type.tensor_type.shape.dim
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _dims(inner)


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
    proto = gs.export_onnx(graph)
    name_batch(proto)
    return proto


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


def static_shape(tensor: gs.Tensor, batch: int = BATCH) -> list[int] | None:
    """A tensor's shape where all of it is known before running, but for the batch.

    Args:
        tensor: of any kind.
        batch: what to take for an unknown batch; 1 gives the price for one image.
    """
    shape = tensor.shape
    if shape is None or not all(isinstance(size, (int, np.integer)) for size in shape):
        return None
    sizes = [int(size) for size in shape]
    batches = [is_batch(size) for size in sizes]
    if sum(batches) > 1:
        return None
    return [size // BATCH * batch if b else size for size, b in zip(sizes, batches, strict=True)]


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
