"""fuse_layer_norm: norms written out become one operator, with the same outputs; near-misses declined."""

import dataclasses
import functools

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from meta_deploy.export.trace import quiet
from meta_deploy.graph.graph import to_graph, to_proto
from meta_deploy.graph.passes.clean_up import clean_up
from meta_deploy.graph.passes.collapse_chains import collapse_chains
from meta_deploy.graph.passes.fuse_layer_norm import fuse_layer_norm
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, TYPES, node, ops, same, shuffled
from tests.small_graphs import calls, model, run, value

BETWEEN = ("mean", "d", "square", "variance", "added", "std")


@dataclasses.dataclass(frozen=True)
class Written:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, written out, to vary.

    `scale` and `bias` are shapes of constants; None leaves them out, "input" takes one from outside.
    """

    shape: tuple = (2, 3, 8)
    axes: tuple | None = (-1,)  # None: not given, which is all of them
    scale: tuple | str | None = (8,)
    bias: tuple | str | None = (8,)
    epsilon: tuple = (1e-5, ())  # number and shape; None is an input
    variance_axes: tuple | None = None  # where they are others
    second_axes: tuple | None = None  # those of the second mean
    second_of: str = ""  # where the second x - mean is of another tensor
    mean_of: str = ""  # where the means are
    square: str = "Pow"  # or "Mul"
    exponent: float = 2.0
    divide: str = "Div"  # or "Reciprocal"
    subs: int = 1  # how often x - mean is computed; 2 or 3: for the quotient and the square (its factors)
    means: int = 1  # and the mean
    swapped: frozenset = frozenset()  # of "added", "d / std", "scale", "bias", "x - mean"
    keepdims: int = 1
    noop: int = 0
    root: str = "Sqrt"
    before: tuple | None = None  # x comes from a Transpose
    after: tuple = ()  # what reads the output are Transposes, of these permutations
    more_scales: int = 0  # further readers of the norm before its scale, with their own
    reader: str = ""  # an intermediate that another node reads
    output: str = ""  # an intermediate that is an output, too
    dead: str = ""  # an intermediate that a node reads which nothing needs
    opset: int = 18
    dtype: str = "float32"
    sizes: tuple | None = None  # where the shape has names
    prefix: str = ""
    shuffle: int = 0

    def proto(self):
        n, nodes, constants, inputs = self.n, [], [], [value(self.n("x0"), self.shape, TYPES[self.dtype])]
        rng = np.random.default_rng(1)

        def constant(name, array):
            constants.append(numpy_helper.from_array(np.asarray(array), n(name)))
            return n(name)

        def add(op, ins, out, **attrs):
            nodes.append(node(op, ins, [n(out)], **attrs))
            return n(out)

        def mean(x, out, axes):
            attrs = {"keepdims": self.keepdims} if self.keepdims != 1 else {}
            if self.opset < 18:
                return add("ReduceMean", [x], out, **attrs, **({} if axes is None else {"axes": list(axes)}))
            attrs |= {"noop_with_empty_axes": 1} if self.noop else {}
            given = [] if axes is None else [constant(f"{out}_axes", np.array(axes, np.int64))]
            return add("ReduceMean", [x, *given], out, **attrs)

        def pair(a, b, name):
            return [b, a] if name in self.swapped else [a, b]

        def affine(op, x, kind, out):
            if kind == "input":
                inputs.append(value(n(f"{out}_in"), [8], TYPES[self.dtype]))
                factor = n(f"{out}_in")
            else:
                factor = constant(f"{out}_c", rng.uniform(0.5, 2, kind).astype(self.dtype))
            return add(op, pair(x, factor, "scale" if op == "Mul" else "bias"), out)

        x = add("Identity", [n("x0")], "x")
        if self.before is not None:
            x = add("Transpose", [n("x")], "moved", **({"perm": self.before} if self.before else {}))
        if self.second_of or self.mean_of:
            add("Tanh", [x], "other")
        xs = [x, n(self.second_of) if self.second_of else x, x]
        means = [
            mean(
                n(self.mean_of) if self.mean_of else xs[i],
                f"mean{i or ''}",
                self.second_axes if i and self.second_axes else self.axes,
            )
            for i in range(self.means)
        ]
        names = ["d", "d2", "d3"][: self.subs]
        ds = [add("Sub", pair(xs[i], means[i % self.means], "x - mean"), d) for i, d in enumerate(names)]
        if self.square == "Pow":
            two = constant("two", np.array(self.exponent, self.dtype))
            square = add("Pow", [ds[-1], two], "square")
        else:
            square = add("Mul", [ds[-1], ds[len(ds) // 2]], "square")
        axes = self.axes if self.variance_axes is None else self.variance_axes
        variance = mean(square, "variance", axes)
        number, shape = self.epsilon
        if number is None:
            inputs.append(value(n("eps"), shape, TYPES[self.dtype]))
            epsilon = n("eps")
        else:
            epsilon = constant("eps", np.full(shape, number, self.dtype))
        added = add("Add", pair(variance, epsilon, "added"), "added")
        std = add(self.root, [added], "std")
        if self.divide == "Div":
            y = add("Div", pair(ds[0], std, "d / std"), "normed")
        else:
            y = add("Mul", pair(ds[0], add("Reciprocal", [std], "inverse"), "d / std"), "normed")
        outputs = []
        for i in range(self.more_scales):
            scaled = affine("Mul", y, self.scale, f"more{i}")
            outputs.append(add("Neg", [affine("Add", scaled, self.bias, f"more_y{i}")], f"more_end{i}"))
        if self.scale is not None:
            y = affine("Mul", y, self.scale, "scaled")
        if self.bias is not None:
            y = affine("Add", y, self.bias, "biased")
        for i, perm in enumerate(self.after):
            moved = add("Transpose", [y], f"back{i}", **({"perm": perm} if perm else {}))
            outputs.append(add("Neg", [moved], f"end{i}"))
        if not self.after:
            outputs.append(add("Neg", [y], "end"))
        for i, name in enumerate(filter(None, (self.reader, self.dead))):
            read = add("Identity", [y if name == "y" else n(name)], f"read{i}")
            outputs += [read] if i == 0 and self.reader else []
        if self.output:
            outputs.append(y if self.output == "y" else n(self.output))
        infos = [helper.make_empty_tensor_value_info(name) for name in outputs]
        for info in infos:
            info.type.tensor_type.elem_type = TYPES[self.dtype]
        imports = [helper.make_opsetid("", self.opset)]
        nodes = shuffled(nodes, self.shuffle)
        return model(nodes, inputs, infos, constants, opset_imports=imports)

    def __str__(self):
        changed = ((f.name, v) for f in FIELDS if (v := getattr(self, f.name)) != f.default)
        return ", ".join(f"{name}={sorted(v) if isinstance(v, frozenset) else v}" for name, v in changed)

    def n(self, name):
        return self.prefix + name

    def feeds(self):
        rng = np.random.default_rng(0)
        x = (rng.standard_normal(self.sizes or self.shape) * 2 + 0.5).astype(self.dtype)
        # A constant row: epsilon alone keeps it from a division by zero.
        if x.size:
            x[(0,) * (x.ndim - 1)] = 1
        feeds = {self.n("x0"): x}
        for out, kind in (("scaled", self.scale), ("biased", self.bias)):
            if kind == "input":
                feeds[self.n(f"{out}_in")] = rng.uniform(0.5, 2, 8).astype(self.dtype)
        if self.epsilon[0] is None:
            feeds[self.n("eps")] = np.full(self.epsilon[1], 1e-5, self.dtype)
        return feeds


FIELDS = dataclasses.fields(Written)


rewritten = functools.partial(rewriting.rewritten, fuse_layer_norm)


def agree(written, changes):
    proto = written.proto()
    after = rewriting.agree(fuse_layer_norm, proto, written.feeds(), changes, tolerance=1e-5, floor=1e-6)
    assert ops(after).count("LayerNormalization") == changes
    return after


def test_a_norm_written_out_becomes_one_operator():
    assert ops(agree(Written(), 1)) == ["Identity", "LayerNormalization", "Neg"]


def test_the_operator_has_the_constants_it_was_written_with():
    written = Written(axes=(1, 2), scale=(3, 8), bias=(1, 3, 8), epsilon=(1e-6, ()))
    proto = agree(written, 1)
    norm = next(n for n in proto.graph.node if n.op_type == "LayerNormalization")
    attributes = {a.name: helper.get_attribute_value(a) for a in norm.attribute}
    assert attributes["axis"] == -2
    assert attributes["epsilon"] == pytest.approx(1e-6)
    before = {i.name: numpy_helper.to_array(i) for i in written.proto().graph.initializer}
    after = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    np.testing.assert_array_equal(after[norm.input[1]], before["scaled_c"], strict=True)
    np.testing.assert_array_equal(after[norm.input[2]], before["biased_c"][0], strict=True)


@pytest.mark.parametrize(
    "written",
    [
        Written(scale=None),
        Written(bias=None),
        Written(scale=None, bias=None),
        Written(scale=(1, 1, 8), bias=(1, 8)),
        Written(scale=(), bias=(1,)),
        Written(axes=(2,)),
        Written(axes=(-2, -1), scale=(3, 8), bias=(3, 8)),
        Written(axes=(2, 1), scale=(3, 1), bias=(8,)),
        Written(axes=None, scale=(2, 3, 8), bias=(8,)),
        Written(axes=(), scale=(2, 3, 8), bias=(8,)),
        Written(axes=None, scale=(2, 3, 8), opset=17),
        Written(shape=(8,), axes=(0,)),
        Written(shape=(8,), axes=(0,), scale=None, bias=None),
        Written(square="Mul"),
        Written(square="Mul", subs=2),
        Written(square="Mul", subs=3, means=2),
        Written(subs=2),
        Written(subs=2, means=2),
        Written(divide="Reciprocal"),
        Written(divide="Reciprocal", swapped=frozenset({"d / std", "scale"})),
        Written(swapped=frozenset({"added", "scale", "bias"})),
        Written(epsilon=(1e-6, (1,))),
        Written(epsilon=(1e-3, (1, 1, 1))),
        Written(epsilon=(1e-12, ())),
        *(Written(opset=opset) for opset in (13, 14, 16, 17, 20)),
        Written(shape=("b", 3, 8), sizes=(4, 3, 8)),
        Written(shape=("b", "n", 8), sizes=(1, 5, 8)),
        Written(shape=("b", "n", 8), sizes=(0, 5, 8), opset=17),
        Written(prefix="LayerNorm/"),
        Written(prefix="end/scale"),
        Written(reader="y"),
        Written(output="y"),
        Written(dead="y"),
    ],
    ids=str,
)
def test_variants_become_one_operator(written):
    after = agree(written, 1)
    assert not {"ReduceMean", "Sqrt", "Sub", "Mul", "Add"} & set(ops(after))


@pytest.mark.parametrize(
    "written",
    [
        *(Written(reader=name) for name in BETWEEN),
        *(Written(output=name) for name in BETWEEN),
        *(Written(dead=name) for name in BETWEEN),
        Written(divide="Reciprocal", reader="inverse"),
        Written(axes=(1,), scale=(8,)),
        Written(axes=(0,)),
        Written(axes=(0, 2), scale=None, bias=None),
        Written(variance_axes=(-2,), scale=None, bias=None),
        Written(variance_axes=(-2, -1)),
        Written(shape=(8, 8), axes=(-1,), keepdims=0),
        Written(axes=None, keepdims=0, scale=None, bias=None),
        Written(axes=None, noop=1, scale=None, bias=None),
        Written(subs=2, means=2, second_axes=(-2, -1)),
        Written(subs=2, means=2, second_axes=(-2,), shape=(2, 8, 8)),
        Written(square="Mul", subs=3, means=2, second_axes=(1,), shape=(2, 8, 8)),
        Written(subs=2, means=2, second_of="other"),
        Written(square="Mul", subs=3, means=2, second_of="other"),
        Written(mean_of="other"),
        Written(exponent=3.0),
        Written(exponent=1.0, shape=(2, 3, 8)),
        Written(root="Neg"),
        Written(root="Identity"),
        Written(swapped=frozenset({"d / std"})),
        Written(epsilon=(0.0, ())),
        Written(epsilon=(1e-5, (8,))),
        Written(epsilon=(1e-5, (1, 1, 1, 1))),
        Written(epsilon=(1e-5, (3, 1))),
        Written(epsilon=(None, ())),
        Written(opset=12),
        Written(dtype="float64"),
        Written(shape=(2, 3, 0), scale=None, bias=None),
        Written(shape=(2, 3, "c"), sizes=(2, 3, 8)),
        Written(shape=("h", "w", "c"), axes=(1, 2), sizes=(2, 3, 8), scale=None),
    ],
    ids=str,
)
def test_a_near_miss_is_declined(written):
    agree(written, 0)


@pytest.mark.parametrize(("opset", "changes"), [(13, 0), (15, 0), (16, 1), (18, 1)])
def test_an_operator_that_means_another_thing_in_opset_17_keeps_the_older_one(opset, changes):
    """RoiAlign's sampling points moved by half a pixel with opset 16."""
    written = Written(opset=opset)
    proto = written.proto()
    proto.graph.input.extend([value("map", [1, 2, 6, 6]), value("rois", [3, 4])])
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.int64), "which"))
    proto.graph.node.append(node("RoiAlign", ["map", "rois", "which"], ["pooled"], sampling_ratio=2))
    proto.graph.output.append(value("pooled", [3, 2, 1, 1]))
    rng = np.random.default_rng(0)
    feeds = {"map": rng.standard_normal((1, 2, 6, 6)), "rois": np.sort(rng.uniform(0, 5, (3, 4)))}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    after = rewriting.agree(fuse_layer_norm, proto, written.feeds() | feeds, changes)
    assert [o.version for o in after.opset_import] == [max(opset, 17) if changes else opset]


