"""order_tokens: fewer moves around attention, whose tokens may come in any order; near-misses stay."""

import dataclasses
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from meta_deploy.graph.passes.collapse_chains import collapse_chains
from meta_deploy.graph.passes.order_tokens import order_tokens
from tests.graph.attention_maps import TENSORS, WINDOWS, Map, Stripes, maps, of_any_batch
from tests.graph.rewriting import MOVES, RANDOM, agree_among_moves, moves_of, node, ops, put_inside, rewritten
from tests.small_graphs import model, value

VERTICAL, HORIZONTAL = Stripes(4, 2), Stripes(2, 6)  # of a map of 4 x 6


def check(case, changes=None, proto=None):
    """As `agree_among_moves`; where something changes there are fewer moves than before."""
    proto = proto or case.proto()
    after = agree_among_moves(order_tokens, proto, case.feeds(), changes, case.dtype)
    if ops(after) != ops(proto):
        assert sum(op in MOVES for op in ops(after)) < sum(op in MOVES for op in ops(proto))
        assert moves_of(after) <= moves_of(proto)
    return after


def collapsed(case):
    """The model of which chains are collapsed already, as pipelines have it."""
    return rewritten(collapse_chains, case.proto())[0]


def around(proto):
    """The moves before the attention and those behind, in their order."""
    nodes, middle = proto.graph.node, ops(proto).index("Softmax")
    parts = nodes[:middle], nodes[middle:]
    return tuple([n.op_type for n in part if n.op_type in MOVES and "kt0" not in n.output] for part in parts)


THERE_AND_BACK = ["Transpose", "Reshape"], ["Reshape", "Transpose"]
LONG = ["Reshape", "Transpose", "Reshape"]


@pytest.mark.parametrize("axis", [1, 3, -1])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_a_vertical_stripe_is_a_transposed_map_cut_across(axis, batch, columns):
    """With one head and q, k and v along the channels; else these have to be moved, too."""
    case = Map((Stripes(4, columns, axis=axis),), batch)
    before = collapsed(case)
    after = agree_among_moves(order_tokens, before, case.feeds(), None)
    if axis == 1:
        assert moves_of(after) <= moves_of(before)
        return
    if (batch, columns) == (1, 1):
        assert around(after) == (["Transpose"], ["Transpose"])
        return
    assert around(before)[0] == LONG or columns == 1
    assert around(after) == THERE_AND_BACK


@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_fewest_already_stays(axis, heads, batch):
    """A horizontal stripe is some rows; with one part along the channels it takes no Transpose."""
    case = Map((Stripes(2, 6, heads, axis=axis),), batch)
    agree_among_moves(order_tokens, collapsed(case), case.feeds(), 0)


def fewest(case):
    """Moves of the best of all orders of tokens and batch, as someone would write them."""
    best = 99
    for batch, tokens in product(permutations(range(3)), permutations(range(2))):
        stripes = tuple(dataclasses.replace(s, order=(batch, tokens)) for s in case.stripes)
        best = min(best, moves_of(dataclasses.replace(case, stripes=stripes).proto()))
    return best


@pytest.mark.parametrize("stripes", [(4, 2), (4, 1), (2, 3), (2, 6), (1, 1), (1, 2), (2, 1), (4, 6)])
@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_no_order_takes_fewer_moves(stripes, axis, heads, batch):
    case = Map((Stripes(*stripes, heads, axis=axis),), batch)
    assert moves_of(check(case)) <= fewest(case)


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
@pytest.mark.parametrize("parts", [None, (4, 4, 4)])
def test_every_opset(opset, parts):
    check(Map((dataclasses.replace(VERTICAL, axis=3, parts=parts),), opset=opset), 1)


@pytest.mark.parametrize("source", ["split", "same", "own", "input", "chain", "next"])
def test_several_attentions(source):
    case = Map((dataclasses.replace(VERTICAL, axis=3),) * 3, source=source)
    assert moves_of(check(case, 3)) <= 3 * 5


@pytest.mark.parametrize(
    "case",
    [
        Map((VERTICAL,), dtype="float16"),
        Map((VERTICAL,), sizes=False, batch=2),
        Map((dataclasses.replace(VERTICAL, mask=True),)),
        Map((dataclasses.replace(VERTICAL, mixed=True),)),
        Map((dataclasses.replace(VERTICAL, axis=3, parts=(3, 3, 6)),)),
        Map((dataclasses.replace(VERTICAL, heads=2, parts=(4, 1, 1)),)),
        Map((dataclasses.replace(VERTICAL, softmax=2),)),
    ],
    ids=str,
)
def test_a_near_miss_is_declined(case):
    check(case, 0)


@pytest.mark.parametrize(
    "back",
    [
        (2, 4, ((0, 1, 2), (0, 1))),  # other windows
        (8, 1, ((0, 1, 2), (0, 1))),
        (4, 2, ((0, 1, 2), (1, 0))),  # the same in another order
        (4, 2, ((1, 2, 0), (0, 1))),
    ],
    ids=str,
)
def test_tokens_that_go_back_elsewhere_get_where_they_did(back):
    """Whether it declines or not: a factor more or less is not the same, another order is."""
    for axis in (1, 3):
        stripes = Stripes(4, 2, axis=axis, back=back)
        check(Map((stripes,), 2, 8, 8))


