"""What an engine consists of, read from the log of its build: without a GPU there is no inspector to ask.

Knows the log's text, all of it in this one place; must not know how an engine is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Of the log's Datatype, as ours are called.
_TYPES = {"Half": "fp16", "Float": "fp32", "BFloat16": "bf16", "FP8": "fp8", "Int8": "int8"}


@dataclass(frozen=True)
class Layer:
    """A step of an engine.

    Attributes:
        name: what the builder calls it.
        kind: its LayerType, such as kgen (a generated kernel), gemm or correlation (a convolution).
        kernel: its TacticName; empty where a library's kernel does it.
        type: of its first output, such as fp16; empty where it has none.
    """

    name: str
    kind: str
    kernel: str
    type: str = ""

    @property
    def synchronizes(self) -> bool:
        """One stream waits for another; nothing is computed."""
        return self.kind.startswith(("signal", "wait"))

    @property
    def generated(self) -> bool:
        """A kernel made for this graph's elementwise and moving operators, bound by memory's speed.

        Matrix products and convolutions with something after them have such names too, but no such kernel.
        """
        return self.kernel.startswith("__myl_")

    @property
    def attention(self) -> bool:
        """Both matrix products and the softmax between in one kernel."""
        return self.kernel.startswith("_gemm_mha")


def parse_log(lines: Iterable[str]) -> tuple[tuple[Layer, ...], dict[str, float]]:
    """The layers and the memory in MB (Activation, Weights) that a verbose build's log tells.

    The layers are one message, a line each; memory is a line for each kind. The last of each counts. Empty
    where it does not tell, as it may be in another version of TensorRT.
    """
    layers: tuple[Layer, ...] = ()
    memory: dict[str, float] = {}
    for line in lines:
        if line.startswith("Layers:"):
            layers = tuple(map(_layer, re.findall(r"^Name: .*$", line, re.MULTILINE)))
        elif found := re.match(r"Total (Activation|Weights) Memory: (\d+) bytes", line):
            memory[found[1]] = int(found[2]) / 1e6
    return layers, memory


def _layer(line: str) -> Layer:
    fields = (re.search(pattern, line) for pattern in (r"^Name: ([^,]*)", r"LayerType: ([^,]*)"))
    name, kind = (found[1] if found else "" for found in fields)
    made = re.search(r"Outputs: \[.*?Datatype: (\w+)", line)
    # Behind inputs and outputs, among whose names there may be anything.
    kernel = re.search(r".*TacticName: ([^,]*)", line)
    return Layer(
        name, kind, kernel[1].strip() if kernel else "", _TYPES.get(made[1], made[1].lower()) if made else ""
    )
