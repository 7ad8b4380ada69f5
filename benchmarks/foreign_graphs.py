"""Graphs of models that are not ours, as exported and after each optimizer: nodes, engines, times, agreement.

    pip install -e '.[bench]'
    python benchmarks/foreign_graphs.py [--models NAME ...] [--exporters dynamo torchscript]
        [--only graphs engines times polygraphy] [--again] [--seconds N]

Models of timm and transformers with random weights, nothing is downloaded; NAME+batch leaves the batch open.
Optimizers: onnxslim, onnxscript's, ONNX Runtime's own (basic, offline), and our passes for each target; each
runs in a process of its own. Engines are TensorRT-RTX's in float16, which need no GPU to build; for ours it
is the one that an export without a limit of time would choose. Times are those of ten models, on two threads.

What is measured is in the JSON file at once, and not measured again without `--again`: so a run that was
stopped, or that stops by itself after `--seconds`, goes on when it is started again. The whole table is
printed at the end. Exit code 1 if ours gives other results, leaves more nodes or layers than the best of the
others, more activation memory than there is as exported, or takes longer.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx

from benchmarks.common import WORK, counted, interleave, machine, open_session, parser, ratio, table
from benchmarks.optimizers import OURS, STOCK, names, optimized, ort_optimized
from meta_deploy.bundle.files import atomic_write
from meta_deploy.bundle.manifest import Profile
from meta_deploy.errors import EngineError
from meta_deploy.export.speed import opened
from meta_deploy.export.tune import by_build, by_time, candidates, lightest, pipelines
from meta_deploy.graph.attention import attention_count
from meta_deploy.graph.graph import to_graph
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.targets import TARGETS
from meta_deploy.targets.openvino import compile_model
from meta_deploy.targets.tensorrt.build import available, build_engine

STEPS = ("graphs", "engines", "times", "polygraphy")
EXPORTERS = ("dynamo", "torchscript")
BATCH = "+batch"  # after a name: the batch is left open
MODELS = (
    *("vit", "deit", "beit", "eva02", "dinov3", "swin", "swinv2", "sam", "davit", "maxvit", "mvitv2"),
    *("pvtv2", "xcit", "levit", "mobilevit", "edgenext", "efficientvit", "convnext", "cvt", "segformer"),
    *("dinov2", "sam-small", "vitpose", "dpt", "mask2former", "rtdetr"),
    *("vit+batch", "deit+batch", "swin+batch", "pvtv2+batch", "segformer+batch", "dinov2+batch"),
)
TIMED = ("vit", "beit", "eva02", "swin", "swinv2", "xcit", "levit", "convnext", "segformer", "mask2former")
QUERIES = ("rtdetr",)  # its queries are the best of many, and random ones all but tie
TENSORRT = "ours: TensorRT"
ENGINES = "tensorrt-rtx"
THREADS, ROUNDS, TUNING = 2, 15, 10.0
TOLERANCE = 1e-5
SLOWER = 1.02  # than the best of the others, at most

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__ or "", "foreign_graphs")
    p.add_argument("--models", nargs="+", metavar="NAME", default=list(MODELS), help="default: all")
    p.add_argument("--exporters", nargs="+", choices=EXPORTERS, default=list(EXPORTERS))
    p.add_argument("--forms", nargs="+", choices=[STOCK, *names()], help="default: all")
    p.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="what to measure")
    p.add_argument("--again", action="store_true", help="measure what has been measured before, too")
    p.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so many")
    args = p.parse_args(argv)
    records, end = Records(args.json), time.monotonic() + args.seconds
    if args.again:
        records.forget(args)
    for name in args.models:
        for exporter in args.exporters:
            case = Case(name, exporter, args.forms or [STOCK, *names()], records)
            for step in filter(args.only.__contains__, STEPS):
                if not case.measure(step, end):
                    print("stopped: run it again to go on", file=sys.stderr)
                    return 2
    return tell(records)


class Records:
    """Rows of what was measured, in a file that is written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.machine, self.rows = kept.get("machine") or machine(), kept.get("rows", [])

    def row(self, case: str, form: str) -> Row:
        """The row of a form of a case, a new one if there is none."""
        found = next((row for row in self.rows if (row["model"], row["graph"]) == (case, form)), None)
        if found is None:
            found = {"model": case, "graph": form}
            self.rows.append(found)
        return found

    def forget(self, args: argparse.Namespace) -> None:
        """What is to be measured again."""
        cases = [f"{name}, {exporter}" for name in args.models for exporter in args.exporters]
        for row in self.rows:
            if row["model"] in cases and (args.forms is None or row["graph"] in args.forms):
                for step in args.only:
                    row.pop(step, None)

    def keep(self) -> None:
        whole = {"machine": self.machine, "rows": self.rows, "missed": misses(self.rows)}
        with atomic_write(self.path) as stream:
            stream.write(json.dumps(whole, indent=1, default=float).encode() + b"\n")


