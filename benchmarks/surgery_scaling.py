"""Seconds of every graph pass on graphs of growing size: time should grow in proportion to the nodes.

    python benchmarks/surgery_scaling.py [--nodes N ...] [--targets NAME ...]

The graph is synthetic: blocks of norm, attention, convolution and the data movement between them, as an
exporter writes them, each with its own weights. Each size runs in its own process, for its peak memory. Exit
code 1 if the goal, which is for the largest default size, is missed.
"""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import machine, parser, save, table
from meta_deploy.targets import TARGETS

NODES = (5_000, 10_000, 20_000)
GOAL = {"nodes": 20_000, "seconds": 60, "peak_mb": 4096}
DEFAULT = ["onnxruntime", "tensorrt"]  # the others' passes are among these
DIM, HEADS, SIDE = 16, 2, 8
TOKENS = SIDE * SIDE


# --- the graph ----------------------------------------------------------------------------------------------


class Blocks:
    """A graph that grows block by block."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [f"t{len(self.nodes)}"] + [f"t{len(self.nodes)}_{k}" for k in range(1, outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"n{len(self.nodes)}", **attributes))
        return names[0]

    def weight(self, *shape: int) -> str:
        spread = 1 / math.sqrt(math.prod(shape[1:]) or 1)
        values = self.rng.normal(0, spread, shape).astype(np.float32)
        self.constants.append(numpy_helper.from_array(values, f"w{len(self.constants)}"))
        return self.constants[-1].name

    def ints(self, *numbers: int) -> str:
        array = np.array(numbers, np.int64)
        self.constants.append(numpy_helper.from_array(array, f"w{len(self.constants)}"))
        return self.constants[-1].name

    def norm(self, x: str) -> str:
        return self.op("LayerNormalization", x, self.weight(DIM), self.weight(DIM), axis=-1)

    def linear(self, x: str, inner: int, outer: int) -> str:
        weight = self.op("Transpose", self.weight(outer, inner), perm=[1, 0])
        return self.op("Add", self.op("MatMul", x, weight), self.weight(outer))

    def attention(self, x: str) -> str:
        """Attention on tokens, with q, k and v sliced from one projection as exporters write it."""
        each = DIM // HEADS
        packed = self.linear(self.norm(x), DIM, 3 * DIM)
        packed = self.op("Reshape", packed, self.ints(1, TOKENS, 3, HEADS, each))
        packed = self.op("Transpose", packed, perm=[2, 0, 3, 1, 4])
        q, k, v = (
            self.op(
                "Squeeze",
                self.op("Slice", packed, self.ints(i), self.ints(i + 1), self.ints(0)),
                self.ints(0),
            )
            for i in range(3)
        )
        scale = numpy_helper.from_array(np.float32(each**-0.5), f"w{len(self.constants)}")
        self.constants.append(scale)
        scores = self.op("MatMul", self.op("Mul", q, scale.name), self.op("Transpose", k, perm=[0, 1, 3, 2]))
        y = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        y = self.op("Transpose", y, perm=[0, 2, 1, 3])
        y = self.op("Reshape", y, self.ints(1, TOKENS, DIM))
        return self.op("Add", x, self.linear(y, DIM, DIM))

    def convolutions(self, x: str) -> str:
        """Convolutions on tokens arranged as an image, split into two halves."""
        picture = self.op("Transpose", self.norm(x), perm=[0, 2, 1])
        picture = self.op("Reshape", picture, self.ints(1, DIM, SIDE, SIDE))
        half = DIM // 2
        a = self.op("Slice", picture, self.ints(0), self.ints(half), self.ints(1))
        b = self.op("Slice", picture, self.ints(half), self.ints(DIM), self.ints(1))
        a = self.op("Conv", a, self.weight(half, 1, 3, 3), group=half, pads=[1, 1, 1, 1])
        parameters = [self.weight(half), self.weight(half), self.weight(half), self.positive(half)]
        a = self.op("Relu", self.op("BatchNormalization", a, *parameters))
        b = self.op("Conv", b, self.weight(half, half, 1, 1), self.weight(half))
        picture = self.op("Concat", a, b, axis=1)
        picture = self.op("Conv", picture, self.weight(DIM, DIM, 1, 1), self.weight(DIM))
        picture = self.op("Reshape", picture, self.ints(1, DIM, TOKENS))
        return self.op("Add", x, self.op("Transpose", picture, perm=[0, 2, 1]))

    def positive(self, size: int) -> str:
        values = self.rng.uniform(0.5, 2, size).astype(np.float32)
        self.constants.append(numpy_helper.from_array(values, f"w{len(self.constants)}"))
        return self.constants[-1].name

    def perceptron(self, x: str) -> str:
        hidden = self.op("Gelu", self.linear(self.norm(x), DIM, 2 * DIM))
        return self.op("Add", x, self.linear(hidden, 2 * DIM, DIM))


def made_up(nodes: int, seed: int = 0) -> onnx.ModelProto:
    """A synthetic graph of at least `nodes` nodes."""
    blocks = Blocks(seed)
    x = "x"
    while len(blocks.nodes) < nodes:
        x = blocks.perceptron(blocks.convolutions(blocks.attention(x)))
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, TOKENS, DIM]) for name in ("x", x)]
    graph = helper.make_graph(blocks.nodes, "made_up", infos[:1], infos[1:], blocks.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


# --- measuring ----------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__, "surgery_scaling")
    p.add_argument("--nodes", nargs="+", type=int, default=list(NODES), help="default: 5000 10000 20000")
    p.add_argument(
        "--targets", nargs="+", choices=list(TARGETS), default=DEFAULT, help=f"default: {' '.join(DEFAULT)}"
    )
    args = p.parse_args(argv)
    here, runs, missed = machine(), {}, []
    for target in args.targets:
        runs[target] = {nodes: alone(nodes, target) for nodes in sorted(args.nodes)}
        print(f"{target}\n\n{side_by_side(runs[target])}\n", flush=True)
        goal = runs[target].get(GOAL["nodes"], {"seconds": 0, "peak_mb": 0})
        missed += [
            f"{target}: {what} {goal[what]:.0f} for {GOAL['nodes']:,} nodes, goal {GOAL[what]:,}"
            for what in ("seconds", "peak_mb")
            if goal[what] > GOAL[what]
        ]
    for line in missed:
        print(f"missed: {line}")
    save(args.json, machine=here, goal=GOAL, missed=missed, targets=runs)
    return int(bool(missed))


def alone(nodes: int, target: str) -> dict[str, Any]:
    """`run` in its own process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(run, nodes, target).result()


