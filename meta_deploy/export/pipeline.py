"""The order of an export: read, translate, run the passes, convert, build, compare, write."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import onnx

from meta_deploy.bundle.bundle import Bundle, Reserved, reserve_bundle
from meta_deploy.bundle.manifest import (
    FileEntry,
    LeftOut,
    Manifest,
    Nodes,
    PassRow,
    TensorSpec,
    Tuning,
    from_dict,
    to_json,
)
from meta_deploy.calib.calibrate import Calibrator
from meta_deploy.calib.estimated import Estimated
from meta_deploy.calib.search import Search
from meta_deploy.calib.timed import Timed
from meta_deploy.errors import BundleError, InputError, VerificationError
from meta_deploy.export.blame import at_fault
from meta_deploy.export.options import Options
from meta_deploy.export.plan import Plan, planned
from meta_deploy.export.progress import Progress
from meta_deploy.export.samples import ImageSamples, Samples, evenly
from meta_deploy.export.shapes import ANY
from meta_deploy.export.sources import open_source
from meta_deploy.export.sources.source import Source, output_specs
from meta_deploy.export.speed import measured, verdict
from meta_deploy.export.trace import drop_outputs
from meta_deploy.export.trial import ANNOTATED, JUDGED, AnnotatedTrial, OutputsTrial
from meta_deploy.export.tune import CLEANS, tune
from meta_deploy.export.verify import OnnxRun, Recorded, Run, WithStages, verify
from meta_deploy.graph.attention import attention_count
from meta_deploy.graph.compact import compact
from meta_deploy.graph.graph import to_proto
from meta_deploy.graph.modules import inherit_modules
from meta_deploy.graph.pipeline import PassResult, run_passes
from meta_deploy.graph.precision import PRECISIONS, Precision
from meta_deploy.graph.precision.emulate import emulated
from meta_deploy.graph.precision.int8 import Quantization, Quantized, searched
from meta_deploy.graph.precision.lower import Conversion
from meta_deploy.targets.target import MODEL, Built


def export(source: str | Path | None, *, progress: Progress | None = None, **options: Any) -> Bundle:
    """Turn a checkpoint or an ONNX file into a verified bundle.

    Args:
        source: a .pth, .pt or .safetensors checkpoint, or an .onnx file; None: a new model, `model`, around
            the ViT of `backbone_ckpt`, to try what it would cost.
        progress: who listens.
        options: the fields of `Options`.

    Returns:
        The bundle as written.

    Raises:
        InputError: an option, the source, an image or the output folder cannot be used.
        VerificationError: the exported graph does not agree with the original; nothing is written.
    """
    known = {field.name for field in fields(Options)}
    if unknown := sorted(options.keys() - known):
        raise InputError(f"export has no option '{unknown[0]}'; choose from {', '.join(sorted(known))}")
    source = options.get("backbone_ckpt") if source is None else source
    if source is None:
        raise InputError("there is nothing to export; give a checkpoint, an ONNX file or backbone_ckpt")
    return run(source, Options(**options), progress or Progress())


def run(path: str | Path, options: Options, progress: Progress) -> Bundle:
    """`export` with checked options."""
    plan = planned(path, options)
    with reserve(plan, path) as reserved:
        with progress.stage("load"):
            source = open_source(path, options, progress.note)
            check_manifest(path, source)
            samples = source.samples(evenly(plan.files)) if plan.needs_samples else Samples()
        tell(source, plan, progress)
        left_out: list[LeftOut] = []
        while True:
            made = make(source, samples, plan, left_out, progress)
            try:
                verification, shapes = compare(source, made, samples, plan, progress)
                break
            except VerificationError as error:
                left_out.append(blamed(error, source, made, samples, plan, progress))
        with progress.stage("write"):
            conversion = made.lowered.conversion
            manifest = source.manifest(
                created_by=versions(),
                outputs=output_specs(made.shipped, shapes),
                target=plan.target.name,
                precision=made.lowered.precision.name,
                operators=plan.form,
                conversion=conversion.to_dict() if conversion else None,
                nodes=Nodes(before=made.before, after=made.after),
                passes=tuple(msgspec.convert(row.to_dict(), PassRow) for row in made.rows),
                tuning=made.tuning,
                left_out=tuple(left_out),
                verification=verification,
                seconds={stage: round(seconds, 2) for stage, seconds in progress.seconds.items()},
                peak_rss_mb=peak_rss_mb(),
                engine=made.built.engine,
            )
            place = reserved[made.lowered.precision.name]
            return place.write(manifest, made.built.files, progress.written)


@contextlib.contextmanager
def reserve(plan: Plan, path: str | Path) -> Iterator[dict[str, Reserved]]:
    """The bundle's place, by the precision that it will be in: 8 bits may give way to another.

    Raises:
        InputError: a place cannot be used.
    """
    with contextlib.ExitStack() as stack:
        places = {
            folder: stack.enter_context(reserve_bundle(folder, plan.reads(path)))
            for folder in dict.fromkeys(plan.folders.values())
        }
        yield {precision: places[folder] for precision, folder in plan.folders.items()}


@dataclass(frozen=True)
class Made:
    """What would ship: graph and files, and how they came about.

    Attributes:
        before, after: nodes of the graph as it came, and in the end.
        rows: what each pass did.
        tuning: what else was tried; None where nothing was.
        shipped: the graph with the outputs that ship.
        built: the files.
    """

    before: int
    after: int
    rows: list[PassResult]
    tuning: Tuning | None
    lowered: Lowered
    shipped: onnx.ModelProto
    built: Built


def make(
    source: Source, samples: Samples, plan: Plan, left_out: Sequence[LeftOut], progress: Progress
) -> Made:
    """The graph by passes in the precision that ships, and what is built of it.

    Raises:
        InputError: the source's graph cannot be had, converted or built.
    """
    quantization = quantizes(source, plan, progress) if plan.precision.calibrates else None
    with progress.stage("export") if source.traced else contextlib.nullcontext():
        original = source.graph(plan.form)
        plan.precision.check(original)
        before = node_count(original)
    builds = Builds(source, plan, progress)
    full, rows, tuning = optimize(original, source, samples, plan, left_out, builds, progress)
    if quantization is not None and source.traced and plan.form != "native":
        quantization = measured_natively(quantization, source, plan, [row.name for row in rows])
    del original
    gc.collect()  # a graph refers to itself in circles, and a large model's holds gigabytes
    lowered = lower(full, source, samples, plan, quantization, progress)
    del full, quantization  # a search holds graphs and results
    after = node_count(lowered.graph)
    if plan.target.compacts:
        compact(lowered.graph)
    shipped = ship(lowered.graph, source)
    with progress.stage("engine") if plan.target.builds else contextlib.nullcontext():
        built = builds.of(shipped, lowered.precision.name)
    return Made(before, after, rows, tuning, lowered, shipped, built)


class Builds:
    """What a target builds of graphs, of the same graph once."""

    def __init__(self, source: Source, plan: Plan, progress: Progress) -> None:
        self._source, self._plan, self._progress = source, plan, progress
        self._known: dict[bytes, Built] = {}

    def of(self, shipped: onnx.ModelProto, precision: str) -> Built:
        """The files of a graph with the outputs that ship.

        Raises:
            InputError: it is too large for an ONNX file; an EngineError: the library refuses it.
        """
        model, plan = serialize(shipped), self._plan
        key = hashlib.sha256(model).digest()
        if key not in self._known:
            options = replace(plan.build_options, precision=precision, attention=attention_count(shipped))
            profiles = self._source.profiles
            self._known[key] = plan.target.build(model, profiles, options, self._progress.count)
        return self._known[key]

    def try_out(self, graph: onnx.ModelProto) -> Built:
        """Of a graph that may ship."""
        return self.of(ship(graph, self._source), self._plan.rest)


def optimize(
    original: onnx.ModelProto,
    source: Source,
    samples: Samples,
    plan: Plan,
    left_out: Sequence[LeftOut],
    builds: Builds,
    progress: Progress,
) -> tuple[onnx.ModelProto, list[PassResult], Tuning | None]:
    """The graph after the passes, what each did, and what was tried instead."""
    passes = [name for name in plan.passes if all(name != each.name for each in left_out)]
    cleaned: list[onnx.ModelProto] = []

    def keep(name: str, changes: int, graph: Any) -> None:
        if plan.tunes and name == CLEANS:
            cleaned.append(to_proto(graph))

    with progress.stage("passes"), sound(source):
        full, rows = run_passes(original, passes, plan.target.prices, plan.options.explain, keep)
    if not cleaned:
        return full, rows, None
    with progress.stage("tune"):
        found = tune(source, plan, rows, full, cleaned.pop(), samples, builds.try_out, progress)
        if found is None:
            return full, rows, None
        chosen, tuning = found
        if chosen != passes:
            full, rows = run_passes(original, chosen, plan.target.prices, plan.options.explain)
    return full, rows, tuning


def tell(source: Source, plan: Plan, progress: Progress) -> None:
    """What is exported, and for what.

    Raises:
        InputError: the target does not take the source's sizes.
    """
    if plan.target.bounded:
        check_bounds(source)
    progress.note(source.describe())
    progress.note(f"target {plan.target.name} ({plan.reason}), {plan.precision.name}")
    if plan.passes and not source.static:
        progress.note(
            "open input sizes disable most passes; fix them (--input-size, --shape) for a leaner graph"
        )


@dataclass(frozen=True)
class Lowered:
    """A graph in the precision that ships; where that is 8 bits and can be timed, in float32 as well."""

    graph: onnx.ModelProto
    full: onnx.ModelProto | None
    precision: Precision
    conversion: Conversion | Quantized | None


def lower(
    full: onnx.ModelProto,
    source: Source,
    samples: Samples,
    plan: Plan,
    quantization: Quantization | None,
    progress: Progress,
) -> Lowered:
    """The graph in the precision that was asked for; in that of the rest where 8 bits are not worth it.

    Raises:
        InputError: the graph cannot be converted; nothing is worth it, and that was to be an error.
    """
    if not plan.lowers:
        return Lowered(full, None, plan.precision, None)
    float32_operators = plan.target.float32_operators.get(plan.rest, ())
    with progress.stage("precision"), sound(source):
        graph, conversion = plan.precision.convert(
            full, samples, float32_operators, progress.note, quantization
        )
        inherit_modules(full.graph, graph.graph)
    if not isinstance(conversion, Quantized) or not conversion.declined:
        timed = plan.precision.calibrates and not plan.target.estimates
        kept = full if timed else None  # a large model's holds gigabytes
        return Lowered(graph, kept, plan.precision, conversion)
    if plan.options.strict:
        table = searched(conversion.search)
        if table:
            progress.note(table.lstrip("\n"))
        raise InputError(f"{conversion.declined}; use --{conversion.rest}, or leave out --strict")
    rest = PRECISIONS[conversion.rest]
    progress.note(f"warning: {conversion.declined}; the bundle is in {rest.title}")
    return Lowered(graph, None, rest, conversion)


def compare(
    source: Source, made: Made, samples: Samples, plan: Plan, progress: Progress
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Compare what ships with the original, and time 8 bits against what would ship without them.

    Returns:
        The figures, and the shapes that the outputs had; (None, {}) where nothing is to be compared.

    Raises:
        VerificationError: they do not agree.
    """
    if not plan.options.check:
        return None, {}
    lowered, shipped = made.lowered, made.shipped
    precision, conversion = lowered.precision, lowered.conversion
    with progress.stage("verify"):
        exported: Run = graph_run(lowered, plan)
        shipped_run = plan.target.runner(made.built, source.profiles, precision.name)
        if shipped_run:
            exported = WithStages(shipped_run, exported)
        recorded = Recorded(exported)
        verification = verify(source, recorded, samples, precision.tolerances, progress.count)
        verification["emulated"] = is_rounded(lowered, plan)
        verification["ran"] = shipped_run is not None or not plan.target.builds
    if isinstance(conversion, Quantized) and not conversion.declined:
        speed = conversion.search["speed"] if conversion.search else None
        if speed is None and lowered.full is not None:
            with progress.stage("speed"):
                graphs = shipped, drop_outputs(lowered.full, source.outputs)
                feed = next(iter(samples))
                speed = measured(plan.target, shipped_run, graphs, source.profiles, feed, plan.rest)
        if speed is not None and "ms" in speed:  # not where it is an estimate
            verification["speed"] = speed
            progress.note(verdict(speed, precision.name, plan.rest))
    return verification, recorded.shapes


