"""discarded_rows: every output as before, near-misses declined, nothing computed for rows thrown away."""

import dataclasses
import functools
import itertools

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.graph.explain import explaining
from meta_deploy.graph.graph import to_graph
from meta_deploy.graph.passes.discarded_rows import discarded_rows
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, node, shuffled
from tests.small_graphs import model, run, value


@dataclasses.dataclass(frozen=True)
class Head:
    """A Where(keep, Reshape(f(Gather(x, index))), 0) to vary: B images, K rows each, f as layers in order."""

    B: int = 2
    K: int = 3
    C: int = 4
    side: int = 5
    layers: tuple[str, ...] = ("Conv", "Relu", "ConvTranspose", "Relu", "Select", "Sigmoid")
    other: float = 0.0
    other_shape: tuple[int, ...] = ()
    gather_axis: int = 0
    select_axis: int = 1
    select_type: int = TensorProto.INT64
    keep_shape: tuple | None = None  # in place of (B, K, 1, 1)
    second_reader: str | None = None  # a tensor that another node reads, too
    extra_output: str | None = None  # a tensor that is an output, too
    batch: str | int | None = None  # the name of a batch that is not known before
    sides: str | None = None  # the name of a side that is not known before
    reversed: bool = False  # the branches of the Where
    shuffle: int = 0
    prefix: str = ""
    seed: int = 0

    def proto(self):
        rng = np.random.default_rng(self.seed)

        def weights(name, *shape):
            return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 3, self.n(name))

        B, K, C = self.batch or self.B, self.K, self.C
        n = self.n
        rows = self.B * K if self.batch is None else None
        side = self.sides or self.side
        x_shape = [C, 2 * self.B * K, side, side] if self.gather_axis else [None, C, side, side]
        inputs = [
            value(n("x"), x_shape),
            value(n("index"), [rows]),
            value(n("keep"), list(self.keep_shape or (B, K, 1, 1)), TensorProto.BOOL),
            value(n("labels"), [rows, 1, 1, 1], self.select_type),
        ]
        inputs[1].type.tensor_type.elem_type = TensorProto.INT64
        axis = {"axis": self.gather_axis} if self.gather_axis else {}
        nodes = [node("Gather", [n("x"), n("index")], [n("t0")], **axis)]
        initializers, channels, factor = [], C, 1
        for i, layer in enumerate(self.layers):
            source, out = n(f"t{i}"), n(f"t{i + 1}")
            if layer == "Conv":
                initializers += [weights(f"w{i}", channels, channels, 3, 3), weights(f"b{i}", channels)]
                nodes.append(node(layer, [source, n(f"w{i}"), n(f"b{i}")], [out], pads=[1, 1, 1, 1]))
            elif layer == "ConvTranspose":
                initializers.append(weights(f"w{i}", channels, channels, 2, 2))
                nodes.append(node(layer, [source, n(f"w{i}")], [out], strides=[2, 2]))
                factor *= 2
            elif layer == "Select":
                at = factor * self.side
                if self.select_axis in (1, -3):
                    channels = 1
                sizes = np.array([1, channels, at, at])
                initializers.append(numpy_helper.from_array(sizes, n("sizes")))
                nodes.append(node("Expand", [n("labels"), n("sizes")], [n("chosen")]))
                nodes.append(node("GatherElements", [source, n("chosen")], [out], axis=self.select_axis))
            else:
                nodes.append(node(layer, [source], [out]))
        last = n(f"t{len(self.layers)}")
        at = 0 if self.sides else factor * self.side
        to = [-1, K, at, at] if channels == 1 else [-1, K, channels, at, at]
        if self.sides:
            to = [-1, K, factor * self.side, factor * self.side]
        initializers.append(numpy_helper.from_array(np.array(to), n("to")))
        other = np.full(self.other_shape, self.other, np.float32)
        initializers.append(numpy_helper.from_array(other, n("zero")))
        nodes.append(node("Reshape", [last, n("to")], [n("value")]))
        branches = [n("value"), n("zero")][:: -1 if self.reversed else 1]
        nodes.append(node("Where", [n("keep"), *branches], [n("y")]))
        outputs = [n("y")]
        if self.second_reader:
            nodes.append(node("Neg", [n(self.second_reader)], [n("z")]))
            outputs.append(n("z"))
        if self.extra_output:
            outputs.insert(0, n(self.extra_output))
        proto = model(shuffled(nodes, self.shuffle), inputs, outputs, initializers)
        if isinstance(B, str):  # as PyTorch's exporter says it, and ONNX cannot infer
            for info in proto.graph.value_info:
                if info.name == n("value"):
                    info.type.tensor_type.shape.dim[0].dim_param = B
        return proto

    def n(self, name):
        return self.prefix + name

    def feeds(self, keep=None, seed=1):
        rng = np.random.default_rng(seed)
        rows = self.B * self.K
        shape = (
            (self.C, 2 * rows, self.side, self.side)
            if self.gather_axis
            else (7, self.C, self.side, self.side)
        )
        keep_shape = [self.B if d == self.batch else d for d in self.keep_shape or (self.B, self.K, 1, 1)]
        if keep is None:
            keep = rng.integers(0, 2, keep_shape).astype(bool)
        kind = np.int64 if self.select_type == TensorProto.INT64 else np.int32
        high = self.C if self.select_axis in (1, -3) else min(rows, self.side)
        return {
            self.n("x"): rng.standard_normal(shape).astype(np.float32),
            self.n("index"): rng.integers(0, 7 if not self.gather_axis else 2 * rows, rows),
            self.n("keep"): np.broadcast_to(keep, keep_shape).copy(),
            self.n("labels"): rng.integers(0, high, (rows, 1, 1, 1)).astype(kind),
        }


