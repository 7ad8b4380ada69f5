"""Which products of a float32 graph compute in 8 bits on a target, and what is quantized for them.

Knows ONNX's operators and a target's rules; no ranges, no model. Changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from meta_deploy.graph.precision.lower import deciding, leading_to
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.graph.precision.values import FLOAT, is_constant, name_of, numbers_of

# What an activation in 8 bits is measured anew by: products with weights, attention, norms.
_ENDS = frozenset(
    (
        *("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "MultiHeadAttention", "Attention", "RoiAlign"),
        *("LayerNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization"),
    )
)
_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_OPEN = 32  # stands for a height, width or length that is known at run time only


@dataclass(frozen=True)
class Product:
    """A Conv, Gemm or MatMul with constant weights.

    Attributes:
        node: itself; its weights are input 1.
        axis: of the weights' output channels.
        bias: the node and the place of its input that hold the bias; None without one.
        result: what is quantized behind it, if anything: its output, or that of the Relu that reads it.
    """

    node: ir.Node
    axis: int
    bias: tuple[ir.Node, int] | None = None
    result: ir.Value | None = None

    @property
    def weights(self) -> np.ndarray:
        assert self.node.inputs[1] is not None
        return numbers_of(self.node.inputs[1])


@dataclass
class Placement:
    """What computes in 8 bits.

    Attributes:
        products: in the graph's order.
        declined: product -> why it stays in float32, in words.
        readers: each activation that is quantized, by name, and the products that read it.
        carried: nodes between them that pass 8-bit numbers on (`carry.py`), in the graph's order.
    """

    products: list[Product] = field(default_factory=list)
    declined: dict[ir.Node, str] = field(default_factory=dict)
    readers: dict[str, list[Product]] = field(default_factory=dict)
    carried: list[ir.Node] = field(default_factory=list)

    def reasons(self) -> dict[str, int]:
        """Why products stay in float32, and how many each."""
        return dict(Counter(self.declined.values()).most_common())

    def only(self, products: Collection[Product], reason: str) -> Placement:
        """This placement with some of its products alone; the others stay in float32 for a reason."""
        kept = {product.node for product in products}
        rest = {product.node: reason for product in self.products if product.node not in kept}
        chosen = [product for product in self.products if product.node in kept]
        return Placement(chosen, {**self.declined, **rest}, readers_of(chosen))

    def moved(self, nodes: Mapping[ir.Node, ir.Node], values: Mapping[ir.Value, ir.Value]) -> Placement:
        """The same for a copy of the graph, by what each node and value became; of what it has alone."""
        products = [
            replace(
                one,
                node=nodes[one.node],
                bias=None if one.bias is None else (nodes[one.bias[0]], one.bias[1]),
                result=None if one.result is None else values[one.result],
            )
            for one in self.products
            if one.node in nodes
        ]
        declined = {nodes[node]: reason for node, reason in self.declined.items() if node in nodes}
        carried = [nodes[node] for node in self.carried if node in nodes]
        return Placement(products, declined, readers_of(products), carried)


def place(graph: ir.Graph, rules: EightBitRules, outputs: Collection[str] | None = None) -> Placement:
    """Decide what computes in 8 bits.

    In float32 stay: what the target has no 8-bit kernel for, or a slower one; the first convolution, which
    reads pixels; and the last products before what the graph decides by (scores and boxes) or puts out, as
    there 8 bits make ties.

    Args:
        graph: in float32, its types and shapes inferred.
        rules: the target's.
        outputs: names of the outputs that ship; None: all.
    """
    shipped = [value for value in graph.outputs if outputs is None or value.name in outputs]
    last = leading_to([*deciding(graph), *shipped], _ENDS)[1]
    made = Placement()
    for node in graph:
        if node.op_type not in _PRODUCTS or node.domain not in ("", "ai.onnx"):
            continue
        found = product_of(node, rules)
        reason = found if isinstance(found, str) else _declines(graph, found, rules, node in last)
        if reason or isinstance(found, str):
            made.declined[node] = reason
        else:
            made.products.append(found)
    made.readers = readers_of(made.products)
    return made


def is_product(node: ir.Node) -> bool:
    """Whether a node is a convolution or a product of a computed tensor with constant weights."""
    weights = node.inputs[1] if node.op_type in _PRODUCTS and len(node.inputs) > 1 else None
    return weights is not None and is_constant(weights)


def readers_of(products: Collection[Product]) -> dict[str, list[Product]]:
    """The tensors that are quantized for some products, by name, and which of these read each."""
    readers: dict[str, list[Product]] = {}
    for product in products:
        readers.setdefault(name_of(product.node.inputs[0]), []).append(product)
    for product in products:
        if product.result is not None:
            readers.setdefault(name_of(product.result), [])
    return readers


def product_of(node: ir.Node, rules: EightBitRules) -> Product | str:
    """A node as a product with weights, or why it is none that has an 8-bit kernel."""
    if node.op_type == "ConvTranspose":
        return "transposed convolutions have no 8-bit kernel"
    x, weights = node.inputs[0], node.inputs[1]
    if weights is None or not is_constant(weights) or x is None or is_constant(x):
        return "it is no product of a computed tensor with constant weights"
    if weights.dtype != FLOAT:
        return "its weights are not float32"
    if node.op_type == "Conv":
        if _int(node, "group", 1) != 1:
            return "depthwise and grouped convolutions are slower in 8 bits"
        result = (_relu_behind(node.outputs[0]) or node.outputs[0]) if rules.results else None
        return Product(node, 0, (node, 2) if _has_bias_of_its_own(node) else None, result)
    if len(numbers_of(weights).shape) != 2:
        return "its weights are not a matrix"
    if node.op_type == "MatMul":
        bias = _added(node)
        if bias is None and rules.biases and _joins_sum(node):
            return "its sum with another tensor has no 8-bit kernel"
        value = bias[0].outputs[0] if bias else node.outputs[0]
        return Product(node, 1, bias, _relu_behind(value) if rules.results else None)
    if _int(node, "transA", 0) or any(_float(node, name) != 1 for name in ("alpha", "beta")):
        return "a Gemm with factors has no 8-bit kernel"
    axis = 0 if _int(node, "transB", 0) else 1
    result = _relu_behind(node.outputs[0]) if rules.results else None
    return Product(node, axis, (node, 2) if _has_bias_of_its_own(node) else None, result)


def _declines(graph: ir.Graph, product: Product, rules: EightBitRules, last: bool) -> str:
    """Why a product stays in float32; empty if it does not."""
    node, weights = product.node, product.weights
    if last:
        return "scores, boxes or outputs are made of its result"
    if node.op_type == "Conv" and _reads_input(graph, node):
        return "it is the first convolution"
    if not np.isfinite(weights).all():
        return "its weights are not finite"
    outputs = weights.shape[product.axis]
    if product.bias is not None and not _is_bias(product.bias[0].inputs[product.bias[1]], outputs):
        return "its bias is not a constant of one number a channel"
    inputs = weights.shape[1] if node.op_type == "Conv" else weights.size // max(outputs, 1)
    if min(inputs, outputs) < rules.channels:
        return f"it has fewer than {rules.channels} channels"
    macs = count(node.outputs[0]) * weights.size / outputs
    if not rules.pays(macs, count(node.inputs[0]) + count(node.outputs[0])):
        return "it is too small to gain time"
    return ""


def _relu_behind(value: ir.Value) -> ir.Value | None:
    """What a ReLU or ReLU6 that alone reads a value makes of it; it goes into the kernel of a product."""
    found = _sole_reader(value, "Relu", "Clip")
    return found[0].outputs[0] if found and found[1] == 0 else None


def _added(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The Add of a constant of one number a channel that alone reads a MatMul, and the constant's place."""
    value = node.outputs[0]
    found = _sole_reader(value, "Add")
    weights = node.inputs[1]
    if found is None or weights is None:
        return None
    add, place = found
    bias = add.inputs[1 - place]
    if bias is None or not _is_bias(bias, numbers_of(weights).shape[1]):
        return None
    rank = 1 if value.shape is None else len(value.shape)
    return (add, 1 - place) if numbers_of(bias).ndim <= rank else None


