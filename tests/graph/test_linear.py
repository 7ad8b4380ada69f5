"""Linear maps: what is read from a graph computes what the graph does, and so does what is written."""

import dataclasses
import itertools

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from meta_deploy.graph.graph import fresh_names, tidy, to_graph, to_proto
from meta_deploy.graph.linear import has_input, linear_from, linear_of, per_channel, set_weights
from tests.graph.rewriting import RANDOM, TYPES, node
from tests.small_graphs import model, run, value

TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "float64": 1e-12}


@dataclasses.dataclass(frozen=True)
class Case:
    """A linear map between a Relu and a Neg, to vary.

    `bias` is the shape of its own bias, `add` of one that is added; "c" in them is the number of channels.
    """

    op: str = "Conv"
    rank: int = 4  # of its input
    inner: int = 4
    outer: int = 6
    group: int = 1
    kernel: int = 1
    bias: tuple | None = None
    add: tuple | None = None
    first: bool = False  # the bias comes first in the Add
    attrs: dict = dataclasses.field(default_factory=dict)
    batch: int = 3
    size: tuple = (5, 7)
    empty: bool = False  # the own bias is an input without a name
    dtype: str = "float32"
    prefix: str = ""

    @property
    def is_conv(self):
        return self.op in ("Conv", "ConvTranspose")

    def proto(self):
        rng, n = np.random.default_rng(2), self.n
        self.__dict__["initializers"] = []

        def constant(name, size):
            size = [self.outer if s == "c" else s for s in size]
            array = np.asarray(rng.standard_normal(size), self.dtype)
            self.initializers.append(numpy_helper.from_array(array, n(name)))
            return n(name)

        inputs = [n("x"), constant("w", self.weight_shape())]
        if self.bias is not None or self.empty:
            inputs.append("" if self.empty else constant("b", self.bias))
        attrs = {**self.attrs, **({"group": self.group} if self.group > 1 else {})}
        product = n("h") if self.add is None else n("p")
        nodes = [node("Relu", [n("in")], [n("x")]), node(self.op, inputs, [product], **attrs)]
        if self.add is not None:
            terms = [product, constant("a", self.add)]
            nodes.append(node("Add", terms[::-1] if self.first else terms, [n("h")]))
        nodes.append(node("Neg", [n("h")], [n("y")]))
        out = helper.make_empty_tensor_value_info(n("y"))
        out.type.tensor_type.elem_type = TYPES[self.dtype]
        return model(nodes, [value(n("in"), self.shape(), TYPES[self.dtype])], [out], self.initializers)

    def n(self, name):
        return self.prefix + name

    def weight_shape(self):
        shape = [self.inner, self.outer]
        if self.op == "Conv":
            shape = [self.outer, self.inner // self.group]
        elif self.op == "ConvTranspose":
            shape = [self.inner, self.outer // self.group]
        elif self.attrs.get("transB"):
            shape = shape[::-1]
        return [*shape, *[self.kernel] * ((self.rank - 2) * self.is_conv)]

    def shape(self):
        if self.is_conv:
            return [self.batch, self.inner, *self.size[: self.rank - 2]]
        return [*(self.batch, *self.size)[: self.rank - 1], self.inner]

    def graph(self):
        graph = to_graph(self.proto())
        return graph, graph.tensors()

    def feeds(self):
        x = np.random.default_rng(3).standard_normal(self.shape())
        return {self.n("in"): x.astype(self.dtype)}

    def expected(self, weight, bias):
        """-(W relu(x) + b) in float64."""
        x = np.maximum(self.feeds()[self.n("in")].astype(np.float64), 0)
        weight, bias = weight.astype(np.float64), None if bias is None else bias.astype(np.float64)
        if not self.is_conv:
            return -(x @ weight.T + (0 if bias is None else bias))
        functions = torch.nn.functional
        name = "conv" if self.op == "Conv" else "conv_transpose"
        convolve = getattr(functions, f"{name}{self.rank - 2}d")
        pads = self.attrs.get("pads", [0])
        options = {"stride": self.attrs.get("strides", 1), "padding": pads[0], "groups": self.group}
        tensors = [None if a is None else torch.from_numpy(np.array(a)) for a in (x, weight, bias)]
        return -convolve(*tensors, **options).numpy()


def computes(proto, case, weight, bias):
    """A model has the outputs that these weights give."""
    values, shape = case.feeds(), case.expected(weight, bias).shape
    if case.dtype == "float64":  # which ONNX Runtime cannot convolve
        actual = ReferenceEvaluator(proto).run(None, values)[0]
    else:
        (actual,) = run(proto, **values).values()
    assert (str(actual.dtype), actual.shape) == (case.dtype, shape)
    expected = case.expected(weight, bias)
    atol = TOLERANCE[case.dtype] * np.abs(expected).max()
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=0, atol=atol)


def same_map(a, b):
    same = all(getattr(a, name) is getattr(b, name) for name in ("node", "add", "x", "y"))
    return same and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("weight", "bias"))


