"""Models side by side in one pipeline: nodes, bytes moved, latency, memory and engines, each over the first.

    python benchmarks/backbones.py [CASE,CASE,… …] [--part backbone] [--eager] [--no-engines] [--no-time]
        [--profile]

CASE is MODEL@SIDE or MODEL@HxW, with random weights, or a checkpoint: FILE.pth or FILE.pth@SIDE. Cases joined
by commas make a table: each is compared with the first of them, and their runs are interleaved. Engines are
TensorRT-RTX's in float16, built without a GPU and not run. Peak memory is what a process of its own takes to
open the graph and to run it. `--profile` says where ONNX Runtime's time goes, by class of operators. What is
not installed is left out.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    in_fresh_process,
    interleave,
    machine,
    parser,
    photos,
    ratio,
    save,
    table,
)
from benchmarks.graph_surgery import engine_measures
from meta_deploy.bundle.manifest import InputSpec
from meta_deploy.errors import EngineError
from meta_deploy.export.options import Options
from meta_deploy.export.sources.checkpoint import input_spec, preprocess_rules
from meta_deploy.export.trace import drop_outputs, export_onnx
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.imaging.images import read_image
from meta_deploy.imaging.preprocess import Preprocessor
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.ort import onnxruntime
from meta_deploy.report.profile import profile
from meta_deploy.report.schema import CLASSES, ClassRow
from meta_deploy.report.subject import peak_memory_mb
from meta_deploy.targets import TARGETS
from meta_deploy.targets.onnxruntime import session_options
from meta_deploy.targets.openvino import compile_model
from meta_deploy.targets.tensorrt.build import available
from meta_deploy.tasks import get_task

GROUPS = ("meta-t-mask-rcnn@512,vit-adapter-t-mask-rcnn@512",)
ENGINES = "tensorrt-rtx"
EAGER = "PyTorch"
# What runs a graph: its module, and the target whose graph it is.
LIBRARIES = {"ONNX Runtime": ("onnxruntime", "onnxruntime"), "OpenVINO": ("openvino", "openvino")}
WARM_UP, RUNS = 2, 8  # RUNS under the profiler, of which the fastest counts
COMPARED = ("feature_", "map_", "logits")  # outputs that can be compared number by number

Row = dict[str, Any]


class Backbone(nn.Module):
    """A model's backbone alone, called as a model is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.get_submodule("backbone")

    def forward(self, images: Tensor, stages: bool = False) -> dict[str, Tensor]:
        return {f"map_{i}": x for i, x in enumerate(self.backbone(images))}


PARTS: dict[str, Callable[[nn.Module], nn.Module]] = {"model": lambda model: model, "backbone": Backbone}


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__ or "", "backbones")
    p.add_argument(
        "groups", nargs="*", type=group, metavar="CASE,CASE,…", help=f"default: {' '.join(GROUPS)}"
    )
    p.add_argument("--part", choices=PARTS, default="model", help="what of it (default: %(default)s)")
    p.add_argument("--eager", action="store_true", help="time PyTorch too, without any export")
    p.add_argument("--no-engines", action="store_true", help="build no engines")
    p.add_argument("--no-time", action="store_true", help="time nothing, and take no memory")
    p.add_argument("--profile", action="store_true", help="time by class of operators, on ONNX Runtime")
    p.add_argument("--rounds", type=int, default=10, help="timed runs of each (default: %(default)s)")
    p.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    args = p.parse_args(argv)
    here, tables = machine(), []
    torch.set_num_threads(args.threads)
    for cases in args.groups or map(group, GROUPS):
        with tempfile.TemporaryDirectory() as folder:
            found = measured(cases, Path(folder), args)
        print(*map(table, found.values()), sep="\n\n", end="\n\n", flush=True)
        tables.append(found)
        save(args.json, machine=here, part=args.part, rounds=args.rounds, threads=args.threads, tables=tables)
    return 0


def group(text: str) -> list[Case]:
    """Cases joined by commas."""
    return [Case.parse(part) for part in text.split(",")]


