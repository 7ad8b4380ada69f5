"""Numbers of a report as people read them, and its verdicts as sentences. Knows the schema alone."""

from __future__ import annotations

from meta_deploy.report.schema import Accuracy, Entry, Ratio, Report

ACCURACIES = {
    "box_ap": "box AP",
    "mask_ap": "mask AP",
    "mean_iou": "mIoU",
    "pixel_accuracy": "pixels",
    "max_relative_error": "largest error",
}

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


def accuracies(found: Accuracy | None) -> list[str]:
    """The figures: "box AP 0.412", "mask AP 0.370"."""
    if found is None:
        return []
    values = {title: getattr(found, key) for key, title in ACCURACIES.items()}
    return [
        f"{title} {value:.2g}" if title == "largest error" else f"{title} {value:.3f}"
        for title, value in values.items()
        if value is not None
    ]


def accuracy(found: Accuracy | None) -> str:
    """The figures in one line."""
    return ", ".join(accuracies(found))


def verdicts(report: Report) -> list[str]:
    """What the comparison comes to: a sentence for each entry after the first that ran, and each failure."""
    sentences = []
    base = next((entry for entry in report.entries if entry.latency), None)
    for entry in report.entries:
        if entry.error is not None:
            sentences.append(f"{entry.name} was not measured: {entry.error}.")
        elif base is not None and entry is not base:
            sentences.append(_verdict(entry, base))
    return sentences


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
    told = accuracy(entry.accuracy)
    if entry.accuracy is not None and entry.accuracy.against == "the first entry":
        text += f"; agreement with its results: {told}"
    return f"{text}."