PLACES = {
    "Conv": ("none", "own", "add", "first", "empty"),
    "ConvTranspose": ("none", "own", "add", "first"),
    "MatMul": ("none", "add", "first"),
    "Gemm": ("none", "own", "add", "first", "empty"),
}


@st.composite
def cases(draw):
    op = draw(st.sampled_from(("Conv", "ConvTranspose", "MatMul", "Gemm")))
    conv = op in ("Conv", "ConvTranspose")
    rank = draw(st.integers(3, 4)) if conv else 2 if op == "Gemm" else draw(st.integers(1, 4))
    group = draw(st.sampled_from((1, 1, 2, 3))) if conv else 1
    attrs = {}
    kernel = draw(st.sampled_from((1, 2, 3)))
    if conv and draw(st.booleans()):
        pad, step = draw(st.integers(0, kernel - 1)), draw(st.integers(1, 2))
        attrs = {"pads": [pad] * (2 * rank - 4), "strides": [step] * (rank - 2)}
    if op == "Gemm":
        attrs = draw(
            st.sampled_from(({}, {"transB": 1}, {"transB": 0, "alpha": 1.0, "beta": 1.0, "transA": 0}))
        )
    axis = 1 if conv else rank - 1
    shapes = []
    for dims in range(rank + 1):  # all that give one value a channel
        shapes.append((1,) * dims)
        if dims >= rank - axis:
            shapes.append(tuple("c" if i == axis - rank + dims else 1 for i in range(dims)))
    place = draw(st.sampled_from(PLACES[op]))
    own = ("c",) if conv else draw(st.sampled_from(((), (1,), ("c",), (1, 1), (1, "c"))))
    return Case(
        op,
        rank,
        draw(st.integers(1, 2)) * group,
        draw(st.integers(1, 3)) * group,
        group,
        kernel,
        own if place == "own" else None,
        draw(st.sampled_from(shapes)) if place in ("add", "first") else None,
        place == "first",
        attrs,
        draw(st.integers(1, 3)),
        (draw(st.integers(3, 5)), draw(st.integers(3, 5))),
        place == "empty",
        draw(st.sampled_from(("float32", "float32", "float64") if op != "ConvTranspose" else ("float32",))),
        draw(st.sampled_from(("", "h/", "h/weight"))),
    )


@settings(RANDOM, max_examples=150)
@given(cases())
def test_what_is_read_is_what_is_computed(case):
    graph, tensors = case.graph()
    y = tensors[case.n("h")]
    linear = linear_from(graph, y)
    assert linear is not None
    assert (linear.node.op, linear.x, linear.y) == (case.op, tensors[case.n("x")], y)
    assert (linear.add is None, linear.bias is None) == (
        case.add is None,
        case.add is None and case.bias is None,
    )
    assert (linear.group, linear.out_channels, linear.is_conv) == (case.group, case.outer, case.is_conv)
    assert linear.bias is None or linear.bias.shape == (case.outer,)
    assert same_map(linear, linear_of(graph, linear.node))
    assert has_input(linear.node, 2) == (case.bias is not None)
    computes(to_proto(graph), case, linear.weight, linear.bias)


