"""The same constants in a smaller file: as float16 where that is exact, as one number where all are the same.

Runtimes compute them back once, when they open the file. Knows ONNX; no model and no target.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

_OPSET = 9  # the first with ConstantOfShape
_SMALLEST = 1024  # values; below, a node is hardly smaller than what it saves


def compact(model: onnx.ModelProto) -> int:
    """Store float32 initializers in fewer bytes, in place; the graph computes bit for bit the same.

    One whose values float16 holds exactly, as those of a checkpoint in float16, becomes a float16 initializer
    and a Cast; one with a single value becomes a ConstantOfShape. What is also an input of the graph stays.

    Returns:
        How many initializers changed.
    """
    if any(opset.domain == "" and opset.version < _OPSET for opset in model.opset_import):
        return 0
    graph = model.graph
    inputs = {value.name for value in graph.input}
    taken = inputs | {i.name for i in graph.initializer} | {n for node in graph.node for n in node.output}
    shrunk = [
        node
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in inputs
        for node in _shrink(tensor, taken)
    ]
    if shrunk:
        rest = list(graph.node)
        del graph.node[:]
        graph.node.extend(shrunk + rest)
    return len(shrunk)


def _shrink(tensor: onnx.TensorProto, taken: set[str]) -> list[onnx.NodeProto]:
    """Change an initializer in place; the node that computes its value under its old name, if any."""
    if tensor.HasField("data_location") and tensor.data_location == onnx.TensorProto.EXTERNAL:
        return []
    if np.prod(tensor.dims, dtype=np.int64) < _SMALLEST:
        return []
    values, name = numpy_helper.to_array(tensor), tensor.name
    bits = values.reshape(-1).view(np.uint32)
    if (bits == bits[0]).all():
        shape = np.array(values.shape, np.int64)
        tensor.CopyFrom(numpy_helper.from_array(shape, _fresh(f"{name}/shape", taken)))
        value = numpy_helper.from_array(values.reshape(-1)[:1])
        return [helper.make_node("ConstantOfShape", [tensor.name], [name], name, value=value)]
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32).reshape(-1).view(np.uint32), bits):
        return []
    tensor.CopyFrom(numpy_helper.from_array(half, _fresh(f"{name}/float16", taken)))
    return [helper.make_node("Cast", [tensor.name], [name], name, to=onnx.TensorProto.FLOAT)]


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