rewritten = functools.partial(rewriting.rewritten, discarded_rows)


def agree(head, changes, *, keep=None, proto=None):
    return rewriting.agree(discarded_rows, proto or head.proto(), head.feeds(keep), changes, tolerance=1e-6)


def test_the_mask_head_runs_on_the_kept_rows():
    after = agree(Head(), 1)
    ops = [n.op_type for n in after.graph.node]
    assert ops.count("ScatterND") == 1
    assert ops.count("Gather") == 3  # of the rows, of the kept ones, of their labels


def test_rows_thrown_away_are_not_computed():
    """A picture of NaN in each row that is not kept would give NaN, were it not for the Where."""
    head = Head(extra_output=None, layers=("Conv", "Select"))
    after, _ = rewritten(head.proto())
    convolution = next(n for n in after.graph.node if n.op_type == "Conv")
    after.graph.output.append(value(convolution.output[0], None))
    keep = np.array([[True, False, False], [False, True, False]])[..., None, None]
    assert run(after, **head.feeds(keep))[convolution.output[0]].shape[0] == 2


@pytest.mark.parametrize("keep", [True, False])
def test_all_rows_or_none_kept(keep):
    agree(Head(), 1, keep=keep)


@pytest.mark.parametrize("row", range(6))
def test_each_row_goes_back_to_its_own_place(row):
    keep = np.arange(6).reshape(2, 3, 1, 1) == row
    agree(Head(), 1, keep=keep)


@pytest.mark.parametrize("B", [1, 2, 4])
def test_a_batch_known_at_run_time_only(B):
    agree(Head(B=B, batch="b"), 1)


def test_a_batch_without_a_name_is_declined():
    """Nothing tells then that keep has a row for every row."""
    agree(Head(keep_shape=(None, 3, 1, 1)), 0, keep=np.ones((2, 3, 1, 1), bool))


def test_labels_may_be_int32():
    agree(Head(select_type=TensorProto.INT32), 1)


@pytest.mark.parametrize("axis", [-3, 1])
def test_the_axis_may_count_from_the_end(axis):
    agree(Head(select_axis=axis), 1)


@pytest.mark.parametrize("axis", [0, -4])
def test_a_choice_among_rows_is_declined(axis):
    agree(Head(C=1, layers=("Conv", "Select", "Sigmoid"), select_axis=axis), 0)


