"""Lower precision: types that ONNX's checker and ONNX Runtime accept, what stays, and what is rounded."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.graph.graph import normalized
from meta_deploy.graph.precision import fp16, lower, ranges
from meta_deploy.graph.precision.emulate import emulated
from tests.small_graphs import model, value

node = helper.make_node
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def convert(proto, precision, overflow=None, float32_operators=()):
    graph = normalized(proto)
    done = lower.apply(graph, lower.plan(graph, LOW[precision], overflow, float32_operators))
    return lower.to_proto(graph), done


def lowered_tensors(proto, precision):
    return lower.plan(normalized(proto), LOW[precision]).tensors()


def activation_maxima(proto, batches, names):
    return ranges.activation_maxima(normalized(proto), [{"x": x} for x in batches], names)


def overflowing(proto, batches, names, headroom=fp16.HEADROOM):
    return fp16.overflowing(activation_maxima(proto, batches, names), headroom)


def const(name, array):
    return numpy_helper.from_array(np.asarray(array, np.float32), name)


def ints(name, *numbers):
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def random(*shape, seed=0, scale=0.5):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def run(proto, x, optimize=True):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})


def types(proto):
    """Every tensor's type, by name."""
    found = {info.name: info.type.tensor_type.elem_type for info in proto.graph.value_info}
    found |= {
        info.name: info.type.tensor_type.elem_type for info in (*proto.graph.input, *proto.graph.output)
    }
    return found | {tensor.name: tensor.data_type for tensor in proto.graph.initializer}


def made(proto, op):
    """The types of what the nodes of an operator make."""
    known = types(proto)
    return [known[n.output[0]] for n in proto.graph.node if n.op_type == op]


def checked(proto, precision="fp16", **kwargs):
    """The converted graph; inputs and outputs are as they were, and ONNX's checker finds every type right."""
    converted, done = convert(proto, precision, **kwargs)
    onnx.checker.check_model(converted, full_check=True)
    for before, after in (
        (proto.graph.input, converted.graph.input),
        (proto.graph.output, converted.graph.output),
    ):
        assert [(v.name, v.type.tensor_type.elem_type) for v in before] == [
            (v.name, v.type.tensor_type.elem_type) for v in after
        ]
    return converted, done


def block():
    """Convolution, norm, attention over the pixels, resize."""
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Reshape", ["c", "tokens"], ["t"]),
        node("Transpose", ["t"], ["u"], perm=[0, 2, 1]),
        node("LayerNormalization", ["u", "gain", "shift"], ["n"], axis=-1, epsilon=1e-6),
        node("MatMul", ["n", "q"], ["queries"]),
        node("Transpose", ["n"], ["keys"], perm=[0, 2, 1]),
        node("MatMul", ["queries", "keys"], ["s"]),
        node("Softmax", ["s"], ["a"], axis=-1),
        node("MatMul", ["a", "n"], ["o"]),
        node("Add", ["o", "u"], ["sum"]),
        node("Transpose", ["sum"], ["back"], perm=[0, 2, 1]),
        node("Reshape", ["back", "image"], ["m"]),
        node("Resize", ["m", "", "scales"], ["y"], mode="linear"),
    ]
    constants = [
        *(const("w", random(8, 3, 3, 3)), const("b", random(8)), const("q", random(8, 8))),
        *(const("gain", np.ones(8)), const("shift", np.zeros(8)), const("scales", [1, 1, 2, 2])),
        *(ints("tokens", 1, 8, 36), ints("image", 1, 8, 6, 6)),
    ]
    return model(nodes, [value("x", [1, 3, 6, 6])], [value("y", [1, 8, 12, 12])], constants)


