"""Constants in fewer bytes: the same bits out, a smaller file, and nothing else touched."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from meta_deploy.graph.compact import compact
from tests.small_graphs import model, run, value

SHAPE = (32, 64)


def added_to(weights, **more):
    """y = x + weights, exactly weights for x = 0."""
    initializer = numpy_helper.from_array(weights, "weights")
    return model(
        [helper.make_node("Add", ["x", "weights"], ["y"])],
        [value("x", SHAPE)],
        initializers=[initializer],
        **more,
    )


def result(proto):
    return run(proto, x=np.zeros(SHAPE, np.float32))["y"]


@pytest.mark.parametrize(
    "make", [lambda r: r.astype(np.float16).astype(np.float32), lambda r: np.full_like(r, 0.1)]
)
def test_exact_halves_and_single_values_shrink_the_file(make):
    weights = make(np.random.default_rng(0).standard_normal(SHAPE, np.float32))
    proto = added_to(weights)
    before = proto.ByteSize()
    assert compact(proto) == 1
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ByteSize() < before - weights.nbytes / 2 + 300
    np.testing.assert_array_equal(result(proto), weights)
    assert compact(proto) == 0


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_the_bits_stay_whatever_the_values(some, seed):
    """Specials, subnormals and negative zeros among exact halves."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(SHAPE).astype(np.float16).astype(np.float32)
    weights.flat[rng.integers(0, weights.size, len(some))] = some
    proto = added_to(weights)
    compact(proto)
    kept = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    stored = kept.get("weights", kept.get("weights/float16"))
    assert stored.astype(np.float32).tobytes() == weights.tobytes()


@pytest.mark.parametrize("value_of_all", [0.0, -0.0, np.inf, np.nan, 1e-45])
def test_one_value_for_all_keeps_its_sign_and_kind(value_of_all):
    proto = added_to(np.full(SHAPE, value_of_all, np.float32))
    assert compact(proto) == 1
    (node,) = [node for node in proto.graph.node if node.op_type == "ConstantOfShape"]
    stored = numpy_helper.to_array(node.attribute[0].t)
    assert stored.tobytes() == np.float32(value_of_all).tobytes()


def test_small_inexact_and_input_tensors_stay():
    few = model(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [value("x", (3,))],
        initializers=[numpy_helper.from_array(np.ones(3, np.float32), "w")],
    )
    assert compact(few) == 0
    assert compact(added_to(np.random.default_rng(0).standard_normal(SHAPE, np.float32))) == 0
    overridable = added_to(np.ones(SHAPE, np.float32))
    overridable.graph.input.append(value("weights", SHAPE))
    assert compact(overridable) == 0


def test_names_that_are_taken_are_left_alone():
    proto = added_to(np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16).astype(np.float32))
    proto.graph.node.append(helper.make_node("Neg", ["y"], ["weights/float16"]))
    assert compact(proto) == 1
    onnx.checker.check_model(proto, full_check=True)


def test_a_graph_of_before_constantofshape_stays():
    assert compact(added_to(np.ones(SHAPE, np.float32), opset_imports=[helper.make_opsetid("", 8)])) == 0