@pytest.mark.parametrize(
    "head",
    [
        Head(other=1.0),
        Head(reversed=True),
        Head(gather_axis=1, B=2, K=2, C=4),
        Head(layers=("Relu", "Select", "Sigmoid")),  # no convolution: nothing worth it
        Head(layers=()),
        Head(layers=("Conv", "Softmax", "Select")),  # an operator that it does not know
        Head(layers=("Conv", "Select", "Sigmoid"), second_reader="t1"),
        Head(layers=("Conv", "Select", "Sigmoid"), second_reader="t0"),
        Head(layers=("Conv", "Select", "Sigmoid"), second_reader="t3"),
        Head(second_reader="value"),
        Head(extra_output="t2"),
        Head(extra_output="value"),
        Head(keep_shape=(1, 3, 1, 1)),  # one answer for all images
        Head(keep_shape=(2, 1, 1, 1)),
        Head(keep_shape=(1, 1, 1, 1)),
        Head(keep_shape=(2, 3, 10, 10)),  # an answer a pixel
        Head(keep_shape=(2, 3, 10, 1)),
        Head(keep_shape=(3, 1, 1)),
        Head(B=1, keep_shape=(4, 3, 1, 1)),  # more rows kept than there are
        Head(B=1, batch="b", keep_shape=("c", 3, 1, 1)),
    ],
    ids=str,
)
def test_a_near_miss_is_declined(head):
    if head.layers == ():
        head = dataclasses.replace(head, C=1)
    keep = np.ones((1, 3, 1, 1), bool) if head.batch else None
    if head.gather_axis:
        proto = head.proto()
        assert rewritten(proto)[1] == 0
        return
    feeds_head = head if not head.batch else dataclasses.replace(head, keep_shape=(1, 3, 1, 1))
    agree(feeds_head, 0, keep=keep, proto=head.proto())


def test_a_second_answer_may_read_the_tensors_before_the_rows():
    agree(Head(second_reader="x"), 1)


def test_it_does_not_matter_how_nodes_are_ordered_or_named():
    for shuffle, prefix in itertools.product((1, 2, 3), ("", "a/b:", "zero")):
        agree(Head(shuffle=shuffle, prefix=prefix), 1)


def test_two_heads_of_different_sizes_in_one_graph():
    """Names of what is added don't clash, with the nodes unnamed or named alike."""
    heads = Head(prefix="p"), Head(prefix="q", K=4, side=3, seed=5)
    protos = [head.proto() for head in heads]
    both = onnx.compose.merge_graphs(*(p.graph for p in protos), io_map=[])
    proto = helper.make_model(both, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    after, changes = rewritten(proto)
    assert changes == 2
    feeds = {**heads[0].feeds(), **heads[1].feeds()}
    expected, actual = run(proto, **feeds), run(after, **feeds)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_side_known_at_run_time_only_is_declined_or_done_right():
    head = Head(layers=("Conv", "Relu"), C=1, sides="s")
    proto = head.proto()
    after, _ = rewritten(proto)
    feeds = head.feeds()
    np.testing.assert_allclose(run(after, **feeds)["y"], run(proto, **feeds)["y"], rtol=1e-5, atol=1e-6)


def test_without_shapes_it_declines():
    graph = to_graph(Head().proto())
    for tensor in graph.tensors().values():
        if not isinstance(tensor, gs.Constant):
            tensor.shape = None
    assert discarded_rows(graph) == 0


class Cascade:
    """Several mask heads on the same rows, whose masks are averaged: Where(keep, Reshape(mean(...)), 0)."""

    def __init__(self, heads=3, merged=False, spread=(), gathers=1):
        """`merged`: the heads' convolutions are one, then split. `spread`: the shape of the last factor."""
        rng = np.random.default_rng(0)

        def weights(name, *shape):
            return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 3, name)

        inputs = [
            value("x", [None, 2, 3, 3]),
            value("index", [6], TensorProto.INT64),
            value("keep", [2, 3, 1, 1], TensorProto.BOOL),
            value("labels", [6, 1, 3, 3], TensorProto.INT64),
        ]
        nodes = [node("Gather", ["x", "index"], [f"rows{i}"]) for i in range(gathers)]
        constants = [
            numpy_helper.from_array(rng.uniform(0.2, 0.4, spread).astype(np.float32), "share"),
            numpy_helper.from_array(np.array([2, 3, 3, 3]), "to"),
            numpy_helper.from_array(np.zeros((), np.float32), "zero"),
        ]
        if merged:
            constants.append(weights("w", 2 * heads, 2, 3, 3))
            nodes.append(node("Conv", ["rows0", "w"], ["all"], pads=[1] * 4))
            nodes.append(node("Split", ["all"], [f"c{i}" for i in range(heads)], axis=1, num_outputs=heads))
        for i in range(heads):
            if not merged:
                constants.append(weights(f"w{i}", 2, 2, 3, 3))
                nodes.append(node("Conv", [f"rows{i % gathers}", f"w{i}"], [f"c{i}"], pads=[1] * 4))
            nodes.append(node("GatherElements", [f"c{i}", "labels"], [f"g{i}"], axis=1))
            nodes.append(node("Sigmoid", [f"g{i}"], [f"m{i}"]))
            nodes.append(node("Add", [f"s{i - 1}" if i > 1 else "m0", f"m{i}"], [f"s{i}"]) if i else None)
        nodes.append(node("Mul", [f"s{heads - 1}", "share"], ["mean"]))
        nodes.append(node("Reshape", ["mean", "to"], ["value"]))
        nodes.append(node("Where", ["keep", "value", "zero"], ["y"]))
        self.proto = model([n for n in nodes if n], inputs, ["y"], constants)

    def feeds(self):
        rng = np.random.default_rng(1)
        return {
            "x": rng.standard_normal((7, 2, 3, 3)).astype(np.float32),
            "index": rng.integers(0, 7, 6),
            "keep": np.array([[True, False, True], [False, False, True]])[..., None, None],
            "labels": rng.integers(0, 2, (6, 1, 3, 3)),
        }


