"""An ONNX model built into an engine of TensorRT-RTX, and what is in it, read from the build's log.

Builds on a machine without a GPU; running an engine, or opening it again, would need one. Knows ONNX and
TensorRT-RTX, and no model.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


class BuildError(RuntimeError):
    """TensorRT-RTX refuses a graph; says why."""


# --- building -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A step of an engine.

    Attributes:
        name: what the builder calls it.
        kind: its LayerType, such as kgen (a generated kernel), gemm or correlation (a convolution).
        kernel: its TacticName; empty where a library's kernel does it.
    """

    name: str
    kind: str
    kernel: str

    @property
    def synchronizes(self) -> bool:
        """One stream waits for another; nothing is computed."""
        return self.kind.startswith(("signal", "wait"))

    @property
    def generated(self) -> bool:
        """A kernel made for this graph's elementwise and moving operators, bound by memory's speed.

        Matrix products and convolutions with something after them have such names too, but no such kernel.
        """
        return self.kernel.startswith("__myl_")

    @property
    def attention(self) -> bool:
        """Both matrix products and the softmax between in one kernel."""
        return self.kernel.startswith("_gemm_mha")


@dataclass(frozen=True)
class Engine:
    """What was built. Memory in MB."""

    layers: tuple[Layer, ...]
    activation_mb: float
    weights_mb: float
    plan_mb: float
    seconds: float

    def count(self) -> dict[str, int]:
        """Layers that are kernels to launch; of these the generated ones, and fused attention."""
        launched = [layer for layer in self.layers if not layer.synchronizes]
        return {
            "layers": len(launched),
            "generated": sum(layer.generated for layer in launched),
            "attention": sum(layer.attention for layer in launched),
        }


def available() -> bool:
    return importlib.util.find_spec("tensorrt_rtx") is not None


def build(proto: onnx.ModelProto) -> Engine:
    """Build a graph, in the precision that it is written in.

    Raises:
        BuildError: the graph does not parse, or cannot be built.
    """
    import tensorrt_rtx as trt

    log = _logger()
    log.lines.clear()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(proto.SerializeToString()):
        errors = map(parser.get_error, range(parser.num_errors))
        raise BuildError("; ".join(f"{error.node_operator()}: {error.desc()}" for error in errors))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the log names no kernels
    began = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - began
    if plan is None:
        raise BuildError("; ".join(log.errors()) or "TensorRT-RTX gives no reason")
    layers, memory = parse_log(log.lines)
    log.lines.clear()
    return Engine(layers, memory["Activation"], memory["Weights"], plan.nbytes / 1e6, seconds)


@functools.cache
def _logger() -> Any:
    """TensorRT takes one logger in a process, and ignores every other."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                message = f"error: {message}"
            self.lines.append(message)

        def errors(self) -> list[str]:
            return [line.removeprefix("error: ") for line in self.lines if line.startswith("error: ")]

    return Log()


def parse_log(lines: Iterable[str]) -> tuple[tuple[Layer, ...], dict[str, float]]:
    """The layers and the memory in MB (Activation, Weights) that a verbose build's log tells.

    The layers are one message, a line each; memory is a line for each kind. The last of each counts.

    Raises:
        BuildError: it does not tell, as it may be in another version of TensorRT-RTX.
    """
    layers: tuple[Layer, ...] = ()
    memory: dict[str, float] = {}
    for line in lines:
        if line.startswith("Layers:"):
            layers = tuple(map(_layer, re.findall(r"^Name: .*$", line, re.MULTILINE)))
        elif found := re.match(r"Total (Activation|Weights) Memory: (\d+) bytes", line):
            memory[found[1]] = int(found[2]) / 1e6
    if not layers or len(memory) < 2:
        raise BuildError("the log does not list the engine's layers and memory; its format has changed")
    return layers, memory


def _layer(line: str) -> Layer:
    fields = (re.search(pattern, line) for pattern in (r"^Name: ([^,]*)", r"LayerType: ([^,]*)"))
    name, kind = (found[1] if found else "" for found in fields)
    # Behind inputs and outputs, among whose names there may be anything.
    kernel = re.search(r".*TacticName: ([^,]*)", line)
    return Layer(name, kind, kernel[1].strip() if kernel else "")


# --- float16, until export/precision.py ---------------------------------------------------------------------


def to_fp16(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph computed in float16; inputs and outputs stay float32. Without branches and loops.

    Constants, and what makes or casts to float32, become float16, except the scales of a Resize, which have
    to be float32. What float16 cannot hold becomes the largest that it can.
    """
    half = onnx.ModelProto()
    half.CopyFrom(proto)
    graph = half.graph
    del graph.value_info[:]
    inner = {
        info.name: f"{info.name}/half"
        for info in (*graph.input, *graph.output)
        if info.type.tensor_type.elem_type == FLOAT
    }
    nodes = [_cast(info.name, inner[info.name], HALF) for info in graph.input if info.name in inner]
    scales: set[str] = set()
    for node in graph.node:
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]
        _make_half(node)
        if node.op_type == "Resize" and len(node.input) > 2 and node.input[2]:
            name, node.input[2] = node.input[2], f"{node.input[2]}/float"
            if name not in scales:
                nodes += _float_scales(graph, name)
                scales.add(name)
        nodes.append(node)
    nodes += [_cast(inner[info.name], info.name, FLOAT) for info in graph.output if info.name in inner]
    kept = {f"{name}/float" for name in scales}
    for tensor in graph.initializer:
        if tensor.name not in kept:
            _halve(tensor)
    del graph.node[:]
    graph.node.extend(nodes)
    return half


def _cast(name: str, new: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [new], to=to)


def _float_scales(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    """What gives a tensor in float32 as NAME/float: a constant, or else a node."""
    for tensor in graph.initializer:
        if tensor.name == name:
            copy = numpy_helper.from_array(numpy_helper.to_array(tensor), f"{name}/float")
            graph.initializer.append(copy)
            return []
    return [_cast(name, f"{name}/float", FLOAT)]


def _make_half(node: onnx.NodeProto) -> None:
    """Constants and types in a node's attributes."""
    if node.op_type == "ConstantOfShape" and not node.attribute:  # which means zeros of float32
        node.attribute.append(
            helper.make_attribute("value", numpy_helper.from_array(np.zeros(1, np.float32)))
        )
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == FLOAT:
            attribute.i = HALF
        if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            value = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            tensor = numpy_helper.from_array(np.array(value, np.float32))
            attribute.CopyFrom(helper.make_attribute("value", tensor))
        if attribute.HasField("t"):
            _halve(attribute.t)


def _halve(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == FLOAT:
        values = numpy_helper.to_array(tensor)
        largest = np.finfo(np.float16).max
        values = np.where(np.isinf(values), values, np.clip(values, -largest, largest))
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
