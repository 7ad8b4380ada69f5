"""A nuclei model in 8 bits on ONNX Runtime's and OpenVINO's CPU: ours, and what else quantizes it.

    python benchmarks/int8_methods.py [CASE] --calib-images DIR [--count N] [--add NAME=FILE.onnx ...]

CASE is `demo`, the detector in the package, or a .pth file. Rows: float32, float16 and bfloat16; `meta-export
--int8` with its search, and by the rules with each method of calibration; ONNX Runtime's quantize_static;
NNCF on OpenVINO; and the files of `--add`, which another tool made of build/benchmarks/int8/fp32/model.onnx.
With `--tensorrt`, also the graphs for TensorRT-RTX in float16, int8 and fp8, each result rounded as a GPU
rounds it: what these lose, without a time. Accuracy is as in demo_accuracy.py. Model times are taken in
turns, as ratios to the first row; memory is the peak of a fresh process that runs one picture. Rows are
printed as they come; `--plot` draws accuracy against time.

On a machine that is busy with other work, `--cpu-time` takes the CPU time of one thread, the least of all
rounds; `taskset -c 0 python ...` lets the search of `--int8` choose for one thread, too.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx
from msgspec.structs import replace

from benchmarks.common import (
    DEMO,
    WORK,
    Case,
    checkpoint,
    in_fresh_process,
    interleave,
    least_ratio,
    machine,
    parser,
    ratio,
    run_command,
    save,
    table,
)
from benchmarks.demo_accuracy import ALL, DATA, SCORE, detection_rows, results_of, segmentation_rows
from benchmarks.quantize_static import quantize_static_of
from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.calib import METHOD_NAMES
from meta_deploy.export.samples import ImageSamples, evenly
from meta_deploy.export.verify import OnnxRun
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.graph.precision.emulate import emulated
from meta_deploy.imaging.sources import expand
from meta_deploy.report.subject import peak_memory_mb
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.targets import TARGETS, open_backend
from meta_deploy.targets.model_file import read_model
from meta_deploy.targets.openvino import WEIGHTS, XML
from meta_deploy.targets.target import MODEL, Arrays, Backend
from meta_deploy.tasks.detection import Detections
from tools.training_data import evenly_chosen

FOLDER = WORK / "int8"
SIMULATED = "simulated"


@dataclass(frozen=True)
class Row:
    """A bundle and the back end that runs it."""

    name: str
    bundle: Path
    backend: str

    def open(self, threads: int) -> Backend:
        bundle = Bundle.open(self.bundle)
        return Simulated(bundle) if self.backend == SIMULATED else open_backend(bundle, self.backend, threads)

    def size(self) -> float:
        """MB of the files that the back end reads."""
        files = (XML, WEIGHTS) if (self.bundle / XML).exists() else (MODEL,)
        return sum((self.bundle / file).stat().st_size for file in files) / 1e6


class Simulated(Backend):
    """A graph for TensorRT, run as it is written, with its rounding, by ONNX Runtime."""

    name = SIMULATED

    def __init__(self, bundle: Bundle) -> None:
        self._outputs = [output.name for output in bundle.manifest.outputs]
        self._run = OnnxRun(emulated(onnx.load_from_string(read_model(bundle))), literally=True)
        self.runs_on = self._run.runs_on

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        outputs = self._run(inputs)
        return {name: outputs[name] for name in self._outputs}

    def close(self) -> None:
        pass


def main(argv: Sequence[str] | None = None) -> None:
    p = parser(__doc__, "int8_methods")
    p.add_argument("case", nargs="?", type=Case.parse, default=DEMO)
    p.add_argument("--calib-images", type=Path, required=True)
    p.add_argument("--calib-count", type=int, default=64, help="images that others calibrate on")
    p.add_argument("--data", type=Path, default=DATA)
    p.add_argument("--count", type=int, help="pictures of the validation set (default: all)")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--cpu-time", action="store_true", help="least CPU time of one thread, not median time")
    p.add_argument("--tile", type=int, help="as in demo_accuracy.py")
    p.add_argument("--methods", nargs="*", default=METHOD_NAMES, help="of calibration (default: all)")
    p.add_argument("--tensorrt", action="store_true", help="rows for TensorRT-RTX, simulated")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracy against time")
    p.add_argument(
        "--add", nargs="*", default=[], metavar="NAME=FILE", help="further graphs for ONNX Runtime"
    )
    args = p.parse_args(argv)
    if args.cpu_time:
        args.threads = 1
    rows = list(contenders(args))
    truth = evenly_chosen(json.loads((args.data / "instances_val.json").read_text()), args.count)
    pictures = [args.data / "val" / image["file_name"] for image in truth["images"]]
    runnable = [row for row in rows if row.backend != SIMULATED]
    times = timed(runnable, pictures[0], args.rounds, args.threads, args.cpu_time)
    compared, typical = (least_ratio, min) if args.cpu_time else (ratio, np.median)
    base, cells = rows[0], []
    whole = float32_graph(Bundle.open(base.bundle)).ByteSize() / 1e6
    for row in rows:
        runs, opened = row.name in times, row.open(args.threads)
        with Predictor(row.bundle, opened, 0.0, args.threads, tile=args.tile) as predictor:
            found, _ = results_of(predictor, truth, args.data / "val")
        cells.append(
            {"": row.name, "back end": row.backend}
            | accuracy(truth, found)
            | {
                "time / fp32": compared(times[row.name], times[base.name]) if runs else None,
                "ms": float(typical(times[row.name])) if runs else None,
            }
            | {
                "file / fp32": row.size() / whole,
                "memory, MB": in_fresh_process(memory, row, args.threads, pictures[0]) if runs else None,
            }
        )
        print(table(cells), end="\n\n", flush=True)
    clock = "CPU time of one thread, the least" if args.cpu_time else "time, the median"
    save(args.json, machine=machine(), pictures=len(truth["images"]), clock=clock, rows=cells)
    if args.plot:
        plot({"": cells}, args.plot)


def contenders(args: Any) -> Iterator[Row]:
    """Each row's bundle, made when its turn comes. The first is float32 on ONNX Runtime."""
    calibrated = ["--calib-images", args.calib_images]
    ours = partial(exported, args.case)
    fp32 = ours("fp32", "onnxruntime")
    yield fp32
    yield ours("fp16", "onnxruntime", "--fp16")
    yield ours("int8", "onnxruntime", "--int8", *calibrated)
    for method in args.methods:
        chosen = ["--int8", "--no-search", "--calib-method", method]
        yield ours(f"int8, rules, {method}", "onnxruntime", *chosen, *calibrated)
    bundle = Bundle.open(fp32.bundle)
    paths = evenly([one.path for one in expand([str(args.calib_images)])], args.calib_count)
    samples = ImageSamples(paths, bundle.input, bundle.manifest.preprocess)
    graphs = quantize_static_of(float32_graph(bundle), samples)
    for add in args.add:
        name, _, file = add.partition("=")
        graphs[name] = onnx.load(file)
    for name, graph in graphs.items():
        yield Row(name, rewritten(bundle, name, {MODEL: graph.SerializeToString()}), "onnxruntime")
    openvino = ours("OpenVINO fp32", "openvino")
    yield openvino
    yield ours("OpenVINO bf16", "openvino", "--bf16")
    yield ours("OpenVINO int8, rest as the CPU can", "openvino", "--int8", *calibrated)
    bundle = Bundle.open(openvino.bundle)
    files = nncf_of(bundle, samples)
    for hint in ("f32", "bf16") if files else ():
        assert bundle.manifest.engine is not None
        engine = replace(bundle.manifest.engine, precision_hint=hint)
        name = f"NNCF, rest {hint}"
        yield Row(name, rewritten(bundle, name, files, engine=engine), "openvino")
    for precision, *more in (("fp16",), ("int8", *calibrated), ("fp8", *calibrated)) if args.tensorrt else ():
        row = ours(f"TensorRT-RTX {precision}", "tensorrt-rtx", f"--{precision}", *more)
        yield Row(row.name, row.bundle, SIMULATED)