def run(nodes: int, target: str) -> dict[str, Any]:
    """Run a pipeline on a graph of `nodes` nodes: seconds in total and per pass, and peak memory."""
    from meta_deploy.export.pipeline import peak_rss_mb
    from meta_deploy.graph.pipeline import run_passes

    graph = made_up(nodes)
    began = time.perf_counter()
    _, results = run_passes(graph, list(TARGETS[target].passes), TARGETS[target].prices)
    return {
        "nodes": len(graph.graph.node),
        "seconds": time.perf_counter() - began,
        "peak_mb": peak_rss_mb(),
        "passes": [result.to_dict() for result in results],
    }


def side_by_side(runs: dict[int, dict[str, Any]]) -> str:
    """A row per pass, a column per size, the exponent of growth, and the changes in the largest graph.

    A pass that runs twice has two rows. The time outside of passes is for reading, counting and writing.
    """
    sizes = list(runs)
    columns = {size: [(p["name"], p["seconds"]) for p in runs[size]["passes"]] for size in sizes}
    rows = []
    for index, (name, _) in enumerate(columns[sizes[0]]):
        row = _row(name, {size: columns[size][index][1] for size in sizes})
        rows.append({**row, "changes": runs[sizes[-1]]["passes"][index]["changes"]})
    between = {size: runs[size]["seconds"] - sum(s for _, s in columns[size]) for size in sizes}
    rows.append({**_row("around them", between), "changes": None})
    rows.append({**_row("all", {size: runs[size]["seconds"] for size in sizes}), "changes": None})
    memory = {f"{size:,} nodes": runs[size]["peak_mb"] for size in sizes}
    rows.append({"seconds": "peak MB", **memory, "grows with power": None, "changes": None})
    return table(rows)


def _row(name: str, seconds: dict[int, float]) -> dict[str, Any]:
    low = min((size for size, value in seconds.items() if value >= 0.05), default=0)  # below is noise
    high, power = max(seconds), None
    if 0 < low < high:
        power = math.log(seconds[high] / seconds[low]) / math.log(high / low)
    return {
        "seconds": name,
        **{f"{size:,} nodes": value for size, value in seconds.items()},
        "grows with power": power,
    }


if __name__ == "__main__":
    sys.exit(main())
