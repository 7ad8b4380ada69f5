"""What the graph passes are worth: PyTorch's own export, the same after onnxslim, and ours for each target.

    python benchmarks/graph_surgery.py [--case CASE ...] [--no-engines] [--no-time] [--rounds N]

CASE is MODEL@SIDE; backbone and feature pyramid are exported. Counts nodes, bytes moved, and the layers and
memory of TensorRT-RTX engines, which need no GPU to build. Times ONNX Runtime and OpenVINO on the CPU,
interleaved, relative to PyTorch's export on ONNX Runtime. Graphs with ONNX Runtime's own operators run only
there. Tools that are not installed are left out. Exit code 1 if a goal is missed or one of our graphs gives
other results.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from benchmarks.common import (
    Case,
    checkpoint,
    counted,
    interleave,
    machine,
    open_session,
    parser,
    photos,
    ratio,
    save,
    table,
)
from meta_deploy.bundle.manifest import Profile
from meta_deploy.errors import EngineError
from meta_deploy.export.operators import TRANSLATIONS
from meta_deploy.export.options import Options
from meta_deploy.export.sources.checkpoint import input_spec, preprocess_rules
from meta_deploy.export.trace import OPSET, quiet
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.imaging.images import read_image
from meta_deploy.imaging.preprocess import Preprocessor
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.targets import TARGETS
from meta_deploy.targets.openvino import compile_model
from meta_deploy.targets.tensorrt.build import available, build_engine

CASES = ("meta-t-mask-rcnn@512",)
STOCK, SLIM = "stock", "onnxslim"
OURS = ("onnxruntime", "openvino", "tensorrt")  # targets; TensorRT-RTX has TensorRT's passes
STOCK_OPSET = 18  # the exporter's own choice
THREADS = 2
ERROR = "error over stock"
ENGINES = "tensorrt-rtx"
# Times over those of the stock graph on ONNX Runtime.
ORT, OPENVINO = "ONNX Runtime / stock", "OpenVINO / stock"
OVER_OURS = "OpenVINO / ours for ONNX Runtime there"
# At most so much, of the one of our graphs that does best at it: each is for another target.
GOALS: dict[str, dict[str, float]] = {
    "meta-t-mask-rcnn@512x512": {
        "nodes": 1400,
        "moves": 450,
        "fp16 layers": 450,
        "fp16 activation MB": 40,
        "fp16 build s": 10,
        "fp32 layers": 600,
        "fp32 build s": 10,
        ORT: 0.88,
        OPENVINO: 0.72,
        OVER_OURS: 0.90,
    },
}

Measures = dict[str, Any]  # of one graph, by name; None where it cannot be measured


class Features(nn.Module):
    """A detector's or segmenter's backbone and feature pyramid."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.extract_features(images))  # type: ignore[operator]


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__, "graph_surgery")
    p.add_argument("--case", nargs="+", type=Case.parse, metavar="CASE", help=f"default: {' '.join(CASES)}")
    p.add_argument("--no-engines", action="store_true", help="build no engines")
    p.add_argument("--no-time", action="store_true", help="time nothing")
    p.add_argument("--rounds", type=int, default=10, help="timed runs of each graph (default: %(default)s)")
    args = p.parse_args(argv)
    here = machine()
    if here["load_before"] > 0.5 and not args.no_time:
        print(f"the machine is busy (load {here['load_before']}): OpenVINO suffers most", file=sys.stderr)
    results: dict[str, Any] = {}
    for case in args.case or map(Case.parse, CASES):
        with tempfile.TemporaryDirectory() as folder:
            graphs = measured(case, Path(folder), args)
        goals = {ERROR: PRECISIONS["fp32"].tolerances["maps"], **GOALS.get(str(case), {})}
        results[str(case)] = {"graphs": graphs, "goals": goals, "missed": missed(graphs, goals)}
        print(f"{case}\n\n{side_by_side(graphs, goals)}\n")
        for line in results[str(case)]["missed"]:
            print(f"missed: {line}")
    save(args.json, machine=here, rounds=args.rounds, threads=THREADS, cases=results)
    return int(any(result["missed"] for result in results.values()))


