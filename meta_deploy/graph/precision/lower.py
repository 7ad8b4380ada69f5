"""Which nodes of a float32 graph compute in a lower precision, by their operators' own schemas, and doing it.

Knows ONNX's operators and numbers; no model and no target. Inputs and outputs of the graph stay float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import onnx
import onnx_ir as ir

from meta_deploy.graph.graph import IR_VERSION
from meta_deploy.graph.precision.ranges import EXACT
from meta_deploy.graph.precision.values import (
    FLOAT,
    NUMPY,
    Names,
    beyond,
    cast_node,
    fill_of,
    has_graphs,
    is_constant,
    numbers_of,
    set_constant,
    set_fill,
    unholdable,
)

# Conv and others take bfloat16 from opset 22 on, QuantizeLinear float16 and E4M3 from 19 on. Since 18 only
# types and choices were added, but for these.
_UNCHANGED_SINCE, _BFLOAT16_OPSET, LOW_SCALES_OPSET = 18, 22, 19
_CHANGED = {"GridSample": 20, "GroupNormalization": 21}

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
    **dict.fromkeys(("Floor", "Ceil", "Round", "Mod"), None),
}
_ROUND = ("Floor", "Ceil", "Round")
_INTEGERS = frozenset((ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32, ir.DataType.INT64))
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
# Operators of ONNX Runtime's that a pass brings in; all their float tensors are of one type.
_CONTRIBUTED = frozenset(
    ("com.microsoft", name) for name in ("Attention", "MultiHeadAttention", "RotaryEmbedding")
)


@dataclass(frozen=True)
class Conversion:
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


@dataclass
class Plan:
    """Which values become low, and in which type each node reads what it reads. Changes nothing yet.

    Attributes:
        low: the lower type.
        lowered: values that will be of it.
        reads: (node, place of the input) -> the type to read it in.
        attributes: nodes whose attributes give a type that changes too.
        computed: node -> whether it computes in the lower type, of those with floats.
        overflow: as given.
    """

    low: ir.DataType
    lowered: set[ir.Value] = field(default_factory=set)
    reads: dict[tuple[ir.Node, int], ir.DataType] = field(default_factory=dict)
    attributes: set[ir.Node] = field(default_factory=set)
    computed: dict[ir.Node, bool] = field(default_factory=dict)
    overflow: dict[str, float] = field(default_factory=dict)

    def kind(self, value: ir.Value) -> ir.DataType | None:
        """A value's type to be."""
        return self.low if value in self.lowered else value.dtype

    def tensors(self) -> set[str]:
        """The names of what will be of the lower type, or cast to it for a reader."""
        names = {value.name for value in self.lowered}
        for (node, place), kind in self.reads.items():
            value = node.inputs[place]
            if value is not None and kind == self.low:
                names.add(value.name)
        return {name for name in names if name}


def plan(
    model: ir.Model,
    low: ir.DataType,
    overflow: dict[str, float] | None = None,
    float32_operators: Collection[str] = (),
) -> Plan:
    """Decide what of a graph computes in a lower precision.

    In float32 stay: inputs and outputs of the graph; operators and inputs that ONNX defines for float32
    alone (the scales of a Resize; more of them where a graph's opset is old); what decides by small
    differences (comparisons, TopK, non-maximum suppression, sampling coordinates) back to the last product
    or norm; sums of many and powers; what computes with a constant that the type cannot hold; sequences; If
    and Loop with all they read.

    Args:
        model: a float32 graph with its types inferred. Its opset is raised where the lower type needs it;
            nothing else changes.
        low: the lower type, one of `LOW`.
        overflow: tensor -> magnitude, of tensors that the type cannot hold.
        float32_operators: operators that the target has in float32 alone.
    """
    if low == ir.DataType.BFLOAT16:
        raise_opset(model, _BFLOAT16_OPSET)
    _name_types(model.graph)
    made = Plan(low, overflow=dict(overflow or {}))
    stays = _stays_float32(model.graph, low, set(made.overflow))
    stays.update(node for node in model.graph if node.op_type in float32_operators)
    signature = partial(_Signature.of, opset=model.opset_imports[""])
    for node in model.graph:
        kind = FLOAT if node in stays or _follows_float32(node, made) else low
        if any(output.dtype == low for output in node.outputs) and not has_graphs(node):
            kind = low  # as the graph itself has it
        _plan_node(made, node, signature(node), kind)
    return made


