"""slices_to_split: the same entries under the same names, cut once; near-misses declined."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.graph.graph import to_graph, to_proto
from meta_deploy.graph.passes.collapse_chains import collapse_chains
from meta_deploy.graph.passes.slices_to_split import slices_to_split
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, TYPES, node, ops, rewritten, same
from tests.small_graphs import model, value


@dataclasses.dataclass(frozen=True)
class Cut:
    """x, taken apart along an axis by Slice and Squeeze, or as `by` says, to vary.

    `cuts` has (start, end) for each Slice, in their order; `after` what each entry goes through, as
    (operator, values); `before` the same for x.
    """

    shape: tuple = (2, 3, 4)
    by: str = "Slice"  # or "Gather", by the start, which needs no Squeeze; or one "Split" into all parts
    axis: int = 1
    cuts: tuple = ((0, 1), (1, 2), (2, 3))
    before: tuple = ()
    after: tuple = ()
    inputs: int = 3  # of Slice, after the data; 2 omits the axes, 4 adds steps
    step: int = 1
    empty_axes: bool = False
    slice_axis: int | None = None  # where it is another than Squeeze's
    squeeze: str = "axes"  # "none" squeezes all, "two" another axis as well, "missing" leaves it out
    axis_of: dict = dataclasses.field(default_factory=dict)  # slices along another axis
    computed: bool = False  # starts are an input of the graph
    reader: str = ""  # of "x", "slice" or "entry": another node reads it
    output: str = ""  # of these: it is an output as well
    end: bool = True  # what is left is read by a Neg; else it is the output itself
    opset: int = 18
    dtype: str = "float32"
    order: tuple = ()  # the order of the slices as nodes
    sizes: tuple | None = None  # of the data, where the shape has a name
    prefix: str = ""

    def proto(self):
        n, nodes, initializers, outputs = self.n, [], [], []

        def constant(values):
            initializers.append(
                numpy_helper.from_array(np.array(values, np.int64), n(f"c{len(initializers)}"))
            )
            return initializers[-1].name

        def move(x, op, values, out):
            if op == "Reshape":
                return node(op, [x, constant(values)], [out])
            return node(op, [x], [out], **({"perm": values} if values else {}))

        x = n("x0")
        nodes.append(node("Identity", [n("x")], [x]))
        for i, (op, values) in enumerate(self.before, 1):
            nodes.append(move(x, op, values, n(f"x{i}")))
            x = n(f"x{i}")
        ends = []
        groups = []
        if self.by == "Split":
            parts = [n(f"s{i}") for i in range(len(self.cuts))]
            nodes.append(node("Split", [x, constant([1] * len(parts))], parts, axis=self.axis))
        for i, (start, stop) in enumerate(self.cuts):
            axis = self.axis_of.get(i, self.axis if self.slice_axis is None else self.slice_axis)
            starts = n("starts") if self.computed else constant([start])
            axes = "" if self.empty_axes else constant([axis])
            inputs = [starts, constant([stop]), axes, constant([self.step])][: self.inputs]
            part, entry = n(f"s{i}"), n(f"e{i}")
            group = [node("Slice", [x, *inputs], [part])] if self.by == "Slice" else []
            if self.by == "Gather":
                group.append(node("Gather", [x, constant(start)], [entry], axis=axis))
            elif self.squeeze == "missing":
                group.append(node("Identity", [part], [entry]))
            else:
                axes = {"axes": [axis], "none": None, "two": [axis, axis - 1]}[self.squeeze]
                group.append(node("Squeeze", [part, *([constant(axes)] if axes else [])], [entry]))
            for j, (op, values) in enumerate(self.after):
                group.append(move(entry, op, values, n(f"e{i}_{j}")))
                entry = n(f"e{i}_{j}")
            if self.end:
                group.append(node("Identity", [entry], [n(f"y{i}")]))
            else:
                group[-1].output[0] = n(f"y{i}")
            ends.append(n(f"y{i}"))
            groups.append(group)
        for i in self.order or range(len(groups)):
            nodes += groups[i]
        names = {"x": x, "slice": n("s1"), "entry": n("e1")}
        if self.reader:
            nodes.append(node("Identity", [names[self.reader]], [n("read")]))
            outputs.append(n("read"))
        if self.output:
            outputs.append(names[self.output])
        outputs = [helper.make_empty_tensor_value_info(name) for name in [*outputs, *ends]]
        for out in outputs:
            out.type.tensor_type.elem_type = TYPES[self.dtype]
        inputs = [value(n("x"), list(self.shape), TYPES[self.dtype])]
        if self.computed:
            inputs.append(value(n("starts"), [1], TensorProto.INT64))
        imports = [helper.make_opsetid("", self.opset)]
        return model(nodes, inputs, outputs, initializers, opset_imports=imports)

    def n(self, name):
        return self.prefix + name

    def feeds(self):
        shape = self.sizes or self.shape
        x = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(self.dtype)
        return {self.n("x"): x, **({self.n("starts"): np.array([0])} if self.computed else {})}


def agree(cut, changes, proto=None):
    proto = proto or cut.proto()
    return rewriting.agree(slices_to_split, proto, cut.feeds(), changes, collapse=True, tolerance=0)


def test_three_slices_become_one_split():
    after = agree(Cut(), 1)
    assert ops(after).count("Split") == 1
    assert "Slice" not in ops(after)
    assert "Squeeze" not in ops(after)


@pytest.mark.parametrize(
    "cut",
    [
        Cut(axis=-2),
        Cut(cuts=((-3, -2), (-2, -1), (2, 3))),
        Cut(cuts=((0, 1), (1, 2), (-1, 2**31 - 1))),
        Cut(cuts=((-99, 1), (1, 2), (2, 99))),
        Cut(cuts=((2, 3), (0, 1), (1, 2))),
        Cut(order=(2, 0, 1)),
        Cut(inputs=4),
        Cut(end=False),
        Cut(dtype="int64"),
        Cut(shape=(3, 2), axis=0),
        Cut(shape=(1, 3), axis=1),
        Cut(shape=(3, 1, 1), axis=0),
        Cut(shape=(1, 3, 1), axis=1),
        Cut(output="entry", end=True),
        Cut(reader="entry", end=True),
        Cut(opset=13),
        Cut(opset=17),
        Cut(opset=20),
        Cut(prefix="x0/"),
        Cut(by="Gather"),
        Cut(by="Gather", axis=-2, cuts=((2, 3), (-2, 0), (0, 1))),
        Cut(by="Split"),
        Cut(by="Split", shape=(3, 2), axis=-2),
        Cut(by="Split", opset=13, end=False),
    ],
    ids=str,
)
def test_variants_become_one_split(cut):
    after = ops(agree(cut, 1))
    assert after.count("Split") == 1
    assert not {"Slice", "Gather", "Squeeze"} & set(after)


@pytest.mark.parametrize(("opset", "sizes"), [(13, 0), (17, 0), (18, 1), (20, 1)])
def test_the_number_of_parts_is_said_where_it_has_to_be(opset, sizes):
    after = agree(Cut(opset=opset), 1)
    split = next(n for n in after.graph.node if n.op_type == "Split")
    assert sum(a.name == "num_outputs" for a in split.attribute) == sizes


@pytest.mark.parametrize(
    "cut",
    [
        Cut(cuts=((0, 1), (1, 2))),  # one is missing
        Cut(cuts=((0, 1), (1, 2), (1, 2))),  # one is there twice
        Cut(cuts=((0, 1), (1, 2), (2, 3), (2, 3))),
        Cut(shape=(2, 2, 4), cuts=((0, 1), (1, 2), (1, 2))),
        Cut(shape=(2, 1, 4), cuts=((0, 1),)),
        Cut(reader="x"),
        Cut(output="x"),
        Cut(reader="slice"),
        Cut(output="slice"),
        Cut(squeeze="missing"),
        Cut(squeeze="none", shape=(2, 3, 4)),
        Cut(squeeze="two", shape=(1, 3, 4)),
        Cut(cuts=((0, 1), (1, 2), (2, 3)), inputs=4, step=2),
        Cut(shape=(3, 3), axis=1, cuts=((2, 1), (1, 0), (0, -9)), inputs=4, step=-1),
        Cut(shape=(3, 1, 3), axis=0, inputs=2, squeeze="axes"),  # no axes: the first
        Cut(shape=(3, 4), axis=0, empty_axes=True, inputs=4),
        Cut(shape=(3, 3), axis=0, axis_of={2: 1}),
        Cut(computed=True, cuts=((0, 1), (0, 1), (0, 1))),
        Cut(shape=(2, 3, "n"), sizes=(2, 3, 5)),
        Cut(shape=(3,), axis=0),  # numbers: a Split has no such
        Cut(shape=(2, 3, 0)),
        Cut(by="Gather", cuts=((0, 1), (1, 2))),
        Cut(by="Gather", cuts=((0, 1), (1, 2), (1, 2))),
        Cut(by="Gather", axis_of={2: 0}, shape=(3, 3, 4)),
        Cut(by="Gather", reader="x"),
        Cut(by="Split", reader="x"),
        Cut(by="Split", reader="slice"),
        Cut(by="Split", output="slice"),
        Cut(by="Split", squeeze="missing"),
        Cut(by="Split", squeeze="two", shape=(1, 3, 4)),
    ],
    ids=str,
)
def test_a_near_miss_is_declined(cut):
    agree(cut, 0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("axis", [1, 2])
def test_a_batch_of_any_size_is_cut(batch, axis):
    agree(Cut(shape=("n", 3, 3), axis=axis, sizes=(batch, 3, 3)), 1)
    left = Cut(shape=("n", 3, 4), axis=0, sizes=(3, 3, 4))  # three images here, another number elsewhere
    agree(left, 0)


@pytest.mark.parametrize("indices", [[0, 1, 2], [[0], [1], [2]], [[0], [1, 2]]])
def test_entries_are_gathered_by_single_numbers(indices):
    """With a list of them the axis stays, as with a Split into parts of more than one entry."""
    constants = [numpy_helper.from_array(np.array(i), f"i{n}") for n, i in enumerate(indices)]
    nodes = [node("Gather", ["x", f"i{n}"], [f"y{n}"], axis=1) for n in range(len(indices))]
    outputs = [f"y{n}" for n in range(len(indices))]
    proto = model(nodes, [value("x", [2, 3, 4])], outputs, constants)
    feeds = {"x": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}
    rewriting.agree(slices_to_split, proto, feeds, int(indices == [0, 1, 2]), tolerance=0)


def test_overlapping_slices_are_declined():
    cut = Cut(shape=(2, 4, 3), cuts=((0, 2), (1, 3), (2, 4)), squeeze="missing")
    agree(cut, 0)


@pytest.mark.parametrize("shapes", [False, True])
def test_without_shapes_it_declines(shapes):
    proto = Cut().proto()
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    for out in proto.graph.output:
        out.type.tensor_type.ClearField("shape")
    assert rewritten(slices_to_split, proto)[1] == 0


def test_axes_of_squeeze_as_an_attribute_are_declined():
    """As they were before opset 13."""
    nodes = [node("Relu", ["x"], ["r"])]
    initializers = [numpy_helper.from_array(np.array([i]), f"c{i}") for i in range(3)]
    for i in range(2):
        nodes.append(node("Slice", ["r", f"c{i}", f"c{i + 1}", "c1"], [f"s{i}"]))
        nodes.append(node("Squeeze", [f"s{i}"], [f"y{i}"], axes=[1]))
    imports = [helper.make_opsetid("", 11)]
    proto = model(nodes, [value("x", [3, 2])], ["y0", "y1"], initializers, opset_imports=imports)
    after, _ = rewritten(slices_to_split, proto)
    same(proto, after, {"x": np.float32([[1, 2], [3, 4], [5, 6]])})


ATTENTION = Cut(
    shape=(2, 5, 24),
    axis=2,
    before=(("Reshape", (2, 5, 3, 4, 2)),),
    after=(("Transpose", (0, 2, 1, 3)),),
)


def test_what_all_entries_go_through_is_done_before_the_cut():
    """Query, key and value of a packed projection, which is split as it is."""
    after = agree(ATTENTION, 1)
    graph = to_graph(after)
    collapse_chains(graph)
    left = ops(to_proto(graph))
    assert left.count("Split") == 1
    assert left.count("Transpose") + left.count("Reshape") == 2


def test_a_packed_projection_whose_heads_are_joined_again_is_split_as_it_is():
    """What is left of attention where the fused operator takes all heads side by side."""
    cut = dataclasses.replace(
        ATTENTION,
        axis=0,
        before=(("Reshape", (2, 5, 3, 4, 2)), ("Transpose", (2, 0, 3, 1, 4))),
        after=(("Transpose", (0, 2, 1, 3)), ("Reshape", (2, 5, 8))),
    )
    graph = to_graph(agree(cut, 1))
    collapse_chains(graph)
    assert ops(to_proto(graph)) == ["Identity", "Split", *["Identity"] * 3]


def test_entries_that_go_separate_ways_keep_their_moves():
    cut = dataclasses.replace(ATTENTION, reader="entry")
    after = agree(cut, 1)
    assert ops(after).count("Transpose") >= 3


@pytest.mark.parametrize(
    "after",
    [
        (("Reshape", (8,)),),
        (("Reshape", (1, 8)), ("Transpose", ())),
        (("Transpose", ()), ("Transpose", (1, 0)), ("Reshape", (2, 2, 2))),
        (("Reshape", (4, 2)), ("Reshape", (2, 2, 2)), ("Transpose", (2, 0, 1))),
    ],
)
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_moves_after_the_cut(after, end, axis):
    shape = [2, 4]
    shape.insert(axis, 3)
    agree(Cut(shape=tuple(shape), axis=axis, after=after, end=end), 1)


def test_entries_that_become_numbers():
    """There is no axis to cut along then."""
    agree(Cut(shape=(3, 1), axis=0, after=(("Reshape", ()),)), 1)


def test_an_input_of_the_graph_is_cut_as_well():
    nodes = []
    initializers = [numpy_helper.from_array(np.array([i]), f"c{i}") for i in range(3)]
    for i in range(2):
        nodes.append(node("Slice", ["x", f"c{i}", f"c{i + 1}", "c1"], [f"s{i}"]))
        nodes.append(node("Squeeze", [f"s{i}", "c1"], [f"y{i}"]))
    proto = model(nodes, [value("x", [3, 2])], ["y0", "y1"], initializers)
    after, changes = rewritten(slices_to_split, proto)
    assert changes == 1
    same(proto, after, {"x": np.float32([[1, 2], [3, 4], [5, 6]])})


def nested(depth, end="Identity"):
    """Entries that are cut again, to scalars' neighbours: all of them by one run of the pass."""
    nodes, initializers = [node("Identity", ["x"], ["t"])], []
    initializers = [numpy_helper.from_array(np.array([i]), f"c{i}") for i in range(3)]
    level = ["t"]
    for _ in range(depth):
        following = []
        for name in level:
            for i in range(2):
                nodes.append(node("Slice", [name, f"c{i}", f"c{i + 1}", "c0"], [f"{name}s{i}"]))
                nodes.append(node("Squeeze", [f"{name}s{i}", "c0"], [f"{name}{i}"]))
                following.append(f"{name}{i}")
        level = following
    outputs = []
    for name in level:
        nodes.append(node(end, [name], [f"{name}_y"]))
        outputs.append(f"{name}_y")
    return model(nodes, [value("x", [2] * depth + [3])], outputs, initializers)


