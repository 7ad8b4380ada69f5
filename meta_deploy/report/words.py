"""Numbers of a report as people read them, and its verdicts as sentences. Knows the schema alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from meta_deploy.graph.modules import in_order
from meta_deploy.report.schema import (
    CLASSES,
    Accuracy,
    Change,
    Entry,
    Gate,
    LayerRow,
    ModuleRow,
    NodeRow,
    Ratio,
    Report,
)

ACCURACIES = {
    "box_ap": "box AP",
    "mask_ap": "mask AP",
    "mean_iou": "mIoU",
    "pixel_accuracy": "pixels",
    "max_relative_error": "largest error",
    "mean_score_difference": "score difference",
    "max_score_difference": "largest score difference",
    "logit_error": "logit error",
}
_SCORES = ("box_ap", "mask_ap", "mean_iou")
_ERRORS = ("max_relative_error", "mean_score_difference", "max_score_difference", "logit_error")

_LEAST_SHARE = 0.01
_NAMED = 4  # entries in a title
_SPEEDS = {"faster": "fast", "slower": "slow"}


def ms(value: float) -> str:
    """Milliseconds, three figures: 0.123, 12.3, 1,230."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def size(value: float | None) -> str:
    """Bytes: 512 B, 1.2 kB, 34 MB."""
    if value is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def count(value: float | None) -> str:
    """A large number: 512, 1.2 k, 34.5 M, 6.7 G."""
    if value is None:
        return ""
    for unit in ("", " k", " M"):
        if value < 1000:
            return f"{value:.0f}{unit}" if not unit else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f} G"


def ratio(found: Ratio | None) -> str:
    """A ratio with its interval: "0.76 (0.74 to 0.78)"."""
    return "" if found is None else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def gpu_table(entries: Sequence[Entry]) -> list[list[str]]:
    """What runs take on the GPU, with a heading; the heading alone where no entry was timed there."""
    table = [["on the GPU", "computing, ms", "p5", "p90", "copying in", "copying out", "memory, MB"]]
    for entry in entries:
        if (found := entry.gpu) is not None:
            times = (found.compute.median, found.compute.p5, found.compute.p90)
            copies = (found.to_device.median, found.to_host.median)
            table.append([entry.name, *map(ms, (*times, *copies)), f"{found.memory_mb:,.0f}"])
    return table


def throughput(entry: Entry, batch: int) -> str:
    """Images a second at a batch size, or why not: "41.3", "it takes batches of 1"."""
    found = next((one for one in entry.throughput if one.batch == batch), None)
    if found is None:
        return ""
    return found.reason or "" if found.images_per_second is None else ms(found.images_per_second)


def accuracies(found: Accuracy | None) -> list[str]:
    """The figures: "box AP 0.412", "mask AP 0.370"."""
    if found is None:
        return []
    values = {key: getattr(found, key) for key in ACCURACIES}
    return [
        f"{ACCURACIES[key]} {value:.2g}" if key in _ERRORS else f"{ACCURACIES[key]} {value:.3f}"
        for key, value in values.items()
        if value is not None
    ]


def accuracy(found: Accuracy | None) -> str:
    """The figures in one line."""
    return ", ".join(accuracies(found))


def title(report: Report) -> str:
    """What is compared, by the entries' names; of many the first alone."""
    names = [entry.name for entry in report.entries if entry.error is None]
    return ", ".join(names) if len(names) <= _NAMED else f"{names[0]} and {len(names) - 1} others"


def verdicts(report: Report) -> list[str]:
    """What the comparison comes to: a sentence for each entry after the first that ran, and each failure."""
    sentences = []
    base = next((entry for entry in report.entries if entry.latency), None)
    for entry in report.entries:
        if entry.error is not None:
            sentences.append(f"{entry.name} was not measured: {entry.error}.")
        elif entry.not_timed is not None:
            sentences.append(f"{entry.name} was not timed: {entry.not_timed}.")
        elif base is not None and entry is not base:
            sentences.append(_verdict(entry, base))
    return sentences


def gate(found: Gate) -> str:
    """What a condition came to: "FAILED latency_ratio > 1.05: b 1.2", "passed …"."""
    if found.passed:
        return f"passed {found.condition}"
    if not found.failed:
        return f"FAILED {found.condition}: no entry has such a value"
    return f"FAILED {found.condition}: {', '.join(f'{n} {found.values[n]:.4g}' for n in found.failed)}"


BASELINE = {
    "latency_ms": "median ms",
    "latency_p90_ms": "p90 ms",
    "model_ms": "model ms",
    "images_per_second": "images/s",
    "memory_mb": "memory, MB",
    "files_mb": "files, MB",
    "engine_layers": "layers",
    "activations_mb": "activations, MB",
    "weights_mb": "weights, MB",
    **ACCURACIES,
}


