"""The same network with other operators, which runs faster: its tensors found by the products at them.

Knows graphs alone; must not know what the operators are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from meta_deploy.graph.precision.placement import Product, is_product, product_of
from meta_deploy.graph.precision.rules import EightBitRules


@dataclass(frozen=True)
class Twin:
    """Where the tensors of a placement are in another graph.

    Attributes:
        names: each tensor's name there.
        readers: by that name, the products there that read it.
    """

    names: dict[str, str]
    readers: dict[str, list[Product]]


def twin_of(products: Sequence[Product], graph: ir.Graph, rules: EightBitRules) -> Twin | None:
    """What a graph has in the place of the tensors that products read and make.

    Products are the same if weights, operator and the input's shape are; of several that are, the first is
    taken for the first. None: there is one that the graph has not.

    Args:
        products: of the one graph, in its order.
        graph: the other one, its types and shapes inferred.
    """
    there = dict(_told_apart([node for node in graph if is_product(node)]))
    names: dict[str, str] = {}
    readers: dict[str, list[Product]] = {}
    for (key, _), product in zip(_told_apart([p.node for p in products]), products, strict=True):
        node = there.get(key)
        other = node and product_of(node, rules)
        if not isinstance(other, Product) or (other.result is None) != (product.result is None):
            return None
        readers.setdefault(_name(other.node.inputs[0]), []).append(other)
        names.setdefault(_name(product.node.inputs[0]), _name(other.node.inputs[0]))
        if product.result is not None and other.result is not None:
            readers.setdefault(_name(other.result), [])
            names.setdefault(_name(product.result), _name(other.result))
    return Twin(names, readers)


def _told_apart(nodes: Sequence[ir.Node]) -> Iterator[tuple[Hashable, ir.Node]]:
    """Products, each with what it has in common with its like in another graph, and the how manieth it is."""
    met: Counter[Hashable] = Counter()
    for node in nodes:
        x, weights = node.inputs[:2]
        assert weights is not None
        assert weights.const_value is not None
        numbers = hashlib.sha256(weights.const_value.numpy().tobytes()).digest()
        sizes = [] if x is None or x.shape is None else [n if isinstance(n, int) else -1 for n in x.shape]
        key = node.op_type, numbers, tuple(weights.const_value.shape.numpy()), tuple(sizes)
        met[key] += 1
        yield (*key, met[key]), node


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name
    return value.name
