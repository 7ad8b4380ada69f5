"""What each graph pass is worth: the target's pipeline without it, compared with the whole pipeline.

    python benchmarks/pass_worth.py [CASE] [--rounds N] [--no-engines] [--no-time]

Backbone and feature pyramid, as in graph_surgery.py. For tensorrt, counts the layers of a TensorRT-RTX engine
in float16; for onnxruntime, measures the time on the CPU, interleaved, relative to the whole pipeline's.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import onnx

from benchmarks.common import Case, counted, interleave, machine, open_session, parser, ratio, save, table
from benchmarks.graph_surgery import (
    CASES,
    ENGINES,
    OURS,
    THREADS,
    engine_measures,
    subject,
    traced,
    translate,
)
from meta_deploy.errors import EngineError
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.targets import TARGETS
from meta_deploy.targets.tensorrt.build import available

WHOLE = "whole pipeline"


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__, "pass_worth")
    p.add_argument("case", nargs="?", type=Case.parse, default=Case.parse(CASES[0]))
    p.add_argument("--rounds", type=int, default=10, help="timed runs of each graph (default: %(default)s)")
    p.add_argument("--no-engines", action="store_true", help="build no engines")
    p.add_argument("--no-time", action="store_true", help="time nothing")
    args = p.parse_args(argv)
    here = machine()
    model, images = subject(args.case, args.photos)
    literal = translate(traced(model, images))
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for target in OURS:
        pipeline, prices = TARGETS[target].passes, TARGETS[target].prices
        with tempfile.TemporaryDirectory() as folder:
            results[target] = rows = {}
            files: dict[str, Path] = {}
            # The others take a cleaned graph for granted, TensorRT too.
            for left_out in (WHOLE, *(name for name in dict.fromkeys(pipeline) if name != "clean-up")):
                copy = onnx.ModelProto()
                copy.CopyFrom(literal)
                names = [name for name in pipeline if name != left_out]
                proto, _ = run_passes(copy, names, prices)
                rows[left_out] = counted(proto)
                files[left_out] = Path(folder) / f"{len(files)}.onnx"
                onnx.save(proto, files[left_out])
                if target == "tensorrt" and not args.no_engines and available(ENGINES):
                    rows[left_out] |= engine(proto)
                print(f"{target} without {left_out}", file=sys.stderr)
            if target == "onnxruntime" and not args.no_time:
                for name, slower in slowdown(files, images.numpy(), args.rounds).items():
                    rows[name]["time / whole"] = slower
        print(f"{target}\n\n{table([{'without': name, **row} for name, row in rows.items()])}\n")
    save(args.json, machine=here, case=str(args.case), rounds=args.rounds, targets=results)
    return 0


def engine(proto: onnx.ModelProto) -> dict[str, Any]:
    """Layers and memory of the float16 engine; empty if it does not build."""
    try:
        built = engine_measures(PRECISIONS["fp16"].convert(proto)[0])
    except EngineError as error:
        print(f"does not build: {error}", file=sys.stderr)
        return {}
    counts = {f"fp16 {what}": built[what] for what in ("layers", "generated", "attention")}
    return {**counts, "activation MB": built["activation MB"]}


def slowdown(files: dict[str, Path], images: Any, rounds: int) -> dict[str, float]:
    """Each graph's time on ONNX Runtime relative to the whole pipeline's."""
    sessions = {name: open_session(onnx.load(path), THREADS) for name, path in files.items()}
    runs = {
        name: lambda turn, session=session: session.run(None, {"images": images})
        for name, session in sessions.items()
    }
    interleave(runs, 2)  # to warm up
    times = interleave(runs, rounds)
    return {name: ratio(own, times[WHOLE]) for name, own in times.items()}


if __name__ == "__main__":
    sys.exit(main())
