"""The magnitudes that a graph's tensors reach on given inputs. Knows ONNX Runtime; decides nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx_ir as ir

from meta_deploy import ort
from meta_deploy.cpus import limited_threads
from meta_deploy.graph.precision.values import FLOAT, is_constant, unholdable
from meta_deploy.ort import onnxruntime

# These pass numbers on as they are.
EXACT = frozenset(
    (
        *("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Pad"),
        *("Slice", "Split", "Concat", "Gather", "GatherElements", "GatherND", "ScatterND", "ScatterElements"),
        *("DepthToSpace", "SpaceToDepth", "Where", "Compress", "Trilu", "Neg", "Abs", "Relu"),
        *("Min", "Max", "Clip", "MaxPool", "TopK"),
    )
)
_SMALL = frozenset(("Softmax", "Sigmoid", "Tanh", "Gelu", "Cast"))  # make nothing above 1 or their input


def activation_maxima(
    model: ir.Model, feeds: Iterable[Mapping[str, np.ndarray]], tensors: Collection[str]
) -> dict[str, float]:
    """The largest magnitude of float32 tensors that nodes make, over all inputs.

    Tensors that cannot exceed others of them are left out.

    Args:
        model: a float32 graph with its types inferred; not changed.
        feeds: inputs by name, one dictionary a run.
        tensors: names of those to look at.

    Returns:
        Tensor -> its largest magnitude, infinite where a value was not a number.
    """
    model = model.clone()
    graph = model.graph
    wanted = set(tensors)
    nodes = [node for node in graph if _may_enlarge(node, wanted)]
    watched = [v for node in nodes for v in node.outputs if v.dtype == FLOAT and v.name in wanted]
    if not watched:
        return {}
    graph.outputs[:] = [_magnitude(graph, value, f"maximum_{i}") for i, value in enumerate(watched)]
    session = open_session(model)
    taken = [given.name for given in session.get_inputs()]
    maxima = np.zeros(len(watched))
    for feed in feeds:
        values = np.array([float(v) for v in ort.run(session, None, {name: feed[name] for name in taken})])
        maxima = np.maximum(maxima, np.where(np.isnan(values), np.inf, values))
    return {value.name: float(most) for value, most in zip(watched, maxima, strict=True) if value.name}


def open_session(model: ir.Model) -> onnxruntime.InferenceSession:
    """A session that measures: it holds no more memory than it needs, and goes in the graph's order."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = limited_threads()
    options.enable_cpu_mem_arena = False  # a large model's tensors are gigabytes
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if any(node.op_type == "QuantizeLinear" for node in model.graph):
        # As it is written: rewriting for its own 8-bit kernels drops a ReLU before an 8-bit float.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # in the graph's order: each at once
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _may_enlarge(node: ir.Node, measured: Collection[str]) -> bool:
    """Whether what a node makes may exceed what it reads, or reads something that is not measured."""
    if node.op_type not in EXACT | _SMALL:
        return True
    if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype != FLOAT:
        return True
    return any(
        unholdable(value, ir.DataType.FLOAT16) if is_constant(value) else value.name not in measured
        for value in node.inputs
        if value is not None and value.dtype == FLOAT
    )


def _magnitude(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """The largest magnitude of a tensor, 0 of an empty one, as a new node's output of no dimensions."""
    absolute = ir.node("Abs", [value])
    most = ir.node("ReduceMax", [absolute.outputs[0]], {"keepdims": ir.AttrInt64("keepdims", 0)})
    maker = value.producer()
    assert maker is not None
    graph.insert_after(maker, [absolute, most])  # where the tensor is in memory anyway
    output = most.outputs[0]
    output.name, output.dtype, output.shape = name, FLOAT, ir.Shape([])
    return output
