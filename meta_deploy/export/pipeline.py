"""The order of an export: read, translate, run the passes, convert, build, compare, write."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import onnx

from meta_deploy.bundle.bundle import Bundle, reserve_bundle
from meta_deploy.bundle.manifest import FileEntry, Nodes, PassRow, TensorSpec, from_dict, to_json
from meta_deploy.calib import METHOD_NAMES
from meta_deploy.calib.calibrate import Calibrator
from meta_deploy.errors import BundleError, InputError, VerificationError
from meta_deploy.export.options import Options
from meta_deploy.export.progress import Progress
from meta_deploy.export.samples import MOST, MOST_CALIBRATION, ImageSamples, Samples, evenly, find_files
from meta_deploy.export.shapes import ANY
from meta_deploy.export.sources import check_options, open_source
from meta_deploy.export.sources.source import Source, output_specs
from meta_deploy.export.speed import measured, verdict
from meta_deploy.export.trace import drop_outputs
from meta_deploy.export.verify import OnnxRun, Recorded, Run, WithStages, verify
from meta_deploy.graph.attention import attention_count
from meta_deploy.graph.compact import compact
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.graph.precision.emulate import emulated
from meta_deploy.graph.precision.int8 import Quantization
from meta_deploy.targets import choose_target
from meta_deploy.targets.target import MODEL, BuildOptions, Target


def export(source: str | Path, *, progress: Progress | None = None, **options: Any) -> Bundle:
    """Turn a checkpoint or an ONNX file into a verified bundle.

    Args:
        source: a .pth, .pt or .safetensors checkpoint, or an .onnx file.
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
    return run(source, Options(**options), progress or Progress())


def run(path: str | Path, options: Options, progress: Progress) -> Bundle:
    """`export` with checked options."""
    target, reason = choose_target(options.target, options.precision)
    precision = PRECISIONS[options.precision]
    build_options = BuildOptions(precision.name, tuple(options.gpus), options.workspace_mb)
    form = target.choose_operators(options.operators)
    passes = choose_passes(options.passes, target)
    check_options(path, options)
    target.check(build_options)
    check_method(options)
    lowered = precision.name not in ("fp32", *target.lowered_by_build)
    needed = options.check or (lowered and precision.measures)
    most = MOST_CALIBRATION if precision.calibrates else MOST
    files = find_files(options.calib_images, most) if needed or options.calib_images is not None else []
    named = f"{Path(path).stem}-{target.name}-{precision.name}"
    folder = named if options.out is None else options.out
    with reserve_bundle(folder, [Path(path), *files]) as reserved:
        with progress.stage("load"):
            source = open_source(path, options, progress.note)
            check_manifest(path, source)
            samples = source.samples(evenly(files)) if needed else Samples()
            quantization = (
                quantizes(source, files, target, options, progress) if precision.calibrates else None
            )
        if target.bounded:
            check_bounds(source)
        progress.note(source.describe())
        progress.note(f"target {target.name} ({reason}), {precision.name}")
        if passes and not source.static:
            progress.note(
                "open input sizes disable most passes; fix them (--input-size, --shape) for a leaner graph"
            )
        with progress.stage("export") if source.traced else contextlib.nullcontext():
            graph = source.graph(form)
            precision.check(graph)
            before = node_count(graph)
        with progress.stage("passes"), sound(source):
            graph, rows = run_passes(graph, passes, target.prices, explain=options.explain)
            gc.collect()  # a graph refers to itself in circles, and a large model's holds gigabytes
        conversion, full = None, graph if precision.calibrates else None
        if lowered:
            with progress.stage("precision"), sound(source):
                float32_operators = target.float32_operators.get(precision.name, ())
                graph, conversion = precision.convert(
                    graph, samples, float32_operators, progress.note, quantization
                )
        after = node_count(graph)
        if target.compacts:
            compact(graph)
        shipped = ship(graph, source)
        with progress.stage("engine") if target.builds else contextlib.nullcontext():
            build_options = replace(build_options, attention=attention_count(shipped))
            built = target.build(serialize(shipped), source.profiles, build_options, progress.count)
        verification, shapes = None, {}
        if options.check:
            with progress.stage("verify"):
                # What a GPU rounds after each operator, a CPU may carry on in float32.
                rounded = conversion is not None and target.rounds_each_operator
                exported: Run = OnnxRun(emulated(graph) if rounded else graph)
                shipped_run = target.runner(built.files, source.profiles, precision.name)
                if shipped_run:
                    exported = WithStages(shipped_run, exported)
                recorded = Recorded(exported)
                verification = verify(source, recorded, samples, precision.tolerances, progress.count)
                verification["emulated"], shapes = rounded, recorded.shapes
            if full is not None:
                with progress.stage("speed"):
                    graphs = shipped, drop_outputs(full, source.outputs)
                    feed = next(iter(samples))
                    verification["speed"] = measured(target, shipped_run, graphs, source.profiles, feed)
                progress.note(verdict(verification["speed"], precision.name))
        with progress.stage("write"):
            manifest = source.manifest(
                created_by=versions(),
                outputs=output_specs(shipped, shapes),
                target=target.name,
                precision=precision.name,
                operators=form,
                conversion=conversion.to_dict() if conversion else None,
                nodes=Nodes(before=before, after=after),
                passes=tuple(msgspec.convert(row.to_dict(), PassRow) for row in rows),
                verification=verification,
                seconds={stage: round(seconds, 2) for stage, seconds in progress.seconds.items()},
                peak_rss_mb=peak_rss_mb(),
                engine=built.engine,
            )
            return reserved.write(manifest, built.files, progress.written)


