"""A float32 graph computed in float16 or bfloat16: which nodes change, by their operators' own schemas.

Knows ONNX's operators and numbers; no model and no target. Inputs and outputs of the graph stay float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from meta_deploy.graph.graph import IR_VERSION, normalized

FLOAT = ir.DataType.FLOAT
LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_NUMPY: dict[ir.DataType, Any] = {
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}
# Conv and others take bfloat16 from opset 22 on. Since 18 only types and choices were added, but for these.
_UNCHANGED_SINCE, _BFLOAT16_OPSET = 18, 22
_CHANGED = {"GridSample": 20, "GroupNormalization": 21}

# An activation may be this much larger on other images than on those it was measured on.
HEADROOM = 4.0

# What these decide turns on small differences: they, and what leads to them, are computed in float32. The
# inputs that do the deciding; None for all.
_DECIDE: dict[str, tuple[int, ...] | None] = {
    "TopK": (0,),
    "ArgMax": (0,),
    "ArgMin": (0,),
    "NonMaxSuppression": None,
    "RoiAlign": (1,),
    "GridSample": (1,),
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"), None),
}
# What leads to a decision goes back to one of these.
_PRODUCTS = frozenset(
    (
        *("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "MultiHeadAttention", "Attention"),
        *("LayerNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization"),
        *("RoiAlign", "GridSample", "Resize", "MaxPool", "AveragePool", "GlobalAveragePool"),
    )
)
# Sums of many, and squares: statistics of norms that are written in pieces.
_FLOAT32 = frozenset(
    (
        *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSumExp"),
        *("Pow", "CumSum", "Range", "RoiAlign", "NonMaxSuppression"),
        # These have their type in an attribute, each in its own way.
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "EyeLike"),
        *("HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix"),
    )
)
# These pass numbers on as they are, so they go in the type that their numbers come in.
_EXACT = frozenset(
    (
        *("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Pad"),
        *("Slice", "Split", "Concat", "Gather", "GatherElements", "GatherND", "ScatterND", "ScatterElements"),
        *("DepthToSpace", "SpaceToDepth", "Where", "Compress", "Trilu", "Neg", "Abs", "Relu"),
        *("Min", "Max", "Clip", "MaxPool", "TopK"),
    )
)
_SMALL = frozenset(("Softmax", "Sigmoid", "Tanh", "Gelu", "Cast"))  # make nothing above 1 or their input
# Operators of ONNX Runtime's that a pass brings in; all their float tensors are of one type.
_CONTRIBUTED = frozenset((("com.microsoft", "MultiHeadAttention"),))


@dataclass(frozen=True)
class Precision:
    """What a conversion did.

    Attributes:
        nodes: that compute with floats.
        float32_nodes: of these, those left in float32, moves included.
        casts: added between the types.
        overflow: tensor -> the largest magnitude that it had on the images; what makes and reads such a
            tensor is in float32.
    """

    nodes: int
    float32_nodes: int
    casts: int
    overflow: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    proto: onnx.ModelProto,
    precision: str,
    overflow: dict[str, float] | None = None,
    float32_operators: Collection[str] = (),
) -> tuple[onnx.ModelProto, Precision]:
    """A graph with its float32 nodes in a lower precision, where their schemas and the numbers allow it.

    In float32 stay: inputs and outputs of the graph; operators and inputs that ONNX defines for float32
    alone (the scales of a Resize; more of them where a graph's opset is old); what decides by small
    differences (comparisons, TopK, non-maximum suppression, sampling coordinates) back to the last product
    or norm; sums of many and powers; what computes with a constant that the type cannot hold; sequences; If
    and Loop with all they read.

    Args:
        proto: a float32 graph; not changed.
        precision: a key of `LOW`.
        overflow: tensors that the type cannot hold, as `overflowing` finds them.
        float32_operators: operators that the target has in float32 alone.

    Returns:
        The new graph, and what was done.

    Raises:
        KeyError: an unknown precision.
    """
    low = LOW[precision]
    model = normalized(proto)
    if precision == "bf16":
        opset = model.opset_imports[""]
        since = max(
            (_CHANGED.get(node.op_type, _UNCHANGED_SINCE) for node in model.graph.all_nodes()), default=0
        )
        model.opset_imports[""] = _BFLOAT16_OPSET if since <= opset < _BFLOAT16_OPSET else opset
    signature = partial(_Signature.of, opset=model.opset_imports[""])
    _name_types(model.graph)
    stays = _stays_float32(model.graph, low, set(overflow or ()))
    stays.update(node for node in model.graph if node.op_type in float32_operators)
    caster = _Caster(model.graph)
    nodes = float32_nodes = 0
    for node in list(model.graph):
        kind = FLOAT if node in stays or _follows_float32(node) else low
        if any(output.dtype == low for output in node.outputs) and not _has_graphs(node):
            kind = low  # as the graph itself has it
        computed = _convert_node(node, signature(node), kind, low, caster)
        nodes += computed is not None
        float32_nodes += computed is False
    _restore_outputs(model.graph, caster)
    _drop_unread_constants(model.graph)
    converted = ir.to_proto(model)
    converted.ir_version = IR_VERSION
    return converted, Precision(nodes, float32_nodes, caster.count, dict(overflow or {}))


def lowered_tensors(
    proto: onnx.ModelProto, precision: str, float32_operators: Collection[str] = ()
) -> set[str]:
    """The tensors of a float32 graph that `convert` would make in the lower precision, or cast to it."""
    lowered, _ = convert(proto, precision, None, float32_operators)
    kind = LOW[precision]
    names = {info.name for info in lowered.graph.value_info if info.type.tensor_type.elem_type == kind}
    casts = (node for node in lowered.graph.node if node.op_type == "Cast" and node.output[0] in names)
    return names | {node.input[0] for node in casts}


def overflowing(
    proto: onnx.ModelProto,
    batches: Iterable[np.ndarray],
    tensors: Collection[str],
    headroom: float = HEADROOM,
) -> dict[str, float]:
    """The tensors whose magnitude comes within `headroom` times of what float16 can hold.

    Args:
        proto: a float32 graph with one input.
        batches: float32 (B, 3, H, W), what a user would feed.
        tensors: those to look at, as `lowered_tensors` names them.

    Returns:
        Tensor -> its largest magnitude over all batches, infinite where it was none.
    """
    largest = float(np.finfo(np.float16).max) / headroom
    maxima = activation_maxima(proto, batches, tensors)
    return {name: value for name, value in maxima.items() if not value <= largest}


def activation_maxima(
    proto: onnx.ModelProto, batches: Iterable[np.ndarray], tensors: Collection[str]
) -> dict[str, float]:
    """The largest magnitude of float32 tensors that nodes make, over all batches.

    Those that cannot be larger than others of them are left out.
    """
    model = normalized(proto)
    graph = model.graph
    wanted = set(tensors)
    nodes = [node for node in graph if _may_enlarge(node, wanted)]
    watched = [v for node in nodes for v in node.outputs if v.dtype == FLOAT and v.name in wanted]
    if not watched:
        return {}
    graph.outputs[:] = [_magnitude(graph, value, f"maximum_{i}") for i, value in enumerate(watched)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # a large model's tensors are gigabytes
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # in the graph's order: each at once
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    maxima = np.zeros(len(watched))
    name = session.get_inputs()[0].name
    for batch in batches:
        values = np.array([float(value) for value in session.run(None, {name: batch})])
        maxima = np.maximum(maxima, np.where(np.isnan(values), np.inf, values))
    return {value.name: float(most) for value, most in zip(watched, maxima, strict=True) if value.name}


def _may_enlarge(node: ir.Node, measured: Collection[str]) -> bool:
    """Whether what a node makes may be larger than those of `measured` that it reads, or what it reads is not
    of these."""
    if node.op_type not in _EXACT | _SMALL:
        return True
    if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype != FLOAT:
        return True
    return any(
        _unholdable(value, ir.DataType.FLOAT16) if _is_constant(value) else value.name not in measured
        for value in node.inputs
        if value is not None and value.dtype == FLOAT
    )


def emulated(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same numbers in float32 arithmetic: what a low-precision node makes is rounded to its type.

    For checking a graph where a runtime has no such kernels (bfloat16 on a CPU), or where it would skip the
    rounding between two of them. A GPU's products accumulate in float32 likewise.
    """
    model = ir.from_proto(proto)
    graph = model.graph
    names = _Names(graph)
    for value in list(graph.initializers.values()):
        if value.dtype in _NUMPY:
            assert value.const_value is not None
            _set_constant(value, ir.tensor(value.const_value.numpy().astype(np.float32)))
    for node in list(graph):
        if node.op_type == "ConstantOfShape" and node.outputs[0].dtype in _NUMPY:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_fill(node).astype(np.float32)))
        for output in node.outputs:
            kind = output.dtype
            if kind is None or kind not in _NUMPY:
                continue
            output.dtype = FLOAT
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", kind)
                output.dtype = kind
                _insert_casts(graph, names, node, output, FLOAT)
            elif node.op_type not in _EXACT:
                _insert_casts(graph, names, node, output, kind, FLOAT)
    result = ir.to_proto(model)
    result.ir_version = IR_VERSION
    return result