def test_a_block_computes_in_float16_and_answers_in_float32():
    converted, done = checked(block())
    x = random(1, 3, 6, 6)
    (expected,), (actual,) = run(block(), x), run(converted, x)
    assert actual.dtype == np.float32
    assert 1e-6 < np.abs(actual - expected).max() / np.abs(expected).max() < 5e-3
    for op in ("Conv", "MatMul", "LayerNormalization", "Softmax", "Add", "Transpose", "Resize"):
        assert set(made(converted, op)) == {TensorProto.FLOAT16}, op
    assert types(converted)["scales"] == TensorProto.FLOAT  # as ONNX has it
    assert (done.float32_nodes, done.casts, done.overflow) == (0, 2, {})
    assert len(converted.graph.initializer) == len(block().graph.initializer)  # none is left over
    assert done.nodes == len(block().graph.node)


def test_bfloat16_needs_newer_operators_and_keeps_what_a_target_lacks():
    converted, _ = checked(block(), "bf16")
    assert set(made(converted, "Conv")) == {TensorProto.BFLOAT16}
    assert converted.opset_import[0].version == 22
    converted, done = checked(block(), "bf16", float32_operators=("Conv",))
    assert set(made(converted, "Conv")) == {TensorProto.FLOAT}
    assert set(made(converted, "MatMul")) == {TensorProto.BFLOAT16}
    # What only passes the convolution's numbers on goes in their type, up to the norm.
    assert done.float32_nodes == 3


def test_the_original_is_left_as_it_is():
    proto = block()
    before = proto.SerializeToString()
    convert(proto, "fp16")
    assert proto.SerializeToString() == before


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_converting_twice_changes_no_number(precision):
    once, _ = convert(block(), precision)
    twice, done = convert(once, precision)
    x = random(1, 3, 6, 6)
    np.testing.assert_array_equal(*(run(emulated(proto), x, False)[0] for proto in (once, twice)))
    assert done.float32_nodes <= 1  # the cast of the input


# --- what stays ---------------------------------------------------------------------------------------------


def chain(*nodes, constants=(), outputs=(("y", TensorProto.FLOAT),), opset=20):
    made = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs]
    proto = model(list(nodes), [value("x", [2, 4])], made, list(constants))
    proto.opset_import[0].version = opset
    return proto


def test_what_overflows_stays_and_is_told():
    proto = chain(
        node("Mul", ["x", "large"], ["big"]),
        node("Neg", ["big"], ["minus"]),
        node("Mul", ["minus", "small"], ["y"]),
        constants=[const("large", [3000.0]), const("small", [0.001])],
    )
    x = np.full((2, 4), 50, np.float32)
    assert not np.isfinite(run(emulated(convert(proto, "fp16")[0]), x, False)).any()  # 150,000 is too much

    names = lowered_tensors(proto, "fp16")
    assert names >= {"big", "minus"}
    overflow = overflowing(proto, [x / 2, x, x / 3], names)
    assert overflow == {"big": 150000.0}
    converted, done = checked(proto, overflow=overflow)
    np.testing.assert_allclose(run(converted, x)[0], -150, rtol=2e-3)
    assert done.overflow == overflow
    assert types(converted)["big"] == types(converted)["minus"] == TensorProto.FLOAT


def test_headroom_is_for_images_not_seen():
    proto = chain(node("Mul", ["x", "k"], ["z"]), node("Sqrt", ["z"], ["y"]), constants=[const("k", [2.0])])
    names = lowered_tensors(proto, "fp16")
    near = np.full((2, 4), 10_000, np.float32)
    assert overflowing(proto, [near], names) == {"z": 20000.0}
    assert overflowing(proto, [near], names, headroom=1.0) == {}
    assert overflowing(proto, [np.full((2, 4), np.nan, np.float32)], names)["z"] == fp16.FLOAT32_MAX


def test_magnitudes_are_numpys():
    proto = chain(
        node("Mul", ["x", "k"], ["z"]),
        node("Add", ["z", "k"], ["w"]),
        node("Transpose", ["w"], ["y"], perm=[1, 0]),
        constants=[const("k", [-3.0])],
    )
    batches = [random(2, 4, seed=i) for i in range(3)]
    maxima = activation_maxima(proto, batches, {"z", "w", "y", "unknown"})
    assert maxima == pytest.approx(
        {
            "z": max(np.abs(-3 * x).max() for x in batches),
            "w": max(np.abs(-3 * x - 3).max() for x in batches),
        }
    )


