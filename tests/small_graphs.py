"""Small ONNX models by hand, and how to run them: what the tests of the passes share."""

import sys

import onnx
import onnxruntime
from onnx import TensorProto, helper

from meta_deploy.graph.graph import name_batch

FLOAT = TensorProto.FLOAT


def value(name, shape=None, kind=FLOAT):
    """A typed name; without a shape, of unknown shape."""
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes, inputs, outputs=None, initializers=(), infer=True, opset_imports=None, functions=(), data_prop=True
):
    """A checked model; `outputs` are names (default: "y") or value infos; shapes are inferred."""
    wanted = [helper.make_empty_tensor_value_info(o) if isinstance(o, str) else o for o in outputs or ["y"]]
    graph = helper.make_graph(list(nodes), "small", list(inputs), wanted, list(initializers))
    opset_imports = opset_imports or [helper.make_opsetid("", 18)]
    proto = helper.make_model(graph, opset_imports=opset_imports, functions=list(functions), ir_version=10)
    if infer:
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=data_prop)
    return proto


def any_batch(proto):
    """A model that was written for a batch of BATCH, now for one of any size, as PyTorch would write it."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    name_batch(proto)
    return proto


def inferred(proto):
    """After a change of the graph: with the shapes that it has now."""
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def without_size(proto, axis):
    """A model with the name "n" for the size of one axis of its inputs, or for None without their shapes."""
    for i in proto.graph.input:
        if axis is None:
            i.type.tensor_type.ClearField("shape")
        else:
            i.type.tensor_type.shape.dim[axis].dim_param = "n"
    return inferred(proto)


def session(proto):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # As written: ONNX Runtime's own rewriting is not what is tested.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])


def run(proto, **feeds):
    """Outputs by name, in the order of the graph."""
    s = session(proto)
    names = [output.name for output in s.get_outputs()]
    return dict(zip(names, s.run(None, feeds), strict=True))


def calls(work):
    """How many functions are called while `work()` runs, C's too: its time, the same on any machine."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count
