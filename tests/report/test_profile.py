"""Where a run goes: hand-counted small graphs on ONNX Runtime's profiler, and hand-written events."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_node
from PIL import Image

from meta_deploy.ort import onnxruntime
from meta_deploy.report import openvino_profile
from meta_deploy.report.operators import Call, Tensor, classes, cost
from meta_deploy.report.profile import interpret, live_peak, modules_as_run, profile, read_events
from meta_deploy.report.roofline import measure, under_roof
from meta_deploy.report.schema import Cost, Roofline
from meta_deploy.report.subject import Subject
from tests.small_graphs import model, value

RNG = np.random.default_rng(0)


def weight(name, *shape):
    return onnx.numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32), name)


def whole(name, numbers):
    return onnx.numpy_helper.from_array(np.array(numbers, np.int64), name)


def profiled(tmp_path, nodes, inputs, outputs=None, initializers=(), optimize=False, runs=2, **kwargs):
    proto = model(nodes, inputs, outputs, initializers, **kwargs)
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    feed = {
        i.name: np.ones([dim.dim_value for dim in i.type.tensor_type.shape.dim], np.float32)
        for i in proto.graph.input
    }
    return profile(proto.SerializeToString(), feed, options, tmp_path, runs)


def numbers(row):
    return row.bytes_read, row.bytes_written, row.flops


def by_op(found):
    return {row.op: row for row in found.nodes}


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    """Convolution, then tokens with a norm, a product and a sum, then a part of them."""
    nodes = [
        make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        make_node("Reshape", ["c", "shape"], ["r"]),
        make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        make_node("LayerNormalization", ["t", "scale", "shift"], ["n"]),
        make_node("MatMul", ["n", "m"], ["p"]),
        make_node("Add", ["p", "added"], ["s"]),
        make_node("Slice", ["s", "zero", "three", "one"], ["y"]),
    ]
    weights = [
        *(weight("w", 8, 3, 3, 3), weight("b", 8), weight("scale", 8), weight("shift", 8)),
        *(weight("m", 8, 5), weight("added", 5)),
        *(whole("shape", [1, 8, 24]), whole("zero", [0]), whole("three", [3]), whole("one", [1])),
    ]
    return profiled(tmp_path_factory.mktemp("block"), nodes, [value("x", [1, 3, 4, 6])], None, weights)


def test_bytes_and_flops_are_those_counted_by_hand(block):
    x, c, tokens, p = 3 * 24, 8 * 24, 24 * 8, 24 * 5  # numbers of four bytes
    found = by_op(block)
    assert numbers(found["Conv"]) == (4 * (x + 8 * 27 + 8), 4 * c, c * (2 * 27 + 1))
    assert numbers(found["Reshape"]) == (0, 0, 0)
    assert numbers(found["Transpose"]) == (4 * c, 4 * tokens, 0)
    assert numbers(found["LayerNormalization"]) == (4 * (tokens + 16), 4 * tokens, 7 * tokens)
    assert numbers(found["MatMul"]) == (4 * (tokens + 40), 4 * p, 2 * p * 8)
    assert numbers(found["Add"]) == (4 * (p + 5), 4 * p, p)
    assert numbers(found["Slice"]) == (4 * 15, 4 * 15, 0)


def test_classes_and_what_is_between_nodes_add_up_to_the_run(block):
    assert sum(row.ms for row in block.classes) == pytest.approx(block.ms, rel=1e-9)
    assert sum(row.share for row in block.classes) == pytest.approx(1, rel=1e-9)
    of_nodes = [row for row in block.classes if row.name != "between nodes"]
    assert sum(row.ms for row in of_nodes) == pytest.approx(sum(row.ms for row in block.nodes), rel=1e-9)
    assert sum(row.nodes for row in of_nodes) == len(block.nodes) == 7
    assert {row.name for row in of_nodes} == {
        *("convolution", "data movement", "normalization", "matrix product", "element-wise")
    }


def test_the_peak_of_live_activations_is_the_one_counted_by_hand(block):
    # When the norm runs, its input and its output are alive; Transpose's input is the reshaped convolution.
    peak = block.live_peak
    assert peak.bytes == 2 * 4 * 24 * 8
    assert {tensor.name for tensor in peak.tensors} == {"c", "t"}
    assert peak.node == next(row.name for row in block.nodes if row.op == "Transpose")


def test_a_module_has_the_time_and_work_of_all_that_is_in_it(tmp_path):
    nodes = [
        make_node("Relu", ["x"], ["a"], name="net.blocks.9/relu"),
        make_node("Neg", ["a"], ["b"], name="net.blocks.10.act/neg"),
        make_node("Abs", ["b"], ["c"], name="net.blocks.10/abs"),
        make_node("Exp", ["c"], ["y"], name="exp"),
    ]
    found = profiled(tmp_path, nodes, [value("x", [1, 10])], [value("y", [1, 10])])
    rows = {row.name: row for row in found.modules}
    assert list(rows) == ["", "net", "net.blocks", "net.blocks.9", "net.blocks.10", "net.blocks.10.act"]
    ms = {node.name: node.ms for node in found.nodes}
    assert [node.module for node in found.nodes] == ["net.blocks.9", "net.blocks.10.act", "net.blocks.10", ""]
    assert (rows["net"].nodes, rows["net.blocks.10"].nodes, rows[""].nodes) == (3, 2, 1)
    assert rows["net.blocks.10"].ms == pytest.approx(ms["net.blocks.10.act/neg"] + ms["net.blocks.10/abs"])
    assert rows["net"].ms == pytest.approx(sum(ms.values()) - ms["exp"])
    assert rows["net"].share == pytest.approx(rows["net"].ms / found.ms)
    assert (rows["net"].flops, rows["net"].bytes_read) == (30, 120)


def test_what_the_runtime_makes_of_a_convolution_is_of_its_module(tmp_path):
    """It calls a convolution in its own layout by the tensor that it makes, as "relu_nchwc"."""
    nodes = [
        make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="stem.conv/conv"),
        make_node("Relu", ["c"], ["r"], name="stem.act/relu"),
        make_node("Conv", ["r", "v"], ["y"], pads=[1, 1, 1, 1], name="head.conv/conv"),
    ]
    weights = [weight("w", 16, 16, 3, 3), weight("v", 16, 16, 3, 3)]
    shape = [1, 16, 8, 8]
    found = profiled(tmp_path, nodes, [value("x", shape)], [value("y", shape)], weights, optimize=True)
    convs = [row.module for row in found.nodes if row.op_class == "convolution"]
    assert convs == ["stem.act", "head.conv"]
    assert all(row.module for row in found.nodes if row.op != "ReorderInput")


def test_modules_of_inserted_nodes_are_those_of_what_they_stand_for():
    given = model(
        [
            make_node("Relu", ["x"], ["a"], name="net.act/relu"),
            make_node("Neg", ["a"], ["b.c/d"], name="net.neg/neg"),
            make_node("Abs", ["b.c/d"], ["y"], name="net.abs/abs"),
        ],
        [value("x", [2])],
        [value("y", [2])],
    ).graph
    run = onnx.GraphProto()
    for name, inputs, outputs in (
        ("net.act/relu", ["x"], ["a"]),
        ("InsertedPrecisionFreeCast_b.c/d", ["a"], ["InsertedPrecisionFreeCast_b.c/d"]),
        ("", ["InsertedPrecisionFreeCast_b.c/d"], ["new"]),
        ("net.abs/abs/fused", ["new"], ["y"]),
    ):
        run.node.add(name=name, op_type="Op", input=inputs, output=outputs)
    assert list(modules_as_run(given, run).values()) == ["net.act", "net.neg", "net.neg", "net.abs"]


def test_graphs_that_name_no_module_have_no_table_of_them(block):
    assert block.modules == ()


def test_weights_that_the_runtime_repacks_are_counted(tmp_path):
    nodes = [make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)]
    inputs, weights = [value("x", [64, 32])], [weight("w", 48, 32), weight("b", 48)]
    found = profiled(tmp_path, nodes, inputs, None, weights, optimize=True)
    (row,) = found.nodes
    assert "float 48x32" not in row.inputs  # or this looks at nothing
    assert numbers(row) == (4 * (64 * 32 + 48 * 32 + 48), 4 * 64 * 48, 64 * 48 * (2 * 32 + 1))


def test_what_the_runtime_fuses_is_one_node_with_all_that_it_does(tmp_path):
    nodes = [make_node("Conv", ["x", "w", "b"], ["c"]), make_node("Relu", ["c"], ["y"])]
    inputs, weights = [value("x", [1, 16, 8, 8])], [weight("w", 16, 16, 1, 1), weight("b", 16)]
    found = profiled(tmp_path, nodes, inputs, None, weights, optimize=True)
    assert "Relu" not in by_op(found)
    assert sum(row.flops for row in found.nodes) == 16 * 64 * (2 * 16 + 1 + 1)


def test_the_time_of_a_loop_is_not_counted_twice(tmp_path):
    body = onnx.helper.make_graph(
        [make_node("MatMul", ["v", "w"], ["out"], name="inside"), make_node("Identity", ["go"], ["on"])],
        "body",
        [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("v", [64, 64])],
        [value("on", [], TensorProto.BOOL), value("out", [64, 64])],
    )
    go = onnx.numpy_helper.from_array(np.array(True), "start")
    nodes = [make_node("Loop", ["times", "start", "x"], ["y"], body=body)]
    found = profiled(
        tmp_path, nodes, [value("x", [64, 64])], None, [whole("times", 5), go, weight("w", 64, 64)]
    )
    rows = by_op(found)
    assert rows["MatMul"].calls == 5
    assert rows["MatMul"].flops == 5 * 2 * 64**3
    assert rows["Loop"].flops is None
    assert sum(row.ms for row in found.nodes) <= found.ms


def test_an_attention_that_is_written_out_is_one_with_all_in_it(tmp_path):
    nodes = [
        make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2], name="before"),
        make_node("MatMul", ["q", "kt"], ["s"], name="first"),
        make_node("Mul", ["s", "scale"], ["scaled"], name="scaling"),
        make_node("Softmax", ["scaled"], ["p"], name="softmax"),
        make_node("MatMul", ["p", "v"], ["a"], name="second"),
        make_node("Softmax", ["a"], ["y"], name="scores"),
    ]
    inputs = [value(name, [1, 2, 6, 4]) for name in "qkv"]
    found = profiled(tmp_path, nodes, inputs, None, [weight("scale")])
    kinds = {row.name: row.op_class for row in found.nodes}
    assert {name for name, kind in kinds.items() if kind == "attention"} == {
        *("first", "scaling", "softmax", "second")
    }
    assert (kinds["before"], kinds["scores"]) == ("data movement", "element-wise")
    fused = cost(
        Call(
            "MultiHeadAttention",
            [Tensor("float", (1, 6, 8))] * 3,
            [Tensor("float", (1, 6, 8))],
            {"num_heads": 2},
        )
    )
    assert fused.flops == sum(row.flops for row in found.nodes if row.op_class == "attention")


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "attributes", "expected"),
    [
        ("ConvTranspose", [(1, 4, 5, 5), (4, 2, 2, 2), (2,)], [(1, 2, 10, 10)], {}, 2 * 100 * 8 + 200),
        ("FusedMatMul", [(3, 7, 5), (3, 7, 2)], [(3, 5, 2)], {"transA": 1}, 2 * 30 * 7),
        ("MaxPool", [(1, 2, 4, 4)], [(1, 2, 2, 2)], {"kernel_shape": [2, 2]}, 8 * 4),
        ("Resize", [(1, 2, 4, 4)], [(1, 2, 8, 8)], {"mode": "linear"}, 128 * 7),
        ("Resize", [(1, 2, 4, 4)], [(1, 2, 8, 8)], {"mode": "nearest"}, 0),
        ("Sum", [(5,), (5,), (5,)], [(5,)], {}, 10),
        ("ReduceMean", [(5, 6)], [(5, 1)], {}, 30),
        ("MultiHeadAttention", [(1, 6, 2, 3, 4)], [(1, 6, 8)], {"num_heads": 2}, 36 * (16 + 16 + 12)),
        ("NonMaxSuppression", [(1, 9, 4), (1, 1, 9)], [(3, 3)], {}, 0),
        ("SomethingNew", [(3,)], [(3,)], {}, None),
    ],
)
def test_flops_by_definition(op, inputs, outputs, attributes, expected):
    tensors = [[Tensor("float", shape) for shape in shapes] for shapes in (inputs, outputs)]
    assert cost(Call(op, *tensors, attributes)).flops == expected


def test_bytes_go_by_the_type():
    given = [Tensor("float16", (3, 5)), Tensor("int64", (2,))]
    found = cost(Call("Gather", given, [Tensor("float16", (2, 5))], {}))
    assert (found.bytes_read, found.bytes_written) == (20 + 16, 20)
    assert Tensor("uint8", (7,)).bytes == 7
    assert Tensor("string", (7,)).bytes is None


def test_operators_of_no_class_are_others():
    assert classes(model([make_node("Hardmax", ["x"], ["y"], name="n")], [value("x", [2, 2])]).graph) == {
        "n": "other"
    }


# --- OpenVINO -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_openvino():
    """The graph of both libraries: a grouped convolution, an attention, a product and a norm."""
    nodes = [
        make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], group=4),
        make_node("Reshape", ["c", "heads"], ["v"]),
        make_node("Transpose", ["v"], ["kt"], perm=[0, 1, 3, 2]),
        make_node("MatMul", ["v", "kt"], ["s"]),
        make_node("Softmax", ["s"], ["softmax"], name="softmax"),
        make_node("MatMul", ["softmax", "v"], ["a"]),
        make_node("MatMul", ["a", "m"], ["p"]),
        make_node("LayerNormalization", ["p", "scale", "shift"], ["y"]),
    ]
    weights = [
        *(
            weight("w", 16, 4, 3, 3),
            weight("b", 16),
            weight("m", 8, 32),
            weight("scale", 32),
            weight("shift", 32),
        ),
        whole("heads", [1, 2, 64, 8]),
    ]
    proto = model(nodes, [value("x", [1, 16, 8, 8])], None, weights)
    feed = {"x": RNG.standard_normal((1, 16, 8, 8)).astype(np.float32)}
    return openvino_profile.profile(proto.SerializeToString(), b"", "f32", feed, 1, runs=1)


def test_on_openvino_products_and_convolutions_are_those_counted_by_hand(on_openvino):
    flops = {}
    for row in on_openvino.nodes:
        flops[row.op_class] = flops.get(row.op_class, 0) + (row.flops or 0)
    assert flops["convolution"] in (1024 * 2 * 36, 1024 * (2 * 36 + 1))  # the bias may be apart
    assert flops["matrix product"] == 64 * 64 * 2 * 8
    assert flops["attention"] in (64 * 64 * (64 + 10), 64 * 64 * (64 + 12))  # in one node, with a scale


def test_on_openvino_nodes_tell_their_modules(tmp_path):
    nodes = [
        make_node("MatMul", ["x", "m"], ["a"], name="net.fc/matmul"),
        make_node("Relu", ["a"], ["y"], name="net.act/relu"),
    ]
    proto = model(nodes, [value("x", [8, 16])], [value("y", [8, 4])], [weight("m", 16, 4)])
    feed = {"x": np.ones((8, 16), np.float32)}
    found = openvino_profile.profile(proto.SerializeToString(), b"", "f32", feed, 1, 1)
    assert "net" in {row.name for row in found.modules}
    assert {node.module for node in found.nodes if node.op in ("FullyConnected", "MatMul")} <= {
        *("net.fc", "net.act")
    }


def test_on_openvino_classes_add_up_too_and_activations_have_a_peak(on_openvino):
    assert sum(row.ms for row in on_openvino.classes) == pytest.approx(on_openvino.ms)
    assert all(row.ms >= 0 for row in on_openvino.classes)
    assert on_openvino.live_peak.bytes >= 4 * (1024 + 4096)
    assert on_openvino.by.startswith("OpenVINO 20")


# --- events by hand -----------------------------------------------------------------------------------------


def event(name, ts, dur, op="Add", tid=1):
    args = {"op_name": op, "input_type_shape": [{"float": [2]}], "output_type_shape": [{"float": [2]}]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "tid": tid, "args": args}


def test_each_event_has_its_own_time_alone_and_belongs_to_its_run():
    events = [
        {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 5},
        event("folded", 1, 2),  # a constant, before any run
        *({"cat": "Session", "name": "model_run", "ts": ts, "dur": 50} for ts in (10, 100)),
        {"cat": "Node", "name": "a_fence_before", "ts": 11, "dur": 7, "tid": 1, "args": {}},
        event("loop", 101, 40, "Loop"),
        event("inner", 105, 10),
        event("inner", 120, 15),
        event("a", 12, 8),
    ]
    spans, (first, second) = read_events(events)
    assert spans == [50, 50]
    assert [(e.name, e.micros) for e in first] == [("a", 8)]
    assert [(e.name, e.micros) for e in second] == [("loop", 15), ("inner", 10), ("inner", 15)]


def test_the_first_run_is_not_counted():
    graph = model([make_node("Relu", ["x"], ["y"], name="n")], [value("x", [2])]).graph
    events = []
    for i, dur in enumerate((90, 10, 20)):
        events.append({"cat": "Session", "name": "model_run", "ts": 1000 * i, "dur": dur + 2})
        events.append(event("n", 1000 * i + 1, dur, "Relu"))
    found = interpret(events, graph, "by hand")
    assert (found.runs, found.ms) == (2, 0.017)
    assert found.nodes[0].ms == 0.015
    best = interpret(events, graph, "by hand", best=True)
    assert (best.runs, best.ms, best.nodes[0].ms) == (1, 0.012, 0.01)
    assert live_peak([], graph) is None


def test_a_node_that_the_graph_does_not_name_has_its_operators_class():
    graph = model([make_node("Relu", ["x"], ["y"], name="n")], [value("x", [2])]).graph
    events = []
    for i in range(2):
        events.append({"cat": "Session", "name": "model_run", "ts": 1000 * i, "dur": 20})
        events.append(event("n", 1000 * i + 1, 5, "Relu"))
        events.append(event("Sqrt_7", 1000 * i + 7, 5, "Sqrt"))  # as ONNX Runtime calls one without a name
    (_, sqrt) = interpret(events, graph, "by hand").nodes
    assert (sqrt.name, sqrt.op_class) == ("Sqrt_7", "element-wise")


# --- the roof -----------------------------------------------------------------------------------------------


def test_the_roof_tells_what_binds_a_node(block):
    roof = Roofline(bandwidth_gb_s=1, peak_gflop_s=2)
    found = by_op(under_roof(block, roof))
    conv, add = found["Conv"], found["Add"]
    assert (conv.bound, add.bound, found["Reshape"].bound) == ("arithmetic", "memory", None)
    assert conv.intensity == conv.flops / (conv.bytes_read + conv.bytes_written)
    assert conv.share_of_roof == pytest.approx(conv.flops / 2e9 / (conv.ms / 1e3))
    assert add.share_of_roof == pytest.approx((add.bytes_read + add.bytes_written) / 1e9 / (add.ms / 1e3))


def test_this_machine_has_a_roof():
    roof = measure(1)
    assert 0.1 < roof.bandwidth_gb_s < 10_000
    assert 0.1 < roof.peak_gflop_s < 100_000


def test_a_bundle_is_profiled_as_its_back_end_runs_it(bundles, tmp_path):
    found = Subject(str(bundles / "raw"), "auto", 1, [], tmp_path).profile()
    assert {row.op for row in found.nodes} == {"Add", "Greater"}
    assert {type(row).__mro__[1] for row in found.nodes} == {Cost}
    found = Subject(str(bundles / "raw"), "openvino", 1, [], tmp_path).profile()
    assert found.ms > 0


def test_a_profile_is_of_as_many_images_as_are_timed(bundles, tmp_path):
    image = tmp_path / "x.png"
    Image.new("RGB", (64, 64)).save(image)
    for name, count in (("detector-dynamic", 1), ("detector-batch", 4)):
        found = Subject(str(bundles / name), "onnxruntime", 1, [str(image)], tmp_path).profile()
        assert f"float {count}x3x64x64" in by_op(found)["ReduceMax"].inputs


def test_an_attention_in_one_node_is_counted_whichever_way_its_keys_lie():
    q, kt, v = (Tensor("float", shape) for shape in ((1, 2, 6, 4), (1, 2, 4, 9), (1, 2, 9, 4)))
    found = cost(Call("Attention", [q, kt, v], [q], {}))
    assert found.flops == 6 * 9 * (2 * 8 + 2 * 8 + 6 * 2)