def _joins_sum(node: ir.Node) -> bool:
    """Whether a product of matrices goes into the sum that alone reads it, as ONNX Runtime makes a Gemm."""
    value = node.outputs[0]
    found = _sole_reader(value, "Add")
    if found is None or value.shape is None or len(value.shape) != 2:
        return False
    other = found[0].inputs[1 - found[1]]
    return other is not None and (other.shape is None or len(other.shape) > 1)


def _is_bias(value: ir.Value | None, channels: int) -> bool:
    """Whether a value is a constant of one number a channel, the last axis."""
    if value is None or not is_constant(value) or value.dtype != FLOAT:
        return False
    numbers = numbers_of(value)
    return numbers.ndim > 0 and numbers.size == numbers.shape[-1] == channels


def _has_bias_of_its_own(node: ir.Node) -> bool:
    return len(node.inputs) > 2 and node.inputs[2] is not None


def _sole_reader(value: ir.Value, *ops: str) -> tuple[ir.Node, int] | None:
    """The node that alone reads a value, if it is one of these operators, and the place of its input."""
    readers = list(value.uses())
    if len(readers) != 1 or value.is_graph_output() or readers[0][0].op_type not in ops:
        return None
    return readers[0][0], readers[0][1]


def _reads_input(graph: ir.Graph, node: ir.Node) -> bool:
    """Whether nothing with weights stands between an input of the graph and a node."""
    x = node.inputs[0]
    assert x is not None
    between, ends = leading_to([x], _ENDS)
    sources: Iterator[ir.Value | None] = (value for one in between for value in one.inputs)
    return not ends and any(value in graph.inputs for value in (x, *sources) if value is not None)


def count(value: ir.Value | None) -> float:
    """How many numbers a tensor has for one image; sizes that are open are taken for usual ones."""
    if value is None or value.shape is None:
        return 0.0
    sizes = [
        size if isinstance(size, int) else (1 if i == 0 else _OPEN) for i, size in enumerate(value.shape)
    ]
    return float(math.prod(sizes))


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _float(node: ir.Node, name: str) -> float:
    return node.attributes[name].as_float() if name in node.attributes else 1.0