@settings(RANDOM, max_examples=150)
@given(cases(), st.booleans())
def test_what_is_written_is_what_is_computed(case, biased):
    written(case, biased)


@pytest.mark.parametrize(("op", "place"), [(op, place) for op in PLACES for place in PLACES[op]])
@pytest.mark.parametrize("biased", [True, False])
def test_a_bias_is_written_where_there_was_one_or_none(op, place, biased):
    channels = ("c", 1, 1) if op in ("Conv", "ConvTranspose") else ("c",)
    case = Case(
        op,
        2 if op == "Gemm" else 4,
        bias=("c",) if place == "own" else None,
        add=channels if place in ("add", "first") else None,
        first=place == "first",
        empty=place == "empty",
    )
    written(case, biased)


def written(case, biased):
    proto = case.proto()
    graph = to_graph(proto)
    old = linear_from(graph, graph.tensors()[case.n("h")])
    rng = np.random.default_rng(4)
    weight = rng.standard_normal(old.weight.shape)
    bias = rng.standard_normal(case.outer) if biased else None
    set_weights(graph, old, weight, bias, fresh_names(graph))
    tidy(graph)
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    assert len({i.name for i in after.graph.initializer}) == len(after.graph.initializer)
    computes(after, case, weight, bias if biased else old.bias)
    # What was written is read.
    graph = to_graph(after)
    new = linear_from(graph, graph.tensors()[case.n("h")])
    np.testing.assert_array_equal(new.weight, weight.astype(case.dtype))
    if biased:
        np.testing.assert_array_equal(new.bias, bias.astype(case.dtype))
    assert (new.node.op, new.weight.dtype) == (case.op, case.dtype)


@pytest.mark.parametrize(
    "case", [Case(bias=("c",)), Case("MatMul", add=("c",)), Case("Gemm", 2, bias=("c",))], ids=str
)
def test_who_shares_the_weights_keeps_them(case):
    proto = case.proto()
    first = [n for n in proto.graph.node if n.op_type not in ("Relu", "Neg")]
    for n in first:
        copy = node(n.op_type, [f"{i}2" if i in ("p",) else i for i in n.input], [f"{o}2" for o in n.output])
        copy.attribute.extend(n.attribute)
        proto.graph.node.append(copy)
    proto.graph.output.append(helper.make_empty_tensor_value_info("h2"))
    proto.graph.output[-1].type.tensor_type.elem_type = TensorProto.FLOAT
    proto = onnx.shape_inference.infer_shapes(proto)
    graph = to_graph(proto)
    linear = linear_from(graph, graph.tensors()["h"])
    set_weights(graph, linear, np.ones(linear.weight.shape), np.ones(case.outer), fresh_names(graph))
    tidy(graph)
    before, after = run(proto, **case.feeds()), run(to_proto(graph), **case.feeds())
    np.testing.assert_array_equal(after["h2"], before["h2"])
    assert np.abs(after["y"] - before["y"]).max() > 0.1


def test_float16_stays_float16():
    case = Case(kernel=3, attrs={"pads": [1] * 4}, bias=("c",), dtype="float16")
    graph, tensors = case.graph()
    linear = linear_from(graph, tensors["h"])
    computes(to_proto(graph), case, linear.weight, linear.bias)
    set_weights(graph, linear, linear.weight.astype(np.float64), np.ones(6), fresh_names(graph))
    computes(to_proto(graph), case, linear.weight, np.ones(6))


# --- biases ---


