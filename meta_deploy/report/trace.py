"""The profiles of a report as Chrome trace events, for ui.perfetto.dev and chrome://tracing.

The format is Google's "Trace Event Format": complete ("X") and metadata ("M") events, times in microseconds.
Knows the schema alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from msgspec.structs import asdict

from meta_deploy.report.schema import Entry, NodeRow, Report

_NOT_SHOWN = ("name", "op_class", "ms")  # are an event's name, category and duration


def to_trace(report: Report) -> str:
    """A process for each entry, in which nodes follow each other as they ran, each with its mean time.

    What a run spends between nodes is one event at its end. Entries without a profile are empty processes
    whose name says why.
    """
    events = [event for at, entry in enumerate(report.entries, 1) for event in _events(at, entry)]
    other = {"command": report.command, "date": report.date, "cpu": report.machine.cpu}
    document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}
    return json.dumps(document, indent=None) + "\n"


def _events(at: int, entry: Entry) -> Iterator[dict[str, Any]]:
    why_not = entry.error or entry.not_timed or entry.no_profile
    name = entry.name if why_not is None else f"{entry.name}: {why_not}"
    yield _about(at, "process_name", name=name)
    yield _about(at, "process_sort_index", sort_index=at)
    if entry.profile is None:
        return
    yield _about(at, "thread_name", name=f"a run, by {entry.profile.by}")
    clock = 0.0
    for node in entry.profile.nodes:
        yield _span(at, node.name, node.op_class, clock, 1000 * node.ms, _told(node))
        clock += 1000 * node.ms
    for rest in (row for row in entry.profile.classes if row.name == "between nodes"):
        yield _span(at, rest.name, rest.name, clock, 1000 * rest.ms, {})


def _about(at: int, what: str, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": at, "tid": 1, "name": what, "args": args}


def _span(at: int, name: str, kind: str, begin: float, micros: float, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": at,
        "tid": 1,
        "name": name,
        "cat": kind,
        "ts": round(begin, 3),
        "dur": round(micros, 3),
        "args": args,
    }


def _told(node: NodeRow) -> dict[str, Any]:
    return {
        key: value for key, value in asdict(node).items() if value is not None and key not in _NOT_SHOWN
    } | {"class": node.op_class}
