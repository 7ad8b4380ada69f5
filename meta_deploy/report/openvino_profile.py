"""Where a run goes, node by node, by OpenVINO's performance counters, as a profile like ONNX Runtime's.

Knows the names that OpenVINO's CPU plugin has for operators; must not know bundles or tasks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from meta_deploy.graph.modules import module_of
from meta_deploy.report.operators import Tensor
from meta_deploy.report.profile import Event, assemble
from meta_deploy.report.schema import Profile
from meta_deploy.targets.openvino import compile_model

# Its names of operators, as ONNX has them: for their class and cost. Others are called alike.
_ONNX = {
    "Convolution": "Conv",
    "Deconvolution": "ConvTranspose",
    "FullyConnected": "Gemm",
    "ScaledDotProductAttention": "Attention",
    "MVN": "LayerNormalization",
    "RMS": "RMSNormalization",
    "Eltwise": "Add",
    "Pooling": "AveragePool",
    "Reduce": "ReduceSum",
    "FakeQuantize": "QuantizeLinear",
    "Concatenation": "Concat",
    "StridedSlice": "Slice",
    "ScatterNDUpdate": "ScatterND",
    "ScatterElementsUpdate": "ScatterElements",
    "ScatterUpdate": "Scatter",
    "Broadcast": "Expand",
    "Convert": "Cast",
    "Reorder": "ReorderInput",
    "ShapeOf": "Shape",
    "Interpolate": "Resize",
    "ROIAlign": "RoiAlign",
}
_NO_NODES = ("Input", "Const", "Constant", "Parameter", "Output", "Result")
_TYPES = {"f32": "float", "f16": "float16", "bf16": "bfloat16", "f64": "double", "boolean": "bool"}
_KINDS = {"float": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "double": "DOUBLE", "bool": "BOOL"}

_DATA_TYPES = dict(onnx.TensorProto.DataType.items())
_ABSENT = "dynamic"  # the type of an input that is left out


def profile(
    model: bytes, weights: bytes, hint: str, feed: Mapping[str, np.ndarray], threads: int, runs: int
) -> Profile:
    """Run a model with OpenVINO's counters on. They are means over all runs, so the first one counts too.

    Args:
        model, weights, hint, threads: as for `compile_model`.
        feed: the inputs by name.
    """
    from openvino import get_version

    compiled = compile_model(model, weights, hint, threads, profiled=True)
    request = compiled.create_infer_request()
    inputs = {port: feed[port.node.get_friendly_name()] for port in compiled.inputs}
    began = time.perf_counter()
    for _ in range(1 + runs):
        request.infer(inputs)
    micros = 1e6 * (time.perf_counter() - began) / (1 + runs)
    took = {info.node_name: info for info in request.get_profiling_info()}
    graph, events = _graph(compiled.get_runtime_model(), took)
    # One run stands for all.
    return assemble([micros], [events], graph, f"OpenVINO {get_version().split('-')[0]}'s counters")


def _graph(runtime: Any, took: Mapping[str, Any]) -> tuple[onnx.GraphProto, list[Event]]:
    """The graph that runs in ONNX's words, and its nodes in their order. Shapes are those of the last run."""
    graph, events = onnx.GraphProto(), []
    order = sorted(runtime.get_ordered_ops(), key=_order)
    for op in order:
        kind, name = _kind(op), op.get_friendly_name()
        outputs = [_output(name, i) for i in range(op.get_output_size())]
        if kind in _NO_NODES:
            _add_ends(graph, op, kind, outputs)
            continue
        given = [(port, tensor) for port in op.inputs() if (tensor := _tensor(port)).dtype != _ABSENT]
        inputs = [tensor for _, tensor in given]
        attends = kind == "Subgraph" and _attends(op, inputs)
        node = graph.node.add(name=name, op_type="Attention" if attends else _ONNX.get(kind, kind))
        node.input.extend(_source(port) for port, _ in given)
        node.output.extend(outputs)
        written = [_tensor(port) for port in op.outputs()]
        _fit(node, inputs, written)
        info = took.get(name)
        ran = info is not None and str(info.status).endswith("EXECUTED")
        took_micros = info.real_time.total_seconds() * 1e6 if ran else None  # type: ignore[union-attr]
        events.append(Event(name, kind, took_micros, tuple(inputs), tuple(written), _module(op)))
    return graph, events


def _attends(op: Any, inputs: list[Tensor]) -> bool:
    """Whether a Subgraph is a whole attention: else it is element-wise operators in one."""
    names = ",".join(_originals(op)).lower()
    return [len(tensor.shape) for tensor in inputs[:3]] == [4, 4, 4] and "softmax" in names


def _module(op: Any) -> str:
    """The module of the first of its nodes that has one."""
    names = (op.get_friendly_name(), *_originals(op))
    return next(filter(None, map(module_of, names)), "")


def _originals(op: Any) -> list[str]:
    """Names of the nodes that it was made of."""
    known = op.get_rt_info()
    return str(known["originalLayersNames"].astype(str)).split(",") if "originalLayersNames" in known else []


def _add_ends(graph: onnx.GraphProto, op: Any, kind: str, outputs: list[str]) -> None:
    """Inputs, outputs and constants of the graph."""
    if kind in ("Output", "Result"):
        graph.output.add(name=_source(op.inputs()[0]))
    elif kind in ("Input", "Parameter"):
        graph.input.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    else:
        for name, port in zip(outputs, op.outputs(), strict=True):
            tensor = _tensor(port)
            kind = _KINDS.get(tensor.dtype, tensor.dtype.upper())
            graph.initializer.add(name=name, dims=tensor.shape, data_type=_DATA_TYPES.get(kind, 0))


def _fit(node: onnx.NodeProto, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """What ONNX says by attributes, and by shapes of weights, where OpenVINO tells it otherwise."""
    if node.op_type == "MatMul":
        a, y = inputs[0].shape, outputs[0].shape
        transposed = len(a) > 1 and len(y) > 1 and a[-2] != y[-2] and a[-1] == y[-2]
        node.attribute.append(onnx.helper.make_attribute("transA", int(transposed)))
    elif node.op_type == "Resize":
        node.attribute.append(onnx.helper.make_attribute("mode", "untold"))
    elif node.op_type == "Conv" and len(inputs[1].shape) > len(inputs[0].shape):  # (groups, M/g, C/g, k, …)
        groups, each, *rest = inputs[1].shape
        inputs[1] = Tensor(inputs[1].dtype, (groups * each, *rest))
        node.input[1] = f"{node.name}/grouped"


def _kind(op: Any) -> str:
    known = op.get_rt_info()
    return str(known["layerType"].astype(str)) if "layerType" in known else op.get_type_name()


def _order(op: Any) -> int:
    known = op.get_rt_info()
    return int(known["execOrder"].astype(str)) if "execOrder" in known else -1


def _source(port: Any) -> str:
    source = port.get_source_output()
    return _output(source.get_node().get_friendly_name(), source.get_index())


def _output(name: str, index: int) -> str:
    return name if index == 0 else f"{name}.{index}"


def _tensor(port: Any) -> Tensor:
    """Open sizes, which a run closes, count as none."""
    dims = [dim.get_length() if dim.is_static else 0 for dim in port.get_partial_shape()]
    kind = port.get_element_type().get_type_name()
    for short, whole in (("i", "int"), ("u", "uint")):
        if kind[:1] == short and kind[1:].isdecimal():
            kind = whole + kind[1:]
    return Tensor(_TYPES.get(kind, kind), tuple(dims))