class Case:
    """A model by one exporter: its graph in all forms, which are files, and what is measured of them."""

    def __init__(self, name: str, exporter: str, forms: Sequence[str], records: Records) -> None:
        self.name, self.exporter, self.forms, self.records = name, exporter, forms, records
        self.title = f"{name}, {exporter}"
        self.folder = WORK / "foreign" / f"{name}-{exporter}"

    def measure(self, step: str, end: float) -> bool:
        """Measure what is missing of one step; False where the time is over before that."""
        if step == "times" and self.name not in TIMED:
            return True
        measure: Callable[[str], dict[str, Row]] = getattr(self, step)
        for form in self.forms:
            if step in self.records.row(self.title, form):
                continue
            if time.monotonic() > end:
                return False
            try:
                self.export()
                measured = measure(form)
            except Exception as error:  # of models, exporters and tools that are not ours, anything
                reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
                measured = {each: {"failed": reason} for each in (self.forms if self.lacks() else [form])}
            for each, values in measured.items():
                self.records.row(self.title, each)[step] = values
                print(f"{self.title}, {each}: {json.dumps(values, default=float)}", file=sys.stderr)
            self.records.keep()
        return True

    # --- graphs -----------------------------------------------------------------------------------------

    def file(self, form: str) -> Path:
        return self.folder / f"{re.sub('[^a-z]+', '-', form.lower())}.onnx"

    def export(self) -> None:
        """Write the graph as exported and images for it, if they are missing."""
        if self.lacks():
            from benchmarks.foreign_models import exported  # which imports PyTorch

            proto, images = exported(self.name, self.exporter)
            self.folder.mkdir(parents=True, exist_ok=True)
            np.save(self.folder / "images.npy", images)
            onnx.save(proto, self.file(STOCK))

    def lacks(self) -> bool:
        return not self.file(STOCK).exists()

    def images(self) -> np.ndarray:
        return np.load(self.folder / "images.npy")

    def graphs(self, form: str) -> dict[str, Row]:
        """Nodes, bytes and agreement of a form; what it takes to make it."""
        file, costs = self.file(form), {"seconds": None, "peak MB": None}
        if form != STOCK:
            costs = optimized(form, self.file(STOCK), file)
        proto, feed = onnx.load(file), {"x": self.images()}
        found = open_session(proto, 1).run(None, feed)
        expected = open_session(onnx.load(self.file(STOCK)), 1).run(None, feed)
        if self.name in QUERIES:
            found = in_order(found, expected)
        pairs = zip(found, expected, strict=True)
        differences = [np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]
        counts = {**counted(proto), **attentions(proto), "run": len(ort_optimized(proto).graph.node)}
        return {form: {**costs, **counts, "difference": float(max(differences))}}

    # --- engines ----------------------------------------------------------------------------------------

    def engines(self, form: str) -> dict[str, Row]:
        """The engine of a form; of ours, the one that tuning would take of those that it tries."""
        runs_elsewhere = form in OURS and form != TENSORRT
        if self.name.endswith(BATCH) or runs_elsewhere or not available(ENGINES):
            return {form: {}}
        target = TARGETS[ENGINES]
        if form != TENSORRT:
            proto = onnx.load(self.file(form))
            if not standard(proto):
                return {form: {}}
            ((_, low),) = candidates({form: []}, proto, proto, target, "fp16")
            return {form: engine_of(low)}
        built: list[Row] = []

        def figures(graph: onnx.ModelProto) -> Row:
            built.append(engine_of(graph))
            return {key: built[-1][key] for key in ("layers", "activation_mb", "plan_mb")}

        tuning = by_build(self.candidates(ENGINES), figures, float("inf"))
        if tuning is None:
            return {form: built[0]}
        best = tuning.tried.index(lightest(tuning.tried))
        tried = {each.name: row for each, row in zip(tuning.tried, built, strict=True)}
        return {form: {**built[best], "chosen": tuning.chosen, "tried": tried}}

    def candidates(self, target: str) -> Iterator[tuple[str, onnx.ModelProto]]:
        """What tuning tries, as graphs."""
        stock, of = onnx.load(self.file(STOCK)), TARGETS[target]
        full, rows = run_passes(stock, list(of.passes), of.prices)
        cleaned = run_passes(stock, ["clean-up"], of.prices)[0]
        precision = "fp16" if target == ENGINES else "fp32"
        return candidates(pipelines(rows, of.doubtful), full, cleaned, of, precision)

    # --- times ------------------------------------------------------------------------------------------

    def times(self, form: str) -> dict[str, Row]:
        """Of all forms, in turns, on ONNX Runtime and OpenVINO; ours as tuned for each."""
        runs: dict[str, Callable[[int], Any]] = {}
        chosen: dict[str, str] = {}
        for each in (each for each in (STOCK, *names()) if each not in OURS):
            try:
                proto = onnx.load(self.file(each))
                runs[f"{each}: ORT"] = on_onnxruntime(proto, self.images())
                runs[f"{each}: OpenVINO"] = on_openvino(proto, self.images())
            except Exception as error:  # of other tools' graphs, anything
                print(f"{self.title}, {each}: {str(error).splitlines()[0][:150]}", file=sys.stderr)
        for where, each, start in (
            ("ORT", "ours: ONNX Runtime", on_onnxruntime),
            ("OpenVINO", "ours: OpenVINO", on_openvino),
        ):
            chosen[each], proto = self.tuned(OURS[each])
            runs[f"{each}: {where}"] = start(proto, self.images())
        interleave(runs, 2)  # to warm up
        times = interleave(runs, ROUNDS)
        rows: dict[str, Row] = {each: {} for each in self.forms}
        for run, own in times.items():
            each, _, where = run.rpartition(": ")
            base = times[f"{STOCK}: {where}"]
            measured = {f"{where} ms": float(np.median(own)), where: ratio(own, base)}
            rows.setdefault(each, {}).update(measured | ({"chosen": chosen[each]} if each in chosen else {}))
        return rows

    def tuned(self, target: str) -> tuple[str, onnx.ModelProto]:
        """The pipeline that an export would choose for a CPU, and its graph."""
        images = self.images()
        profile = Profile("x", images.shape, images.shape, images.shape)
        graphs = dict(self.candidates(target))
        if len(graphs) == 1:
            return next(iter(graphs.items()))
        start = partial(opened, TARGETS[target], profiles=[profile], precision="fp32")
        tuning = by_time(iter(graphs.items()), lambda graph: start(graph=graph), {"x": images}, TUNING)
        chosen = next(iter(graphs)) if tuning is None else tuning.chosen
        return chosen, graphs[chosen]

    # --- from outside -----------------------------------------------------------------------------------

    def polygraphy(self, form: str) -> dict[str, Row]:
        """Whether Polygraphy finds the outputs of ours equal to those as exported, on inputs of its own."""
        if form not in OURS or self.name in QUERIES or shutil.which("polygraphy") is None:
            return {form: {}}
        outputs = self.folder / "outputs.json"
        shape = "x:[{}]".format(",".join(map(str, self.images().shape)))
        common = ["--onnxrt", "--input-shapes", shape, "--val-range", "[-1,1]"]
        stock = ["run", self.file(STOCK), *common, "--save-outputs", outputs]
        if not outputs.exists() and not polygraphy(*stock):
            return {form: {}}  # it does not run as exported
        bounds = ["--atol", "1e-3", "--rtol", "1e-3", "--check-error-stat", "max"]
        passed = polygraphy("run", self.file(form), *common, "--load-outputs", outputs, *bounds)
        return {form: {"passed": passed}}


