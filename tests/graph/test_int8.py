"""8 bits: where they go, that ONNX Runtime's own kernels take them, and that the numbers stay near."""

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.errors import InputError
from meta_deploy.graph.graph import normalized
from meta_deploy.graph.precision.emulate import emulated
from meta_deploy.graph.precision.int8 import INT8, Quantization, searched
from meta_deploy.graph.precision.lower import to_proto
from meta_deploy.graph.precision.placement import place
from meta_deploy.graph.precision.qdq import insert
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.targets import TARGETS
from tests.small_graphs import model, run, value

ORT = TARGETS["onnxruntime"].eight_bits["int8"]
FREE = EightBitRules(False, True, True, speedup=4, value=0, node=0, channels=2)  # any size pays
SIGNED = EightBitRules(True, False, False, speedup=4, value=0, node=0, channels=2)
TRT = {
    kind: replace(rules, value=0, node=0, channels=2)
    for kind, rules in TARGETS["tensorrt-rtx"].eight_bits.items()
}
OPSET = [helper.make_opsetid("", 20)]


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs, outputs, name=outputs[0], **attributes)


def conv(x, w, y, k=3, **attributes):
    bias = [f"{w}b"] if attributes.pop("bias", False) else []
    return node("Conv", [x, w, *bias], [y], kernel_shape=[k, k], pads=[k // 2] * 4, **attributes)


def constant(name, *shape, scale=0.2):
    numbers = np.random.default_rng(sum(map(ord, name))).normal(0, scale, shape)
    return numpy_helper.from_array(numbers.astype(np.float32), name)


def network():
    """Everything that is quantized: Conv and Relu, Conv alone, MatMul with and without a bias, Gemm."""
    nodes = [
        conv("x", "stem", "a"),
        conv("a", "w1", "b", bias=True),
        node("Relu", ["b"], ["r"]),
        conv("r", "w2", "c", 1),
        node("Gelu", ["c"], ["g"]),
        node("Transpose", ["g"], ["t"], perm=[0, 2, 3, 1]),
        node("MatMul", ["t", "m1"], ["p"]),
        node("Add", ["p", "m1b"], ["q"]),
        node("Gelu", ["q"], ["u"]),
        node("MatMul", ["u", "m2"], ["v"]),
        node("Tanh", ["v"], ["n"]),
        node("Flatten", ["n"], ["f"], axis=3),
        node("Gemm", ["f", "w3", "w3b"], ["h"], transB=1),
        node("Tanh", ["h"], ["k"]),
        node("MatMul", ["k", "last"], ["y"]),
    ]
    constants = [
        *(constant("stem", 16, 3, 3, 3), constant("w1", 32, 16, 3, 3), constant("w1b", 32)),
        *(constant("w2", 32, 32, 1, 1), constant("m1", 32, 48), constant("m1b", 48), constant("m2", 48, 32)),
        *(constant("w3", 24, 32), constant("w3b", 24), constant("last", 24, 4)),
    ]
    return model(nodes, [value("x", [1, 3, 16, 16])], ["y"], constants, opset_imports=OPSET)


def feeds(shape=(1, 3, 16, 16), count=4):
    return [{"x": np.random.default_rng(i).normal(size=shape).astype(np.float32)} for i in range(count)]


def extremes(inputs):
    """A calibration by hand: the graph's own tensors as outputs."""

    def calibrate(graph, placement):
        proto = onnx.shape_inference.infer_shapes(extremes.proto)
        names = list(placement.readers)
        computed = [name for name in names if name not in inputs[0]]
        shown = model(
            proto.graph.node, proto.graph.input, computed, proto.graph.initializer, opset_imports=OPSET
        )
        seen = [{**feed, **run(shown, **feed)} for feed in inputs]
        ends = {
            n: (min(float(s[n].min()) for s in seen), max(float(s[n].max()) for s in seen)) for n in names
        }
        return ends, {"samples": len(inputs), "noun": "inputs", "methods": {"minmax": len(names)}}

    return calibrate


def quantized(proto, rules=FREE, inputs=None, outputs=None):
    extremes.proto = proto
    inputs = inputs or feeds()
    quantization = Quantization(rules, extremes(inputs), outputs)
    return INT8().convert(proto, inputs, quantization=quantization)


def as_it_runs(proto, tmp_path):
    """The operators that ONNX Runtime has after its own rewriting."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]


def ops(proto, op):
    return [n for n in proto.graph.node if n.op_type == op]


def reasons(nodes, constants, rules=FREE, shape=(1, 16, 16, 16), outputs=("y",), shipped=None):
    """Why each product of a graph stays in float32, by name; empty for those in 8 bits."""
    proto = model(nodes, [value("x", shape)], list(outputs), constants, opset_imports=OPSET)
    found = place(normalized(proto).graph, rules, shipped)
    return {n.name: why for n, why in found.declined.items()} | {p.node.name: "" for p in found.products}


def test_what_is_quantized_runs_in_8_bit_kernels(tmp_path):
    proto, done = quantized(network())
    onnx.checker.check_model(proto, full_check=True)
    assert (done.products, done.quantized) == (7, 5)
    found = as_it_runs(proto, tmp_path)
    kernels = [op for op in found if op in ("QLinearConv", "QGemm", "MatMulIntegerToFloat")]
    assert sorted(kernels) == ["MatMulIntegerToFloat", "QGemm", "QGemm", "QLinearConv", "QLinearConv"]
    assert (
        sum(op in ("Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm") for op in found) == 2
    )  # first, last
    assert "Relu" not in found  # it is in its convolution


def around(*nodes, constants=(), shape=(40, 16)):
    """Nodes from "t" to "h" between a Tanh of the input and a product that makes the output."""
    ends = node("Tanh", ["x"], ["t"]), node("Sigmoid", ["h"], ["s"]), node("MatMul", ["s", "last"], ["y"])
    made = [constant("w", 16, 16), constant("last", 16, 4), *constants]
    return model([ends[0], *nodes, *ends[1:]], [value("x", list(shape))], ["y"], made, opset_imports=OPSET)


ADDED = node("MatMul", ["t", "w"], ["p"]), node("Add", ["p", "b"], ["h"])
BIAS = [constant("b", 16)]
SIX = [numpy_helper.from_array(np.float32(edge), f"edge{edge}") for edge in (0, 6)]


@pytest.mark.parametrize(
    "proto",
    [
        around(*ADDED, constants=BIAS),
        around(*ADDED, constants=[constant("b", 1, 16)]),
        around(*ADDED, constants=[constant("b", 1)]),
        around(*ADDED, constants=[constant("b", 1, 1, 16)], shape=(1, 2, 40, 16)),
        around(*ADDED, constants=[constant("b", 40, 16)], shape=(1, 40, 16)),
        around(node("MatMul", ["t", "w"], ["p"]), node("Add", ["p", "t"], ["h"]), shape=(1, 40, 16)),
        around(node("MatMul", ["t", "w"], ["p"]), node("Relu", ["p"], ["h"])),
        around(*ADDED[:1], node("Add", ["p", "b"], ["q"]), node("Relu", ["q"], ["h"]), constants=BIAS),
        around(node("Gemm", ["t", "w"], ["g"]), node("Relu", ["g"], ["h"])),
        around(node("Gemm", ["t", "w", "b"], ["g"]), node("Relu", ["g"], ["h"]), constants=BIAS),
        around(
            *(conv("t", "k", "a"), conv("a", "k", "c"), node("Clip", ["c", "edge0", "edge6"], ["h"])),
            constants=[constant("k", 16, 16, 3, 3), *SIX], shape=(1, 16, 16, 16),
        ),
    ],
)  # fmt: skip
def test_whatever_stands_behind_a_product_its_kernel_is_found(proto, tmp_path):
    inputs = feeds([dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim])
    converted, done = quantized(proto, inputs=inputs)
    assert done.quantized == 1
    found = as_it_runs(converted, tmp_path)
    assert sum(op.startswith(("QLinear", "QGemm", "MatMulInteger")) for op in found) == 1
    assert "Clip" not in found
    expected, actual = run(proto, **inputs[0])["y"], run(converted, **inputs[0])["y"]
    assert np.linalg.norm(actual - expected) < 0.02 * np.linalg.norm(expected)


def test_a_sum_that_the_kernel_would_be_lost_by_is_left():
    """ONNX Runtime makes one Gemm of a product of two matrices and a sum, and looks for 8 bits after that."""
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "x"], ["h"]), node("Tanh", ["h"], ["y"])]
    found = reasons(nodes, [constant("w", 16, 16)], shape=(40, 16))
    assert found == {"p": "its sum with another tensor has no 8-bit kernel"}
    nodes = [node("Gemm", ["x", "w", "x"], ["p"]), node("Softmax", ["p"], ["y"])]
    assert reasons(
        [*nodes, node("MatMul", ["y", "w"], ["z"])], [constant("w", 16, 16)], shape=(16, 16), outputs="z"
    ) == {
        "p": "its bias is not a constant of one number a channel",
        "z": "scores, boxes or outputs are made of its result",
    }


def test_the_numbers_stay_near():
    proto, _ = quantized(network())
    for feed in feeds():
        expected, actual = run(network(), **feed)["y"], run(proto, **feed)["y"]
        assert 1e-4 < np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 0.05


def test_weights_are_int8_by_output_channel():
    proto, _ = quantized(network())
    tensors = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    restore = next(n for n in ops(proto, "DequantizeLinear") if n.input[0].startswith("w3/"))
    number, scale, zero = (tensors[name] for name in restore.input)
    assert number.dtype == np.int8
    assert restore.attribute[0].i == 0
    assert not zero.any()
    w = numpy_helper.to_array(constant("w3", 24, 32))
    np.testing.assert_allclose(scale, np.abs(w).max(1) / 127, rtol=1e-6)
    np.testing.assert_allclose(number * scale[:, None], w, atol=0.501 * scale.max())
    assert not {"w1", "w2", "w3", "m1", "m2"} & set(tensors)  # the float32 ones are gone


def test_large_weights_that_stay_are_halved_in_the_file_and_whole_when_loaded(tmp_path):
    """A transposed convolution has no 8-bit kernel; numbers that float16 cannot hold stay as they are."""

    def proto(scale):
        nodes = [node("ConvTranspose", ["x", "wt"], ["y"], kernel_shape=[2, 2], strides=[2, 2])]
        more = [*nodes, *(conv("y", "w", "c"), node("Relu", ["c"], ["r"]), conv("r", "last", "z"))]
        constants = [constant("wt", 16, 64, 2, 2, scale=scale), constant("w", 16, 64, 3, 3)]
        return model(
            more,
            [value("x", [1, 16, 16, 16])],
            ["z"],
            [*constants, constant("last", 4, 16, 3, 3)],
            opset_imports=OPSET,
        )

    inputs = feeds((1, 16, 16, 16))
    converted, _ = quantized(proto(0.2), inputs=inputs)
    kinds = {t.name: t.data_type for t in converted.graph.initializer}
    assert kinds["wt/float16"] == TensorProto.FLOAT16
    assert "wt" not in kinds
    assert "Cast" not in as_it_runs(converted, tmp_path)
    assert "wt" in {t.name for t in quantized(proto(1e5), inputs=inputs)[0].graph.initializer}


def test_a_tensor_is_quantized_once_whoever_reads_it():
    nodes = [
        conv("x", "stem", "a"),
        *(conv("a", "w1", "b"), conv("a", "w2", "c")),
        node("Sigmoid", ["a"], ["s"]),
        node("Add", ["b", "c"], ["d"]),
        conv("d", "w3", "e"),
        node("Mul", ["e", "s"], ["y"]),
    ]
    constants = [constant("stem", 8, 3, 3, 3), *(constant(w, 8, 8, 3, 3) for w in ("w1", "w2", "w3"))]
    proto = model(nodes, [value("x", [1, 3, 16, 16])], ["y"], constants, opset_imports=OPSET)
    converted, done = quantized(proto)
    assert done.quantized == 2
    read = [n.input[0] for n in ops(converted, "QuantizeLinear")]
    assert sorted(read) == ["a", "b", "c"]
    assert ops(converted, "Sigmoid")[0].input == ["a"]  # what needs no 8 bits reads the tensor itself
    assert all("restored" in name for name in ops(converted, "Add")[0].input)


def test_what_is_better_left_is_left():
    nodes = [
        conv("x", "stem", "first"),
        node("Relu", ["first"], ["a"]),
        conv("a", "wd", "depthwise", group=16),
        conv("depthwise", "w", "plain"),
        node("ConvTranspose", ["plain", "wt"], ["up"], kernel_shape=[2, 2], strides=[2, 2]),
        conv("up", "wn", "narrow"),
        conv("narrow", "wm", "out"),
        node("GlobalAveragePool", ["out"], ["y"]),
    ]
    constants = [
        *(constant("stem", 16, 3, 3, 3), constant("wd", 16, 1, 3, 3), constant("w", 16, 16, 3, 3)),
        *(constant("wt", 16, 16, 2, 2), constant("wn", 1, 16, 3, 3), constant("wm", 16, 1, 3, 3)),
    ]
    assert reasons(nodes, constants, shape=(1, 3, 16, 16)) == {
        "first": "it is the first convolution",
        "depthwise": "depthwise and grouped convolutions are slower in 8 bits",
        "plain": "",
        "up": "transposed convolutions have no 8-bit kernel",
        "narrow": "it has fewer than 2 channels",
        "out": "scores, boxes or outputs are made of its result",
    }


def test_what_a_choice_is_made_by_is_left():
    """As an RPN: the convolution that its two share may be in 8 bits, the scores and deltas not."""
    nodes = [
        conv("x", "stem", "a"),
        node("Relu", ["a"], ["r"]),
        conv("r", "shared", "b"),
        node("Relu", ["b"], ["c"]),
        conv("c", "ws", "scores", 1),
        conv("c", "wb", "deltas", 1),
        node("Reshape", ["scores", "flat"], ["s"]),
        node("Sigmoid", ["s"], ["sigmoid"]),
        node("TopK", ["sigmoid", "k"], ["best", "which"]),
        node("Reshape", ["deltas", "rows"], ["d"]),
        node("Gather", ["d", "which"], ["boxes"], axis=0),
        conv("c", "head", "h"),
        node("GlobalAveragePool", ["h"], ["pooled"]),
        node("LayerNormalization", ["pooled", "one"], ["z"], axis=1),
    ]
    constants = [
        *(constant("stem", 16, 16, 3, 3), constant("shared", 16, 16, 3, 3), constant("head", 16, 16, 3, 3)),
        *(constant("ws", 4, 16, 1, 1), constant("wb", 4, 16, 1, 1), constant("one", 16, 1, 1)),
        numpy_helper.from_array(np.array([-1]), "flat"),
        numpy_helper.from_array(np.array([-1, 4]), "rows"),
        numpy_helper.from_array(np.array([5]), "k"),
    ]
    found = reasons(nodes, constants, outputs=("best", "boxes", "z"))
    assert {name for name, why in found.items() if not why} == {"b", "h"}
    assert found["scores"] == found["deltas"] == "scores, boxes or outputs are made of its result"


def test_products_of_two_activations_are_left():
    nodes = [node("Softmax", ["x"], ["s"]), node("MatMul", ["s", "x"], ["p"]), node("Tanh", ["p"], ["y"])]
    assert reasons(nodes, []) == {"p": "it is no product of a computed tensor with constant weights"}


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "side", "pays"),
    [
        (64, 64, 3, 40, True),
        (256, 256, 3, 32, True),
        (16, 32, 1, 20, False),
        (64, 64, 3, 2, False),
        (32, 32, 1, 160, False),
    ],
)
def test_sizes_that_lose_time_are_left(inputs, outputs, kernel, side, pays):
    """As benchmarks/int8_products.py measures them."""
    nodes = [
        conv("x", "w0", "a", 1),
        conv("a", "w", "b", kernel),
        node("Relu", ["b"], ["c"]),
        conv("c", "w2", "y", 1),
    ]
    constants = [
        *(constant("w0", inputs, 16, 1, 1), constant("w", outputs, inputs, kernel, kernel)),
        constant("w2", 4, outputs, 1, 1),
    ]
    found = reasons(nodes, constants, ORT, (1, 16, side, side))
    assert (found["b"] == "") == pays
    assert pays or found["b"] == "it is too small to gain time"


def test_an_output_that_is_only_looked_at_keeps_its_name():
    """A stage of the export's verification: it is what all else reads, from 8 bits."""
    nodes = [
        *(conv("x", "stem", "a"), conv("a", "w", "feature"), node("Relu", ["feature"], ["r"])),
        *(conv("r", "last", "l"), node("Neg", ["l"], ["y"])),
    ]
    constants = [constant("stem", 8, 3, 3, 3), constant("w", 8, 8, 3, 3), constant("last", 4, 8, 3, 3)]
    proto = model(nodes, [value("x", [1, 3, 16, 16])], ["y", "feature"], constants, opset_imports=OPSET)
    assert place(normalized(proto).graph, FREE).products == []
    converted, _ = quantized(proto, outputs=["y"])
    assert [o.name for o in converted.graph.output] == ["y", "feature"]
    feed = feeds()[0]
    expected, actual = run(proto, **feed), run(converted, **feed)
    assert len(np.unique(actual["feature"])) <= 256 < len(np.unique(expected["feature"]))
    np.testing.assert_allclose(actual["feature"], expected["feature"], atol=0.1)


def test_rules_of_a_target_that_wants_signed_numbers_and_float_biases():
    proto, _ = quantized(network(), SIGNED)
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    assert TensorProto.UINT8 not in kinds.values()
    assert TensorProto.INT32 not in kinds.values()
    zeros = [t for t in proto.graph.initializer if "zero_point" in t.name]
    assert zeros
    assert not any(numpy_helper.to_array(t).any() for t in zeros)
    read = [n.input[0] for n in ops(proto, "QuantizeLinear")]
    assert sorted(read) == ["a", "f", "r", "t", "u"]  # what products read, and no results
    for feed in feeds():
        np.testing.assert_allclose(run(proto, **feed)["y"], run(network(), **feed)["y"], atol=0.2)


def constants_of(proto):
    return {t.name: t for t in proto.graph.initializer}


def array(tensor):
    """An initializer's numbers; numpy has no 8-bit floats."""
    if tensor.data_type != TensorProto.FLOAT8E4M3FN:
        return numpy_helper.to_array(tensor)
    return np.frombuffer(tensor.raw_data, ml_dtypes.float8_e4m3fn).reshape(tensor.dims)


@pytest.mark.parametrize(("number", "kind"), [("int8", TensorProto.INT8), ("fp8", TensorProto.FLOAT8E4M3FN)])
def test_for_tensorrt_all_is_symmetric_and_the_rest_float16(number, kind):
    proto, done = quantized(network(), TRT[number])
    onnx.checker.check_model(proto, full_check=True)
    assert (done.quantized, done.rest, done.lowered.float32_nodes) == (5, "fp16", 0)
    tensors = constants_of(proto)
    pairs = ops(proto, "QuantizeLinear") + ops(proto, "DequantizeLinear")
    for one in pairs:
        scale, zero = (tensors[name] for name in one.input[1:])
        assert (scale.data_type, zero.data_type) == (TensorProto.FLOAT16, kind)
        assert list(scale.dims) == list(zero.dims) == []
        assert not array(zero).astype(np.float32).any()
    assert TensorProto.INT32 not in {t.data_type for t in tensors.values()}
    assert not any(t.data_type == TensorProto.FLOAT for t in tensors.values())
    weights = {name for name, t in tensors.items() if t.data_type == kind and t.dims}
    assert weights == {f"{name}/{number}" for name in ("w1", "w2", "m1", "m2", "w3")}


@pytest.mark.parametrize(("number", "off"), [("int8", 0.06), ("fp8", 0.15)])
def test_for_tensorrt_the_numbers_stay_near(number, off):
    """As a GPU computes it, which rounds to float16 behind every node, and as ONNX Runtime does."""
    proto, _ = quantized(network(), TRT[number])
    for feed in feeds():
        expected = run(network(), **feed)["y"]
        for one in (proto, emulated(proto)):
            assert 1e-3 < np.linalg.norm(run(one, **feed)["y"] - expected) / np.linalg.norm(expected) < off


def normed(output):
    """What a convolution may read that is not the graph's first."""
    return node("LayerNormalization", ["x", "one"], [output])


def ones(size):
    return numpy_helper.from_array(np.ones(size, np.float32), "one")


def uneven(*shape, axis=0, spread=100.0):
    """Weights of which one output channel is many times another."""
    numbers = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    sizes = np.geomspace(1, spread, shape[axis]).astype(np.float32)
    return numpy_helper.from_array(
        numbers * sizes.reshape([-1 if i == axis else 1 for i in range(len(shape))]), "w"
    )


@pytest.mark.parametrize("number", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("nodes", "weights", "axis", "shape"),
    [
        ([conv("t", "w", "p", bias=True)], (16, 8, 3, 3), 0, (1, 8, 6, 6)),
        ([conv("t", "w", "p")], (16, 8, 3, 3), 0, (1, 8, 6, 6)),
        ([node("Gemm", ["t", "w", "wb"], ["p"], transB=1)], (16, 8), 0, (6, 8)),
        ([node("Gemm", ["t", "w", "wb"], ["p"])], (8, 16), 1, (6, 8)),
        ([node("MatMul", ["t", "w"], ["p"])], (8, 16), 1, (1, 6, 8)),
    ],
)
def test_channels_of_other_sizes_have_factors_behind_the_product(nodes, weights, axis, shape, number):
    """The same numbers as with a scale a channel: no channel is worse off than another."""
    ends = normed("t"), node("Neg", ["p"], ["y"])
    constants = [uneven(*weights, axis=axis), constant("wb", 16, scale=5), ones(shape[-1])]
    proto = model([ends[0], *nodes, ends[1]], [value("x", shape)], ["y"], constants, opset_imports=OPSET)
    rules = replace(TRT[number], rest="fp32")
    graph = normalized(proto)
    placement = place(graph.graph, rules, [])
    insert(graph.graph, placement, {"t": (-3.0, 3.0)}, rules)
    converted = to_proto(graph)
    onnx.checker.check_model(converted, full_check=True)
    factors = ops(converted, "Mul")
    if number == "fp8" and nodes[0].op_type == "Conv":
        assert not factors  # floats hold them by one scale
    else:
        assert [one.input[0] for one in factors] == ["p/product"]
        assert len(converted.graph.node) == 7 + (len(nodes[0].input) > 2)  # the bias goes behind the factors
    feed = feeds(shape)[0]
    expected, actual = run(proto, **feed)["y"], run(converted, **feed)["y"]
    rows = [np.moveaxis(one, 1 if len(shape) == 4 else -1, 0).reshape(16, -1) for one in (expected, actual)]
    off = np.linalg.norm(rows[1] - rows[0], axis=1) / np.linalg.norm(rows[0], axis=1)
    assert off.max() < (0.03 if number == "int8" else 0.12)


def test_a_convolution_of_even_channels_is_one_kernel_with_its_bias():
    """TensorRT's kernel takes bias and ReLU in then, and no Mul between."""
    for spread, muls, biases in ((1.0, 0, 1), (100.0, 1, 0)):
        nodes = [normed("t"), conv("t", "w", "p", bias=True), node("Relu", ["p"], ["y"])]
        constants = [uneven(16, 8, 3, 3, spread=spread), constant("wb", 16), ones(6)]
        proto = model(nodes, [value("x", [1, 8, 6, 6])], ["y"], constants, opset_imports=OPSET)
        converted, _ = quantized(proto, TRT["int8"], feeds((1, 8, 6, 6)), outputs=[])
        assert len(ops(converted, "Mul")) == muls
        assert [len(n.input) for n in ops(converted, "Conv")] == [2 + biases]


def test_what_a_product_makes_keeps_its_name_behind_the_factors():
    """So does an output of the graph, and the range of what the next product reads."""
    nodes = [node("Tanh", ["x"], ["t"]), node("MatMul", ["t", "w"], ["p"]), node("MatMul", ["p", "v"], ["q"])]
    nodes.append(node("Relu", ["q"], ["y"]))
    constants = [uneven(8, 16, axis=1), constant("v", 16, 8)]
    proto = model(nodes, [value("x", [5, 8])], ["y", "p"], constants, opset_imports=OPSET)
    converted, done = quantized(proto, TRT["int8"], feeds((5, 8)), outputs=[])
    assert done.quantized == 2
    assert [o.name for o in converted.graph.output] == ["y", "p"]
    feed = feeds((5, 8))[0]
    expected, actual = run(proto, **feed), run(converted, **feed)
    for name in ("y", "p"):
        assert np.linalg.norm(actual[name] - expected[name]) < 0.03 * np.linalg.norm(expected[name])


def test_scales_are_what_float16_holds():
    """A tensor and weights that are all but zero have no scale whose inverse is infinite."""
    nodes = [node("Mul", ["x", "tiny"], ["t"]), node("MatMul", ["t", "w"], ["p"]), node("Relu", ["p"], ["y"])]
    constants = [numpy_helper.from_array(np.float32(1e-4), "tiny"), constant("w", 8, 16, scale=1e-6)]
    proto = model(nodes, [value("x", [5, 8])], ["y"], constants, opset_imports=OPSET)
    converted, _ = quantized(proto, TRT["int8"], feeds((5, 8)), outputs=[])
    scales = [array(t) for name, t in constants_of(converted).items() if "scale" in name]
    assert {scale.dtype for scale in scales} == {np.dtype(np.float16)}
    assert min(scales) >= 2**-14


def test_an_old_graph_is_brought_to_an_opset_with_float16_scales():
    nodes = [node("Tanh", ["x"], ["t"]), node("MatMul", ["t", "w"], ["p"]), node("Tanh", ["p"], ["y"])]
    for opset, expected in ((11, 19), (18, 19), (20, 20)):
        proto = model(
            nodes,
            [value("x", [5, 8])],
            ["y"],
            [constant("w", 8, 8)],
            opset_imports=[helper.make_opsetid("", opset)],
        )
        converted, done = quantized(proto, TRT["int8"], feeds((5, 8)), outputs=[])
        assert (converted.opset_import[0].version, done.quantized) == (expected, 1)


def test_a_bias_that_int32_cannot_hold_makes_the_weights_coarser():
    nodes = [node("Sigmoid", ["x"], ["s"]), node("Gemm", ["s", "w", "b"], ["g"]), node("Tanh", ["g"], ["h"])]
    nodes += [node("MatMul", ["h", "last"], ["y"])]
    w = np.full((8, 8), 1e-9, np.float32)
    w[:, 1:] = 0.3
    b = np.array([0.5, *[0.1] * 7], np.float32)
    constants = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b"), constant("last", 8, 4)]
    proto = model(nodes, [value("x", [5, 8])], ["y"], constants, opset_imports=OPSET)
    inputs = feeds((5, 8))
    converted, _ = quantized(proto, inputs=inputs)
    np.testing.assert_allclose(run(converted, **inputs[0])["y"], run(proto, **inputs[0])["y"], atol=5e-3)


def test_products_share_the_weights_that_they_shared():
    nodes = [
        *(node("Tanh", ["x"], ["t"]), node("Neg", ["t"], ["n"])),
        *(
            node("MatMul", ["t", "w"], ["a"]),
            node("MatMul", ["n", "w"], ["b"]),
            node("Mul", ["a", "b"], ["m"]),
        ),
        *(node("Tanh", ["m"], ["h"]), node("MatMul", ["h", "last"], ["y"])),
    ]
    proto = model(
        nodes, [value("x", [5, 8])], ["y"], [constant("w", 8, 8), constant("last", 8, 4)], opset_imports=OPSET
    )
    converted, done = quantized(proto, inputs=feeds((5, 8)))
    assert done.quantized == 2
    assert sum(t.data_type == TensorProto.INT8 and len(t.dims) == 2 for t in converted.graph.initializer) == 1


def test_an_old_graph_is_brought_to_an_opset_with_scales_by_channel():
    nodes = [
        node("Tanh", ["x"], ["t"]),
        node("MatMul", ["t", "w"], ["a"]),
        node("Softmax", ["a"], ["s"], axis=1),
        node("MatMul", ["s", "last"], ["y"]),
    ]
    proto = model(
        nodes,
        [value("x", [5, 8])],
        ["y"],
        [constant("w", 8, 8), constant("last", 8, 4)],
        opset_imports=[helper.make_opsetid("", 11)],
    )
    inputs = feeds((5, 8))
    converted, _ = quantized(proto, inputs=inputs)
    assert converted.opset_import[0].version == 13
    np.testing.assert_allclose(run(converted, **inputs[0])["y"], run(proto, **inputs[0])["y"], atol=0.02)


def test_what_is_quantized_already_is_refused():
    converted, _ = quantized(network())
    with pytest.raises(
        InputError, match=r"^the graph is quantized already \(DequantizeLinear, QuantizeLinear\)"
    ):
        INT8().check(converted)
    INT8().check(network())


def test_a_graph_in_which_nothing_gains_stays_as_it_is_and_says_why():
    proto, done = quantized(network(), ORT)
    assert proto == network()
    assert (done.quantized, done.products) == (0, 7)
    assert re.match(r"no product of the graph gains from 8 bits: .*\(5\)", done.declined)


def test_what_a_search_leaves_is_what_is_quantized():
    def search(graph, placement, ranges):
        assert set(ranges) == set(placement.readers)
        return placement.only(placement.products[1:3], "not now"), {"declined": "", "groups": []}

    extremes.proto = network()
    given = Quantization(FREE, extremes(feeds()), search=search)
    converted, done = INT8().convert(network(), quantization=given)
    assert (done.quantized, done.search, done.declined) == (2, {"declined": "", "groups": []}, "")
    assert done.kept["not now"] == 3
    weights = [t.name for t in converted.graph.initializer if t.data_type == TensorProto.INT8]
    assert [name for name in weights if name.endswith("/int8")] == ["w2/int8", "m1/int8"]
    none = Quantization(
        FREE, extremes(feeds()), search=lambda g, p, r: (p.only([], "no"), {"declined": "no"})
    )
    proto, done = INT8().convert(network(), quantization=none)
    assert (proto, done.quantized, done.declined) == (network(), 0, "no")


def test_a_search_is_told_in_a_table():
    row = {"products": 1, "gain_ms": 1.0}
    groups = [
        row | {"group": name, "rest_ms": full, "low_ms": low, "error": error, "chosen": chosen}
        for name, full, low, error, chosen in (
            ("a", 2.0, 1.0, None, True), ("b", 2.0, 1.0, None, True), ("c\x1b", 3.0, 4.0, 0.25, False)
        )
    ]  # fmt: skip
    lines = searched({"by": "time", "groups": groups}).splitlines()[1:]
    assert [line.split() for line in lines[1:]] == [
        ["c\\x1b", "3.000", "4.000", "0.250", "no"],
        ["a", "and", "1", "alike", "2.000", "1.000", "yes"],
    ]
    assert searched(None) == ""