@pytest.mark.parametrize("merged", [False, True])
def test_all_heads_of_a_cascade_run_on_the_kept_rows_which_are_gathered_once(merged):
    cascade = Cascade(merged=merged)
    after = rewriting.agree(discarded_rows, cascade.proto, cascade.feeds(), 1, tolerance=1e-6)
    assert [n.op_type for n in after.graph.node].count("Gather") == 3  # rows, kept rows, their labels
    convolutions = [n.output[0] for n in after.graph.node if n.op_type == "Conv"]
    after.graph.output.extend(value(name, None) for name in convolutions)
    found = run(after, **cascade.feeds())
    assert {found[name].shape[0] for name in convolutions} == {3}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"spread": (6, 1, 1, 1)}, "Mul 'mean' does not compute its rows one by one"),
        ({"gathers": 2}, "gets rows of both"),
    ],
)
def test_branches_that_are_not_of_the_same_rows_are_declined(changed, reason):
    cascade = Cascade(**changed)
    with explaining() as told:
        rewriting.agree(discarded_rows, cascade.proto, cascade.feeds(), 0, tolerance=1e-6)
    assert any(reason in d.reason for d in told)


@st.composite
def heads(draw):
    middle = draw(st.lists(st.sampled_from(("Conv", "Relu", "Sigmoid", "ConvTranspose")), max_size=4))
    layers = (*middle, "Select", *draw(st.lists(st.sampled_from(("Relu", "Sigmoid")), max_size=2)))
    B = draw(st.integers(1, 3))
    K = draw(st.integers(1, 4))
    keep_shapes = (None, None, None, (1, K, 1, 1), (B, 1, 1, 1), (1, 1, 1, 1))
    tensors = ("x", "t0", "t1", "value", *(f"t{i}" for i in range(2, len(layers) + 1)))
    return Head(
        B=B,
        K=K,
        C=draw(st.integers(1, 3)),
        side=draw(st.integers(1, 3)),
        layers=layers,
        other=draw(st.sampled_from((0.0, 0.0, 0.0, 1.0, -0.0))),
        other_shape=draw(st.sampled_from(((), (1,), (1, 1, 1, 1)))),
        select_axis=draw(st.sampled_from((1, -3))),
        keep_shape=draw(st.sampled_from(keep_shapes)),
        second_reader=draw(st.sampled_from((None, None, *tensors))),
        extra_output=draw(st.sampled_from((None, None, None, *tensors[1:]))),
        batch=draw(st.sampled_from((None, None, "b"))),
        shuffle=draw(st.integers(0, 9)),
        seed=draw(st.integers(0, 9)),
    )


@settings(RANDOM, max_examples=80)
@given(heads(), st.integers(0, 9))
def test_graphs_around_the_pattern_answer_as_before(head, seed):
    proto = head.proto()
    after, changes = rewritten(proto)
    convolution = "Conv" in head.layers or "ConvTranspose" in head.layers
    plain = head.keep_shape is None or (head.batch is None and head.keep_shape == (head.B, head.K, 1, 1))
    alone = head.second_reader in (None, "x") and head.extra_output is None
    assert changes == int(convolution and plain and alone and head.other == 0)
    feeds = head.feeds(seed=seed)
    expected, actual = run(proto, **feeds), run(after, **feeds)
    assert list(actual) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-5, atol=1e-6)
    assert rewritten(after)[1] == 0
