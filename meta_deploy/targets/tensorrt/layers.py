"""The layers that an engine consists of, and the JSON in which TensorRT's engine inspector tells of them.

Knows the inspector's fields and TensorRT's names of kernels; must not know where they were read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import msgspec
from msgspec import Struct, field

from meta_deploy.errors import InputError

# TensorRT's names of types, as ours are called.
_TYPES = {"Half": "fp16", "Float": "fp32", "BFloat16": "bf16", "FP8": "fp8", "Int8": "int8"}
_BITS = {"fp4": 4, "int4": 4, "fp8": 8, "int8": 8, "uint8": 8, "bool": 8}
_BITS |= {"fp16": 16, "bf16": 16, "fp32": 32, "int32": 32, "int64": 64}
_IN_WORDS = re.compile(r"\b(FP32|FP16|BF16|FP8|INT8|INT32|INT64|BOOL|UINT8)\b", re.IGNORECASE)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\[ONNX Layer: |[\x1e\x1f]|\s*$)", re.DOTALL)
# Parts of a generated kernel's name that move, cut, join or convert, and compute nothing.
_MOVES = {"Move", "Tran", "Resh", "Cast", "Conc", "Slic", "Repl", "Copy", "Gath", "Pad", "Shuf"}


class LayerTensor(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a layer reads or writes; `words` is where some versions tell type and format in one."""

    name: str = field(name="Name", default="")
    shape: tuple[int, ...] = field(name="Dimensions", default=())
    datatype: str = field(name="Datatype", default="")
    format: str = field(name="Format", default="")
    words: str = field(name="Format/Datatype", default="")

    @property
    def bytes(self) -> int | None:
        """Its size; None where a dimension is open or the type unknown."""
        bits = _BITS.get(self.type)
        if bits is None or min(self.shape, default=0) < 0:
            return None
        return math.ceil(math.prod(self.shape) * bits / 8)

    @property
    def type(self) -> str:
        """Such as fp16; empty where it is not told."""
        if not self.datatype and (found := _IN_WORDS.search(self.words)):
            return found[1].lower()
        name = self.datatype or self.words
        return _TYPES.get(name, name.lower())


class Layer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A step of an engine.

    Attributes:
        name: what the builder calls it.
        kind: its LayerType, such as kgen (a generated kernel), gemm or correlation (a convolution).
        kernel: its TacticName; empty where a library's kernel does it.
        constants: weights among what it reads.
        metadata: the nodes of the graph that are in it, as TensorRT writes them.
    """

    name: str = field(name="Name")
    kind: str = field(name="LayerType", default="")
    inputs: tuple[LayerTensor, ...] = field(name="Inputs", default=())
    constants: tuple[LayerTensor, ...] = field(name="Constants", default=())
    outputs: tuple[LayerTensor, ...] = field(name="Outputs", default=())
    kernel: str = field(name="TacticName", default="")
    metadata: str = field(name="Metadata", default="")

    @property
    def type(self) -> str:
        """Of its first output, such as fp16; empty where it has none."""
        return self.outputs[0].type if self.outputs else ""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the graph's nodes that are computed in it; none where it serves the engine alone."""
        return tuple(dict.fromkeys(_NODE.findall(self.metadata)))

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

    @property
    def eight_bits(self) -> str:
        """int8 or fp8, where it is a product that reads both its sides so; otherwise empty."""
        read = {tensor.type for tensor in self.inputs} & {tensor.type for tensor in self.constants}
        return next((name for name in ("int8", "fp8") if name in read and not self.generated), "")

    @property
    def bytes(self) -> int:
        """That it reads and writes, as far as it is known."""
        return sum(tensor.bytes or 0 for tensor in (*self.inputs, *self.constants, *self.outputs))

    @property
    def macs(self) -> float:
        """Multiply-adds with its weights: a convolution has as many outputs as rows of them, a product of
        matrices as columns.
        """
        weights = max(self.constants, key=lambda tensor: math.prod(tensor.shape), default=None)
        if weights is None or not self.outputs or len(weights.shape) < 2 or self.generated:
            return 0.0
        shape = self.outputs[0].shape
        outputs = weights.shape[0] if len(weights.shape) == len(shape) > 3 else weights.shape[-1]
        return math.prod(shape) * math.prod(weights.shape) / max(outputs, 1)

    @property
    def moves(self) -> bool:
        """It moves or converts elements, and computes none."""
        if self.kind.lower() in ("reformat", "noop", "shuffle"):
            return True
        name = self.kernel.partition("_0x")[0].removeprefix("__myl_")
        return self.generated and set(re.findall(r"[A-Z][a-z]*", name)) <= _MOVES


class _Layers(Struct):
    layers: tuple[Layer | str, ...] = field(name="Layers")


def to_json(layers: Sequence[Layer]) -> bytes:
    """The document that the inspector would give, with the fields that are known here."""
    return msgspec.json.encode(_Layers(tuple(layers)))


def read_json(content: bytes, what: str) -> tuple[Layer, ...]:
    """The layers in a document of the inspector, as `trtexec --exportLayerInfo` also writes.

    Raises:
        InputError: `what` is no such document, or has the layers' names alone.
    """
    try:
        found = msgspec.json.decode(content, type=_Layers).layers
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{what} does not tell an engine's layers; give what trtexec --exportLayerInfo writes"
        ) from error
    layers = tuple(layer for layer in found if isinstance(layer, Layer))
    if len(layers) != len(found):
        raise InputError(
            f"{what} has the layers' names alone; build the engine with detailed profiling verbosity"
        )
    return layers
