"""fold_scales: the same outputs without the constants; channels that others read stay as they are."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.graph.graph import BATCH, to_graph, to_proto
from meta_deploy.graph.passes import fold_scales as scales
from meta_deploy.graph.passes.fold_scales import MAX_MOVES, MAX_READERS, fold_scales
from tests.graph.linear_maps import PADDED, Map, agree_for_batches
from tests.graph.rewriting import RANDOM, TYPES, contents, node, ops, rewritten, same
from tests.small_graphs import any_batch, model, run, value


def agree(proto, changes, shuffle=0, runs=True):
    return agree_for_batches(fold_scales, proto, changes, shuffle, runs)


class Parts:
    """Nodes and constants of a graph that is being written."""

    def __init__(self, dtype="float32", clash=False):
        self.nodes, self.initializers, self.names = [], [], {}
        self.dtype, self.clash = dtype, clash

    def n(self, name):
        """The name of a tensor: what was asked for, or one that passes would choose."""
        i = len(self.names)
        clashing = "t" + "/weight" * (i // 3) + ("", "/bias", "/product")[i % 3]
        return self.names.setdefault(name, clashing if self.clash else name)

    def constant(self, name, array, dtype=None):
        array = np.asarray(array, dtype or self.dtype)
        self.initializers.append(numpy_helper.from_array(array, self.n(name)))
        return self.n(name)

    def numbers(self, *values):
        return self.constant(f"i{len(self.names)}", values, np.int64)

    def add(self, op, inputs, out, **attrs):
        self.nodes.append(node(op, inputs, [self.n(out)], **attrs))
        return self.n(out)

    def linear(self, linear, x, y):
        self.nodes += linear.build(x, y, self.n, self.constant)
        return self.n(y)

    def model(self, inputs, outputs, opset=18):
        outputs = [helper.make_empty_tensor_value_info(self.n(name)) for name in outputs]
        for out in outputs:
            out.type.tensor_type.elem_type = TYPES[self.dtype]
        imports = [helper.make_opsetid("", opset)]
        return model(self.nodes, inputs, outputs, self.initializers, opset_imports=imports)


# --- right behind a linear map ---

CONV, MATMUL = Map(), Map("MatMul", rank=3, bias="add")  # (2, 6, 5, 6) and (2, 3, 6)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A constant behind a linear map, to vary.

    `shape` is the constant's, "c" in it for the number of channels.
    """

    linear: Map = CONV
    op: str = "Mul"
    shape: tuple = ("c", 1, 1)
    first: bool = False  # the constant comes first
    number: float | None = None  # all of it, or its first
    computed: str = ""  # of "weight", "constant": an input of the graph
    reader: str = ""  # of "product", "x": another node reads it
    output: str = ""  # of these and "y": it is an output as well
    opset: int = 18
    dynamic: bool = False
    dtype: str = "float32"
    clash: bool = False
    shuffle: int = 0

    def proto(self):
        parts, kind = Parts(self.dtype, self.clash), TYPES[self.dtype]
        x = parts.n("x")
        inputs = [value(x, self.linear.shape("n" if self.dynamic else 2), kind)]
        h = parts.linear(self.linear, x, "h")
        size = [self.linear.outer if s == "c" else s for s in self.shape]
        rng = np.random.default_rng(7)
        array = np.array(rng.uniform(0.5, 2, size) * rng.choice((-1, 1), size))
        if self.number is not None:
            array.reshape(-1)[0] = self.number
        c = parts.constant("c", array)
        parts.add(self.op, [c, h] if self.first else [h, c], "z")
        parts.add("Relu", [parts.n("z")], "y")
        ends, names = ["y"], {"product": "h.p", "x": "h", "y": "z"}
        if self.reader:
            parts.add("Neg", [parts.n(names[self.reader])], "read")
            ends.append("read")
        if self.output:
            ends.append(names[self.output])
        if self.computed:
            name = c if self.computed == "constant" else parts.n("h.w")
            moved = next(i for i in parts.initializers if i.name == name)
            parts.initializers.remove(moved)
            inputs.append(value(name, list(moved.dims), kind))
        return parts.model(inputs, ends, self.opset)

    def folds(self):
        """How many nodes are to go, by the rule as it is written down."""
        m, rank = self.linear, self.linear.rank
        between = {self.reader, self.output} - {"", "y"}
        number = self.number if self.number is not None else 1.0
        fine = np.isfinite(number) and (number != 0 or self.op in ("Add", "Sub"))
        fine &= self.computed == "" and not (self.first and self.op in ("Div", "Sub"))
        # One value a channel, and no axis that the tensor does not have.
        axis = 1 if m.is_conv else rank - 1
        full = [1] * (rank - len(self.shape)) + [m.outer if s == "c" else s for s in self.shape]
        fine &= len(full) == rank and all(s == 1 for i, s in enumerate(full) if i != axis)
        fine &= full[axis] in (1, m.outer) if len(full) == rank else False
        if m.bias == "both":  # its Add goes first
            if self.computed == "weight" or "product" in between:
                return 0
            return 1 + bool(fine and not between)
        has_bias = m.bias != "none" and not (self.op == "Div" and self.first)
        if self.op in ("Add", "Sub") and m.op == "MatMul" and not has_bias:
            return 0
        own_add = m.bias in ("add", "first")
        # An Add behind a convolution is as well a bias to be taken in.
        taken = int(own_add and m.op != "MatMul" and self.computed != "weight" and "product" not in between)
        return taken + int(bool(fine) and not between)


def folded(case):
    changes = case.folds()
    assert changes
    return agree(case.proto(), changes, case.shuffle)


