"""What of a graph changes its kernels when products go to 8 bits. Knows operators; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from meta_deploy.graph.precision.placement import is_product
from meta_deploy.graph.precision.values import is_constant

# Compilers make one kernel of these and the product or norm before or behind them.
_FUSED = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Sqrt", "Reciprocal", "Exp", "Erf", "Neg", "Abs"),
        *("Relu", "LeakyRelu", "Gelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Clip", "Where"),
        *("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Concat", "Split", "Slice", "Pad"),
        *("Cast", "Identity", "Softmax", "MatMul", "Resize", "Expand"),
    )
)
_NORMS = ("LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization")
_JOINS = 2  # of other tensors that are followed: a gate and a residual


def surroundings(products: Iterable[ir.Node]) -> set[ir.Node]:
    """Products with what fuses with them: back and forth to the next products and norms, these included.

    An attention lies between products with weights, so that it is followed as a whole. Behind a second tensor
    that joins (a residual, which would lead through the whole network) joins are not followed any more.
    """
    products = list(products)
    found = set(products)
    for product in products:
        _before(product, found)
        _behind(product, found, _JOINS)
    return found


def _before(node: ir.Node, found: set[ir.Node]) -> None:
    stack = [node.inputs[0]]
    while stack:
        value = stack.pop()
        maker = value.producer() if value is not None else None
        if maker is None or maker in found:
            continue
        ends = is_product(maker) or maker.op_type in _NORMS
        if ends or maker.op_type in _FUSED:
            found.add(maker)
        if not ends and maker.op_type in _FUSED:
            stack += [v for v in maker.inputs if v is not None and not is_constant(v)]


def _behind(node: ir.Node, found: set[ir.Node], joins: int) -> None:
    most: dict[ir.Node, int] = {}
    stack = [(output, joins) for output in node.outputs]
    while stack:
        value, left = stack.pop()
        for reader, _ in value.uses():
            ends = is_product(reader) or reader.op_type in _NORMS
            rest = left - (not ends and reader.op_type != "MatMul" and _reads_several(reader))
            if rest < 0 or not (ends or reader.op_type in _FUSED) or most.get(reader, -1) >= rest:
                continue
            most[reader] = rest
            found.add(reader)
            if not ends:
                stack += [(output, rest) for output in reader.outputs]


def _reads_several(node: ir.Node) -> bool:
    return len({value for value in node.inputs if value is not None and not is_constant(value)}) > 1
