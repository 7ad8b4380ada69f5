"""flatten_concats: the same outputs, put together at once, with no Transpose more; near-misses left."""

import functools
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.graph.passes.collapse_chains import collapse_chains
from meta_deploy.graph.passes.flatten_concats import flatten_concats
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, feeds, node, ops, same
from tests.small_graphs import model, value

X, CONSTANT = ("x",), ("constant",)


class Tree:
    """A model whose output is put together as a spec says, to a tensor of a given shape.

    A spec is one of
        ("x",), an input; ("constant",); ("Relu", spec);
        ("cat", axis, specs), parts as equal as can be; ("cat", axis, spec, times), one part several times;
        ("move", perm, spec), a Transpose; ("flat", spec), a Reshape of something flat;
        ("read", spec) or ("output", spec), which has another reader or is an output too.
    """

    def __init__(self, spec, shape, dynamic=None, prefix=""):
        self.nodes, self.inputs, self.initializers, self.outputs = [], [], [], []
        self.prefix, self.numbers, self.dynamic = prefix, itertools.count(), dynamic
        self.offset = 0
        y = self.build(spec, list(shape))
        self.nodes.append(node("Identity", [y], [self.prefix + "y"]))
        outputs = [*self.outputs, self.prefix + "y"]
        for i, name in enumerate(outputs):
            outputs[i] = helper.make_empty_tensor_value_info(name)
            outputs[i].type.tensor_type.elem_type = TensorProto.FLOAT
        self.proto = model(self.nodes, self.inputs, outputs, self.initializers)

    def add(self, op, inputs, **attrs):
        out = f"{self.prefix}{next(self.numbers)}"
        self.nodes.append(node(op, inputs, [out], **attrs))
        return out

    def constant(self, array):
        name = f"{self.prefix}c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def build(self, spec, shape):
        op, *args = spec
        if op == "x":
            name = f"{self.prefix}x{len(self.inputs)}"
            sizes = ["n" if size == self.dynamic else size for size in shape]
            self.inputs.append(value(name, sizes))
            return name
        if op == "constant":
            return self.constant(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
        if op == "cat":
            axis, parts = args[:2]
            size, count = shape[axis], len(parts) if len(args) == 2 else args[2]
            sizes = [size // count + (i < size % count) for i in range(count)]
            shapes = [[n if i == axis % len(shape) else s for i, s in enumerate(shape)] for n in sizes]
            if len(args) == 2:
                names = [self.build(part, part_shape) for part, part_shape in zip(parts, shapes, strict=True)]
            else:
                assert size % count == 0
                names = [self.build(parts, shapes[0])] * count
            return self.add("Concat", names, axis=axis)
        if op == "move":
            perm, inner = args
            before = [shape[perm.index(i)] for i in range(len(perm))]
            reverse = list(perm) == list(range(len(perm)))[::-1]  # which is the default
            return self.add("Transpose", [self.build(inner, before)], **({} if reverse else {"perm": perm}))
        if op == "flat":
            inner = self.build(args[0], [int(np.prod(shape))])
            return self.add("Reshape", [inner, self.constant(np.array(shape))])
        inner = self.build(args[0], shape)
        if op == "Relu":
            return self.add(op, [inner])
        if args[0] in (X, CONSTANT):
            inner = self.add("Relu", [inner])
        self.outputs.append(self.add("Neg", [inner]) if op == "read" else inner)
        return inner


rewritten = functools.partial(rewriting.rewritten, flatten_concats)


def collapsed(proto):
    return rewriting.rewritten(collapse_chains, proto)[0]


def agree(proto, changes=None):
    """As `rewriting.agree`; with fewer Concats, and no more Transposes once chains are collapsed."""
    after = rewriting.agree(flatten_concats, proto, None, changes, tolerance=0)
    made = ops(proto).count("Concat") - ops(after).count("Concat")
    assert changes in (None, made)
    before, moved = collapsed(proto), collapsed(after)
    same(proto, moved, tolerance=0)
    assert ops(moved).count("Transpose") <= ops(before).count("Transpose")
    return after


def left(spec, shape, **others):
    agree(Tree(spec, shape, **others).proto, 0)


def parts(proto):
    """How many parts each Concat has."""
    return sorted(len(n.input) for n in proto.graph.node if n.op_type == "Concat")


FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)
TOKENS = ("move", LAST, ("Relu", X))  # a map that was made channels first

# --- what is flattened ---


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("inner", [0, 1, 2, -1, -2, -3])
def test_only_along_one_axis(axis, inner):
    spec = ("cat", axis, (X, ("cat", inner, (X, X)), X))
    after = agree(Tree(spec, (6, 6, 6)).proto, int(axis % 3 == inner % 3))
    assert parts(after) == ([4] if axis % 3 == inner % 3 else [2, 3])


def test_the_parts_stay_in_order():
    inner = ("cat", 1, (X, ("cat", 1, (X, X, X)), X))
    after = agree(Tree(("cat", 1, (inner, X, inner)), (2, 30)).proto, 4)
    assert parts(after) == [11]


@pytest.mark.parametrize("perm", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("negative", [0, 3])
def test_a_transpose_says_along_which_axis(perm, negative):
    """The parts' own Transposes and those in place of the one between do nothing together."""
    back = tuple(perm.index(i) for i in range(3))
    for axis, inner in itertools.product(range(3), repeat=2):
        cat = ("cat", inner, (("move", back, ("Relu", X)),) * 2)
        proto = Tree(("cat", axis - negative, (X, ("move", perm, cat), X)), (6, 6, 6)).proto
        after = collapsed(agree(proto, int(perm[axis] == inner)))
        if perm[axis] == inner:
            assert Counter(ops(after)) == {"Relu": 2, "Concat": 1, "Identity": 1}


def test_one_part_may_be_transposed_anew():
    cat = ("cat", 3, (TOKENS, ("Relu", X), TOKENS))
    after = collapsed(agree(Tree(("cat", 1, (X, ("move", FIRST, cat))), (2, 8, 3, 5)).proto, 1))
    assert Counter(ops(after)) == {"Relu": 3, "Transpose": 1, "Concat": 1, "Identity": 1}


@pytest.mark.parametrize("transposed", [0, 1, 2])
def test_a_transpose_before_a_reshape_counts(transposed):
    """As where the windows of attention are put together again."""
    shape = numpy_helper.from_array(np.array([2, 6, 4]), "shape")
    nodes = []
    for i in range(3):
        perm = [0, 2, 1, 3] if i <= transposed else [0, 1, 2, 3]
        nodes.append(node("Transpose", [f"x{i}"], [f"t{i}"], perm=perm))
        nodes.append(node("Reshape", [f"t{i}", "shape"], [f"r{i}"]))
    nodes += [
        node("Concat", ["r0", "r1", "r2"], ["cat"], axis=2),
        node("Transpose", ["cat"], ["t"], perm=[0, 2, 1]),
        node("Concat", ["z", "t"], ["y"], axis=1),
    ]
    inputs = [*(value(f"x{i}", [2, 3 - (i > transposed), 2 + (i > transposed), 4]) for i in range(3))]
    proto = model(nodes, [*inputs, value("z", [2, 1, 6])], initializers=[shape])
    after = collapsed(agree(proto, int(transposed > 0)))
    assert ops(after).count("Transpose") == (3 if transposed else 2)


def test_concats_between_transposes_open_from_the_inside():
    """The outer one could not be opened before the inner one was."""
    inner = ("cat", 3, (TOKENS, TOKENS))
    spec = ("cat", 1, (X, ("move", FIRST, ("cat", 3, (X, inner, TOKENS)))))
    after = agree(Tree(spec, (2, 20, 3, 5)).proto, 2)
    assert parts(after) == [5]


def test_deep_ones_become_one():
    spec = ("cat", 3, (TOKENS, TOKENS))
    for move, axis in ((FIRST, 1), (LAST, 3), (FIRST, 1)):
        spec = ("cat", axis, (("move", move, spec), ("Relu", X)))
    after = agree(Tree(spec, (2, 16, 3, 5)).proto)
    assert parts(after)[-1] > 2


def test_one_part_several_times():
    assert parts(agree(Tree(("cat", 0, (X, ("cat", 0, X, 3))), (12, 2)).proto, 1)) == [4]


def test_constants_are_parts():
    inner = ("cat", 1, (CONSTANT, X, CONSTANT))
    assert parts(agree(Tree(("cat", 1, (inner, CONSTANT)), (2, 9)).proto, 1)) == [4]


def test_sizes_need_not_be_known_where_nothing_moves():
    after = agree(Tree(("cat", 1, (X, ("cat", -1, (X, X)))), (7, 6), dynamic=7).proto, 1)
    assert parts(after) == [3]


def test_dead_nodes_read_nothing():
    proto = Tree(("cat", 1, (X, ("cat", 1, (X, X)))), (2, 6)).proto
    proto.graph.node.append(node("Neg", [proto.graph.node[0].output[0]], ["dead"]))
    after, changes = rewritten(proto)
    assert changes == 1
    same(proto, after)


# --- near-misses ---


@pytest.mark.parametrize("who", ["read", "output"])
def test_what_others_read_is_left(who):
    left(("cat", 1, (X, (who, ("cat", 1, (X, X))))), (2, 6))
    left(("cat", 1, (X, (who, ("move", FIRST, ("cat", 3, (TOKENS, TOKENS)))))), (2, 8, 3, 5))
    left(("cat", 1, (X, ("move", FIRST, (who, ("cat", 3, (TOKENS, TOKENS)))))), (2, 8, 3, 5))
    left(("cat", 1, ("cat", 1, (X, X)), 2), (2, 8))
    left(("cat", 1, ("move", FIRST, ("cat", 3, (TOKENS, TOKENS))), 2), (2, 8, 3, 5))


@pytest.mark.parametrize(
    "parts",
    [
        (X, X),
        (("Relu", X), ("move", (0, 3, 2, 1), ("Relu", X)), ("Relu", X)),
        (("read", TOKENS), ("output", TOKENS)),
        (("move", FIRST, TOKENS),) * 2,  # which do nothing
        (("move", (0, 1, 2, 3), X),) * 2,
        (("flat", X),) * 2,
    ],
)
def test_parts_that_would_each_be_transposed_are_left(parts):
    left(("cat", 1, (X, ("move", FIRST, ("cat", 3, parts)))), (2, 12, 3, 5))


def test_one_transposed_part_several_times_is_left():
    left(("cat", 1, (X, ("move", FIRST, ("cat", 3, TOKENS, 2)))), (2, 8, 3, 5))


def test_two_transposes_between_are_left():
    left(("cat", 1, (X, ("move", FIRST, ("move", LAST, ("cat", 1, (TOKENS, TOKENS)))))), (2, 8, 3, 5))


@pytest.mark.parametrize("between", ["Relu", "flat"])
def test_something_between_is_left(between):
    axis = 0 if between == "flat" else 1
    left(("cat", 1, (X, (between, ("cat", axis, (X, X))))), (1, 8))


def test_a_batch_of_any_size_moves_as_one_of_a_known_size():
    agree(Tree(("cat", 1, (X, ("move", FIRST, ("cat", 3, (TOKENS, TOKENS))))), (7, 8, 3, 5), 7).proto, 1)


@pytest.mark.parametrize("size", [3, 5])
def test_sizes_that_are_not_known_are_left_where_parts_move(size):
    for moved in ((TOKENS, TOKENS), (X,)):
        left(("cat", 1, (X, ("move", FIRST, ("cat", 3, moved)))), (2, 8, 3, 5), dynamic=size)


def test_no_elements_are_not_moved_apart():
    left(("cat", 1, (X, ("move", FIRST, ("cat", 3, (TOKENS, TOKENS))))), (0, 8, 3, 5))


def test_a_shape_that_is_not_known_is_left():
    proto = Tree(("cat", 1, (X, ("cat", 1, (X, X)))), (2, 6)).proto
    values = feeds(proto)
    for v in (*proto.graph.input, *proto.graph.output):
        v.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    after, changes = rewritten(proto)
    assert changes == 0
    same(proto, after, values)


def test_somebody_elses_operators_are_left():
    for op in range(3):
        proto = Tree(("cat", 1, (X, ("move", FIRST, ("cat", 3, (X, ("Relu", X)))))), (2, 8, 3, 5)).proto
        concats = [n for n in proto.graph.node if n.op_type in ("Concat", "Transpose")]
        concats[op].domain = "own"
        proto.opset_import.append(helper.make_opsetid("own", 1))
        assert rewritten(proto)[1] == 0


def test_what_a_branch_of_an_if_reads_is_left():
    for position in (0, 1):
        spec = ("cat", 1, (X, ("move", FIRST, ("cat", 3, (TOKENS, TOKENS)))))
        proto = Tree(spec, (2, 8, 3, 5)).proto
        read = [n.output[0] for n in proto.graph.node if n.op_type in ("Concat", "Transpose")][-3:][position]
        branches = [
            helper.make_graph([node(op, [read], [op])], op, [], [helper.make_empty_tensor_value_info(op)])
            for op in ("Neg", "Abs")
        ]
        for branch in branches:
            branch.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
        proto.graph.node.append(node("If", ["c"], ["z"], then_branch=branches[0], else_branch=branches[1]))
        proto.graph.input.append(value("c", [], TensorProto.BOOL))
        proto.graph.output.append(value("z"))
        proto.graph.output[-1].type.tensor_type.ClearField("shape")
        after, changes = rewritten(proto)
        assert changes == 0
        values = feeds(proto)
        for c in (True, False):
            same(proto, after, {**values, "c": np.array(c)})


def test_concats_in_a_branch_of_an_if_are_left():
    """One outside cannot go inside: it is made where the branch is not taken, too."""
    nodes = [node("Concat", ["x", "x"], ["h"], axis=0)]
    bodies = [[node("Concat", ["h", "x"], ["t"], axis=0)], [node("Concat", ["x", "x", "x"], ["e"], axis=0)]]
    branches = [
        helper.make_graph(body, body[0].output[0], [], [value(body[0].output[0], [6])]) for body in bodies
    ]
    nodes.append(node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1]))
    proto = model(nodes, [value("x", [2]), value("c", [], TensorProto.BOOL)])
    after, changes = rewritten(proto)
    assert changes == 0
    for c in (True, False):
        same(proto, after, {"x": np.float32([1, 2]), "c": np.array(c)})