def baseline_columns(report: Report) -> dict[str, str]:
    """The metrics of the baseline that an entry has, with their titles."""
    changes = report.baseline.changes.values() if report.baseline else ()
    return {key: title for key, title in BASELINE.items() if any(key in one for one in changes)}


def change(metric: str, found: Change | None) -> str:
    """A metric then and now: "20.1 → 10.2 (0.51)"; the factor only of times and sizes."""
    if found is None:
        return ""
    if metric in ACCURACIES:
        return f"{found.then:.3g} → {found.now:.3g}"
    factor = f" ({found.now / found.then:.3f})" if found.then else ""
    return f"{ms(found.then)} → {ms(found.now)}{factor}"


def since(report: Report) -> str:
    """What the baseline is, and what a reader has to know of it."""
    found = report.baseline
    assert found is not None
    packages = [f"{n} {old or 'none'} → {new or 'none'}" for n, (old, new) in found.versions.items()]
    text = f"Then and now, and now as a multiple of then; then is {found.path} of {found.date}"
    text += f", with other versions: {', '.join(packages)}." if packages else ", with the same versions."
    text += " It was disturbed." if found.disturbed else ""
    return f"{text} Two runs of one model differ by a percent or more, which no interval here tells."


def modules(entries: Sequence[Entry]) -> list[tuple[str, list[ModuleRow | None]]]:
    """PyTorch modules that take at least 1 % of some entry's run, in their order, with each entry's row."""
    rows = [{row.name: row for row in entry.profile.modules} if entry.profile else {} for entry in entries]
    large = {name for found in rows for name, row in found.items() if row.share >= _LEAST_SHARE}
    return [(name, [found.get(name) for found in rows]) for name in sorted(large, key=in_order)]


def few(names: Sequence[str], most: int = 6, joint: str = "; ") -> str:
    """The first of many, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return joint.join(names[:most]) + more


def moved(row: NodeRow | LayerRow) -> int | None:
    """Bytes that a node or a layer reads and writes; None where it does not tell."""
    if row.bytes_read is None or row.bytes_written is None:
        return None
    return row.bytes_read + row.bytes_written


def step(before: float, after: float, shown: Callable[[float], str] = "{:,.0f}".format) -> str:
    """Before and after a pass: "4,401 → 2,932"; once where they are alike."""
    return shown(after) if before == after else f"{shown(before)} → {shown(after)}"


def pass_table(entry: Entry) -> list[list[str]]:
    """Time and bytes before the first pass and after each, then time by class, with a heading."""
    rows = entry.pass_profiles
    names = [name for name in CLASSES if any(one.name == name for row in rows for one in row.classes)]
    table = [["pass", "changes", "ms", "bytes", *names]]
    for row in rows:
        found = {one.name: one for one in row.classes}
        bytes_ = sum(one.bytes_read + one.bytes_written for one in row.classes)
        times = (ms(found[name].ms) if name in found else "" for name in names)
        table.append([row.name or "as exported", f"{row.changes:,}", ms(row.ms), size(bytes_), *times])
    return table


def passes(entry: Entry) -> str:
    """What all passes of a bundle came to."""
    first, last = entry.passes[0], entry.passes[-1]
    exact = all(row.bytes_exact for row in entry.passes)
    return (
        f"nodes {step(first.nodes_before, last.nodes_after)}, transposes and reshapes "
        f"{step(first.moves_before, last.moves_after)}, bytes moved {'' if exact else 'at least '}"
        f"{step(first.bytes_before, last.bytes_after, size)}"
    )


def _verdict(entry: Entry, base: Entry) -> str:
    assert entry.latency is not None
    assert entry.latency.total_ratio is not None
    found = entry.latency.total_ratio
    if found.verdict == "no difference":
        percent = 100 * max(found.high - 1, 1 - found.low)
        text = f"{entry.name} takes as long as {base.name}, to within {percent:.1f} %"
    else:
        factor = max(found.value, 1 / found.value)
        shown = f"{factor:.2f}" if factor < 10 else f"{factor:,.0f}"
        text = f"{entry.name} is {shown} times as {_SPEEDS[found.verdict]} as {base.name}"
    if entry.accuracy is None:
        return f"{text}."
    if entry.accuracy.against == "the first entry":
        return f"{text}; agreement with its results: {accuracy(entry.accuracy)}."
    scores = [
        f"{ACCURACIES[key]} {getattr(entry.accuracy, key):.3f} against {getattr(base.accuracy, key):.3f}"
        for key in _SCORES
        if base.accuracy is not None and None not in (getattr(one.accuracy, key) for one in (entry, base))
    ]
    return f"{text}; {', '.join(scores)}." if scores else f"{text}."