def test_a_norm_that_also_gives_its_statistics_keeps_the_opset_in_which_it_does():
    proto = Written(opset=13).proto()
    numbers = [helper.make_empty_tensor_value_info(name) for name in ("m0", "v0", "m1", "v1")]
    constants = [numpy_helper.from_array(np.ones(3, np.float32), f"c{i}") for i in range(4)]
    proto.graph.initializer.extend(constants)
    names = [constant.name for constant in constants]
    proto.graph.node.append(node("BatchNormalization", ["x0", *names], ["bn", *(n.name for n in numbers)]))
    assert rewritten(proto)[1] == 0


def test_a_negative_epsilon_is_declined():
    assert rewritten(Written(epsilon=(-1e-5, ())).proto())[1] == 0


def test_the_mean_minus_x_is_the_negative_and_declined():
    agree(Written(swapped=frozenset({"x - mean"}), scale=None, bias=None), 0)


@pytest.mark.parametrize(
    ("written", "left"),
    [
        (Written(scale="input"), ["Add", "Mul"]),
        (Written(bias="input"), ["Add"]),
        (Written(scale=(3, 1)), ["Add", "Mul"]),  # not of the normalized axis
        (Written(scale=(2, 1, 1)), ["Add", "Mul"]),
        (Written(scale=(4, 1, 1, 8)), ["Add", "Mul"]),  # broadcasts the norm
        (Written(bias=(3, 8)), ["Add"]),
        (Written(scale=(1, 1, 1, 8)), ["Add", "Mul"]),
        (Written(scale=(1, 1, 1, 1)), ["Add", "Mul"]),
        (Written(reader="normed"), ["Add", "Mul"]),
        (Written(output="normed"), ["Add", "Mul"]),
        (Written(reader="scaled"), ["Add"]),
        (Written(output="scaled"), ["Add"]),
    ],
    ids=str,
)
def test_what_is_no_scale_or_bias_of_the_norm_is_left(written, left):
    after = agree(written, 1)
    assert sorted({"Mul", "Add"} & set(ops(after))) == left
    assert "ReduceMean" not in ops(after)


