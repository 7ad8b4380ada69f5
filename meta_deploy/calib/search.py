"""Which products of a graph should be in 8 bits, by what each group gains in time and costs in error.

Knows groups, times and errors; must not know where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from meta_deploy.calib.calibrate import graph_digest
from meta_deploy.calib.costs import PAYS, Costs, Kept, Row, Verdict
from meta_deploy.calib.twin import twin_of
from meta_deploy.graph.graph import normalized
from meta_deploy.graph.precision.carry import carrying
from meta_deploy.graph.precision.int8 import TITLES
from meta_deploy.graph.precision.lower import to_proto
from meta_deploy.graph.precision.placement import Placement, Product, readers_of
from meta_deploy.graph.precision.qdq import insert
from meta_deploy.graph.precision.quantize import Range
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.graph.precision.values import name_of
from meta_deploy.targets import cache

INACCURATE = "its error is not worth its time"
_VERSION = 6


def by_worth(rows: Sequence[Row]) -> list[Row]:
    """Rows by falling gain for their squared error.

    Errors of groups are nearly independent, so that their squares add up. Then no other set gains more than
    the first rows of this order without a larger error: they are what fills a knapsack of that size best.
    """
    return sorted(rows, key=lambda row: (row.error or 0.0) ** 2 / max(row.gain_ms, 1e-12))


def longest(count: int, holds: Callable[[int], bool]) -> int:
    """The largest number from 0 to `count` that holds, where those above one that fails fail; 0 holds."""
    low, high = 0, count + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Whole:
    """A graph in float32, what of it may be in 8 bits, and the ranges of the tensors of that."""

    model: ir.Model
    placement: Placement
    ranges: Mapping[str, Range]
    rules: EightBitRules

    def placed(self, chosen: Collection[int], carries: bool) -> Placement:
        """The products of these numbers alone, in the placement's order."""
        products = [product for i, product in enumerate(self.placement.products) if i in chosen]
        placement = self.placement.only(products, "")
        return carrying(self.model.graph, placement, self.rules) if carries else placement

    def quantized(self, chosen: Collection[int], carries: bool = False) -> onnx.ModelProto:
        """The graph with these products in 8 bits."""
        copy = self.model.clone()
        nodes = dict(zip(self.model.graph, copy.graph, strict=True))
        values = {old: new for a, b in nodes.items() for old, new in zip(a.outputs, b.outputs, strict=True)}
        insert(copy.graph, self.placed(chosen, carries).moved(nodes, values), self.ranges, self.rules)
        return to_proto(copy)

    def twin(self, other: ir.Model) -> Whole | None:
        """The same network with other operators, with the same products in the same order; None if it has
        not all of them.
        """
        found = twin_of(self.placement.products, self.model.graph, other.graph, self.rules)
        if found is None:
            return None
        pairs = list(zip(_tensors(self.placement.products), _tensors(found.products), strict=True))
        ranges = {there: self.ranges[here] for here, there in pairs}
        return Whole(other, Placement(found.products, {}, readers_of(found.products)), ranges, self.rules)


def _tensors(products: Sequence[Product]) -> list[str]:
    """What products read and what they make, by name, some more than once."""
    values = (value for one in products for value in (one.node.inputs[0], one.result) if value is not None)
    return [name_of(value) for value in values]