@settings(RANDOM, max_examples=400)
@given(st.data(), st.integers(1, 4), st.integers(1, 4))
def test_one_value_a_channel_is_what_broadcasts_so(data, rank, channels):
    axis = data.draw(st.integers(0, rank - 1))
    sizes = st.sampled_from((1, 1, 1, 2, channels))
    shape = tuple(data.draw(st.lists(sizes, min_size=0, max_size=rank + 1)))
    whole = [data.draw(st.sampled_from((2, 3, channels + 1))) for _ in range(rank)]
    whole[axis] = channels
    array = np.random.default_rng(0).standard_normal(shape)
    found = per_channel(array, rank, axis, channels)
    try:
        full = np.broadcast_to(array, whole)
    except ValueError:
        assert found is None
        return
    others = tuple(i for i in range(rank) if i != axis)
    if len(shape) > rank or np.ptp(full, axis=others).any():
        assert found is None
        return
    assert found.shape == (channels,)
    np.testing.assert_array_equal(full, np.broadcast_to(np.expand_dims(found, others), whole))


# Of channels as many as rows and columns: only the place of the axis tells.
ALIKE = {"inner": 4, "outer": 4, "size": (4, 4), "batch": 4}
NO_BIASES = [
    *itertools.product(
        ["Conv"],
        [
            ("c",),
            (1, "c"),
            ("c", 1),
            (1, "c", 1),
            (4, 1, 1, 1),
            (1, 4, 4, 1),
            (4, 4, 4, 4),
            (4, 4, 1),
            (4, 4, 1, 1),
        ],
    ),
    *itertools.product(
        ["MatMul"],
        [
            (4, 1),
            (4, 4),
            (4, 1, 1, "c"),
            (1, 4, 1, "c"),
            ("c", 1, 1),
            (1, "c", 1, 1),
            (4, 1, 1, 1),
            (4, 4, 4, 4),
        ],
    ),
    *itertools.product(["Conv", "MatMul", "Gemm"], [(1, 1, 1, 1, 1), (4, 1, 1, 1, 1)]),
    *itertools.product(["MatMul", "Gemm"], [(1, 1, 1, 1, "c")]),
    *itertools.product(["Gemm"], [("c", 1), (4, "c"), (4, 1), (1, 1, "c"), (1, 1, 1)]),
    ("Conv", (1, 1, "c", 1, 1)),
]


@pytest.mark.parametrize(("op", "shape"), NO_BIASES)
@pytest.mark.parametrize("first", [True, False])
def test_what_broadcasts_otherwise_is_no_bias(op, shape, first):
    case = Case(op, 2 if op == "Gemm" else 4, add=shape, first=first, **ALIKE)
    graph, tensors = case.graph()
    assert linear_from(graph, tensors["h"]) is None
    linear = linear_of(graph, tensors["p"].inputs[0])
    assert (linear.y, linear.add, linear.bias) == (tensors["p"], None, None)


@pytest.mark.parametrize(
    ("op", "shape"), [("Conv", (3, 1, 1)), ("MatMul", (3,)), ("Gemm", (3,)), ("MatMul", (1, 3))]
)
def test_a_bias_that_makes_one_channel_more_is_none(op, shape):
    case = Case(op, 2 if op == "Gemm" else 4, outer=1, add=shape)
    graph, tensors = case.graph()
    assert linear_from(graph, tensors["h"]) is None


@pytest.mark.parametrize("shape", [("c", 1), (4, "c"), (4, 1)])
def test_a_gemm_with_another_bias_is_none(shape):
    graph, tensors = Case("Gemm", 2, bias=shape, **ALIKE).graph()
    assert linear_from(graph, tensors["h"]) is None
    assert linear_of(graph, tensors["h"].inputs[0]) is None


def test_a_matrix_of_biases_for_one_row_is_a_bias():
    case = Case("Gemm", 2, batch=1, bias=(1, "c"))
    graph, tensors = case.graph()
    linear = linear_from(graph, tensors["h"])
    computes(to_proto(graph), case, linear.weight, linear.bias)


@pytest.mark.parametrize(
    "case", [Case(bias=("c",), add=("c", 1, 1)), Case("Gemm", 2, bias=("c",), add=("c",))], ids=str
)
def test_a_second_bias_is_none(case):
    graph, tensors = case.graph()
    assert linear_from(graph, tensors["h"]) is None
    linear = linear_of(graph, tensors["p"].inputs[0])
    assert (linear.y, linear.add) == (tensors["p"], None)
    assert linear.bias is not None