def left(case, runs=True):
    agree(case.proto(), 0, case.shuffle, runs)


MAPS = [
    Map(),
    Map(bias="none"),
    Map(kernel=3, group=2, attrs=PADDED),
    Map(inner=6, group=6, kernel=2, rank=3, bias="none"),
    Map(rank=5),
    Map("ConvTranspose", kernel=2, attrs={"strides": [2, 2]}),
    Map("ConvTranspose", group=2, kernel=3, bias="none"),
    Map("ConvTranspose", inner=6, group=3, kernel=2, rank=3),
    Map("Gemm", rank=2),
    Map("Gemm", rank=2, attrs={"transB": 1}, bias="none"),
    Map("MatMul", rank=2, bias="add"),
    Map("MatMul", rank=3, bias="first"),
    Map("MatMul", rank=4, bias="none"),
]


def shapes(linear):
    """Those that are one value a channel."""
    channels = ("c", *(1,) * (linear.rank - 2)) if linear.is_conv else ("c",)
    return [(), (1,), channels, (1,) * (linear.rank - len(channels)) + channels]


@pytest.mark.parametrize("op", ["Mul", "Div", "Add", "Sub"])
@pytest.mark.parametrize("linear", MAPS, ids=str)
def test_a_constant_of_any_form_is_taken(linear, op):
    for shape in shapes(linear):
        for first in (False, True) if op in ("Mul", "Add") else (False,):
            case = Scaled(linear, op, shape, first)
            if op in ("Add", "Sub") and linear.op == "MatMul" and linear.bias == "none":
                left(case)  # would be an Add again
            else:
                assert op not in ops(folded(case)) or linear.op == "MatMul"


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 20])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("linear", "dtype"),
    [(Map(), "float32"), (Map(), "float16"), (Map("MatMul", rank=3, bias="add"), "float64")],
    ids=str,
)
def test_every_opset_type_and_batch(opset, dynamic, linear, dtype):
    for op in ("Mul", "Sub"):
        folded(Scaled(linear, op, shapes(linear)[2], opset=opset, dynamic=dynamic, dtype=dtype))


@pytest.mark.parametrize(
    "case",
    [
        Scaled(reader="x"),
        Scaled(output="x"),
        Scaled(op="Add", reader="x"),
        Scaled(op="Add", output="x"),
        Scaled(MATMUL, shape=("c",), reader="product"),
        Scaled(MATMUL, shape=("c",), output="product"),
        Scaled(MATMUL, shape=("c",), output="x"),
        Scaled(computed="weight"),
        Scaled(computed="constant"),
        Scaled(op="Add", computed="constant"),
        Scaled(op="Div", first=True),
        Scaled(op="Sub", first=True),
        Scaled(op="Div", first=True, shape=()),
        Scaled(shape=(5, 1)),
        Scaled(Map(outer=5), shape=(5, 1)),
        Scaled(shape=(6,)),
        Scaled(shape=(6, 5, 6)),
        Scaled(shape=(2, 6, 1, 1)),
        Scaled(shape=(1, 1, 6, 1, 1)),
        Scaled(shape=(1,) * 5),  # one number, but an axis more
        Scaled(Map(outer=1), shape=(4, 1, 1)),
        Scaled(MATMUL, shape=(3, 1)),
        Scaled(Map("MatMul", outer=3, rank=3, bias="add"), shape=(3, 1)),
        Scaled(Map("MatMul", outer=1, rank=3, bias="add"), shape=(4,)),
        Scaled(MATMUL, shape=(1, 1, 1, 6)),
        Scaled(MATMUL, op="Add", shape=(3, 6)),
        Scaled(Map("Gemm", rank=2, attrs={"alpha": 0.5}), shape=("c",)),
    ],
    ids=str,
)
def test_a_near_miss_stays(case):
    left(case)


@pytest.mark.parametrize("number", [0.0, -0.0, np.inf, -np.inf, np.nan])
def test_zero_and_what_is_not_finite_stay(number):
    for op in ("Mul", "Div"):
        left(Scaled(op=op, number=number), runs=False)
        left(Scaled(op=op, shape=(), number=number), runs=False)
    if number:
        left(Scaled(op="Add", number=number), runs=False)


def test_what_would_not_be_finite_stays():
    left(Scaled(op="Div", number=1e-40, shape=()), runs=False)
    left(Scaled(op="Div", number=5e-324, shape=(), dtype="float64"), runs=False)
    left(Scaled(number=6e4, shape=(), dtype="float16"), runs=False)
    proto = Scaled(op="Add", number=6e4, shape=(), dtype="float16").proto()
    bias = next(i for i in proto.graph.initializer if i.name == "h.b")
    bias.CopyFrom(numpy_helper.from_array(np.full(6, 6e4, np.float16), "h.b"))
    agree(proto, 0, runs=False)


@pytest.mark.parametrize("linear", MAPS[:2] + MAPS[8:10] + MAPS[11:13], ids=str)
@pytest.mark.parametrize("op", ["Div", "Add"])
def test_without_shapes_the_channels_of_a_matrix_product_are_not_known(linear, op):
    proto = Scaled(linear, op, ()).proto()
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    after, changes = rewritten(fold_scales, proto)
    assert changes == int(linear.op != "MatMul")
    x = np.random.default_rng(4).standard_normal(linear.shape()).astype(np.float32)
    same(proto, after, {"x": x})


