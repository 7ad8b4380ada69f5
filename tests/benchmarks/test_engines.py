"""Engines are built for real, without a GPU, and their logs are read; float16 graphs compute as before."""

import platform

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.engines import BuildError, Layer, build, parse_log, to_fp16
from tests.export.small_graphs import model, run, value

node = helper.make_node
builds = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="elsewhere the dev extra does not bring tensorrt-rtx",
)


def floats(name, *shape, seed=0, scale=0.3):
    values = np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def ints(name, *numbers):
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


@pytest.fixture(scope="module")
def block():
    """A convolution, attention of two heads over its pixels, and a resize: a bit of everything."""
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("Reshape", ["r", "tokens"], ["t"]),
        node("Transpose", ["t"], ["u"], perm=[0, 2, 1]),
        node("MatMul", ["u", "qkv"], ["p"]),
        node("Reshape", ["p", "heads"], ["h"]),
        node("Transpose", ["h"], ["i"], perm=[2, 0, 3, 1, 4]),
        node("Split", ["i"], ["q1", "k1", "v1"], axis=0, num_outputs=3),
        *(node("Squeeze", [f"{name}1", "zero"], [name]) for name in "qkv"),
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("Constant", [], ["scale"], value_float=0.25),
        node("Mul", ["q", "scale"], ["qs"]),
        node("MatMul", ["qs", "kt"], ["s"]),
        node("Softmax", ["s"], ["a"], axis=-1),
        node("MatMul", ["a", "v"], ["o"]),
        node("Transpose", ["o"], ["ot"], perm=[0, 1, 3, 2]),
        node("Reshape", ["ot", "image"], ["m"]),
        node("Resize", ["m", "", "scales"], ["y"], mode="linear"),
    ]
    constants = [
        floats("w", 32, 3, 3, 3),
        floats("b", 32, seed=1),
        floats("qkv", 32, 96, seed=2),
        *(ints("tokens", 1, 32, 256), ints("heads", 1, 256, 3, 2, 16), ints("image", 1, 32, 16, 16)),
        ints("zero", 0),
        numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
    ]
    return model(nodes, [value("x", [1, 3, 16, 16])], [value("y", [1, 32, 32, 32])], constants)


def picture(*shape):
    return np.random.default_rng(9).normal(size=shape).astype(np.float32)


# --- engines ---


@builds
def test_an_engine_of_float16_fuses_attention_and_its_log_says_so(block):
    engine = build(to_fp16(block))
    count = engine.count()
    assert count["attention"] == 1
    assert count["attention"] + count["generated"] < count["layers"] < 15
    assert "correlation" in {layer.kind for layer in engine.layers}
    assert all(layer.name and layer.kind for layer in engine.layers)
    assert 0 < engine.activation_mb < 20  # of tensors and of the kernels' own
    # The weights, at two bytes each, and what the builder lays out anew.
    assert 2 * (32 * 27 + 32 + 32 * 96) / 1e6 <= engine.weights_mb < engine.plan_mb < 1
    assert engine.seconds > 0


@builds
def test_an_engine_of_float32_does_not_fuse_attention_and_takes_more_layers(block):
    engine = build(block)
    assert engine.count()["attention"] == 0
    assert engine.count()["layers"] > build(to_fp16(block)).count()["layers"]


@builds
def test_a_graph_that_does_not_build_says_why():
    strange = model(
        [node("Strange", ["x"], ["y"], domain="somebody")],
        [value("x", [2])],
        [value("y", [2])],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("somebody", 1)],
    )
    with pytest.raises(BuildError, match="Strange"):
        build(strange)
    boxes = node("NonMaxSuppression", ["boxes", "scores"], ["y"])  # parses, and then has no implementation
    inputs = [value("boxes", [1, 4, 4]), value("scores", [1, 1, 4])]
    with pytest.raises(BuildError, match=r"\w"):
        build(model([boxes], inputs, [value("y", ["n", 3], TensorProto.INT64)]))


LOG = [
    "Total Activation Memory: 1500000 bytes",
    "Total Weights Memory: 250000 bytes",
    "Layers:\nName: conv, LayerType: correlation, Inputs: [ { Name: TacticName: trap, Dimensions: [1] }], "
    "TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: conv]\n"
    "Name: __myl_FcAdd_myl0_1, LayerType: runtime_fusion, Inputs: [], TacticName: , StreamId: 0\n"
    "Name: __myl_Add_myl0_2, LayerType: kgen, Inputs: [], TacticName: __myl_Add_0x12, StreamId: 0\n"
    "Name: _gemm_mha_v2_myl0_3, LayerType: kgen, Inputs: [], TacticName: _gemm_mha_v2_0x34, StreamId: 0\n"
    "Name: signal_4, LayerType: signal, Inputs: [], TacticName: , StreamId: 1\n"
    "Name: wait_5, LayerType: wait, Inputs: [], TacticName: , StreamId: 0\n"
    "\nI/O Tensors:\n Name: x, IOMode: Input",
]


