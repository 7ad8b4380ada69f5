"""The order of a report: open every entry, run them in turns, ask each for the rest, sum up."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.shipped import ASSETS, locate
from meta_deploy.cpus import cpu_count
from meta_deploy.errors import InputError, MetaDeployError
from meta_deploy.export.progress import Progress
from meta_deploy.export.samples import evenly
from meta_deploy.imaging.images import load
from meta_deploy.imaging.sources import expand
from meta_deploy.report import COUNT, RUNS, engines, gates, machine
from meta_deploy.report.baseline import check_same, compared, read_baseline
from meta_deploy.report.disagreement import Disagreements
from meta_deploy.report.judge import Judge, noted
from meta_deploy.report.schema import PARTS, Entry, Latency, Ratio, Report, Roofline, Settings, Throughput
from meta_deploy.report.statistics import LEAST_ROUNDS, compare, drift, spread
from meta_deploy.report.subject import PYTORCH, TENSORRT, about_bundle, kind_of
from meta_deploy.report.worker import Failed, Worker
from meta_deploy.targets import BACKEND_NAMES
from meta_deploy.tasks.annotations import Annotations, open_annotations
from meta_deploy.text import escaped

WARM_UP = 3
NO_GPU = "no GPU here"
_OWN_BACKENDS: Mapping[str, Sequence[str]] = {"checkpoint": (PYTORCH,), "engine": (TENSORRT,)}
_BATCH_SHARE = 4  # of the rounds are taken at each batch size


def report(
    paths: Sequence[str | os.PathLike[str]],
    *,
    images: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    count: int = COUNT,
    backends: Sequence[str] = ("auto",),
    batches: Sequence[int] = (),
    by_pass: bool = False,
    runs: int = RUNS,
    threads: int | None = None,
    baseline: str | os.PathLike[str] | None = None,
    fail_if: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Compare models on this machine.

    Args:
        paths: bundles (shipped ones by name), .onnx files, checkpoints and engines; the first that runs is
            what the others are compared with.
        images: an image or a folder of images; None: the package's own.
        annotations: a COCO JSON file for detectors, or a folder of label images for class maps, of the same
            names as the images; None: results are held against the first entry's.
        count: the most images to look at, spread evenly over those there are.
        backends: each bundle and .onnx file is run on each of these; checkpoints are run by PyTorch. "auto"
            is TensorRT for a bundle that holds its engine, also where there is no GPU to run it.
        batches: batch sizes to measure the throughput at, too.
        by_pass: tell where the time of checkpoints and .onnx files goes after each graph pass, too.
        runs: timed rounds, at least 20; a quarter of them for each batch size.
        threads: CPU threads of each; None: all CPUs that this process may use.
        baseline: a report of this machine as JSON, with entries of the same names.
        fail_if: conditions such as "latency_ratio > 1.05" (`gates.parse`), whose outcome is in `gates`.
        progress: who listens.

    Returns:
        An entry for each path and back end. What could not be measured has the reason as its `error`.

    Raises:
        InputError: nothing to compare, no images, annotations of others, an option out of range, a condition
            that says nothing, or a baseline of another machine. All of it before anything is measured.
    """
    progress = progress or Progress()
    conditions = [gates.parse(text, baseline is not None) for text in fail_if]
    asked = _asked(paths, backends)
    if runs < LEAST_ROUNDS:
        raise InputError(f"{runs} runs are too few for an interval; take at least {LEAST_ROUNDS}")
    if wrong := [size for size in batches if size < 1]:
        raise InputError(f"a batch of {wrong[0]} images cannot be run; take sizes of 1 and more")
    pictures, truth = _pictures(images, annotations, count)
    settings = Settings(
        images=tuple(pictures),
        annotations=None if annotations is None else str(annotations),
        batches=tuple(dict.fromkeys(batches)),
        by_pass=by_pass,
        warm_up=WARM_UP,
        runs=runs,
        threads=threads or cpu_count(),
    )
    about = machine.describe()
    before = None
    if baseline is not None:
        before = read_baseline(baseline)
        check_same(baseline, before, about, settings, asked)
    with contextlib.ExitStack() as stack:
        workers, errors = _opened(asked, settings, stack, progress)
        seen = Disagreements()
        measured = _measured(workers, settings, truth, seen, errors, progress)
    roof = None
    if any(fields.get("profile") for fields in measured.values()):
        with progress.stage("roofline"):
            roof = _under_roof(measured, settings.threads)
    with progress.stage("engines"):
        inside = _engines(asked, errors)
    entries = tuple(
        replace(
            entry,
            **inside.get(entry.name, {})
            | ({} if entry.name in errors else measured.get(entry.name, {}))
            | _failed(entry, errors.get(entry.name), bool(about.gpus), entry.name in inside),
        )
        for entry in asked
    )
    earlier = {entry.name: entry for entry in before.entries} if before else {}
    drifts = {entry.name: entry.latency.drift for entry in entries if entry.latency}
    return Report(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        command=shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        machine=about,
        settings=settings,
        roofline=roof,
        disturbances=machine.disturbances(about, drifts) if drifts else (),
        baseline=None if before is None or baseline is None else compared(baseline, before, entries, about),
        gates=tuple(condition.hold(entries, earlier) for condition in conditions),
        disagreements=seen.drawn(),
        entries=entries,
    )


