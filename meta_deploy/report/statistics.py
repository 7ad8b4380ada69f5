"""What rounds of times say: their spread, a ratio with its confidence interval, and whether they drift.

Knows arrays of times; must not know what took them.
"""

from __future__ import annotations

import numpy as np

from meta_deploy.report.schema import Ratio, Spread, Verdict

CONFIDENCE = 0.99
LEAST_ROUNDS = 20  # with fewer, the intervals that come out are too narrow
_RESAMPLES = 2000


def spread(times: np.ndarray) -> Spread:
    """Median and percentiles of times (rounds,)."""
    median, p5, p90, p99 = np.percentile(times, (50, 5, 90, 99)).tolist()
    return Spread(median=median, p5=p5, p90=p90, p99=p99)


def compare(times: np.ndarray, base: np.ndarray) -> Ratio:
    """`times` relative to `base`, both (rounds,), of which each round was taken at one time.

    The ratio is the median of the rounds' ratios, so that what slows down a round, a large image or other
    work on the machine, changes both sides. Its interval is a percentile bootstrap over circular blocks of
    rounds (Politis and Romano, 1992), as neighbouring rounds are not independent; it is widened by as much
    as blocks of this length make a variance too small.
    """
    ratios = np.log(times) - np.log(base)
    count = len(ratios)
    block = round(count ** (1 / 3))
    generator = np.random.default_rng(0)  # the same times give the same interval
    starts = generator.integers(0, count, (_RESAMPLES, -(-count // block), 1))
    chosen = ((starts + np.arange(block)) % count).reshape(_RESAMPLES, -1)[:, :count]
    middle = np.median(ratios)
    spreads = (np.median(ratios[chosen], axis=1) - middle) * (count / (count - block)) ** 0.5
    tail = 100 * (1 - CONFIDENCE) / 2
    value, low, high = np.exp([middle, *(middle + np.percentile(spreads, (tail, 100 - tail)))]).tolist()
    return Ratio(value=value, low=low, high=high, verdict=_verdict(low, high))


def _verdict(low: float, high: float) -> Verdict:
    if low <= 1 <= high:
        return "no difference"
    return "faster" if high < 1 else "slower"


def drift(times: np.ndarray, images: int) -> float:
    """The median of the last third of the rounds over that of the first third.

    Args:
        times: (rounds,), of which each was taken on the next of so many images, and after the last on the
            first again. A round counts by its image's median, as images differ.
    """
    places = np.arange(len(times)) % images
    usual = np.array([np.median(times[places == place]) for place in places])
    third = max(1, len(times) // 3)
    return float(np.median((times / usual)[-third:]) / np.median((times / usual)[:third]))
