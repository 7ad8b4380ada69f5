"""The simulated remedies do what their papers say, on numbers made for them."""

import numpy as np
import pytest
from onnx import helper, numpy_helper

from benchmarks.int8_simulation import (
    Case,
    Rules,
    corrected,
    noisy,
    plain,
    quantized_weights,
    simulated,
    smoothed,
)
from meta_deploy.export.samples import Samples
from tests.small_graphs import model, value

RULES = Rules(False, False, False, speedup=4, value=0, node=0, bits=6)


def case(fit, test, weights, normed=True):
    ranges = {"minmax": (min(float(fit.min()), 0.0), float(fit.max()))}
    return Case(fit, test, weights, ranges, RULES, normed)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_weights_have_as_many_levels_as_bits_let():
    weights = numbers(400, 3)
    for bits in (4, 6, 8):
        found = quantized_weights(weights, bits)
        assert all(len(np.unique(column)) <= 2**bits - 1 for column in found.T)
        np.testing.assert_allclose(found, weights, atol=np.abs(weights).max() / (2 ** (bits - 1) - 1) / 1.99)


def test_smoothing_saves_small_channels_beside_large_ones():
    scale = np.where(np.arange(32) % 8 == 0, 100, 0.1)
    one = case(
        numbers(256, 32) * scale, numbers(256, 32, seed=1) * scale, numbers(32, 8, seed=2) / scale[:, None]
    )
    assert smoothed(one) < 0.3 * plain(one)
    one.normed = False  # nothing takes the division
    assert smoothed(one) == plain(one)


def test_noise_helps_values_that_all_lie_between_two_levels():
    """As after GELU: most lie in the middle of one step, and without noise all of them fall on one side."""
    rows = [np.where(numbers(256, 64, seed=i) > 2.2, 6.3, 0.049) for i in (0, 1)]
    one = case(*rows, np.abs(numbers(64, 8, seed=3)))
    assert noisy(one) < 0.7 * plain(one)


def test_a_mean_that_is_off_is_corrected():
    rows = [np.where(numbers(256, 64, seed=i) > 2.2, 6.3, 0.049) for i in (0, 1)]
    one = case(*rows, np.abs(numbers(64, 8, seed=3)))
    assert corrected(one) < 0.3 * plain(one)


def test_every_way_is_measured_and_fewer_bits_cost_more():
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma"], ["n"]),
        helper.make_node("MatMul", ["n", "w"], ["m"]),
        helper.make_node("Softmax", ["m"], ["s"]),
        helper.make_node("MatMul", ["s", "v"], ["y"]),
    ]
    constants = [("gamma", (16,)), ("w", (16, 24)), ("v", (24, 4))]
    tensors = [
        numpy_helper.from_array(numbers(*shape, seed=i).astype(np.float32), name)
        for i, (name, shape) in enumerate(constants)
    ]
    proto = model(nodes, [value("x", [1, 50, 16])], ["y"], tensors)
    samples = Samples([{"x": numbers(1, 50, 16, seed=i).astype(np.float32)} for i in range(4)])
    eight, six = (
        simulated(
            proto, samples, Rules(False, False, False, speedup=4, value=0, node=0, channels=2, bits=bits)
        )
        for bits in (8, 6)
    )
    assert list(eight)[4:] == ["best range", "bias correction", "smoothing", "NoisyQuant"]
    assert all(0 < eight[name] < 0.4 * six[name] for name in eight)
    assert eight["best range"] <= min(eight[name] for name in list(eight)[:4]) * 1.05
    assert six["minmax"] == pytest.approx(4 * eight["minmax"], rel=0.3)