# --- which nodes stay ---------------------------------------------------------------------------------------


def _stays_float32(graph: ir.Graph, low: ir.DataType, overflow: set[str]) -> set[ir.Node]:
    """The nodes to leave in float32, but for those that only follow what they read."""
    stays: set[ir.Node] = set()
    leading: list[ir.Value] = []
    for node in graph:
        values = [value for value in (*node.inputs, *node.outputs) if value is not None]
        if (
            node.op_type in _FLOAT32
            or _has_graphs(node)
            or any(value.name and not isinstance(value.type, ir.TensorType) for value in values)  # sequences
            or any(value.name in overflow for value in values)
            or any(_unholdable(value, low) for value in node.inputs if value is not None)
            or (node.op_type == "ConstantOfShape" and _beyond(_fill(node), low))
        ):
            stays.add(node)
        if node.op_type in _DECIDE:
            places = _DECIDE[node.op_type]
            leading += [v for i, v in enumerate(node.inputs) if v and (places is None or i in places)]
            if places is None:
                stays.add(node)
    seen: set[ir.Node] = set()
    while leading:
        value = leading.pop()
        maker = value.producer()
        if maker is None or value.dtype != FLOAT or maker in seen or maker.op_type in _PRODUCTS:
            continue
        seen.add(maker)
        leading += [v for v in maker.inputs if v is not None]
    stays |= seen
    stays.update(_captured(graph))
    return stays


