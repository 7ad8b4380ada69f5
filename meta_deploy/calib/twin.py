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
from meta_deploy.graph.precision.values import name_of


@dataclass(frozen=True)
class Twin:
    """Where products of a graph, and the tensors that they read and make, are in another one.

    Attributes:
        products: there, in the order in which those of the graph were given.
        names: each tensor's name there.
        readers: by that name, the products there that read it.
    """

    products: list[Product]
    names: dict[str, str]
    readers: dict[str, list[Product]]


def twin_of(
    products: Sequence[Product], graph: ir.Graph, other: ir.Graph, rules: EightBitRules
) -> Twin | None:
    """What another graph has in the place of the tensors that products of a graph read and make.

    Products are the same if weights, operator and the input's shape are; of several that are, the first is
    taken for the first. None: there is one that the other graph has not.

    Args:
        products: of `graph`, perhaps not all.
        graph, other: their types and shapes inferred.
    """
    keys = {node: key for key, node in _told_apart(graph)}
    there = dict(_told_apart(other))
    same: list[Product] = []
    names: dict[str, str] = {}
    readers: dict[str, list[Product]] = {}
    for product in products:
        node = there.get(keys[product.node])
        found = node and product_of(node, rules)
        if not isinstance(found, Product) or (found.result is None) != (product.result is None):
            return None
        same.append(found)
        readers.setdefault(name_of(found.node.inputs[0]), []).append(found)
        names.setdefault(name_of(product.node.inputs[0]), name_of(found.node.inputs[0]))
        if product.result is not None and found.result is not None:
            readers.setdefault(name_of(found.result), [])
            names.setdefault(name_of(product.result), name_of(found.result))
    return Twin(same, names, readers)


def _told_apart(graph: ir.Graph) -> Iterator[tuple[Hashable, ir.Node]]:
    """A graph's products, each behind what it shares with its like in another graph, its number of these
    included.
    """
    met: Counter[Hashable] = Counter()
    for node in filter(is_product, graph):
        x, weights = node.inputs[:2]
        assert weights is not None
        assert weights.const_value is not None
        numbers = hashlib.sha256(weights.const_value.numpy().tobytes()).digest()
        sizes = [] if x is None or x.shape is None else [n if isinstance(n, int) else -1 for n in x.shape]
        key = node.op_type, numbers, tuple(weights.const_value.shape.numpy()), tuple(sizes)
        met[key] += 1
        yield (*key, met[key]), node
