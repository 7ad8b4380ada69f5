"""Bytes that a graph's data-movement and normalization operators read and write, from shapes and types.

These are what passes exist to save; arithmetic is not counted. Changes nothing and knows no pattern.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from meta_deploy.graph.graph import IdentitySet, is_op, name_batch, read_by, static_shape

# Parameters of norms, and pads, axes, sizes and repeats, are a few numbers and not counted; indices are.
# What else normalizes, such as ReduceMean, Sub, Div of a norm written out, is arithmetic and not counted.
RENAMES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # only rename what is there: nothing
NORMS = (
    *("LayerNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization"),
    *("RMSNormalization", "LpNormalization", "MeanVarianceNormalization"),
)
READ_FIRST = ("Transpose", "Pad", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "ReverseSequence")
READ_ALL = ("Concat", "ScatterElements", "ScatterND")
READ_WHAT_THEY_WRITE = ("Slice", "Split")
READ_WHAT_THEY_WRITE_AND_INDICES = ("Gather", "GatherElements", "GatherND")

_SMALL = 64  # numbers in a constant that may say a shape
_ROUNDS = 10  # of inferring shapes; each adds what the values known by then tell

Known = tuple[list[int] | None, int | None]  # a tensor's shape where all of it is known, and its ONNX type


def bytes_moved(graph: gs.Graph) -> int | None:
    """Bytes read and written by the operators that only move data, and by norms; see `bytes_known`.

    Returns:
        None where the size of one of these tensors is not known before running.
    """
    known, exact = bytes_known(graph)
    return known if exact else None


def bytes_known(graph: gs.Graph) -> tuple[int, bool]:
    """Bytes read and written by the operators that only move data, and by norms, as far as sizes are known.

    Transpose, Pad, Expand, Tile, Concat and norms read their inputs whole; Slice, Split and Gather read as
    much as they write. A type counts by its size, so shape arithmetic on int64 by eight bytes a number. Nodes
    of subgraphs are not counted, nor are operators that are not ONNX's own. Of an unknown batch one is taken.

    Returns:
        The bytes, and whether that is all of them.
    """
    touched = [tensor for node in graph.nodes for tensor in _touched(node)]
    sizes = [_size(static_shape(tensor, batch=1), tensor.dtype) for tensor in touched]
    unsure = {t.name: t for t, size in zip(touched, sizes, strict=True) if size is None}
    # An input of the graph says all that it knows; then the rest is not worth inferring.
    known = _inferred(graph, unsure) if unsure and all(t.inputs for t in unsure.values()) else {}
    for i, tensor in enumerate(touched):
        if sizes[i] is None:
            sizes[i] = _size(*known.get(tensor.name, (None, None)))
    return sum(size for size in sizes if size is not None), None not in sizes


def _touched(node: gs.Node) -> Iterable[gs.Tensor]:
    """The tensors that a node reads or writes, as often as it does."""
    written = [tensor for tensor in node.outputs if not tensor.is_empty()]
    if is_op(node, *READ_FIRST, *NORMS):
        return [node.inputs[0], *written]
    if is_op(node, *READ_ALL):
        return [*node.inputs, *written]
    if is_op(node, *READ_WHAT_THEY_WRITE):
        return written * 2
    if is_op(node, *READ_WHAT_THEY_WRITE_AND_INDICES):
        return [node.inputs[1], *written * 2]
    return []


def _size(shape: list[int] | None, dtype: object) -> int | None:
    each = _itemsize(dtype)
    return None if shape is None or each is None else math.ceil(math.prod(shape) * each)


@functools.cache
def _itemsize(dtype: object) -> float | None:
    """Bytes of one number of a type, numpy's or ONNX's; None for text and where it is not told."""
    if dtype is None:
        return None
    try:
        kind = ir.DataType(dtype) if isinstance(dtype, int) else ir.DataType.from_numpy(np.dtype(dtype))  # type: ignore[call-overload]
        return kind.itemsize
    except (TypeError, ValueError):
        return None


def _inferred(graph: gs.Graph, wanted: dict[str, gs.Tensor]) -> dict[str, Known]:
    """Shapes and types by ONNX's inference, of these tensors and whatever else it finds on the way.

    It does not follow integers through every operator: where a shape is still open, the values that say it
    are computed here, and it runs again.
    """
    light = _what_tells(graph, wanted.values())
    values = _Values(light)
    known: dict[str, Known] = {}
    for _ in range(_ROUNDS):
        known = _infer(light)
        if all(known.get(name, (None, None))[0] is not None for name in wanted) or not values.pin(known):
            break
    return known


def _what_tells(graph: gs.Graph, wanted: Iterable[gs.Tensor]) -> onnx.ModelProto:
    """The part of a graph that tells these tensors' shapes, without weights.

    It begins at tensors that are of known shape and too large to say another's.
    """
    kept = IdentitySet[gs.Node]()
    read: dict[str, gs.Tensor] = {}
    stack = [node for tensor in wanted for node in tensor.inputs]
    while stack:
        node = stack.pop()
        if node in kept:
            continue
        kept.add(node)
        for tensor in read_by(node):
            if tensor.inputs and (static_shape(tensor) is None or tensor.dtype is None or _is_small(tensor)):
                stack.extend(tensor.inputs)
            elif not tensor.is_empty():
                read[tensor.name] = tensor
    nodes = [node for node in graph.nodes if node in kept]
    made = {tensor.name: tensor for node in nodes for tensor in node.outputs if not tensor.is_empty()}
    read = {name: tensor for name, tensor in read.items() if name not in made}
    constants = [t for t in read.values() if isinstance(t, gs.Constant) and _is_small(t)]
    told = {tensor.name for tensor in constants}
    body = onnx.helper.make_graph(
        [OnnxExporter.export_node(node) for node in nodes],
        "light",
        [OnnxExporter.export_value_info_proto(t, False) for name, t in read.items() if name not in told],
        [],
        [OnnxExporter.export_tensor_proto(tensor) for tensor in constants],
        value_info=[
            OnnxExporter.export_value_info_proto(tensor, False)
            for tensor in made.values()
            if tensor.dtype is not None and tensor.shape is not None
        ],
    )
    opsets = graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)]
    light = onnx.helper.make_model(body, opset_imports=opsets)
    name_batch(light)  # ONNX's inference may go through so many numbers one by one
    return light


def _is_small(tensor: gs.Tensor) -> bool:
    shape = static_shape(tensor)
    return shape is not None and math.prod(shape) <= _SMALL


def _infer(light: onnx.ModelProto) -> dict[str, Known]:
    """What ONNX's inference finds, by name."""
    try:
        graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except onnx.shape_inference.InferenceError:
        graph = light.graph
    known: dict[str, Known] = {
        tensor.name: (list(tensor.dims), tensor.data_type) for tensor in graph.initializer
    }
    for info in (*graph.input, *graph.value_info, *graph.output):
        kind = info.type.tensor_type
        dims = kind.shape.dim
        static = kind.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
        known[info.name] = ([dim.dim_value for dim in dims] if static else None, kind.elem_type or None)
    return known


