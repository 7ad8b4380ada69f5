"""What a target's 8-bit kernels want of a graph. Loads neither onnx nor numpy, as the runtime imports it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EightBitRules:
    """Where QuantizeLinear and DequantizeLinear go for a target, and what they cost there.

    Attributes:
        signed: activations are signed with zero-point 0; otherwise uint8 with any zero-point.
        results: a convolution, and a matrix product that a ReLU follows, runs in 8 bits only if its result is
            quantized too, and nothing reads it in float32.
        biases: a product's bias is int32 in units of input scale times weight scale; otherwise float32.
        speedup: how many multiply-adds an 8-bit product does while one in the rest's precision does one.
        value: the price of quantizing or dequantizing one number, in multiply-adds of the rest's precision.
        node: the price of the nodes that a product gets around it, likewise.
        channels: the least input and output channels of a product.
        number: what 8 bits hold: whole numbers, or floats of 4 bits of exponent and 3 of mantissa (E4M3).
        rest: the type of all else in the graph, which scales have.
        factors: weights are restored by one scale, and a Mul behind the product has each channel's share of
            it; the Mul is left out behind a convolution whose weights one scale holds well. Otherwise they
            are restored by a scale a channel.
        carries: operators that it runs on 8-bit numbers as they are, where DequantizeLinear stands before and
            QuantizeLinear behind them.
    """

    signed: bool
    results: bool
    biases: bool
    speedup: float
    value: float
    node: float
    channels: int = 16
    number: Literal["int8", "fp8"] = "int8"
    rest: Literal["fp32", "fp16"] = "fp32"
    factors: bool = False
    carries: tuple[str, ...] = ()

    @property
    def least(self) -> int:
        """The smallest 8-bit number of an activation."""
        return -self.most if self.signed else 0

    @property
    def most(self) -> int:
        """The largest one."""
        return self.largest_weight if self.signed else 255

    @property
    def largest_weight(self) -> int:
        """The largest 8-bit number of a weight; the smallest is its negative."""
        return 448 if self.number == "fp8" else 127

    def pays(self, macs: float, values: float) -> bool:
        """Whether a product of so many multiply-adds that reads and makes so many numbers gains time."""
        return macs * (1 - 1 / self.speedup) > self.value * values + self.node