def _captured(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes whose outputs are read inside the graph of an If, Loop or Scan."""
    for node in graph.all_nodes():
        if node.graph is not graph:
            for value in node.inputs:
                maker = value.producer() if value is not None else None
                if maker is not None and maker.graph is graph:
                    yield maker


def _has_graphs(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def _unholdable(value: ir.Value, low: ir.DataType) -> bool:
    """A float32 constant too large for the type; or a number alone that would lose its digits or vanish."""
    if value.dtype != FLOAT or not _is_constant(value):
        return False
    assert value.const_value is not None
    return _beyond(value.const_value.numpy(), low)


def _beyond(numbers: np.ndarray, low: ir.DataType) -> bool:
    numbers = np.abs(numbers)
    finite = numbers[np.isfinite(numbers)]
    limits = ml_dtypes.finfo(_NUMPY[low])
    if finite.size and finite.max() > float(limits.max):
        return True
    return finite.size == 1 and 0 < finite.flat[0] < float(limits.smallest_normal)


def _follows_float32(node: ir.Node) -> bool:
    """Whether a node passes numbers on that come in float32."""
    return (node.op_type in _EXACT or node.op_type == "Cast") and any(
        v is not None and v.dtype == FLOAT and not v.is_initializer() for v in node.inputs
    )


# --- how a node changes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Signature:
    """The types that ONNX allows for each input and output of an operator."""

    inputs: tuple[frozenset[str], ...]
    outputs: tuple[frozenset[str], ...]

    @classmethod
    def of(cls, node: ir.Node, opset: int) -> _Signature | None:
        """None for an operator that is not known; its floats are float32."""
        if (node.domain, node.op_type) in _CONTRIBUTED:
            every = frozenset(f"tensor({name})" for name in ("float", "float16", "bfloat16", "int32"))
            return cls((every,) * len(node.inputs), (every,) * len(node.outputs))
        if node.domain not in ("", "ai.onnx"):
            return None
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError:
            return None
        allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}

        def types(formals: Any, count: int) -> tuple[frozenset[str], ...]:
            places = [formals[min(i, len(formals) - 1)] for i in range(count)]
            return tuple(allowed.get(f.type_str, frozenset((f.type_str,))) for f in places)

        results = types(schema.outputs, len(node.outputs))
        if node.op_type == "LayerNormalization":  # mean and deviation are of its stash_type
            results = results[:1] + (frozenset(("tensor(float)",)),) * len(results[1:])
        return cls(types(schema.inputs, len(node.inputs)), results)


def _convert_node(
    node: ir.Node, signature: _Signature | None, kind: ir.DataType, low: ir.DataType, caster: _Caster
) -> bool | None:
    """Give a node's floats the type `kind` where it may; True if it is low now, None without any floats."""
    name = f"tensor({low.name.lower()})" if kind == low else ""
    places = signature.inputs if signature else (frozenset[str](),) * len(node.inputs)
    results = signature.outputs if signature else (frozenset[str](),) * len(node.outputs)
    lowered = floats = False
    for i, value in enumerate(node.inputs):
        if value is not None and value.dtype in (FLOAT, low):
            floats = True
            wanted = low if name in places[i] else FLOAT
            if value.dtype == FLOAT and i in (_DECIDE.get(node.op_type) or ()):
                wanted = FLOAT
            lowered |= wanted == low
            node.replace_input_with(i, caster.cast(value, wanted))
    for output, allowed in zip(node.outputs, results, strict=True):
        if output.dtype == FLOAT:
            floats = True
            if name in allowed:
                output.dtype = low
                lowered = True
    if lowered:
        _convert_attributes(node, low)
    return lowered if floats else None


def _convert_attributes(node: ir.Node, low: ir.DataType) -> None:
    """Types that a node's attributes give to what it makes."""
    for name in ("to", "dtype"):
        if name in node.attributes and node.attributes[name].value == FLOAT:
            node.attributes[name] = ir.AttrInt64(name, low)
    if node.op_type == "ConstantOfShape":
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_fill(node).astype(_NUMPY[low])))


