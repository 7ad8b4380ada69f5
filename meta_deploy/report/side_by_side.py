"""Engines side by side: what is counted of each, and where they differ. Knows the schema and words alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from meta_deploy.graph.modules import in_order, innermost
from meta_deploy.report import words
from meta_deploy.report.schema import CLASSES, AttentionRow, EngineRow, Entry, LayerRow

SEVERAL = "(several modules)"


class Line(NamedTuple):
    """A row of a table: a value for each engine, empty where it is not known; whether known ones differ."""

    title: str
    values: list[str]
    differs: bool

    @property
    def distance(self) -> int:
        """How far apart the least and the largest are, of values that are counts."""
        counts = [int(value) for value in self.values if value]
        return max(counts) - min(counts)


def _line(title: str, values: Sequence[str]) -> Line:
    return Line(title, list(values), len(set(filter(None, values))) > 1)


def of_engines(entries: Sequence[Entry]) -> list[EngineRow]:
    """The engines of entries that have one."""
    return [entry.engine for entry in entries if entry.engine is not None]


def figures(entries: Sequence[Entry]) -> list[Line]:
    """What each engine was built with, consists of and holds in memory; then layers by class and by kind."""
    engines = of_engines(entries)
    found = [_line(title, [show(engine) for engine in engines]) for title, show in _FIGURES.items()]
    found.insert(1, _line("precision", [entry.precision or "" for entry in entries if entry.engine]))
    if any(engine.layers for engine in engines):
        found.append(_line("bytes read and written", [words.size(_moved(one.layers)) for one in engines]))
    for name in CLASSES:
        counts = [sum(layer.op_class == name for layer in engine.layers) for engine in engines]
        if any(counts):
            known = zip(counts, engines, strict=True)
            found.append(_line(f"layers: {name}", [str(n) if one.layers else "" for n, one in known]))
    kinds = sorted({(kind, type_) for one in engines for kind, types in one.kinds.items() for type_ in types})
    for kind, type_ in kinds:
        values = [str(one.kinds.get(kind, {}).get(type_, 0)) if one.kinds else "" for one in engines]
        found.append(_line(f"{kind} {type_}".rstrip(), values))
    return [line for line in found if any(line.values)]


def modules(entries: Sequence[Entry]) -> list[Line]:
    """Layers by PyTorch module, of modules that have more or fewer in one engine than in another.

    A layer that computes nodes of several modules counts for the innermost that holds them all.
    """
    counts = [Counter(map(module, engine.layers)) for engine in of_engines(entries)]
    names = sorted(set().union(*counts), key=in_order)
    lines = [_line(name, [str(count[name]) if count else "" for count in counts]) for name in names]
    return [line for line in lines if line.differs]


def module(layer: LayerRow) -> str:
    """The innermost module that holds all nodes of a layer; empty where none is known of."""
    return innermost(layer.modules) or (SEVERAL if layer.modules else "")


def not_fused(engine: EngineRow) -> list[tuple[str, list[AttentionRow]]]:
    """The attentions that are not in one kernel, by the reason; the most frequent first."""
    reasons: dict[str, list[AttentionRow]] = {}
    for row in engine.attentions:
        if row.reason is not None:
            reasons.setdefault(row.reason, []).append(row)
    return sorted(reasons.items(), key=lambda item: -len(item[1]))


def summary(engine: EngineRow) -> str:
    """An engine in one line."""
    parts = []
    if engine.layer_count is not None:
        parts.append(f"{engine.layer_count:,} layers")
    if engine.attention_count and engine.fused_attentions is not None:
        parts.append(f"{engine.fused_attentions} of {engine.attention_count} attentions fused")
    for title in ("activations", "weights", "file"):
        if shown := _FIGURES[f"{title}, MB"](engine):
            parts.append(f"{shown} MB {title}")
    return ", ".join(parts) or engine.no_layers or ""


def memory(engine: EngineRow) -> str:
    """Activations and weights on the GPU, by the build; empty where it does not tell."""
    if engine.activation_mb is None or engine.weights_mb is None:
        return ""
    return f"{engine.activation_mb + engine.weights_mb:,.0f} MB on a GPU"


def _moved(layers: Sequence[LayerRow]) -> int | None:
    sizes = [words.moved(layer) for layer in layers]
    return None if None in sizes else sum(filter(None, sizes)) or None


def _gpus(engine: EngineRow) -> str:
    if engine.version is None:
        return ""
    return engine.gpu or ", ".join(engine.compute_capabilities) or "all it knows"


def _fused(engine: EngineRow) -> str:
    if engine.fused_attentions is None:
        return ""
    of = "" if engine.attention_count is None else f" of {engine.attention_count}"
    return f"{engine.fused_attentions}{of}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


_FIGURES: dict[str, Callable[[EngineRow], str]] = {
    "library": lambda one: " ".join(filter(None, (one.library, one.version))),
    "GPUs": _gpus,
    "layers": lambda one: _number(one.layer_count),
    "generated kernels": lambda one: _number(one.generated_kernels),
    "reformats": lambda one: _number(one.reformats),
    "attentions fused": _fused,
    "activations, MB": lambda one: _number(one.activation_mb),
    "weights, MB": lambda one: _number(one.weights_mb),
    "file, MB": lambda one: _number(one.plan_mb),
    "build, s": lambda one: _number(one.seconds),
}