def test_tokens_cut_otherwise_behind_are_declined():
    check(Map((Stripes(4, 2, axis=3, back=(2, 4, ((0, 1, 2), (0, 1)))),), 1, 8, 8), 0)


@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_batch_of_any_size_is_ordered_as_one_of_a_known_size(axis, heads, batch):
    case = Map((dataclasses.replace(VERTICAL, heads=heads, axis=axis), VERTICAL), batch)
    after = check(case, None, of_any_batch(case))
    assert ops(after) == ops(rewritten(order_tokens, dataclasses.replace(case, batch=5).proto())[0])


TENSORS += ["weights0", "out0", "back0", "uncut0", "unturned0"]


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("use", ["reader", "output", "branch"])
def test_what_others_read_is_as_it_was(tensor, use):
    """Where moves are left to change they change, but what is read has its tokens in their old order."""
    case = Map((dataclasses.replace(VERTICAL, axis=3),), **{use: tensor})
    among = {"start0": 1, "cut0": None, "turned0": None, "uncut0": None, "unturned0": None}
    among |= {"tokens0": None, "back0": None}
    check(case, among.get(tensor, 0))


@pytest.mark.parametrize("tensor", ["packed0", "product0", "weights0", "out0", "back0", "unturned0", "end0"])
def test_what_follows_in_a_branch_stays_there(tensor):
    case = Map((dataclasses.replace(VERTICAL, axis=3),))
    proto = put_inside(case.proto(), [tensor])
    changes = {"back0": None, "unturned0": None, "end0": 1}.get(tensor, 0)
    agree_among_moves(order_tokens, proto, {**case.feeds(), "c": np.array(True)}, changes)


def test_the_end_may_be_an_output():
    case = Map((dataclasses.replace(VERTICAL, axis=3),), joined=False)
    assert [o.name for o in check(case, 1).graph.output] == ["end0"]


@pytest.mark.parametrize("sizes", [*product(WINDOWS, repeat=2)], ids=str)
def test_attentions_in_a_row_take_one_run(sizes):
    """What is behind the one is before the next: moves of both at once."""
    rows = tuple(Stripes(*size, 1, d, 3) for size, d in zip(sizes, (6, 2), strict=True))
    check(Map(rows, 1, 4, 4, "row"))


@pytest.mark.parametrize(("axes", "changes"), [(4, 1), (6, 1), (7, 0)])
def test_tokens_of_many_axes(axes, changes):
    """All orders are tried, or none."""
    shape, perm = [2] * axes, tuple(range(axes))[::-1]
    lists = {"packed": [1, 1, 2**axes, 6], "apart": [*shape, 2]}
    nodes = [
        node("Transpose", ["x"], ["turned"], perm=(*perm, axes)),
        node("Reshape", ["turned", "packed"], ["p"]),
        node("Split", ["p"], ["q", "k", "v"], axis=3, num_outputs=3),
        node("Transpose", ["k"], ["kt"], perm=(0, 1, 3, 2)),
        node("MatMul", ["q", "kt"], ["product"]),
        node("Softmax", ["product"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["out"]),
        node("Reshape", ["out", "apart"], ["a"]),
        node("Transpose", ["a"], ["y"], perm=(*perm, axes)),
    ]
    initializers = [numpy_helper.from_array(np.array(numbers), name) for name, numbers in lists.items()]
    proto = model(nodes, [value("x", [*shape, 6])], initializers=initializers)
    x = np.random.default_rng(0).standard_normal((*shape, 6)).astype(np.float32)
    after = agree_among_moves(order_tokens, proto, {"x": x}, changes)
    assert ops(after).count("Transpose") == (1 if changes else 3)


def test_an_attention_without_moves_has_none_to_spare():
    nodes = [
        node("Split", ["x"], ["q", "k", "v"], axis=3, num_outputs=3),
        node("Transpose", ["k"], ["kt"], perm=(0, 1, 3, 2)),
        node("MatMul", ["q", "kt"], ["product"]),
        node("Softmax", ["product"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["y"]),
    ]
    proto = model(nodes, [value("x", [2, 3, 5, 12])])
    agree_among_moves(order_tokens, proto, {"x": np.ones((2, 3, 5, 12), np.float32)}, 0)


def test_without_shapes_it_declines():
    proto = Map((VERTICAL,)).proto()
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    for constant in proto.graph.initializer:  # nor do the Reshapes tell
        if constant.data_type == TensorProto.INT64 and constant.dims == [4]:
            numbers = numpy_helper.to_array(constant).copy()
            numbers[0] = -1
            constant.CopyFrom(numpy_helper.from_array(numbers, constant.name))
    assert rewritten(order_tokens, proto)[1] == 0


# --- random attentions ---


@settings(RANDOM, max_examples=50)
@given(maps())
def test_random_attentions_give_the_same_outputs(case):
    check(case)


@settings(RANDOM, max_examples=30)
@given(maps())
def test_random_attentions_of_any_batch_give_the_same_outputs(case):
    check(case, None, of_any_batch(case))


@settings(RANDOM, max_examples=20)
@given(maps(), st.integers(1, 9))
def test_order_of_nodes_and_names_do_not_matter(case, seed):
    other = dataclasses.replace(case, shuffle=seed, prefix="other/")
    results = [rewritten(order_tokens, each.proto()) for each in (case, other)]
    assert results[0][1] == results[1][1]
    assert sorted(ops(results[0][0])) == sorted(ops(results[1][0]))