def is_rounded(lowered: Lowered, plan: Plan) -> bool:
    """Whether a graph is run with the rounding after each operator written out.

    What a GPU rounds there, a CPU may carry on in float32.
    """
    conversion = lowered.conversion
    low = conversion.lowered if isinstance(conversion, Quantized) else conversion
    return low is not None and plan.target.rounds_each_operator


def graph_run(lowered: Lowered, plan: Plan) -> OnnxRun:
    """A graph on ONNX Runtime's CPU, rounded as its target rounds."""
    rounded = is_rounded(lowered, plan)
    # ONNX Runtime's rewriting is for its own 8-bit kernels, and drops a ReLU before an 8-bit float.
    literally = rounded and isinstance(lowered.conversion, Quantized)
    return OnnxRun(emulated(lowered.graph) if rounded else lowered.graph, literally=literally)


def blamed(
    error: VerificationError, source: Source, made: Made, samples: Samples, plan: Plan, progress: Progress
) -> LeftOut:
    """The pass that makes results differ, to be left out; in float32, else in the precision that ships.

    Raises:
        VerificationError: none of those that may be left out is at fault: the error as it was.
    """

    def check(graph: onnx.ModelProto, lowers: bool) -> None:
        precision = plan.precision if lowers else PRECISIONS["fp32"]
        lowered = Lowered(graph, None, precision, None)
        if lowers:
            lowered = lower(graph, source, samples, plan, None, Progress())
        verify(source, graph_run(lowered, plan), samples, precision.tolerances)

    passes = [row.name for row in made.rows if row.changes]
    with progress.stage("blame"):
        original = source.graph(plan.form)
        for lowers in (False, True) if plan.lowers and not plan.precision.calibrates else (False,):
            name = at_fault(original, passes, plan.target.prices, functools.partial(check, lowers=lowers))
            if name is not None and name not in plan.target.required_passes:
                break
        else:
            raise error
    progress.note(f"warning: with the pass {name}, {error.reason}; it is left out")
    return LeftOut(name=name, reason=error.reason)


