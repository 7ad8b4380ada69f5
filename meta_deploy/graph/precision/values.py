"""ONNX IR values as the precision modules ask of them: constants, fills, names, casts. Decides nothing."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

FLOAT = ir.DataType.FLOAT
NUMPY: dict[ir.DataType, Any] = {
    FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}
LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
EIGHT_BITS: dict[str, Any] = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}


def has_graphs(node: ir.Node) -> bool:
    """Whether a node holds graphs: If, Loop, Scan."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def name_of(value: ir.Value | None) -> str:
    """The name of a value that is there and has one."""
    assert value is not None
    assert value.name
    return value.name


def is_constant(value: ir.Value) -> bool:
    """An initializer with a value. One that is a graph input too is none: a user may feed another."""
    return value.is_initializer() and value.const_value is not None and not value.is_graph_input()


def set_constant(value: ir.Value, numbers: np.ndarray, name: str | None = None) -> None:
    """Make a value a constant of these numbers."""
    tensor = ir.tensor(numbers, name=name)
    value.const_value, value.dtype, value.shape = tensor, tensor.dtype, ir.Shape(numbers.shape)


def numbers_of(value: ir.Value) -> np.ndarray:
    """A constant's numbers."""
    assert value.const_value is not None
    return value.const_value.numpy()


def fill_of(node: ir.Node) -> np.ndarray:
    """What a ConstantOfShape fills with: without a value, zeros in float32."""
    return node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)


def set_fill(node: ir.Node, kind: ir.DataType) -> None:
    """Make a ConstantOfShape fill in this type."""
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor(fill_of(node).astype(NUMPY[kind])))


def beyond(numbers: np.ndarray, kind: ir.DataType) -> bool:
    """Whether a type cannot hold a constant: too large, or one number that would lose digits or vanish."""
    numbers = np.abs(numbers)
    finite = numbers[np.isfinite(numbers)]
    limits = ml_dtypes.finfo(NUMPY[kind])
    if finite.size and finite.max() > float(limits.max):
        return True
    return finite.size == 1 and 0 < finite.flat[0] < float(limits.smallest_normal)


def unholdable(value: ir.Value, kind: ir.DataType) -> bool:
    """Whether a value is a float32 constant that a type cannot hold."""
    return value.dtype == FLOAT and is_constant(value) and beyond(numbers_of(value), kind)


class Names:
    """The names in a graph, and new ones."""

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


def cast_node(value: ir.Value, kind: ir.DataType, name: str) -> ir.Node:
    """A Cast of a value, not yet in the graph; node and output share the name."""
    node = ir.node("Cast", [value], {"to": ir.AttrInt64("to", kind)}, name=name)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, kind, value.shape
    return node
