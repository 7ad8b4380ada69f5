"""What 8 bits gain by prices of engines that are built; on a machine that runs them, whole ones are timed.

Knows groups and prices; must not know what builds an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeVar

import onnx
import onnx_ir as ir

from meta_deploy.calib.costs import PAYS, Costs, Kept, Row, structure
from meta_deploy.calib.groups import Group, groups_of, part_of, shapes_of
from meta_deploy.calib.surroundings import surroundings
from meta_deploy.calib.timing import facts_of_each, interleaved
from meta_deploy.errors import EngineError
from meta_deploy.graph.precision.placement import Placement
from meta_deploy.graph.precision.quantize import Range

_NO_ENGINE = {"ms": 1e9}  # above all others
_DOUBT = 1 - PAYS

T = TypeVar("T")


class Estimated(Costs):
    """Prices of engines, of which layers, bytes and multiply-adds are known.

    What a group gains depends on its neighbours: a tensor between two products in 8 bits is quantized by the
    kernel of what lies between them, where one of them alone would cost a kernel more. So each group is built
    with its surroundings, and each pair of neighbours too. The price of a set is taken to be the sum of what
    its groups and pairs of them change, and a set that no group and no pair makes cheaper is searched for.
    """

    by, where, margin = "estimate", "by the engines that are built", 1.0

    def rows(
        self, model: ir.Model, placement: Placement, ranges: Mapping[str, Range], kept: Kept
    ) -> list[Row]:
        groups = groups_of(placement)
        places = {node: i for i, node in enumerate(model.graph)}
        around = [surroundings(product.node for product in group.products) for group in groups]
        pairs = [
            (a, b)
            for a, b in combinations(range(len(groups)), 2)
            if any(product.node in around[a] for product in groups[b].products)
        ]
        sets: list[tuple[int, ...]] = [*((i,) for i in range(len(groups))), *pairs]
        parts = [sorted(set().union(*(around[i] for i in one)), key=places.__getitem__) for one in sets]
        shapes = shapes_of(model, parts, self.trial.feed)
        prices = kept.table("prices")
        known = f", {len(prices)} prices at hand from before" if prices else ""
        self.note(f"building {len(groups)} groups of products and {len(pairs)} pairs of neighbours{known}")

        def price(proto: onnx.ModelProto) -> float:
            key = structure(proto)
            if key not in prices:
                prices[key] = (_or_none(self.trial.price, proto) or _NO_ENGINE)["ms"]
                kept.write()
            return float(prices[key])

        full: dict[tuple[int, ...], float] = {}
        changes: dict[tuple[int, ...], float] = {}
        for done, (one, nodes) in enumerate(zip(sets, parts, strict=True)):
            products = [product for i in one for product in groups[i].products]
            part = part_of(nodes, products, shapes, ranges, self.rules, model.opset_imports)
            full[one] = price(part.float32)
            changes[one] = price(part.int8) - full[one] - sum(changes[i,] for i in one if len(one) > 1)
            self.progress(done + 1, len(sets))
        # A gain that is a small share of what surrounds a group is none that could be told from prices.
        doubted = {
            key: change + (_DOUBT * full[key] if len(key) == 1 else 0) for key, change in changes.items()
        }
        return _rows(groups, full, changes, cheapest(len(groups), doubted))

    def near(self, chosen: list[Row], rows: list[Row]) -> list[list[Row]]:
        """Those without what gains least, alike rows together: in the whole, kernels may be cut otherwise."""
        alike: dict[float, list[Row]] = {}
        for row in sorted(chosen, key=lambda row: row.gain_ms):
            alike.setdefault(round(row.gain_ms, 6), []).append(row)
        least = list(alike.values())[:-1]
        return [[row for row in chosen if not any(row in one for one in least[:n])] for n in (1, 2)]

    def compare(self, protos: Sequence[onnx.ModelProto]) -> list[dict[str, Any]]:
        self.note(f"building {len(protos) + 1} whole engines")
        rest, rest_run = self.trial.engine(self.trial.full)
        engines = [_or_none(self.trial.engine, proto) or (_NO_ENGINE, None) for proto in protos]
        found: list[dict[str, Any]] = [
            {"ratio": round(low["ms"] / rest["ms"], 5), "engine": dict(low), "rest_engine": dict(rest)}
            for low, _ in engines
        ]
        if rest_run is not None:
            self.where, self.margin = "on this machine", PAYS
            run_here = [(facts, run) for facts, (_, run) in zip(found, engines, strict=True) if run]
            times = interleaved([*(run for _, run in run_here), rest_run], self.trial.feed)
            for (facts, _), timed in zip(run_here, facts_of_each(times), strict=True):
                facts |= timed
        return found


def _or_none(build: Callable[[onnx.ModelProto], T], proto: onnx.ModelProto) -> T | None:
    """What is built of a graph; None where the library refuses it."""
    try:
        return build(proto)
    except EngineError:
        return None


def cheapest(count: int, changes: Mapping[tuple[int, ...], float]) -> set[int]:
    """A set of the numbers below `count` that no number and no pair, taken in or out, makes cheaper.

    Args:
        changes: of the price, by single numbers and by pairs of which both are taken.
    """
    pairs = [key for key in changes if len(key) == 2]
    near: dict[int, list[tuple[int, ...]]] = {i: [pair for pair in pairs if i in pair] for i in range(count)}
    chosen: set[int] = set()

    def change(flipped: Collection[int]) -> float:
        after = chosen.symmetric_difference(flipped)
        touched = {pair for i in flipped for pair in near[i]}
        single = sum(changes[i,] * (1 if i in after else -1) for i in flipped)
        both = sum(changes[pair] * (after.issuperset(pair) - chosen.issuperset(pair)) for pair in touched)
        return single + both

    moves: list[tuple[int, ...]] = [*((i,) for i in range(count)), *pairs]
    while moves:
        best = min(moves, key=change)
        if change(best) >= -1e-9:
            break
        chosen.symmetric_difference_update(best)
    return chosen


def _rows(
    groups: Sequence[Group],
    full: Mapping[tuple[int, ...], float],
    changes: Mapping[tuple[int, ...], float],
    chosen: Collection[int],
) -> list[Row]:
    """A row a cluster of neighbours that are chosen, and a row each other group."""
    clusters: list[set[int]] = [{i} for i in range(len(groups))]
    for pair in (key for key in changes if len(key) == 2 and set(key) <= set(chosen)):
        touched = [cluster for cluster in clusters if cluster & set(pair)]
        clusters = [cluster for cluster in clusters if cluster not in touched] + [set().union(*touched)]
    rows = []
    for cluster in sorted(clusters, key=min):
        keys = [key for key in changes if cluster.issuperset(key)]
        change = sum(changes[key] for key in keys)
        price = sum(full[i,] for i in cluster)
        products = tuple(product for i in sorted(cluster) for product in groups[i].products)
        rows.append(Row(Group(products), price, price + change, -change, estimated=cluster <= set(chosen)))
    return rows
