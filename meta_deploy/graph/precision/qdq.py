"""Putting QuantizeLinear and DequantizeLinear into a graph, where a placement says. Decides nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from meta_deploy.graph.precision.carry import passed, shared_ranges
from meta_deploy.graph.precision.placement import Placement, Product
from meta_deploy.graph.precision.quantize import (
    Range,
    one_scale_is_enough,
    quantized_weights,
    scale_and_factors,
    scale_of,
    weight_scales,
    widened_scales,
)
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.graph.precision.values import (
    EIGHT_BITS,
    FLOAT,
    Names,
    cast_node,
    is_constant,
    numbers_of,
    set_constant,
    unholdable,
)

_LARGE = 4096  # numbers of weights that are worth a node


def insert(graph: ir.Graph, placement: Placement, ranges: Mapping[str, Range], rules: EightBitRules) -> None:
    """Quantize in place what a placement names: weights to 8-bit constants, activations by their ranges.

    A tensor has one QuantizeLinear, whoever reads it. Where the rest is float32, weights of products that
    stay so are float16 in the file, and a Cast makes them float32 when the model is loaded: that costs no
    time, and far less precision than 8 bits.
    """
    quantizer = _Quantizer(graph, shared_ranges(placement, ranges), rules)
    for product in placement.products:
        if product.result is not None:
            quantizer.quantize_for_all(product.result)
    for node in placement.carried:
        quantizer.quantize_for_all(node.outputs[0])
    for node in placement.carried:
        quantizer.carry(node)
    for product in placement.products:
        quantizer.quantize_product(product)
    if rules.rest == "fp32":
        for node in placement.declined:
            quantizer.store_in_float16(node)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]


class _Quantizer:
    """Makes constants and pairs of nodes, each but once."""

    def __init__(self, graph: ir.Graph, ranges: Mapping[str, Range], rules: EightBitRules) -> None:
        self.graph, self.ranges, self.rules = graph, ranges, rules
        self.names = Names(graph)
        self._pairs: dict[ir.Value, tuple[ir.Value, np.float32]] = {}
        self._weights: dict[tuple[ir.Value, int, bytes, bytes], ir.Value] = {}
        self._halves: dict[ir.Value, ir.Value] = {}

    def quantize_product(self, product: Product) -> None:
        """Let a product read its input, its weights and, where the target does, its bias from 8 bits."""
        node, weights = product.node, product.node.inputs[1]
        x = node.inputs[0]
        assert x is not None
        assert weights is not None
        restored, scale = self._pair(x)
        node.replace_input_with(0, restored)
        scales = weight_scales(product.weights, product.axis, self.rules)
        if self.rules.factors:
            largest, factors = scale_and_factors(scales, self.rules)
            if node.op_type == "Conv" and one_scale_is_enough(product.weights, product.axis, self.rules):
                factors = np.ones_like(factors)
            else:
                self._scale_channels(product, factors)
            restored = self._weight(node, weights, product.axis, largest * factors, largest)
            node.replace_input_with(1, restored)
            return
        if product.bias is not None and self.rules.biases:
            reader, place = product.bias
            bias = reader.inputs[place]
            assert bias is not None
            scales = widened_scales(scales, numbers_of(bias).ravel(), scale)
            reader.replace_input_with(place, self._bias(node, bias, scales * scale))
        node.replace_input_with(1, self._weight(node, weights, product.axis, scales, scales))

    def carry(self, node: ir.Node) -> None:
        """Let a node read its numbers from 8 bits."""
        for i, value in enumerate(passed(node)):
            node.replace_input_with(i, self._pair(value)[0])

    def quantize_for_all(self, value: ir.Value) -> None:
        """Let all that reads a tensor, an output of the graph included, read it from 8 bits."""
        if value in self._pairs:
            return
        readers = list(value.uses())
        restored, _ = self._pair(value)
        self._pairs[restored] = self._pairs[value]
        if value.is_graph_output():
            value.name, restored.name = self.names.fresh(f"{value.name}/float"), value.name
        self._read_instead(value, restored, readers)

    def _read_instead(self, value: ir.Value, new: ir.Value, readers: Collection[tuple[ir.Node, int]]) -> None:
        """Let readers, and who takes the graph's outputs, read another value."""
        for reader, place in readers:
            reader.replace_input_with(place, new)
        for i, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[i] = new

    def store_in_float16(self, node: ir.Node) -> None:
        """Let a product read its large weights from float16, if that holds them."""
        weights = node.inputs[1]
        if weights is None or weights.dtype != FLOAT or not is_constant(weights):
            return
        if numbers_of(weights).size < _LARGE or unholdable(weights, ir.DataType.FLOAT16):
            return
        if weights not in self._halves:
            number = self._constant(f"{weights.name}/float16", numbers_of(weights).astype(np.float16))
            cast = cast_node(number, FLOAT, self.names.fresh(f"{weights.name}/float32"))
            self.graph.insert_before(node, cast)
            self._halves[weights] = cast.outputs[0]
        node.replace_input_with(1, self._halves[weights])

    def _pair(self, value: ir.Value) -> tuple[ir.Value, np.float32]:
        """A tensor as it comes back from 8 bits, and its scale."""
        if value not in self._pairs:
            assert value.name
            scale, zero = scale_of(self.ranges[value.name], self.rules)
            kind = EIGHT_BITS[self.rules.number] if self.rules.signed else np.uint8
            factors = [
                self._constant(f"{value.name}/scale", np.array(scale)),
                self._constant(f"{value.name}/zero_point", np.array(zero, kind)),
            ]
            name = self.names.fresh(f"{value.name}/{self.rules.number}")
            quantize = ir.node("QuantizeLinear", [value, *factors], name=name)
            number = quantize.outputs[0]
            number.name, number.shape = quantize.name, value.shape
            number.type = factors[1].type
            restore = self._restore(number, factors, f"{value.name}/restored", value.shape)
            maker = value.producer()
            if maker is None:
                self.graph.insert_before(self.graph[0], [quantize, restore])
            else:
                self.graph.insert_after(maker, [quantize, restore])
            self._pairs[value] = restore.outputs[0], scale
        return self._pairs[value]

    def _weight(
        self, node: ir.Node, value: ir.Value, axis: int, scales: np.ndarray, restored: np.ndarray
    ) -> ir.Value:
        """Weights in 8 bits and DequantizeLinear. Products that share them share these, where scales agree.

        Args:
            scales: by which they are quantized, one a channel.
            restored: by which they are restored: these, or one of no dimensions.
        """
        key = value, axis, scales.tobytes(), restored.tobytes()
        if key not in self._weights:
            numbers = quantized_weights(numbers_of(value), scales, axis, self.rules)
            number = self._constant(f"{value.name}/{self.rules.number}", numbers)
            name = f"{value.name}/restored"
            self._weights[key] = self._restored_constant(node, number, restored, name, axis)
        return self._weights[key]

    def _scale_channels(self, product: Product, factors: np.ndarray) -> None:
        """Multiply what a product makes by a factor a channel, and add its own bias behind that."""
        node = product.node
        shape = (-1, *[1] * (product.weights.ndim - 2)) if node.op_type == "Conv" else (-1,)
        steps = [("Mul", "factors", factors)]
        if product.bias is not None and product.bias[0] is node:
            bias = node.inputs[product.bias[1]]
            assert bias is not None
            steps.append(("Add", "bias", numbers_of(bias).ravel()))
            node.resize_inputs(product.bias[1])
        output, readers = node.outputs[0], list(node.outputs[0].uses())
        last, maker = output, node
        for op, what, numbers in steps:
            constant = self._constant(f"{output.name}/{what}", numbers.reshape(shape))
            step = ir.node(op, [last, constant], name=self.names.fresh(f"{output.name}/{op.lower()}"))
            self.graph.insert_after(maker, step)
            last, maker = step.outputs[0], step
            last.name, last.dtype, last.shape = step.name, FLOAT, output.shape
        output.name, last.name = self.names.fresh(f"{output.name}/product"), output.name
        self._read_instead(output, last, readers)

    def _bias(self, node: ir.Node, value: ir.Value, scales: np.ndarray) -> ir.Value:
        numbers = np.rint(numbers_of(value).ravel().astype(np.float64) / scales).astype(np.int32)
        number = self._constant(f"{value.name}/int32", numbers)
        return self._restored_constant(node, number, scales, f"{value.name}/restored", 0)

    def _restored_constant(
        self, node: ir.Node, number: ir.Value, scales: np.ndarray, name: str, axis: int
    ) -> ir.Value:
        assert number.const_value is not None
        kind = number.const_value.numpy().dtype
        factors = [
            self._constant(f"{name}/scale", scales.astype(np.float32)),
            self._constant(f"{name}/zero_point", np.zeros(scales.shape, kind)),
        ]
        restore = self._restore(number, factors, name, number.shape)
        if scales.ndim:
            restore.attributes["axis"] = ir.AttrInt64("axis", axis)
        self.graph.insert_before(node, restore)
        return restore.outputs[0]

    def _restore(
        self, number: ir.Value, factors: list[ir.Value], name: str, shape: ir.Shape | None
    ) -> ir.Node:
        node = ir.node("DequantizeLinear", [number, *factors], name=self.names.fresh(name))
        output = node.outputs[0]
        output.name, output.dtype, output.shape = node.name, FLOAT, shape
        return node

    def _constant(self, name: str, numbers: np.ndarray) -> ir.Value:
        name = self.names.fresh(name)
        value = ir.Value(name=name)
        set_constant(value, numbers, name)
        self.graph.register_initializer(value)
        return value
