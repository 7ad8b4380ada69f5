"""Which convolutions and matrix products gain time in 8 bits on ONNX Runtime's CPU; whether the rules know.

    python benchmarks/int8_products.py [--threads N] [--rounds N]

Each product stands alone between float32 tensors, quantized on its input and, a convolution, on its result;
beside ours as ONNX Runtime's own quantize_static does it, by its defaults and with its best settings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import interleave, machine, open_session, parser, ratio, save, table
from benchmarks.quantize_static import quantize_static_of
from meta_deploy.graph.graph import normalized
from meta_deploy.graph.precision.lower import to_proto
from meta_deploy.graph.precision.placement import Placement, Product
from meta_deploy.graph.precision.qdq import insert
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.targets import TARGETS

# (inputs, outputs, kernel, side of the map), (rows, inputs, outputs)
CONVOLUTIONS = (
    *((16, 16, 3, 40), (32, 32, 3, 160), (64, 64, 3, 20), (64, 64, 3, 80), (128, 128, 3, 40)),
    *((256, 256, 3, 32), (256, 256, 3, 64), (16, 32, 1, 20), (64, 64, 1, 40), (128, 64, 1, 80)),
    *((256, 64, 1, 20), (256, 256, 1, 32), (256, 256, 1, 64), (768, 256, 1, 32)),
)
PRODUCTS = (
    *((400, 16, 48), (400, 64, 64), (400, 64, 192), (400, 128, 128), (400, 128, 512), (400, 512, 128)),
    *((1024, 192, 192), (1024, 192, 576), (1024, 192, 768), (1024, 768, 192), (1369, 384, 1536)),
    *((1369, 1536, 384), (1000, 3136, 192), (1000, 12544, 1024), (1000, 1024, 1024)),
)


def main(argv: Sequence[str] | None = None) -> None:
    p = parser(__doc__, "int8_products")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=25)
    args = p.parse_args(argv)
    rules = TARGETS["onnxruntime"].eight_bits["int8"]
    assert rules is not None
    models = [convolution(*sizes) for sizes in CONVOLUTIONS] + [product(*sizes) for sizes in PRODUCTS]
    rows = [measure(proto, rules, args.threads, args.rounds) for proto in models]
    print(table(rows))
    save(args.json, machine=machine(), threads=args.threads, rows=rows)


def convolution(inputs: int, outputs: int, kernel: int, side: int) -> onnx.ModelProto:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4)
    return model([node], [1, inputs, side, side], (outputs, inputs, kernel, kernel), outputs)


def product(rows: int, inputs: int, outputs: int) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    return model(nodes, [1, rows, inputs], (inputs, outputs), outputs)


def model(nodes: list, shape: Sequence[int], weights: Sequence[int], outputs: int) -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(generator.normal(0, 0.1, size).astype(np.float32), name)
        for name, size in (("w", weights), ("b", (outputs,)))
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "one", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def quantized(proto: onnx.ModelProto, rules: EightBitRules) -> tuple[onnx.ModelProto, bool]:
    """The product in 8 bits, and whether the rules say that it pays."""
    graph = normalized(proto)
    first, *rest = list(graph.graph)
    last = [*rest, first][0]
    result = last.outputs[0] if first.op_type == "Conv" else None
    bias = (last, 2 if first.op_type == "Conv" else 1)
    one = Product(first, 0 if first.op_type == "Conv" else 1, bias, result)
    x = first.inputs[0]
    assert x is not None
    values = numbers(x) + numbers(first.outputs[0])
    pays = rules.pays(numbers(first.outputs[0]) * one.weights.size / one.weights.shape[one.axis], values)
    ranges = {"x": (-4.0, 4.0), "y": (-30.0, 30.0)}
    insert(graph.graph, Placement([one], readers={"x": [one]}), ranges, rules)
    return to_proto(graph), pays


def numbers(value: ir.Value) -> float:
    assert value.shape is not None
    return float(np.prod(value.shape.numpy()))


def measure(proto: onnx.ModelProto, rules: EightBitRules, threads: int, rounds: int) -> dict:
    converted, pays = quantized(proto, rules)
    shape = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    graphs = {"fp32": proto, "int8": converted, **quantize_static_of(proto, [{"x": x}])}
    sessions = {name: open_session(graph, threads) for name, graph in graphs.items()}
    runs = {name: lambda turn, s=session: s.run(None, {"x": x}) for name, session in sessions.items()}
    interleave(runs, 2)
    times = interleave(runs, rounds)
    return {
        "operator": proto.graph.node[0].op_type,
        "input": "x".join(map(str, shape)),
        "weights": "x".join(map(str, proto.graph.initializer[0].dims)),
        "fp32 ms": float(np.median(times["fp32"])),
        **{f"{name} / fp32": ratio(times[name], times["fp32"]) for name in graphs if name != "fp32"},
        "rules": pays,
    }


if __name__ == "__main__":
    main()
