"""Compare ways to clean up a traced graph: seconds, nodes, agreement with the original, and speed.

    python benchmarks/cleanup_routes.py [CASE] [--routes NAME ...] [--stock] [--rounds N]

Every route takes the traced graph, which has the intermediate stages as outputs, and returns a graph. These
outputs are compared with the traced graph's; for timing they are removed, as in a bundle. onnxslim is
optional: without it, its row is left out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import torch
from onnx_ir.passes import common as ir_passes
from onnxscript import optimizer

from benchmarks.common import (
    Case,
    checkpoint,
    interleave,
    machine,
    open_session,
    parser,
    photos,
    ratio,
    save,
    table,
)
from benchmarks.optimizers import ort_basic
from meta_deploy.export.options import Options
from meta_deploy.export.sources.checkpoint import input_spec, preprocess_rules
from meta_deploy.export.trace import drop_outputs, export_onnx
from meta_deploy.graph.graph import to_proto
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.imaging.images import read_image
from meta_deploy.imaging.preprocess import Preprocessor
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.targets import TARGETS
from meta_deploy.tasks import get_task

CASE = "meta-t-mask-rcnn@512"
LITERAL, STOCK = "literal", "PyTorch's optimize=True"


Graphs = dict[str, onnx.ModelProto]


def clean_up(proto: onnx.ModelProto) -> onnx.ModelProto:
    return run_passes(proto, ["clean-up"])[0]


def all_passes(proto: onnx.ModelProto) -> onnx.ModelProto:
    return run_passes(proto, list(TARGETS["onnxruntime"].passes))[0]


def lifted(proto: onnx.ModelProto) -> ir.Model:
    """Inline functions and lift constants, since graph-surgeon and onnxslim misread `value_floats`."""
    model = ir.from_proto(proto)
    ir_passes.InlinePass()(model)
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def graph_surgeon(proto: onnx.ModelProto) -> onnx.ModelProto:
    graph = gs.import_onnx(ir.to_proto(lifted(proto)))
    return to_proto(graph.fold_constants().cleanup(remove_unused_graph_inputs=False).toposort())


def onnx_ir(proto: onnx.ModelProto) -> onnx.ModelProto:
    model = lifted(proto)
    for step in (
        ir_passes.IdentityEliminationPass(),
        ir_passes.CommonSubexpressionEliminationPass(),
        ir_passes.RemoveUnusedNodesPass(),
    ):
        step(model)
    return ir.to_proto(model)


def onnxslim(proto: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    return onnxslim.slim(ir.to_proto(lifted(proto)))


ROUTES: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "ours: clean-up": clean_up,
    "ours: all passes": all_passes,
    "graph-surgeon fold": graph_surgeon,
    "onnx-ir passes": onnx_ir,
    "ORT basic, offline": ort_basic,
    "onnxslim": onnxslim,
    "onnxscript optimize": optimizer.optimize,
}


def main(argv: Sequence[str] | None = None) -> None:
    p = parser(__doc__, "cleanup_routes")
    p.add_argument("case", nargs="?", type=Case.parse, default=Case.parse(CASE), help=f"default: {CASE}")
    p.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES), help="default: all")
    p.add_argument("--stock", action="store_true", help="PyTorch's own optimizer too, which takes minutes")
    p.add_argument("--rounds", type=int, default=11, help="timed runs of each graph (default: %(default)s)")
    args = p.parse_args(argv)
    here = machine()
    if "onnxslim" in args.routes and importlib.util.find_spec("onnxslim") is None:
        print("onnxslim is not installed: left out (pip install onnxslim)", file=sys.stderr)
        args.routes.remove("onnxslim")

    loaded = load_model(checkpoint(args.case))
    spec = input_spec(args.case.size, Options(dynamic_size=args.case.dynamic))
    graphs, seconds = make_graphs(partial(export_onnx, loaded.model, spec), args.routes, args.stock)
    preprocess = Preprocessor(spec, preprocess_rules(loaded.config, spec))
    batches = [preprocess([read_image(path)])[0] for path in photos(args.photos, 4)]
    same = agreement(graphs, batches)
    keep = list(get_task(loaded.config.task).outputs)
    shipped = {name: drop_outputs(graph, keep) for name, graph in graphs.items() if same[name]}
    opening, times = latency(shipped, batches[0], args.rounds)
    rows = [
        {
            "route": name,
            "seconds": seconds[name],
            "nodes": len(graph.graph.node),
            "maps, relative error": same[name].get("maps", "does not load"),
            "results agree": same[name].get("results"),
            "session s": opening.get(name),
            "run ms": float(np.median(times[name])) if name in times else None,
            "over literal": ratio(times[name], times[LITERAL]) if name in times else None,
        }
        for name, graph in graphs.items()
    ]
    print(table(rows))
    save(args.json, machine=here, case=str(args.case), rounds=args.rounds, routes=rows)


def make_graphs(
    trace: Callable[[], onnx.ModelProto], routes: list[str], stock: bool
) -> tuple[Graphs, dict[str, float]]:
    """Each route's graph and seconds; for the traced graph, the seconds of tracing."""
    graphs, seconds = {}, {}

    def make(name: str, call: Callable[[], onnx.ModelProto]) -> None:
        graphs[name], seconds[name] = timed(call)
        print(f"{name}: {seconds[name]:.1f} s, {len(graphs[name].graph.node):,} nodes", file=sys.stderr)

    make(LITERAL, trace)
    for name in routes:
        copy = onnx.ModelProto()
        copy.CopyFrom(graphs[LITERAL])
        make(name, partial(ROUTES[name], copy))
    if stock:
        plain = torch.onnx.export
        with mock.patch("torch.onnx.export", lambda *a, **k: plain(*a, **{**k, "optimize": True})):
            make(STOCK, trace)
        seconds[STOCK] -= seconds[LITERAL]
    return graphs, seconds


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """A call's result and its seconds."""
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        result = call()
    return result, time.perf_counter() - began


def agreement(graphs: Graphs, batches: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """How close each graph is to the traced one on ONNX Runtime, by the measures of verification.

    Empty for a graph that ONNX Runtime refuses.
    """
    literal = open_session(graphs[LITERAL])
    names = [output.name for output in literal.get_outputs()]
    expected = [dict(zip(names, literal.run(names, {"images": batch}), strict=True)) for batch in batches]
    same: dict[str, dict[str, float]] = {}
    for name, graph in graphs.items():
        same[name] = {}
        try:
            session = open_session(graph)
        except Exception as error:  # ONNX Runtime's errors share no base class
            print(f"{name}: {error}", file=sys.stderr)
            continue
        comparison = get_task("instance-segmentation").comparison(PRECISIONS["fp32"].tolerances)
        for batch, wanted in zip(batches, expected, strict=True):
            comparison.add(wanted, dict(zip(names, session.run(names, {"images": batch}), strict=True)))
        stages = comparison.stages()
        same[name]["maps"] = stages["maps"]["max_relative_error"]
        same[name]["results"] = stages.get("detections", stages.get("pixels"))["agreement"]
    return same


def latency(
    graphs: Graphs, batch: np.ndarray, rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Seconds to open each graph's session, and milliseconds of its interleaved runs."""
    sessions, loads = {}, {}
    for name, graph in graphs.items():
        sessions[name], loads[name] = timed(partial(open_session, graph))
    runs = {
        name: lambda turn, session=session: session.run(None, {"images": batch})
        for name, session in sessions.items()
    }
    interleave(runs, 2)  # to warm up
    return loads, interleave(runs, rounds)


if __name__ == "__main__":
    main()