def _engines(asked: Sequence[Entry], errors: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Fields of `Entry` that an engine has whether it runs here or not, by the entry's name."""
    found: dict[str, dict[str, Any]] = {}
    for entry in asked:
        try:
            if entry.kind == "engine":
                found[entry.name] = {"engine": engines.of_file(entry.path)}
            elif entry.backend == TENSORRT and engines.holds_engine(entry.path):
                bundle = Bundle.open(entry.path)
                found[entry.name] = {**about_bundle(bundle), "engine": engines.of_bundle(bundle)}
        except MetaDeployError as error:
            errors[entry.name] = str(error)
    return found


def _failed(entry: Entry, error: str | None, gpu: bool, inside: bool) -> dict[str, Any]:
    """Why an entry was not measured: without a GPU no engine is, and that is no fault of its own."""
    if inside and not gpu:
        return {"not_timed": NO_GPU}
    if inside and entry.kind == "engine":
        return {"not_timed": "an engine by itself is not run; name its bundle"}
    return {"error": error}


def _pictures(
    images: str | os.PathLike[str] | None, annotations: str | os.PathLike[str] | None, count: int
) -> tuple[list[str], Annotations | None]:
    """The images to run on, and what is true of them; both are read once, to tell now what is wrong.

    Raises:
        InputError: no images, annotations of others, or one that cannot be read.
    """
    pictures, truth = image_files(images), None
    if annotations is not None:
        truth = open_annotations(annotations)
        pictures = truth.known(pictures)
    pictures = evenly(pictures, count)
    for picture in pictures:
        load(picture)
    if truth is not None:
        truth.check(pictures)
    return pictures, truth


def _measured(
    workers: Mapping[str, Worker],
    settings: Settings,
    truth: Annotations | None,
    seen: Disagreements,
    errors: dict[str, str],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Fields of `Entry` by name, of the entries that run; why others do not goes into `errors`."""
    judge = Judge(workers, settings.images, truth, errors, seen.see)
    looked = range(min(settings.runs, len(settings.images)))

    def after(turn: int) -> None:
        if turn in looked:
            judge.look(turn)
        progress.count(turn + settings.warm_up + 1, settings.runs + settings.warm_up)

    with progress.stage("measure"):
        times = interleave(
            workers,
            lambda worker, i: worker.call("timings", i),
            settings.warm_up,
            settings.runs,
            errors,
            after,
        )
    with progress.stage("accuracy"):
        for index in range(len(looked), len(settings.images)):
            judge.look(index)
            progress.count(index + 1, len(settings.images))
    accuracies = judge.accuracies()
    running = {name: workers[name] for name in times if name not in errors}
    facts: dict[str, dict[str, Any]] = {}
    for name, worker in running.items():
        with noted(errors, name):
            facts[name] = worker.call("facts")
    if settings.batches:
        with progress.stage("throughput"):
            rates = throughputs(running, settings, errors, progress.count)
        for name in facts:
            facts[name] |= {"throughput": rates.get(name, ())}
    wanted = ("pass_profiles", "profile") if settings.by_pass else ("profile",)
    for what in wanted:
        with progress.stage(what.replace("_", " ")):
            for done, (name, worker) in enumerate(running.items()):
                if name not in errors:
                    facts[name] |= _told(worker, what)
                progress.count(done + 1, len(running))
    kept = {name: times[name] for name in times if name not in errors}
    for name, latency in latencies(kept, len(settings.images)).items():
        facts[name] |= {"latency": latency, "accuracy": accuracies.get(name)}
    return facts


def _told(worker: Worker, what: str) -> dict[str, Any]:
    """A profile, or why there is none: a model that was measured stays so without."""
    try:
        return {what: worker.call(what)}
    except Failed as error:
        return {f"no_{what}": str(error)}


def _under_roof(measured: Mapping[str, dict[str, Any]], threads: int) -> Roofline:
    """This machine's roofline, under which the profiles get their places."""
    from meta_deploy.report import roofline

    roof = roofline.measure(threads)
    for fields in measured.values():
        if fields.get("profile"):
            fields["profile"] = roofline.under_roof(fields["profile"], roof)
    return roof


def image_files(images: str | os.PathLike[str] | None) -> list[str]:
    """The images to run on. Raises InputError: there is none."""
    sources = expand([str(ASSETS / "images" if images is None else images)])
    if others := [source.path for source in sources if source.video or source.arrays]:
        raise InputError(f"'{others[0]}' is not an image; give --images an image or a folder of images")
    return [str(source.path) for source in sources]


def interleave(
    workers: Mapping[str, Worker],
    run: Callable[[Worker, int], object],
    warm_up: int,
    rounds: int,
    errors: dict[str, str],
    after: Callable[[int], None] = lambda turn: None,
) -> dict[str, np.ndarray]:
    """Times (rounds, 3) of the entries: preprocessing, model and postprocessing, in milliseconds.

    Every round runs each entry once on the same image, starting with another one than the round before, so
    that other work on the machine, and whoever came before, affect all alike. An entry that fails is out,
    with its reason in `errors`. `after` is called with each round's number, below 0 to warm up.
    """
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in workers}
    for turn in range(-warm_up, rounds):
        names = [name for name in workers if name not in errors]
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            with noted(errors, name):
                took = run(workers[name], turn)
                if turn >= 0:
                    times[name].append((took.pre, took.model, took.post))  # type: ignore[attr-defined]
        after(turn)
    return {name: np.array(times[name]) for name in workers if name not in errors}


def throughputs(
    workers: Mapping[str, Worker],
    settings: Settings,
    errors: Mapping[str, str],
    count: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[Throughput, ...]]:
    """Images a second at each batch size, in rounds as `interleave` takes them. A size that a model does not
    take has the reason; entries in `errors` are left out."""
    running = {name: worker for name, worker in workers.items() if name not in errors}
    found: dict[str, tuple[Throughput, ...]] = dict.fromkeys(running, ())
    rounds = settings.runs // _BATCH_SHARE
    for done, size in enumerate(settings.batches):
        reasons: dict[str, str] = {}

        def run(worker: Worker, turn: int, size: int = size) -> object:
            return worker.call("batch", turn, size)

        times = interleave(running, run, 1, rounds, reasons)
        for name in running:
            found[name] += (_throughput(size, times.get(name), reasons.get(name)),)
        count(done + 1, len(settings.batches))
    return found


def _throughput(size: int, times: np.ndarray | None, reason: str | None) -> Throughput:
    if times is None:
        return Throughput(batch=size, reason=reason)
    took = spread(times.sum(axis=1))
    return Throughput(batch=size, images_per_second=1000 * size / took.median, ms=took)


def latencies(times: Mapping[str, np.ndarray], images: int) -> dict[str, Latency]:
    """What the times of `interleave` say, relative to the first entry's; of rounds over so many images."""
    found = {}
    base: dict[str, np.ndarray] | None = None
    for name, rounds in times.items():
        parts = dict(zip(PARTS, [*rounds.T, rounds.sum(axis=1)], strict=True))
        ratios: dict[str, Ratio | None] = {
            f"{part}_ratio": None if base is None else compare(parts[part], base[part])
            for part in ("total", "model")
        }
        spreads = {part: spread(values) for part, values in parts.items()}
        found[name] = Latency(rounds=len(rounds), drift=drift(parts["model"], images), **spreads, **ratios)  # type: ignore[arg-type]
        base = base or parts
    return found


def _asked(paths: Sequence[str | os.PathLike[str]], backends: Sequence[str]) -> list[Entry]:
    if not paths:
        raise InputError("there is nothing to compare; name a bundle, an .onnx file or a checkpoint")
    if unknown := [name for name in backends if name not in BACKEND_NAMES]:
        raise InputError(f"'{unknown[0]}' is not a back end; choose {', '.join(BACKEND_NAMES)}")
    found = []
    for path in (engines.bundle_around(path) or str(path) for path in map(locate, paths)):
        name = escaped(Path(os.path.abspath(path)).name)
        try:
            kind = kind_of(path)
        except InputError as error:
            found.append(Entry(name=name, path=path, backend=backends[0], kind=None, error=str(error)))
            continue
        for backend in _OWN_BACKENDS.get(kind, backends):
            shown = f"{name} ({backend})" if len(backends) > 1 else name
            automatic = backend == "auto" and kind == "bundle" and engines.holds_engine(path)
            runner = TENSORRT if automatic else backend
            found.append(Entry(name=shown, path=path, backend=runner, kind=kind))
    return _told_apart(found)


def _told_apart(asked: Sequence[Entry]) -> list[Entry]:
    """The same with a number after names that others have, too."""
    met: Counter[str] = Counter()
    result = []
    for entry in asked:
        met[entry.name] += 1
        name = entry.name if met[entry.name] == 1 else f"{entry.name} #{met[entry.name]}"
        result.append(replace(entry, name=name))
    return result


def _opened(
    asked: Sequence[Entry], settings: Settings, stack: contextlib.ExitStack, progress: Progress
) -> tuple[dict[str, Worker], dict[str, str]]:
    """The entries' processes, and why others have none."""
    workers: dict[str, Worker] = {}
    errors = {entry.name: entry.error for entry in asked if entry.error is not None}
    with progress.stage("open"):
        for done, entry in enumerate(asked):
            if entry.kind not in (None, "engine"):
                with noted(errors, entry.name):
                    worker = Worker(entry.path, entry.backend, settings.threads, settings.images)
                    workers[entry.name] = stack.enter_context(worker)
            progress.count(done + 1, len(asked))
    return workers, errors
