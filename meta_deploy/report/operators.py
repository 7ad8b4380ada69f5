"""What an operator is for and what it has to do: its class, and bytes and FLOPs from the shapes it ran on.

Knows ONNX's operators and ONNX Runtime's own; must not know how long anything takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import onnx

from meta_deploy.graph import traffic
from meta_deploy.graph.graph import bodies
from meta_deploy.report.schema import Cost, OperatorClass

_OPS: dict[OperatorClass, tuple[str, ...]] = {
    "convolution": (
        *("Conv", "FusedConv", "NhwcConv", "NhwcFusedConv", "ConvTranspose", "QLinearConv", "ConvInteger"),
        *("QLinearConvTranspose", "DeformConv"),
    ),
    "matrix product": (
        *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "FusedMatMulActivation", "MatMulInteger"),
        *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulNBits"),
        *("TransposeMatMul", "Einsum"),
    ),
    "attention": (
        *("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "PackedAttention"),
        *("PackedMultiHeadAttention", "DecoderMaskedMultiHeadAttention"),
    ),
    "normalization": (
        *traffic.NORMS,
        *("SkipLayerNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
        *("SkipGroupNorm", "GroupNorm", "LRN", "QLinearLayerNormalization"),
    ),
    "data movement": (
        *traffic.RENAMES,
        *traffic.READ_FIRST,
        *traffic.READ_ALL,
        *traffic.READ_WHAT_THEY_WRITE,
        *traffic.READ_WHAT_THEY_WRITE_AND_INDICES,
        *("ReorderInput", "ReorderOutput", "Cast", "Shape", "Size", "ConstantOfShape", "Range", "Constant"),
        *("SpaceToBatch", "MemcpyFromHost", "MemcpyToHost", "Scatter", "EyeLike", "CenterCropPad"),
    ),
    "resize": ("Resize", "Upsample", "GridSample", "AffineGrid"),
    "post-processing": (
        *("NonMaxSuppression", "RoiAlign", "MaxRoiPool", "TopK", "NonZero", "Unique", "Compress"),
        *("ArgMax", "ArgMin", "OneHot"),
    ),
    "element-wise": (
        *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Neg", "Abs", "Sqrt", "Exp", "Log", "Sum", "Mean"),
        *("Max", "Min", "Clip", "Reciprocal", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Erf"),
        *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Mish"),
        *("Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Tanh", "Softplus", "Softsign", "QuickGelu"),
        *("Where", "Not", "And", "Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        *("IsNaN", "IsInf", "Softmax", "LogSoftmax", "BiasSoftmax", "CumSum"),
        *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
        *("ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"),
        *("Subgraph", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool"),
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
        *("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax"),
    ),
}
_CLASS_OF: dict[str, OperatorClass] = {op: name for name, ops in _OPS.items() for op in ops}
_PRODUCTS = ("MatMul", "FusedMatMul", "TransposeMatMul", "Gemm", "MatMulInteger", "QLinearMatMul")
_SOFTMAXES = ("Softmax", "BiasSoftmax", "QLinearSoftmax")
_BETWEEN = 8  # nodes, of scales, masks and moves, between an attention's products and its softmax
_CONTROL = ("Loop", "If", "Scan", "SequenceMap")  # what is in them is counted by itself
_ITEM_SIZES = {"float": 4, "double": 8, "float16": 2, "bfloat16": 2, "bool": 1}


@dataclass(frozen=True)
class Tensor:
    """A tensor that went in or came out: its type by ONNX Runtime's name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int | None:
        """None for text."""
        digits = self.dtype.removeprefix("u").removeprefix("int")
        if digits.isdecimal():
            return math.ceil(self.size * int(digits) / 8)
        each = _ITEM_SIZES.get(self.dtype)
        return None if each is None else self.size * each

    def __str__(self) -> str:
        return f"{self.dtype} {'x'.join(map(str, self.shape)) or 'scalar'}"


class Call(NamedTuple):
    """An operator with what it ran on; an input is None where the node leaves it out."""

    op: str
    inputs: Sequence[Tensor | None]
    outputs: Sequence[Tensor]
    attributes: Mapping[str, Any]


def class_of(op: str) -> OperatorClass:
    """The class of an operator by itself."""
    return _CLASS_OF.get(op, "other")


def classes(graph: onnx.GraphProto) -> dict[str, OperatorClass]:
    """The class of each node, by name. An attention that is written out is one, with all that is in it."""
    found: dict[str, OperatorClass] = {}
    for node in graph.node:
        found[node.name] = class_of(node.op_type)
        for body in bodies(node):
            found |= classes(body)
    for attention in written_out(graph):
        found |= dict.fromkeys((node.name for node in attention.nodes), "attention")  # type: ignore[arg-type]
    return found