def measured(case: Case, folder: Path, args: Any) -> dict[str, Measures]:
    """Each graph's measures. Graphs are kept in files, so that only one large graph is in memory."""
    model, images = subject(case, args.photos)
    files: dict[str, Path] = {}
    graphs: dict[str, Measures] = {}
    for name, proto, seconds in make_graphs(model, images):
        files[name] = folder / f"{len(files)}.onnx"
        onnx.save(proto, files[name])
        graphs[name] = {"made in s": seconds, **counted(proto)}
        print(f"{name}: {seconds:.1f} s, {graphs[name]['nodes']:,} nodes", file=sys.stderr)
        del proto
        gc.collect()  # graphs refer to themselves in circles
    del model
    for name, error in errors(files, images.numpy()).items():
        graphs[name][ERROR] = error
    for name, path in files.items():
        graphs[name] |= built(name, path) if not args.no_engines else {}
    if not args.no_time:
        for name, times in timed(files, images.numpy(), args.rounds).items():
            graphs[name] |= times
    return graphs


# --- the graphs ---------------------------------------------------------------------------------------------


def subject(case: Case, folder: Path | None) -> tuple[nn.Module, Tensor]:
    """The module to export, and an image for it."""
    loaded = load_model(checkpoint(case))
    spec = input_spec(case.size or loaded.config.input_size, Options())
    preprocess = Preprocessor(spec, preprocess_rules(loaded.config, spec))
    batch, _ = preprocess([read_image(photos(folder, 1)[0])])
    return Features(loaded.model).eval(), torch.from_numpy(batch)


def make_graphs(model: nn.Module, images: Tensor) -> Iterator[tuple[str, onnx.ModelProto, float]]:
    """Each graph with its name and the seconds it took; ours without tracing."""
    program = traced(model, images)
    stock, seconds = clocked(partial(translate, program, optimize=True, opset=STOCK_OPSET))
    yield STOCK, stock, seconds
    if importlib.util.find_spec("onnxslim") is None:
        print("onnxslim is not installed: left out", file=sys.stderr)
    else:
        import onnxslim

        yield SLIM, *clocked(partial(onnxslim.slim, stock))
    del stock
    literal = translate(program)
    for name in OURS:
        copy = onnx.ModelProto()
        copy.CopyFrom(literal)
        target = TARGETS[name]
        (proto, _), seconds = clocked(partial(run_passes, copy, list(target.passes), target.prices))
        yield f"ours: {name}", proto, seconds


def traced(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The model as an exported program."""
    with torch.no_grad(), quiet():
        return torch.export.export(model, (images,), strict=False)


def translate(
    program: torch.export.ExportedProgram, optimize: bool = False, opset: int = OPSET
) -> onnx.ModelProto:
    """The program in ONNX: translated as in our export, or with PyTorch's own optimizer."""
    with quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=optimize,
            opset_version=opset,
            custom_translation_table=None if optimize else TRANSLATIONS["native"],
            input_names=["images"],
            verbose=False,
        )
    assert exported is not None
    return exported.model_proto


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    """A call's result and its seconds; what it prints goes to standard error."""
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        result = call()
    return result, time.perf_counter() - began


# --- the measures -------------------------------------------------------------------------------------------


def errors(files: dict[str, Path], images: np.ndarray) -> dict[str, float | None]:
    """Each graph's largest difference from the stock graph's outputs, relative to their largest values."""

    def outputs(path: Path) -> list[np.ndarray]:
        return open_session(onnx.load(path), THREADS).run(None, {"images": images})

    expected = outputs(files[STOCK])
    found: dict[str, float | None] = {STOCK: None}
    for name, path in files.items():
        if name != STOCK:
            pairs = zip(outputs(path), expected, strict=True)
            found[name] = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    return found