@pytest.mark.parametrize("more", [1, 2])
def test_several_scales_of_one_norm_become_norms_of_their_own(more):
    """For `share_norms` to join again; until then one operator each is less than three."""
    after = agree(Written(more_scales=more), 1 + more)
    assert not {"Mul", "Add", "ReduceMean"} & set(ops(after))


def test_a_dead_reader_does_not_keep_a_norm_from_the_second_round():
    """One norm is found, which drops what is dead, so that the other is found as well."""
    first, second = Written(prefix="a/").proto(), Written(prefix="b/", dead="std").proto()
    proto = onnx.compose.merge_models(first, second, io_map=[])
    after, changes = rewritten(proto)
    assert changes == 2
    assert rewritten(after)[1] == 0
    same(proto, after, Written(prefix="a/").feeds() | Written(prefix="b/").feeds())


# --- axes that are not the last ones ---

NCHW = Written(shape=(2, 8, 3, 5), axes=(1,), scale=(8, 1, 1), bias=(8, 1, 1))
TO_LAST, FROM_LAST = (0, 2, 3, 1), (0, 3, 1, 2)


def nchw(**changes):
    return dataclasses.replace(NCHW, **changes)


@pytest.mark.parametrize(
    ("written", "transposes"),
    [
        (nchw(shape=(2, 3, 5, 8), before=FROM_LAST), 1),
        (nchw(shape=(2, 3, 5, 8), before=FROM_LAST, after=(TO_LAST,)), 0),
        (nchw(shape=(2, 3, 5, 8), before=FROM_LAST, after=(TO_LAST, FROM_LAST)), 2),
        (nchw(shape=(2, 3, 5, 8), before=FROM_LAST, reader="moved"), 2),
        (nchw(shape=(2, 3, 5, 8), before=FROM_LAST, output="y", after=(TO_LAST,)), 1),
        (nchw(after=(TO_LAST,)), 1),
        (nchw(after=(TO_LAST, TO_LAST)), 1),
        (nchw(after=(TO_LAST,), axes=(-3,), opset=17), 1),
        (nchw(after=(TO_LAST,), output="back0"), 1),
        (nchw(after=(TO_LAST, TO_LAST), output="back1"), 1),
        (nchw(after=(TO_LAST,), shape=("b", 8, "h", "w"), sizes=(3, 8, 2, 4)), 1),
        (nchw(after=(TO_LAST,), scale=None, bias=None), 1),
        (nchw(after=(TO_LAST,), scale=(1, 8, 1, 1), bias=()), 1),
        (Written(shape=(3, 8, 5), axes=(1,), scale=(8, 1), bias=(8, 1), after=((0, 2, 1),)), 1),
        (Written(shape=(8, 5), axes=(0,), scale=(8, 1), bias=(8, 1), after=((),)), 1),
        (Written(shape=(8, 5), axes=(1,), before=(), scale=(8,), bias=None), 1),
        (Written(shape=(8, 3, 5), axes=(0, 1), scale=(8, 3, 1), bias=(8, 1, 1), after=((2, 0, 1),)), 1),
    ],
    ids=str,
)
def test_a_norm_over_channels_beside_their_transpose_becomes_one_over_the_last_axis(written, transposes):
    after = agree(written, 1)
    assert ops(after).count("Transpose") == transposes
    graph = to_graph(after)
    collapse_chains(graph)
    same(written.proto(), to_proto(graph), written.feeds())