def quantizes(source: Source, plan: Plan, progress: Progress) -> Quantization:
    """How a graph is quantized for a target, with ranges measured on all of the files.

    Raises:
        InputError: the source takes no images, and nothing else was given.
    """
    options, rules = plan.options, plan.target.eight_bits[plan.precision.name]
    samples = source.samples(plan.files)
    if options.calib_images is None:
        if not isinstance(samples, ImageSamples):
            raise InputError(
                f"8 bits need ranges from real inputs, which '{source.name}' has none of here; "
                "give --calib-images a folder of .npz files of its inputs"
            )
        progress.note("warning: calibrated on the package's own pictures; give your own by --calib-images")
    if options.search and plan.target.estimates:
        rules = replace(rules, value=0, node=0)  # engines tell better what pays
    calibrate = Calibrator(samples, rules, options.calib_method, progress.note, progress.count)
    search = None
    if options.search:
        costs = Estimated if plan.target.estimates else Timed
        search = Search(costs(trial_of(source, plan), rules, progress.note, progress.count), options.max_drop)
    return Quantization(rules, calibrate, source.outputs, search, plan.rest)


def measured_natively(
    quantization: Quantization, source: Source, plan: Plan, passes: Sequence[str]
) -> Quantization:
    """The same, with ranges measured on the graph with native operators; errors of engines too, which are
    those of graphs on ONNX Runtime in any case.

    Sampling written as arithmetic for a GPU takes most of the time on a CPU.
    """

    @functools.cache
    def native() -> onnx.ModelProto:
        return run_passes(source.graph("native"), passes, plan.target.prices)[0]

    calibrate, search = quantization.calibrate, quantization.search
    assert isinstance(calibrate, Calibrator)
    calibrate = functools.partial(calibrate, faster=native)
    if isinstance(search, Search) and plan.target.estimates:
        return replace(quantization, calibrate=calibrate, search=functools.partial(search, faster=native))
    return replace(quantization, calibrate=calibrate)


