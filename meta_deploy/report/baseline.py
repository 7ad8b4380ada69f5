"""An earlier report to compare with: read, refused where it is not of the same machine, and what has changed.

Knows the schema; must not know how a number was measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from meta_deploy.errors import InputError
from meta_deploy.report import words
from meta_deploy.report.gates import METRICS
from meta_deploy.report.schema import SCHEMA, Baseline, Change, Entry, Machine, Report, Settings


class _Version(msgspec.Struct):
    schema: int


def read_baseline(path: str | os.PathLike[str]) -> Report:
    """A report that `--out report.json` or `--json` gave.

    Raises:
        InputError: it cannot be read, is no report, or has another schema.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the baseline '{path}': {error.strerror}") from error
    try:
        schema = msgspec.json.decode(content, type=_Version).schema
        if schema != SCHEMA:
            raise InputError(f"the baseline '{path}' has schema {schema} and not {SCHEMA}; measure it again")
        return msgspec.json.decode(content, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"the baseline '{path}' is not a report; give a .json file of meta-report --out"
        ) from error


def check_same(
    path: str | os.PathLike[str],
    before: Report,
    machine: Machine,
    settings: Settings,
    asked: Sequence[Entry],
) -> None:
    """Refuse a baseline whose numbers are not to be compared with those of this run.

    Raises:
        InputError: another machine, other threads or images, or no entry of the same name.
    """
    for what, then, now in _must_agree(before, machine, settings):
        if then != now:
            raise InputError(
                f"the baseline '{path}' is of another {what}: {_shown(then)}, and not {_shown(now)}; "
                "measure it again here"
            )
    names = {entry.name for entry in before.entries if entry.latency or entry.engine}
    if not names & {entry.name for entry in asked}:
        raise InputError(
            f"the baseline '{path}' has none of these entries, but {_shown(sorted(names)) or 'nothing'}; "
            "compare models of the same names"
        )


def _must_agree(before: Report, machine: Machine, settings: Settings) -> Iterator[tuple[str, object, object]]:
    for name in ("cpu", "instruction_sets", "cpus", "gpus"):
        what = {"cpu": "CPU", "instruction_sets": "CPU (instruction sets)", "cpus": "number of CPUs"}
        yield what.get(name, "GPU"), getattr(before.machine, name), getattr(machine, name)
    yield "number of threads", before.settings.threads, settings.threads
    yield "set of images", _names(before.settings.images), _names(settings.images)
    then, now = (_names([s.annotations] if s.annotations else []) for s in (before.settings, settings))
    yield "annotation", then, now


def _names(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(os.path.basename(os.path.normpath(path)) for path in paths)


def _shown(value: object) -> str:
    if not isinstance(value, (tuple, list)):
        return str(value)
    return words.few([*map(str, value)], 3, ", ") or "none"


def compared(
    path: str | os.PathLike[str], before: Report, entries: Sequence[Entry], machine: Machine
) -> Baseline:
    """What has changed of each entry that both have; a metric that one lacks is left out."""
    then = {entry.name: entry for entry in before.entries if entry.latency or entry.engine}
    changes = {}
    for entry in entries:
        if (entry.latency or entry.engine) and entry.name in then:
            pairs = {name: (get(then[entry.name]), get(entry)) for name, get in METRICS.items()}
            changes[entry.name] = {
                name: Change(then=old, now=new)
                for name, (old, new) in pairs.items()
                if old is not None and new is not None
            }
    packages = dict.fromkeys([*before.machine.versions, *machine.versions])
    versions = {name: (before.machine.versions.get(name), machine.versions.get(name)) for name in packages}
    return Baseline(
        path=str(path),
        date=before.date,
        versions={name: pair for name, pair in versions.items() if pair[0] != pair[1]},
        disturbed=bool(before.disturbances),
        changes=changes,
    )
