"""The order of an export: load, translate, run the passes, verify, write. Each station does its own work."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from meta_deploy.bundle.bundle import Bundle, InputSpec, check_out_dir, write_bundle
from meta_deploy.errors import InputError
from meta_deploy.export.trace import DIVISOR, drop_outputs, export_onnx, output_names
from meta_deploy.export.verify import verify
from meta_deploy.graph.attention import attention_count
from meta_deploy.graph.pipeline import COSTS, PIPELINES, run_passes
from meta_deploy.graph.precision.convert import Precision, convert, emulated, lowered_tensors, overflowing
from meta_deploy.imaging.images import expand, read_image
from meta_deploy.imaging.preprocess import Preprocessor
from meta_deploy.models.checkpoint.load import LoadedModel, load_model
from meta_deploy.models.registry import ModelConfig, config_to_dict
from meta_deploy.targets.table import TARGETS, choose_operators, choose_target
from meta_deploy.targets.tensorrt.build import build_engine, check_gpus
from meta_deploy.targets.tensorrt.library import MODULES

VERIFICATION_IMAGES = 8
MAX_INPUT_VALUES = 2**31  # 8 GB of input alone; no model of the zoo runs on more


@dataclass
class Progress:
    """What an export tells while it runs. The command line prints it; by default nobody listens.

    Attributes:
        note: called with a line worth reading.
        start: called with the name of a stage that begins.
        end: called with the name of the stage that ended, and its seconds.
        count: called with (done, total) inside a stage that can count.
    """

    note: Callable[[str], None] = lambda line: None
    start: Callable[[str], None] = lambda stage: None
    end: Callable[[str, float], None] = lambda stage, seconds: None
    count: Callable[[int, int], None] = lambda done, total: None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.start(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.end(name, self.seconds[name])


def export(
    checkpoint: str | Path,
    *,
    model: str | None = None,
    target: str = "auto",
    precision: str = "fp32",
    operators: str | None = None,
    gpus: Sequence[str] = (),
    workspace_mb: int | None = None,
    calib_images: str | Path | None = None,
    input_size: tuple[int, int] | None = None,
    batch: int = 1,
    dynamic_batch: tuple[int, int, int] | None = None,
    dynamic_size: bool = False,
    passes: str = "all",
    explain: bool = False,
    out: str | Path | None = None,
    check: bool = True,
    allow_partial: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Turn a checkpoint into a verified bundle.

    Args:
        checkpoint: a .pth, .pt or .safetensors file.
        model: a zoo name; inferred from the checkpoint when absent.
        target: "auto" or one of `targets.TARGETS`.
        precision: one of `targets.PRECISIONS`.
        operators: "native" or "lowered", how NMS and RoIAlign are written; absent: the target's choice.
        gpus: compute capabilities that a TensorRT-RTX engine is for, such as ("8.6",); none: all it knows.
        workspace_mb: scratch memory that a TensorRT layer may use, in MB; absent: TensorRT's own limit.
        calib_images: a folder of images to measure and verify on; absent: those of the package.
        input_size: (height, width) in pixels, multiples of 32; absent: the model's own.
        batch: images a call, when `dynamic_batch` is absent.
        dynamic_batch: (min, opt, max) images a call.
        dynamic_size: take any multiple of 32 up to the longer side of `input_size`.
        passes: "all", "none", or names of graph passes separated by commas.
        explain: have the manifest say which places near its pattern a pass left as they are, and why.
        out: the bundle's folder; absent: named after the checkpoint, in the current folder.
        check: compare with PyTorch on images before anything is written.
        allow_partial: accept a checkpoint that lacks tensors.
        progress: who listens.

    Returns:
        The bundle as written.

    Raises:
        InputError: an argument, the checkpoint, an image or the output folder cannot be used.
        VerificationError: the exported graph does not agree with the model; nothing is written.
    """
    progress = progress or Progress()
    chosen, reason = choose_target(target, precision)
    form = choose_operators(chosen, operators)
    if chosen in MODULES:
        check_gpus(chosen, gpus)
    elif gpus or workspace_mb is not None:
        raise InputError(f"--gpu and --workspace are for TensorRT's engines, and the target is {chosen}")
    chosen_passes = choose_passes(passes, TARGETS[chosen].pipeline)
    measured = precision == "fp16"  # its range is small, and images tell what comes near it
    images = verification_images(calib_images) if check or measured or calib_images is not None else []
    folder = Path(out) if out is not None else Path(f"{Path(checkpoint).stem}-{chosen}-{precision}")
    check_out_dir(folder)
    # Refused now rather than after loading.
    input_spec(input_size or (DIVISOR, DIVISOR), batch, dynamic_batch, dynamic_size)

    with progress.stage("load"):
        loaded = load_model(checkpoint, model, allow_partial=allow_partial, log=progress.note)
    spec = input_spec(input_size or loaded.config.input_size, batch, dynamic_batch, dynamic_size)
    preprocess = preprocess_rules(loaded.config, spec)
    progress.note(f"{loaded.config.name}, {_parameters(loaded):,} parameters, {describe(spec)}")
    progress.note(f"target {chosen} ({reason}), {precision}")
    if chosen_passes and not spec.static_size:
        progress.note(
            "most passes need to know the map's size and leave a graph for any size as it is; "
            "where one --input-size will do, they give a leaner and faster one"
        )
    with progress.stage("export"):
        literal = export_onnx(loaded.model, spec, form)
    nodes_before = sum(node.op_type != "Constant" for node in literal.graph.node)
    with progress.stage("passes"):
        graph, results = run_passes(literal, chosen_passes, COSTS[TARGETS[chosen].pipeline], explain)
        # Graphs refer to themselves in circles, and for a large model each holds gigabytes.
        del literal
        gc.collect()
    converted = None
    if precision != "fp32":
        with progress.stage("precision"):
            graph, converted = lower_precision(graph, chosen, precision, images, spec, preprocess, progress)
    verification = None
    if check:
        with progress.stage("verify"):
            # What a GPU rounds after each operator, a CPU may carry on in float32.
            checked = emulated(graph) if converted and chosen in MODULES else graph
            verification = verify(
                loaded.model, checked, images, spec, preprocess, precision, progress=progress.count
            )
            verification["emulated"] = checked is not graph  # in float32, rounded after each operator
    shipped = drop_outputs(graph, output_names(loaded.config))
    del graph
    files, section = {"model.onnx": serialize(shipped)}, None
    if chosen in MODULES:
        with progress.stage("engine"):
            engine = build_engine(
                files["model.onnx"],
                chosen,
                spec,
                compute_capabilities=gpus,
                workspace_mb=workspace_mb,
                progress=progress.count,
            )
        files["model.engine"] = engine.plan
        section = {**engine.section(), "attention": attention_count(shipped)}
    with progress.stage("write"):
        manifest = {
            "created_by": _versions(),
            "task": loaded.config.task,
            "model": {"name": loaded.config.name, "config": config_to_dict(loaded.config)},
            "classes": list(loaded.class_names),
            "parameters": _parameters(loaded),
            "input": _manifest_input(spec),
            "outputs": [_manifest_output(output) for output in shipped.graph.output],
            "preprocess": preprocess,
            "thresholds": {"score": getattr(loaded.config, "score_threshold", 0.0), "mask": 0.5},
            "target": chosen,
            "precision": precision,
            "operators": form,
            "conversion": converted.to_dict() if converted else None,
            "nodes": {"before": nodes_before, "after": len(shipped.graph.node)},
            "passes": [result.to_dict() for result in results],
            "verification": verification,
            "seconds": {stage: round(seconds, 2) for stage, seconds in progress.seconds.items()},
            "peak_rss_mb": peak_rss_mb(),
            "engine": section,
        }
        return write_bundle(folder, manifest, files)


