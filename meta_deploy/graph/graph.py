"""ONNX model to graph-surgeon graph and back, and what passes ask of a graph. Knows no pattern.

A batch that is known at run time only has a name in a model, and a number in a graph: sizes are then numbers
like any other, and a pass need not know of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, ShapeInferencePass

from meta_deploy.errors import InputError

# Its remarks go to standard output, which is the commands' own; what is an error it raises as well.
G_LOGGER.severity = G_LOGGER.CRITICAL + 1
logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)  # shape inference that fails, with a traceback
logging.getLogger("onnxscript").setLevel(logging.CRITICAL)  # constants that it does not fold

_MAKE_SEQUENCES = (
    *("SplitToSequence", "SequenceConstruct", "SequenceEmpty"),
    *("SequenceInsert", "SequenceErase", "SequenceMap"),
)
CONTRIBUTED = "com.microsoft"  # the domain of ONNX Runtime's own operators
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
    return from_model(normalized(proto))


def from_model(model: ir.Model) -> gs.Graph:
    """A model of onnx-ir as a graph, with a number for its batch."""
    proto = ir.to_proto(model)
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
        for body in bodies(node):
            yield from _dims(body)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes: an If's branches, the body of a Loop or a Scan."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def normalized(proto: onnx.ModelProto) -> ir.Model:
    """A copy of a model with local functions inlined, constants as initializers, and shapes inferred.

    graph-surgeon reads a Constant node's `value_floats` as float64, and not every Constant can be lifted.

    Raises:
        InputError: the model has what cannot be read, as functions of another opset.
    """
    try:
        model = ir.from_proto(proto)
        InlinePass()(model)
    except Exception as error:  # of a foreign file, anything
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(f"the graph cannot be rewritten: {reason}; simplify it first") from error
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


def to_model(graph: gs.Graph) -> ir.Model:
    """The inverse of `from_model`."""
    return ir.from_proto(to_proto(graph))


def import_domain(graph: gs.Graph, name: str) -> None:
    """Let a graph use a domain's operators, of its version 1."""
    domains = list(graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)])
    if all(domain.domain != name for domain in domains):
        domains.append(onnx.helper.make_opsetid(name, 1))
    graph.import_domains = domains


def producer(tensor: gs.Tensor, op: str | None = None) -> gs.Node | None:
    """The node that makes a tensor, if there is one and it is an `op`."""
    node = tensor.inputs[0] if tensor.inputs else None
    return node if node is not None and (op is None or is_op(node, op)) else None


def is_op(node: gs.Node, *ops: str) -> bool:
    """Whether a node is one of these operators of ONNX itself, not somebody's own of that name."""
    return node.op in ops and node.domain in (None, "", "ai.onnx")


T = TypeVar("T")


class IdentitySet(Generic[T]):
    """Nodes or tensors, each once and in order. graph-surgeon's compare by content and have no hash."""

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._items = {id(item): item for item in items}

    def __contains__(self, item: object) -> bool:
        return id(item) in self._items

    def __iter__(self) -> Iterator[T]:
        return iter(self._items.values())

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: T) -> None:
        self._items[id(item)] = item


def own_nodes(graph: gs.Graph) -> IdentitySet[gs.Node]:
    """A graph's nodes as they are now; not those of branches and loops' bodies, which read its tensors."""
    return IdentitySet(graph.nodes)


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether a tensor is an output of the graph."""
    return any(output is tensor for output in graph.outputs)


def sole_consumer(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether one node alone reads a tensor, which is not an output of the graph either."""
    return len(tensor.outputs) == 1 and not is_output(graph, tensor)


def read_by(node: gs.Node) -> Iterator[gs.Tensor]:
    """The tensors that a node reads, and the computed ones that graphs inside it read from outside."""
    yield from node.inputs
    inner = list(node.subgraphs(recursive=True))
    own = IdentitySet(tensor for g in inner for tensor in (*g.inputs, *made_in(g)))
    for tensor in (tensor for g in inner for n in g.nodes for tensor in n.inputs):
        if tensor not in own and not isinstance(tensor, gs.Constant):
            yield tensor


def made_in(graph: gs.Graph) -> list[gs.Tensor]:
    """What a graph's nodes make, in their order."""
    return [tensor for node in graph.nodes for tensor in node.outputs]


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
    for subgraph in graph.subgraphs(recursive=True):
        taken.update(subgraph.tensors())

    def fresh(name: str) -> str:
        candidate, count = name, 1
        while candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        taken.add(candidate)
        return candidate

    return fresh


def replace(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let all that reads `old` read `new`; an output of the graph keeps its name by an Identity."""
    if is_output(graph, old):
        graph.nodes.append(gs.Node("Identity", old.name, {}, [new], [old]))
        return
    for consumer in list(old.outputs):
        for i, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[i] = new


def stand_in(node: gs.Node, x: gs.Tensor) -> None:
    """Let what makes x make the output of a node that alone reads x; the node is dead then."""
    out, maker = node.outputs[0], x.inputs[0]
    node.outputs.clear()
    maker.outputs[next(i for i, tensor in enumerate(maker.outputs) if tensor is x)] = out


def take_over(graph: gs.Graph, other: gs.Graph) -> None:
    """Let a graph be what another is, for rewrites that make a new one; the other is of no use then."""
    graph.nodes, graph.inputs, graph.outputs = other.nodes, other.inputs, other.outputs
    graph.opset, graph.import_domains = other.opset, other.import_domains


def detach(graph: gs.Graph, node: gs.Node) -> None:
    """Disconnect a node from its inputs if it is dead, then the nodes around that became dead by that.

    A node is dead when nothing reads its outputs and none is an output of the graph. The readers of the
    node's outputs are looked at, too.
    """
    stack = [node, *(reader for tensor in node.outputs for reader in tensor.outputs)]
    while stack:
        node = stack.pop()
        if not any(tensor.outputs or is_output(graph, tensor) for tensor in node.outputs):
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
    inside = own_nodes(graph)

    def makers(node: gs.Node) -> list[gs.Node]:
        return [maker for tensor in read_by(node) for maker in tensor.inputs if maker in inside]

    needed = IdentitySet[gs.Node]()
    stack = [node for output in graph.outputs for node in output.inputs]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(makers(node))
    _drop([node for node in graph.nodes if node not in needed])

    order = IdentitySet[gs.Node]()
    stack = [node for node in graph.nodes[::-1] if node in needed]
    while stack:
        waiting = [] if stack[-1] in order else [maker for maker in makers(stack[-1]) if maker not in order]
        if waiting:
            stack.extend(waiting[::-1])
        else:
            order.add(stack.pop())
    graph.nodes = list(order)


def _drop(nodes: list[gs.Node]) -> None:
    """Disconnect nodes from their tensors, all at once.

    By `list`'s own methods: graph-surgeon's lists tell the other side of each single change, which then
    looks for it among all readers of a shared constant.
    """
    dropped = IdentitySet(nodes)
    for tensor in IdentitySet(tensor for node in nodes for tensor in node.inputs):
        left = [node for node in tensor.outputs if node not in dropped]
        list.__setitem__(tensor.outputs, slice(None), left)
    for node in nodes:
        list.clear(node.inputs)
        node.outputs.clear()
