"""The plots of a page, as SVG that takes its colours from the page, so that light and dark both read.

Knows the schema and matplotlib; must not know the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from meta_deploy.report import words
from meta_deploy.report.schema import CLASSES, Entry, Report

# What matplotlib draws in these comes out as the page's variables.
_INK, _FAINT = "#010101", "#020202"
_SERIES = [f"#03{i:02x}03" for i in range(len(CLASSES))]
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--line)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES)
}
COLOUR_OF = dict(zip(CLASSES, _SERIES, strict=True))
# A dot is eight curves in matplotlib's SVG, from its lowest point; the second ends at the right one. As a
# circle it takes a fifth of that, and a roofline has a thousand.
_CIRCLE = re.compile(
    r'<path d="M ([\d.]+) [\d.]+ \nC [^\nC]*\nC [\d.]+ [\d.]+ [\d.]+ [\d.]+ ([\d.]+) ([\d.]+) \n'
    r'(?:C [^\nC"]*\n){6}z\n"'
)
_WIDTH = 5.0  # inches; a phone shows it about as large as it is drawn
_LONGEST = 24
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "axes.edgecolor": _FAINT,
    "grid.color": _FAINT,
    "svg.fonttype": "none",
    "svg.hashsalt": "meta-report",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.parse_math": False,  # names are names
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def latency(report: Report) -> str:
    """A bar an entry: preprocessing, model and postprocessing, and a line from p5 to p90 of their sum."""
    entries = _measured(report)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _bars(entries)
        left = np.zeros(len(entries))
        for i, part in enumerate(("pre", "model", "post")):
            widths = np.array([getattr(entry.latency, part).median for entry in entries])
            axes.barh(range(len(entries)), widths, 0.6, left, color=_SERIES[i], label=part)
            left += widths
        for row, entry in enumerate(entries):
            total = entry.latency.total  # type: ignore[union-attr]
            axes.plot([total.p5, total.p90], [row, row], color=_INK, linewidth=1.5, marker="|", markersize=7)
        axes.set_xlabel("ms an image; line: p5 to p90")
        _legend(figure, axes)
        return _svg(figure, "Latency of each entry")


def memory(report: Report) -> str:
    """A bar an entry: the peak memory of its process."""
    entries = [entry for entry in _measured(report) if entry.peak_memory_mb is not None]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _bars(entries)
        axes.barh(
            range(len(entries)), [entry.peak_memory_mb or 0 for entry in entries], 0.6, color=_SERIES[1]
        )
        axes.set_xlabel("peak resident memory, MB")
        return _svg(figure, "Peak memory of each entry")


def classes(report: Report) -> str:
    """A bar an entry: the time of a run by class of operators."""
    entries = _profiled(report)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _bars(entries, legend_rows=5)
        left = np.zeros(len(entries))
        for name in CLASSES:
            widths = np.array([_class_ms(entry, name) for entry in entries])
            if widths.any():
                axes.barh(range(len(entries)), widths, 0.6, left, color=COLOUR_OF[name], label=name)
                left += widths
        axes.set_xlabel("ms a run, under the profiler")
        _legend(figure, axes)
        return _svg(figure, "Time by class of operators")


def roofline(report: Report, entry: Entry) -> str:
    """A dot a node: its arithmetic intensity and what it reached, under what this machine does at best."""
    roof = report.roofline
    assert roof is not None
    assert entry.profile is not None
    with matplotlib.rc_context(_STYLE):
        figure = Figure((_WIDTH, 4.2), layout="constrained")
        axes = figure.subplots()
        for name in CLASSES:
            nodes = [
                n for n in entry.profile.nodes if n.op_class == name and n.intensity and n.flops and n.ms
            ]
            if nodes:
                x = [node.intensity or 0 for node in nodes]
                y = [(node.flops or 0) / node.ms / 1e6 for node in nodes]
                area = [6 + 300 * node.ms / entry.profile.ms for node in nodes]
                axes.scatter(x, y, area, color=COLOUR_OF[name], alpha=0.6, linewidths=0, label=name)
        reach = np.array([0.05, roof.peak_gflop_s / roof.bandwidth_gb_s, 1000])
        axes.plot(reach, np.minimum(reach * roof.bandwidth_gb_s, roof.peak_gflop_s), color=_INK, linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.set_xlabel("FLOPs a byte")
        axes.set_ylabel("GFLOP/s")
        axes.grid(linewidth=0.5)
        _legend(figure, axes)
        return _svg(figure, f"Roofline of {entry.name}")


def trade(report: Report) -> str | None:
    """Accuracy by annotations against latency; None where fewer than two entries have both."""
    if report.settings.annotations is None:
        return None
    for key in ("mask_ap", "box_ap", "mean_iou"):
        entries = [e for e in _measured(report) if e.accuracy and getattr(e.accuracy, key) is not None]
        if len(entries) > 1:
            break
    else:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure((_WIDTH, 3.2), layout="constrained")
        axes = figure.subplots()
        for i, entry in enumerate(entries):
            at = entry.latency.total.median, getattr(entry.accuracy, key)  # type: ignore[union-attr]
            axes.scatter(*at, 40, color=_SERIES[i % len(_SERIES)], label=_short(entry.name))
        axes.set_xlim(0, 1.1 * max(entry.latency.total.median for entry in entries))  # type: ignore[union-attr]
        axes.set_xlabel("ms an image")
        axes.set_ylabel(words.ACCURACIES[key])
        axes.grid(linewidth=0.5)
        axes.margins(y=0.3)
        _legend(figure, axes)
        return _svg(figure, "Accuracy and latency")


def _measured(report: Report) -> list[Entry]:
    return [entry for entry in report.entries if entry.latency is not None]


def _profiled(report: Report) -> list[Entry]:
    return [entry for entry in report.entries if entry.profile is not None]


def _class_ms(entry: Entry, name: str) -> float:
    assert entry.profile is not None
    return next((row.ms for row in entry.profile.classes if row.name == name), 0.0)


def _bars(entries: Sequence[Entry], legend_rows: int = 1) -> tuple[Figure, Any]:
    """A figure with a row for each entry, the first on top."""
    figure = Figure((_WIDTH, 1.0 + 0.22 * legend_rows + 0.42 * len(entries)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(entries)), [_short(entry.name) for entry in entries])
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure, axes: Any) -> None:
    """Above the plot, with dots of one size."""
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside upper left", ncols=2, fontsize=10, handlelength=1, scatterpoints=1
    )
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([40])


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _circle(path: re.Match[str]) -> str:
    x, right, y = (float(path[i]) for i in (1, 2, 3))
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{right - x:.2f}"'


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element without a size of its own."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font has not, and the reader's has
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Title": title})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = _CIRCLE.sub(_circle, text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"font: (\d+)px [^;\"]*", r"font: \1px var(--font)", text)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1),
        count=1,
    )
