"""find_attention: q, k, v and the scale, wherever that is written; what is no attention is not found."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meta_deploy.graph.attention import find_attention
from meta_deploy.graph.graph import to_graph
from tests.graph.attention_maps import SCALES, Map, Stripes, factor
from tests.graph.rewriting import RANDOM

# --- what is found ---


def found(case, i=0):
    """What `find_attention` says of the i-th attention."""
    graph = to_graph(case.proto())
    weights = case.n(f"weights{i}")
    softmax = next(n for n in graph.nodes if n.op == "Softmax" and n.outputs[0].name == weights)
    return find_attention(graph, softmax)


def is_found(case):
    """After asserting that it is, with q, k and v before any scaling and transposing, and the scale."""
    attention, s = found(case), case.stripes[0]
    names = [attention.q.name, attention.k.name, attention.v.name]
    assert names == [case.n(f"{name}0") for name in "qkv"]
    assert attention.last.outputs[0].name == case.n("out0")
    numbers = [factor(scale) for scale in (s.q_scale, s.k_before, s.k_scale, s.scale)]
    assert attention.scale == pytest.approx(math.prod(numbers), rel=1e-6)


@pytest.mark.parametrize("place", ["q_scale", "k_before", "k_scale", "scale"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("three", [False, True])
def test_a_scale_is_found_wherever_it_is(place, scale, three):
    is_found(Map((Stripes(three=three, heads=2, **{"q_scale": None, place: scale}),)))


@pytest.mark.parametrize("place", ["k_before", "scale"])
def test_a_constant_over_something_is_no_scale(place):
    case = Map((Stripes(**{place: ("Div", 0.5, True)}),))
    assert found(case) is None or found(case).k.name == "k_before0"


@pytest.mark.parametrize("tensor", ["kt0", "product0", "weights0", "k_scaled0", "scaled0"])
@pytest.mark.parametrize("use", ["reader", "output", "branch"])
def test_nothing_else_may_read_what_lies_between(tensor, use):
    stripes = Stripes(k_scale=("Mul", 0.5, False), scale=("Mul", 0.5, False))
    assert found(Map((stripes,), **{use: tensor})) is None


@pytest.mark.parametrize("tensor", ["q0", "k0", "v0", "out0"])
@pytest.mark.parametrize("use", ["reader", "output", "branch"])
def test_anything_may_read_q_k_v_and_what_comes_out(tensor, use):
    case = Map((Stripes(q_scale=None, scale=("Mul", 0.5, False)),), **{use: tensor})
    is_found(case)


@pytest.mark.parametrize("place", ["q_scale", "k_before"])
@pytest.mark.parametrize("use", ["reader", "output", "branch"])
def test_what_others_read_scaled_is_q_or_k_as_it_is(place, use):
    tensor = {"q_scale": "q_scaled0", "k_before": "k_before0"}[place]
    case = Map((Stripes(**{"q_scale": None, place: ("Mul", 0.5, False)}),), **{use: tensor})
    attention = found(case)
    assert (attention.q if place == "q_scale" else attention.k).name == tensor
    assert attention.scale == 1


@pytest.mark.parametrize(
    "case",
    [
        Map((Stripes(mask=True),)),
        Map((Stripes(softmax=2),)),
        Map((Stripes(softmax=1),)),
        Map((Stripes(),), dtype="float16"),
        Map((Stripes(),), dtype="float64"),
        Map((Stripes(q_scale=("Mul", math.inf, False)),)),
        Map((Stripes(q_scale=("Mul", math.nan, False)),)),
        Map((Stripes(softmax=None),), opset=11),
        Map((Stripes(),), batch=0),
        Map((Stripes(axis=3, parts=(3, 3, 6)),)),
        Map((Stripes(heads=2, parts=(4, 1, 1)),)),  # one head of keys for all
    ],
    ids=str,
)
def test_what_is_no_such_attention_is_not_found(case):
    assert found(case) is None


def test_zero_is_a_number_like_any_on_q_and_none_to_take_as_the_scale():
    assert found(Map((Stripes(q_scale=("Mul", 0.0, False)),))).q.name == "q_scaled0"
    assert found(Map((Stripes(scale=("Mul", 0.0, False)),))) is None


@settings(RANDOM, max_examples=60)
@given(
    *[st.sampled_from(SCALES)] * 4,
    st.booleans(),
    *[st.integers(1, 3)] * 4,
    st.sampled_from((1, 3, -1)),
    st.sampled_from((13, 17, 18, 20)),
)
def test_any_attention_is_found(q, before, k, scale, three, rows, columns, heads, d, axis, opset):
    stripes = Stripes(
        rows, columns, heads, d, axis, None, q_scale=q, k_before=before, k_scale=k, scale=scale, three=three
    )
    is_found(Map((stripes,), 2, 4, 6, opset=opset))