def trial_of(source: Source, plan: Plan) -> OutputsTrial:
    """What judges 8 bits: annotations where there are any, else the agreement with float32.

    Raises:
        InputError: the annotations are not of this kind of model.
    """
    common = plan.precision.tolerances, plan.build_options
    if plan.truth is None:
        return OutputsTrial(source, plan.target, source.samples(evenly(plan.files, JUDGED)), *common)
    known = plan.truth.known([str(path) for path in plan.files])
    samples = source.samples([Path(path) for path in evenly(known, ANNOTATED)])
    if not isinstance(samples, ImageSamples):
        raise InputError("--annotations are of images, and --calib-images has arrays; leave them out")
    bundle = Bundle(Path(plan.folders[plan.precision.name]), planned_manifest(source))
    return AnnotatedTrial(source, plan.target, samples, *common, bundle, plan.truth)


def check_bounds(source: Source) -> None:
    """Refuse sizes without an upper end, for which an engine would have to reserve memory.

    Raises:
        InputError: an input has one.
    """
    for profile in source.profiles:
        if ANY in profile.max:
            raise InputError(
                f"an engine needs a largest shape, and input '{profile.name}' of '{source.name}' has none; "
                "give --batch or --dynamic-batch, --input-size, or --shape"
            )


@contextlib.contextmanager
def sound(source: Source) -> Iterator[None]:
    """Where a step fails that no sound graph makes fail, say so if this one is not sound.

    Raises:
        InputError: the original is at fault; otherwise what the step raised.
    """
    try:
        yield
    except (InputError, VerificationError):
        raise
    except Exception:
        source.check_sound()
        raise