@pytest.mark.parametrize(
    "written",
    [
        nchw(),
        nchw(after=(FROM_LAST,)),
        nchw(after=(TO_LAST, FROM_LAST)),
        nchw(after=(TO_LAST,), output="y"),
        nchw(after=(TO_LAST,), reader="y"),
        nchw(shape=(2, 3, 8, 5), before=(0, 2, 3, 1), axes=(1,)),
        nchw(after=(TO_LAST,), scale=(3, 5), bias=None),
        nchw(shape=(2, 8, 3, 5), axes=(1, 2), scale=None, bias=None, after=((0, 2, 3, 1),)),
    ],
    ids=str,
)
def test_a_norm_over_channels_without_their_transpose_is_declined(written):
    agree(dataclasses.replace(written, scale=None, bias=None) if written.before else written, 0)


def test_norms_over_channels_in_a_row_become_norms_over_the_last_axis():
    """The first leaves a Transpose, which the second is beside."""
    first = nchw(shape=(2, 3, 5, 8), before=FROM_LAST).proto()
    second = nchw(prefix="b/").proto()
    proto = onnx.compose.merge_models(first, second, io_map=[("end", "b/x0")])
    for n in proto.graph.node:
        if n.op_type == "Neg" and n.output[0] == "end":
            n.input[0], n.op_type = "biased", "Identity"
    graph = to_graph(proto)
    clean_up(graph)  # without the Identity between
    assert fuse_layer_norm(graph) == 2
    collapse_chains(graph)
    after = to_proto(graph)
    assert ops(after).count("Transpose") == 1
    same(proto, after, nchw(shape=(2, 3, 5, 8)).feeds())


