"""fold_batch_norm: the same outputs without the normalization; near-misses left as they are."""

import dataclasses
import functools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.graph.graph import to_graph, to_proto
from meta_deploy.graph.passes.fold_batch_norm import fold_batch_norm
from tests.graph import rewriting
from tests.graph.linear_maps import PADDED, Map, agree_for_batches
from tests.graph.rewriting import RANDOM, TYPES, contents, node, ops, same
from tests.small_graphs import model, value

CONV = Map()
TOKENS = Map("MatMul", rank=3, outer=3, bias="none")  # axis 1 is as long as the channels, which are axis 2


@dataclasses.dataclass(frozen=True)
class Norm:
    """A BatchNormalization between what makes its input and what reads its output, to vary.

    `maker` and `readers` are linear maps, or the name of an operator of one input.
    """

    maker: Map | str = CONV
    readers: tuple = ("Relu",)
    zero_shift: bool = False
    computed: str = ""  # of "weight", "scale", "reader": an input of the graph
    reader: str = ""  # of "product", "x": another node reads it
    output: str = ""  # of "product", "x", "y": it is an output as well
    attrs: dict = dataclasses.field(default_factory=lambda: {"epsilon": 1e-3})
    variance: float = 0.0  # added to it
    opset: int = 18
    dynamic: bool = False
    dtype: str = "float32"
    clash: bool = False  # names that passes would choose
    shuffle: int = 0

    def proto(self):
        taken, initializers, inputs, kind = {}, [], [], TYPES[self.dtype]

        def n(name):
            clashing = "t" + "/weight" * (len(taken) // 3) + ("", "/bias", "/product")[len(taken) % 3]
            return taken.setdefault(name, clashing if self.clash else name)

        def constant(name, array):
            initializers.append(numpy_helper.from_array(np.asarray(array, self.dtype), n(name)))
            return n(name)

        first = self.maker if isinstance(self.maker, Map) else self._maps()[0] if self._maps() else Map()
        shape = first.shape("n" if self.dynamic else 2)
        x, rng = n("x"), np.random.default_rng(1)
        inputs.append(value(x, shape, kind))
        if isinstance(self.maker, Map):
            channels = self.maker.outer
            nodes = self.maker.build(x, "h", n, constant)
        else:
            channels = first.inner
            nodes = [node(self.maker, [x], [n("h")])]
        shift = np.zeros((2, channels)) if self.zero_shift else rng.standard_normal((2, channels))
        params = [rng.uniform(-2, 2, channels), *shift, rng.uniform(0.5, 2, channels) + self.variance]
        params = [constant(f"s{i}", p) for i, p in enumerate(params)]
        nodes.append(node("BatchNormalization", [n("h"), *params], [n("z")], **self.attrs))
        ends = []
        for i, reader in enumerate(self.readers):
            y = f"y{i}"
            nodes += (
                reader.build(n("z"), y, n, constant)
                if isinstance(reader, Map)
                else [node(reader, [n("z")], [n(y)])]
            )
            ends.append(n(y))
        names = {"product": n("h.p"), "x": n("h"), "y": n("z")}
        if self.reader:
            nodes.append(node("Neg", [names[self.reader]], [n("read")]))
            ends.append(n("read"))
        if self.output:
            ends.append(names[self.output])
        if self.computed:
            name = n({"weight": "h.w", "scale": "s0", "reader": "y0.w"}[self.computed])
            moved = next(i for i in initializers if i.name == name)
            initializers.remove(moved)
            inputs.append(value(name, list(moved.dims), kind))
        outputs = [helper.make_empty_tensor_value_info(name) for name in ends]
        for out in outputs:
            out.type.tensor_type.elem_type = kind
        imports = [helper.make_opsetid("", self.opset)]
        return model(nodes, inputs, outputs, initializers, opset_imports=imports)

    def _maps(self):
        return [reader for reader in self.readers if isinstance(reader, Map)]

    def folds(self):
        """Whether it is to be removed, by the rule as it is written down."""
        m = self.maker
        if self.computed == "scale" or self.variance < -2:
            return False
        between = {self.reader, self.output} - {"", "y"}
        if isinstance(m, Map) and not between and self.computed != "weight" and m.bias != "both":
            return m.op != "MatMul" or m.rank == 2
        if self.output == "y" or len(self._maps()) < len(self.readers) or self.computed == "reader":
            return False
        for reader in self._maps():
            pads = any(reader.attrs.get("pads", [])) or reader.kernel > 1 or reader.op == "ConvTranspose"
            if pads and not self.zero_shift:
                return False
            if reader.op == "MatMul" and reader.rank > 2:
                return False
        return True


rewritten = functools.partial(rewriting.rewritten, fold_batch_norm)


def agree(proto, changes, shuffle=0, runs=True):
    """As `rewriting.agree`, for several batches where any goes."""
    return agree_for_batches(fold_batch_norm, proto, changes, shuffle, runs)


def folded(norm):
    after = agree(norm.proto(), 1, norm.shuffle)
    assert "BatchNormalization" not in ops(after)
    return after


def left(norm, runs=True):
    agree(norm.proto(), 0, norm.shuffle, runs=runs)


# --- into the linear map before ---

BEFORE = [
    Map(),
    Map(kernel=3, attrs=PADDED),
    Map(kernel=3, attrs={"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
    Map(kernel=3, attrs={**PADDED, "dilations": [2, 2]}),
    Map(kernel=2, rank=3),
    Map(kernel=2, rank=5),
    Map(group=2, kernel=3),
    Map(inner=6, group=6),
    Map(inner=1, outer=1),
    Map("ConvTranspose", kernel=2, attrs={"strides": [2, 2]}),
    Map("ConvTranspose", group=2, kernel=3),
    Map("ConvTranspose", inner=6, group=3, kernel=2, rank=3),
    Map("Gemm", rank=2),
    Map("Gemm", rank=2, attrs={"transB": 1}),
    Map("Gemm", inner=6, rank=2),
    Map("MatMul", rank=2),
    Map("MatMul", inner=6, rank=2),
]


@pytest.mark.parametrize("maker", BEFORE, ids=str)
def test_the_linear_map_before_takes_it(maker):
    for bias in ("none", "add", "first", *(["own"] if maker.op != "MatMul" else [])):
        after = folded(Norm(dataclasses.replace(maker, bias=bias)))
        in_an_add = bias in ("add", "first") or maker.op == "MatMul"
        assert ops(after) == [maker.op, *["Add"] * in_an_add, "Relu"]


@pytest.mark.parametrize("opset", [9, 11, 13, 14, 15, 17, 20])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_opset_type_and_batch(opset, dtype, dynamic):
    maker = Map("Gemm", rank=2) if dtype == "float64" else Map()  # ONNX Runtime has no such convolution
    folded(Norm(maker, opset=opset, dtype=dtype, dynamic=dynamic))


@pytest.mark.parametrize(
    "norm",
    [
        Norm(attrs={}),
        Norm(attrs={"epsilon": 0.5, "momentum": 0.1, "training_mode": 0}),
        Norm(Map(bias="add"), output="y"),
        Norm(Map("MatMul", rank=2, bias="none"), output="y", readers=()),
        Norm(readers=("Relu", "Neg", Map(inner=6))),
        Norm(zero_shift=True),
        Norm(Map(bias="none"), zero_shift=True),
        Norm(clash=True),
        Norm(Map(bias="add"), clash=True),
        Norm(Map("MatMul", rank=2, bias="none"), clash=True),
    ],
    ids=str,
)
def test_variants_are_taken(norm):
    folded(norm)


@pytest.mark.parametrize(
    "norm",
    [
        Norm(reader="x"),
        Norm(output="x"),
        Norm(Map(bias="add"), reader="x"),
        Norm(Map(bias="add"), output="x"),
        Norm(Map(bias="add"), reader="product"),
        Norm(Map(bias="add"), output="product"),
        Norm(Map("Gemm", rank=2), output="x"),
        Norm(computed="weight"),
        Norm(computed="scale"),
        Norm(Map(bias="both")),  # two biases: the other pass joins them
        Norm("Relu"),
        Norm(TOKENS),
        Norm(Map("Gemm", rank=2, attrs={"alpha": 0.5})),
    ],
    ids=str,
)
def test_a_near_miss_stays(norm):
    left(norm)


def test_what_would_not_be_finite_stays():
    left(Norm(variance=-4), runs=False)
    proto = Norm(dtype="float16", attrs={"epsilon": 0.0}).proto()
    s0 = next(i for i in proto.graph.initializer if i.name == "s0")
    s0.CopyFrom(numpy_helper.from_array(np.full(6, 6e4, np.float16), "s0"))
    agree(proto, 0, runs=False)
    proto = Norm("Relu", (Map(),), dtype="float16").proto()
    for i in proto.graph.initializer:
        if i.name in ("s0", "s3"):
            number = 6e4 if i.name == "s0" else 1e-2
            i.CopyFrom(numpy_helper.from_array(np.full(4, number, np.float16), i.name))
    agree(proto, 0, runs=False)


def test_what_nothing_reads_stays():
    """Clean-up is another pass."""
    norm = dataclasses.replace(Norm("Relu", ()), reader="x")
    agree(norm.proto(), 0)


def test_training_stays():
    proto = Norm().proto()
    norm = next(n for n in proto.graph.node if n.op_type == "BatchNormalization")
    norm.output.extend(["m", "v"])
    norm.attribute.append(helper.make_attribute("training_mode", 1))
    assert rewritten(proto)[1] == 0
    del norm.output[1:]
    assert rewritten(proto)[1] == 0


def test_one_value_for_each_element_stays():
    """As it could be until opset 9."""
    proto = Norm(opset=8).proto()
    norm = next(n for n in proto.graph.node if n.op_type == "BatchNormalization")
    norm.attribute.append(helper.make_attribute("spatial", 0))
    for i in proto.graph.initializer:
        if i.name[0] == "s":
            i.CopyFrom(numpy_helper.from_array(np.ones((6, 5, 6), np.float32), i.name))
    assert rewritten(proto)[1] == 0


def test_training_of_old_opsets_shows_in_the_outputs():
    proto = Norm(opset=9).proto()
    norm = next(n for n in proto.graph.node if n.op_type == "BatchNormalization")
    norm.output.extend(["m", "v", "", ""])
    proto.graph.output.append(value("m", [6]))
    assert rewritten(proto)[1] == 0


def test_weights_that_another_one_shares_stay_as_they_are():
    proto = Norm(Map(bias="own")).proto()
    inputs = [*proto.graph.node[0].input]
    proto.graph.node.append(node("Conv", inputs, ["other"]))
    proto.graph.output.append(value("other", [2, 6, 5, 6]))
    after = agree(proto, 1)
    assert {"h.w", "h.b"} <= {i.name for i in after.graph.initializer}


def test_parameters_of_one_norm_may_serve_two():
    """Two linear maps with the same weights, two norms with the same parameters."""
    proto = Norm(Map(inner=6)).proto()
    proto.graph.node[-1].output[0] = "r"
    for n in list(proto.graph.node):
        copy = onnx.NodeProto()
        copy.CopyFrom(n)
        names = {"x": "r", "h": "h2", "z": "z2", "r": "y0"}
        copy.input[0], copy.output[0] = names[n.input[0]], names[n.output[0]]
        proto.graph.node.append(copy)
    del proto.graph.value_info[:]
    agree(proto, 2)


def test_a_reader_that_nothing_needs_does_not_hinder_for_long():
    """Where another place is changed the dead node goes, and then so does the norm."""
    proto = Norm(Map(inner=6), readers=(Map(inner=6),)).proto()
    proto.graph.node.append(node("Neg", ["h"], ["dead"]))
    agree(proto, 1)
    proto = Norm(Map(inner=6), readers=(Map(inner=6), "Relu")).proto()
    proto.graph.node.append(node("Neg", ["h"], ["dead"]))
    agree(proto, 0)
    shift = [f"s{i}" for i in range(4)]
    proto.graph.node.extend(
        [
            node("Conv", ["x", "h.w"], ["c"]),
            node("BatchNormalization", ["c", *shift], ["d"]),
            node("Neg", ["d"], ["e"]),
        ]
    )
    proto.graph.output.append(value("e", [2, 6, 5, 6]))
    agree(proto, 2)


# --- into the linear maps after ---


@pytest.mark.parametrize("zero_shift", [False, True])
@pytest.mark.parametrize(
    "readers",
    [
        (Map(),),
        (Map(bias="none"),),
        (Map(bias="add"),),
        (Map(bias="both"),),
        (Map(group=2),),
        (Map(inner=6, group=3, bias="none", rank=3),),
        (Map(attrs={"auto_pad": "SAME_LOWER"}),),
        (Map(), Map(bias="none", outer=3), Map(group=2, bias="first")),
        (Map("Gemm", rank=2), Map("MatMul", rank=2, bias="none"), Map("MatMul", rank=2, bias="add")),
        (Map("Gemm", rank=2, attrs={"transB": 1}, bias="none"),),
    ],
    ids=str,
)
def test_linear_maps_after_take_it(readers, zero_shift):
    folded(Norm("Relu", readers, zero_shift=zero_shift))


SPATIAL = [
    Map(attrs=PADDED),
    Map(kernel=3, attrs=PADDED),
    Map(kernel=3, attrs={"auto_pad": "SAME_UPPER"}),
    Map(kernel=3, group=2, bias="none", attrs=PADDED),
    Map(inner=6, group=6, kernel=3, bias="add", attrs=PADDED),
    Map("ConvTranspose", kernel=2, attrs={"strides": [2, 2]}),
    Map("ConvTranspose", kernel=3, group=2, attrs=PADDED),
]


@pytest.mark.parametrize("reader", SPATIAL, ids=str)
def test_a_shift_does_not_pass_padding_a_scale_does(reader):
    left(Norm("Relu", (reader,)))
    folded(Norm("Relu", (reader,), zero_shift=True))


@pytest.mark.parametrize(
    "norm",
    [
        Norm("Relu", (Map(),), output="y"),
        Norm("Relu", (Map(), "Neg")),
        Norm("Relu", (Map(), Map(kernel=3))),
        Norm("Relu", (Map(),), computed="reader"),
        Norm("Relu", (Map(), Map()), computed="reader"),
        Norm("Relu", (dataclasses.replace(TOKENS, inner=3),)),
        Norm("Relu", (Map("Gemm", rank=2, attrs={"alpha": 2.0}),)),
        Norm("Relu", (Map("Gemm", rank=2, inner=2, attrs={"transA": 1}),)),
    ],
    ids=str,
)
def test_all_readers_or_none(norm):
    left(norm)


def test_what_another_reads_goes_on_instead_of_back():
    after = folded(Norm(Map(), (Map(inner=6),), reader="x"))
    assert sorted(ops(after)) == ["Conv", "Conv", "Neg"]


def test_a_weight_shared_by_readers_of_this_and_of_others_stays_for_the_others():
    proto = Norm("Relu", (Map(), Map())).proto()
    first, second = (n for n in proto.graph.node if n.op_type == "Conv")
    second.input[1] = first.input[1]
    proto.graph.node.append(node("Conv", ["h", *first.input[1:]], ["other"]))
    proto.graph.output.append(value("other", [2, 6, 5, 6]))
    agree(proto, 1)


def test_a_norm_as_its_own_weight_stays():
    """MatMul of a square with itself: linear in neither."""
    nodes = [
        node("Relu", ["x"], ["h"]),
        node("BatchNormalization", ["h", "s", "s", "s", "s"], ["z"]),
        node("MatMul", ["z", "z"], ["y"]),
    ]
    s = numpy_helper.from_array(np.float32([0.5, 1, 2]), "s")
    agree(model(nodes, [value("x", [3, 3])], initializers=[s]), 0)


# --- rows of them, branches ---


def row(*layers):
    """Norms ("B") and convolutions ("1": 1x1, "3": 3x3 with padding), one after another."""
    rng, nodes, initializers = np.random.default_rng(5), [node("Relu", ["x"], ["t0"])], []
    for i, layer in enumerate((*layers, "Neg")):
        if layer == "B":
            arrays = [*rng.standard_normal((3, 4)), rng.uniform(0.5, 2, 4)]
        else:
            k = int(layer) if layer.isdigit() else 1
            arrays = [rng.standard_normal((4, 4, k, k)) / (2 * k)] * layer.isdigit()
        names = [f"c{i}_{j}" for j in range(len(arrays))]
        initializers += [
            numpy_helper.from_array(a.astype(np.float32), n) for a, n in zip(arrays, names, strict=True)
        ]
        op = {"B": "BatchNormalization", "Neg": "Neg"}.get(layer, "Conv")
        attrs = PADDED if layer == "3" else {}
        nodes.append(node(op, [f"t{i}", *names], [f"t{i + 1}"], **attrs))
    nodes[-1].output[0] = "y"
    return model(nodes, [value("x", [2, 4, 5, 5])], initializers=initializers)


@pytest.mark.parametrize("shuffle", range(4))
@pytest.mark.parametrize(
    ("layers", "changes"),
    [
        ("1BB", 2),
        ("BB1", 2),
        ("BB3", 0),
        ("BBB", 0),
        ("1BB1", 2),
        ("BB1BB", 4),
        ("B3BB1B3", 3),
        ("B1B1B1", 3),
        ("3B" * 6, 6),
    ],
)
def test_rows_of_norms_in_any_order_of_nodes(layers, changes, shuffle):
    after = agree(row(*layers), changes, shuffle=shuffle)
    assert ops(after).count("BatchNormalization") == layers.count("B") - changes


def test_two_norms_make_one_bias():
    proto = Norm("Relu", (Map("MatMul", rank=2, bias="none"),)).proto()
    first = next(n for n in proto.graph.node if n.op_type == "BatchNormalization")
    proto.graph.node.insert(1, node("BatchNormalization", ["h", *first.input[1:]], ["h2"]))
    first.input[0] = "h2"
    proto.graph.node[2].input[0] = "h2"
    for shuffle in range(4):
        assert sorted(ops(agree(proto, 2, shuffle=shuffle))) == ["Add", "MatMul", "Relu"]


def with_branch(nodes, inside, out, outer=()):
    """What `nodes` make is used in a branch, by the nodes `inside`, the last of which makes `out`."""
    then = helper.make_graph(inside, "then", [], [value(out, None)])
    other = helper.make_graph([node("Neg", ["x"], ["n"])], "else", [], [value("n", None)])
    rng = np.random.default_rng(6)
    shapes = {"w": (4, 4, 1, 1), "a": (4, 1, 1), "s": (4,)}
    initializers = [
        numpy_helper.from_array(rng.uniform(0.5, 2, shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        node("Relu", ["x"], ["h"]),
        *nodes,
        node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]
    inputs = [value("x", [2, 4, 3, 3]), value("c", [], TensorProto.BOOL)]
    outputs = [value("y", None), *(value(name, None) for name in outer)]
    return model(nodes, inputs, outputs, initializers)


def conv(x, y):
    return node("Conv", [x, "w"], [y])


def norm(x, y):
    return node("BatchNormalization", [x, "s", "s", "s", "s"], [y])


@pytest.mark.parametrize(
    ("proto", "changes"),
    [
        (with_branch([], [conv("h", "i"), norm("i", "j")], "j"), 0),
        (with_branch([conv("h", "i")], [norm("i", "j")], "j"), 0),
        (with_branch([norm("h", "i")], [conv("i", "j")], "j"), 0),
        (with_branch([conv("h", "i"), norm("i", "j")], [node("Neg", ["i"], ["k"])], "k", ["j"]), 0),
        (with_branch([norm("h", "i"), conv("i", "j")], [conv("i", "k")], "k", ["j"]), 0),
        (with_branch([norm("h", "i"), conv("i", "j")], [node("Add", ["j", "a"], ["k"])], "k"), 1),
        (with_branch([conv("h", "i"), norm("i", "j")], [node("Neg", ["j"], ["k"])], "k"), 1),
    ],
)
def test_branches_are_read_and_left_as_they_are(proto, changes):
    after, made = rewritten(proto)
    assert made == changes
    for taken in (True, False):
        x = np.random.default_rng(2).standard_normal((2, 4, 3, 3)).astype(np.float32)
        same(proto, after, {"x": x, "c": np.array(taken)})
    branches = [[a.g for a in p.graph.node[-1].attribute] for p in (after, to_proto(to_graph(proto)))]
    assert [contents(g) for g in branches[0]] == [contents(g) for g in branches[1]]
    assert rewritten(after)[1] == 0


def test_somebody_elses_operator_of_that_name_stays():
    proto = Norm().proto()
    for n in proto.graph.node:
        if n.op_type == "BatchNormalization":
            n.domain = "own"
    proto.opset_import.append(helper.make_opsetid("own", 1))
    assert rewritten(proto)[1] == 0


# --- random norms ---


@st.composite
def maps(draw, op, rank, inner):
    """A linear map by an operator, of an input of a rank, from some channels."""
    convolution = op in ("Conv", "ConvTranspose")
    group, attrs, kernel = 1, {}, 1
    if convolution:
        group = draw(st.sampled_from([g for g in (1, 1, 2, 3, 6) if inner % g == 0]))
        kernel = draw(st.sampled_from((1, 1, 2, 3)))
        if (kernel == 3 or op == "Conv") and draw(st.booleans()):
            attrs = {"pads": [1] * 2 * (rank - 2)}
    elif op == "Gemm":
        attrs = {"transB": draw(st.integers(0, 1))}
    outer = group * draw(st.integers(1, 3))
    biases = ("none", "add", "first", *(("own", "own", "both") if op != "MatMul" else ()))
    return Map(op, inner, outer, group, kernel, rank, draw(st.sampled_from(biases)), attrs)


@st.composite
def norms(draw):
    rank, size = draw(st.sampled_from((2, 3, 4, 4, 5))), st.sampled_from((1, 2, 4, 6))
    ops = st.sampled_from(("Gemm", "MatMul") if rank == 2 else ("Conv", "Conv", "Conv", "ConvTranspose"))
    kind = draw(st.sampled_from(("map", "map", "tokens", "other", "other", "other")))
    if kind == "map":
        maker = draw(maps(draw(ops), rank, draw(size)))
    else:
        maker = TOKENS if kind == "tokens" else "Relu"
    if kind == "tokens":
        readers = ("Relu",)
    else:
        channels = maker.outer if kind == "map" else draw(size)
        mapped = ops.flatmap(lambda op: maps(op, rank, channels))
        pool = st.one_of(mapped, mapped, mapped, mapped, st.sampled_from(("Relu", "Neg")))
        readers = tuple(draw(st.lists(pool, min_size=1, max_size=3)))
    between = ["", "", "", "x", *["product"] * (kind == "map" and maker.bias in ("add", "first", "both"))]
    computed = ["", "", "", "", "scale", *["weight"] * (kind != "other")]
    computed += ["reader"] * isinstance(readers[0], Map)
    return Norm(
        maker,
        readers,
        zero_shift=draw(st.booleans()),
        computed=draw(st.sampled_from(computed)),
        reader=draw(st.sampled_from(between)),
        output=draw(st.sampled_from([*between, "y"])),
        opset=draw(st.sampled_from((13, 15, 18, 20))),
        dynamic=draw(st.booleans()),
        clash=draw(st.booleans()),
        shuffle=draw(st.integers(0, 3)),
    )


@settings(RANDOM, max_examples=250)
@given(norms())
def test_random_norms_are_folded_where_the_rule_says_so(norm):
    agree(norm.proto(), int(norm.folds()), shuffle=norm.shuffle)


# --- moves between ---


def moved(moves, channels=6, tokens=(2, 5), op="MatMul", bias=False, reader=""):
    """A linear map over the last axis (axis 1 of a Conv), moves, and a norm."""
    rng = np.random.default_rng(0)
    shape = [*tokens, 4] if op == "MatMul" else [tokens[0], 4, *tokens[1:]]
    weight = rng.standard_normal((4, channels) if op == "MatMul" else (channels, 4, *[1] * (len(shape) - 2)))
    params = [*rng.standard_normal((3, channels)), rng.uniform(0.5, 2, channels)]
    constants = {
        "w": weight,
        **{f"s{i}": p for i, p in enumerate(params)},
        "b": rng.standard_normal(channels),
    }
    nodes, x = [node(op, ["x", "w"], ["h"])], "h"
    if bias:
        nodes.append(node("Add", ["h", "b"], ["h2"]))
        x = "h2"
    for i, (move, argument) in enumerate(moves):
        if move == "Transpose":
            nodes.append(node("Transpose", [x], [f"m{i}"], perm=argument))
        else:
            constants[f"t{i}"] = np.array(argument)
            nodes.append(node("Reshape", [x, f"t{i}"], [f"m{i}"]))
        x = f"m{i}"
    nodes.append(node("BatchNormalization", [x, *(f"s{i}" for i in range(4))], ["z"]))
    nodes.append(node("Relu", ["z"], ["y"]))
    outputs = ["y"]
    if reader:
        nodes.append(node("Neg", [reader], ["read"]))
        outputs.append("read")
    initializers = [
        numpy_helper.from_array(v if v.dtype == np.int64 else v.astype(np.float32), name)
        for name, v in constants.items()
        if name != "b" or bias
    ]
    return model(nodes, [value("x", shape)], outputs, initializers)


@pytest.mark.parametrize(
    ("moves", "folds", "more"),
    [
        ([("Reshape", [10, 6])], True, {}),  # PyTorch's BatchNorm1d over tokens, as LeViT writes it
        ([("Reshape", [-1, 6])], True, {"bias": True}),
        ([("Transpose", [0, 2, 1])], True, {}),
        ([("Transpose", [0, 2, 1]), ("Reshape", [2, 6, 5, 1])], True, {}),
        ([("Reshape", [2, 6, 5])], False, {}),  # cuts through tokens
        ([("Reshape", [2, 6, 5])], True, {"op": "Conv", "tokens": (2, 5, 1)}),
        ([("Transpose", [0, 2, 1])], False, {"op": "Conv", "channels": 5, "tokens": (2, 5)}),
        ([("Reshape", [10, 6])], False, {"reader": "h"}),
        ([("Reshape", [10, 6])], False, {"reader": "m0"}),
        ([("Reshape", [10, 6]), ("Reshape", [5, 6, 2, 1])], False, {}),
    ],
)
def test_moves_between_that_leave_the_channels_whole_are_no_obstacle(moves, folds, more):
    proto = moved(moves, **more)
    after, changes = rewriting.rewritten(fold_batch_norm, proto)
    assert ("BatchNormalization" not in ops(after)) == bool(changes) == folds
    same(proto, after, rewriting.feeds(proto))


@settings(RANDOM, max_examples=60)
@given(data=st.data())
def test_random_moves_between_answer_as_before(data):
    op = data.draw(st.sampled_from(("MatMul", "Conv")))
    b, n, c = (data.draw(st.sampled_from((1, 2, 3, 4, 6))) for _ in range(3))
    shape, moves = ([b, n, c] if op == "MatMul" else [b, c, n]), []
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            perm = data.draw(st.permutations(range(len(shape))))
            moves.append(("Transpose", perm))
            shape = [shape[p] for p in perm]
        else:
            total, target = b * n * c, []
            for _ in range(data.draw(st.integers(1, 3))):
                divisors = [d for d in range(1, total + 1) if total % d == 0]
                target.append(data.draw(st.sampled_from(divisors)))
                total //= target[-1]
            shape = [*target, total]
            moves.append(("Reshape", shape))
    if len(shape) < 2 or shape[1] != c:
        return
    proto = moved(moves, channels=c, tokens=(b, n), op=op)
    after, _ = rewriting.rewritten(fold_batch_norm, proto)
    same(proto, after, rewriting.feeds(proto))