def measured(cases: Sequence[Case], folder: Path, args: Any) -> dict[str, list[Row]]:
    """`rows` with the figures of each case, `ratios` to the first's, and `classes` of operators."""
    rows, contenders = [], []
    for i, case in enumerate(cases):
        subject = Subject.load(case, args.part, args.photos)
        row, own = graphs(subject, folder / str(i), not args.no_engines)
        if args.eager:
            own.append(Contender(EAGER, checkpoint(case), subject.images, args.threads, args.part))
        rows.append(row)
        contenders.append(own)
        del subject
        gc.collect()  # graphs refer to themselves in circles
    classes = {"classes": by_class(rows, contenders)} if args.profile else {}
    if args.no_time:
        return {"rows": rows, "ratios": [ratios(row, rows[0]) for row in rows], **classes}
    for row, own in zip(rows, contenders, strict=True):
        print(f"{row['model']}: taking its memory", file=sys.stderr)
        row |= {f"{one.library} peak MB": peak_mb(one) for one in own}
    print("timing all of them in turns", file=sys.stderr)
    times = timed(contenders, args.rounds)
    compared = [ratios(row, rows[0]) for row in rows]
    for row, over, own in zip(rows, compared, times, strict=True):
        row |= {f"{library} ms": float(np.median(values)) for library, values in own.items()}
        over |= {f"{library} ms": ratio(values, times[0][library]) for library, values in own.items()}
    return {"rows": rows, "ratios": compared, **classes}


def ratios(row: Row, first: Row) -> Row:
    """A row's figures over the first row's."""
    return {
        name: value if isinstance(value, str) else value / first[name] if value and first[name] else None
        for name, value in row.items()
        if name != "difference"
    }


# --- the graphs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What is exported, and an image (1, 3, H, W) for it; `outputs` are those that ship."""

    case: Case
    module: nn.Module
    spec: InputSpec
    outputs: list[str]
    images: np.ndarray

    @classmethod
    def load(cls, case: Case, part: str, folder: Path | None) -> Subject:
        loaded = load_model(checkpoint(case))
        spec = input_spec(case.size or loaded.config.input_size, Options())
        preprocess = Preprocessor(spec, preprocess_rules(loaded.config, spec))
        images, _ = preprocess([read_image(photos(folder, 1)[0])])
        module = PARTS[part](loaded.model).eval()
        outputs = list(get_task(loaded.config.task).outputs) if part == "model" else []
        return cls(case, module, spec, outputs, images)

    def shipped(self, graph: onnx.ModelProto) -> onnx.ModelProto:
        """A graph without the outputs that are there to be compared."""
        return drop_outputs(graph, self.outputs) if self.outputs else graph

    def difference(self, graph: onnx.ModelProto) -> float:
        """The largest difference of a map from PyTorch's, relative to that map's largest value."""
        with torch.inference_mode():
            expected = self.module(torch.from_numpy(self.images), stages=True)
        names = [name for name in expected if name.startswith(COMPARED)]
        session = onnxruntime.InferenceSession(graph.SerializeToString(), session_options(2))
        outputs = session.run(names, {self.spec.name: self.images})
        pairs = zip((expected[name].numpy() for name in names), outputs, strict=True)
        return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def graphs(subject: Subject, folder: Path, engines: bool) -> tuple[Row, list[Contender]]:
    """The figures that need no clock, and the graphs to time; each form of operators is traced once."""
    folder.mkdir()
    literals: dict[str, onnx.ModelProto] = {}

    def graph(name: str) -> tuple[onnx.ModelProto, list[Any]]:
        target = TARGETS[name]
        form = target.choose_operators(None)
        if form not in literals:
            print(f"{subject.case}: tracing, {form} operators", file=sys.stderr)
            literals[form] = export_onnx(subject.module, subject.spec, form)
        copy = onnx.ModelProto()
        copy.CopyFrom(literals[form])
        return run_passes(copy, list(target.passes), target.prices)

    parameters = sum(p.numel() for p in subject.module.parameters())
    row: Row = {"model": str(subject.case), "M parameters": parameters / 1e6}
    contenders = []
    for library, (module, target) in LIBRARIES.items():
        if importlib.util.find_spec(module) is None:
            print(f"{module} is not installed: left out", file=sys.stderr)
            continue
        made, passes = graph(target)
        if target == "onnxruntime":
            row |= {
                "nodes": passes[-1].nodes_after,
                "MB moved": passes[-1].bytes_after / 1e6,  # of a detector what is known before running
                "difference": subject.difference(made),
            }
        path = folder / f"{target}.onnx"
        path.write_bytes(subject.shipped(made).SerializeToString())
        contenders.append(Contender(library, path, subject.images, torch.get_num_threads()))
    if engines:
        row |= engine(partial(graph, ENGINES), subject)
    return row, contenders