@pytest.mark.parametrize("number", [1e6, 1e-7, 3e-5, -70000.0])
def test_a_constant_that_float16_cannot_hold_keeps_its_node(number):
    proto = chain(
        node("Mul", ["x", "half"], ["z"]),
        node("Mul", ["z", "k"], ["scaled"]),
        node("Div", ["scaled", "k"], ["y"]),
        constants=[const("k", [number]), const("half", [0.5])],
    )
    converted, done = checked(proto)
    x = random(2, 4)
    np.testing.assert_allclose(run(converted, x)[0], x / 2, rtol=1e-3)
    assert done.float32_nodes == 2


def test_infinity_is_not_too_large():
    converted, _ = checked(chain(node("Max", ["x", "k"], ["y"]), constants=[const("k", [-np.inf])]))
    x = random(2, 4)
    np.testing.assert_allclose(run(converted, x)[0], x, rtol=1e-3)


def test_what_decides_is_in_float32_back_to_the_last_product():
    proto = chain(
        node("MatMul", ["x", "w"], ["logits"]),
        node("Softmax", ["logits"], ["p"], axis=-1),
        node("Sqrt", ["p"], ["root"]),
        node("TopK", ["root", "two"], ["y", "index"], axis=1),
        constants=[const("w", random(4, 4)), ints("two", 2)],
        outputs=[("y", TensorProto.FLOAT), ("index", TensorProto.INT64)],
    )
    converted, _ = checked(proto)
    assert made(converted, "MatMul") == [TensorProto.FLOAT16]
    for op in ("Softmax", "Sqrt", "TopK"):
        assert made(converted, op) == [TensorProto.FLOAT], op


@pytest.mark.parametrize("op", ["Greater", "LessOrEqual", "Equal"])
def test_comparisons_decide_too(op):
    proto = chain(
        node("Mul", ["x", "k"], ["z"]),
        node(op, ["z", "k"], ["y"]),
        constants=[const("k", [1.0009765])],
        outputs=[("y", TensorProto.BOOL)],
    )
    x = np.array([[1.0, 1.0001, 0.9999, 1.00001]] * 2, np.float32)
    np.testing.assert_array_equal(run(checked(proto)[0], x)[0], run(proto, x)[0])


def test_sampling_coordinates_stay_and_the_map_does_not():
    proto = model(
        [
            node("Mul", ["points", "k"], ["grid"]),
            node("Relu", ["x"], ["map"]),
            node("GridSample", ["map", "grid"], ["y"], align_corners=1, mode="linear"),
        ],
        [value("x", [1, 2, 5, 5]), value("points", [1, 3, 3, 2])],
        [value("y", [1, 2, 3, 3])],
        [const("k", [0.9])],
    )
    converted, _ = checked(proto)
    known = types(converted)
    sampling = next(n for n in converted.graph.node if n.op_type == "GridSample")
    assert [known[name] for name in sampling.input] == [TensorProto.FLOAT16, TensorProto.FLOAT]


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("rounding", ["Floor", "Ceil", "Round"])
def test_what_is_rounded_and_what_is_left_of_it_stay_float32(precision, rounding):
    """The distance of 1000.4 from 1000 is 0.4, which float16 would make 0.5 and bfloat16 0."""
    nodes = [
        node("Mul", ["x", "thousand"], ["at"]),
        node(rounding, ["at"], ["whole"]),
        node("Min", ["whole", "most"], ["limited"]),
        node("Sub", ["at", "limited"], ["rest"]),
        node("Mul", ["rest", "rest"], ["y"]),
        node("Cast", ["at"], ["number"], to=TensorProto.INT32),
    ]
    outputs = [value("y", [4]), value("number", [4], TensorProto.INT32)]
    constants = [const("thousand", 1000.0), const("most", 1e4)]
    proto = model(nodes, [value("x", [4])], outputs, constants)
    assert lowered_tensors(proto, precision) == {"rest", "y"}  # the next product may have what is left
    graph, _ = checked(proto, precision)
    x = np.array([1.0004, 1.2503, 0.5007, -2.0002], np.float32)
    expected, actual = run(proto, x), run(emulated(graph), x)
    np.testing.assert_allclose(actual[0], expected[0], rtol=0.01)
    np.testing.assert_array_equal(actual[1], expected[1])


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum", "Pow"])
def test_statistics_stay(op):
    second = "two" if op == "Pow" else "axes"
    proto = chain(
        node("Mul", ["x", "two"], ["z"]),
        node(op, ["z", second], ["s"]),
        node("Mul", ["s", "two"], ["y"]),
        constants=[const("two", [2.0]), ints("axes", 1)],
    )
    converted, _ = checked(proto)
    assert made(converted, op) == [TensorProto.FLOAT]
    assert sorted(made(converted, "Mul")) == [TensorProto.FLOAT16] * 2