class WrittenOut(NamedTuple):
    """softmax(q k^T) v: its softmax, and the nodes on the way to its products, which are the last of each."""

    softmax: onnx.NodeProto
    above: list[onnx.NodeProto]
    below: list[onnx.NodeProto]

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        return [self.softmax, *self.above, *self.below]


def written_out(graph: onnx.GraphProto) -> list[WrittenOut]:
    """The attentions that are written out in operators."""
    makers = {output: node for node in graph.node for output in node.output if output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for softmax in graph.node:
        if softmax.op_type not in _SOFTMAXES:
            continue
        above = _path(softmax, lambda node: makers.get(node.input[0]))
        below = _path(softmax, lambda node: _only(readers.get(node.output[0], [])))
        if above and below:
            found.append(WrittenOut(softmax, above, below))
    return found


def _path(
    start: onnx.NodeProto, step: Callable[[onnx.NodeProto], onnx.NodeProto | None]
) -> list[onnx.NodeProto]:
    """The nodes from `start` to the next product, that included; none where something else is on the way."""
    path: list[onnx.NodeProto] = []
    node = step(start)
    while node is not None and len(path) < _BETWEEN:
        path.append(node)
        if node.op_type in _PRODUCTS:
            return path
        if _CLASS_OF.get(node.op_type) not in ("element-wise", "data movement") or not node.input:
            return []
        node = step(node)
    return []


def _only(nodes: list[onnx.NodeProto]) -> onnx.NodeProto | None:
    return nodes[0] if len(nodes) == 1 else None


# --- cost ---------------------------------------------------------------------------------------------------


def cost(call: Call) -> Cost:
    """Bytes and FLOPs of one call.

    Inputs are read whole and outputs written once, except that Slice, Split and the gathers read what they
    write (and indices), and Reshape and its like touch nothing.

    FLOPs are those of the definition: two for each multiplication and addition of a product or convolution,
    padding included, and one for each bias; one for each element that an element-wise operator writes and a
    reduction reads; five for each element of a softmax (maximum, difference, exponential, sum, quotient),
    seven of a layer norm (sum, difference, square, sum, quotient, scale, shift), two of a batch norm.
    Comparisons in sorts and searches are not counted.
    """
    if call.op in _CONTROL:
        return Cost(bytes_read=None, bytes_written=None, flops=None)
    read, written = _touched(call)
    return Cost(bytes_read=_total(read), bytes_written=_total(written), flops=_flops(call))


def _touched(call: Call) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The tensors that are read, and those that are written."""
    given = [tensor for tensor in call.inputs if tensor is not None]
    if call.op in (*traffic.RENAMES, "Constant"):
        return [], []
    if call.op in ("Shape", "Size", "ConstantOfShape", "Range"):
        return [], call.outputs
    if call.op in traffic.READ_FIRST:
        return given[:1], call.outputs
    if call.op in traffic.READ_WHAT_THEY_WRITE:
        return call.outputs, call.outputs
    if call.op in traffic.READ_WHAT_THEY_WRITE_AND_INDICES:
        return [*call.outputs, given[1]], call.outputs
    return given, call.outputs


def _total(tensors: Sequence[Tensor]) -> int | None:
    sizes = [tensor.bytes for tensor in tensors]
    return None if None in sizes else sum(filter(None, sizes))


def _flops(call: Call) -> int | None:
    """None where shapes and attributes do not tell."""
    kind, out = _CLASS_OF.get(call.op), call.outputs[0].size if call.outputs else 0
    if call.op in _SPECIAL:
        try:
            return _SPECIAL[call.op](call)
        except (IndexError, AttributeError, KeyError, ValueError):  # not the inputs that it should have
            return None
    if kind in ("data movement", "post-processing"):
        return 0
    if kind != "element-wise":
        return None
    if call.op == "Subgraph":  # OpenVINO's, of any number of element-wise operators
        return None
    if call.op.startswith("Reduce"):
        return _input(call, 0).size
    if call.op in ("Sum", "Max", "Min", "Mean"):
        return (len(call.inputs) - 1) * out
    return out


def _input(call: Call, index: int) -> Tensor:
    """Raises AttributeError or IndexError where it is left out."""
    tensor = call.inputs[index]
    if tensor is None:
        raise AttributeError(index)
    return tensor


def _has(call: Call, index: int) -> bool:
    return len(call.inputs) > index and call.inputs[index] is not None


def _extra(call: Call, *adds: int) -> int:
    """What is added to each element of the first output: optional inputs, and a fused activation."""
    return sum(_has(call, index) for index in adds) + bool(call.attributes.get("activation"))


def _conv(call: Call) -> int:
    """x, weights (M, C/g, k, …), bias, and in ONNX Runtime's a tensor that is added."""
    out = call.outputs[0].size
    return out * (2 * math.prod(_input(call, 1).shape[1:]) + _extra(call, 2, 3))


def _conv_transpose(call: Call) -> int:
    """x, weights (C, M/g, k, …), bias."""
    products = 2 * _input(call, 0).size * math.prod(_input(call, 1).shape[1:])
    return products + call.outputs[0].size * _extra(call, 2)


def _conv_quantized(call: Call) -> int:
    """x, its scale and zero point, weights (M, C/g, k, …), …; the bias is the ninth."""
    return call.outputs[0].size * (2 * math.prod(_input(call, 3).shape[1:]) + _extra(call, 8))


def _product(call: Call) -> int:
    """a (…, M, K) and b (…, K, N), a transposed where the attribute says so; then perhaps what is added."""
    a = _input(call, 0)
    inner = a.shape[-2 if call.attributes.get("transA") else -1]
    added = _extra(call, 2) if call.op in ("Gemm", "FusedGemm") else 0
    return call.outputs[0].size * (2 * inner + added)


def _attention(call: Call) -> int:
    """q (B, N, C), k (B, L, C) and v (B, L, D), or with heads (B, h, N, d); or q packed: (B, N, h, 3, d)."""
    if call.op == "Attention" and "num_heads" in call.attributes:  # ONNX Runtime's, with projections
        x, weights = _input(call, 0), _input(call, 1)
        batch, tokens, _ = x.shape
        width, _, values = call.attributes.get("qkv_hidden_sizes") or [weights.shape[1] // 3] * 3
        heads = call.attributes["num_heads"]
        projections = batch * tokens * weights.shape[1] * (2 * weights.shape[0] + _has(call, 2))
        return projections + _softmax_products(batch, heads, tokens, tokens, width, values)
    q = _input(call, 0)
    heads = call.attributes.get("num_heads") or call.attributes.get("q_num_heads")
    if len(q.shape) == 5:
        batch, tokens, heads, _, each = q.shape
        return _softmax_products(batch, heads, tokens, tokens, heads * each, heads * each)
    k, v = _input(call, 1), _input(call, 2)
    if len(q.shape) == 4:
        batch, heads, tokens, each = q.shape
        # k may come with its last two axes swapped, as OpenVINO has it
        return _softmax_products(batch, heads, tokens, v.shape[2], heads * each, heads * v.shape[3])
    batch, tokens, width = q.shape
    keys = k.shape[-2]
    values = v.shape[-1] * (v.shape[1] if len(v.shape) == 4 else 1)
    return _softmax_products(batch, int(heads or 0), tokens, keys, width, values)


def _softmax_products(batch: int, heads: int, tokens: int, keys: int, width: int, values: int) -> int:
    """Both products and the softmax; the scale is one more for each product of a query and a key."""
    return batch * tokens * keys * (2 * width + 2 * values + 6 * heads)


def _pool(call: Call) -> int:
    return call.outputs[0].size * math.prod(call.attributes["kernel_shape"])


def _resize(call: Call) -> int | None:
    """Linear: weights by products over the axes that change, 2^n products and their sum."""
    mode = call.attributes.get("mode", "nearest")
    if mode == "nearest":
        return 0
    before, after = _input(call, 0).shape, call.outputs[0].shape
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    taps = {"linear": 2, "cubic": 4}.get(mode)
    return None if taps is None else call.outputs[0].size * (2 * taps**changed - 1) * bool(changed)


def _each(flops: int, bias: int | None = None, biased: int = 0) -> Callable[[Call], int]:
    """So many for each element of the first input, and `biased` more with the optional input `bias`."""
    return lambda call: (
        _input(call, 0).size * (flops + (biased if bias is not None and _has(call, bias) else 0))
    )


_SPECIAL: Mapping[str, Callable[[Call], int | None]] = {
    **dict.fromkeys(("Conv", "FusedConv", "NhwcConv", "NhwcFusedConv", "ConvInteger"), _conv),
    "ConvTranspose": _conv_transpose,
    "QLinearConv": _conv_quantized,
    **dict.fromkeys(
        (
            *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "FusedMatMulActivation", "MatMulInteger"),
            *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "TransposeMatMul"),
        ),
        _product,
    ),
    **dict.fromkeys(("Attention", "MultiHeadAttention"), _attention),
    **dict.fromkeys(("Softmax", "LogSoftmax", "BiasSoftmax"), _each(5)),
    **dict.fromkeys(("LayerNormalization", "InstanceNormalization", "GroupNormalization"), _each(6, 2, 1)),
    "SkipLayerNormalization": _each(7, 3, 1),
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization"), _each(4)),
    "SkipSimplifiedLayerNormalization": _each(5),
    "BatchNormalization": _each(2),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _each(2)),
    **dict.fromkeys(("MaxPool", "AveragePool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _each(1)),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
}