# --- branches, others' operators, size ---


def test_a_norm_that_a_branch_reads_the_middle_of_is_left():
    proto = Written().proto()
    branches = [
        helper.make_graph([node("Neg", ["std"], [f"b{i}"])], f"g{i}", [], [value(f"b{i}", [2, 3, 1])])
        for i in range(2)
    ]
    proto.graph.node.append(node("If", ["c"], ["taken"], then_branch=branches[0], else_branch=branches[1]))
    proto.graph.input.append(value("c", [], TensorProto.BOOL))
    proto.graph.output.append(value("taken", [2, 3, 1]))
    after, changes = rewritten(proto)
    assert changes == 0
    same(proto, after, Written().feeds() | {"c": np.array(True)})


@pytest.mark.parametrize(
    ("first", "changes"), [("scaled", 1), ("biased", 1), ("std", 0), ("normed", 0), ("back0", 0)]
)
def test_nodes_in_a_branch_are_not_touched(first, changes):
    """What follows from this one on is in a branch."""
    written = nchw(after=(TO_LAST,)) if first == "back0" else Written()
    proto = written.proto()
    nodes = list(proto.graph.node)
    at = next(i for i, n in enumerate(nodes) if n.output[0] == first)
    inner, outer = nodes[at:-1], nodes[:at]
    result = inner[-1].output[0]
    info = helper.make_tensor_value_info(result, TensorProto.FLOAT, None)
    then = helper.make_graph(inner, "then", [], [info])
    other = helper.make_graph([node("Identity", ["x"], ["e"])], "else", [], [value("e", None)])
    del proto.graph.node[:]
    del proto.graph.value_info[:]
    proto.graph.node.extend(outer)
    proto.graph.node.append(node("If", ["c"], ["taken"], then_branch=then, else_branch=other))
    proto.graph.node.append(node("Neg", ["taken"], [nodes[-1].output[0]]))
    proto.graph.input.append(value("c", [], TensorProto.BOOL))
    proto = onnx.shape_inference.infer_shapes(proto)
    after, made = rewritten(proto)
    assert made == changes
    for taken in (True, False):
        same(proto, after, written.feeds() | {"c": np.array(taken)})