def test_a_log_is_read_layer_by_layer():
    layers, memory = parse_log(LOG)
    assert memory == {"Activation": 1.5, "Weights": 0.25}
    assert layers[0] == Layer("conv", "correlation", "__myelin_CASK_STUB")
    assert [layer.generated for layer in layers] == [False, False, True, False, False, False]
    assert [layer.attention for layer in layers] == [False, False, False, True, False, False]
    assert [layer.synchronizes for layer in layers] == [False, False, False, False, True, True]


@pytest.mark.parametrize("missing", range(3))
def test_a_log_of_another_format_is_an_error_and_not_an_empty_engine(missing):
    with pytest.raises(BuildError, match="format"):
        parse_log(line for i, line in enumerate(LOG) if i != missing)


# --- float16 ---


def types(proto):
    """Of the outputs of all nodes, as ONNX infers them."""
    graph = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True).graph
    infos = (*graph.input, *graph.value_info, *graph.output)
    return {info.name: info.type.tensor_type.elem_type for info in infos}


def test_a_float16_graph_computes_what_it_did_and_speaks_float32(block):
    half = to_fp16(block)
    onnx.checker.check_model(half, full_check=True)
    x = picture(1, 3, 16, 16)
    expected, actual = run(block, x=x)["y"], run(half, x=x)["y"]
    assert actual.dtype == np.float32
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert 0 < error < 5e-3
    kinds = types(half)
    assert {kinds.pop("x"), kinds.pop("y")} == {TensorProto.FLOAT}
    assert TensorProto.FLOAT not in kinds.values()


def test_the_graph_given_stays_as_it_is(block):
    before = block.SerializeToString()
    to_fp16(block)
    assert block.SerializeToString() == before


def test_every_constant_in_a_node_becomes_float16():
    one = numpy_helper.from_array(np.ones(2, np.float32))
    nodes = [
        node("Constant", [], ["a"], value=one),
        node("Constant", [], ["b"], value_float=1.5),
        node("Constant", [], ["c"], value_floats=[2.0, 3.0]),
        node("Constant", [], ["n"], value_ints=[2]),
        node("ConstantOfShape", ["n"], ["d"]),
        node("ConstantOfShape", ["n"], ["e"], value=numpy_helper.from_array(np.ones(1, np.float32))),
        node("Cast", ["n"], ["f"], to=TensorProto.FLOAT),
        node("Sum", ["x", *"abcdef"], ["y"]),
    ]
    half = to_fp16(model(nodes, [value("x", [2])], [value("y", [2])]))
    assert run(half, x=np.zeros(2, np.float32))["y"].tolist() == [7.5, 8.5]


def test_what_float16_cannot_hold_is_its_largest_and_infinity_stays():
    mask = numpy_helper.from_array(np.array([-3.4e38, -np.inf, 1e5], np.float32), "mask")
    half = to_fp16(model([node("Add", ["x", "mask"], ["y"])], [value("x", [3])], initializers=[mask]))
    assert run(half, x=np.zeros(3, np.float32))["y"].tolist() == [-65504.0, -np.inf, 65504.0]


@pytest.mark.parametrize("constant", [True, False])
def test_scales_of_a_resize_stay_float32_and_whoever_shares_them_does_not(constant):
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "s")
    nodes = [node("Resize", ["x", "", "s"], ["r"]), node("Resize", ["r", "", "s"], ["q"])]
    nodes.append(node("Mul", ["q", "s"], ["y"]))
    inputs = [value("x", [1, 1, 1, 1])]
    if constant:
        proto = model(nodes, inputs, [value("y", [1, 1, 4, 4])], [scales])
    else:
        nodes.insert(0, node("Cast", ["n"], ["s"], to=TensorProto.FLOAT))
        proto = model(nodes, inputs, [value("y", None)], [ints("n", 1, 1, 2, 2)])
    x = np.full((1, 1, 1, 1), 3, np.float32)
    assert run(to_fp16(proto), x=x)["y"].tolist() == run(proto, x=x)["y"].tolist()


def test_an_output_that_others_read_is_float16_inside():
    nodes = [node("Relu", ["x"], ["y"]), node("Mul", ["y", "y"], ["z"])]
    half = to_fp16(model(nodes, [value("x", [2])], [value("y", [2]), value("z", [2])]))
    outputs = run(half, x=np.array([-1, 3], np.float32))
    assert {name: array.tolist() for name, array in outputs.items()} == {"y": [0, 3], "z": [0, 9]}