def test_shifts_join_to_one_bias():
    """Convolution, product of matrices: one node and two."""
    for linear, kept in ((CONV, ["Conv"]), (MATMUL, ["MatMul", "Add"])):
        parts = Parts()
        t = parts.linear(linear, "x", "h")
        for i, op in enumerate(("Add", "Sub", "Mul", "Add", "Div", "Add")):
            shape = (6, 1, 1) if linear.is_conv else (6,)
            t = parts.add(op, [t, parts.constant(f"c{i}", np.full(shape, i + 2.0))], f"t{i}")
        parts.add("Relu", [t], "y")
        after = agree(parts.model([value("x", linear.shape())], ["y"]), 6, shuffle=3)
        assert ops(after) == [*kept, "Relu"]


def test_layer_scale_between_a_projection_and_a_residual():
    linear = Map("MatMul", 6, 6, rank=3, bias="add")
    parts = Parts()
    t = parts.linear(linear, "x", "h")
    t = parts.add("Mul", [parts.constant("gamma", np.linspace(0.1, 1, 6)), t], "g")
    parts.add("Add", ["x", t], "y")
    after = agree(parts.model([value("x", ["n", 3, 6])], ["y"]), 1)
    assert ops(after) == ["MatMul", "Add", "Add"]


@pytest.mark.parametrize("op", ["Mul", "Add"])
def test_weights_that_another_one_shares_stay_as_they_are(op):
    proto = Scaled(op=op).proto()
    proto.graph.node.append(node("Conv", [*proto.graph.node[0].input], ["other"]))
    proto.graph.output.append(value("other", [2, 6, 5, 6]))
    after = agree(proto, 1)
    names = {i.name for i in after.graph.initializer}
    assert {"h.w", "h.b"} <= names
    assert len(names) == (4 if op == "Mul" else 3)  # a shift leaves the weight shared


def test_a_tensor_times_itself_stays():
    parts = Parts()
    h = parts.linear(CONV, "x", "h")
    parts.add("Mul", [h, h], "y")
    agree(parts.model([value("x", CONV.shape())], ["y"]), 0)


def test_a_reader_that_nothing_needs_does_not_hinder_for_long():
    parts = Parts()
    h = parts.linear(CONV, "x", "h")
    parts.add("Mul", [h, parts.constant("c", 2.0)], "y")
    parts.add("Neg", [h], "dead")
    agree(parts.model([value("x", CONV.shape())], ["y"]), 0)
    other = parts.linear(CONV, "x", "other")
    parts.add("Mul", [other, parts.n("c")], "z")
    agree(parts.model([value("x", CONV.shape())], ["y", "z"]), 2)


@st.composite
def scaled(draw):
    linear = draw(st.sampled_from(MAPS))
    outer = linear.group * draw(st.sampled_from((1, 2, 3)))
    own = ("own", "both") if linear.op != "MatMul" else ()
    linear = dataclasses.replace(
        linear, outer=outer, bias=draw(st.sampled_from(("none", "add", "first", *own)))
    )
    right = shapes(linear)
    wrong = [(1, *right[-1]), (1,) * (linear.rank + 1)]
    if linear.is_conv and linear.rank == 4 and linear.kernel == 1 and outer != 6:
        wrong += [(5, 1), (6,), ("c", 5, 6)]
    two_nodes = linear.bias in ("add", "first", "both")
    between = ("", "", "", "", "x", *["product"] * two_nodes)
    return Scaled(
        linear,
        draw(st.sampled_from(("Mul", "Div", "Add", "Sub"))),
        draw(st.sampled_from(right * 3 + wrong)),
        first=draw(st.booleans()),
        number=draw(st.sampled_from((None, None, None, -0.125))),
        computed=draw(st.sampled_from(("", "", "", "", "weight", "constant"))),
        reader=draw(st.sampled_from(between)),
        output=draw(st.sampled_from((*between, "y"))),
        opset=draw(st.sampled_from((11, 13, 18, 20))),
        dynamic=draw(st.booleans()),
        clash=draw(st.booleans()),
        shuffle=draw(st.integers(0, 3)),
    )


@settings(RANDOM, max_examples=200)
@given(scaled())
def test_random_constants_are_folded_where_the_rule_says_so(case):
    agree(case.proto(), case.folds(), shuffle=case.shuffle)


# --- the scale of attention ---