def test_without_a_rank_there_is_no_bias():
    proto = Case("MatMul", add=("c",)).proto()
    for v in (*proto.graph.input, *proto.graph.output):
        v.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    graph = to_graph(proto)
    assert linear_from(graph, graph.tensors()["h"]) is None
    assert linear_of(graph, graph.tensors()["p"].inputs[0]).add is None


@pytest.mark.parametrize("reader", ["Neg", "Add", "output"])
@pytest.mark.parametrize("op", ["Conv", "MatMul", "Gemm"])
def test_an_add_is_none_where_others_read_the_product(op, reader):
    case = Case(op, 2 if op == "Gemm" else 4, add=("c", 1, 1) if op == "Conv" else ("c",))
    proto = case.proto()
    name = "p" if reader == "output" else "z"
    if reader != "output":
        proto.graph.node.append(node(reader, ["p"] if reader == "Neg" else ["p", "p"], ["z"]))
    proto.graph.output.append(helper.make_empty_tensor_value_info(name))
    proto.graph.output[-1].type.tensor_type.elem_type = TensorProto.FLOAT
    graph = to_graph(proto)
    tensors = graph.tensors()
    assert linear_from(graph, tensors["h"]) is None
    assert linear_of(graph, tensors["p"].inputs[0]).add is None
    assert linear_from(graph, tensors["p"]).y is tensors["p"]


def test_a_product_added_to_itself_or_to_another_is_none():
    initializer = numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")
    for terms in (["p", "p"], ["p", "q"], ["p", "x"]):
        nodes = [node("MatMul", ["x", "w"], [name]) for name in "pq"] + [node("Add", terms, ["y"])]
        graph = to_graph(model(nodes, [value("x", [3])], initializers=[initializer]))
        assert linear_from(graph, graph.tensors()["y"]) is None
        assert linear_of(graph, graph.tensors()["p"].inputs[0]).add is None


# --- what is no linear map with constant weights ---


