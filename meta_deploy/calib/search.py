"""Which products of a graph should be in 8 bits: what each group gains in time and costs in error, measured.

Knows groups, times and errors; must not know what runs a graph, nor how its results are judged.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from meta_deploy.calib.calibrate import graph_digest
from meta_deploy.calib.groups import Group, alone, groups_of, shapes_of
from meta_deploy.calib.timing import Run, facts_of, interleaved, is_sure
from meta_deploy.errors import InputError
from meta_deploy.graph.precision.lower import to_proto
from meta_deploy.graph.precision.placement import Placement, Product
from meta_deploy.graph.precision.qdq import insert
from meta_deploy.graph.precision.quantize import Range
from meta_deploy.graph.precision.rules import Int8Rules
from meta_deploy.targets import cache

PAYS = 0.97  # of float32's time; nearer to it than this, nothing is gained that could be told from noise
SLOWER, INACCURATE = "it gains no time on this machine", "its error is not worth its time"
_ROUNDS, _SECONDS = 15, 5.0  # that a group is timed
_CACHE, _VERSION = "search", 2


@dataclass(frozen=True)
class Verdict:
    """What a graph in 8 bits loses against float32.

    Attributes:
        drop: in points, of what the user cares about.
        error: of the figures by which exports are verified, the largest share of its tolerance that one has.
    """

    drop: float
    error: float


class Trial(ABC):
    """Runs graphs, and holds their results against float32's.

    Attributes:
        feed: one run's inputs, to time with.
        facts: what times and verdicts depend on beside the graph: machine, library, inputs.
    """

    feed: Mapping[str, np.ndarray]
    facts: Sequence[str]

    @abstractmethod
    def begin(self, proto: onnx.ModelProto) -> None:
        """Take a graph in float32 as what others are held against."""

    @abstractmethod
    def open(self, proto: onnx.ModelProto) -> Run:
        """A graph as 8 bits run in the target's library; of a whole one, what ships of it."""

    @abstractmethod
    def baseline(self) -> Run:
        """The graph of `begin` as it would ship in float32."""

    @abstractmethod
    def quick(self, proto: onnx.ModelProto) -> float:
        """The error of a graph on few inputs."""

    @abstractmethod
    def judge(self, proto: onnx.ModelProto) -> Verdict:
        """What a whole graph loses."""


@dataclass
class Row:
    """What was measured of a group alone.

    Attributes:
        fp32_ms, int8_ms, gain_ms: medians of the times, and of their difference in each round.
        rounds, faster, slower: how many there were, and in how many of them 8 bits were that.
        error: None where it did not have to be known.
    """

    group: Group
    fp32_ms: float
    int8_ms: float
    gain_ms: float
    rounds: int
    faster: int
    slower: int
    error: float | None = None

    @property
    def gains(self) -> bool:
        """Whether 8 bits are faster, and not by chance."""
        return self.gain_ms > 0 and is_sure(self.faster, self.rounds)

    @property
    def loses(self) -> bool:
        """Whether they are slower, and not by chance."""
        return self.gain_ms < 0 and is_sure(self.slower, self.rounds)

    def to_dict(self, chosen: bool) -> dict[str, Any]:
        times = {key: round(getattr(self, key), 4) for key in ("fp32_ms", "int8_ms", "gain_ms")}
        counts = {"rounds": self.rounds, "faster": self.faster, "slower": self.slower}
        facts = {"group": self.group.name, "products": len(self.group.products), **times, **counts}
        return {**facts, "error": self.error, "int8": chosen}


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


