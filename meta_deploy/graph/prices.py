"""What nodes cost, to choose between forms of one function. Rough: arithmetic, memory, launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """A machine's prices, in multiply-adds.

    Attributes:
        node: of starting a node.
        value: of moving one number to or from memory.
    """

    node: float
    value: float

    def of(self, macs: float, *shapes: Sequence[int]) -> float:
        """The price of one node: its multiply-adds, and the shapes of all that it reads and writes."""
        return self.node + macs + self.value * sum(math.prod(shape) for shape in shapes)


# Two cores of a server: 100 G multiply-adds and 2.5 G float32 numbers a second, some 5 us to start a node.
CPU = Cost(node=0.5e6, value=40)
# A small GPU in float16: 15 T multiply-adds (a third of its peak), 250 G numbers a second, 2.5 us a kernel.
GPU = Cost(node=40e6, value=60)
