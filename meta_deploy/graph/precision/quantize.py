"""Numbers in 8 bits: scales, zero-points, weights, and what is left of a number. Knows numpy alone."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from meta_deploy.graph.precision.rules import Int8Rules

Range: TypeAlias = tuple[float, float]  # the least value and the largest, zero among them
_LEAST_SCALE = float(np.finfo(np.float32).tiny)
_LARGEST_BIAS = 2.0**30


def scale_of(ends: Range, rules: Int8Rules) -> tuple[np.float32, int]:
    """Scale and zero-point that hold a range: value = (number - zero-point) * scale."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    if rules.signed:
        return np.float32(max(-low, high, _LEAST_SCALE * rules.most) / rules.most), 0
    steps = rules.most - rules.least
    scale = np.float32(max(high - low, _LEAST_SCALE * steps) / steps)
    return scale, int(np.clip(np.rint(rules.least - low / scale), rules.least, rules.most))


def fake_quantized(values: np.ndarray, ends: Range, rules: Int8Rules) -> np.ndarray:
    """Values as they come back from 8 bits, by QuantizeLinear and DequantizeLinear."""
    scale, zero = scale_of(ends, rules)
    numbers = np.clip(np.rint(values / scale) + zero, rules.least, rules.most)
    return (numbers - zero) * scale


def weight_scales(weights: np.ndarray, axis: int) -> np.ndarray:
    """The scale of each output channel that int8 from -127 to 127 needs, float32 (channels,)."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    return np.maximum(np.abs(weights).max(axis=others, initial=0) / 127, _LEAST_SCALE).astype(np.float32)


def widened_scales(scales: np.ndarray, bias: np.ndarray, input_scale: np.float32) -> np.ndarray:
    """Scales of weights, larger where a bias in units of input scale times theirs would not fit int32."""
    needed = np.abs(bias.astype(np.float64)) / (_LARGEST_BIAS * np.float64(input_scale))
    return np.maximum(scales, needed).astype(np.float32)


def quantized_weights(weights: np.ndarray, scales: np.ndarray, axis: int) -> np.ndarray:
    """Weights as int8 in units of their channel's scale."""
    shape = [-1 if i == axis else 1 for i in range(weights.ndim)]
    return np.clip(np.rint(weights / scales.reshape(shape)), -127, 127).astype(np.int8)