class _Names:
    """Names of a graph's values and nodes, and new ones."""

    def __init__(self, graph: ir.Graph) -> None:
        self._taken = {value.name for value in graph.inputs} | set(graph.initializers)
        for node in graph.all_nodes():
            self._taken.update((node.name, *(output.name for output in node.outputs)))

    def fresh(self, wish: str) -> str:
        name, count = wish, 1
        while name in self._taken:
            count += 1
            name = f"{wish}_{count}"
        self._taken.add(name)
        return name


class _Caster:
    """Values in the other type: a copy of a constant, a Cast behind what is computed; each but once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.count = 0
        self.names = _Names(graph)
        self._made: dict[tuple[int, ir.DataType], ir.Value] = {}

    def cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        if value.dtype == kind:
            return value
        key = (id(value), kind)
        if key not in self._made:
            self._made[key] = self._make(value, kind)
            self._made[id(self._made[key]), value.dtype or FLOAT] = value
        return self._made[key]

    def _make(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        name = self.names.fresh(f"{value.name}/{kind.name.lower()}")
        if _is_constant(value):
            assert value.const_value is not None
            copy = ir.Value(name=name)
            _set_constant(copy, ir.tensor(_rounded(value.const_value.numpy(), kind), name=name))
            self.graph.register_initializer(copy)
            return copy
        self.count += 1
        node = _cast_node(value, kind, name)
        maker = value.producer()
        if maker is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(maker, node)
        return node.outputs[0]


def _restore_outputs(graph: ir.Graph, caster: _Caster) -> None:
    """Outputs in float32 under their own names."""
    for i, output in enumerate(graph.outputs):
        maker = output.producer()
        if maker is None or output.dtype not in _NUMPY:
            continue
        name = output.name
        new = caster.cast(output, FLOAT)
        if new.is_graph_output():  # the same value twice
            graph.outputs[i] = new
            continue
        output.name = caster.names.fresh(f"{name}/{output.dtype.name.lower()}")
        new.name = name
        new.shape = output.shape
        graph.outputs[i] = new


def _drop_unread_constants(graph: ir.Graph) -> None:
    """Those whose every reader has a copy in the other type now."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]