@dataclasses.dataclass(frozen=True)
class Attention:
    """softmax(q @ k^T) @ v of a packed projection, to vary.

    `scales` has (operator, where, number) for each constant; where is "q", "k", "kt" or "product".
    """

    cut: str = "split"  # or "unbind": Slice and Squeeze, "last": Split of the last axis, "three": projections
    scales: tuple = (("Mul", "q", 0.125),)
    bias: str = "add"
    first: bool = False
    shape: tuple = ()
    reader: str = ""  # a tensor that another node reads
    opset: int = 18
    batch: int | str = 2
    shuffle: int = 0

    def proto(self):
        b, n, h, d = self.batch, 3, 2, 4
        parts = Parts()
        x = "x"
        if self.cut == "three":
            linear = Map("MatMul", 5, h * d, rank=3, bias=self.bias)
            heads = [parts.linear(linear, x, f"p{name}") for name in "qkv"]
        else:
            packed = parts.linear(Map("MatMul", 5, 3 * h * d, rank=3, bias=self.bias), x, "p")
            heads = getattr(self, f"cut_{self.cut}")(parts, packed)
        if self.cut in ("three", "last"):
            for i, name in enumerate("qkv"):
                t = parts.add("Reshape", [heads[i], parts.numbers(b if b != "n" else 0, n, h, d)], f"r{name}")
                heads[i] = parts.add("Transpose", [t], f"h{name}", perm=[0, 2, 1, 3])
        q, k, v = heads
        q, k = self.scale(parts, "q", q), self.scale(parts, "k", k)
        kt = self.scale(parts, "kt", parts.add("Transpose", [k], "kt", perm=[0, 1, 3, 2]))
        product = self.scale(parts, "product", parts.add("MatMul", [q, kt], "product"))
        weights = parts.add("Softmax", [product], "weights", axis=-1)
        parts.add("MatMul", [weights, v], "y")
        ends = ["y"]
        if self.reader:
            parts.add("Neg", [self.reader], "read")
            ends.append("read")
        return parts.model([value(x, [b, n, 5])], ends, self.opset)

    def scale(self, parts, where, tensor):
        for i, (op, place, number) in enumerate(self.scales):
            if place == where:
                c = parts.constant(f"c{where}{i}", np.full(self.shape, number))
                tensor = parts.add(op, [c, tensor] if self.first else [tensor, c], f"{where}scaled{i}")
        return tensor

    def cut_split(self, parts, packed):
        t = parts.add("Reshape", [packed, parts.numbers(self.batch, 3, 3, 2, 4)], "r")
        t = parts.add("Transpose", [t], "t", perm=[0, 2, 3, 1, 4])
        t = parts.add("Reshape", [t, parts.numbers(self.batch, 6, 3, 4)], "flat")
        sizes = {"num_outputs": 3} if self.opset >= 18 else {}
        names = [parts.n(name) for name in "qkv"]
        parts.nodes.append(node("Split", [t], names, axis=1, **sizes))
        return names

    def cut_last(self, parts, packed):
        names = [parts.n(name) for name in "qkv"]
        parts.nodes.append(node("Split", [packed, parts.numbers(8, 8, 8)], names, axis=-1))
        return names

    def cut_unbind(self, parts, packed):
        t = parts.add("Reshape", [packed, parts.numbers(self.batch, 3, 3, 2, 4)], "r")
        t = parts.add("Transpose", [t], "t", perm=[2, 0, 3, 1, 4])
        names = []
        for i, name in enumerate("qkv"):
            ends = (parts.numbers(i), parts.numbers(i + 1), parts.numbers(0))
            s = parts.add("Slice", [t, *ends], f"s{name}")
            names.append(parts.add("Squeeze", [s, parts.numbers(0)], name))
        return names


CUTS = ["split", "unbind", "last", "three"]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("bias", ["add", "none"])
@pytest.mark.parametrize(
    "scales",
    [
        (("Mul", "q", 0.125),),
        (("Div", "q", 8.0),),
        (("Mul", "k", 0.3),),
        (("Mul", "kt", 0.3),),
        (("Mul", "product", 0.3),),
        (("Div", "product", -3.0),),
        (("Mul", "q", 0.5), ("Mul", "kt", 0.5), ("Div", "product", 3.0), ("Mul", "product", 1.5)),
    ],
    ids=str,
)
def test_the_scale_of_attention_is_taken(cut, scales, bias):
    for shape, first in (((), False), ((1,), True), ((1, 1, 1, 1), False)):
        first &= all(op == "Mul" for op, *_ in scales)
        case = Attention(cut, scales, bias, first, shape, shuffle=len(shape))
        after = agree(case.proto(), len(scales), shuffle=case.shuffle)
        assert not {"Mul", "Div"} & set(ops(after))


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("cut", CUTS)
def test_it_is_taken_in_every_opset(cut, opset):
    agree(Attention(cut, opset=opset).proto(), 1)


@pytest.mark.parametrize(
    "case",
    [
        Attention(reader="q"),
        Attention(reader="flat"),
        Attention(reader="r"),
        Attention(reader="p"),
        Attention(reader="p.p"),
        Attention("unbind", reader="sq"),
        Attention("unbind", reader="t"),
        Attention("last", reader="rq"),
        Attention("three", reader="pq"),
        Attention(scales=(("Mul", "kt", 0.5),), reader="k"),
        Attention(scales=(("Mul", "product", 0.5),), reader="product"),
        Attention(scales=(("Mul", "product", 0.5),), shape=(3,)),
        Attention(scales=(("Mul", "q", 0.5),), shape=(1,) * 5),
        Attention(scales=(("Div", "q", 0.5),), first=True),
        Attention(scales=(("Mul", "q", 0.0),)),
    ],
    ids=str,
)
def test_attention_that_differs_a_little_stays(case):
    agree(case.proto(), 0)


@pytest.mark.parametrize("shape", [(4,), (2, 1, 1), (2, 1, 4)])
def test_a_factor_for_each_head_or_channel_of_the_queries_is_taken(shape):
    agree(Attention(scales=(("Mul", "q", 0.5),), shape=shape).proto(), 1)


def channelwise(moves, factor, op="Mul", reader=""):
    """A product of tokens (2, 6, 4) whose result is moved, by permutations and shapes, then scaled."""
    rng = np.random.default_rng(3)
    constants = {"w": rng.normal(size=(5, 4)), "b": rng.normal(size=4), "f": factor}
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["t0"])]
    for i, move in enumerate(moves):
        if isinstance(move, tuple):
            nodes.append(node("Transpose", [f"t{i}"], [f"t{i + 1}"], perm=move))
        else:
            nodes.append(node("Reshape", [f"t{i}", f"s{i}"], [f"t{i + 1}"]))
    initializers = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in constants.items()]
    initializers += [
        numpy_helper.from_array(np.array(move, np.int64), f"s{i}")
        for i, move in enumerate(moves)
        if isinstance(move, list)
    ]
    nodes += [node(op, [f"t{len(moves)}", "f"], ["z"]), node("Tanh", ["z"], ["y"])]
    outputs = ["y"]
    if reader:
        nodes.append(node("Neg", [reader], ["read"]))
        outputs.append("read")
    return model(nodes, [value("x", [2, 6, 5])], outputs, initializers)


