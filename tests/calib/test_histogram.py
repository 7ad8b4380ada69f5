"""A histogram is the same however its numbers come, and methods find the ranges that brute force finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meta_deploy.calib import METHOD_NAMES
from meta_deploy.calib.histogram import BINS, Histogram
from meta_deploy.calib.methods import METHODS, SHARE
from meta_deploy.graph.precision.quantize import fake_quantized, scale_of
from meta_deploy.graph.precision.rules import EightBitRules

UNSIGNED = EightBitRules(False, True, True, speedup=4, value=20, node=1e6)
SIGNED = EightBitRules(True, False, False, speedup=4, value=20, node=1e6)


def histogram_of(*parts):
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def ranges(values, rules=UNSIGNED):
    whole = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    return {name: method(histogram_of(values), whole, rules) for name, method in METHODS.items()}


def test_every_method_but_the_choice_of_one_is_there():
    assert ("auto", *METHODS) == METHOD_NAMES


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.randoms())
def test_parts_and_their_order_do_not_matter(numbers, random):
    numbers = np.array(numbers, np.float32)
    whole = histogram_of(numbers)
    shuffled = numbers.copy()
    random.shuffle(shuffled)
    parts = histogram_of(*np.array_split(shuffled, 3))
    assert whole.limit == parts.limit
    np.testing.assert_array_equal(whole.counts, parts.counts)
    assert whole.counts.sum() == len(numbers)


def test_bins_hold_the_numbers_that_lie_in_them():
    numbers = np.random.default_rng(0).normal(0, 3, 5000).astype(np.float32)
    made = histogram_of(numbers)
    edges = (np.arange(BINS + 1) - BINS // 2) * made.width
    np.testing.assert_array_equal(made.counts, np.histogram(numbers, edges)[0])
    assert made.limit / 2 <= np.abs(numbers).max() < made.limit


def test_the_percentile_leaves_out_the_farthest():
    values = np.random.default_rng(0).normal(0, 1, 200_000)
    values[0] = 1000
    low, high = ranges(values)["percentile"]
    expected = np.quantile(values, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    np.testing.assert_allclose([low, high], expected, atol=2 * 2048 / BINS)


@pytest.mark.parametrize("rules", [UNSIGNED, SIGNED])
def test_mse_beats_the_whole_range_where_there_are_outliers(rules):
    values = np.random.default_rng(0).laplace(0, 1, 100_000)
    found = ranges(values, rules)

    def error(ends):
        return np.mean((fake_quantized(values, ends, rules) - values) ** 2)

    grid = min(error((values.min() * k, values.max() * k)) for k in np.linspace(0.1, 1, 46))
    assert error(found["mse"]) <= 1.02 * grid
    assert error(found["mse"]) < 0.85 * error(found["minmax"])


def test_entropy_clips_a_long_tail_and_keeps_what_has_none():
    generator = np.random.default_rng(0)
    normal = np.abs(generator.normal(0, 1, 200_000))
    normal[:3] = 60
    assert ranges(normal)["entropy"][1] < 20
    flat = generator.uniform(0, 1, 200_000)
    assert ranges(flat)["entropy"][1] > 0.95


@pytest.mark.parametrize("name", METHODS)
def test_what_is_positive_has_all_numbers_above_zero(name):
    """After a softmax: with the zero-point at the least number, no step is lost."""
    values = np.random.default_rng(0).dirichlet(np.ones(16), 4000).ravel()
    low, high = ranges(values)[name]
    assert low == 0
    scale, zero = scale_of((low, high), UNSIGNED)
    assert zero == 0
    assert scale == pytest.approx(high / 255, rel=1e-6)


def test_a_short_negative_side_costs_little():
    """After a GELU, whose values end at -0.17, nearly all steps are for the positive side."""
    x = np.random.default_rng(0).normal(0, 3, 100_000)
    values = x / (1 + np.exp(-1.702 * x))
    low, high = ranges(values)["minmax"]
    scale, zero = scale_of((low, high), UNSIGNED)
    assert 0 < zero < 8
    assert scale < 1.02 * high / 255 + 1e-3
    signed, _ = scale_of((low, high), SIGNED)
    assert scale < 0.55 * signed


@pytest.mark.parametrize("rules", [UNSIGNED, SIGNED])
def test_a_range_comes_back_with_zero_exact(rules):
    for ends in [(-1.5, 6.0), (0.0, 3.0), (-2.0, 0.0), (0.0, 0.0), (0.5, 1.0)]:
        values = np.array([*ends, 0.0, 0.3])
        back = fake_quantized(values, ends, rules)
        scale, _ = scale_of(ends, rules)
        assert back[2] == 0
        if ends[1] > 0.3:
            np.testing.assert_allclose(back, values, atol=0.51 * scale)