def exported(case: Case, name: str, target: str, *options: object) -> Row:
    """What `meta-export` makes of the case."""
    out = folder(name)
    run = run_command(
        "export",
        "--ckpt",
        checkpoint(case),
        "--target",
        target,
        *options,
        "--no-verify",
        "--no-tune",
        "--out",
        out,
    )
    if run.document is None:
        raise SystemExit(f"{name}: the export failed")
    print(f"{name}: exported in {run.seconds:.0f} s", flush=True)
    return Row(name, out, target)


def float32_graph(bundle: Bundle) -> onnx.ModelProto:
    """A bundle's graph with all weights in float32, some of which the file holds in float16."""
    graph = onnx.load_from_string(read_model(bundle))
    return run_passes(graph, ["clean-up"], TARGETS["onnxruntime"].prices)[0]


def folder(name: str) -> Path:
    return FOLDER / name.replace(", ", "-").replace(" ", "-")


def rewritten(bundle: Bundle, name: str, files: dict[str, bytes], **fields: Any) -> Path:
    """The bundle with another model in it."""
    kept = {file: bundle.read(file) for file in bundle.manifest.files if file not in files}
    out = folder(name)
    write_bundle(out, replace(bundle.manifest, files={}, **fields), kept | files)
    return out


def nncf_of(bundle: Bundle, samples: ImageSamples) -> dict[str, bytes]:
    """OpenVINO's model as NNCF quantizes it, told that it is a transformer; nothing without NNCF."""
    try:
        import nncf
    except ImportError:
        return {}
    import openvino

    graph = openvino.Core().read_model(bundle.read(XML), bundle.read(WEIGHTS))
    feeds = nncf.Dataset(list(samples), lambda feed: dict(feed))
    quantized = nncf.quantize(
        graph,
        feeds,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(samples),
        fast_bias_correction=True,
    )
    with tempfile.TemporaryDirectory() as out:
        openvino.save_model(quantized, Path(out) / XML, compress_to_fp16=False)
        return {file: (Path(out) / file).read_bytes() for file in (XML, WEIGHTS)}