MAP = ((0, 2, 1), [2, 4, 2, 3])
FOUR = np.array([0.5, 2.0, -3.0, 1.5])


@pytest.mark.parametrize(
    ("moves", "factor", "op", "changes"),
    [
        (MAP, FOUR.reshape(4, 1, 1), "Mul", 1),
        (MAP, FOUR.reshape(1, 4, 1, 1), "Div", 1),
        (((0, 2, 1),), FOUR.reshape(4, 1), "Mul", 1),
        (([2, 24],), np.tile(FOUR, 6), "Mul", 1),
        (([2, 24],), np.repeat(FOUR, 6), "Mul", 0),
        (MAP, np.array([2.0, 3.0]).reshape(2, 1), "Mul", 0),  # of a row
        (MAP, np.array([2.0, 2.0]).reshape(2, 1), "Mul", 1),  # which are all alike
        (MAP, np.array([2.0, 3.0]).reshape(2, 1, 1, 1), "Mul", 0),  # of an image
        (((0, 2, 1),), FOUR.reshape(1, 1, 4, 1), "Mul", 0),  # makes another shape
        (MAP, np.array([1.0, 0.0, 1.0, 1.0]).reshape(4, 1, 1), "Mul", 0),
    ],
)
def test_a_factor_for_each_channel_goes_through_moves(moves, factor, op, changes):
    agree(channelwise(moves, factor, op), changes)


@pytest.mark.parametrize("reader", ["t0", "t1", "t2"])
def test_channels_that_something_else_reads_keep_their_factor(reader):
    agree(channelwise(MAP, FOUR.reshape(4, 1, 1), reader=reader), 0)


@st.composite
def moved_factors(draw):
    """Moves of (2, 6, 4), a factor, and whether all elements of a channel get the same one."""
    held, moves = np.broadcast_to(np.arange(4), (2, 6, 4)), []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            moves.append(tuple(draw(st.permutations(range(held.ndim)))))
            held = held.transpose(moves[-1])
        else:
            moves.append(
                list(draw(st.sampled_from(([2, 4, 2, 3], [2, 6, 4], [48], [8, 6], [2, 24], [1, 4, 12]))))
            )
            held = held.reshape(moves[-1])
    shape = [size if draw(st.booleans()) else 1 for size in held.shape]
    factor = np.random.default_rng(draw(st.integers(0, 99))).choice([0.5, 2.0, -1.5], shape)
    if draw(st.booleans()):  # by channel, as far as the shape can tell channels apart
        corner = tuple(slice(None) if size > 1 else slice(1) for size in shape)
        factor = FOUR[held[corner]]
    each = np.broadcast_to(factor, held.shape)
    alike = all(len(np.unique(each[held == channel])) == 1 for channel in range(4))
    return moves, factor, alike


@settings(RANDOM, max_examples=150)
@given(moved_factors())
def test_random_factors_behind_random_moves(case):
    moves, factor, alike = case
    agree(channelwise(moves, factor), int(alike))


@pytest.mark.parametrize("cut", CUTS)
def test_a_batch_of_any_size_has_its_scale_taken(cut):
    proto = any_batch(Attention(cut, batch=BATCH, scales=(("Mul", "q", 0.5), ("Div", "kt", 3.0))).proto())
    graph = to_graph(proto)
    assert fold_scales(graph) == 2
    after = to_proto(graph)
    assert not {"Mul", "Div"} & set(ops(after))
    for batch in (1, 2, 3):
        same(proto, after, {"x": np.random.default_rng(0).standard_normal((batch, 3, 5)).astype(np.float32)})


# What is done between a linear map of two channels and its scale, and whether it is so for every batch.
BETWEEN = [
    (("Reshape", (2 * BATCH, 2)), ("Slice", (0,), (1,), (1,)), True),  # of channels
    (("Reshape", (2 * BATCH, 2)), ("Slice", (0,), (1,), (0,)), False),  # of the first image
    (("Reshape", (2 * BATCH, 2)), ("Slice", (1,), (99,), (0,)), False),
    (("Reshape", (BATCH, 4)), ("Slice", (0,), (1,), (1,)), True),
    (("Transpose", (2, 1, 0)), ("Reshape", (4, BATCH)), True),
    (("Transpose", (2, 0, 1)), ("Reshape", (2, 2 * BATCH)), True),
    (("Transpose", (2, 0, 1)), ("Reshape", (4, BATCH)), False),  # which cuts the batch
    (("Transpose", (2, 0, 1)), ("Reshape", (BATCH, 4)), False),
    (("Transpose", (2, 1, 0)), ("Reshape", (BATCH, 4)), False),
    (("Pad", (0, 0, 0, 0, 0, 1)), None, True),
    (("Pad", (0, 0, 0, 1, 0, 0)), None, False),
]


@pytest.mark.parametrize(("first", "second", "alike"), BETWEEN, ids=str)
def test_images_of_any_batch_are_followed_where_all_are_moved_alike(first, second, alike):
    parts = Parts()
    h = parts.linear(Map("MatMul", 5, 2, rank=3, bias="add"), "x", "h")
    for i, move in enumerate(filter(None, (first, second))):
        op, *values = move
        if op == "Transpose":
            h = parts.add(op, [h], f"m{i}", perm=values[0])
        else:
            h = parts.add(op, [h, *(parts.numbers(*each) for each in values)], f"m{i}")
    parts.add("Mul", [h, parts.constant("c", np.array(0.5))], "y")
    proto = any_batch(parts.model([value("x", [BATCH, 2, 5])], ["y"], 18))
    graph = to_graph(proto)
    assert fold_scales(graph) == alike
    for batch in (1, 2, 3):
        x = np.random.default_rng(0).standard_normal((batch, 2, 5)).astype(np.float32)
        same(proto, to_proto(graph), {"x": x})