@pytest.mark.parametrize("depth", [2, 3])
def test_entries_cut_again_take_one_run(depth):
    proto = nested(depth)
    after, changes = rewritten(slices_to_split, proto)
    assert changes == 2**depth - 1
    x = np.arange(2**depth * 3, dtype=np.float32).reshape([2] * depth + [3])
    same(proto, after, {"x": x})
    assert rewritten(slices_to_split, after)[1] == 0


def test_a_cut_in_a_branch_or_for_one_is_left():
    """The Squeeze is inside: a Split outside cannot make what is the branch's own."""
    initializers = [numpy_helper.from_array(np.array([i]), f"c{i}") for i in range(3)]
    slices = [node("Slice", ["h", f"c{i}", f"c{i + 1}", "c0"], [f"s{i}"]) for i in range(2)]
    squeeze = node("Squeeze", ["s0", "c0"], ["t"])
    then = helper.make_graph([squeeze], "then", [], [value("t", [3])])
    other = helper.make_graph([node("Squeeze", ["s1", "c0"], ["e"])], "else", [], [value("e", [3])])
    nodes = [
        node("Relu", ["x"], ["h"]),
        *slices,
        node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]
    inputs = [value("x", [2, 3]), value("c", [], TensorProto.BOOL)]
    proto = model(nodes, inputs, initializers=initializers)
    after, changes = rewritten(slices_to_split, proto)
    assert changes == 0
    for taken in (True, False):
        same(proto, after, {"x": np.ones((2, 3), np.float32), "c": np.array(taken)})


