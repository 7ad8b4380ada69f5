"""What groups of products and whole graphs cost in 8 bits: what a search asks. Measures nothing."""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from meta_deploy.calib.groups import Group
from meta_deploy.calib.timing import Run, is_sure
from meta_deploy.errors import InputError
from meta_deploy.graph.precision.placement import Placement
from meta_deploy.graph.precision.quantize import Range
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.targets import cache

PAYS = 0.97  # of the time without 8 bits; nearer to it, nothing is gained that is more than noise
_CACHE = "search"


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
        full: the graph of `begin`.
        rest: the precision of what is not in 8 bits.
        feed: one run's inputs, to time with.
        facts: what times and verdicts depend on beside the graph: machine, library, inputs.
    """

    full: onnx.ModelProto
    rest: str
    feed: Mapping[str, np.ndarray]
    facts: Sequence[str]

    @abstractmethod
    def begin(self, proto: onnx.ModelProto) -> None:
        """Take a graph in float32 as what others are timed and priced against."""

    @abstractmethod
    def expect(self, proto: onnx.ModelProto) -> None:
        """Take results of a graph in float32, of the same network, as what others' are held against."""

    @abstractmethod
    def price(self, proto: onnx.ModelProto) -> Mapping[str, Any]:
        """What a graph costs as it would ship, with the rest in its precision, and facts of what was built.

        `ms` are milliseconds, estimated.

        Raises:
            EngineError: it cannot be built.
        """

    @abstractmethod
    def engine(self, proto: onnx.ModelProto) -> tuple[Mapping[str, Any], Run | None]:
        """The price of a whole graph, and what runs it; None: what is built does not run on this machine.

        Raises:
            EngineError: it cannot be built.
        """

    @abstractmethod
    def open(self, proto: onnx.ModelProto) -> Run:
        """A graph as 8 bits run in the target's library; of a whole one, what ships of it."""

    @abstractmethod
    def baseline(self) -> Run:
        """The graph of `begin` as it would ship without 8 bits."""

    @abstractmethod
    def quick(self, proto: onnx.ModelProto) -> float:
        """The error of a graph on few inputs."""

    @abstractmethod
    def judge(self, proto: onnx.ModelProto) -> Verdict:
        """What a whole graph loses."""


@dataclass
class Row:
    """What is known of a group.

    Attributes:
        rest_ms, low_ms, gain_ms: without 8 bits, with them, and the difference; where they were timed,
            medians over the rounds.
        rounds, faster, slower: how many rounds there were, and in how many of them 8 bits were that; 0
            where nothing was timed.
        estimated: whether they gain, where nothing was timed.
        error: None where it did not have to be known.
    """

    group: Group
    rest_ms: float
    low_ms: float
    gain_ms: float
    rounds: int = 0
    faster: int = 0
    slower: int = 0
    estimated: bool = False
    error: float | None = None

    @property
    def gains(self) -> bool:
        """Whether 8 bits are faster, and not by chance."""
        return self.estimated if not self.rounds else self.gain_ms > 0 and is_sure(self.faster, self.rounds)

    @property
    def loses(self) -> bool:
        """Whether they are slower, and not by chance."""
        return not self.gains if not self.rounds else self.gain_ms < 0 and is_sure(self.slower, self.rounds)

    def to_dict(self, chosen: bool) -> dict[str, Any]:
        times = {key: round(getattr(self, key), 4) for key in ("rest_ms", "low_ms", "gain_ms")}
        counts = {"rounds": self.rounds, "faster": self.faster, "slower": self.slower}
        facts = {"group": self.group.name, "products": len(self.group.products), **times, **counts}
        return {**facts, "error": self.error, "chosen": chosen}


class Costs(ABC):
    """Says what 8 bits gain.

    Attributes:
        by: "time" or "estimate".
        where: they gain it, for people.
        margin: the share of a ratio below which another one is less.
    """

    by: ClassVar[str]
    where: str
    margin: float

    def __init__(
        self,
        trial: Trial,
        rules: EightBitRules,
        note: Callable[[str], None] = lambda line: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.trial, self.rules, self.note, self.progress = trial, rules, note, progress

    @abstractmethod
    def rows(
        self, model: ir.Model, placement: Placement, ranges: Mapping[str, Range], kept: Kept
    ) -> list[Row]:
        """All products of a placement, in groups that go to 8 bits together."""

    @abstractmethod
    def near(self, chosen: list[Row], rows: list[Row]) -> list[list[Row]]:
        """Other sets of rows that the graph as a whole may be faster with."""

    @abstractmethod
    def compare(self, protos: Sequence[onnx.ModelProto]) -> list[dict[str, Any]]:
        """Of each whole graph in 8 bits the facts; `ratio` is its time by that of the graph without them."""


class Kept:
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


def structure(proto: onnx.ModelProto) -> str:
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