@pytest.mark.parametrize("reader", ["k", "v", "kt", "hk"])
def test_others_may_read_what_is_not_scaled(reader):
    agree(Attention("last" if reader == "hk" else "split", reader=reader).proto(), 1)


def test_where_the_query_is_read_by_others_the_key_takes_the_products_scale():
    after = agree(Attention(scales=(("Mul", "product", 0.5),), reader="q").proto(), 1)
    assert "Mul" not in ops(after)


def test_a_matrix_times_itself_transposed_and_scaled_is_left():
    """Both sides would be scaled."""
    parts = Parts()
    h = parts.linear(Map("MatMul", 5, 3, rank=3, bias="add"), "x", "h")
    parts.add("MatMul", [h, h], "p")
    parts.add("Mul", ["p", parts.constant("c", 0.5)], "y")
    agree(parts.model([value("x", [2, 3, 5])], ["y"]), 0)
    parts.nodes[-2:] = []
    parts.add("Transpose", [h], "ht", perm=[0, 2, 1])
    parts.add("MatMul", ["ht", h], "p")
    parts.add("Mul", ["p", parts.n("c")], "y")
    agree(parts.model([value("x", [2, 3, 5])], ["y"]), 0)


def long_walk(moves):
    parts = Parts()
    t = parts.linear(Map("Gemm", 4, 6, rank=2), "x", "h")
    for i in range(moves):
        t = parts.add("Transpose", [t], f"t{i}")
    parts.add("Mul", [t, parts.constant("c", 0.5)], "y")
    return parts.model([value("x", [2, 4])], ["y"])


def test_the_way_has_an_end():
    agree(long_walk(MAX_MOVES), 1)
    agree(long_walk(MAX_MOVES + 1), 0)


def shared(others, scaled=("Slice", (0, 2))):
    """A projection to (2, 6) of which the first two channels are scaled; `others` read it as well.

    Each of these is a row of operators, with start and end of a Slice.
    """
    parts = Parts()
    h = parts.linear(Map("Gemm", 4, 6, rank=2), "x", "h")
    ends = []
    for i, row in enumerate([[scaled], *others]):
        t = h
        for j, (op, *span) in enumerate(row):
            values = [parts.numbers(v) for v in (*span[0], 1)] if span else []
            t = parts.add(op, [t, *values], f"t{i}_{j}")
        t = parts.add("Mul", [t, parts.constant("c", 0.5)], f"y{i}") if i == 0 else t
        ends.append(t)
    return parts.model([value("x", [2, 4])], ends)


REST, ALL = ("Slice", (2, 6)), ("Slice", (0, 6))


@pytest.mark.parametrize(
    ("others", "changes"),
    [
        ([[REST]], 1),
        ([[REST, ("Softmax",)]], 1),
        ([[ALL, REST]], 1),
        ([[ALL, ("Transpose",), ("Transpose",), REST]], 1),
        ([[("Slice", (1, 6))]], 0),
        ([[ALL, REST], [ALL]], 0),
        ([[("Softmax",), REST]], 0),  # takes all channels together before the others are cut off
        ([[REST]] * (MAX_READERS - 1), 1),
        ([[REST]] * MAX_READERS, 0),  # too many to look at
    ],
)
def test_other_readers_are_followed_as_far_as_elements_are_only_moved(others, changes):
    agree(shared(others), changes)


def test_another_reader_whose_part_is_not_known_before_running():
    proto = shared([[REST]])
    start = next(n for n in proto.graph.node if n.output[0] == "t1_0").input[1]
    moved = next(i for i in proto.graph.initializer if i.name == start)
    proto.graph.initializer.remove(moved)
    proto.graph.input.append(value(start, [1], TensorProto.INT64))
    del proto.graph.value_info[:]
    proto.graph.output[1].type.tensor_type.ClearField("shape")
    after, changes = rewritten(fold_scales, proto)
    assert changes == 0
    same(proto, after, {"x": np.float32(np.arange(8).reshape(2, 4)), start: np.array([1])})


def test_what_is_too_large_is_not_followed(monkeypatch):
    agree(shared([[REST]]), 1)
    monkeypatch.setattr(scales, "MAX_ELEMENTS", 11)
    agree(shared([[REST]]), 0)


@pytest.mark.parametrize(
    ("attrs", "scaled"),
    [
        ({"axes": [1], "starts": [0], "ends": [2]}, None),
        ((([0], [2], [1], [1])), True),
        ((([0], [6], [1], [2])), True),
        ((([-1], [-(2**63)], [1], [-2])), True),
        ((([5], [0], [1], [-1])), True),
        ((([-9], [2**63 - 1], [-1], [1])), True),
        ((([1, 0], [3, 1], [1, 0], [1, 1])), True),
        ((([0], [1])), True),
    ],
    ids=str,
)
def test_slices_of_every_kind(attrs, scaled):
    """Read by a Mul alone, while another takes the last three channels."""
    parts = Parts()
    h = parts.linear(Map("Gemm", 4, 6, rank=2), "x", "h")
    if scaled is None:
        parts.add("Slice", [h], "s", **attrs)
    else:
        parts.add("Slice", [h, *(parts.numbers(*a) for a in attrs)], "s")
    parts.add("Mul", ["s", parts.constant("c", 0.5)], "y")
    opset = 9 if scaled is None else 13
    proto = parts.model([value("x", [2, 4])], ["y"], opset)
    agree(proto, int(scaled is not None))  # what was an attribute before opset 10 is not read
    if scaled:
        ends = (parts.numbers(3), parts.numbers(6), parts.numbers(1))
        parts.add("Slice", [h, *ends], "others")
        parts.add("Neg", ["others"], "z")
        proto = parts.model([value("x", [2, 4])], ["y", "z"], opset)
        touched = np.arange(6)[slice(attrs[0][0], attrs[1][0], *(attrs[3][:1] if len(attrs) > 2 else ()))]
        free = len(attrs) > 2 and not set(touched) & {3, 4, 5}
        agree(proto, int(free))


