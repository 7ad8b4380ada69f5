"""A model compared with itself by meta-report, again and again: how often is a difference claimed?

    python benchmarks/report_aa.py [--repeats N] [--runs N] [--model BUNDLE]

By default on a small convolutional network. Also how far the classes' times are from the run that they are
of. Exit code 1 if more than one comparison in twenty claims a difference, or a sum is off by over 2 %.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import machine, parser, save, table
from meta_deploy.report.compare import report
from meta_deploy.report.schema import Entry

REPEATS = 20
GOAL = {"no_difference": 19 / 20, "class_sum": 0.02}


def small() -> onnx.ModelProto:
    """Six 3x3 convolutions of 16 channels over 64x64: about a millisecond."""
    rng = np.random.default_rng(0)
    weights, nodes = [], []
    for i in range(6):
        shape = (16, 3 if i == 0 else 16, 3, 3)
        weights.append(numpy_helper.from_array(rng.normal(0, 0.1, shape).astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"t{i + 1}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 64, 64])
        for name, channels in (("t0", 3), ("t6", 16))
    ]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def comparisons(path: str, repeats: int, runs: int, threads: int | None) -> Iterator[dict[str, Any]]:
    """A row for each report of a model and itself."""
    for i in range(repeats):
        found = report([path, path], runs=runs, threads=threads, count=4)
        second = found.entries[1]
        assert second.latency is not None, second.error
        assert second.latency.total_ratio is not None
        ratio = second.latency.total_ratio
        row = {
            "run": i + 1,
            "ratio": round(ratio.value, 4),
            "low": round(ratio.low, 4),
            "high": round(ratio.high, 4),
            "verdict": ratio.verdict,
            "class_sum": max(map(left_over, found.entries)),
            "disturbed": bool(found.disturbances),
        }
        print(row, file=sys.stderr, flush=True)
        yield row


def left_over(entry: Entry) -> float:
    """How far the classes' times are from the profiled run, relative to it."""
    assert entry.profile is not None, entry.no_profile
    return abs(sum(row.ms for row in entry.profile.classes) / entry.profile.ms - 1)


def main() -> int:
    options = parser(__doc__, "report_aa")
    options.add_argument("--repeats", type=int, default=REPEATS)
    options.add_argument("--runs", type=int, default=40)
    options.add_argument("--threads", type=int)
    options.add_argument("--model", help="a bundle, .onnx file or checkpoint (default: the small network)")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or str(Path(folder) / "small.onnx")
        if args.model is None:
            onnx.save(small(), path)
        rows = list(comparisons(path, args.repeats, args.runs, args.threads))
    share = sum(row["verdict"] == "no difference" for row in rows) / len(rows)
    worst = max(row["class_sum"] for row in rows)
    print(table(rows))
    print(f"no difference in {share:.0%} of {len(rows)}; classes add up to the run within {worst:.2%}")
    save(args.json, machine=machine(), goal=GOAL, no_difference=share, class_sum=worst, rows=rows)
    return int(share < GOAL["no_difference"] or worst > GOAL["class_sum"])


if __name__ == "__main__":
    sys.exit(main())