def built(name: str, path: Path) -> Measures:
    """Layers, memory and build time of the graph's engines in float16 and float32."""
    proto = onnx.load(path)
    if not available(ENGINES):
        print("tensorrt-rtx is not installed: no engines", file=sys.stderr)
        return {}
    if not standard(proto):
        return {}
    result: Measures = {}
    for precision in ("fp16", "fp32"):
        try:
            engine = engine_measures(PRECISIONS[precision].convert(proto)[0])
        except EngineError as error:
            print(f"{name} in {precision} does not build: {error}", file=sys.stderr)
            continue
        print(f"{name} in {precision}: engine built in {engine['build s']:.1f} s", file=sys.stderr)
        result |= {f"{precision} {what}": value for what, value in engine.items()}
    return result


def engine_measures(proto: onnx.ModelProto) -> Measures:
    """Layers, memory and build time of a TensorRT-RTX engine, for one static input. Raises EngineError."""
    images = proto.graph.input[0]
    shape = tuple(dim.dim_value for dim in images.type.tensor_type.shape.dim)
    profile = Profile(images.name, shape, shape, shape)
    section = build_engine(proto.SerializeToString(), ENGINES, [profile]).section()
    return {
        "layers": section.layers,
        "generated": section.generated_kernels,
        "attention": section.fused_attention,
        "activation MB": section.activation_mb,
        "build s": section.seconds,
    }


def standard(proto: onnx.ModelProto) -> bool:
    """Whether all operators are standard ONNX."""
    return all(node.domain in ("", "ai.onnx") for node in proto.graph.node)


def timed(files: dict[str, Path], images: np.ndarray, rounds: int) -> dict[str, Measures]:
    """Interleaved times on ONNX Runtime and OpenVINO, relative to the stock graph on ONNX Runtime."""
    runs: dict[str, Callable[[int], Any]] = {}
    openvino = importlib.util.find_spec("openvino") is not None
    if not openvino:
        print("openvino is not installed: left out", file=sys.stderr)
    for name, path in files.items():
        proto = onnx.load(path)
        session = open_session(proto, THREADS)
        runs[f"{name}: {ORT}"] = lambda turn, session=session: session.run(None, {"images": images})
        if openvino:  # which knows ONNX Runtime's fused attention too
            # As the runtime's back end: float32, one stream.
            request = compile_model(path.read_bytes(), b"", "f32", THREADS).create_infer_request()
            runs[f"{name}: {OPENVINO}"] = lambda turn, request=request: request.infer([images])
    interleave(runs, 2)  # to warm up
    times = interleave(runs, rounds)
    base = times[f"{STOCK}: {ORT}"]
    result: dict[str, Measures] = {name: {} for name in files}
    for name in files:
        for where in (ORT, OPENVINO):
            if (own := times.get(f"{name}: {where}")) is not None:
                result[name][f"{where.removesuffix(' / stock')} ms"] = float(np.median(own))
                result[name][where] = ratio(own, base)
        if (own := times.get(f"{name}: {OPENVINO}")) is not None:
            result[name]["OpenVINO / its stock"] = ratio(own, times[f"{STOCK}: {OPENVINO}"])
            result[name][OVER_OURS] = ratio(own, times[f"ours: onnxruntime: {ORT}"])
    return result


# --- the table ----------------------------------------------------------------------------------------------


def side_by_side(graphs: dict[str, Measures], goals: dict[str, float]) -> str:
    """A table with a row per measure, a column per graph, and the goals."""
    names = list(dict.fromkeys(name for measures in graphs.values() for name in measures))
    rows = []
    for name in names:
        values = {graph: _or_dash(measures.get(name)) for graph, measures in graphs.items()}
        rows.append({"": name, **values, "goal": f"<= {goals[name]:g}" if name in goals else None})
    return table(rows)


def _or_dash(value: Any) -> Any:
    return "-" if value is None else value


def missed(graphs: dict[str, Measures], goals: dict[str, float]) -> list[str]:
    """The goals that none of our graphs meets; the goal for the error holds for every graph."""
    ours = [measures for graph, measures in graphs.items() if graph.startswith("ours")]
    lines = []
    for name, limit in goals.items():
        values = [measures[name] for measures in ours if measures.get(name) is not None]
        best = max if name == ERROR else min
        if values and not best(values) <= limit:  # nor is nan
            lines.append(f"{name} {best(values):.4g}, goal {limit:g}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