def test_without_shapes_it_declines():
    proto = Written(shape=None, sizes=(2, 3, 8)).proto()
    after, changes = rewritten(proto)
    assert changes == 0
    same(proto, after, Written().feeds())


@pytest.mark.parametrize("op", ["Sqrt", "ReduceMean", "Sub", "Div", "Pow"])
def test_somebody_elses_operator_of_that_name_is_left(op):
    proto = Written().proto()
    for n in proto.graph.node:
        if n.op_type == op:
            n.domain = "own"
    proto.opset_import.append(helper.make_opsetid("own", 1))
    assert rewritten(proto)[1] == 0


def test_work_is_linear_in_the_number_of_norms():
    def work(count):
        nodes, constants = [], [numpy_helper.from_array(np.full((), 1e-5, np.float32), "eps")]
        constants.append(numpy_helper.from_array(np.full((), 2, np.float32), "two"))
        constants.append(numpy_helper.from_array(np.array([-1]), "axes"))
        x = "x"
        for i in range(count):
            nodes += [
                node("ReduceMean", [x, "axes"], [f"m{i}"]),
                node("Sub", [x, f"m{i}"], [f"d{i}"]),
                node("Pow", [f"d{i}", "two"], [f"s{i}"]),
                node("ReduceMean", [f"s{i}", "axes"], [f"v{i}"]),
                node("Add", [f"v{i}", "eps"], [f"a{i}"]),
                node("Sqrt", [f"a{i}"], [f"r{i}"]),
                node("Div", [f"d{i}", f"r{i}"], [f"y{i}"]),
            ]
            x = f"y{i}"
        graph = to_graph(model(nodes, [value("x", [2, 4])], [x], constants))
        changes = []
        made = calls(lambda: changes.append(fuse_layer_norm(graph)))
        assert changes == [count]
        return made

    # Ten times as many; the square would be a hundred.
    assert work(200) < 15 * work(20)