@pytest.mark.parametrize(
    "attrs",
    [
        {"alpha": 0.5},
        {"beta": 2.0},
        {"transA": 1},
        {"alpha": 2.0, "transB": 1},
        {"beta": 0.0},
        {"alpha": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [None, ("c",)])
@pytest.mark.parametrize("add", [None, ("c",)])
def test_a_gemm_that_does_more_is_none(attrs, bias, add):
    graph, tensors = Case("Gemm", 2, bias=bias, add=add, attrs=attrs, **ALIKE).graph()
    assert linear_from(graph, tensors["h"]) is None
    assert linear_of(graph, tensors["h" if add is None else "p"].inputs[0]) is None


@pytest.mark.parametrize(("op", "name"), sorted({*itertools.product(PLACES, "wba")} - {("MatMul", "b")}))
def test_weights_that_are_computed_are_none(op, name):
    conv = op in ("Conv", "ConvTranspose")
    add = None if name == "b" else ("c", 1, 1) if conv else ("c",)
    case = Case(op, 2 if op == "Gemm" else 4, bias=("c",) if name == "b" else None, add=add)
    proto = case.proto()
    constant = next(i for i in proto.graph.initializer if i.name == name)
    proto.graph.initializer.remove(constant)
    proto.graph.input.append(value(name, list(constant.dims)))
    graph = to_graph(proto)
    assert linear_from(graph, graph.tensors()["h"]) is None
    linear = linear_of(graph, graph.tensors()["h" if add is None else "p"].inputs[0])
    assert (linear is None) == (name != "a")
    assert linear is None or (linear.add, linear.bias) == (None, None)


@pytest.mark.parametrize("shape", [(4,), (1, 4, 4), (2, 4, 4), (1, 1, 4, 4)])
def test_a_product_with_no_matrix_is_none(shape):
    weight = numpy_helper.from_array(np.ones(shape, np.float32), "w")
    graph = to_graph(
        model([node("MatMul", ["x", "w"], ["y"])], [value("x", [2, 4, 4])], initializers=[weight])
    )
    assert linear_from(graph, graph.outputs[0]) is None


def test_a_matrix_from_the_left_is_none():
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    graph = to_graph(
        model([node("MatMul", ["w", "x"], ["y"])], [value("x", [2, 4, 4])], initializers=[weight])
    )
    assert linear_from(graph, graph.outputs[0]) is None


def test_whole_numbers_are_none():
    weight = numpy_helper.from_array(np.ones((4, 4), np.int32), "w")
    inputs, outputs = [value("x", [2, 4], TensorProto.INT32)], [value("y", [2, 4], TensorProto.INT32)]
    graph = to_graph(model([node("MatMul", ["x", "w"], ["y"])], inputs, outputs, [weight]))
    assert linear_from(graph, graph.outputs[0]) is None


def test_somebody_elses_operators_are_none():
    for op, name in itertools.product(("Conv", "MatMul"), ("p", "h")):
        proto = Case(op, add=("c", 1, 1) if op == "Conv" else ("c",)).proto()
        next(n for n in proto.graph.node if name in n.output).domain = "own"
        proto.opset_import.append(helper.make_opsetid("own", 1))
        graph = to_graph(proto)
        tensors = graph.tensors()
        assert linear_from(graph, tensors["h"]) is None
        found = linear_of(graph, tensors["p"].inputs[0])
        assert found is None if name == "p" else found.add is None


def test_what_no_node_makes_is_none():
    graph, tensors = Case().graph()
    assert linear_from(graph, tensors["in"]) is None
    assert linear_from(graph, tensors["w"]) is None
    assert linear_from(graph, tensors["y"]) is None
    assert linear_of(graph, tensors["y"].inputs[0]) is None


# --- at one's own place alone ---


@st.composite
def convolutions(draw):
    rank = draw(st.integers(3, 4))
    kernel, dims = draw(st.sampled_from((1, 1, 1, 2, 3))), rank - 2
    attrs = {}
    if draw(st.booleans()):
        attrs["strides"] = [draw(st.integers(1, 2)) for _ in range(dims)]
    if draw(st.booleans()):
        attrs["auto_pad"] = draw(st.sampled_from(("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")))
    elif draw(st.booleans()):
        attrs["dilations"] = [draw(st.integers(1, 2)) for _ in range(dims)]
    if attrs.get("auto_pad", "NOTSET") == "NOTSET" and draw(st.booleans()):
        attrs["pads"] = [draw(st.sampled_from((0, 0, 0, 1))) for _ in range(2 * dims)]
    return Case("Conv", rank, 2, 2, draw(st.integers(1, 2)), kernel, attrs=attrs, size=(5, 6), batch=1)


@settings(RANDOM, max_examples=150)
@given(convolutions())
def test_pointwise_is_what_depends_on_its_own_place(case):
    """A change at one place of the input changes the output there and nowhere else."""
    graph, tensors = case.graph()
    x = 1 + np.abs(case.feeds()["in"])
    changed, place = x.copy(), (slice(None), slice(None), *(2, 3)[: case.rank - 2])
    changed[place] += 1
    before, after = (run(to_proto(graph), **{"in": array})["y"] for array in (x, changed))
    own = before.shape == x.shape
    if own:
        expected = before.copy()
        expected[place] = after[place]
        own = np.array_equal(after, expected)
    assert linear_from(graph, tensors["h"]).pointwise == own


@pytest.mark.parametrize(("op", "rank"), [("MatMul", 3), ("MatMul", 2), ("Gemm", 2)])
def test_a_matrix_is_pointwise(op, rank):
    graph, tensors = Case(op, rank).graph()
    assert linear_from(graph, tensors["h"]).pointwise


@pytest.mark.parametrize("kernel", [1, 2])
def test_a_transposed_convolution_is_not_pointwise(kernel):
    graph, tensors = Case("ConvTranspose", kernel=kernel).graph()
    assert not linear_from(graph, tensors["h"]).pointwise
