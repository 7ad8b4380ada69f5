"""Conditions under which a report fails, such as "latency_ratio > 1.05", and the metrics that they name.

Knows the schema; must not know how a number was measured.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from meta_deploy.errors import InputError
from meta_deploy.report.schema import EngineRow, Entry, Gate, Latency, Ratio


def _of_latency(get: Callable[[Latency], float | None]) -> Callable[[Entry], float | None]:
    return lambda entry: None if entry.latency is None else get(entry.latency)


def _of_ratio(
    get: Callable[[Latency], Ratio | None], field: str = "value"
) -> Callable[[Entry], float | None]:
    return _of_latency(lambda found: getattr(get(found), field, None))


def _of_engine(get: Callable[[EngineRow], float | None]) -> Callable[[Entry], float | None]:
    def value(entry: Entry) -> float | None:
        found = None if entry.engine is None else get(entry.engine)
        return None if found is None else float(found)

    return value


def _not_fused(found: EngineRow) -> float | None:
    if found.attention_count is None or found.fused_attentions is None:
        return None
    return found.attention_count - found.fused_attentions


def _of_accuracy(field: str) -> Callable[[Entry], float | None]:
    return lambda entry: getattr(entry.accuracy, field, None)


# What each means is in docs/report.md.
METRICS: Mapping[str, Callable[[Entry], float | None]] = {
    "latency_ms": _of_latency(lambda found: found.total.median),
    "latency_p90_ms": _of_latency(lambda found: found.total.p90),
    "latency_p99_ms": _of_latency(lambda found: found.total.p99),
    "model_ms": _of_latency(lambda found: found.model.median),
    "latency_ratio": _of_ratio(lambda found: found.total_ratio),
    "latency_ratio_low": _of_ratio(lambda found: found.total_ratio, "low"),
    "latency_ratio_high": _of_ratio(lambda found: found.total_ratio, "high"),
    "model_ratio": _of_ratio(lambda found: found.model_ratio),
    "images_per_second": lambda entry: max(
        (one.images_per_second for one in entry.throughput if one.images_per_second), default=None
    ),
    "gpu_ms": lambda entry: None if entry.gpu is None else entry.gpu.compute.median,
    "gpu_memory_mb": lambda entry: None if entry.gpu is None else entry.gpu.memory_mb,
    "memory_mb": lambda entry: entry.peak_memory_mb,
    "files_mb": lambda entry: sum(entry.files.values()) / 1e6 if entry.files else None,
    "engine_layers": _of_engine(lambda found: found.layer_count),
    "engine_reformats": _of_engine(lambda found: found.reformats),
    "attentions_not_fused": _of_engine(_not_fused),
    "activations_mb": _of_engine(lambda found: found.activation_mb),
    "weights_mb": _of_engine(lambda found: found.weights_mb),
    **{
        name: _of_accuracy(name)
        for name in (
            *("box_ap", "box_ap50", "mask_ap", "mask_ap50"),
            *("mean_iou", "pixel_accuracy", "max_relative_error"),
            *("mean_score_difference", "max_score_difference", "logit_error"),
        )
    },
}
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_COMBINE: Mapping[str, Callable[[float, float], float]] = {
    "/": lambda now, then: now / then if then else math.inf if now else 1.0,
    "-": operator.sub,
}
_FORM = re.compile(
    r"\s*(?P<metric>[A-Za-z_]\w*)\s*(?:(?P<combine>[/-])\s*baseline\s*)?(?P<compare>[<>]=?)\s*"
    r"(?P<limit>[+-]?(?:[0-9]+[.]?[0-9]*|[.][0-9]+)(?:[eE][+-]?[0-9]{1,3})?)\s*",
    re.ASCII,
)


@dataclass(frozen=True)
class Condition:
    """What no entry may fulfil.

    Attributes:
        text: as it was given.
        metric: a key of `METRICS`.
        combine: "/" or "-", what the baseline's value is taken by; None: the value itself counts.
        compare: a key of `_COMPARE`; limit: what it is compared with.
    """

    text: str
    metric: str
    combine: str | None
    compare: str
    limit: float

    def value(self, entry: Entry, before: Entry | None) -> float | None:
        """What counts of an entry; `before` is the baseline's. None where there is no such value."""
        now = METRICS[self.metric](entry)
        if self.combine is None or now is None:
            return now
        then = None if before is None else METRICS[self.metric](before)
        return None if then is None else _COMBINE[self.combine](now, then)

    def hold(self, entries: Sequence[Entry], before: Mapping[str, Entry]) -> Gate:
        """The entries' values, and which of them fulfil the condition. NaN does: it is no good number."""
        found = {entry.name: self.value(entry, before.get(entry.name)) for entry in entries}
        values = {name: value for name, value in found.items() if value is not None}
        met = [n for n, value in values.items() if math.isnan(value) or self._met(value)]
        return Gate(condition=self.text, values=values, failed=tuple(met), passed=bool(values) and not met)

    def _met(self, value: float) -> bool:
        return _COMPARE[self.compare](value, self.limit)


def parse(text: str, baseline: bool = False) -> Condition:
    """Read a condition: METRIC [/ baseline | - baseline] COMPARISON NUMBER.

    Args:
        text: such as "latency_ratio > 1.05" or "latency_ms / baseline > 1.1".
        baseline: whether there is one.

    Raises:
        InputError: it has another form, names an unknown metric, or a baseline that there is not.
    """
    shown = " ".join(text.split())
    found = _FORM.fullmatch(text)
    if found is None:
        raise InputError(
            f"'{shown}' is no condition; write a metric, one of {' '.join(_COMPARE)} and a number, such as "
            "'latency_ratio > 1.05' or 'latency_ms / baseline > 1.1'"
        )
    metric, combine, compare, limit = found.group("metric", "combine", "compare", "limit")
    if metric not in METRICS:
        near = difflib.get_close_matches(metric, METRICS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(METRICS)}"
        raise InputError(f"'{metric}' in '{shown}' is not a metric; {hint}")
    if combine is not None and not baseline:
        raise InputError(f"'{shown}' refers to a baseline, and there is none; give --baseline report.json")
    return Condition(shown, metric, combine, compare, float(limit))