def lower_precision(
    graph: onnx.ModelProto,
    target: str,
    precision: str,
    images: Sequence[Path],
    spec: InputSpec,
    preprocess: dict[str, Any],
    progress: Progress,
) -> tuple[onnx.ModelProto, Precision]:
    """The graph in a lower precision, but for what the target or the numbers on these images forbid."""
    preprocessor = Preprocessor(spec, preprocess)

    def batches() -> Iterator[np.ndarray]:
        for done, path in enumerate(images, 1):
            batch, _ = preprocessor([read_image(path)] * spec.batch_min)
            yield batch
            progress.count(done, len(images))

    float32_operators = TARGETS[target].float32_operators.get(precision, ())
    overflow = {}
    if precision == "fp16":
        overflow = overflowing(graph, batches(), lowered_tensors(graph, precision, float32_operators))
    if overflow:
        most = max(overflow.values())
        progress.note(f"{len(overflow)} tensors come near {precision}'s range (up to {most:.3g}): in float32")
    return convert(graph, precision, overflow, float32_operators)


def input_spec(
    input_size: Sequence[int],
    batch: int,
    dynamic_batch: Sequence[int] | None,
    dynamic_size: bool,
) -> InputSpec:
    """The input's dimensions from what the user asked for.

    Raises:
        InputError: a size that is not a multiple of 32, a batch range that does not rise.
    """
    height, width = input_size
    for name, size in (("height", height), ("width", width)):
        if size < DIVISOR or size % DIVISOR:
            nearest = max(DIVISOR, round(size / DIVISOR) * DIVISOR)
            raise InputError(f"input {name} {size} is not a multiple of {DIVISOR}; the nearest is {nearest}")
    low, opt, high = dynamic_batch or (batch, batch, batch)
    if not 1 <= low <= opt <= high:
        raise InputError(f"the batch range {low} {opt} {high} does not rise; give 1 <= MIN <= OPT <= MAX")
    largest = max(height, width)
    if 3 * high * (largest**2 if dynamic_size else height * width) > MAX_INPUT_VALUES:
        shape = f"{high} x 3 x {height} x {width}"
        raise InputError(
            f"an input of {shape} is too large (over 2**31 numbers); take a smaller batch or size"
        )
    return InputSpec(
        name="images",
        batch_min=low,
        batch_opt=opt,
        batch_max=high,
        size_min=(DIVISOR, DIVISOR) if dynamic_size else (height, width),
        size_opt=(height, width),
        size_max=(largest, largest) if dynamic_size else (height, width),
        divisor=DIVISOR,
    )


