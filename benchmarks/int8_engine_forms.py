"""How many kernels a TensorRT-RTX engine has for small graphs in float16 and in each form of 8 bits.

    python benchmarks/int8_engine_forms.py [--gpu 8.9]

Weights are restored by one scale; by a scale a channel; or by one, with a Mul of a factor a channel behind
the product. Run it after an update of TensorRT-RTX: docs/int8.md says what was found, and rules build on it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.common import machine, parser, save, table
from meta_deploy.errors import EngineError
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.graph.precision.int8 import Quantization
from meta_deploy.targets import get_target
from meta_deploy.targets.tensorrt.build import build_engine

RTX = "tensorrt-rtx"
CHANNELS, SIDE = 64, 32
# Steps from x to y, a map (1, CHANNELS, SIDE, SIDE) or its rows. `last` is a convolution in float16.
CASES = {
    "convolution, bias": ("norm", "conv", "last"),
    "convolution, bias, ReLU": ("norm", "conv", "Relu", "last"),
    "convolution, bias, residual, ReLU": ("norm", "conv", "add", "Relu", "last"),
    "convolution, bias, GELU": ("norm", "conv", "Gelu", "last"),
    "two convolutions, ReLU": ("norm", "conv", "Relu", "conv", "Relu", "last"),
    "product, bias": ("norm", "matmul", "norm"),
    "product, bias, residual": ("norm", "matmul", "add", "norm"),
    "product, bias, GELU": ("norm", "matmul", "Gelu", "norm"),
    "MLP: product, GELU, product, residual": ("norm", "matmul", "Gelu", "matmul", "add", "norm"),
}


def main(argv: Sequence[str] | None = None) -> None:
    p = parser(__doc__, "int8_engine_forms")
    p.add_argument("--gpu", default="8.9", help="compute capability to build for")
    args = p.parse_args(argv)
    rows = [{"graph": name, **kernels(steps, args.gpu)} for name, steps in CASES.items()]
    print(table(rows))
    save(args.json, machine=machine(), gpu=args.gpu, rows=rows)


def kernels(steps: Sequence[str], gpu: str) -> dict[str, int | None]:
    """The engine's layers in float16 and in each form; None where there is no such engine."""
    found = {"float16": layers(PRECISIONS["fp16"].convert(graph(steps))[0], gpu)}
    for number, rules in get_target(RTX).eight_bits.items():
        free = replace(rules, value=0, node=0)
        found[f"{number}, one scale"] = layers(quantized(graph(steps), number, free), gpu)
        by_channel = quantized(graph(steps), number, replace(free, factors=False))
        found[f"{number}, a scale a channel"] = layers(by_channel, gpu)
        if number == "int8":
            found["int8, factors"] = layers(quantized(graph(steps, uneven=True), number, free), gpu)
    return found


def graph(steps: Sequence[str], uneven: bool = False) -> onnx.ModelProto:
    """A float32 graph of these steps; `uneven`: output channels of weights differ a hundredfold."""
    generator = np.random.default_rng(0)
    sizes = np.geomspace(0.01, 1, CHANNELS) if uneven else np.ones(CHANNELS)
    rows = "matmul" in steps
    shape = [1, SIDE * SIDE, CHANNELS] if rows else [1, CHANNELS, SIDE, SIDE]
    constants, nodes, last = [], [], "x"

    def constant(name: str, numbers: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(numbers.astype(np.float32), name))
        return name

    def add(op: str, inputs: Sequence[str], name: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    for i, step in enumerate(steps):
        name = f"{step}{i}"
        if step == "norm":
            last = add("LayerNormalization", [last, constant(f"one{i}", np.ones(shape[-1]))], name)
        elif step == "last":
            weights = generator.normal(0, 0.05, (8, CHANNELS, 1, 1))
            last = add("Conv", [last, constant(f"w{i}", weights)], name, kernel_shape=[1, 1])
        elif step == "conv":
            weights = generator.normal(0, 0.05, (CHANNELS, CHANNELS, 3, 3)) * sizes[:, None, None, None]
            inputs = [last, constant(f"w{i}", weights), constant(f"b{i}", generator.normal(size=CHANNELS))]
            last = add("Conv", inputs, name, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        elif step == "matmul":
            weights = generator.normal(0, 0.1, (CHANNELS, CHANNELS)) * sizes
            last = add("MatMul", [last, constant(f"w{i}", weights)], f"product{i}")
            last = add("Add", [last, constant(f"b{i}", generator.normal(size=CHANNELS))], name)
        else:
            last = add("Add" if step == "add" else step, [last, "x"] if step == "add" else [last], name)
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    given = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
    made = helper.make_graph(nodes, "form", [given], [helper.make_empty_tensor_value_info("y")], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def quantized(proto: onnx.ModelProto, number: str, rules) -> onnx.ModelProto:
    """All its products in 8 bits."""
    ranges = lambda model, placement: (dict.fromkeys(placement.readers, (-4.0, 4.0)), {})  # noqa: E731
    return PRECISIONS[number].convert(proto, quantization=Quantization(rules, ranges, []))[0]


def layers(proto: onnx.ModelProto, gpu: str) -> int | None:
    try:
        engine = build_engine(proto.SerializeToString(), RTX, (), compute_capabilities=(gpu,))
    except EngineError:
        return None
    return engine.section().layers


if __name__ == "__main__":
    main()