# --- random norms ---


@st.composite
def written_norms(draw):
    last = draw(st.booleans())
    rank = draw(st.integers(1 if last else 2, 4))
    shape = draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank))
    axes = list(range(rank))[-draw(st.integers(1, rank)) :]
    if not last:
        axes = draw(st.lists(st.integers(0, rank - 2), min_size=1, unique=True))
    to_last = (*(a for a in range(rank) if a not in axes), *sorted(axes))
    from_last = tuple(np.argsort(to_last).tolist())
    before = draw(st.sampled_from((None, from_last, to_last)))
    after = draw(st.sampled_from(((), (to_last,), (from_last,), (to_last, from_last), (to_last, to_last))))
    whole = [shape[a] if a in axes else 1 for a in range(rank)]

    def affine():
        kind = draw(st.sampled_from(("whole", "whole", "short", "none", "one", "other")))
        if kind == "other":
            return tuple(draw(st.sampled_from((1, size))) for size in shape)
        return {"whole": tuple(whole), "short": tuple(whole[min(axes) :]), "none": None, "one": (1,)}[kind]

    kinds = st.sampled_from(("",) * 24 + ("y", "normed") * 3 + BETWEEN)
    square = draw(st.sampled_from(("Pow", "Mul")))
    return Written(
        shape=tuple(shape[before.index(i)] for i in range(rank)) if before else tuple(shape),
        axes=tuple(draw(st.permutations([draw(st.sampled_from((a, a - rank))) for a in axes]))),
        scale=affine(),
        bias=affine(),
        epsilon=(draw(st.sampled_from((1e-5, 1e-6, 1e-3))), draw(st.sampled_from(((), (1,))))),
        square=square,
        exponent=draw(st.sampled_from((2.0,) * 7 + (4.0,))),
        divide=draw(st.sampled_from(("Div", "Reciprocal"))),
        subs=draw(st.integers(1, 3 if square == "Mul" else 2)),
        means=draw(st.integers(1, 2)),
        swapped=frozenset(draw(st.sets(st.sampled_from(("added", "scale", "bias"))))),
        before=before,
        after=after,
        reader=draw(kinds),
        output=draw(kinds),
        dead=draw(kinds),
        opset=draw(st.sampled_from((17, 18, 20))),
        prefix=draw(st.sampled_from(("", "x/", "norm/scale"))),
        shuffle=draw(st.integers(0, 3)),
    )


