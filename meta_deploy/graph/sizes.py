"""Sizes that a model leaves open, inferred for numbers as the batch. Knows ONNX; no pattern and no target."""

from __future__ import annotations

import functools
import math
import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import onnx
from onnx import AttributeProto, TypeProto, helper, numpy_helper
from onnx.reference.ops import load_op
from onnx.shape_inference import infer_node_outputs

from meta_deploy.graph.graph import bodies

# What sizes are inferred for where the batch is open. The last is larger than any batch, but not so large
# that inference makes large constants.
_BATCHES = (1, 2, 1014)
FEW = 64  # numbers that go into a shape
_MOST = 8192  # numbers of a constant that such are computed from
RANDOM = (
    *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"),
)

T = TypeVar("T")
_Each = tuple[T | None, ...]  # of one value, for each number as the batch
_Types = ChainMap[str, _Each[TypeProto]]
_Numbers = ChainMap[str, _Each[np.ndarray]]
_Dims = list[int | str | None]


def infer_open_sizes(model: onnx.ModelProto) -> set[str]:
    """Write down the sizes that are open and that inference tells, in place.

    Inference computes with numbers alone, so it is told several for an unknown batch. What is the same for
    all is taken not to depend on it; what grows like it is a multiple of it. It goes node after node, and
    what is made of sizes is computed: so sizes are known that come from others, however often in a row.

    Returns:
        The names of the values of which more sizes are known than before.
    """
    inference = _Inference(model)
    inference.visit(model.graph, ChainMap(), ChainMap())
    return inference.learned


class _Inference:
    """Types and small constants of a model's values, for each number as the batch.

    Attributes:
        batch: what the first axis of the first input is called where its size is open; else empty.
        learned: the values of which more sizes are known than before.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.opsets = {opset.domain: opset.version for opset in model.opset_import}
        self.imports = list(model.opset_import)
        first = next((_dims(value.type) for value in model.graph.input[:1]), None)
        self.batch = first[0] if first and isinstance(first[0], str) else ""
        self.batches = _BATCHES if self.batch else _BATCHES[:1]
        self.multiple = re.compile(rf"(?:(\d+)\*)?{re.escape(self.batch)}")
        self.learned: set[str] = set()

    def visit(self, graph: onnx.GraphProto, types: _Types, numbers: _Numbers) -> None:
        """Infer what a graph's nodes make; `types` and `numbers` are those of the graphs around it."""
        infos = {info.name: info for info in (*graph.value_info, *graph.output)}
        for tensor in graph.initializer:
            types[tensor.name] = self.always(helper.make_tensor_type_proto(tensor.data_type, tensor.dims))
            if math.prod(tensor.dims) <= _MOST:
                numbers[tensor.name] = self.always(numpy_helper.to_array(tensor))
        for info in graph.input:
            types[info.name] = self.declared(info.type)
            numbers[info.name] = self.always(None)  # whatever the initializer of this name
        for node in graph.node:
            known = [self.declared(infos[name].type) if name in infos else () for name in node.output]
            inner = list(bodies(node))
            if inner:
                scopes = [types.new_child() for _ in inner]
                for body, scope in zip(inner, scopes, strict=True):
                    self.visit(body, scope, numbers.new_child())
                found = _of_branches(node, inner, scopes) if node.op_type == "If" else {}
            elif all(each and _is_static(each[0]) for each in known):
                found = {}
            else:
                found = self.inferred(node, types, numbers)
            for name, declared in zip(node.output, known, strict=True):
                if not name:
                    continue
                types[name] = _pairwise(
                    _more, found.get(name) or self.always(None), declared or self.always(None)
                )
                if not declared or not _is_static(declared[0]):
                    self.note(graph, infos, name, types[name])
            if [*map(bool, node.output)] == [True] and not inner:
                numbers[node.output[0]] = self.computed(node, types, numbers)

    def always(self, value: T | None) -> _Each[T]:
        """What is the same for each number."""
        return (value,) * len(self.batches)

    def declared(self, kind: TypeProto) -> _Each[TypeProto]:
        """A type, with each number for the batch in it."""
        dims = _dims(kind)
        times = [
            self.multiple.fullmatch(d) if self.batch and isinstance(d, str) else None for d in dims or ()
        ]
        if not any(times):
            return self.always(kind)
        return tuple(
            _typed(
                kind, [int(t[1] or 1) * number if t else d for d, t in zip(dims or (), times, strict=True)]
            )
            for number in self.batches
        )

    def inferred(self, node: onnx.NodeProto, types: _Types, numbers: _Numbers) -> dict[str, _Each[TypeProto]]:
        """The types that inference tells for a node's outputs."""
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(node.domain, 1), node.domain)
        except onnx.defs.SchemaError:
            return {}
        names = list(dict.fromkeys(filter(None, node.input)))
        if any(name not in types for name in names):
            return {}

        def infer(*inputs: TypeProto | np.ndarray | None) -> dict[str, TypeProto]:
            kinds = dict(zip(names, inputs, strict=False))
            if any(kind is None for kind in kinds.values()):
                return {}
            arrays = zip(names, inputs[len(names) :], strict=True)
            try:
                few = {
                    name: numpy_helper.from_array(array, name)
                    for name, array in arrays
                    if isinstance(array, np.ndarray) and array.size <= FEW
                }
                return infer_node_outputs(schema, node, kinds, few, opset_imports=self.imports)  # type: ignore[arg-type]
            except Exception:  # of a foreign file, anything
                return {}

        columns = [*(types[name] for name in names), *(numbers.get(n, self.always(None)) for n in names)]
        told = _pairwise(infer, *columns) if columns else self.always(infer())
        return {name: tuple((each or {}).get(name) for each in told) for name in node.output}

    def computed(self, node: onnx.NodeProto, types: _Types, numbers: _Numbers) -> _Each[np.ndarray]:
        """What a node makes, where it is a few numbers that the batch decides."""
        nothing: _Each[np.ndarray] = self.always(None)
        if node.op_type == "Shape" and not node.domain:
            attributes = {a.name: a.i for a in node.attribute}
            return _pairwise(functools.partial(_sizes, **attributes), types.get(node.input[0], nothing))
        if node.op_type in RANDOM:
            return nothing
        inputs = [numbers.get(name, nothing) for name in node.input]
        if any(name and each[0] is None for name, each in zip(node.input, inputs, strict=True)):
            return nothing
        attributes = {a.name: _value(a) for a in node.attribute}

        def compute(kind: TypeProto | None, *arrays: np.ndarray | None) -> np.ndarray | None:
            given = [array is not None or not name for array, name in zip(arrays, node.input, strict=True)]
            dims = _dims(kind)
            if dims is None or not _all_known(dims) or not all(given):
                return None
            if math.prod(size for size in dims if isinstance(size, int)) > FEW:
                return None
            try:
                operator = load_op(node.domain, node.op_type, self.opsets.get(node.domain, 1))
                made = operator.eval(*arrays, **attributes)
            except Exception:  # of a foreign file, anything
                return None
            return np.asarray(made[0] if isinstance(made, tuple) else made)

        return _pairwise(compute, types[node.output[0]], *inputs)

    def note(
        self, graph: onnx.GraphProto, infos: dict[str, onnx.ValueInfoProto], name: str, told: _Each[TypeProto]
    ) -> None:
        """Write down the sizes of a value that are known for each number, if they are more than before."""
        info = infos.get(name)
        before = None if info is None else _dims(info.type)
        after = self.merged(before, [_dims(kind) for kind in told])
        if self.open_sizes(after) >= self.open_sizes(before):
            return
        if info is None:
            info = infos[name] = graph.value_info.add(name=name)
        info.type.CopyFrom(_typed(told[0], after))  # type: ignore[arg-type]
        self.learned.add(name)

    def merged(self, before: _Dims | None, told: Sequence[_Dims | None]) -> _Dims | None:
        """Sizes with those that inference tells; names of open ones stay, as the exporter's tell more."""
        ranks = {None if dims is None else len(dims) for dims in told}
        if None in ranks or len(ranks | ({len(before)} if before is not None else set())) != 1:
            return before
        merged: _Dims = [None] * len(told[0] or ()) if before is None else list(before)
        for axis, sizes in enumerate(zip(*told, strict=True)):  # type: ignore[arg-type]
            one = sizes[0]
            if not _all_known(sizes):
                continue
            if all(size == one for size in sizes):
                merged[axis] = one
            elif all(size == one * number for size, number in zip(sizes, self.batches, strict=True)):
                merged[axis] = self.batch if one == 1 else f"{one}*{self.batch}"
        return merged

    def open_sizes(self, dims: _Dims | None) -> int:
        """How many sizes are not known, multiples of the batch aside; more than any for an unknown rank."""
        if dims is None:
            return 99
        return sum(
            not isinstance(d, int) and not (self.batch and d is not None and self.multiple.fullmatch(d))
            for d in dims
        )