def apply(model: ir.Model, plan: Plan) -> Conversion:
    """Carry out a plan, in place."""
    graph = model.graph
    caster = _Caster(graph)
    for node in list(graph):
        for place, value in enumerate(node.inputs):
            if value is not None and (node, place) in plan.reads:
                node.replace_input_with(place, caster.cast(value, plan.reads[node, place]))
        for output in node.outputs:
            if output in plan.lowered:
                output.dtype = plan.low
        if node in plan.attributes:
            _convert_attributes(node, plan.low)
    _restore_outputs(graph, plan, caster)
    _drop_unread_constants(graph)
    computed = plan.computed.values()
    return Conversion(len(computed), list(computed).count(False), caster.count, plan.overflow)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as ONNX writes it."""
    proto = ir.to_proto(model)
    proto.ir_version = IR_VERSION
    return proto


# --- which nodes stay ---------------------------------------------------------------------------------------


def raise_opset(model: ir.Model, wanted: int) -> None:
    """To the opset in which operators take other types, where that changes no operator's meaning."""
    opset = model.opset_imports[""]
    changes = [_CHANGED.get(node.op_type, _UNCHANGED_SINCE) for node in model.graph.all_nodes()]
    since = max((_UNCHANGED_SINCE if change > wanted else change for change in changes), default=0)
    if since <= opset < wanted:
        model.opset_imports[""] = wanted


def _name_types(graph: ir.Graph) -> None:
    """Types that inference left open: an unknown operator makes what it is given."""
    for node in graph:
        if node.domain in ("", "ai.onnx"):  # a sequence, which has none
            continue
        for output in node.outputs:
            if output.dtype is None and node.inputs and node.inputs[0] is not None and node.inputs[0].dtype:
                output.dtype = node.inputs[0].dtype


def _stays_float32(graph: ir.Graph, low: ir.DataType, overflow: set[str]) -> set[ir.Node]:
    """The nodes to leave in float32, but for those that only follow what they read."""
    stays: set[ir.Node] = set()
    for node in graph:
        values = [value for value in (*node.inputs, *node.outputs) if value is not None]
        if (
            node.op_type in _FLOAT32
            or has_graphs(node)
            or any(value.name and not isinstance(value.type, ir.TensorType) for value in values)  # sequences
            or any(value.name in overflow for value in values)
            or any(unholdable(value, low) for value in node.inputs if value is not None)
            or (node.op_type == "ConstantOfShape" and beyond(fill_of(node), low))
        ):
            stays.add(node)
        if _places_that_decide(node) is None:
            stays.add(node)
    stays |= leading_to(deciding(graph))[0]
    stays.update(_captured(graph))
    return stays


def deciding(graph: ir.Graph) -> list[ir.Value]:
    """What comparisons, TopK, non-maximum suppression, sampling and rounding decide by."""
    found: list[ir.Value] = []
    for node in graph:
        places = _places_that_decide(node)
        found += [v for i, v in enumerate(node.inputs) if v and (places is None or i in places)]
    return found


def _places_that_decide(node: ir.Node) -> tuple[int, ...] | None:
    """The inputs by which a node decides; None for all."""
    if node.op_type == "Cast" and node.outputs[0].dtype in _INTEGERS:
        return None
    if node.op_type == "Sub" and any(_rounded(value) for value in node.inputs):
        return None  # how far from a whole number: of large numbers, a small one
    return _DECIDE.get(node.op_type, ())


def _rounded(value: ir.Value | None) -> bool:
    """Whether a value was rounded to whole numbers, and perhaps limited, or moved, since."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in _ROUND:
            return True
        if node.op_type not in EXACT:
            return False
        value = node.inputs[0]
    return False


def leading_to(
    values: Iterable[ir.Value], ends: Collection[str] = _PRODUCTS
) -> tuple[set[ir.Node], set[ir.Node]]:
    """The nodes that lead to values, back to the last ones of the operators `ends`; and those."""
    between: set[ir.Node] = set()
    last: set[ir.Node] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        maker = value.producer()
        if maker is None or value.dtype != FLOAT or maker in between:
            continue
        if maker.op_type in ends:
            last.add(maker)
            continue
        between.add(maker)
        stack += [v for v in maker.inputs if v is not None]
    return between, last


def _captured(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes whose outputs are read inside the graph of an If, Loop or Scan."""
    for node in graph.all_nodes():
        if node.graph is not graph:
            for value in node.inputs:
                maker = value.producer() if value is not None else None
                if maker is not None and maker.graph is graph:
                    yield maker