def polygraphy(*arguments: object) -> bool:
    """Run Polygraphy's command; whether it succeeds."""
    return subprocess.run(["polygraphy", *map(str, arguments)], capture_output=True).returncode == 0


def in_order(found: list[np.ndarray], expected: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs of queries (1, N, …) in the order of those expected: each where the first output is nearest."""
    distances = np.abs(expected[0][0][:, None] - found[0][0][None]).max(-1)
    return [output[:, distances.argmin(1)] for output in found]


def attentions(proto: onnx.ModelProto) -> Row:
    """Attentions that are written out, and those that are one node."""
    fused = sum(node.op in ("Attention", "MultiHeadAttention") for node in to_graph(proto).nodes)
    return {"attentions": attention_count(proto), "fused": fused}


def standard(proto: onnx.ModelProto) -> bool:
    """Whether all operators are standard ONNX."""
    return all(node.domain in ("", "ai.onnx") for node in proto.graph.node)


def engine_of(proto: onnx.ModelProto) -> Row:
    """Layers and memory of a TensorRT-RTX engine. Raises EngineError."""
    section = build_engine(proto.SerializeToString(), ENGINES, ()).section()
    if not section.layers:
        raise EngineError("its build does not tell what is inside")
    return {
        "layers": section.layers,
        "attention": section.fused_attention,
        "activation_mb": section.activation_mb,
        "plan_mb": section.plan_mb,
    }


def on_onnxruntime(proto: onnx.ModelProto, images: np.ndarray) -> Callable[[int], Any]:
    session = open_session(proto, THREADS)
    return lambda turn: session.run(None, {"x": images})


def on_openvino(proto: onnx.ModelProto, images: np.ndarray) -> Callable[[int], Any]:
    request = compile_model(proto.SerializeToString(), b"", "f32", THREADS).create_infer_request()
    return lambda turn: request.infer([images])


# --- telling ------------------------------------------------------------------------------------------------

OTHERS = ("onnxslim", "onnxscript", "ONNX Runtime, offline")
BEST = "best of the others"
# What a row of the table shows, of which step, in which forms.
COLUMNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "nodes: exported, onnxslim, onnxscript, ORT": ("graphs", "nodes", (STOCK, *OTHERS)),
    "ours: ORT, OpenVINO, TensorRT": ("graphs", "nodes", tuple(OURS)),
    "moves: exported, ours": ("graphs", "moves", (STOCK, "ours: ONNX Runtime")),
    "MB moved": ("graphs", "MB moved", (STOCK, "ours: ONNX Runtime")),
    "difference": ("graphs", "difference", ("ours: ONNX Runtime",)),
    "seconds: onnxslim, ours": ("graphs", "seconds", ("onnxslim", "ours: ONNX Runtime")),
    "peak MB": ("graphs", "peak MB", ("onnxslim", "ours: ONNX Runtime")),
    "layers: exported, onnxslim, best, ours": ("engines", "layers", (STOCK, "onnxslim", BEST, TENSORRT)),
    "fused attention": ("engines", "attention", (STOCK, "onnxslim", TENSORRT)),
    "activation MB": ("engines", "activation_mb", (STOCK, "onnxslim", TENSORRT)),
    "ORT: best, ours": ("times", "ORT", (BEST, "ours: ONNX Runtime")),
    "OpenVINO: best, ours": ("times", "OpenVINO", (BEST, "ours: OpenVINO")),
    "Polygraphy": ("polygraphy", "passed", ("ours: ONNX Runtime",)),
}


def value(row: Row, step: str, key: str) -> Any:
    return (row.get(step) or {}).get(key)


def cases(rows: list[Row]) -> Iterator[tuple[str, dict[str, Row]]]:
    """Each model by each exporter, and its rows by form."""
    for case in dict.fromkeys(row["model"] for row in rows):
        yield case, {row["graph"]: row for row in rows if row["model"] == case}


def best(forms: dict[str, Row], step: str, key: str) -> Any:
    """The least that a graph has that is not ours."""
    values = [value(row, step, key) for form, row in forms.items() if form not in OURS]
    return min((each for each in values if each is not None), default=None)


def tell(records: Records) -> int:
    """Print the table and what is missed; the exit code."""
    rows = [
        {"model": case, **{name: _cells(forms, *column) for name, column in COLUMNS.items()}}
        for case, forms in cases(records.rows)
        if value(forms.get(STOCK, {}), "graphs", "nodes") is not None
    ]
    missed = misses(records.rows)
    if rows:
        print(table(rows))
    for name, mean in means(records.rows).items():
        print(f"{name}: {mean:.3f}")
    print(*(f"missed: {line}" for line in missed), sep="\n")
    records.keep()
    return int(bool(missed))


def _cells(forms: dict[str, Row], step: str, key: str, names: Sequence[str]) -> str:
    """A figure of several forms, in one cell; a dash for what is not known."""
    found = [best(forms, step, key) if n == BEST else value(forms.get(n, {}), step, key) for n in names]
    return "" if all(each is None for each in found) else " / ".join(map(_shown, found))


def _shown(number: Any) -> str:
    if number is None or isinstance(number, bool):
        return {None: "-", True: "passed", False: "failed"}[number]
    if isinstance(number, int):
        return f"{number:,}"
    return f"{number:.1e}" if 0 < number < 1e-3 else f"{number:.3g}"


def means(rows: list[Row]) -> dict[str, float]:
    """Ours over others, the mean over all models: layers, and times on both libraries."""
    ratios: dict[str, list[float]] = {}
    for _, forms in cases(rows):
        for name, step, key, mine, other in (
            ("layers over onnxslim's", "engines", "layers", TENSORRT, "onnxslim"),
            ("time on ONNX Runtime, over the best of the others", "times", "ORT", "ours: ONNX Runtime", BEST),
            ("time on OpenVINO, over the best of the others", "times", "OpenVINO", "ours: OpenVINO", BEST),
        ):
            own = value(forms.get(mine, {}), step, key)
            limit = best(forms, step, key) if other == BEST else value(forms.get(other, {}), step, key)
            if own and limit:
                ratios.setdefault(name, []).append(own / limit)
    return {name: float(np.mean(values)) for name, values in ratios.items()}


def misses(rows: list[Row]) -> list[str]:
    """Where ours is wrong, or behind."""
    return [
        f"{case}: {name}: {line}"
        for case, forms in cases(rows)
        for name in OURS
        if name in forms
        for line in behind(name, forms)
    ]


def behind(name: str, forms: dict[str, Row]) -> Iterator[str]:
    """Where one of ours is wrong, or behind the best of the others or the graph as exported."""
    mine, stock = forms[name], forms.get(STOCK, {})
    for step in STEPS:
        if value(mine, step, "failed") and not value(stock, step, "failed"):
            yield f"{step}: {value(mine, step, 'failed')}"
    difference = value(mine, "graphs", "difference")
    if difference is not None and not difference <= TOLERANCE:  # nor is nan
        yield f"largest difference {difference:.1e}"
    limits = [
        ("nodes", "graphs", "nodes", best(forms, "graphs", "nodes"), 1.0),
        ("seconds", "graphs", "seconds", value(forms.get("onnxslim", {}), "graphs", "seconds"), 1.0),
        ("layers", "engines", "layers", best(forms, "engines", "layers"), 1.0),
        ("MB of activations", "engines", "activation_mb", value(stock, "engines", "activation_mb"), 1.0),
        ("of the time as exported on ONNX Runtime", "times", "ORT", best(forms, "times", "ORT"), SLOWER),
        (
            "of the time as exported on OpenVINO",
            "times",
            "OpenVINO",
            best(forms, "times", "OpenVINO"),
            SLOWER,
        ),
    ]
    for what, step, key, limit, slack in limits:
        own = value(mine, step, key)
        if own is not None and limit is not None and own > slack * limit:
            yield f"{own:.4g} {what}, and {limit:.4g} is the best of the others or as exported"
    if value(mine, "polygraphy", "passed") is False:
        yield "polygraphy finds other outputs"


if __name__ == "__main__":
    sys.exit(main())