class Search:
    """Chooses the fastest set of groups whose drop is allowed.

    Groups are timed alone with the target's own kernels. Those that gain go to 8 bits together, and are
    judged as a whole. If they lose too much, the error of each is measured with the others in float32, and as
    many stay, by gain for error, as the limits let. What is left is timed against float32. All that was
    measured is kept in the user's cache as it comes, so that an interrupted search goes on where it was.
    """

    def __init__(
        self,
        trial: Trial,
        rules: Int8Rules,
        max_drop: float | None = None,
        note: Callable[[str], None] = lambda line: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """`max_drop`: in points; None: no limit but the tolerances that exports are verified by."""
        self.trial, self.rules, self.max_drop = trial, rules, max_drop
        self.note, self.progress = note, progress

    def __call__(
        self, model: ir.Model, placement: Placement, ranges: Mapping[str, Range]
    ) -> tuple[Placement, dict[str, Any]]:
        """What of a placement is worth it (nothing, perhaps), and the facts: a row a group, drop, times.

        Args:
            model: in float32, its types and shapes inferred; not changed.
            placement: what may be in 8 bits.
            ranges: of its tensors.
        """
        self.model, self.placement, self.ranges = model, placement, ranges
        ends = sorted((name, *map(float, ranges[name])) for name in placement.readers)
        parts = (_VERSION, graph_digest(model), str(self.rules), ends, list(self.trial.facts))
        self.kept = _Kept(cache.key(*parts))
        self.trial.begin(to_proto(model))
        rows = self._timed(groups_of(placement))
        chosen = self._chosen([row for row in rows if row.gains])
        facts: dict[str, Any] = {"max_drop": self.max_drop, "drop": None, "speed": None}
        why = ""
        if not any(row.gains for row in rows):
            why = "no group of products gains time that is more than noise"
        elif not chosen:
            why = "no set of the groups that gain time stays within the limit"
        else:
            chosen, facts["speed"] = self._fastest(chosen, rows)
            facts["drop"] = round(self._judged(chosen).drop, 3)
            if facts["speed"]["ratio"] > PAYS:
                why = f"8 bits take {facts['speed']['ratio']:.2f} of float32's time on this machine"
                chosen = []
        names = {row.group.name for row in chosen}
        facts["declined"] = why
        facts["groups"] = [row.to_dict(row.group.name in names) for row in rows]
        worth = [row for row in rows if row.gains or row in chosen]
        faster = [product for row in worth for product in row.group.products]
        products = [product for row in chosen for product in row.group.products]
        return placement.only(faster, SLOWER).only(products, INACCURATE if products else why), facts

    def _timed(self, groups: Sequence[Group]) -> list[Row]:
        """Groups with their times; of groups that are alike one is timed."""
        shapes = shapes_of(self.model, groups, self.trial.feed)
        times = self.kept.table("times")
        known = f", {len(times)} times at hand from before" if times else ""
        self.note(f"timing {len(groups)} groups of products in float32 and in 8 bits{known}")
        rows = []
        for done, group in enumerate(groups):
            one = alone(group, shapes, self.ranges, self.rules, self.model.opset_imports)
            alike = _structure(one.float32)
            if alike not in times:
                runs = [self.trial.open(proto) for proto in (one.float32, one.int8)]
                times[alike] = _gain(interleaved(runs, one.feed, _ROUNDS, _SECONDS))
                self.kept.write()
            rows.append(Row(group, *times[alike]))
            self.progress(done + 1, len(groups))
        return rows

    def _chosen(self, rows: list[Row]) -> list[Row]:
        """Of the rows that gain time, those that may be in 8 bits together."""
        if not rows or self._allowed(rows):
            return rows
        self.note("8 bits wherever they gain time lose too much; measuring what each group costs")
        errors = self.kept.table("errors")
        for done, row in enumerate(rows):
            if row.group.name not in errors:
                errors[row.group.name] = round(self.trial.quick(self._quantized([row])), 6)
                self.kept.write()
            row.error = errors[row.group.name]
            self.progress(done + 1, len(rows))
        ordered = by_worth(rows)
        return ordered[: longest(len(rows) - 1, lambda count: self._allowed(ordered[:count]))]

    def _allowed(self, rows: Sequence[Row]) -> bool:
        verdict = self._judged(rows)
        return verdict.error <= 1 and (self.max_drop is None or verdict.drop <= self.max_drop)

    def _judged(self, rows: Sequence[Row]) -> Verdict:
        verdicts = self.kept.table("verdicts")
        key = " ".join(sorted(row.group.name for row in rows))
        if key not in verdicts:
            verdict = self.trial.judge(self._quantized(rows))
            verdicts[key] = [verdict.drop, verdict.error]
            self.kept.write()
        return Verdict(*verdicts[key])

    def _fastest(self, chosen: list[Row], rows: list[Row]) -> tuple[list[Row], dict[str, float]]:
        """The set that the graph is fastest with, and its time by float32's.

        Beside the chosen groups it is one with those that seem to lose no time, and one with all there are:
        alone, a group pays for numbers that it would share with its neighbours.
        """
        even = [row for row in rows if row in chosen or not row.loses]
        sets = list({len(one): one for one in (chosen, even, rows)}.values())
        runs = [self.trial.open(self._quantized(one)) for one in sets]
        times = interleaved([*runs, self.trial.baseline()], self.trial.feed)
        found = [facts_of([(turn[i], turn[-1]) for turn in times]) for i in range(len(sets))]
        for one, facts in sorted(zip(sets[1:], found[1:], strict=True), key=lambda pair: pair[1]["ratio"]):
            if facts["ratio"] < PAYS * found[0]["ratio"] and self._allowed(one):
                return one, facts
        return chosen, found[0]

    def _quantized(self, rows: Sequence[Row]) -> onnx.ModelProto:
        """The whole graph with these groups in 8 bits."""
        copy = self.model.clone()
        nodes = dict(zip(self.model.graph, copy.graph, strict=True))
        values = {old: new for a, b in nodes.items() for old, new in zip(a.outputs, b.outputs, strict=True)}
        products: list[Product] = [product for row in rows for product in row.group.products]
        insert(copy.graph, self.placement.only(products, "").moved(nodes, values), self.ranges, self.rules)
        return to_proto(copy)


class _Kept:
    """What was measured, in tables by name; written to the user's cache as it grows."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._tables: dict[str, dict[str, Any]] = {}
        found = cache.read(_CACHE, key)
        if found is not None:
            with contextlib.suppress(ValueError):
                tables = json.loads(found[0])
                self._tables = tables if isinstance(tables, dict) else {}

    def table(self, name: str) -> dict[str, Any]:
        return self._tables.setdefault(name, {})

    def write(self) -> None:
        with contextlib.suppress(InputError):  # it only saves time
            cache.write(_CACHE, self._key, json.dumps(self._tables).encode(), {})


def _gain(times: Sequence[Sequence[float]]) -> list[float]:
    """Of rounds of (float32, 8 bits) in seconds, the figures of a `Row`."""
    full, low = (1000 * float(np.median(one)) for one in zip(*times, strict=True))
    gains = [1000 * (a - b) for a, b in times]
    counts = len(gains), sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return [full, low, float(np.median(gains)), *counts]


def _structure(proto: onnx.ModelProto) -> str:
    """A graph without its names and numbers: what its time depends on."""
    graph = proto.graph
    names: dict[str, str] = {}
    for value in graph.input:
        names[value.name] = str([dim.dim_value for dim in value.type.tensor_type.shape.dim])
    for tensor in graph.initializer:
        names[tensor.name] = f"constant {list(tensor.dims)}"
    lines = []
    for i, node in enumerate(graph.node):
        attributes = sorted(str(attribute) for attribute in node.attribute)
        lines.append(f"{node.op_type} {[names.get(name, '') for name in node.input]} {attributes}")
        names.update({name: f"{i}:{j}" for j, name in enumerate(node.output)})
    return "\n".join([*lines, str([names[value.name] for value in graph.output])])