# --- small things -------------------------------------------------------------------------------------------


def _name_types(graph: ir.Graph) -> None:
    """Types that inference left open: an unknown operator makes what it is given."""
    for node in graph:
        if node.domain in ("", "ai.onnx"):  # a sequence, which has none
            continue
        for output in node.outputs:
            if output.dtype is None and node.inputs and node.inputs[0] is not None and node.inputs[0].dtype:
                output.dtype = node.inputs[0].dtype


def _rounded(numbers: np.ndarray, kind: ir.DataType) -> np.ndarray:
    return numbers.astype(np.float32 if kind == FLOAT else _NUMPY[kind])


def _set_constant(value: ir.Value, tensor: Any) -> None:
    value.const_value = tensor
    value.dtype = tensor.dtype
    value.shape = tensor.shape


def _is_constant(value: ir.Value) -> bool:
    """Not so an initializer that is an input too: a user may give another."""
    return value.is_initializer() and value.const_value is not None and not value.is_graph_input()


def _fill(node: ir.Node) -> np.ndarray:
    """What a ConstantOfShape fills with: without a value, zeros in float32."""
    return node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)


def _cast_node(value: ir.Value, kind: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": ir.AttrInt64("to", kind)}, name=name)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, kind, value.shape
    return node


def _insert_casts(
    graph: ir.Graph, names: _Names, node: ir.Node, value: ir.Value, *kinds: ir.DataType
) -> None:
    """Casts behind a node's output, for all that read it."""
    readers = list(value.uses())
    last, last_node = value, node
    for kind in kinds:
        cast = _cast_node(last, kind, names.fresh(f"{value.name}/{kind.name.lower()}"))
        graph.insert_after(last_node, cast)
        last, last_node = cast.outputs[0], cast
    for reader, place in readers:
        reader.replace_input_with(place, last)


def _magnitude(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """The largest magnitude of a tensor, 0 of an empty one, as a new node's output of no dimensions."""
    absolute = ir.node("Abs", [value])
    most = ir.node("ReduceMax", [absolute.outputs[0]], {"keepdims": ir.AttrInt64("keepdims", 0)})
    maker = value.producer()
    assert maker is not None
    graph.insert_after(maker, [absolute, most])  # where the tensor is in memory anyway
    output = most.outputs[0]
    output.name, output.dtype, output.shape = name, FLOAT, ir.Shape([])
    return output