def choose_passes(passes: str, target: Target) -> list[str]:
    """The passes to run, in the order of the target's pipeline.

    Raises:
        InputError: an unknown name.
    """
    if passes == "all":
        return list(target.passes)
    names = [] if passes == "none" else [name.strip() for name in passes.split(",")]
    if unknown := [name for name in names if name not in target.passes]:
        raise InputError(
            f"'{unknown[0]}' is not a graph pass of {target.name}; "
            f"choose all, none, or some of {', '.join(dict.fromkeys(target.passes))}"
        )
    return [name for name in target.passes if name in names or name in target.required_passes]


def check_method(options: Options) -> None:
    """Refuse a way to calibrate that there is not, or without 8 bits.

    Raises:
        InputError: it is such a one.
    """
    if options.calib_method not in METHOD_NAMES:
        raise InputError(
            f"'{options.calib_method}' is not a calibration method; choose {', '.join(METHOD_NAMES)}"
        )
    if options.calib_method != METHOD_NAMES[0] and not PRECISIONS[options.precision].calibrates:
        raise InputError(f"--calib-method is for --int8, and the precision is {options.precision}")


def quantizes(
    source: Source, files: Sequence[Path], target: Target, options: Options, progress: Progress
) -> Quantization:
    """How a graph is quantized for a target, with ranges measured on all of the files.

    Raises:
        InputError: the source takes no images, and nothing else was given.
    """
    assert target.int8 is not None
    samples = source.samples(files)
    if options.calib_images is None:
        if not isinstance(samples, ImageSamples):
            raise InputError(
                f"8 bits need ranges from real inputs, which '{source.name}' has none of here; "
                "give --calib-images a folder of .npz files of its inputs"
            )
        progress.note("warning: calibrated on the package's own pictures; give your own by --calib-images")
    calibrate = Calibrator(samples, target.int8, options.calib_method, progress.note, progress.count)
    return Quantization(target.int8, calibrate, source.outputs)


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
    outputs = tuple(TensorSpec(name=name, dtype="float32", shape=()) for name in source.outputs)
    files = {MODEL: FileEntry(sha256="?", bytes=0)}
    try:
        planned = source.manifest(target="onnxruntime", precision="fp32", outputs=outputs, files=files)
        from_dict(msgspec.to_builtins(planned), Path(path))
        to_json(planned)
    except (BundleError, ValueError) as error:
        what = str(error).removeprefix(f"the manifest of bundle '{path}' ").removesuffix("; export it again")
        raise InputError(
            f"'{path}' cannot be exported: its manifest {what}; correct that value in it, or the option"
        ) from error


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
