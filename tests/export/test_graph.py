"""ONNX model to graph and back: the same function, constants in their own type, questions answered right."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from onnx import TensorProto, helper

from meta_deploy.export.passes.graph import (
    IR_VERSION,
    constant_value,
    producer,
    sole_consumer,
    to_graph,
    to_proto,
)
from tests.export.small_graphs import FLOAT, model, run, value


def test_float_list_constants_stay_float32():
    """Regression: graph-surgeon reads a Constant's `value_floats` as float64."""
    constant = helper.make_node("Constant", [], ["c"], value_floats=[0.5, 1.5])
    scalar = helper.make_node("Constant", [], ["s"], value_float=2.0)
    add = helper.make_node("Add", ["x", "c"], ["a"])
    proto = model([constant, scalar, add, helper.make_node("Mul", ["a", "s"], ["y"])], [value("x", [2])])
    graph = to_graph(proto)
    assert [t.dtype for t in graph.tensors().values() if isinstance(t, gs.Constant)] == [np.float32] * 2
    np.testing.assert_array_equal(run(to_proto(graph), x=np.ones(2, np.float32))["y"], [3, 5])


def test_float_list_constants_in_a_branch_stay_float32():
    branches = {}
    for name, numbers in (("then_branch", [1.5, 2.5]), ("else_branch", [0.5, 0.25])):
        node = helper.make_node("Constant", [], [f"{name}_c"], value_floats=numbers)
        add = helper.make_node("Add", ["x", f"{name}_c"], [f"{name}_y"])
        branches[name] = helper.make_graph([node, add], name, [], [value(f"{name}_y", [2])])
    proto = model(
        [helper.make_node("If", ["c"], ["y"], **branches)],
        [value("x", [2]), value("c", [], TensorProto.BOOL)],
    )
    again = to_proto(to_graph(proto))
    for c, expected in ((True, [2.5, 3.5]), (False, [1.5, 1.25])):
        got = run(again, x=np.ones(2, np.float32), c=np.array(c))["y"]
        np.testing.assert_array_equal(got, expected)


def test_local_functions_are_inlined():
    body = [helper.make_node("Add", ["a", "a"], ["twice"]), helper.make_node("Relu", ["twice"], ["b"])]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Double", ["a"], ["b"], body, imports[:1])
    proto = model(
        [
            helper.make_node("Double", ["x"], ["h"], domain="own"),
            helper.make_node("Double", ["h"], ["y"], domain="own"),
        ],
        [value("x", [2])],
        opset_imports=imports,
        functions=[function],
    )
    again = to_proto(to_graph(proto))
    assert not again.functions
    assert {node.op_type for node in again.graph.node} == {"Add", "Relu"}
    np.testing.assert_array_equal(run(again, x=np.array([-1, 2], np.float32))["y"], [0, 8])


def test_a_sequence_is_not_taken_for_a_tensor():
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["s"], axis=0, keepdims=0),
        helper.make_node("SequenceAt", ["s", "i"], ["y"]),
    ]
    index = helper.make_tensor("i", TensorProto.INT64, [], [1])
    again = to_proto(to_graph(model(nodes, [value("x", [2, 3])], [value("y", [3])], [index])))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(run(again, x=x)["y"], x[1])


def test_the_written_model_is_one_that_onnx_runtime_accepts():
    proto = to_proto(to_graph(model([helper.make_node("Relu", ["x"], ["y"])], [value("x", ["n", 3])])))
    assert proto.ir_version == IR_VERSION
    onnx.checker.check_model(proto, full_check=True)
    onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"


def test_the_model_read_is_not_changed():
    constant = helper.make_node("Constant", [], ["c"], value_floats=[0.5])
    proto = model([constant, helper.make_node("Add", ["x", "c"], ["y"])], [value("x", [2])])
    before = proto.SerializeToString()
    to_graph(proto).nodes.clear()
    assert proto.SerializeToString() == before


def chain() -> gs.Graph:
    """x -> Relu -> h -> (Abs -> y, Neg -> z), h is an output too."""
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("Abs", ["h"], ["y"]),
        helper.make_node("Add", ["y", "c"], ["z"]),
        helper.make_node("Mul", ["z", "z"], ["w"]),
    ]
    initializers = [helper.make_tensor("c", FLOAT, [1], [3.0])]
    return to_graph(model(nodes, [value("x", [2])], ["h", "w"], initializers=initializers))


def test_producer_is_the_node_behind_a_tensor():
    tensors = chain().tensors()
    assert producer(tensors["y"]).op == "Abs"
    assert producer(tensors["y"], "Abs").op == "Abs"
    assert producer(tensors["y"], "Relu") is None
    assert producer(tensors["x"]) is None
    assert producer(tensors["c"]) is None


def test_an_output_or_a_tensor_read_twice_has_no_sole_consumer():
    graph = chain()
    tensors = graph.tensors()
    assert sole_consumer(graph, tensors["y"])
    assert not sole_consumer(graph, tensors["h"])  # an output
    assert not sole_consumer(graph, tensors["z"])  # twice by one node
    assert not sole_consumer(graph, tensors["w"])  # by none


def test_a_tensor_that_a_branch_reads_has_no_sole_consumer():
    branch = helper.make_graph([helper.make_node("Neg", ["h"], ["t"])], "then", [], [value("t", [2])])
    other = helper.make_graph([helper.make_node("Abs", ["x"], ["e"])], "else", [], [value("e", [2])])
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("Abs", ["h"], ["y"]),
        helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=other),
    ]
    graph = to_graph(model(nodes, [value("x", [2]), value("c", [], TensorProto.BOOL)], ["y", "z"]))
    assert not sole_consumer(graph, graph.tensors()["h"])


def test_constant_value_is_that_of_constants_only():
    tensors = chain().tensors()
    np.testing.assert_array_equal(constant_value(tensors["c"]), [3])
    assert constant_value(tensors["x"]) is None
    assert constant_value(tensors["h"]) is None
