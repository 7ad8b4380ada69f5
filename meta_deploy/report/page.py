"""A report as one HTML file that needs nothing else. Knows the schema, plots and template."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from meta_deploy import __version__
from meta_deploy.report import plots, side_by_side, words
from meta_deploy.report.schema import Entry, NodeRow, Report

TOP = 300  # nodes that the page lists; --json has all
_TEMPLATE = "page.html.jinja"


def to_html(report: Report) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names come from outside
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        report=report,
        measured=[entry for entry in report.entries if entry.latency],
        profiled=[entry for entry in report.entries if entry.profile],
        built=[entry for entry in report.entries if entry.engine],
        words=words,
        sides=side_by_side,
        broken=broken,
        colours={name: f"var(--series-{i})" for i, name in enumerate(plots.CLASSES)},
        figures=_figures(report),
        roofs={entry.name: plots.roofline(report, entry) for entry in _roofed(report)},
        slowest=slowest,
        basename=os.path.basename,
        base64=lambda data: base64.b64encode(data).decode(),
        top=TOP,
        version=__version__,
    )


def _figures(report: Report) -> list[tuple[str, str]]:
    """The plots of all entries together, with their titles."""
    if not any(entry.latency for entry in report.entries):
        return []
    found = [("Latency", plots.latency(report))]
    if any(entry.peak_memory_mb is not None for entry in report.entries):
        found.append(("Memory", plots.memory(report)))
    if any(entry.profile for entry in report.entries):
        found.append(("Where the model's time goes", plots.classes(report)))
    if (trade := plots.trade(report)) is not None:
        found.append(("Accuracy and latency", trade))
    return found


def _roofed(report: Report) -> list[Entry]:
    return [entry for entry in report.entries if entry.profile and report.roofline]


def slowest(entry: Entry) -> list[NodeRow]:
    """The nodes that take most, the slowest first."""
    assert entry.profile is not None
    return sorted(entry.profile.nodes, key=lambda node: -node.ms)[:TOP]


def broken(name: str) -> Markup:
    """A name that a narrow column may break behind its dots, slashes and underscores."""
    parts = re.sub(r"([./_])(?=\w)", r"\1<wbr>", str(escape(name)))
    return Markup(f"<span>{parts}</span>")
