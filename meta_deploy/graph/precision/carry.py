"""Which nodes between 8-bit products can pass 8-bit numbers on as they are, and the ranges that they share.

Knows ONNX's operators and a target's rules; no model. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from meta_deploy.graph.precision.placement import Placement, count
from meta_deploy.graph.precision.quantize import Range
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.graph.precision.values import FLOAT, is_constant, name_of

# These pick or move numbers, so that rounding before them is rounding behind them; the first input is moved.
_MOVES = frozenset(("MaxPool", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Concat"))
_SEVERAL = ("Concat", "Add")  # of which all inputs are numbers, each with a scale of its own


def carrying(graph: ir.Graph, placement: Placement, rules: EightBitRules) -> Placement:
    """A placement with the nodes that carry 8 bits to its products, as far as the target's rules let.

    A node is taken if a product reads what it makes, or a node that is taken does, and something that it
    reads is in 8 bits anyway; the rest of what it reads is quantized for it. A sum wants 8 bits on both
    sides. Where something reads the result in float32 as well, only nodes are taken that change no number
    and make no more than they read.

    Args:
        graph: of the placement, its nodes sorted.
    """
    search = _Search(placement, rules)
    for node in reversed(graph):
        search.look_at(node)
    return replace(placement, carried=search.found[::-1])


def shared_ranges(placement: Placement, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Ranges of all that is quantized: what a node with one input makes has its input's.

    A tensor that no product reads or makes has the range that joins those of what is made of it; where that
    is read by sums alone, of what it is joined from.

    Args:
        ranges: of the tensors that products read and make, by name.
    """
    found = dict(ranges)
    for node in reversed(placement.carried):
        made = found.get(name_of(node.outputs[0]))
        if made is None or node.op_type == "Add":
            continue
        for name in map(name_of, passed(node)):
            if name not in ranges:
                low, high = found.get(name, made)
                found[name] = min(low, made[0]), max(high, made[1])
    for node in placement.carried:
        name, ends = name_of(node.outputs[0]), [found.get(name_of(value)) for value in passed(node)]
        if node.op_type != "Add" and (len(ends) == 1 or name not in found):
            lows, highs = zip(*filter(None, ends), strict=True)
            found[name] = min(lows), max(highs)
    return found


def passed(node: ir.Node) -> list[ir.Value]:
    """The first inputs of a node that carries 8 bits: those that are numbers, not places or sizes."""
    values = node.inputs if node.op_type in _SEVERAL else node.inputs[:1]
    return [value for value in values if value is not None]


class _Search:
    """Goes through a graph from its end.

    Attributes:
        found: the nodes that carry 8 bits, the last first.
    """

    def __init__(self, placement: Placement, rules: EightBitRules) -> None:
        self.rules = rules
        self.found: list[ir.Node] = []
        self._results = {product.result for product in placement.products}
        self._readers = {product.node for product in placement.products}
        self._read = {product.node.inputs[0] for product in placement.products}

    def look_at(self, node: ir.Node) -> None:
        """Take a node if it is one to be taken; all that reads what it makes has been looked at."""
        if not self._can(node) or node.outputs[0] not in self._read:
            return
        has = [self._is_low(value, node) for value in passed(node)]
        if not any(has) or (node.op_type == "Add" and not all(has)):
            return
        if not self._feeds_none_else(node) and not (all(has) and _is_exact(node) and _shrinks(node)):
            return
        self.found.append(node)
        self._readers.add(node)
        self._read.update(passed(node))

    def _can(self, node: ir.Node) -> bool:
        """Whether 8-bit numbers can go through a node at all."""
        if node.op_type not in self.rules.carries or node.domain not in ("", "ai.onnx"):
            return False
        if node.outputs[0] in self._results or node.outputs[0].is_graph_output():
            return False
        if any(output.uses() for output in node.outputs[1:]):
            return False
        if any(is_constant(value) or value.dtype != FLOAT for value in passed(node)):
            return False
        return node.op_type in ("Add", *_MOVES) or _stays_between(node)

    def _is_low(self, value: ir.Value, reader: ir.Node) -> bool:
        """Whether a tensor is in 8 bits without `reader`, or would come to be if it is taken.

        What only sums read has no range of its own, so that a sum has to be read by others too.
        """
        if value in self._results or value in self._read:
            return True
        maker = value.producer()
        if maker is None or maker.op_type == "Add" or not self._can(maker):
            return False
        if not self._feeds_none_else(maker, reader):
            return False
        return all(self._is_low(one, maker) for one in passed(maker))

    def _feeds_none_else(self, node: ir.Node, reader: ir.Node | None = None) -> bool:
        """Whether all that reads what a node makes reads it in 8 bits, or is `reader`."""
        return all(use.node is reader or use.node in self._readers for use in node.outputs[0].uses())


def _is_exact(node: ir.Node) -> bool:
    """Whether a node's numbers are some of those that it reads."""
    return node.op_type != "Add" and _text(node, "mode", "nearest") == "nearest"


def _shrinks(node: ir.Node) -> bool:
    """Whether a node makes no more numbers than it reads."""
    return count(node.outputs[0]) <= sum(map(count, passed(node)))


def _stays_between(node: ir.Node) -> bool:
    """Whether a Resize makes numbers that it reads, or means of neighbours: none leaves their range."""
    if _text(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return False
    smooth = "antialias" in node.attributes and node.attributes["antialias"].as_int() != 0
    return _text(node, "mode", "nearest") in ("nearest", "linear") and not smooth


def _text(node: ir.Node, name: str, default: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else default
