"""Numbers in 8 bits: scales, zero-points, weights, and what is left of a number. Knows numpy alone."""

from __future__ import annotations

from typing import TypeAlias

import ml_dtypes
import numpy as np

from meta_deploy.graph.precision.rules import EightBitRules

Range: TypeAlias = tuple[float, float]  # the least value and the largest, zero among them
_LEAST_SCALE = float(np.finfo(np.float32).tiny)
_LEAST_FLOAT16 = float(np.finfo(np.float16).tiny)  # below it digits are lost, and its inverse nears infinity
_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)
_LARGEST_BIAS = 2.0**30
_COARSE = {"int8": 0.02, "fp8": 0.03}


def scale_of(ends: Range, rules: EightBitRules) -> tuple[np.float32, int]:
    """Scale and zero-point that hold a range: value = (number - zero-point) * scale."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    if rules.signed:
        return np.float32(_held(np.array(max(-low, high) / rules.most), rules)), 0
    steps = rules.most - rules.least
    scale = np.float32(max(high - low, _LEAST_SCALE * steps) / steps)
    return scale, int(np.clip(np.rint(rules.least - low / scale), rules.least, rules.most))


def in_8_bits(values: np.ndarray, rules: EightBitRules, least: int, most: int) -> np.ndarray:
    """Values in units of their scale as the nearest numbers of 8 bits; int8, uint8 or float8."""
    if rules.number == "fp8":
        return np.clip(values, least, most).astype(ml_dtypes.float8_e4m3fn)
    return np.clip(np.rint(values), least, most).astype(np.int8 if least < 0 else np.uint8)


def fake_quantized(values: np.ndarray, ends: Range, rules: EightBitRules) -> np.ndarray:
    """Values as they come back from 8 bits, by QuantizeLinear and DequantizeLinear."""
    scale, zero = scale_of(ends, rules)
    numbers = in_8_bits(
        np.rint(values / scale) + zero if zero else values / scale, rules, rules.least, rules.most
    )
    return (numbers.astype(np.float32) - zero) * scale


def weight_scales(weights: np.ndarray, axis: int, rules: EightBitRules) -> np.ndarray:
    """The scale of each output channel that its largest weight needs, float32 (channels,)."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    return _held(np.abs(weights).max(axis=others, initial=0) / rules.largest_weight, rules)


def scale_and_factors(scales: np.ndarray, rules: EightBitRules) -> tuple[np.ndarray, np.ndarray]:
    """The largest scale, and each channel's share of it: float32 () and (channels,).

    Their product is what the weights are to be quantized by: near `scales`, and at least 2**-14 of the
    largest.
    """
    largest = np.asarray(scales.max())
    return largest, _held(scales / largest, rules)


def one_scale_is_enough(weights: np.ndarray, axis: int, rules: EightBitRules) -> bool:
    """Whether the largest channel's scale holds the weights of all channels well.

    Root mean square over the channels of the relative error: 2 % is what rounding an activation to int8 costs
    where its range is wide, and E4M3 has no less for any scale.
    """
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    scales = np.full(len(rows), weight_scales(weights, axis, rules).max())
    off = rows - quantized_weights(rows, scales, 0, rules).astype(np.float32) * scales[:, None]
    norms = np.maximum(np.linalg.norm(rows, axis=1), _LEAST_SCALE)
    return bool(np.sqrt(np.mean((np.linalg.norm(off, axis=1) / norms) ** 2)) <= _COARSE[rules.number])


def widened_scales(scales: np.ndarray, bias: np.ndarray, input_scale: np.float32) -> np.ndarray:
    """Scales of weights, larger where a bias in units of input scale times theirs would not fit int32."""
    needed = np.abs(bias.astype(np.float64)) / (_LARGEST_BIAS * np.float64(input_scale))
    return np.maximum(scales, needed).astype(np.float32)


def quantized_weights(weights: np.ndarray, scales: np.ndarray, axis: int, rules: EightBitRules) -> np.ndarray:
    """Weights in 8 bits, in units of their channel's scale."""
    shape = [-1 if i == axis else 1 for i in range(weights.ndim)]
    most = rules.largest_weight
    return in_8_bits(weights / scales.reshape(shape), rules, -most, most)


def _held(scales: np.ndarray, rules: EightBitRules) -> np.ndarray:
    """Scales, float32, as the type can hold them that they have in the graph."""
    if rules.rest == "fp16":
        scales = np.clip(scales, _LEAST_FLOAT16, _LARGEST_FLOAT16).astype(np.float16)
    return np.maximum(scales, _LEAST_SCALE).astype(np.float32)