def test_moves_go_in_the_type_that_their_numbers_come_in():
    proto = chain(
        node("Pow", ["x", "two"], ["square"]),
        node("Transpose", ["square"], ["t"], perm=[1, 0]),
        node("Sigmoid", ["x"], ["s"]),
        node("Transpose", ["s"], ["u"], perm=[1, 0]),
        node("Concat", ["t", "u"], ["both"], axis=0),
        node("Concat", ["u", "u"], ["same"], axis=0),
        node("Sub", ["both", "same"], ["y"]),
        constants=[const("two", [2.0])],
    )
    converted, _ = checked(proto)
    assert made(converted, "Transpose") == [TensorProto.FLOAT, TensorProto.FLOAT16]
    assert made(converted, "Concat") == [TensorProto.FLOAT, TensorProto.FLOAT16]


def test_a_constant_may_be_read_in_both_types():
    proto = chain(
        node("Pow", ["x", "two"], ["square"]),
        node("Mul", ["square", "two"], ["y"]),
        constants=[const("two", [2.0])],
    )
    converted, done = checked(proto)
    assert {t.data_type for t in converted.graph.initializer} == {TensorProto.FLOAT, TensorProto.FLOAT16}
    assert done.casts == 2  # none for a constant


def test_what_a_branch_reads_stays():
    inner = helper.make_graph([node("Mul", ["z", "z"], ["inner"])], "then", [], [value("inner", [2, 4])])
    other = helper.make_graph([node("Neg", ["z"], ["other"])], "else", [], [value("other", [2, 4])])
    proto = chain(
        node("Mul", ["x", "k"], ["z"]),
        node("ReduceMax", ["x"], ["m"], keepdims=0),
        node("Greater", ["m", "k0"], ["flag"]),
        node("If", ["flag"], ["branch"], then_branch=inner, else_branch=other),
        node("Sigmoid", ["branch"], ["y"]),
        constants=[const("k", [2.0]), const("k0", 0.0)],
    )
    converted, _ = checked(proto)
    assert types(converted)["z"] == TensorProto.FLOAT
    for x in (np.ones((2, 4), np.float32), -np.ones((2, 4), np.float32)):
        np.testing.assert_allclose(run(converted, x)[0], run(proto, x)[0], rtol=1e-3)


def test_an_output_may_be_read_on_and_named_twice():
    proto = chain(
        node("Sigmoid", ["x"], ["y"]),
        node("Sqrt", ["y"], ["z"]),
        node("Identity", ["y"], ["w"]),
        outputs=[(name, TensorProto.FLOAT) for name in ("y", "z", "w")],
    )
    converted, _ = checked(proto)
    x = random(2, 4)
    for actual, expected in zip(run(converted, x), run(proto, x), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-3)