def test_moves_in_a_branch_are_not_done_before_the_cut():
    initializers = [numpy_helper.from_array(np.array([i]), f"c{i}") for i in range(3)]
    nodes = [node("Relu", ["x"], ["h"])]
    for i in range(2):
        nodes.append(node("Slice", ["h", f"c{i}", f"c{i + 1}", "c0"], [f"s{i}"]))
        nodes.append(node("Squeeze", [f"s{i}", "c0"], [f"e{i}"]))
    branches = [
        helper.make_graph([node("Transpose", [f"e{i}"], [f"t{i}"])], f"b{i}", [], [value(f"t{i}", [4, 3])])
        for i in range(2)
    ]
    nodes.append(node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1]))
    inputs = [value("x", [2, 3, 4]), value("c", [], TensorProto.BOOL)]
    proto = model(nodes, inputs, initializers=initializers)
    after, changes = rewritten(slices_to_split, proto)
    assert changes == 1
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for taken in (True, False):
        same(proto, after, {"x": x, "c": np.array(taken)})


def test_somebody_elses_operator_of_that_name_is_left():
    proto = Cut().proto()
    for n in proto.graph.node:
        if n.op_type == "Slice":
            n.domain = "own"
    proto.opset_import.append(helper.make_opsetid("own", 1))
    assert rewritten(slices_to_split, proto)[1] == 0


