"""What a target's 8-bit kernels want of a graph. Loads neither onnx nor numpy, as the runtime imports it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Int8Rules:
    """Where QuantizeLinear and DequantizeLinear go for a target, and what they cost there.

    Attributes:
        signed: activations are int8 with zero-point 0; otherwise uint8 with any zero-point.
        results: a convolution, and a matrix product that a ReLU follows, runs in 8 bits only if its result is
            quantized too, and nothing reads it in float32.
        biases: a product's bias is int32 in units of input scale times weight scale; otherwise float32.
        speedup: how many multiply-adds an 8-bit product does while a float32 one does one.
        value: the price of quantizing or dequantizing one number, in float32 multiply-adds.
        node: the price of the nodes that a product gets around it, likewise.
        channels: the least input and output channels of a product.
    """

    signed: bool
    results: bool
    biases: bool
    speedup: float
    value: float
    node: float
    channels: int = 16

    @property
    def least(self) -> int:
        """The smallest 8-bit number of an activation."""
        return -127 if self.signed else 0

    @property
    def most(self) -> int:
        """The largest one."""
        return 127 if self.signed else 255

    def pays(self, macs: float, values: float) -> bool:
        """Whether a product of so many multiply-adds that reads and makes so many numbers gains time."""
        return macs * (1 - 1 / self.speedup) > self.value * values + self.node