def _pairwise(function: Callable[..., T | None], *columns: _Each) -> _Each[T]:
    """A function of what there is for each number; called once where all of it is the same for all."""
    rows = list(zip(*columns, strict=True))
    if all(each is first for row in rows[1:] for each, first in zip(row, rows[0], strict=True)):
        return (function(*rows[0]),) * len(rows)
    return tuple(function(*row) for row in rows)


def _of_branches(
    node: onnx.NodeProto, branches: Sequence[onnx.GraphProto], types: Sequence[_Types]
) -> dict[str, _Each[TypeProto]]:
    """The types of an If's outputs that both branches make of the same sizes."""
    made = zip(
        *([scope.get(o.name) for o in body.output] for body, scope in zip(branches, types, strict=True)),
        strict=False,
    )
    return {
        name: one
        for name, (one, other) in zip(node.output, made, strict=False)
        if one and other and [*map(_dims, one)] == [*map(_dims, other)]
    }


def _dims(kind: TypeProto | None) -> _Dims | None:
    """A tensor's sizes: a number, a name or None; None where not even the rank is known."""
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    return [
        d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.tensor_type.shape.dim
    ]


def _all_known(dims: Iterable[object]) -> bool:
    return all(isinstance(size, int) for size in dims)


def _is_static(kind: TypeProto | None) -> bool:
    dims = _dims(kind)
    return dims is not None and _all_known(dims)


def _typed(kind: TypeProto, dims: _Dims) -> TypeProto:
    """A tensor's type with other sizes."""
    return helper.make_tensor_type_proto(kind.tensor_type.elem_type, dims)


def _more(inferred: TypeProto | None, declared: TypeProto | None) -> TypeProto | None:
    """What both tell of a type."""
    if inferred is None or declared is None or _is_static(inferred):
        return declared if inferred is None else inferred
    one, other = _dims(inferred), _dims(declared)
    if one is None or other is None or len(one) != len(other):
        return declared if one is None else inferred
    return _typed(
        inferred,
        [b if isinstance(b, int) and not isinstance(a, int) else a for a, b in zip(one, other, strict=True)],
    )


def _sizes(kind: TypeProto | None, start: int = 0, end: int | None = None) -> np.ndarray | None:
    """What a Shape makes of a tensor, where that is known."""
    dims = _dims(kind)
    taken = None if dims is None else dims[start:end]
    return np.array(taken, np.int64) if taken is not None and _all_known(taken) else None


def _value(attribute: AttributeProto) -> object:
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value
