"""Calibration as a whole: statistics on samples, a range a tensor, kept for the next time.

Knows graphs and samples; must not know where samples come from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import onnx
import onnx_ir as ir

from meta_deploy.calib import METHOD_NAMES
from meta_deploy.calib.choice import best, errors_of, ranges_of
from meta_deploy.calib.methods import METHODS
from meta_deploy.calib.statistics import collect
from meta_deploy.calib.twin import twin_of
from meta_deploy.errors import InputError
from meta_deploy.graph.graph import normalized
from meta_deploy.graph.precision.placement import Placement
from meta_deploy.graph.precision.quantize import Range
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.targets import cache

AUTO = "auto"
FEW = 32  # below so many samples, what was not seen may well come
_CACHE, _VERSION = "calibration", 3


class Samples(Protocol):
    """Inputs by name, one dictionary a run; may be iterated several times."""

    noun: str

    def __len__(self) -> int: ...
    def __iter__(self) -> Any: ...
    def done(self, runs: int) -> int: ...
    def runs(self) -> int: ...
    def digests(self) -> list[str]: ...
    def settings(self) -> str: ...


@dataclass(frozen=True)
class Tensor:
    """What was found for one tensor: its range and error by each method."""

    ranges: dict[str, Range]
    errors: dict[str, float]

    def method(self, asked: str) -> str:
        return best(self.errors) if asked == AUTO else asked


class Calibrator:
    """Finds the range of each tensor that is to be quantized."""

    def __init__(
        self,
        samples: Samples,
        rules: EightBitRules,
        method: str = AUTO,
        note: Callable[[str], None] = lambda line: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        kept: bool = True,
    ) -> None:
        """`method` is one of `METHOD_NAMES`; `kept`: results are taken from and put into the user's cache.

        Raises:
            InputError: there are no samples, or no such method.
        """
        if method not in METHOD_NAMES:
            raise InputError(f"'{method}' is not a calibration method; choose {', '.join(METHOD_NAMES)}")
        if not len(samples):
            raise InputError("there is nothing to calibrate on; give --calib-images a folder of images")
        self.samples, self.rules, self.method = samples, rules, method
        self.note, self.progress, self.kept = note, progress, kept

    def __call__(
        self, model: ir.Model, placement: Placement, faster: Callable[[], onnx.ModelProto] | None = None
    ) -> tuple[dict[str, Range], dict[str, Any]]:
        """Each tensor's range, and how they were found: samples, their noun, the method, tensors by method.

        Args:
            model: in float32, its types and shapes inferred; not changed.
            placement: what is to be quantized in it.
            faster: makes the same network with operators that run faster here; it is run in the model's
                place if it has the same products.

        Raises:
            InputError: a sample cannot be read, or a tensor is not finite on it; no two samples differ.
        """
        count, noun = len(self.samples), self.samples.noun
        digests = self.samples.digests()
        if len(set(digests)) == 1:
            what = f"there is one of the {noun}" if count == 1 else f"all {count} {noun} are the same"
            raise InputError(
                f"{what}, from which nothing is learnt of others; give --calib-images {FEW} or more"
            )
        if count < FEW:
            self.note(f"warning: calibrated on {count} {noun}, fewer than {FEW}; give more by --calib-images")
        of = digests, self.samples.settings()
        key = cache.key(_VERSION, graph_digest(model), of, sorted(placement.readers), str(self.rules))
        tensors = self._read(key, placement.readers)
        if tensors is not None:
            self.note("the calibration of this graph on these inputs is at hand from before")
        else:
            tensors = self._measured(model, placement, faster)
            self._write(key, tensors)
        chosen = {name: tensor.method(self.method) for name, tensor in tensors.items()}
        facts = {
            "samples": count,
            "noun": noun,
            "method": self.method,
            "methods": {name: n for name in METHODS if (n := list(chosen.values()).count(name))},
        }
        return {name: tensor.ranges[chosen[name]] for name, tensor in tensors.items()}, facts

    def _measured(
        self, model: ir.Model, placement: Placement, faster: Callable[[], onnx.ModelProto] | None
    ) -> dict[str, Tensor]:
        names, readers = {name: name for name in placement.readers}, placement.readers
        if faster is not None:
            other = normalized(faster())
            twin = twin_of(placement.products, model.graph, other.graph, self.rules)
            if twin is not None:
                model, names, readers = other, twin.names, twin.readers
        found = collect(
            model,
            readers,
            self.samples,
            self.samples.runs(),
            lambda done: self.progress(self.samples.done(done), len(self.samples)),
        )
        measured = {}
        for name, products in readers.items():
            ranges = ranges_of(found[name], self.rules)
            measured[name] = Tensor(ranges, errors_of(found.pop(name), ranges, products, self.rules))
        return {name: measured[other] for name, other in names.items()}

    def _read(self, key: str, names: Collection[str]) -> dict[str, Tensor] | None:
        found = cache.read(_CACHE, key) if self.kept else None
        if found is None:
            return None
        try:
            tensors = {
                name: Tensor({k: (float(v[0]), float(v[1])) for k, v in ranges.items()}, errors)
                for name, (ranges, errors) in json.loads(found[0]).items()
            }
        except (ValueError, TypeError, AttributeError, IndexError):
            return None
        return tensors if tensors.keys() == set(names) else None

    def _write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        if self.kept:
            data = json.dumps({name: (one.ranges, one.errors) for name, one in tensors.items()}).encode()
            with contextlib.suppress(InputError):  # it only saves time
                cache.write(_CACHE, key, data, {"tensors": len(tensors)})


def graph_digest(model: ir.Model) -> str:
    """The sha256 of a graph, its weights included."""
    return hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True)).hexdigest()