def test_casts_and_fills_make_the_lower_type():
    proto = chain(
        node("Shape", ["x"], ["shape"]),
        node("ConstantOfShape", ["shape"], ["zeros"]),
        node("Cast", ["shape"], ["sizes"], to=TensorProto.FLOAT),
        node("Reshape", ["sizes", "column"], ["sizes2"]),
        node("Add", ["zeros", "x"], ["z"]),
        node("Mul", ["z", "sizes2"], ["y"]),
        constants=[ints("column", 2, 1)],
    )
    converted, _ = checked(proto)
    assert made(converted, "ConstantOfShape") == [TensorProto.FLOAT16]
    x = random(2, 4)
    np.testing.assert_allclose(run(converted, x)[0], run(proto, x)[0], rtol=2e-3)


def test_an_unknown_operator_keeps_float32():
    proto = model(
        [node("Sigmoid", ["x"], ["s"]), node("Own", ["s"], ["y"], domain="nobody")],
        [value("x", [2, 4])],
        [value("y", [2, 4])],
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("nobody", 1)],
    )
    converted, _ = convert(proto, "fp16")
    known = types(converted)
    own = next(n for n in converted.graph.node if n.op_type == "Own")
    assert known[own.input[0]] == known[own.output[0]] == TensorProto.FLOAT


def test_onnx_runtimes_fused_attention_goes_along():
    proto = model(
        [node("MultiHeadAttention", ["x", "x", "x"], ["y"], domain="com.microsoft", num_heads=2)],
        [value("x", [1, 5, 8])],
        [value("y", [1, 5, 8])],
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)],
    )
    converted, done = convert(proto, "fp16")
    assert (done.nodes, done.float32_nodes) == (1, 0)
    x = random(1, 5, 8)
    np.testing.assert_allclose(run(converted, x)[0], run(proto, x)[0], atol=2e-3)


# --- emulation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "kind"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_emulation_rounds_after_each_node_as_numpy_does(precision, kind):
    proto = chain(
        node("Mul", ["x", "k"], ["z"]),
        node("Add", ["z", "x"], ["w"]),
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("Mul", ["t", "t"], ["y"]),
        constants=[const("k", [1.2345678])],
    )
    converted, _ = checked(proto, precision)
    x = random(2, 4, scale=3)

    def rounded(a):
        return a.astype(kind).astype(np.float32)

    low, k = rounded(x), rounded(np.float32([1.2345678]))
    w = rounded(rounded(low * k) + low)
    for optimize in (False, True):  # ONNX Runtime's optimizer must not skip the rounding
        np.testing.assert_array_equal(run(emulated(converted), x, optimize)[0], rounded(w.T * w.T))


def test_emulation_can_spare_a_module_the_rounding():
    proto = chain(
        node("Mul", ["x", "x"], ["a"]), node("Mul", ["a", "a"], ["b"]), node("Mul", ["b", "b"], ["y"])
    )
    for part, name in zip(
        proto.graph.node, ("neck/node_mul", "neck.rpn/node_mul", "necks/node_mul"), strict=True
    ):
        part.name = name
    converted, _ = convert(proto, "fp16")
    x = random(2, 4, scale=1)

    def rounded(a):
        return a.astype(np.float16).astype(np.float32)

    low = rounded(x)
    np.testing.assert_array_equal(
        run(emulated(converted, ["neck"]), x)[0], rounded((low * low) ** 2 * (low * low) ** 2)
    )
    half = rounded(low * low) ** 2
    np.testing.assert_array_equal(run(emulated(converted, ["neck.rpn"]), x)[0], rounded(half * half))


def test_emulation_of_float16_is_near_what_onnx_runtime_computes():
    converted, _ = convert(block(), "fp16")
    x = random(1, 3, 6, 6)
    assert {t.data_type for t in emulated(converted).graph.initializer} <= {
        TensorProto.FLOAT,
        TensorProto.INT64,
    }
    np.testing.assert_allclose(run(emulated(converted), x)[0], run(converted, x)[0], atol=2e-2)


# --- any graph ----------------------------------------------------------------------------------------------