class Search:
    """Chooses the fastest set of groups whose drop is allowed.

    Groups whose costs say that they gain go to 8 bits together, and are judged as a whole. If they lose too
    much, the error of each is measured with the others in float32, and as many stay, by gain for error, as
    the limits let. What is left is compared with the graph without 8 bits. All that was measured is kept in
    the user's cache as it comes, so that an interrupted search goes on where it was.
    """

    def __init__(self, costs: Costs, max_drop: float | None = None) -> None:
        """`max_drop`: in points; None: no limit but the tolerances that exports are verified by."""
        self.costs, self.max_drop = costs, max_drop
        self.trial, self.rules = costs.trial, costs.rules
        self.note, self.progress = costs.note, costs.progress

    def __call__(
        self,
        model: ir.Model,
        placement: Placement,
        ranges: Mapping[str, Range],
        faster: Callable[[], onnx.ModelProto] | None = None,
    ) -> tuple[Placement, dict[str, Any]]:
        """What of a placement is worth it (nothing, perhaps), and the facts: a row a group, drop, times.

        Args:
            model: in float32, its types and shapes inferred; not changed.
            placement: what may be in 8 bits.
            ranges: of its tensors.
            faster: makes the same network with operators that run faster here; errors are measured on it if
                it has the same products.
        """
        self.ships = Whole(model, placement, ranges, self.rules)
        self.faster = faster
        self._judged_on: Whole | None = None
        self.numbers = {product.node: i for i, product in enumerate(placement.products)}
        ends = sorted((name, *map(float, ranges[name])) for name in placement.readers)
        parts = (_VERSION, graph_digest(model), str(self.rules), ends, list(self.trial.facts))
        self.kept = Kept(cache.key(*parts))
        self.trial.begin(to_proto(model))
        rows = self.costs.rows(model, placement, ranges, self.kept)
        chosen, carries = self._chosen([row for row in rows if row.gains]), False
        facts: dict[str, Any] = {"by": self.costs.by, "max_drop": self.max_drop, "drop": None, "speed": None}
        why = ""
        if not any(row.gains for row in rows):
            why = "no group of products gains time that is more than noise"
        elif not chosen:
            why = "no set of the groups that gain time stays within the limit"
        else:
            chosen, carries, facts["speed"] = self._fastest(chosen, rows)
            facts["drop"] = round(self._judged(chosen, carries).drop, 3)
            if facts["speed"]["ratio"] > PAYS:
                rest = TITLES[self.trial.rest]
                why = f"8 bits take {facts['speed']['ratio']:.2f} of {rest}'s time {self.costs.where}"
                chosen = []
        names = {row.group.name for row in chosen}
        facts["declined"] = why
        facts["groups"] = [row.to_dict(row.group.name in names) for row in rows]
        worth = [row for row in rows if row.gains or row in chosen]
        gaining = [product for row in worth for product in row.group.products]
        products = [product for row in chosen for product in row.group.products]
        slower = f"it gains no time {self.costs.where}"
        found = placement.only(gaining, slower).only(products, INACCURATE if products else why)
        return carrying(model.graph, found, self.rules) if carries else found, facts

    def _chosen(self, rows: list[Row]) -> list[Row]:
        """Of the rows that gain time, those that may be in 8 bits together."""
        if not rows or self._allowed(rows):
            return rows
        self.note("8 bits wherever they gain time lose too much; measuring what each group costs")
        errors = self.kept.table("errors")
        for done, row in enumerate(rows):
            if row.group.name not in errors:
                errors[row.group.name] = round(self.trial.quick(self._examined([row])), 6)
                self.kept.write()
            row.error = errors[row.group.name]
            self.progress(done + 1, len(rows))
        ordered = by_worth(rows)
        return ordered[: longest(len(rows) - 1, lambda count: self._allowed(ordered[:count]))]

    def _allowed(self, rows: Sequence[Row], carries: bool = False) -> bool:
        verdict = self._judged(rows, carries)
        return verdict.error <= 1 and (self.max_drop is None or verdict.drop <= self.max_drop)

    def _judged(self, rows: Sequence[Row], carries: bool = False) -> Verdict:
        verdicts = self.kept.table("verdicts")
        key = " ".join([*sorted(row.group.name for row in rows), *(["and carried"] if carries else [])])
        if key not in verdicts:
            verdict = self.trial.judge(self._examined(rows, carries))
            verdicts[key] = [verdict.drop, verdict.error]
            self.kept.write()
        return Verdict(*verdicts[key])

    def _fastest(self, chosen: list[Row], rows: list[Row]) -> tuple[list[Row], bool, dict[str, Any]]:
        """The set that the graph is fastest with, whether 8 bits are carried on between its products, and how
        fast that is: the chosen one, or one near it that is faster by more than noise.
        """
        sets = list({len(one): one for one in (chosen, *self.costs.near(chosen, rows))}.values())
        options = [(one, False) for one in sets]
        options += [(one, True) for one in sets if self.ships.placed(self._numbers(one), True).carried]
        protos = [self.ships.quantized(self._numbers(one), carries) for one, carries in options]
        found = self.costs.compare(protos)
        others = zip(options[1:], found[1:], strict=True)
        for option, facts in sorted(others, key=lambda pair: pair[1]["ratio"]):
            margin = 1 if option[0] is sets[0] else self.costs.margin  # of the same products
            if facts["ratio"] < margin * found[0]["ratio"] and self._allowed(*option):
                return *option, facts
        return *options[0], found[0]

    def _examined(self, rows: Sequence[Row], carries: bool = False) -> onnx.ModelProto:
        """A graph with these groups in 8 bits, to measure its error."""
        if self._judged_on is None:
            other = None if self.faster is None else self.ships.twin(normalized(self.faster()))
            self._judged_on = other or self.ships
            self.trial.expect(to_proto(self._judged_on.model))
        return self._judged_on.quantized(self._numbers(rows), carries)

    def _numbers(self, rows: Sequence[Row]) -> set[int]:
        """Of the groups' products in the placement."""
        return {self.numbers[product.node] for row in rows for product in row.group.products}
