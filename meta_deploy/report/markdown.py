"""A report as Markdown, for a pull request: verdicts first, then tables. Knows the schema and words alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from meta_deploy.report import side_by_side, words
from meta_deploy.report.schema import CLASSES, Entry, Report

TOP = 10  # nodes that are listed
_DEPTH = 2  # dots in the names of modules that are listed


def to_markdown(report: Report) -> str:
    """The whole report."""
    parts = [
        "# Comparison",
        f"> **Disturbed.** {_plain(' '.join(report.disturbances))}" if report.disturbances else "",
        "\n".join(f"- {_plain(words.gate(gate))}" for gate in report.gates),
        "\n".join(f"- {_plain(sentence)}" for sentence in words.verdicts(report)),
        _comparison(report.entries),
        _note(report),
        _on_gpu(report.entries),
        _throughput(report),
        _since(report),
        *_where(report.entries),
        *_engines(report.entries),
        *(_passes(entry) for entry in report.entries if entry.passes),
        *(_by_pass(entry) for entry in report.entries if entry.pass_profiles),
        *(_slowest(entry) for entry in report.entries if entry.profile),
        _how(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _comparison(entries: Sequence[Entry]) -> str:
    head = ["", "median ms", "p5", "p90", "p99", "pre", "model", "post", "ratio (99 % interval)"]
    rows = [[*head, "memory", "files", "accuracy"]]
    for entry in entries:
        found = entry.latency
        if found is None:
            memory = side_by_side.memory(entry.engine) if entry.engine else ""
            files = words.size(sum(entry.files.values())) if entry.files else ""
            why = entry.error or entry.not_timed or ""
            rows.append([entry.name, why, *[""] * 7, memory, files, ""])
            continue
        total = [found.total.median, found.total.p5, found.total.p90, found.total.p99]
        parts = [found.pre.median, found.model.median, found.post.median]
        memory = "" if entry.peak_memory_mb is None else f"{entry.peak_memory_mb:,.0f} MB"
        rows.append(
            [
                entry.name,
                *map(words.ms, [*total, *parts]),
                words.ratio(found.total_ratio) or "first",
                memory,
                words.size(sum(entry.files.values())),
                words.accuracy(entry.accuracy),
            ]
        )
    return _table(rows)


def _note(report: Report) -> str:
    if not any(entry.latency for entry in report.entries):
        return ""
    settings = report.settings
    images = f"{len(settings.images)} image{'s' if len(settings.images) != 1 else ''}"
    against = {e.accuracy.against for e in report.entries if e.accuracy is not None}
    accuracy = f" Accuracy is against {' and '.join(sorted(against))}." if against else ""
    return (
        f"Milliseconds from a decoded image to its result, {settings.runs} interleaved rounds after "
        f"{settings.warm_up} to warm up, on {images}, {settings.threads} "
        f"thread{'s' if settings.threads != 1 else ''}; memory is the peak of a process of its own.{accuracy}"
    )


def _on_gpu(entries: Sequence[Entry]) -> str:
    table = words.gpu_table(entries)
    return _table(table) if len(table) > 1 else ""


def _throughput(report: Report) -> str:
    """Images a second, a column a batch size."""
    if not report.settings.batches:
        return ""
    rows = [["images a second", *(f"batch {size}" for size in report.settings.batches)]]
    for entry in (entry for entry in report.entries if entry.throughput):
        rows.append([entry.name, *(words.throughput(entry, size) for size in report.settings.batches)])
    return f"## Throughput\n\n{_table(rows)}"


def _since(report: Report) -> str:
    """What has changed since the baseline, a row an entry."""
    if report.baseline is None:
        return ""
    columns = words.baseline_columns(report)
    rows = [["", *columns.values()]]
    for name, changes in report.baseline.changes.items():
        rows.append([name, *(words.change(metric, changes.get(metric)) for metric in columns)])
    return f"## Since the baseline\n\n{_table(rows)}\n\n{_plain(words.since(report))}"


def _where(entries: Sequence[Entry]) -> Iterable[str]:
    """Time by class, a column an entry."""
    profiled = [entry for entry in entries if entry.profile is not None]
    if not profiled:
        return
    yield "## Where the model's time goes"
    rows = [["ms", *(entry.name for entry in profiled)]]
    for name in CLASSES:
        found = [next((c for c in e.profile.classes if c.name == name), None) for e in profiled]  # type: ignore[union-attr]
        if any(found):
            rows.append([name, *(f"{words.ms(c.ms)} ({100 * c.share:.0f} %)" if c else "" for c in found)])
    rows.append(["a run, profiled", *(words.ms(e.profile.ms) for e in profiled)])  # type: ignore[union-attr]
    peaks = [e.profile.live_peak for e in profiled]  # type: ignore[union-attr]
    rows.append(["peak of live activations", *(words.size(peak.bytes) if peak else "" for peak in peaks)])
    yield _table(rows)
    yield from _by_module(profiled)
    for entry in entries:
        if entry.no_profile is not None:
            yield f"{_plain(entry.name)}: {_plain(entry.no_profile)}."


def _by_module(profiled: Sequence[Entry]) -> Iterable[str]:
    """Time by the outer PyTorch modules, a column an entry."""
    rows = [["ms", *(entry.name for entry in profiled)]]
    for name, found in words.modules(profiled):
        if name.count(".") < _DEPTH:
            shown = (f"{words.ms(row.ms)} ({100 * row.share:.0f} %)" if row else "" for row in found)
            rows.append([f"`{name}`" if name else "not known", *shown])
    if len(rows) > 1:
        yield "By PyTorch module, with the modules in it:"
        yield _table(rows)


def _engines(entries: Sequence[Entry]) -> Iterable[str]:
    """What engines consist of, a column an engine; what differs is bold."""
    built = [entry for entry in entries if entry.engine is not None]
    if not built:
        return
    yield "## Engines"
    names = [entry.name for entry in built]
    yield _table([["", *names], *map(_bold, side_by_side.figures(built))])
    for entry in built:
        yield from _not_fused(entry)
        if entry.engine is not None and entry.engine.no_layers is not None:
            yield f"{_plain(entry.name)}: {_plain(entry.engine.no_layers)}."
    if differing := side_by_side.modules(built):
        most = sorted(differing, key=lambda line: -line.distance)[:TOP]
        yield f"Layers by module, of the {len(differing)} modules that differ those that differ most:"
        yield _table([["module", *names], *([f"`{m.title or '(none)'}`", *m.values] for m in most)])


def _bold(line: side_by_side.Line) -> list[str]:
    values = [f"**{value}**" if line.differs and value else value for value in line.values]
    return [line.title, *values]


def _not_fused(entry: Entry) -> Iterable[str]:
    assert entry.engine is not None
    for reason, rows in side_by_side.not_fused(entry.engine):
        where = words.few([f"`{row.node}`" for row in rows], 3, ", ")
        yield f"{_plain(entry.name)}, attention not fused: {_plain(where)}: {_plain(reason)}."


def _slowest(entry: Entry) -> str:
    assert entry.profile is not None
    rows = [["node", "operator", "class", "ms", "bytes", "FLOPs", "bound by", "of roof"]]
    for node in sorted(entry.profile.nodes, key=lambda node: -node.ms)[:TOP]:
        roof = "" if node.share_of_roof is None else f"{100 * node.share_of_roof:.0f} %"
        figures = [words.ms(node.ms), words.size(words.moved(node)), words.count(node.flops)]
        rows.append([f"`{node.name}`", node.op, node.op_class, *figures, node.bound or "", roof])
    return f"### The slowest nodes of {_plain(entry.name)}\n\n{_table(rows)}"


def _passes(entry: Entry) -> str:
    rows = [["pass", "changes", "nodes", "transposes and reshapes", "bytes moved"]]
    for row in entry.passes:
        moves = words.step(row.moves_before, row.moves_after)
        moved = words.step(row.bytes_before, row.bytes_after, words.size)
        rows.append(
            [row.name, f"{row.changes:,}", words.step(row.nodes_before, row.nodes_after), moves, moved]
        )
    return f"### The graph passes of {_plain(entry.name)}\n\n{_plain(words.passes(entry))}\n\n{_table(rows)}"


def _by_pass(entry: Entry) -> str:
    text = "A run on ONNX Runtime in milliseconds, by class."
    return f"### {_plain(entry.name)}, pass by pass\n\n{text}\n\n{_table(words.pass_table(entry))}"


def _how(report: Report) -> str:
    about = report.machine
    sets = f" ({', '.join(about.instruction_sets)})" if about.instruction_sets else ""
    gpus = "".join(f", {gpu}" for gpu in about.gpus)
    lines = [
        f"- {about.cpu}{sets}, {about.cpus} CPUs, {about.memory_gb or '?'} GB{gpus}; {about.system}; "
        f"governor {about.governor or 'unknown'}; load {about.load if about.load is not None else 'unknown'}",
        f"- {', '.join(f'{name} {version}' for name, version in about.versions.items())}",
        *(f"- {_plain(entry.name)}: {_plain(entry.runs_on)}" for entry in report.entries if entry.runs_on),
        f"- {report.date}: `{report.command}`",
    ]
    if report.roofline is not None:
        roof = report.roofline
        lines.insert(1, f"- measured: {roof.bandwidth_gb_s:.1f} GB/s, {roof.peak_gflop_s:.1f} GFLOP/s")
    return "## How it was measured\n\n" + "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[_plain(cell) for cell in row] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else, in one line."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
