"""stack_attention: attentions side by side run as one, with the same outputs; near-misses stay apart."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meta_deploy.export.trace import quiet
from meta_deploy.graph.passes.collapse_chains import collapse_chains
from meta_deploy.graph.passes.order_tokens import order_tokens
from meta_deploy.graph.passes.stack_attention import stack_attention
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.models.backbones.mea import CrossShapedAttention
from tests.graph.attention_maps import TENSORS, Map, Stripes, factor, maps, of_any_batch
from tests.graph.rewriting import RANDOM, agree_among_moves, node, ops, put_inside, rewritten
from tests.small_graphs import model, run

HORIZONTAL, VERTICAL = Stripes(2, 4), Stripes(4, 2)  # of a map of 4 x 4
SQUARE = Map((HORIZONTAL, VERTICAL), 1, 4, 4)


def check(case, changes=None, proto=None):
    """As `agree_among_moves`; an attention less for every change."""
    proto = proto or case.proto()
    after = agree_among_moves(stack_attention, proto, case.feeds(), changes, case.dtype)
    made = changes if changes is not None else ops(proto).count("Softmax") - ops(after).count("Softmax")
    assert ops(after).count("Softmax") == ops(proto).count("Softmax") - made
    assert ops(after).count("MatMul") == ops(proto).count("MatMul") - 2 * made
    return after


def attention_of(proto):
    """The shape of each Softmax."""
    infos = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in proto.graph.value_info}
    return [infos[n.output[0]] for n in proto.graph.node if n.op_type == "Softmax"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("axis", [1, 3, -1])
def test_two_directions_on_a_square_map_take_one_softmax(batch, heads, axis):
    stripes = tuple(dataclasses.replace(s, heads=heads, axis=axis) for s in SQUARE.stripes)
    after = check(Map(stripes, batch, 4, 4), 1)
    assert attention_of(after) == [[2 * batch * 2, heads, 8, 8]]


@pytest.mark.parametrize("size", [(4, 6), (6, 4), (2, 4), (8, 4)])
def test_on_a_map_that_is_not_square_they_take_two(size):
    height, width = size
    check(Map((Stripes(2, width), Stripes(height, 2)), 1, *size), 0)


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
@pytest.mark.parametrize("parts", [None, (4, 4, 4)])
@pytest.mark.parametrize("count", [2, 3])
def test_every_opset(opset, parts, count):
    stripes = tuple(dataclasses.replace(VERTICAL, axis=3, parts=parts) for _ in range(count))
    check(Map(stripes, 1, 4, 4, opset=opset), count - 1)


@pytest.mark.parametrize("scale", [None, ("Mul", 0.5, False), ("Mul", -2.0, True), ("Div", 4.0, False)])
@pytest.mark.parametrize("place", ["q_scale", "k_before", "k_scale", "scale"])
def test_a_scale_is_kept_wherever_it_is(place, scale):
    stripes = tuple(dataclasses.replace(s, **{"q_scale": None, place: scale}) for s in SQUARE.stripes)
    check(dataclasses.replace(SQUARE, stripes=stripes), 1)


def test_scales_that_are_the_same_in_another_form_are_the_same():
    first = dataclasses.replace(HORIZONTAL, q_scale=("Mul", 0.25, False))
    second = dataclasses.replace(VERTICAL, q_scale=("Mul", 0.5, False), scale=("Div", 2.0, False))
    check(Map((first, second), 1, 4, 4), 1)


@pytest.mark.parametrize(("source", "changes"), [("split", 2), ("same", 2), ("own", 0), ("input", 0)])
def test_they_start_from_one_node(source, changes):
    check(three(source), changes)


def three(source):
    return Map((HORIZONTAL, VERTICAL, dataclasses.replace(VERTICAL, three=True)), 1, 4, 4, source)


@pytest.mark.parametrize("source", ["chain", "next"])
def test_attentions_that_wait_for_each_other_stay_apart(source):
    check(three(source), 0)


def test_attentions_in_a_row_stay_apart():
    check(Map((dataclasses.replace(VERTICAL, d=6), dataclasses.replace(VERTICAL, d=2)), 1, 4, 4, "row"), 0)


def test_four_of_two_kinds_become_two():
    wide = [dataclasses.replace(s, heads=2) for s in SQUARE.stripes]
    after = check(Map((*SQUARE.stripes, *wide), 1, 4, 4), 2)
    assert len(attention_of(after)) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"heads": 2},
        {"heads": 2, "d": 2},
        {"d": 8},
        {"rows": 2, "columns": 2},
        {"rows": 4, "columns": 4},
        {"rows": 1, "columns": 4},
        {"axis": 3},
        {"q_scale": ("Mul", 0.25, False)},
        {"q_scale": None},
        {"mask": True},
        {"mixed": True},
        {"softmax": 2},
    ],
    ids=str,
)
def test_a_near_miss_is_declined(other):
    check(Map((HORIZONTAL, dataclasses.replace(VERTICAL, **other)), 1, 4, 4), 0)


@pytest.mark.parametrize(
    "parts", [{"axis": 3, "parts": (3, 3, 6)}, {"heads": 2, "parts": (4, 1, 1)}], ids=str
)
def test_unequal_parts_are_declined(parts):
    check(Map((dataclasses.replace(VERTICAL, **parts),) * 2, 1, 4, 4), 0)


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"sizes": False, "batch": 2}], ids=str)
def test_another_type_or_a_batch_without_a_number_is_declined(changes):
    check(dataclasses.replace(SQUARE, **changes), 0)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("collapse", [False, True])
def test_a_batch_of_any_size_is_stacked(heads, batch, collapse):
    stripes = tuple(dataclasses.replace(s, heads=heads, axis=3) for s in SQUARE.stripes)
    case = Map((*stripes, stripes[1]), batch, 4, 4)
    proto = of_any_batch(case)
    check(case, 2, rewritten(collapse_chains, proto)[0] if collapse else proto)


@pytest.mark.parametrize("tensor", [*TENSORS, "end0"])
@pytest.mark.parametrize("use", ["reader", "output", "branch"])
def test_what_others_read_is_still_there(tensor, use):
    """Two of three are joined at least."""
    case = dataclasses.replace(SQUARE, stripes=(VERTICAL, HORIZONTAL, VERTICAL))
    case = dataclasses.replace(case, **{use: tensor})
    alone = tensor in ("packed0", "q0", "k0", "v0", "q_scaled0", "kt0", "product0", "weights0")
    alone = alone or tensor in ("cut0", "turned0", "tokens0")
    check(case, 1 if alone else 2)


@pytest.mark.parametrize(("last", "changes"), [("product", 0), ("weights", 0), ("out", 1), ("back", 1)])
@pytest.mark.parametrize("collapse", [False, True])
def test_what_follows_in_a_branch_stays_there(last, changes, collapse):
    proto = Map((VERTICAL, VERTICAL), 1, 4, 4).proto()
    if collapse:  # a Reshape comes first behind the attentions then
        proto, _ = rewritten(collapse_chains, proto)
        last = "out" if last == "back" else last
    proto = put_inside(proto, [f"{last}{i}" for i in range(2)])
    agree_among_moves(stack_attention, proto, {**SQUARE.feeds(), "c": np.array(True)}, changes)


def test_a_shape_that_waits_for_the_other_attention_keeps_them_apart():
    """Joined, each would wait for the other."""
    proto = SQUARE.proto()
    nodes = list(proto.graph.node)
    target = next(n for n in nodes if n.output[0] == "cut1")
    shape = next(i for i in proto.graph.initializer if i.name == target.input[1])
    counted = node("Shape", ["end0"], ["shape0"])
    zero = node("Sub", ["shape0", "shape0"], ["zeros0"])
    first = node("ReduceSum", ["zeros0"], ["zero0"], keepdims=0)
    added = node("Add", [shape.name, "zero0"], ["computed"])
    target.input[1] = "computed"
    place = nodes.index(target)
    nodes[place:place] = [counted, zero, first, added]
    inputs, outputs = list(proto.graph.input), list(proto.graph.output)
    infos = list(proto.graph.value_info)
    proto = model(nodes, inputs, outputs, list(proto.graph.initializer), infer=False)
    proto.graph.value_info.extend(infos)
    agree_among_moves(stack_attention, proto, SQUARE.feeds(), 0)


def test_reshapes_that_are_alike_are_done_once():
    """One Concat of what they start from, one Split of what they end in."""
    same = Map((VERTICAL,) * 3, 1, 4, 4, "same")
    collapsed, _ = rewritten(collapse_chains, same.proto())
    after = check(same, 2, collapsed)
    assert ops(after).count("Reshape") < ops(collapsed).count("Reshape")


# Read by others, these keep an attention as it is; or its moves, so that it starts from one of its own.
KEEP = ("cut", "turned", "tokens", "packed", "q", "k", "v", "q_scaled", "kt", "product", "weights")


def saved(case):
    """How many attentions are to be saved."""
    kinds = []
    for i, s in enumerate(case.stripes):
        padded = case.height % s.rows or case.width % s.columns  # each starts from its own Pad then
        read = case.reader or case.output or case.branch
        if not (s.mask or s.mixed or padded or read in [f"{name}{i}" for name in KEEP]):
            windows = case.height // s.rows * (case.width // s.columns)
            scale = math.prod(factor(each) for each in (s.q_scale, s.k_before, s.k_scale, s.scale))
            kinds.append((windows, s.heads, s.d, s.axis % 4, scale))
    together = case.source in ("split", "same") and case.dtype == "float32"
    return len(kinds) - len(set(kinds)) if together else 0


@settings(RANDOM, max_examples=80)
@given(maps(3))
def test_random_attentions_are_joined_where_the_rule_says_so(case):
    check(case, saved(case))


@settings(RANDOM, max_examples=40)
@given(maps(3))
def test_random_attentions_of_any_batch_are_joined_by_the_same_rule(case):
    check(case, saved(case), of_any_batch(case))


@settings(RANDOM, max_examples=20)
@given(maps(3), st.integers(1, 9))
def test_order_of_nodes_and_names_do_not_matter(case, seed):
    other = dataclasses.replace(case, shuffle=seed, prefix="other/")
    results = [rewritten(stack_attention, each.proto()) for each in (case, other)]
    assert results[0][1] == results[1][1]
    assert sorted(ops(results[0][0])) == sorted(ops(results[1][0]))


# --- as PyTorch writes it ---


@pytest.mark.parametrize(("size", "changes"), [((6, 6), 1), ((6, 8), 0)])
def test_the_two_directions_of_a_cross_shaped_attention(size, changes):
    torch.manual_seed(0)
    module = CrossShapedAttention(8, 2, 2).eval()
    x = torch.randn(2, *size, 8)
    with quiet():
        proto = torch.onnx.export(module, (x,), dynamo=True, opset_version=20, verbose=False).model_proto
    proto, _ = run_passes(proto, ["clean-up", "slices-to-split", "collapse-chains"])
    feeds = {proto.graph.input[0].name: x.numpy()}
    ordered = agree_among_moves(order_tokens, proto, feeds, 1)
    after = agree_among_moves(stack_attention, ordered, feeds, changes)
    assert ops(after).count("Softmax") == 2 - changes
    (actual,) = run(after, **feeds).values()
    with torch.inference_mode():
        expected = module(x).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
