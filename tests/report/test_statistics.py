"""What times say, on times made up here, so that what is true of them is known."""

import numpy as np
import pytest

from meta_deploy.report.statistics import LEAST_ROUNDS, compare, drift, spread


def rounds(generator, count, entries=2, load=0.0):
    """Times of equal entries: skewed noise of each, and other work that slows down rounds in a row."""
    noise = generator.gamma(2, 0.05, (entries, count))
    busy = np.zeros(count)
    for i in range(1, count):
        busy[i] = 0.8 * busy[i - 1] + load * generator.exponential()
    return 20 * (1 + noise + busy)


@pytest.mark.parametrize("count", [LEAST_ROUNDS, 60])
@pytest.mark.parametrize("load", [0.0, 0.2])
def test_equal_entries_show_no_difference_in_at_least_19_of_20_runs(count, load):
    generator = np.random.default_rng(count)
    runs = [compare(*rounds(generator, count, load=load)).verdict for _ in range(100)]
    assert runs.count("no difference") >= 95


def test_noise_that_lasts_for_rounds_does_not_make_a_difference():
    generator = np.random.default_rng(1)
    same = 0
    for _ in range(100):
        slow = np.repeat(generator.normal(0, 0.1, (2, 20)), 2, axis=1)  # of each entry alone
        times = 20 * np.exp(slow + generator.normal(0, 0.02, slow.shape))
        same += compare(*times).verdict == "no difference"
    assert same >= 95


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "faster"), (1.1, "slower")])
def test_a_tenth_is_seen_through_load_that_is_larger(factor, verdict):
    one, other = rounds(np.random.default_rng(2), 60, load=0.3)
    found = compare(factor * one, other)
    assert found.verdict == verdict
    assert found.low <= factor <= found.high


def test_the_ratio_is_of_times_of_one_round():
    sizes = np.array([1.0, 5, 25] * 5)  # images of very different sizes
    found = compare(2 * sizes, sizes)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))


def test_the_same_times_give_the_same_interval():
    times = rounds(np.random.default_rng(3), 30)
    assert compare(*times) == compare(*times)


def test_the_spread_is_of_percentiles():
    found = spread(np.arange(101.0))
    assert (found.median, found.p5, found.p90, found.p99) == (50, 5, 90, 99)


def test_drift_is_the_last_third_over_the_first():
    assert drift(np.array([1.0, 1, 9, 9, 2, 2]), 1) == 2
    assert drift(np.ones(10), 1) == 1


def test_images_that_take_longer_are_no_drift():
    images = np.array([1.0, 5, 9, 20])
    assert drift(np.resize(images, 30), 4) == 1
    assert drift(np.resize(images, 30) * np.repeat([1, 1, 1.2], 10), 4) == pytest.approx(1.2)
    assert drift(np.arange(1.0, 13), 12) == 1  # each but once: it cannot be told