UNARY = ("Relu", "Sigmoid", "Tanh", "Neg", "Abs", "Exp", "Identity", "Softmax", "Transpose", "ReduceMean")
BINARY = ("Add", "Sub", "Mul", "Max", "Min", "MatMul", "Greater")


@st.composite
def graphs(draw):
    """A 4x4 input through a dozen operators, constants among them, several outputs."""
    nodes, constants, names = [], [], ["x"]
    for i in range(draw(st.integers(1, 12))):
        out = f"t{i}"
        if draw(st.booleans()):
            op, source = draw(st.sampled_from(UNARY)), draw(st.sampled_from(names))
            kwargs = {"perm": [1, 0]} if op == "Transpose" else {}
            if op == "Exp":  # of something small
                nodes.append(node("Tanh", [source], [f"{out}_small"]))
                source = f"{out}_small"
            if op == "ReduceMean":  # of all; back to 4x4
                nodes.append(node(op, [source], [f"{out}_mean"]))
                nodes.append(node("Add", [f"{out}_mean", source], [out]))
            else:
                nodes.append(node(op, [source], [out], **kwargs))
        else:
            op, first = draw(st.sampled_from(BINARY)), draw(st.sampled_from(names))
            second = draw(st.sampled_from([*names, "constant"]))
            if second == "constant":
                second = f"c{i}"
                constants.append(const(second, random(4, 4, seed=i)))
            if op == "Greater":
                nodes.append(node(op, [first, second], [f"{out}_flag"]))
                nodes.append(node("Where", [f"{out}_flag", first, second], [out]))
            elif op == "MatMul":  # kept in range
                nodes.append(node(op, [first, second], [f"{out}_product"]))
                nodes.append(node("Tanh", [f"{out}_product"], [out]))
            else:
                nodes.append(node(op, [first, second], [out]))
        names.append(out)
    outputs = draw(st.lists(st.sampled_from(names[1:]), min_size=1, max_size=3, unique=True))
    return model(nodes, [value("x", [4, 4])], [value(name, None) for name in outputs], constants)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from(["fp16", "bf16"]), st.integers(0, 9))
def test_any_graph_stays_valid_and_near(proto, precision, seed):
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    x = random(4, 4, seed=seed)
    expected = run(proto, x)
    overflow = {}
    if precision == "fp16":
        overflow = overflowing(proto, [x], lowered_tensors(proto, precision))
    converted, _ = checked(proto, precision, overflow=overflow)
    again, _ = convert(proto, precision, overflow)
    assert converted.SerializeToString() == again.SerializeToString()
    actual = run(emulated(converted), x, False)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == np.float32
        assert np.isfinite(a).all() == np.isfinite(e).all()


def test_what_a_cast_would_overflow_is_measured_too():
    """The variance of a norm in pieces is made in float32 and read in float16."""
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("Pow", ["m", "two"], ["squares"]),
        node("Reshape", ["squares", "shape"], ["moved"]),
        node("Sqrt", ["moved"], ["root"]),
        node("Div", ["m", "root"], ["y"]),
    ]
    constants = [const("w", 600 * np.eye(8)), const("two", 2), ints("shape", 2, 8)]
    proto = model(nodes, [value("x", [2, 8])], [value("y", [2, 8])], constants)
    x = random(2, 8)
    overflow = overflowing(proto, [x], lowered_tensors(proto, "fp16"))
    assert set(overflow) == {"moved"}
    converted, _ = checked(proto, overflow=overflow)
    np.testing.assert_allclose(run(emulated(converted), x)[0], run(proto, x)[0], rtol=2e-3)


def test_whole_numbers_that_become_floats_are_measured():
    large = numpy_helper.from_array(np.full((2, 8), 100_000, np.int32), "large")
    nodes = [node("Cast", ["large"], ["floats"], to=TensorProto.FLOAT), node("Div", ["floats", "x"], ["y"])]
    proto = model(nodes, [value("x", [2, 8])], [value("y", [2, 8])], [large])
    found = overflowing(proto, [np.full((2, 8), 1e3, np.float32)], lowered_tensors(proto, "fp16"))
    assert found == {"floats": 100_000}