def accuracy(truth: dict[str, Any], found: dict[int, Any]) -> dict[str, float]:
    """The figures of all pictures together."""
    if isinstance(next(iter(found.values())), Detections):
        rows, keys = detection_rows(truth, found, SCORE), ["box AP", "mask AP", "TP/(TP+FP+FN)"]
    else:
        rows = segmentation_rows(truth, found)
        keys = [key for key in rows[0] if key.startswith("IoU")]
    whole = next(row for row in rows if row["pictures"] == ALL)
    return {key: whole[key] for key in keys}


def plot(tables: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Accuracy against time, as changes from each table's first row, a table a panel.

    Of the figures of accuracy the one that loses most. Areas are file sizes. Within one point the scale is
    linear, beyond it logarithmic.
    """
    from matplotlib import pyplot

    fig, panels = pyplot.subplots(len(tables), figsize=(9, 4.5 * len(tables)), layout="constrained")
    for axes, (title, cells) in zip(np.atleast_1d(panels), tables.items(), strict=True):
        keys = list(cells[0])
        figures = keys[keys.index("back end") + 1 : keys.index("time / fp32")]
        timed_cells = [cell for cell in cells if cell["time / fp32"] is not None]
        for cell, colour in zip(timed_cells, pyplot.get_cmap("tab20").colors, strict=False):
            x = cell["time / fp32"]
            y = 100 * min(cell[figure] - cells[0][figure] for figure in figures)
            axes.scatter(x, y, s=250 * cell["file / fp32"], color=colour, alpha=0.7, label=cell[""])
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set_yscale("symlog", linthresh=1)
        axes.set(title=title, xlabel="time / float32 on ONNX Runtime", ylabel="points from float32")
        legend = axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=8, frameon=False)
        for handle in legend.legend_handles:
            handle.set_sizes([40])
    fig.savefig(path, dpi=110)


def timed(
    rows: Sequence[Row], picture: Path, rounds: int, threads: int, cpu: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of the model alone, all rows in turns; `cpu`: of the processor instead of the clock."""
    bundle = Bundle.open(rows[0].bundle)
    (feed,) = ImageSamples([picture], bundle.input, bundle.manifest.preprocess)
    opened = {row.name: row.open(threads) for row in rows}
    runs: dict[str, Callable[[int], Any]] = {
        name: lambda turn, run=backend.run: run(feed) for name, backend in opened.items()
    }
    clock = time.process_time if cpu else time.perf_counter
    interleave(runs, 2)
    return interleave(runs, rounds, clock)


def memory(row: Row, threads: int, picture: Path) -> float | None:
    """Peak resident memory in MB of a process that runs one picture as a whole."""
    with Predictor(row.bundle, row.backend, threads=threads, tile=0) as predictor:
        predictor(picture)
    return peak_memory_mb()


if __name__ == "__main__":
    main()
