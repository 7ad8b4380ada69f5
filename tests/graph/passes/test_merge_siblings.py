"""merge_siblings: linear maps of one tensor are one, with the same outputs for less; near-misses stay."""

import dataclasses
import functools
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from meta_deploy.export.trace import quiet
from meta_deploy.graph.passes.merge_siblings import merge_siblings
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.graph.prices import CPU, GPU, Cost
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, TYPES, Writer, feeds, form, loop, node, ops, price, same, sizes_of
from tests.small_graphs import model, run, value, without_size

NODES = Cost(node=1, value=0)  # only the number of nodes counts
VALUES = Cost(node=0, value=1)  # only what is read and written
FREE = Cost(node=0, value=0)
LINEAR = ("Conv", "MatMul", "Gemm")


@dataclasses.dataclass(frozen=True)
class Map:
    """A linear map of x, to vary.

    `bias` is "none", its "own", in an "add", or there "first"; or the shape of its own. `weight` is
    "constant", the one that is "shared", an "input", has "three" axes, is the "left" operand, or is "x".
    """

    op: str = "MatMul"
    out: int = 2
    bias: object = "none"
    weight: str = "constant"
    k: tuple = (1, 1)
    group: int = 1
    attrs: dict = dataclasses.field(default_factory=dict)
    after: tuple = ()  # moves behind it: a permutation as a tuple, or a shape as a list
    end: str = "Identity"  # what reads it; "" if it is an output itself


@dataclasses.dataclass(frozen=True)
class Case:
    """Maps of one tensor, to vary. The maps make y0, y1, ...; products before their bias end in "p"."""

    maps: tuple = (Map(), Map(out=3), Map(bias="add"))
    shape: tuple = (2, 3, 20)
    source: str = "Relu"  # what makes x; "" if it is an input
    others: tuple = ()  # operators that read x too, twice
    reader: str = ""  # this tensor has another reader
    output: str = ""  # is an output as well
    branch: str = ""  # is read inside of an If as well
    dtype: str = "float32"
    opset: int = 18
    order: tuple = ()  # the order of the maps as nodes
    prefix: str = ""

    def n(self, name):
        return self.prefix + name

    def proto(self):
        return Builder(self).proto()