def test_older_operators_keep_their_meaning_in_bfloat16():
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("Softmax", ["m"], ["s"], axis=-1),
        node("ReduceMean", ["s"], ["mean"], axes=[1]),  # an input since opset 18
        node("Add", ["m", "mean"], ["y"]),
    ]
    opset = [helper.make_opsetid("", 13)]
    outputs = [value("y", [2, 8])]
    proto = model(nodes, [value("x", [2, 8])], outputs, [const("w", random(8, 8))], opset_imports=opset)
    converted, _ = checked(proto, "bf16")
    assert converted.opset_import[0].version == 13
    x = random(2, 8, seed=1)
    np.testing.assert_allclose(run(emulated(converted), x)[0], run(proto, x)[0], atol=0.02)


def test_an_initializer_that_is_an_input_may_still_be_given():
    proto = model(
        [node("MatMul", ["x", "w"], ["y"])],
        [value("x", [2, 8]), value("w", [8, 8])],
        [value("y", [2, 8])],
        [const("w", random(8, 8))],
    )
    converted, _ = checked(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(converted.SerializeToString(), options)
    x, other = random(2, 8), random(8, 8, seed=3)
    np.testing.assert_allclose(session.run(None, {"x": x, "w": other})[0], x @ other, atol=0.01)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], run(proto, x)[0], atol=0.01)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "nodes",
    [
        [
            node("SplitToSequence", ["m", "one"], ["parts"], axis=1),
            node("ConcatFromSequence", ["parts"], ["y"], axis=1),
        ],
        [
            node("SequenceConstruct", ["x", "m"], ["parts"]),
            node("SequenceAt", ["parts", "one"], ["part"]),
            node("Relu", ["part"], ["y"]),
        ],
        [node("HannWindow", ["eight"], ["window"]), node("Mul", ["m", "window"], ["y"])],
        [
            node("EyeLike", ["whole"], ["eye"], dtype=TensorProto.FLOAT),
            node("Add", ["m", "eye"], ["y"]),
        ],
        [
            node("Shape", ["m"], ["shape"]),
            node("ConstantOfShape", ["shape"], ["fill"], value=const("", [-1e6])),
            node("Max", ["m", "fill"], ["y"]),
        ],
        [
            node("LayerNormalization", ["m", "gain"], ["n", "mean", "deviation"]),
            node("Add", ["n", "mean"], ["y"]),
        ],
        [
            node("Cast", ["m"], ["half"], to=TensorProto.FLOAT16),
            node("ReduceMean", ["half"], ["mean"]),
            node("Add", ["half", "mean"], ["sum"]),
            node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
        ],
    ],
    ids=["split", "sequence", "window", "eye", "fill", "statistics", "half"],
)
def test_operators_with_a_type_of_their_own(nodes, precision):
    constants = [
        *(const("w", random(8, 8)), const("gain", np.ones(8))),
        numpy_helper.from_array(np.array(1, np.int64), "one"),
        numpy_helper.from_array(np.array(8, np.int64), "eight"),
        numpy_helper.from_array(np.zeros((2, 8), np.int32), "whole"),
    ]
    nodes = [node("MatMul", ["x", "w"], ["m"]), *nodes]
    proto = model(nodes, [value("x", [2, 8])], [value("y", [2, 8])], constants)
    converted, _ = checked(proto, precision)
    x = random(2, 8, seed=1)
    np.testing.assert_allclose(run(emulated(converted), x)[0], run(proto, x)[0], atol=0.03)


def test_an_output_listed_twice_is_float32_in_both_places():
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    outputs = [value("y", [2, 8]), value("y", [2, 8])]
    proto = model(nodes, [value("x", [2, 8])], outputs, [const("w", random(8, 8))])
    converted, _ = convert(proto, "fp16")
    assert [(v.name, v.type.tensor_type.elem_type) for v in converted.graph.output] == [("y", 1)] * 2