# --- random trees ---


@st.composite
def specs(draw, shape, depth=3, most=("cat",) * 8):
    """What makes a tensor of this shape; mostly Concats along one axis with Transposes between."""
    kinds = ["x", "Relu", "move", "flat", "constant"]
    kind = draw(st.sampled_from([*kinds, *most] if depth > 0 else kinds))
    if kind == "cat" and max(shape, default=0) > 1:
        perm = draw(st.sampled_from((None, None, tuple(draw(st.permutations(range(len(shape))))))))
        before = shape if perm is None else [shape[perm.index(i)] for i in range(len(perm))]
        spec = wrapped(draw, draw(concats(before, depth, most if perm is None else ("move",) * 15)))
        return spec if perm is None else wrapped(draw, ("move", perm, spec))
    if kind == "move":
        perm = tuple(draw(st.permutations(range(len(shape)))))
        before = [shape[perm.index(i)] for i in range(len(perm))]
        return wrapped(draw, ("move", perm, draw(specs(before, depth - 1))))
    if kind == "Relu":
        return (kind, X)
    if kind == "flat":
        return wrapped(draw, (kind, draw(specs([int(np.prod(shape))], 0))))
    return wrapped(draw, CONSTANT if kind == "constant" else X)


@st.composite
def concats(draw, shape, depth, most):
    axes = [i for i, size in enumerate(shape) if size > 1]
    longest = max(axes, key=lambda i: shape[i])
    axis = draw(st.sampled_from((*[longest] * 3 * len(axes), *axes)))
    size = shape[axis]
    count = draw(st.integers(1, min(size, 3)))
    negative = draw(st.sampled_from((0, len(shape))))
    if size % count == 0 and draw(st.sampled_from((0, 0, 0, 1))):
        part = [size // count if i == axis else s for i, s in enumerate(shape)]
        return ("cat", axis - negative, draw(specs(part, depth - 1, most)), count)
    sizes = [size // count + (i < size % count) for i in range(count)]
    cut = [[n if i == axis else s for i, s in enumerate(shape)] for n in sizes]
    return ("cat", axis - negative, tuple(draw(specs(part, depth - 1, most)) for part in cut))


def wrapped(draw, spec):
    """Sometimes with another reader."""
    return (
        (draw(st.sampled_from(("read", "output"))), spec) if draw(st.sampled_from([0] * 15 + [1])) else spec
    )


def nested(proto):
    """Concats that another one alone reads, and along the same axis: there is no reason for them."""
    shapes = {
        v.name: len(v.type.tensor_type.shape.dim) for v in (*proto.graph.value_info, *proto.graph.output)
    }
    readers = Counter(name for n in proto.graph.node for name in n.input)
    readers.update(output.name for output in proto.graph.output)
    axes = {
        n.output[0]: n.attribute[0].i % shapes[n.output[0]] for n in proto.graph.node if n.op_type == "Concat"
    }
    return [
        name
        for n in proto.graph.node
        if n.op_type == "Concat"
        for name in n.input
        if name in axes and axes[name] == axes[n.output[0]] and readers[name] == 1
    ]


SHAPES = st.sampled_from(([2, 1, 12], [12, 3], [4, 12, 1, 2], [1, 16, 2], [2, 3, 8]))
TREES = SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), specs(shape)))


@settings(RANDOM, max_examples=150)
@given(TREES)
def test_random_trees_give_the_same(tree):
    shape, spec = tree
    assert not nested(agree(Tree(spec, shape).proto))


@settings(RANDOM, max_examples=60)
@given(TREES, st.integers(1, 1000), st.sampled_from(("", "0/", "x0/part", "y")))
def test_names_and_order_do_not_matter(tree, shuffle, prefix):
    shape, spec = tree
    expected, changes = rewritten(Tree(spec, shape).proto)
    proto = Tree(spec, shape, prefix=prefix).proto
    actual, made = rewritten(proto, shuffle=shuffle)
    assert (made, Counter(ops(actual)), parts(actual)) == (changes, Counter(ops(expected)), parts(expected))
    same(proto, actual)
