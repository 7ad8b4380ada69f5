"""transpose_last: the same elements in the same places, cut before they are turned; near-misses stay."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from meta_deploy.graph.explain import explaining
from meta_deploy.graph.graph import BATCH, to_graph
from meta_deploy.graph.passes.collapse_chains import collapse_chains
from meta_deploy.graph.passes.transpose_last import transpose_last
from tests.graph.rewriting import RANDOM, agree, node, ops, rewritten
from tests.small_graphs import any_batch, model, value, without_size

TOKENS = (2, 12, 3)


def moved(shape, *moves, first="Relu", end="Tanh", aside=""):
    """A tensor through moves, permutations (tuples) and shapes (lists), with `aside` read there too."""
    nodes, constants, name = [node(first, ["x"], ["t0"])], [], "t0"
    for i, move in enumerate(moves, 1):
        if isinstance(move, tuple):
            nodes.append(node("Transpose", [name], [f"t{i}"], perm=move))
        else:
            nodes.append(node("Reshape", [name, f"s{i}"], [f"t{i}"]))
            constants.append(numpy_helper.from_array(np.array(move, np.int64), f"s{i}"))
        name = f"t{i}"
    outputs = ["y"]
    nodes.append(node(end, [name], ["y"]))
    if aside:
        nodes.append(node("Neg", [aside], ["aside"]))
        outputs.append("aside")
    return model(nodes, [value("x", list(shape))], outputs, constants)


def test_tokens_are_cut_before_they_are_turned_into_a_map():
    after = agree(transpose_last, moved(TOKENS, (0, 2, 1), [2, 3, 3, 4]), None, 1, tolerance=0)
    assert ops(after) == ["Relu", "Reshape", "Transpose", "Tanh"]
    assert helper.get_attribute_value(after.graph.node[2].attribute[0]) == [0, 3, 1, 2]
    graph = to_graph(after)
    assert collapse_chains(graph) == 0


@pytest.mark.parametrize(
    "proto",
    [
        moved(TOKENS, (0, 2, 1)),
        moved(TOKENS, [2, 3, 4, 3], (0, 3, 1, 2)),  # is so
        moved(TOKENS, (0, 2, 1), [2, 36]),  # merges what was turned
        moved((2, 3, 4, 3), (0, 3, 1, 2), [2, 3, 12]),
        moved(TOKENS, (0, 2, 1), [2, 3, 3, 4], aside="t0"),
        moved(TOKENS, (0, 2, 1), [2, 3, 3, 4], aside="t1"),
        moved(TOKENS, (0, 2, 1), [2, 3, 3, 4], (0, 1, 3, 2)),  # others' affair
        moved(TOKENS, [2, 4, 9], (0, 2, 1), [2, 3, 3, 4]),
    ],
)
def test_near_misses_stay(proto):
    agree(transpose_last, proto, None, 0, tolerance=0)


def test_what_else_reads_the_tokens_is_told():
    with explaining() as reasons:
        rewritten(transpose_last, moved(TOKENS, (0, 2, 1), [2, 3, 3, 4], aside="t0"))
    assert [one.op for one in reasons] == ["Transpose"]


def test_any_batch_and_no_known_size():
    proto = any_batch(moved((BATCH, 12, 3), (0, 2, 1), [BATCH, 3, 3, 4]))
    agree(transpose_last, proto, {"x": np.ones((5, 12, 3), np.float32)}, 1, tolerance=0)
    unknown = without_size(moved(TOKENS, (0, 2, 1), [2, 3, 3, -1]), 1)
    agree(transpose_last, unknown, {"x": np.ones(TOKENS, np.float32)}, 0, tolerance=0)


@st.composite
def pairs(draw):
    shape = draw(st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=1, max_size=4))
    perm = tuple(draw(st.permutations(range(len(shape)))))
    left, target = math.prod(shape), []
    while left > 1 and len(target) < 5:
        target.append(draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
        left //= target[-1]
    return shape, perm, [*target, left]


@settings(RANDOM, max_examples=200)
@given(pairs())
def test_random_pairs_move_elements_to_the_same_places(pair):
    shape, perm, target = pair
    x = np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(shape)
    after = agree(transpose_last, moved(shape, perm, target, end="Abs"), {"x": x}, tolerance=0)
    assert ops(after).count("Transpose") <= 1
    assert ops(after).count("Reshape") <= 1