def _follows_float32(node: ir.Node, plan: Plan) -> bool:
    """Whether a node passes numbers on that come in float32."""
    return (node.op_type in EXACT or node.op_type == "Cast") and any(
        v is not None and plan.kind(v) == FLOAT and not v.is_initializer() for v in node.inputs
    )


# --- how a node changes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Signature:
    """The types that ONNX allows for each input and output of an operator."""

    inputs: tuple[frozenset[str], ...]
    outputs: tuple[frozenset[str], ...]

    @classmethod
    def of(cls, node: ir.Node, opset: int) -> _Signature:
        """Of an operator that is not known no type but float32 is allowed."""
        if (node.domain, node.op_type) in _CONTRIBUTED:
            every = frozenset(f"tensor({name})" for name in ("float", "float16", "bfloat16", "int32"))
            return cls((every,) * len(node.inputs), (every,) * len(node.outputs))
        unknown = cls((frozenset(),) * len(node.inputs), (frozenset(),) * len(node.outputs))
        if node.domain not in ("", "ai.onnx"):
            return unknown
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError:
            return unknown
        allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}

        def types(formals: Any, count: int) -> tuple[frozenset[str], ...]:
            places = [formals[min(i, len(formals) - 1)] for i in range(count)]
            return tuple(allowed.get(f.type_str, frozenset((f.type_str,))) for f in places)

        results = types(schema.outputs, len(node.outputs))
        if node.op_type == "LayerNormalization":  # mean and deviation are of its stash_type
            results = results[:1] + (frozenset(("tensor(float)",)),) * len(results[1:])
        return cls(types(schema.inputs, len(node.inputs)), results)


def _plan_node(plan: Plan, node: ir.Node, signature: _Signature, kind: ir.DataType) -> None:
    """Give a node's floats the type `kind` where it may."""
    name = f"tensor({plan.low.name.lower()})" if kind == plan.low else ""
    lowered = floats = False
    for place, value in enumerate(node.inputs):
        if value is not None and plan.kind(value) in (FLOAT, plan.low):
            floats = True
            wanted = plan.low if name in signature.inputs[place] else FLOAT
            if plan.kind(value) == FLOAT and place in (_DECIDE.get(node.op_type) or ()):
                wanted = FLOAT
            lowered |= wanted == plan.low
            plan.reads[node, place] = wanted
    for output, allowed in zip(node.outputs, signature.outputs, strict=True):
        if output.dtype == FLOAT:
            floats = True
            if name in allowed:
                plan.lowered.add(output)
                lowered = True
    if lowered:
        plan.attributes.add(node)
    if floats:
        plan.computed[node] = lowered


def _convert_attributes(node: ir.Node, low: ir.DataType) -> None:
    """Types that a node's attributes give to what it makes."""
    for name in ("to", "dtype"):
        if name in node.attributes and node.attributes[name].value == FLOAT:
            node.attributes[name] = ir.AttrInt64(name, low)
    if node.op_type == "ConstantOfShape":
        set_fill(node, low)


class _Caster:
    """Values in the other type: a copy of a constant, a Cast behind what is computed; each but once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.count = 0
        self.names = Names(graph)
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        if value.dtype == kind:
            return value
        if (value, kind) not in self._made:
            made = self._made[value, kind] = self._make(value, kind)
            self._made[made, value.dtype or FLOAT] = value
        return self._made[value, kind]

    def _make(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        name = self.names.fresh(f"{value.name}/{kind.name.lower()}")
        if is_constant(value):
            copy = ir.Value(name=name)
            set_constant(copy, numbers_of(value).astype(NUMPY[kind]), name)
            self.graph.register_initializer(copy)
            return copy
        self.count += 1
        node = cast_node(value, kind, name)
        maker = value.producer()
        if maker is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(maker, node)
        return node.outputs[0]


def _restore_outputs(graph: ir.Graph, plan: Plan, caster: _Caster) -> None:
    """Outputs that were float32 are so again, under their own names."""
    for i, output in enumerate(graph.outputs):
        if output not in plan.lowered or output.dtype is None:
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