# --- random cuts ---


@st.composite
def moves(draw, shape):
    """A list of moves, and the shape after them."""
    result = []
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            perm = draw(st.permutations(range(len(shape))))
            result.append(("Transpose", tuple(perm)))
            shape = [shape[p] for p in perm]
        else:
            total, new = int(np.prod(shape, dtype=int)), []
            while total > 1 and len(new) < 3:
                new.append(draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0])))
                total //= new[-1]
            shape = [*new, total]
            result.append(("Reshape", tuple(shape)))
    return tuple(result), shape


@st.composite
def cuts(draw):
    start = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    before, shape = draw(moves(start))
    axes = [i for i, size in enumerate(shape) if 1 < size <= 6]
    axis = draw(st.sampled_from(axes)) if axes else 0
    size = shape[axis]
    indices = draw(st.permutations(range(size)))
    if draw(st.sampled_from((0, 0, 0, 1))):
        indices = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size))
    spans = []
    for i in indices:
        low = draw(st.sampled_from((i, i - size)))
        ends = [i + 1, *([i + 1 - size] if i + 1 < size else [2**31 - 1])]
        spans.append((low, draw(st.sampled_from(ends))))
    after, _ = draw(moves([s for i, s in enumerate(shape) if i != axis]))
    kinds = ("",) * 5 + (("x", "slice", "entry") if len(spans) > 1 else ("x",))
    reader, output = draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds))
    by = draw(st.sampled_from(("Slice", "Gather", "Split")))
    if by == "Split" and len(spans) != size:
        by = "Slice"
    if by == "Split":
        spans.sort(key=lambda span: span[0] % size)
    if by == "Gather":
        reader, output = (kind if kind != "slice" else "" for kind in (reader, output))
    return Cut(
        shape=tuple(start),
        by=by,
        axis=draw(st.sampled_from((axis, axis - len(shape)))),
        cuts=tuple(spans),
        before=before,
        after=after,
        inputs=draw(st.sampled_from((3, 4))),
        reader=reader,
        output=output,
        end=draw(st.booleans()) or not after,
        opset=draw(st.sampled_from((13, 18, 20))),
        dtype=draw(st.sampled_from(("float32", "int64"))),
        order=tuple(draw(st.permutations(range(len(spans))))),
        prefix=draw(st.sampled_from(("", "x/", "e0/first"))),
    )


@settings(RANDOM, max_examples=300)
@given(cuts())
def test_random_cuts_give_the_same_entries(cut):
    proto = cut.proto()
    infos = [*proto.graph.value_info, *proto.graph.output]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in infos}
    shape = shapes[cut.n(f"x{len(cut.before)}")]
    size = shape[cut.axis]
    indices = list(range(size)) if cut.by == "Split" else sorted(start % size for start, _ in cut.cuts)
    whole = indices == list(range(size)) and size > 1 and len(shape) > 1
    free = cut.reader not in ("x", "slice") and cut.output not in ("x", "slice")
    agree(cut, int(whole and free), proto)
