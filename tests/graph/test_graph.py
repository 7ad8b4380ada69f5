"""ONNX model to graph and back: the same function, constants in their own type, questions answered right."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.graph.graph import (
    BATCH,
    IR_VERSION,
    IdentitySet,
    constant_value,
    detach,
    is_output,
    own_nodes,
    producer,
    sole_consumer,
    static_shape,
    tidy,
    to_graph,
    to_proto,
)
from meta_deploy.graph.pipeline import run_passes
from tests.small_graphs import FLOAT, model, run, value


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


def dims(info):
    return [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]


def test_a_batch_has_a_number_in_a_graph_and_a_name_in_a_model():
    nodes = [helper.make_node("Neg", ["x"], ["h"]), helper.make_node("Neg", ["h"], ["y"])]
    named = value("h", ["6*n", "n", "m", "n*m", "2*m", "an", 3])
    proto = model(nodes, [value("x", ["n", 3])], [value("y", ["2*n"])], infer=False)
    proto.graph.value_info.append(named)
    graph = to_graph(proto)
    assert graph.inputs[0].shape == [BATCH, 3]
    assert graph.tensors()["h"].shape == [6 * BATCH, BATCH, "m", "n*m", "2*m", "an", 3]
    again = to_proto(graph)
    assert dims(again.graph.input[0]) == ["batch", 3]
    assert dims(again.graph.output[0]) == ["2*batch"]
    (h,) = (info for info in again.graph.value_info if info.name == "h")
    assert dims(h) == ["6*batch", "batch", "m", "n*m", "2*m", "an", 3]
    assert to_graph(again).tensors()["h"].shape == [6 * BATCH, BATCH, "m", "n*m", "2*m", "an", 3]


@pytest.mark.parametrize("shape", [["n", "batch"], ["n", "2*batch"], [2, "n"], ["", "n"], []])
def test_where_no_batch_is_to_be_named_shapes_stay_as_they_are(shape):
    proto = model([helper.make_node("Relu", ["x"], ["y"])], [value("x", [s or None for s in shape])])
    assert dims(to_proto(to_graph(proto)).graph.input[0]) == [s or 0 for s in shape]


def test_a_multiple_that_is_too_large_to_be_a_number_keeps_its_name():
    nodes = [helper.make_node("Reshape", ["x", "s"], ["h"]), helper.make_node("Neg", ["h"], ["y"])]
    proto = model(nodes, [value("x", ["n"]), value("s", [1], TensorProto.INT64)], infer=False)
    proto.graph.value_info.append(value("h", ["5000000000*n"]))
    assert to_graph(proto).tensors()["h"].shape == ["5000000000*n"]


def test_a_reshape_of_an_old_opset_has_no_target_to_write():
    nodes = [helper.make_node("Reshape", ["x"], ["h"], shape=[2, 6]), helper.make_node("Neg", ["h"], ["y"])]
    imports = [helper.make_opsetid("", 4)]
    proto = model(nodes, [value("x", [3, 4])], opset_imports=imports, infer=False)
    after, _ = run_passes(proto, ["clean-up"])
    assert [n.op_type for n in after.graph.node] == ["Reshape", "Neg"]


def test_a_batch_in_a_subgraph_is_the_same():
    body = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "body", [], [value("z", ["2*n"])])
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
    inputs = [value("x", ["n"]), value("c", [], TensorProto.BOOL)]
    graph = to_graph(model(nodes, inputs, infer=False))
    assert graph.nodes[0].attrs["then_branch"].outputs[0].shape == [2 * BATCH]
    inner = to_proto(graph).graph.node[0].attribute[0].g
    assert dims(inner.output[0]) == ["2*batch"]


@pytest.mark.parametrize(("target", "written"), [([6 * BATCH, 2], [-1, 2]), ([0, 2, BATCH], [0, 2, -1])])
def test_a_reshape_to_a_batch_is_one_to_what_is_left(target, written):
    proto = model([helper.make_node("Neg", ["x"], ["y"])], [value("x", ["n", 4, 3])])
    graph = to_graph(proto)
    shape = gs.Constant("shape", np.array(target))
    graph.nodes.append(gs.Node("Reshape", "r", {}, [graph.inputs[0], shape], [gs.Variable("z", np.float32)]))
    (constant,) = to_proto(graph).graph.initializer
    assert numpy_helper.to_array(constant).tolist() == written
    assert graph.nodes[-1].inputs[1].values.tolist() == target


def test_what_is_known_of_a_shape():
    def shape(*sizes, **options):
        return static_shape(gs.Variable("x", np.float32, sizes), **options)

    assert shape(2, 3) == [2, 3]
    assert shape(6 * BATCH, 3) == [6 * BATCH, 3]
    assert shape(6 * BATCH, 3, batch=2) == [12, 3]
    assert shape(BATCH, 0, batch=1) == [1, 0]
    assert shape(BATCH, "n") is None
    assert shape(BATCH, BATCH, batch=1) is None  # there is one batch axis
    assert static_shape(gs.Variable("x", np.float32)) is None


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


def branch_model(then):
    """y is what a node makes of h = -x in one branch, or the negative of h."""
    out = value(then.output[0], [2])
    other = helper.make_graph([helper.make_node("Neg", ["h"], ["o"])], "else", [], [value("o", [2])])
    nodes = [
        helper.make_node("Neg", ["x"], ["h"]),
        helper.make_node("Relu", ["x"], ["dead"]),
        helper.make_node(
            "If", ["c"], ["y"], then_branch=helper.make_graph([then], "then", [], [out]), else_branch=other
        ),
    ]
    return model(nodes, [value("x", [2]), value("c", [], TensorProto.BOOL)])


def test_tidy_keeps_what_a_branch_reads_and_drops_the_rest():
    graph = to_graph(branch_model(helper.make_node("Relu", ["h"], ["t"])))
    tidy(graph)
    assert [node.op for node in graph.nodes] == ["Neg", "If"]


def test_a_branch_owns_its_nodes_though_they_read_the_graphs_tensors():
    graph = to_graph(branch_model(helper.make_node("Relu", ["h"], ["t"])))
    own = own_nodes(graph)
    (h,) = graph.nodes[0].outputs
    assert {node.op: node in own for node in h.outputs} == {"Relu": False, "Neg": False}
    assert [node.op for node in own] == ["Neg", "Relu", "If"]
    assert is_output(graph, graph.nodes[2].outputs[0])
    assert not is_output(graph, h)


def test_nodes_alike_are_different_members():
    nodes = [gs.Node("Relu"), gs.Node("Relu")]
    found = IdentitySet([nodes[1], nodes[0], nodes[1]])
    assert [node is nodes[1] for node in found] == [True, False]
    assert len(found) == 2
    assert gs.Node("Relu") not in found


def test_detach_goes_back_to_the_first_node_that_something_else_needs():
    chain = [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    chain += [helper.make_node("Abs", ["b"], ["c"]), helper.make_node("Exp", ["a"], ["y"])]
    graph = to_graph(model(chain, [value("x", [2])]))
    detach(graph, graph.nodes[2])
    assert [len(node.inputs) for node in graph.nodes] == [1, 0, 0, 1]