class _Values:
    """Values of a graph that follow from constants and shapes, one node at a time."""

    def __init__(self, light: onnx.ModelProto) -> None:
        self.light = light
        self.makers = {name: node for node in light.graph.node for name in node.output if name}
        self.pinned: set[str] = set()
        self.known: dict[str, Known] = {}
        self.values: dict[str, np.ndarray | None] = {}

    def pin(self, known: dict[str, Known]) -> int:
        """Make constants of the integers that nodes of open shape read; how many."""
        self.known = known
        self.values = {t.name: onnx.numpy_helper.to_array(t) for t in self.light.graph.initializer}
        constants = set(self.values)
        pinned = 0
        for node in self.light.graph.node:
            if all(known.get(name, (None, None))[0] is not None for name in node.output if name):
                continue
            for index, name in enumerate(node.input):
                if name in constants or (value := self.value(name)) is None or value.dtype != np.int64:
                    continue
                node.input[index] = fresh = f"{name}/value"
                if fresh not in self.pinned:
                    self.light.graph.initializer.append(onnx.numpy_helper.from_array(value, fresh))
                self.pinned.add(fresh)
                pinned += 1
        return pinned

    def value(self, name: str, depth: int = 0) -> np.ndarray | None:
        """A small tensor's value, None where it depends on more than shapes."""
        if name not in self.values:
            self.values[name] = self._computed(name, depth)
        return self.values[name]

    def _computed(self, name: str, depth: int) -> np.ndarray | None:
        node, shape = self.makers.get(name), self.known.get(name, (None, None))[0]
        if node is None or node.domain or depth == 100 or (shape is not None and math.prod(shape) > _SMALL):
            return None
        if node.op_type == "Shape":
            read = self.known.get(node.input[0], (None, None))[0]
            start, end = (_integer(node, "start", 0), _integer(node, "end", None))
            return None if read is None else np.array(read[start:end], np.int64)
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            return None
        feeds = {}
        for read in filter(None, node.input):
            if (value := self.value(read, depth + 1)) is None:
                return None
            feeds[read] = value
        return self._run(node, name, feeds) if feeds else None

    def _run(self, node: onnx.NodeProto, name: str, feeds: dict[str, np.ndarray]) -> np.ndarray | None:
        """One output of one node; None where ONNX's reference cannot, or it is not small."""
        names = [onnx.helper.make_empty_tensor_value_info(read) for read in feeds]
        output = onnx.helper.make_empty_tensor_value_info(name)
        alone = onnx.helper.make_graph([node], "node", names, [output])
        model = onnx.helper.make_model(alone, opset_imports=self.light.opset_import)
        try:
            outputs = ReferenceEvaluator(model).run(None, feeds)
            value = np.asarray(outputs[0])  # type: ignore[index]
        except Exception:  # it raises whatever its implementation of the operator stumbles over
            return None
        return value if value.size <= _SMALL else None


def _integer(node: onnx.NodeProto, name: str, default: int | None) -> int | None:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