@pytest.mark.parametrize(
    ("pads", "fill", "axes", "attrs", "changes"),
    [
        ([0, 1, 0, 2], None, None, {}, 1),
        ([0, 1, 0, 2], 0.0, None, {"mode": "constant"}, 1),
        ([1, 2], None, [-1], {}, 1),
        ([1, 0, 2, 3], -0.0, [1, 0], {}, 1),
        ([0, 1, 0, 2], 1.0, None, {}, 0),
        ([0, 1, 0, 2], None, None, {"mode": "reflect"}, 0),
        ([0, -1, 0, 2], None, None, {}, 0),
    ],
)
def test_zeros_may_be_put_in_between(pads, fill, axes, attrs, changes):
    """Zeros are none of the channels: others may read them as well."""
    parts = Parts()
    h = parts.linear(Map("Gemm", 4, 6, rank=2), "x", "h")
    inputs = [parts.numbers(*pads), "" if fill is None else parts.constant("fill", fill)]
    inputs += [parts.numbers(*axes)] if axes else []
    p = parts.add("Pad", [h, *inputs], "p", **attrs)
    for name, span in (("s", (0, 3)), ("o", (3, 9))):
        parts.add("Slice", [p, *(parts.numbers(i) for i in (*span, 1))], name)
    parts.add("Mul", ["s", parts.constant("c", 0.5)], "y")
    zeros = parts.add("Slice", [p, *(parts.numbers(i) for i in (0, 1, 1))], "zeros")
    proto = parts.model([value("x", [2, 4])], ["y", "o", *([zeros] if changes else [])])
    agree(proto, changes)


def with_branch(inside, out):
    """A scaled part of a projection; a branch reads another or the same part."""
    then = helper.make_graph(inside, "then", [], [value(out, None)])
    other = helper.make_graph([node("Neg", ["v"], ["n"])], "else", [], [value("n", None)])
    parts = Parts()
    h = parts.linear(Map("Gemm", 4, 6, rank=2), "x", "h")
    parts.nodes.append(node("Split", [h, parts.numbers(2, 4)], ["q", "v"], axis=1))
    parts.add("Mul", ["q", parts.constant("two", 2.0)], "y")
    parts.nodes.append(node("If", ["c"], ["z"], then_branch=then, else_branch=other))
    return parts.model([value("x", [2, 4]), value("c", [], TensorProto.BOOL)], ["y", "z"])


@pytest.mark.parametrize(
    ("inside", "changes"),
    [
        ([node("Mul", ["v", "two"], ["m"])], 1),
        ([node("Transpose", ["v"], ["m"])], 1),
        ([node("Neg", ["q"], ["m"])], 0),
        ([node("Neg", ["y"], ["m"])], 1),
        ([node("Transpose", ["h"], ["m"])], 0),
        ([node("Gemm", ["x", "h.w"], ["g"]), node("Mul", ["g", "two"], ["m"])], 1),
    ],
)
def test_branches_are_read_and_left_as_they_are(inside, changes):
    proto = with_branch(inside, "m")
    after, made = rewritten(fold_scales, proto)
    assert made == changes
    for taken in (True, False):
        x = np.random.default_rng(2).standard_normal((2, 4)).astype(np.float32)
        same(proto, after, {"x": x, "c": np.array(taken)})
    branches = [
        [a.g for n in p.graph.node if n.op_type == "If" for a in n.attribute]
        for p in (after, to_proto(to_graph(proto)))
    ]
    assert [contents(g) for g in branches[0]] == [contents(g) for g in branches[1]]


def test_somebody_elses_operator_of_that_name_stays():
    for op in ("Mul", "Conv"):
        proto = Scaled().proto()
        for n in proto.graph.node:
            if n.op_type == op:
                n.domain = "own"
        proto.opset_import.append(helper.make_opsetid("own", 1))
        agree(proto, 0, runs=False)


# --- random ways ---


@st.composite
def ways(draw):
    """A tree of data movements: (what to read, operator, values) each, and the shapes of what they make."""
    linear = draw(
        st.sampled_from(
            (
                Map("Gemm", 2, 6, rank=2),
                Map("MatMul", 2, 12, rank=3, bias="add"),
                Map("Conv", 2, 6, rank=4),
                Map("Conv", 4, 4, 2, rank=3),
            )
        )
    )
    shape = linear.shape()
    shape[1 if linear.is_conv else -1] = linear.outer
    shapes, moves = [shape], []
    for _ in range(draw(st.integers(1, 6))):
        # Mostly on from the last one: long ways and their side ways.
        low = draw(st.sampled_from((0, max(0, len(shapes) - 2), max(0, len(shapes) - 3))))
        source = draw(st.integers(low, len(shapes) - 1))
        move, made = draw(a_move(shapes[source]))
        moves.append((source, *move))
        shapes += made
    return linear, moves, shapes