def engine(graph: Callable[[], tuple[onnx.ModelProto, Any]], subject: Subject) -> Row:
    """Layers and activation memory of the engine in float16; nothing where it cannot be built."""
    figures: Row = dict.fromkeys(("layers", "attention", "activation MB"))
    if not available(ENGINES):
        print(f"{ENGINES} is not installed: no engines", file=sys.stderr)
        return {}
    feeds, stay = [{subject.spec.name: subject.images}], TARGETS[ENGINES].float32_operators["fp16"]
    shipped = subject.shipped(graph()[0])
    print(f"{subject.case}: building an engine", file=sys.stderr)
    try:
        built = engine_measures(PRECISIONS["fp16"].convert(shipped, feeds, stay)[0])
        figures = {name: built[name] for name in figures}
    except EngineError as error:
        print(f"{subject.case}: no engine: {error}", file=sys.stderr)
    return {f"fp16 {name}": value for name, value in figures.items()}


# --- time and memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A graph and the library that runs it; or, for PyTorch, a checkpoint and what of the model is run."""

    library: str
    path: Path
    images: np.ndarray
    threads: int
    part: str = ""

    def open(self) -> Callable[[int], Any]:
        """What runs it once; the argument is not used."""
        if self.library == EAGER:
            torch.set_num_threads(self.threads)
            return partial(self._eager, PARTS[self.part](load_model(self.path).model).eval())
        if self.library == "OpenVINO":  # as the runtime's back end: float32, one stream
            request = compile_model(self.path.read_bytes(), b"", "f32", self.threads).create_infer_request()
            return lambda turn: request.infer([self.images])
        session = onnxruntime.InferenceSession(self.path.read_bytes(), session_options(self.threads))
        return lambda turn: session.run(None, {"images": self.images})

    def profile(self) -> Sequence[ClassRow]:
        """Where the fastest of some runs goes, of ONNX Runtime."""
        feed, options = {"images": self.images}, session_options(self.threads)
        return profile(self.path.read_bytes(), feed, options, self.path.parent, RUNS, best=True).classes

    def _eager(self, module: nn.Module, turn: int) -> None:
        with torch.inference_mode():
            module(torch.from_numpy(self.images))


def timed(groups: Sequence[Sequence[Contender]], rounds: int) -> list[dict[str, list[float]]]:
    """Milliseconds of each model's runs by library, all interleaved."""
    calls = {f"{i} {one.library}": one.open() for i, contenders in enumerate(groups) for one in contenders}
    interleave(calls, WARM_UP)
    times = interleave(calls, rounds)
    return [
        {one.library: times[f"{i} {one.library}"] for one in contenders}
        for i, contenders in enumerate(groups)
    ]


def by_class(rows: Sequence[Row], groups: Sequence[Sequence[Contender]]) -> list[Row]:
    """Nodes, milliseconds and GFLOP of each class of operators on ONNX Runtime, for each model."""
    found: dict[str, dict[str, ClassRow]] = {}
    for row, contenders in zip(rows, groups, strict=True):
        for one in contenders:
            if one.library == "ONNX Runtime":
                print(f"{row['model']}: profiling", file=sys.stderr)
                found[row["model"]] = {each.name: each for each in one.profile()}
    return [
        {
            "class": name,
            **{
                f"{model}: {what}": value(own[name]) if name in own else 0
                for model, own in found.items()
                for what, value in _OF_A_CLASS.items()
            },
        }
        for name in CLASSES
        if any(name in own for own in found.values())
    ]


_OF_A_CLASS: dict[str, Callable[[ClassRow], float]] = {
    "nodes": lambda row: row.nodes,
    "ms": lambda row: row.ms,
    "GFLOP": lambda row: row.flops / 1e9,
    "MB": lambda row: (row.bytes_read + row.bytes_written) / 1e6,
}


def peak_mb(contender: Contender) -> float | None:
    """What a process takes to open a model and to run it twice; None where the system does not tell."""
    return in_fresh_process(_taken, contender)


def _taken(contender: Contender) -> float | None:
    if contender.library in LIBRARIES:
        importlib.import_module(LIBRARIES[contender.library][0])  # the library itself is not counted
    before = _resident_mb()
    run = contender.open()
    for turn in range(2):
        run(turn)
    after = peak_memory_mb()
    return None if before is None or after is None else after - before


def _resident_mb() -> float | None:
    """What this process holds now, from Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:")), None)


if __name__ == "__main__":
    sys.exit(main())
