"""From a histogram to a range: how much of a tensor's values 8 bits should hold. Knows numbers alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from meta_deploy.calib.histogram import Histogram
from meta_deploy.graph.precision.quantize import Range, fake_quantized
from meta_deploy.graph.precision.rules import EightBitRules

SHARE = 0.9999  # of the values that `percentile` holds
_LEAST_KEPT = 0.1  # of the whole range, that `mse` and `entropy` look at
_STEPS = 46
_RARE = 1e-6  # the probability of what is clipped to a value that none had

Method = Callable[[Histogram, Range, EightBitRules], Range]


def minmax(histogram: Histogram, whole: Range, rules: EightBitRules) -> Range:
    """All values."""
    return whole


def percentile(histogram: Histogram, whole: Range, rules: EightBitRules) -> Range:
    """All but the share of `1 - SHARE` that is farthest out, the same on both sides."""
    tail = (1 - SHARE) / 2
    low, high = histogram.quantile(tail) - histogram.width, histogram.quantile(1 - tail)
    return max(whole[0], min(low, 0.0)), min(whole[1], max(high, 0.0))


def mse(histogram: Histogram, whole: Range, rules: EightBitRules) -> Range:
    """The range of the least mean squared difference between values and what 8 bits make of them."""
    centres, counts = histogram.centres, histogram.counts
    seen = counts > 0
    centres, counts = centres[seen], counts[seen]

    def error(low: float, high: float) -> float:
        difference = fake_quantized(centres, (low, high), rules) - centres
        return float(counts @ difference**2)

    low, high = whole
    kept = np.linspace(1, _LEAST_KEPT, _STEPS)
    if rules.signed or low == 0:
        return min(((low * k, high * k) for k in kept), key=lambda ends: error(*ends))
    for _ in range(2):  # one end after the other, and once more
        high = min((whole[1] * k for k in kept), key=lambda end: error(low, end))
        low = min((whole[0] * k for k in kept), key=lambda end: error(end, high))
    return low, high


def entropy(histogram: Histogram, whole: Range, rules: EightBitRules) -> Range:
    """The least Kullback-Leibler divergence of the magnitudes from what 8 bits make of their distribution.

    As in NVIDIA's "8-bit Inference with TensorRT" (Migacz, GTC 2017).
    """
    one_sided = min(-whole[0], whole[1]) == 0 and not rules.signed
    levels = rules.most - rules.least if one_sided else 128
    counts = histogram.magnitudes().astype(np.float64)
    counts = counts[: max(int(np.flatnonzero(counts)[-1]) + 1, levels)] if counts.any() else counts
    best, least = len(counts), np.inf
    for kept in np.unique(np.linspace(max(levels, _LEAST_KEPT * len(counts)), len(counts), 64).astype(int)):
        divergence = _divergence(counts, kept, levels)
        if divergence <= least:
            best, least = kept, divergence
    limit = best * histogram.width
    return max(whole[0], -limit), min(whole[1], limit)


def _divergence(counts: np.ndarray, kept: int, levels: int) -> float:
    """Of clipped counts from the same spread over equal levels."""
    inside = counts[:kept]
    clipped = inside.copy()
    clipped[-1] += counts[kept:].sum()
    starts = np.arange(levels) * kept // levels
    used = np.add.reduceat((inside > 0).astype(np.float64), starts)
    mean = np.add.reduceat(inside, starts) / np.maximum(used, 1)
    spread = np.where(inside > 0, np.repeat(mean, np.diff([*starts, kept])), 0)
    if not spread.sum():
        return np.inf
    some = clipped > 0
    p, q = clipped[some] / clipped.sum(), np.maximum(spread[some] / spread.sum(), _RARE)
    return float(np.sum(p * np.log(p / q)))


METHODS: dict[str, Method] = {"minmax": minmax, "percentile": percentile, "entropy": entropy, "mse": mse}
