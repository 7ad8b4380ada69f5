"""The order of an export: read, translate, run the passes, convert, build, compare, write."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import onnx

from meta_deploy.bundle.bundle import Bundle, reserve_bundle
from meta_deploy.bundle.manifest import FileEntry, Manifest, Nodes, PassRow, TensorSpec, from_dict, to_json
from meta_deploy.calib.calibrate import Calibrator
from meta_deploy.calib.search import Search
from meta_deploy.errors import BundleError, InputError, VerificationError
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
from meta_deploy.export.verify import OnnxRun, Recorded, Run, WithStages, verify
from meta_deploy.graph.attention import attention_count
from meta_deploy.graph.compact import compact
from meta_deploy.graph.modules import inherit_modules
from meta_deploy.graph.pipeline import run_passes
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
    with reserve_bundle(plan.folder, plan.reads(path)) as reserved:
        with progress.stage("load"):
            source = open_source(path, options, progress.note)
            check_manifest(path, source)
            samples = source.samples(evenly(plan.files)) if plan.needs_samples else Samples()
            quantization = quantizes(source, plan, progress) if plan.precision.calibrates else None
        tell(source, plan, progress)
        with progress.stage("export") if source.traced else contextlib.nullcontext():
            original = source.graph(plan.form)
            plan.precision.check(original)
            before = node_count(original)
        with progress.stage("passes"), sound(source):
            full, rows = run_passes(original, plan.passes, plan.target.prices, explain=options.explain)
            del original
            gc.collect()  # a graph refers to itself in circles, and a large model's holds gigabytes
        lowered = lower(full, source, samples, plan, quantization, progress)
        del full, quantization  # a search holds graphs and results
        after = node_count(lowered.graph)
        if plan.target.compacts:
            compact(lowered.graph)
        shipped = ship(lowered.graph, source)
        with progress.stage("engine") if plan.target.builds else contextlib.nullcontext():
            build_options = replace(
                plan.build_options, precision=lowered.precision.name, attention=attention_count(shipped)
            )
            built = plan.target.build(serialize(shipped), source.profiles, build_options, progress.count)
        verification: dict[str, Any] | None = None
        shapes: dict[str, Any] = {}
        if options.check:
            verification, shapes = compare(source, lowered, shipped, built, samples, plan, progress)
        with progress.stage("write"):
            manifest = source.manifest(
                created_by=versions(),
                outputs=output_specs(shipped, shapes),
                target=plan.target.name,
                precision=lowered.precision.name,
                operators=plan.form,
                conversion=lowered.conversion.to_dict() if lowered.conversion else None,
                nodes=Nodes(before=before, after=after),
                passes=tuple(msgspec.convert(row.to_dict(), PassRow) for row in rows),
                verification=verification,
                seconds={stage: round(seconds, 2) for stage, seconds in progress.seconds.items()},
                peak_rss_mb=peak_rss_mb(),
                engine=built.engine,
            )
            return reserved.write(manifest, built.files, progress.written)


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
    """A graph in the precision that ships; where that is 8 bits, the float32 one that it was made of."""

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
    """The graph in the precision that was asked for; in float32 where 8 bits are not worth it.

    Raises:
        InputError: the graph cannot be converted; nothing is worth it, and that was to be an error.
    """
    if not plan.lowers:
        return Lowered(full, None, plan.precision, None)
    float32_operators = plan.target.float32_operators.get(plan.precision.name, ())
    with progress.stage("precision"), sound(source):
        graph, conversion = plan.precision.convert(
            full, samples, float32_operators, progress.note, quantization
        )
        inherit_modules(full.graph, graph.graph)
    if not isinstance(conversion, Quantized) or not conversion.declined:
        kept = full if plan.precision.calibrates else None  # a large model's holds gigabytes
        return Lowered(graph, kept, plan.precision, conversion)
    if plan.options.strict:
        table = searched(conversion.search)
        if table:
            progress.note(table.lstrip("\n"))
        raise InputError(f"{conversion.declined}; use --fp16 or --fp32, or leave out --strict")
    progress.note(f"warning: {conversion.declined}; the bundle is in float32")
    return Lowered(full, None, PRECISIONS["fp32"], conversion)


def compare(
    source: Source,
    lowered: Lowered,
    shipped: onnx.ModelProto,
    built: Built,
    samples: Samples,
    plan: Plan,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare what ships with the original, and time 8 bits against float32.

    Returns:
        The figures, and the shapes that the outputs had.

    Raises:
        VerificationError: they do not agree.
    """
    precision, conversion = lowered.precision, lowered.conversion
    with progress.stage("verify"):
        # What a GPU rounds after each operator, a CPU may carry on in float32.
        rounded = isinstance(conversion, Conversion) and plan.target.rounds_each_operator
        exported: Run = OnnxRun(emulated(lowered.graph) if rounded else lowered.graph)
        shipped_run = plan.target.runner(built.files, source.profiles, precision.name)
        if shipped_run:
            exported = WithStages(shipped_run, exported)
        recorded = Recorded(exported)
        verification = verify(source, recorded, samples, precision.tolerances, progress.count)
        verification["emulated"] = rounded
    if lowered.full is not None:
        speed = (
            conversion.search["speed"] if isinstance(conversion, Quantized) and conversion.search else None
        )
        if speed is None:
            with progress.stage("speed"):
                graphs = shipped, drop_outputs(lowered.full, source.outputs)
                feed = next(iter(samples))
                speed = measured(plan.target, shipped_run, graphs, source.profiles, feed)
        verification["speed"] = speed
        progress.note(verdict(speed, precision.name))
    return verification, recorded.shapes


def quantizes(source: Source, plan: Plan, progress: Progress) -> Quantization:
    """How a graph is quantized for a target, with ranges measured on all of the files.

    Raises:
        InputError: the source takes no images, and nothing else was given.
    """
    options, rules = plan.options, plan.target.int8
    assert rules is not None
    samples = source.samples(plan.files)
    if options.calib_images is None:
        if not isinstance(samples, ImageSamples):
            raise InputError(
                f"8 bits need ranges from real inputs, which '{source.name}' has none of here; "
                "give --calib-images a folder of .npz files of its inputs"
            )
        progress.note("warning: calibrated on the package's own pictures; give your own by --calib-images")
    calibrate = Calibrator(samples, rules, options.calib_method, progress.note, progress.count)
    search = None
    if options.search:
        search = Search(trial_of(source, plan), rules, options.max_drop, progress.note, progress.count)
    return Quantization(rules, calibrate, source.outputs, search)


def trial_of(source: Source, plan: Plan) -> OutputsTrial:
    """What judges 8 bits: annotations where there are any, else the agreement with float32.

    Raises:
        InputError: the annotations are not of this kind of model.
    """
    common = plan.precision.tolerances
    if plan.truth is None:
        return OutputsTrial(source, plan.target, source.samples(evenly(plan.files, JUDGED)), common)
    known = plan.truth.known([str(path) for path in plan.files])
    samples = source.samples([Path(path) for path in evenly(known, ANNOTATED)])
    if not isinstance(samples, ImageSamples):
        raise InputError("--annotations are of images, and --calib-images has arrays; leave them out")
    bundle = Bundle(Path(plan.folder), planned_manifest(source))
    return AnnotatedTrial(source, plan.target, samples, common, bundle, plan.truth)


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