class Builder(Writer):
    """Writes the model of a case."""

    def proto(self):
        case, x = self.case, self.n("x")
        start = self.n("start") if case.source else x
        self.input("start" if case.source else "x", case.shape)
        if case.source:
            self.nodes.append(node(case.source, [start], [x]))
        ends, parts = [], []
        for i, linear in enumerate(case.maps):
            first = len(self.nodes)
            ends.append(self.map(linear, x, f"y{i}"))
            parts.append(self.nodes[first:])
            del self.nodes[first:]
        for i in case.order or range(len(parts)):
            self.nodes += parts[i]
        for i, op in enumerate(case.others):
            self.nodes.append(node(op, [x, x], [self.n(f"other{i}")]))
            ends.append(self.n(f"other{i}"))
        others = [self.n(name) if name else "" for name in (case.reader, case.output, case.branch)]
        return self.model(ends, *others)

    def map(self, linear, x, y):
        apart = linear.bias in ("add", "first")
        attrs = {**linear.attrs, **({"group": linear.group} if linear.group > 1 else {})}
        inputs = [x, self.weight(linear, x, y)]
        if linear.weight == "left":
            inputs.reverse()
        if linear.bias == "own":
            inputs.append(self.numbers(f"{y}b", [linear.out]))
        elif not isinstance(linear.bias, str):
            inputs.append(self.numbers(f"{y}b", linear.bias))
        self.nodes.append(node(linear.op, inputs, [self.n(f"{y}p" if apart else y)], **attrs))
        if apart:
            bias = [linear.out, *([1] * (len(self.case.shape) - 2) if linear.op == "Conv" else [])]
            operands = [self.n(f"{y}p"), self.numbers(f"{y}b", bias)]
            self.nodes.append(node("Add", operands[:: -1 if linear.bias == "first" else 1], [self.n(y)]))
        end = self.n(y)
        for i, move in enumerate(linear.after):
            out = self.n(f"{y}m{i}")
            if isinstance(move, tuple):
                self.nodes.append(node("Transpose", [end], [out], perm=move))
            else:
                self.nodes.append(node("Reshape", [end, self.constant(f"{out}s", move, np.int64)], [out]))
            end = out
        if linear.end:
            self.nodes.append(node(linear.end, [end], [self.n(f"{y}end")]))
            end = self.n(f"{y}end")
        return end

    def weight(self, linear, x, y):
        if linear.op == "Conv":
            shape = [linear.out, self.case.shape[1] // linear.group, *linear.k]
        else:
            shape = [self.case.shape[-1], linear.out]
            if linear.attrs.get("transB"):
                shape.reverse()
        if linear.weight == "left":
            shape = [linear.out, self.case.shape[-2]]
        if linear.weight == "x":
            return x
        if linear.weight == "input":
            return self.input(f"{y}w", shape)
        return self.numbers(
            f"{y}w" if linear.weight != "shared" else "w", [1] * (linear.weight == "three") + shape
        )


def unshaped(name, kind):
    out = value(name, None, kind)
    out.type.tensor_type.ClearField("shape")
    return out


# --- what is asserted ---


merged = functools.partial(rewriting.rewritten, merge_siblings)


def agree(proto, cost=GPU, changes=None, joined=0):
    """As `rewriting.agree`, with so many linear maps fewer and for less; `joined` moves are saved later."""
    after = rewriting.agree(merge_siblings, proto, None, changes, cost)
    made = linears(proto) - linears(after)
    assert changes in (None, made)
    if made:
        assert price(after, cost) < price(proto, cost) + joined * cost.node
    return after


def linears(proto):
    return sum(op in LINEAR for op in ops(proto))


def parts(proto):
    """How many parts each Split has."""
    return sorted(len(n.output) for n in proto.graph.node if n.op_type == "Split")


# --- what is merged ---

BIASES = {"MatMul": ("none", "add", "first"), "Conv": ("none", "own", "add", "first")}
BIASES["Gemm"] = BIASES["Conv"]
SHAPES = {"MatMul": (2, 3, 20), "Gemm": (5, 20), "Conv": (1, 20, 4, 5)}


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("source", ["", "Relu"])
@pytest.mark.parametrize(("op", "bias"), [(op, bias) for op in LINEAR for bias in BIASES[op]])
def test_maps_of_one_tensor_become_one(op, bias, source, count):
    maps = tuple(Map(op, i + 1, bias) for i in range(count))
    after = agree(Case(maps, SHAPES[op], source).proto(), GPU, count - 1)
    assert linears(after) == 1
    assert parts(after) == [count]
    assert ops(after).count("Add") == (op == "MatMul" and bias != "none")


@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("mask", range(1, 7))
def test_some_have_a_bias_and_some_have_none(op, mask):
    maps = tuple(Map(op, i + 1, BIASES[op][-1 - i % 2] if mask >> i & 1 else "none") for i in range(3))
    after = agree(Case(maps, SHAPES[op]).proto(), NODES)
    assert parts(after) == [3]
    assert ops(after).count("Add") == (op == "MatMul")
    agree(Case(maps, SHAPES[op]).proto(), GPU)


@pytest.mark.parametrize("shape", [(20,), (3, 20), (2, 3, 20), (1, 2, 2, 20)])
def test_products_of_any_rank(shape):
    agree(Case(shape=shape).proto(), GPU, 2)


@pytest.mark.parametrize(
    ("shape", "k", "attrs"),
    [
        ((1, 20, 7), (3,), {"strides": [2]}),
        ((2, 20, 3, 4, 2), (1, 2, 1), {"pads": [0, 0, 1, 0, 1, 0]}),
        ((1, 20, 5, 4), (3, 2), {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}),
        ((1, 20, 5, 4), (3, 2), {"auto_pad": "SAME_LOWER"}),
    ],
)
def test_convolutions_of_any_geometry(shape, k, attrs):
    maps = tuple(Map("Conv", i, bias, k=k, attrs=attrs) for i, bias in ((1, "own"), (2, "none"), (3, "add")))
    after = agree(Case(maps, shape).proto(), GPU, 2)
    assert parts(after) == [3]


@pytest.mark.parametrize("bias", [[], [1], [3], [1, 1], [1, 3]], ids=str)
@pytest.mark.parametrize("second", [0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_gemm_has_its_weights_either_way(first, second, bias):
    sides = ({"transB": first}, {"transB": second}, {})
    maps = tuple(Map("Gemm", 3, bias, attrs=attrs) for attrs in sides)
    agree(Case(maps, (5, 20)).proto(), GPU, 2)


def test_different_maps_are_merged_each_with_its_like():
    maps = tuple(
        Map("Conv", out, "own", k=(k, k), attrs={"pads": [k // 2] * 4, "strides": [s, s]})
        for out, k, s in ((1, 1, 1), (2, 3, 1), (3, 1, 1), (4, 3, 2), (5, 3, 2), (2, 3, 1), (1, 1, 2))
    )
    after = agree(Case(maps, (1, 60, 4, 6)).proto(), GPU, 3)
    assert parts(after) == [2, 2, 2]
    assert ops(after).count("Conv") == 4


def test_products_and_others_are_not_merged():
    maps = (Map(), Map("Gemm"), Map(), Map("Gemm", bias="own"))
    after = agree(Case(maps, (5, 20)).proto(), GPU, 2)
    assert ops(after).count("MatMul") == ops(after).count("Gemm") == 1


def test_maps_of_merged_maps_are_merged():
    """By the same run."""
    rng, names = np.random.default_rng(0), ("a", "b", "aa", "ab", "ba", "bb")
    weights = [
        numpy_helper.from_array(rng.standard_normal((20, 20)).astype(np.float32), f"w{n}") for n in names
    ]
    nodes = [node("MatMul", [n[:-1] or "x", f"w{n}"], [n]) for n in names]
    cost = Cost(node=1000, value=0)
    assert merged(model(nodes, [value("x", [2, 20])], names[2:], weights), cost)[1] == 0
    nodes += [node("Transpose", [n], [f"{n}t"]) for n in names]
    outputs = [f"{n}t" for n in names]
    after = agree(model(nodes, [value("x", [2, 20])], outputs, weights), cost, 2, joined=2)
    assert parts(after) == [2, 2]


# --- prices ---


@pytest.mark.parametrize(("op", "bias"), [(op, bias) for op in LINEAR for bias in BIASES[op]])
def test_where_values_are_dear_the_input_has_to_be_the_larger(op, bias):
    """Than what the Split copies; for two maps that is twice what they put out."""
    shape = list(SHAPES[op])
    for channels, changes in ((21, 1), (20, 0)):
        shape[1 if op == "Conv" else -1] = channels
        maps = (Map(op, 4, bias), Map(op, 6, bias))
        saved = 20 if bias in ("add", "first") and op != "MatMul" else 0  # their bias is for free then
        agree(Case(maps, tuple(shape)).proto(), VALUES, changes or int(saved > 0))


@pytest.mark.parametrize(("bias", "least"), [("none", 40), ("add", 40 + 12)])
def test_a_bias_that_one_alone_has_is_added_to_all(bias, least):
    """Of which the others pay their share: 2 * 6 values are read and written more."""
    maps = (Map(out=14, bias=bias), Map(out=6))
    for channels, changes in ((least + 1, 1), (least, 0)):
        agree(Case(maps, (3, channels)).proto(), VALUES, changes)


def test_where_nodes_are_dear_more_than_two_have_to_be_there():
    for count, changes in ((2, 0), (3, 2), (4, 3)):
        agree(Case((Map(),) * count).proto(), NODES, changes)


def test_nothing_is_done_for_nothing():
    agree(Case().proto(), FREE, 0)


def test_large_outputs_are_not_copied():
    maps = (Map("Conv", 30), Map("Conv", 30))
    for cost in (CPU, GPU, VALUES):
        agree(Case(maps, (1, 20, 64, 64)).proto(), cost, 0)
    maps = (Map("Conv", 4), Map("Conv", 5))
    for cost in (CPU, GPU, VALUES):
        agree(Case(maps, (1, 20, 64, 64)).proto(), cost, 1)


def test_moves_that_follow_count_as_joined():
    heads = ([2, 3, 2, 2], (0, 2, 1, 3))
    maps = (Map(out=4, after=heads), Map(out=4, after=heads))
    agree(Case(maps).proto(), NODES, 1, joined=2)
    agree(Case((Map(out=4, after=heads), Map(out=4))).proto(), NODES, 0)


def test_moves_in_a_branch_do_not_count():
    proto = Case((Map(end=""), Map(end="")), (3, 20)).proto()
    sides = [
        helper.make_graph([node("Transpose", [f"y{i}"], [f"t{i}"])], f"side{i}", [], [value(f"t{i}", [2, 3])])
        for i in range(2)
    ]
    del proto.graph.output[:]
    proto.graph.node.append(node("If", ["c"], ["z"], then_branch=sides[0], else_branch=sides[1]))
    proto.graph.input.append(value("c", [], TensorProto.BOOL))
    proto.graph.output.append(value("z", [2, 3]))
    proto = onnx.shape_inference.infer_shapes(proto)
    agree(proto, NODES, 0)
    for taken in (True, False):
        after, changes = merged(proto, VALUES)
        assert changes == 1
        same(proto, after, {**feeds(proto), "c": np.array(taken)})


# --- who else reads ---


@pytest.mark.parametrize("kind", ["reader", "output", "branch"])
@pytest.mark.parametrize("name", ["x", "y0", "y2", "y2p"])
@pytest.mark.parametrize("end", ["", "Identity"])
def test_what_others_read_keeps_its_name(kind, name, end):
    maps = (Map(end=end), Map(out=3), Map(bias="add", end=end))
    agree(Case(maps, **{kind: name}).proto(), GPU, 2)


@pytest.mark.parametrize("source", ["", "Relu"])
def test_other_readers_of_the_input_stay(source):
    case = Case((Map(), Map(out=4), Map(weight="x"), Map(out=3)), (2, 20, 20), source, ("Mul", "MatMul"))
    after = agree(case.proto(), GPU, 2)
    assert ops(after).count("MatMul") == 3


def test_what_no_output_needs_is_no_sibling():
    proto = Case((Map(), Map())).proto()
    proto.graph.node.append(node("MatMul", ["x", "y0w"], ["unused"]))
    assert merged(proto, NODES)[1] == 0


def test_two_may_share_their_weights():
    """And another user of these keeps them."""
    proto = Case((Map(weight="shared"), Map(weight="shared", bias="add"), Map(out=3))).proto()
    proto.graph.node.append(node("Neg", ["w"], ["negative"]))
    proto.graph.output.append(value("negative", [20, 2]))
    agree(proto, GPU, 2)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("op", LINEAR)
def test_other_types_keep_theirs(dtype, op):
    maps = (Map(op, 1, "add"), Map(op, 2), Map(op, 3, "none" if op == "MatMul" else "own"))
    after = agree(Case(maps, SHAPES[op], dtype=dtype).proto(), GPU, 2)
    assert {i.data_type for i in after.graph.initializer} == {TYPES[dtype], TensorProto.INT64}


@pytest.mark.parametrize("name", ["x", "y0", "y2"])
def test_what_a_loop_reads_is_kept(name):
    proto = Case().proto()
    shape = sizes_of(proto)[name]
    proto.graph.initializer.append(numpy_helper.from_array(np.array(3), "rounds"))
    proto.graph.node.append(loop([node("Neg", [name], ["neg"])], [value("neg", shape)], ["scanned"]))
    proto.graph.output.append(value("scanned", [3, *shape]))
    after, changes = merged(proto)
    assert changes == 2
    same(proto, after)


@pytest.mark.parametrize("inner", ["bias", "product"])
def test_what_is_in_a_branch_is_left(inner):
    """A bias' Add, or products that read an outer tensor."""
    proto = Case((*(Map(end=""),) * 3, Map(bias="add", end="")), (3, 20)).proto()
    add, product = proto.graph.node.pop(), proto.graph.node.pop()
    sides = [[add] if inner == "bias" else [product, add]]
    sides.append([node("MatMul", product.input, ["n"]), node("Neg", ["n"], ["other"])])
    if inner == "bias":
        proto.graph.node.append(product)
    graphs = [
        helper.make_graph(nodes, f"side{i}", [], [value(nodes[-1].output[0], [3, 2])])
        for i, nodes in enumerate(sides)
    ]
    proto.graph.node.append(node("If", ["c"], ["z"], then_branch=graphs[0], else_branch=graphs[1]))
    proto.graph.input.append(value("c", [], TensorProto.BOOL))
    proto.graph.output[-1].CopyFrom(value("z", [3, 2]))
    after, changes = merged(proto)
    assert changes == 2
    for taken in (True, False):
        same(proto, after, {**feeds(proto), "c": np.array(taken)})


# --- near-misses ---

ONE = {"strides": [1, 1]}


@pytest.mark.parametrize(
    "case",
    [
        Case((Map(),)),
        Case((Map(), Map(weight="input"), Map(weight="input"))),
        Case((Map(), Map(weight="three"), Map(weight="three"))),
        Case((Map(weight="left"),) * 3),
        Case((Map(weight="x"),) * 3, (3, 3)),
        Case(
            (Map("Gemm"), Map(), Map("Gemm", attrs={"alpha": 0.5}), Map("Gemm", attrs={"beta": 2.0})), (5, 20)
        ),
        Case((Map("Gemm"), Map("Gemm", attrs={"transA": 1}), Map("Gemm", attrs={"transA": 1})), (20, 20)),
        Case((Map("Gemm"), Map("Gemm", 3, [5, 1]), Map("Gemm", 3, [5, 3])), (5, 20)),
        Case((Map("Conv"), Map("Conv", k=(3, 3)), Map("Conv", k=(1, 3))), (1, 20, 4, 5)),
        Case((Map("Conv"), Map("Conv", attrs={"strides": [2, 2]})), (1, 20, 4, 5)),
        Case((Map("Conv"), Map("Conv", attrs={"pads": [1, 1, 1, 1]})), (1, 20, 4, 5)),
        Case((Map("Conv", k=(2, 2)), Map("Conv", k=(2, 2), attrs={"dilations": [2, 1]})), (1, 20, 4, 5)),
        Case((Map("Conv", group=2), Map("Conv", group=2), Map("Conv")), (1, 20, 4, 5)),
        Case(opset=12),
    ],
    ids=str,
)
@pytest.mark.parametrize("cost", [GPU, NODES, VALUES], ids=str)
def test_a_near_miss_is_left(case, cost):
    agree(case.proto(), cost, 0)


@pytest.mark.parametrize("axis", [1, None])
def test_without_shapes_it_declines(axis):
    proto = without_size(Case().proto(), axis)
    after, changes = merged(proto)
    assert changes == 0
    same(proto, after, feeds(Case().proto()))


@pytest.mark.parametrize("cost", [CPU, GPU, NODES, VALUES], ids=str)
def test_a_batch_of_any_size_is_priced_as_one_image(cost):
    proto = Case().proto()
    values = feeds(proto)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    expected, made = merged(onnx.shape_inference.infer_shapes(proto), cost)
    after, changes = merged(without_size(proto, 0), cost)
    assert (changes, ops(after)) == (made, ops(expected))
    same(Case().proto(), after, values)


def test_somebody_elses_operator_of_that_name_is_left():
    proto = Case().proto()
    for n in proto.graph.node:
        if n.op_type == "MatMul":
            n.domain = "own"
    proto.opset_import.append(helper.make_opsetid("own", 1))
    assert merged(proto)[1] == 0


# --- random maps ---


@st.composite
def maps(draw, ops):
    op = draw(st.sampled_from(ops))
    linear = Map(op, draw(st.integers(1, 8)), draw(st.sampled_from(BIASES[op])))
    changes = {"end": draw(st.sampled_from(("Identity", "Identity", "")))}
    if op == "Gemm":
        changes["attrs"] = {"transB": draw(st.integers(0, 1))} if draw(st.booleans()) else {}
    if op == "Conv":
        k, s = draw(st.sampled_from((1, 3, 3))), draw(st.sampled_from((1, 1, 2)))
        attrs = {"pads": [k // 2] * 4, "strides": [s, s]}
        changes |= {"k": (k, k), "attrs": attrs, "group": draw(st.sampled_from((1, 1, 1, 1, 2)))}
        linear = dataclasses.replace(linear, out=linear.out * changes["group"])
    else:
        odd = ["input", "three", "left"] if op == "MatMul" else ["input"]
        changes["weight"] = draw(st.sampled_from(["constant"] * 8 + odd))
        if changes["weight"] in ("three", "left"):
            changes["bias"] = "none"
    return dataclasses.replace(linear, **changes)


@st.composite
def cases(draw, moves=False):
    ops, rank = draw(st.sampled_from(((("Conv",), 4), (("MatMul",), 3), (("MatMul", "Gemm"), 2))))
    linears = tuple(draw(maps(ops)) for _ in range(draw(st.integers(2, 5))))
    sizes = [draw(st.integers(1, 5)) for _ in range(rank - 1)]
    sizes.insert(1 if rank == 4 else rank - 1, draw(st.integers(1, 20)) * 2)
    case = Case(
        linears,
        tuple(sizes),
        draw(st.sampled_from(("", "Relu"))),
        tuple(draw(st.sampled_from(((), (), ("Mul",))))),
        opset=draw(st.sampled_from((13, 18, 20))),
        order=tuple(draw(st.permutations(range(len(linears))))),
    )
    for kind in ("reader", "output", "branch"):
        names = ("",) * 6 + ("y0", "y1", *(("x",) if kind != "output" or case.source else ()))
        case = dataclasses.replace(case, **{kind: draw(st.sampled_from(names))})
    if moves:
        perms = st.lists(st.permutations(range(rank)).map(tuple), max_size=2).map(tuple)
        moved = [m if m.weight == "three" else dataclasses.replace(m, after=draw(perms)) for m in linears]
        case = dataclasses.replace(case, maps=tuple(moved))
    return case


COSTS = st.one_of(
    st.sampled_from((CPU, GPU, NODES, VALUES, FREE)),
    st.builds(Cost, st.sampled_from((0, 10, 100, 1000)), st.sampled_from((0, 1, 10))),
)


@settings(RANDOM, max_examples=80)
@given(cases(), COSTS)
def test_random_maps_give_the_same_for_less(case, cost):
    agree(case.proto(), cost)


@settings(RANDOM, max_examples=40)
@given(cases(moves=True), COSTS)
def test_random_maps_with_moves_behind_give_the_same(case, cost):
    agree(case.proto(), cost, joined=sum(len(linear.after) for linear in case.maps))


@settings(RANDOM, max_examples=40)
@given(cases(), COSTS, st.randoms(use_true_random=False), st.sampled_from(("", "y0/", "y", "x/joined")))
def test_names_and_order_do_not_matter(case, cost, random, prefix):
    expected, changes = merged(case.proto(), cost)
    order = list(range(len(case.maps)))
    random.shuffle(order)
    other = dataclasses.replace(case, prefix=prefix, order=tuple(order)).proto()
    actual, made = merged(other, cost, shuffle=random.randint(1, 1000))
    assert made == changes
    assert form(actual) == form(expected)
    same(other, actual)


def fewer_nodes(case):
    """How many maps are saved where only the number of nodes counts."""
    groups, adds = Counter(), Counter()
    for linear in case.maps:
        if linear.group > 1 or linear.weight not in ("constant", "shared"):
            continue
        key = (linear.op, linear.k, str(linear.attrs) if linear.op == "Conv" else "")
        groups[key] += 1
        adds[key] += linear.bias in ("add", "first")
    return sum(
        count - 1
        for key, count in groups.items()
        if count > 1 and count + adds[key] > 2 + (key[0] == "MatMul" and adds[key] > 0)
    )


@settings(RANDOM, max_examples=40)
@given(cases())
def test_where_only_nodes_count_they_become_fewest(case):
    agree(case.proto(), NODES, fewer_nodes(case))


# --- as PyTorch writes it ---


class Attention(nn.Module):
    """Attention with separate projections, as transformers write it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=bias) for bias in (True, False, True))
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (
            layer(x).view(b, n, self.heads, c // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, c))


@functools.cache
def attention():
    """The module's export, an input, and what comes out."""
    torch.manual_seed(0)
    module, x = Attention(16, 4).eval(), torch.randn(2, 9, 16)
    with quiet():
        proto = torch.onnx.export(module, (x,), dynamo=True, opset_version=20, verbose=False).model_proto
    with torch.inference_mode():
        return proto, x.numpy(), module(x).numpy()


@pytest.mark.parametrize("cost", [CPU, GPU], ids=str)
def test_separate_projections_of_attention_become_one(cost):
    proto, x, expected = attention()
    names = ["clean-up", "merge-siblings", "slices-to-split", "collapse-chains"]
    after, results = run_passes(proto, names, cost)
    assert results[1].changes == 2
    weights = {i.name for i in after.graph.initializer}
    products = [n for n in after.graph.node if n.op_type in ("MatMul", "Gemm") and weights & {*n.input}]
    assert len(products) == 2  # the other one puts out
    assert parts(after) == [3]
    (y,) = run(after, **{after.graph.input[0].name: x}).values()
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    again, results = run_passes(after, names, cost)
    assert not any(result.changes for result in results[1:])
    assert ops(again) == ops(after)