def preprocess_rules(config: ModelConfig, spec: InputSpec) -> dict[str, Any]:
    """The manifest's `preprocess`: fit a static input; keep to its edges, either way up, in a dynamic one."""
    height, width = spec.size_opt
    resize: dict[str, Any] = {"mode": "fit", "size": [height, width]}
    if not spec.static_size:
        resize = {"mode": "edges", "long": max(height, width), "short": min(height, width)}
    return {"resize": resize, "mean": list(config.mean), "std": list(config.std), "pad_value": 0}


def choose_passes(passes: str, pipeline_name: str) -> list[str]:
    """The passes to run, in the order of the target's pipeline.

    Raises:
        InputError: an unknown name.
    """
    pipeline = PIPELINES[pipeline_name]
    if passes == "all":
        return list(pipeline)
    names = [] if passes == "none" else [name.strip() for name in passes.split(",")]
    if pipeline_name == "tensorrt":
        names.append("clean-up")  # without which TensorRT's parser does not take what PyTorch exports
    if unknown := [name for name in names if name not in pipeline]:
        raise InputError(
            f"'{unknown[0]}' is not a graph pass of {pipeline_name}; "
            f"choose all, none, or some of {', '.join(dict.fromkeys(pipeline))}"
        )
    return [name for name in pipeline if name in names]


def verification_images(folder: str | Path | None) -> list[Path]:
    """At most eight images of the folder, spread over it; without a folder those that ship with the package.

    Raises:
        InputError: the folder is missing or has no image.
        ImageError: one of these images cannot be read.
    """
    if folder is None:
        paths = sorted(Path(str(files("meta_deploy") / "assets" / "images")).glob("*.jpg"))
    else:
        if not Path(folder).is_dir():
            raise InputError(f"'{folder}' is not a folder of images; give --calib-images a folder")
        paths = [source.path for source in expand([str(folder)])]
    step = max(1, len(paths) / VERIFICATION_IMAGES)
    chosen = [paths[int(i * step)] for i in range(min(len(paths), VERIFICATION_IMAGES))]
    for path in chosen:
        read_image(path)  # a broken one is told before the long work, not after it
    return chosen


def describe(spec: InputSpec) -> str:
    """The input's dimensions in words."""
    batch = f"batch {spec.batch_opt}" if spec.static_batch else f"batch {spec.batch_min} to {spec.batch_max}"
    if spec.static_size:
        return f"input {spec.size_opt[0]}x{spec.size_opt[1]}, {batch}"
    return f"input up to {spec.size_max[0]}x{spec.size_max[1]} in steps of {spec.divisor}, {batch}"


def serialize(graph: onnx.ModelProto) -> bytes:
    """The graph as bytes.

    Raises:
        InputError: it is over the 2 GB that one ONNX file can hold.
    """
    try:
        return graph.SerializeToString()
    except Exception as error:
        raise InputError(f"the model is too large for one ONNX file: {error}") from error


def _parameters(loaded: LoadedModel) -> int:
    return sum(parameter.numel() for parameter in loaded.model.parameters())


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in (
        "meta-deploy",
        "torch",
        "onnx",
        "onnxscript",
        "onnx-graphsurgeon",
        "onnxruntime",
        "tensorrt",
        "tensorrt-rtx",
        "numpy",
    ):
        with contextlib.suppress(PackageNotFoundError):
            versions[package.replace("-", "_")] = version(package)
    return versions


def _manifest_input(spec: InputSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": "float32",
        "batch": {"min": spec.batch_min, "opt": spec.batch_opt, "max": spec.batch_max},
        "size": {"min": list(spec.size_min), "opt": list(spec.size_opt), "max": list(spec.size_max)},
        "divisor": spec.divisor,
    }


def _manifest_output(output: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = output.type.tensor_type
    return {
        "name": output.name,
        "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
    }


def peak_rss_mb() -> int | None:
    """The most memory this process has held so far, in MB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)
