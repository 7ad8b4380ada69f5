"""Which pipeline of passes ships: what is in doubt is measured against the target's own pipeline.

Graphs are timed in turns, in the library that runs the bundle; of engines that do not run on this machine,
what their builds tell is compared. Knows targets, runs and clocks; must not know what a pass does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import onnx

from meta_deploy.bundle.manifest import TriedPipeline, Tuning
from meta_deploy.calib.costs import PAYS
from meta_deploy.calib.timing import Feed, Run, interleaved, is_sure
from meta_deploy.errors import MetaDeployError
from meta_deploy.export.plan import Plan
from meta_deploy.export.progress import Progress
from meta_deploy.export.samples import Samples
from meta_deploy.export.sources.source import Source
from meta_deploy.export.speed import opened
from meta_deploy.export.trace import drop_outputs
from meta_deploy.graph.modules import inherit_modules
from meta_deploy.graph.pipeline import PassResult, run_passes
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.targets.target import Built, Target

SECONDS, SHARE = 10.0, 0.5  # that measuring may take; or this share of the export so far, where that is more
ROUNDS, FEWEST = 15, 3
CLEANS = "clean-up"
ALONE = f"{CLEANS} alone"

Candidates = Iterator[tuple[str, onnx.ModelProto]]  # names and graphs; the target's own pipeline is the first
Figures = Mapping[str, Any]


def tune(
    source: Source,
    plan: Plan,
    rows: Sequence[PassResult],
    full: onnx.ModelProto,
    cleaned: onnx.ModelProto,
    samples: Samples,
    build: Callable[[onnx.ModelProto], Built],
    progress: Progress,
) -> tuple[list[str], Tuning] | None:
    """Measure pipelines for a source, in the precision that is to ship; for 8 bits, in that of the rest.

    Args:
        rows: what the target's pipeline did.
        full, cleaned: the graph after it, and after the clean-up alone.
        samples: what is timed on, the first of them.
        build: makes what ships of a graph.

    Returns:
        The passes to run and what was measured; None where there was nothing to choose, or no time.
    """
    found = pipelines(rows, plan.target.doubtful)
    feed = next(iter(samples), None)
    if len(found) < 2 or (feed is None and not plan.target.estimates):
        return None

    def run_of(graph: onnx.ModelProto) -> Run | None:
        if not plan.target.estimates:
            return opened(plan.target, graph, source.profiles, plan.rest)
        return plan.target.runner(build(graph), source.profiles, plan.rest)

    graphs = (
        (name, drop_outputs(graph, source.outputs))
        for name, graph in candidates(found, full, cleaned, plan.target, plan.rest)
    )
    seconds = budget(progress.seconds)
    first = next(graphs)
    every = chain([first], graphs)
    if feed is None or (plan.target.estimates and run_of(first[1]) is None):
        tuning = by_build(every, lambda graph: plan.target.figures(build(graph).engine), seconds)
    else:
        tuning = by_time(every, run_of, feed, seconds)
    if tuning is None:
        progress.note(f"no pipeline was tried but the target's own: {seconds:.0f} s are too few for another")
        return None
    progress.note(told(tuning))
    return found[tuning.chosen], tuning


def budget(stages: Mapping[str, float]) -> float:
    """The seconds that measuring may take, from those of the stages so far."""
    return max(SECONDS, SHARE * sum(stages.values()))


def pipelines(rows: Sequence[PassResult], doubtful: Sequence[str]) -> dict[str, list[str]]:
    """What might ship, by name: all passes, the clean-up alone, and all but one of those in doubt.

    A pass that changed nothing makes no difference, and is not left out.
    """
    names = [row.name for row in rows]
    changed = {row.name for row in rows if row.changes} - {CLEANS}
    found = {"all passes": names}
    if changed:
        found[ALONE] = [name for name in names if name == CLEANS]
    for doubt in doubtful:
        if doubt in changed and len(changed) > 1:
            found[f"without {doubt}"] = [name for name in names if name != doubt]
    return found


def candidates(
    found: Mapping[str, Sequence[str]],
    full: onnx.ModelProto,
    cleaned: onnx.ModelProto,
    target: Target,
    precision: str,
) -> Candidates:
    """The graph of each pipeline, in a precision, one after another.

    Args:
        found: passes by name; the first are those that `full` has been through.
        full, cleaned: the graph after them, and after the clean-up alone.
    """
    low, float32_operators = PRECISIONS[precision], target.float32_operators.get(precision, ())
    for i, (name, passes) in enumerate(found.items()):
        left = [each for each in passes if each != CLEANS]
        graph = full if i == 0 else cleaned
        if i and left:
            graph = run_passes(cleaned, left, target.prices)[0]
        if precision not in ("fp32", *target.lowered_by_build):
            lowered, _ = low.convert(graph, (), float32_operators)
            inherit_modules(graph.graph, lowered.graph)
            graph = lowered
        yield name, graph


def by_time(
    candidates: Candidates, opened: Callable[[onnx.ModelProto], Run | None], feed: Feed, seconds: float
) -> Tuning | None:
    """Time graphs in turns, as many as `seconds` leave three rounds for; None where that is only one.

    (Opening the first is not counted, but tells whether there is time for another. What cannot be opened is
    left out.)
    The first ships unless another is surely faster; of others that are, one with more nodes has to be surely
    faster than those with fewer.
    """
    tried: list[TriedPipeline] = []
    runs: list[Run] = []
    end, began, longest, a_round = math.inf, time.perf_counter(), 0.0, 0.0
    for name, graph in candidates:
        try:
            run = opened(graph)
            first = _seconds(run, feed) if run else math.inf
        except MetaDeployError:
            run = None
        if run is None:
            if not tried:
                return None  # the comparison with the original will tell
            continue
        now = time.perf_counter()
        if now + FEWEST * (a_round + first) > end:
            break
        if not tried:
            end = now + seconds
        tried.append(TriedPipeline(name=name, nodes=len(graph.graph.node)))
        runs.append(run)
        longest, a_round, began = max(longest, now - began), a_round + first, now
        if now + longest + FEWEST * (a_round + first) > end:  # the next one takes as long to make and to run
            break
    if len(tried) < 2:
        return None
    left = end - time.perf_counter() - a_round  # a round of it warms up
    times = np.array(interleaved(runs, feed, ROUNDS, left, FEWEST))
    medians, ratios = 1000 * np.median(times, axis=0), np.median(times / times[:, :1], axis=0)
    best = 0
    for i in sorted(range(1, len(tried)), key=lambda i: tried[i].nodes):
        if faster(times[:, i], times[:, best]):
            best = i
    timed = [
        msgspec.structs.replace(each, ms=round(float(median), 3), ratio=round(float(ratio), 3))
        for each, median, ratio in zip(tried, medians, ratios, strict=True)
    ]
    return Tuning(chosen=timed[best].name, rounds=len(times), tried=tuple(timed))


def faster(times: np.ndarray, others: np.ndarray) -> bool:
    """Whether seconds are less than others of the same rounds, by more than noise and by what pays.

    With fewer than five rounds the sign test is never sure: then every round has to show it.
    """
    ratios = times / others
    sure = is_sure(int((ratios < 1).sum()), len(ratios)) or (ratios <= PAYS).all()
    return bool(sure and np.median(ratios) <= PAYS)


def by_build(
    candidates: Candidates, built: Callable[[onnx.ModelProto], Figures], seconds: float
) -> Tuning | None:
    """Build engines, as many as `seconds` allow, and compare what the builds tell; None without two.

    The first ships unless another weighs less, or it has more layers than the clean-up alone leaves. (Its own
    build, which has to be made anyway, is not counted.)
    """
    tried: list[TriedPipeline] = []
    end, began = 0.0, time.perf_counter()
    for name, graph in candidates:
        try:
            figures = built(graph)
        except MetaDeployError:
            figures = {}
        if not figures and not tried:
            return None
        if figures:
            tried.append(TriedPipeline(name=name, nodes=len(graph.graph.node), **figures))
        now = time.perf_counter()
        if len(tried) == 1 and not end:
            end = now + seconds
        if 2 * now - began > end:  # the next one takes as long
            break
        began = now
    if len(tried) < 2:
        return None
    return Tuning(chosen=lightest(tried).name, tried=tuple(tried))


def lightest(tried: Sequence[TriedPipeline]) -> TriedPipeline:
    """The engine that weighs least, of those with no more layers than the clean-up alone leaves."""
    limit = next((each.layers for each in tried if each.name == ALONE), None)
    return min((each for each in tried if limit is None or (each.layers or 0) <= limit), key=weight)


def weight(tried: TriedPipeline) -> float:
    """What an engine weighs: layers, each a launch, count twice as much as activations and as its size."""
    return (tried.layers or 1) * math.sqrt((tried.activation_mb or 1) * (tried.plan_mb or 1))


def told(tuning: Tuning) -> str:
    """What was tried and chosen, in a line."""
    return f"tried {', '.join(map(_told, tuning.tried))}; chosen: {tuning.chosen}"


def _told(tried: TriedPipeline) -> str:
    if tried.layers is not None:
        return f"{tried.name} ({tried.layers} layers, {tried.activation_mb:.1f} MB activations)"
    assert tried.ms is not None
    return f"{tried.name} ({tried.ms:.1f} ms, {tried.ratio:.2f})"


def _seconds(run: Run, feed: Feed) -> float:
    """Of a run that is not the first one, which makes its memory."""
    run(feed)
    start = time.perf_counter()
    run(feed)
    return time.perf_counter() - start