@st.composite
def a_move(draw, shape):
    """An operator with its values, and the shapes of its outputs."""
    rank, ones = len(shape), [i for i, size in enumerate(shape) if size == 1]
    kinds = [
        "Reshape",
        "Unsqueeze",
        "Flatten",
        *["Transpose", "Split", "Split", "Slice", "Slice", "Pad"] * (rank > 0),
    ]
    op = draw(st.sampled_from(kinds + ["Squeeze"] * 2 * bool(ones)))
    axis = draw(st.integers(0, rank - 1)) if rank else 0
    if op == "Transpose":
        perm = draw(st.permutations(range(rank)))
        return (op, perm), [[shape[p] for p in perm]]
    if op == "Reshape":
        total, new = int(np.prod(shape, dtype=int)), []
        while total > 1 and len(new) < 3:
            new.append(draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0])))
            total //= new[-1]
        return (op, [*new, total]), [[*new, total]]
    if op == "Unsqueeze":
        return (op, [axis]), [[*shape[:axis], 1, *shape[axis:]]]
    if op == "Squeeze":
        one = draw(st.sampled_from(ones))
        return (op, [one - rank]), [[*shape[:one], *shape[one + 1 :]]]
    if op == "Flatten":
        return (op, axis), [[int(np.prod(part, dtype=int)) for part in (shape[:axis], shape[axis:])]]
    size = shape[axis]
    if op == "Pad":
        sizes = draw(st.sampled_from(((0, 1), (1, 0), (2, 1))))
        return (op, axis, *sizes), [[*shape[:axis], size + sum(sizes), *shape[axis + 1 :]]]
    if op == "Split":
        cut = draw(st.integers(1, size)) if size > 1 else 1
        sizes = [cut, size - cut] if cut < size else [size]
        return (op, axis, sizes), [[*shape[:axis], s, *shape[axis + 1 :]] for s in sizes]
    start, step = draw(st.integers(0, size - 1)), draw(st.sampled_from((1, 1, 1, 2, -1)))
    end = draw(st.integers(start + 1, size)) if step > 0 else -size - 1
    length = len(range(size)[start:end:step])
    return (op, axis, start, end, step), [[*shape[:axis], length, *shape[axis + 1 :]]]


def move_nodes(parts, moves, first):
    """The nodes of a way that starts at a tensor; the names of all tensors on it."""
    names = [first]
    for source, op, *values in moves:
        x, out = names[source], parts.n(f"m{len(names)}")
        if op == "Transpose":
            parts.add(op, [x], out, perm=values[0])
        elif op == "Flatten":
            parts.add(op, [x], out, axis=values[0])
        elif op == "Split":
            outs = [out, parts.n(f"m{len(names) + 1}")][: len(values[1])]
            parts.nodes.append(node(op, [x, parts.numbers(*values[1])], outs, axis=values[0]))
            names += outs
            continue
        elif op == "Pad":
            parts.add(op, [x, parts.numbers(*values[1:]), "", parts.numbers(values[0])], out)
        elif op == "Slice":
            axis, start, end, step = (parts.numbers(v) for v in values)
            parts.add(op, [x, start, end, axis, step], out)
        else:
            parts.add(op, [x, parts.numbers(*values[0])], out)
        names.append(out)
    return names


def reached(linear, shape, moves, read):
    """For each of the tensors read the channels that it has elements of, as ONNX Runtime moves them.

    Counted from 1, as zero is what is put in.
    """
    axis = 1 if linear.is_conv else len(shape) - 1
    numbers = np.arange(1, linear.outer + 1, dtype=np.float32).reshape(-1, *(1,) * (len(shape) - 1 - axis))
    parts = Parts()
    names = move_nodes(parts, moves, "x")
    for i in read:
        parts.add("Neg", [names[i]], f"r{i}")
    proto = parts.model([value("x", shape)], [f"r{i}" for i in read])
    result = run(proto, x=np.broadcast_to(numbers, shape).copy())
    return {i: set((-result[f"r{i}"]).flatten().astype(int).tolist()) - {0} for i in read}


@settings(RANDOM, max_examples=250)
@given(ways(), st.data())
def test_random_ways_are_scaled_where_the_channels_get_nowhere_else(way, data):
    linear, moves, shapes = way
    last = len(shapes) - 1
    target = data.draw(st.integers(max(1, last - 1), last))
    others = data.draw(st.sets(st.integers(0, last), max_size=2)) if data.draw(st.booleans()) else set()
    kept = data.draw(st.sets(st.integers(max(1, last - 3), last), max_size=1)) - {target}
    parts = Parts()
    names = move_nodes(parts, moves, parts.linear(linear, "x", "h"))
    c = parts.constant("c", np.full((1,) * data.draw(st.integers(0, len(shapes[target]))), 0.3))
    parts.add(data.draw(st.sampled_from(("Mul", "Div"))), [names[target], c], "y")
    ends = ["y"]
    for i in sorted(others):
        parts.add("Neg", [names[i]], f"r{i}")
        ends.append(f"r{i}")
    ends += [names[i] for i in kept]
    proto = parts.model([value("x", linear.shape())], ends)
    moved_on = any(source == target for source, *_ in moves)
    channels = reached(linear, shapes[0], moves, sorted({target, *others, *kept}))
    hindered = target in others or any(channels[target] & channels[i] for i in (others | kept))
    # In another order dead nodes are dropped: where one reads the target, it would not be read then.
    shuffle = 0 if moved_on else data.draw(st.integers(0, 2))
    agree(proto, int(not moved_on and not hindered), shuffle=shuffle)
