"""For each tensor the range that its readers' results suffer least from. Knows products and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from meta_deploy import ort
from meta_deploy.calib.methods import METHODS
from meta_deploy.calib.statistics import Statistics
from meta_deploy.graph.graph import IR_VERSION
from meta_deploy.graph.precision.placement import Product
from meta_deploy.graph.precision.quantize import Range, fake_quantized
from meta_deploy.graph.precision.ranges import open_session
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.graph.precision.values import FLOAT


def ranges_of(statistics: Statistics, rules: EightBitRules) -> dict[str, Range]:
    """The range by each method; a tensor that is zero everywhere has one of no width by all of them."""
    whole = statistics.whole
    if whole == (0.0, 0.0):
        return dict.fromkeys(METHODS, whole)
    return {name: method(statistics.histogram, whole, rules) for name, method in METHODS.items()}


def errors_of(
    statistics: Statistics, ranges: Mapping[str, Range], products: list[Product], rules: EightBitRules
) -> dict[str, float]:
    """By each method, how far its readers' results are from float32's: norm of the difference over the norm.

    Readers are products with their weights as they are; a tensor that no product reads is its own result. Of
    several readers, the root of the mean square. As products are linear, the difference is what they make of
    the difference of their input.
    """
    blocks = [block for block in statistics.blocks if block.size]
    if not blocks:
        return dict.fromkeys(ranges, 0.0)
    squares = dict.fromkeys(ranges, 0.0)
    readers = [_linear(product) for product in products if _alike(product, products[0])] or [lambda x: x]
    for linear in readers:
        whole = sum(_square(linear(block)) for block in blocks)
        for name, ends in ranges.items():
            off = sum(_square(linear(_difference(block, ends, rules))) for block in blocks)
            squares[name] += off / max(whole, 1e-30) / len(readers)
    return {name: float(np.sqrt(square)) for name, square in squares.items()}


def best(errors: Mapping[str, float]) -> str:
    """The method of the least error; of equals the first, which clips least."""
    return min(errors, key=lambda name: errors[name])


def _alike(product: Product, first: Product) -> bool:
    """Whether a product reads what was kept for the first one."""
    return (product.node.op_type == "Conv") == (first.node.op_type == "Conv")


def _difference(block: np.ndarray, ends: Range, rules: EightBitRules) -> np.ndarray:
    return (fake_quantized(block, ends, rules) - block).astype(np.float32)


def _square(values: np.ndarray) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))


def _linear(product: Product) -> Callable[[np.ndarray], np.ndarray]:
    """A product without its bias, as a function of a part of its input."""
    if product.node.op_type != "Conv":
        weights = product.weights if product.axis == 1 else product.weights.T
        return lambda rows: rows @ weights
    session = open_session(_alone(product))
    return lambda window: ort.run(session, None, {"x": window})[0]


def _alone(product: Product) -> ir.Model:
    """A convolution as a model of its own, for any size."""
    weights = product.weights
    x = ir.Value(
        name="x",
        type=ir.TensorType(FLOAT),
        shape=ir.Shape([None, weights.shape[1], *[None] * (weights.ndim - 2)]),
    )
    constant = ir.Value(name="w", type=ir.TensorType(FLOAT), const_value=ir.tensor(weights, name="w"))
    node = ir.node("Conv", [x, constant], dict(product.node.attributes))
    node.outputs[0].name, node.outputs[0].dtype = "y", FLOAT
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[constant], opset_imports={"": 13}, name="one"
    )
    return ir.Model(graph, ir_version=IR_VERSION)