def is_norm(written):
    """Whether it is one to be replaced, from how it was put together."""
    rank = len(written.shape)
    axes = sorted(a % rank for a in written.axes)
    to_last = (*(a for a in range(rank) if a not in axes), *axes)
    last = to_last == tuple(range(rank))
    if written.square == "Pow" and written.exponent != 2:
        return False
    if {written.reader, written.output, written.dead} & set(BETWEEN):
        return False
    if last or written.before == tuple(np.argsort(to_last).tolist()):
        return True
    alone = all(perm == to_last for perm in written.after)
    return bool(written.after) and alone and absorbed(written, axes)


def absorbed(written, axes):
    """Whether scale and bias are all the norm's, and nothing else reads on the way to what moves it."""
    shape = written.shape
    if written.before:
        shape = [shape[i] for i in written.before]
    for kind in (written.scale, written.bias):
        full = (1,) * (len(shape) - len(kind)) + tuple(kind) if kind is not None else ()
        if any(size != 1 for a, size in enumerate(full) if a not in axes):
            return False
    read = {written.reader, written.output, written.dead}
    return "y" not in read and "normed" not in read


@settings(RANDOM, max_examples=250)
@given(written_norms())
def test_random_norms_give_the_same_outputs(written):
    if written.scale == written.bias is None and "normed" in (written.output,):
        written = dataclasses.replace(written, output="")
    if written.output == "y" and written.scale == written.bias is None:
        written = dataclasses.replace(written, output="")
    agree(written, int(is_norm(written)))


@settings(RANDOM, max_examples=40)
@given(written_norms(), st.integers(1, 99))
def test_order_and_names_do_not_matter(written, seed):
    one, first = rewritten(written.proto())
    two, second = rewritten(dataclasses.replace(written, shuffle=seed, prefix="t/mean").proto())
    assert first == second
    assert sorted(ops(one)) == sorted(ops(two))


# --- norms of PyTorch models ---


class Norm2d(nn.Module):
    """Over the channels of a map, as segment-anything and ConvNeXt have it."""

    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(dim)), nn.Parameter(torch.randn(dim))

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Stem(nn.Module):
    """A convolution, the norm over its channels, a linear layer over them."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 4, 4), Norm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).permute(0, 2, 3, 1))


class ByHand(nn.Module):
    """Over the last axis, with the inverse root."""

    def __init__(self):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        d = x - x.mean(-1, keepdim=True)
        return d * torch.rsqrt((d * d).mean(-1, keepdim=True) + 1e-5) * self.scale + self.bias


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("make", "shape"), [(Stem, (2, 3, 16, 24)), (ByHand, (2, 7, 8))])
def test_norms_that_pytorch_writes_out_are_found(make, shape, dynamic):
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(shape)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (x,),
            dynamo=True,
            optimize=False,
            opset_version=20,
            input_names=["x"],
            dynamic_shapes=({0: torch.export.Dim("b", min=1)},) if dynamic else None,
            verbose=False,
        )
        expected = module(x).numpy()
    graph = to_graph(program.model_proto)
    clean_up(graph)
    assert fuse_layer_norm(graph) == 1
    after = to_proto(graph)
    assert ops(after).count("LayerNormalization") == 1
    assert not {"ReduceMean", "Sqrt"} & set(ops(after))
    (actual,) = run(after, x=x.numpy()).values()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