def check_manifest(path: str | Path, source: Source) -> None:
    """Refuse now what the manifest at the end could not hold: a name, a threshold, a mean.

    Raises:
        InputError: the source or an option brought such a value.
    """
    try:
        planned = planned_manifest(source)
        from_dict(msgspec.to_builtins(planned), Path(path))
        to_json(planned)
    except (BundleError, ValueError) as error:
        what = str(error).removeprefix(f"the manifest of bundle '{path}' ").removesuffix("; export it again")
        raise InputError(
            f"'{path}' cannot be exported: its manifest {what}; correct that value in it, or the option"
        ) from error


def planned_manifest(source: Source) -> Manifest:
    """The manifest as far as it is known before there is a graph."""
    outputs = tuple(TensorSpec(name=name, dtype="float32", shape=()) for name in source.outputs)
    files = {MODEL: FileEntry(sha256="?", bytes=0)}
    return source.manifest(target="onnxruntime", precision="fp32", outputs=outputs, files=files)


def node_count(graph: onnx.ModelProto) -> int:
    """Nodes, constants not counted."""
    return sum(node.op_type != "Constant" for node in graph.graph.node)


def ship(graph: onnx.ModelProto, source: Source) -> onnx.ModelProto:
    """The graph with the outputs that ship; the tensors of the stages stay in it, by their names."""
    shipped = drop_outputs(graph, source.outputs)
    onnx.helper.set_model_props(shipped, source.metadata())
    return shipped


def serialize(graph: onnx.ModelProto) -> bytes:
    """The graph as bytes.

    Raises:
        InputError: it is over the 2 GB that one ONNX file can hold.
    """
    try:
        return graph.SerializeToString()
    except Exception as error:
        raise InputError(f"the model is too large for one ONNX file: {error}") from error


def versions() -> dict[str, str]:
    """What made a bundle: Python and the packages that took part."""
    found = {"python": sys.version.split()[0]}
    packages = ("meta-deploy", "torch", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime")
    for package in (*packages, "openvino", "tensorrt", "tensorrt-rtx", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package.replace("-", "_")] = version(package)
    return found


def peak_rss_mb() -> int | None:
    """The most memory this process has held so far, in MB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)
