"""share_norms: one norm of a tensor is left where that is exact, outputs as before; near-misses declined."""

import dataclasses
import functools

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.export.trace import quiet
from meta_deploy.graph.graph import to_graph, to_proto
from meta_deploy.graph.passes.fuse_layer_norm import fuse_layer_norm
from meta_deploy.graph.passes.share_norms import share_norms
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.models.backbones.mea import MEABlock
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, Writer, node, ops, same
from tests.small_graphs import calls, model, run, value
from tests.tiny_models import exported, pictures

C, OUT = 8, 4

# What may read a norm. Linear over the channels, whatever the shift between two norms:
SHIFTED = ("matmul", "matmul bias", "bias matmul", "shared", "conv1", "conv1 same", "conv3", "conv3 valid")
SHIFTED += ("strided", "grouped", "depthwise", "conv add", "moved matmul", "two convs")
# only where there is none, as the padding would get it, too:
PADDED = ("padded", "padded1", "same", "grouped padded", "transposed", "transposed grouped")
# and never:
OTHER = (
    "relu",
    "add",
    "matmul left",
    "computed weight",
    "other axis",
    "reshape",
    "two moves",
    "moved output",
)
OTHER += ("moved relu", "output", "branch", "1d conv")


@dataclasses.dataclass(frozen=True)
class Norm:
    """One LayerNormalization of x (B, H, W, C) and what reads it.

    `scale` and `bias` are (low, high) of random numbers, a number, or for the bias None; a scale may be an
    "input".
    """

    readers: tuple = ("matmul bias",)
    scale: object = (0.5, 2.0)
    bias: object = (-1.0, 1.0)
    like: int | None = None  # with the same constants as the norm of that index
    ratio: float = 1.0  # or that many times those
    at: dict = dataclasses.field(default_factory=dict)  # scale of single channels
    attrs: dict = dataclasses.field(default_factory=dict)
    of: str = "x"
    second: bool = False  # has the mean as an output as well
    whole: bool = False  # scale and bias of shape (1, 1, 1, C)


@dataclasses.dataclass(frozen=True)
class Norms:
    norms: tuple
    shape: tuple = (2, 3, 5, C)
    sizes: tuple | None = None
    opset: int = 18
    dtype: str = "float32"
    prefix: str = ""
    shuffle: int = 0
    seed: int = 0

    def n(self, name):
        return self.prefix + name

    def proto(self):
        return Builder(self).proto()

    def feeds(self):
        rng = np.random.default_rng(self.seed + 1)
        x = rng.standard_normal(self.sizes or self.shape) * 2 + 0.5
        feeds = {self.prefix + "x": x.astype(self.dtype)}
        if any("branch" in norm.readers for norm in self.norms):
            feeds[self.prefix + "c"] = np.array(True)
        if any(norm.scale == "input" for norm in self.norms):
            feeds[self.prefix + "g"] = rng.uniform(0.5, 2, C).astype(self.dtype)
        return feeds


class Builder(Writer):
    def __init__(self, case):
        super().__init__(case, case.seed)
        self.outputs = []

    def weight(self, name, *shape):
        return self.constant(name, self.rng.standard_normal(shape) / 3)

    def proto(self):
        case, n = self.case, self.n
        pairs = []
        self.add("Identity", [n("x")], "h")
        self.add("Neg", [n("h")], "z")
        self.shared = self.weight("shared", C, OUT)
        self.outputs.append(self.add("MatMul", [n("x"), self.shared], "other"))
        for i, norm in enumerate(case.norms):
            pairs.append(self.affine(norm, pairs))
            scale = n("g") if norm.scale == "input" else self.constant(f"g{i}", pairs[-1][0])
            inputs = [n("h") if norm.of == "x" else n("z"), scale]
            if pairs[-1][1] is not None:
                inputs.append(self.constant(f"b{i}", pairs[-1][1]))
            attrs = {"axis": -1, "epsilon": 1e-6} | norm.attrs
            names = [n(f"y{i}"), *([n(f"mean{i}")] if norm.second else [])]
            self.nodes.append(node("LayerNormalization", inputs, names, **attrs))
            self.outputs += names[1:]
            for j, reader in enumerate(norm.readers):
                self.read(reader, n(f"y{i}"), f"r{i}_{j}")
        self.input("x", case.shape)
        if any("branch" in norm.readers for norm in case.norms):
            self.input("c", [], TensorProto.BOOL)
        if any(norm.scale == "input" for norm in case.norms):
            self.input("g", [C])
        return self.model(self.outputs, shuffle=case.shuffle)

    def affine(self, norm, pairs):
        if norm.like is not None:
            scale, bias = pairs[norm.like]
            return scale * norm.ratio, None if bias is None else bias * norm.ratio
        scale, bias = self.numbers(norm.scale), self.numbers(norm.bias)
        for channel, number in norm.at.items():
            scale[channel] = number
        shape = (1, 1, 1, C) if norm.whole else (C,)
        return tuple(v.reshape(shape) if isinstance(v, np.ndarray) else v for v in (scale, bias))

    def numbers(self, kind):
        """What the graph will hold, in float64."""
        if kind is None or kind == "input":
            return kind
        values = self.rng.uniform(*kind, C) if isinstance(kind, tuple) else np.full(C, kind)
        return values.astype(self.case.dtype).astype(np.float64)

    def read(self, reader, y, out):
        getattr(self, "_" + reader.replace(" ", "_"))(y, out)

    def end(self, tensor):
        self.outputs.append(self.add("Neg", [tensor], f"{tensor.removeprefix(self.case.prefix)}_end"))

    def moved(self, y, out, perm=(0, 3, 1, 2)):
        return self.add("Transpose", [y], f"{out}_moved", perm=perm)

    def conv(self, y, out, size, op="Conv", bias=True, width=None, shape=None, **attrs):
        shape = shape or (OUT, (width or C), size, size)
        inputs = [self.moved(y, out), self.weight(f"{out}_w", *shape)]
        inputs += [self.weight(f"{out}_b", attrs.pop("channels", OUT))] if bias else []
        attrs.pop("channels", None)
        return self.add(op, inputs, out, **attrs)

    # --- readers ---

    def _matmul(self, y, out):
        self.end(self.add("MatMul", [y, self.weight(f"{out}_w", C, OUT)], out))

    def _gemm(self, y, out):
        self.end(self.add("Gemm", [y, self.weight(f"{out}_w", C, OUT)], out))

    def _gemm_bias(self, y, out):
        weights = [self.weight(f"{out}_w", OUT, C), self.weight(f"{out}_b", 1, OUT)]
        self.end(self.add("Gemm", [y, *weights], out, transB=1))

    def _gemm_alpha(self, y, out):
        self.end(self.add("Gemm", [y, self.weight(f"{out}_w", C, OUT)], out, alpha=2.0))

    def _gemm_rows(self, y, out):
        weights = [self.weight(f"{out}_w", C, OUT), self.weight(f"{out}_b", self.case.shape[0], 1)]
        self.end(self.add("Gemm", [y, *weights], out))

    def _matmul_bias(self, y, out):
        product = self.add("MatMul", [y, self.weight(f"{out}_w", C, OUT)], f"{out}_p")
        self.end(self.add("Add", [product, self.weight(f"{out}_b", OUT)], out))

    def _bias_matmul(self, y, out):
        product = self.add("MatMul", [y, self.weight(f"{out}_w", C, OUT)], f"{out}_p")
        self.end(self.add("Add", [self.weight(f"{out}_b", 1, OUT), product], out))

    def _shared(self, y, out):
        self.outputs.append(self.add("MatMul", [y, self.shared], out))

    def _conv1(self, y, out):
        self.end(self.conv(y, out, 1))

    def _conv1_same(self, y, out):
        self.end(self.conv(y, out, 1, auto_pad="SAME_UPPER", strides=[2, 2]))

    def _conv3(self, y, out):
        self.end(self.conv(y, out, 3, bias=False))

    def _conv3_valid(self, y, out):
        self.end(self.conv(y, out, 3, auto_pad="VALID", dilations=[1, 2]))

    def _strided(self, y, out):
        self.end(self.conv(y, out, 2, strides=[2, 1], pads=[0, 0, 0, 0]))

    def _grouped(self, y, out):
        self.end(self.conv(y, out, 3, width=C // 2, group=2))

    def _depthwise(self, y, out):
        self.end(self.conv(y, out, 2, shape=(2 * C, 1, 2, 2), group=C, channels=2 * C))

    def _conv_add(self, y, out):
        product = self.conv(y, f"{out}_p", 1, bias=False)
        self.end(self.add("Add", [product, self.weight(f"{out}_b", 1, OUT, 1, 1)], out))

    def _moved_matmul(self, y, out):
        moved = self.moved(y, out, (0, 2, 1, 3))
        self.end(self.add("MatMul", [moved, self.weight(f"{out}_w", C, OUT)], out))

    def _two_convs(self, y, out):
        moved = self.moved(y, out)
        for i in range(2):
            weight = self.weight(f"{out}_w{i}", OUT, C, 1 + i, 1)
            self.end(self.add("Conv", [moved, weight], f"{out}_{i}"))

    def _padded(self, y, out):
        self.end(self.conv(y, out, 3, pads=[1, 1, 1, 1]))

    def _padded1(self, y, out):
        self.end(self.conv(y, out, 1, pads=[0, 0, 0, 1]))

    def _same(self, y, out):
        self.end(self.conv(y, out, 2, auto_pad="SAME_LOWER"))

    def _grouped_padded(self, y, out):
        self.end(self.conv(y, out, 3, width=2, group=4, pads=[0, 1, 0, 0], bias=False))

    def _transposed(self, y, out):
        self.end(self.conv(y, out, 2, "ConvTranspose", shape=(C, OUT, 2, 2), strides=[2, 2]))

    def _transposed_grouped(self, y, out):
        self.end(self.conv(y, out, 3, "ConvTranspose", shape=(C, OUT // 2, 3, 3), group=2))

    def _relu(self, y, out):
        self.outputs.append(self.add("Relu", [y], out))

    def _add(self, y, out):
        self.outputs.append(self.add("Add", [y, self.n("h")], out))

    def _matmul_left(self, y, out):
        self.outputs.append(self.add("MatMul", [self.weight(f"{out}_w", OUT, self.case.shape[2]), y], out))

    def _computed_weight(self, y, out):
        weight = self.add("Tanh", [self.weight(f"{out}_w", C, OUT)], f"{out}_t")
        self.outputs.append(self.add("MatMul", [y, weight], out))

    def _other_axis(self, y, out):
        moved = self.moved(y, out, (0, 1, 3, 2))
        self.outputs.append(
            self.add("MatMul", [moved, self.weight(f"{out}_w", self.case.shape[2], OUT)], out)
        )

    def _reshape(self, y, out):
        flat = self.add("Reshape", [y, self.constant(f"{out}_s", [-1, 2 * C], np.int64)], f"{out}_f")
        self.outputs.append(self.add("MatMul", [flat, self.weight(f"{out}_w", 2 * C, OUT)], out))

    def _two_moves(self, y, out):
        moved = self.moved(y, out, (0, 2, 1, 3))
        again = self.moved(moved, f"{out}_again")
        self.outputs.append(self.add("Conv", [again, self.weight(f"{out}_w", OUT, C, 1, 1)], out))

    def _moved_output(self, y, out):
        self._conv1(y, out)
        self.outputs.append(self.n(f"{out}_moved"))

    def _moved_relu(self, y, out):
        self._conv1(y, out)
        self.outputs.append(self.add("Relu", [self.n(f"{out}_moved")], f"{out}_relu"))

    def _output(self, y, out):
        self.outputs.append(y)

    def _1d_conv(self, y, out):
        """A convolution that takes the second axis for channels."""
        self.outputs.append(
            self.add("Conv", [y, self.weight(f"{out}_w", OUT, self.case.shape[1], 1, 1)], out)
        )

    def _branch(self, y, out):
        weight = self.weight(f"{out}_w", C, OUT)
        graphs = [
            helper.make_graph(
                [node("MatMul", [y, weight], [self.n(f"{out}_in{i}")])],
                f"{out}_{i}",
                [],
                [value(self.n(f"{out}_in{i}"), None, self.kind)],
            )
            for i in range(2)
        ]
        self.add("If", [self.n("c")], out, then_branch=graphs[0], else_branch=graphs[1])
        self.outputs.append(self.n(out))


rewritten = functools.partial(rewriting.rewritten, share_norms)


def agree(case, left, tolerance=1e-5):
    """As `rewriting.agree`, with so many norms left."""
    proto, values = (case.proto(), case.feeds()) if isinstance(case, Norms) else case
    made = ops(proto).count("LayerNormalization") - left
    after = rewriting.agree(share_norms, proto, values, made, tolerance=tolerance, floor=1e-6)
    assert ops(after).count("LayerNormalization") == left
    return after


def initializers(proto):
    """Their names, those in branches included."""
    inner = [a.g for n in proto.graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return {i.name for graph in (proto.graph, *inner) for i in graph.initializer}


def pair(*readers, **changes):
    return Norms(tuple(Norm(readers=(kind,), **changes) for kind in readers))


# --- norms that are the same ---


@pytest.mark.parametrize("second", ["matmul", "padded", "relu", "output", "branch"])
@pytest.mark.parametrize("first", ["matmul bias", "same", "add", "output"])
@pytest.mark.parametrize("bias", [None, (-1.0, 1.0)])
def test_norms_with_the_same_constants_are_one_whatever_reads_them(first, second, bias):
    case = Norms((Norm((first,), bias=bias), Norm((second,), like=0)))
    after = agree(case, 1)
    weights = initializers(case.proto()) - {"g0", "b0", "g1", "b1"}
    assert weights <= initializers(after)
    assert ops(after).count("Identity") == 1 + (first == "output" and second in ("output", "branch"))


def test_no_bias_is_the_same_as_zeros():
    agree(Norms((Norm(("relu",), scale=1.5, bias=None), Norm(("add",), scale=1.5, bias=0.0))), 1)


def test_norms_with_one_scale_that_is_computed_are_one():
    agree(Norms(tuple(Norm(("relu",), scale="input", bias=None) for _ in range(2))), 1)


def test_norms_with_scales_that_are_computed_each_are_left():
    nodes = []
    for i, op in enumerate(("Tanh", "Sin")):
        nodes += [node(op, ["g"], [f"g{i}"]), node("LayerNormalization", ["x", f"g{i}"], [f"y{i}"])]
    proto = model(nodes, [value("x", [2, C]), value("g", [C])], ["y0", "y1"])
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((2, C)), "g": rng.uniform(0.5, 2, C)}
    agree((proto, {name: array.astype(np.float32) for name, array in feeds.items()}), 2)


def test_norms_over_two_axes_are_one_only_if_they_are_the_same():
    rng = np.random.default_rng(0)
    numbers = [rng.uniform(0.5, 2, (3, C)).astype(np.float32) for _ in range(2)]
    constants = [numpy_helper.from_array(array, f"g{i}") for i, array in enumerate(numbers)]
    constants.append(numpy_helper.from_array(rng.standard_normal((C, OUT)).astype(np.float32), "w"))
    for scales, left in ((("g0", "g0"), 1), (("g0", "g1"), 2)):
        nodes = []
        for i, scale in enumerate(scales):
            nodes.append(node("LayerNormalization", ["x", scale], [f"n{i}"], axis=1))
            nodes.append(node("MatMul", [f"n{i}", "w"], [f"y{i}"]))
        proto = model(nodes, [value("x", [2, 3, C])], ["y0", "y1"], constants)
        agree((proto, {"x": rng.standard_normal((2, 3, C)).astype(np.float32)}), left)


def test_norms_over_other_axes_are_not_the_same():
    nodes = [node("LayerNormalization", ["x", "g"], [f"y{axis}"], axis=axis) for axis in (1, 2, 3)]
    constants = [numpy_helper.from_array(np.linspace(1, 2, C).astype(np.float32), "g")]
    proto = model(nodes, [value("x", [2, 3, 5, C])], ["y1", "y2", "y3"], constants)
    agree((proto, {"x": np.random.default_rng(0).standard_normal((2, 3, 5, C)).astype(np.float32)}), 3)


def test_norms_over_two_axes_with_one_value_a_channel_are_shared():
    rng = np.random.default_rng(0)
    constants = {f"g{i}": rng.uniform(0.5, 2, C) for i in range(2)}
    constants |= {f"w{i}": rng.standard_normal((C, OUT)) for i in range(2)}
    nodes = []
    for i in range(2):
        nodes.append(node("LayerNormalization", ["x", f"g{i}"], [f"n{i}"], axis=1))
        nodes.append(node("MatMul", [f"n{i}", f"w{i}"], [f"y{i}"]))
    initializers = [numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items()]
    proto = model(nodes, [value("x", [2, 3, C])], ["y0", "y1"], initializers)
    agree((proto, {"x": rng.standard_normal((2, 3, C)).astype(np.float32)}), 1)


def test_norms_of_norms_that_are_the_same_are_one():
    nodes = []
    for i in "ab":
        nodes.append(node("LayerNormalization", ["x", "g"], [f"{i}1"]))
        nodes.append(node("LayerNormalization", [f"{i}1", "g"], [f"{i}2"]))
        nodes.append(node("Neg", [f"{i}2"], [f"y{i}"]))
    constants = [numpy_helper.from_array(np.linspace(1, 2, C).astype(np.float32), "g")]
    proto = model(nodes, [value("x", [3, C])], ["ya", "yb"], constants)
    agree((proto, {"x": np.random.default_rng(0).standard_normal((3, C)).astype(np.float32)}), 2)


def test_a_norm_by_itself_is_counted_once():
    """A tensor that is its own scale is read by that norm twice."""
    proto = model([node("LayerNormalization", ["x", "x"], ["y"])], [value("x", [C])])
    agree((proto, {"x": np.arange(C, dtype=np.float32)}), 1)


def test_norms_whose_scale_is_one_tensor_are_not_of_one_tensor():
    reads = (["x", "g"], ["z", "x"], ["w", "x"])
    nodes = [node("Tanh", ["x"], ["z"]), node("Sin", ["x"], ["w"])]
    nodes += [node("LayerNormalization", inputs, [f"y{i}"]) for i, inputs in enumerate(reads)]
    constants = [numpy_helper.from_array(np.linspace(1, 2, C).astype(np.float32), "g")]
    proto = model(nodes, [value("x", [C])], ["y0", "y1", "y2"], constants)
    agree((proto, {"x": np.arange(C, dtype=np.float32)}), 3)


# --- norms that differ ---


@pytest.mark.parametrize("second", ["matmul bias", "conv3"])
@pytest.mark.parametrize("first", SHIFTED)
def test_a_linear_map_takes_over_what_its_norm_had_of_its_own(first, second):
    after = agree(pair(first, second), 1)
    norm = next(n for n in after.graph.node if n.op_type == "LayerNormalization")
    assert norm.input[1:] in (["g0", "b0"], ["g1", "b1"])


@pytest.mark.parametrize("readers", [("gemm", "matmul"), ("gemm bias", "gemm"), ("matmul bias", "gemm bias")])
def test_so_does_gemm(readers):
    agree(dataclasses.replace(pair(*readers), shape=(5, C)), 1)


@pytest.mark.parametrize("kind", ["gemm alpha", "gemm rows"])
def test_a_gemm_that_is_more_than_that_is_left(kind):
    agree(dataclasses.replace(pair(kind, "gemm"), shape=(5, C)), 1)
    agree(dataclasses.replace(pair(kind, kind), shape=(5, C)), 2)


@pytest.mark.parametrize("kind", [*PADDED, *OTHER])
def test_what_cannot_take_that_over_keeps_its_norm(kind):
    """And as the one that is kept, as it is."""
    for norms in ((Norm((kind,)), Norm(("matmul bias",))), (Norm(("matmul bias",)), Norm((kind,)))):
        case = Norms(norms)
        after = agree(case, 1)
        norm = next(n for n in after.graph.node if n.op_type == "LayerNormalization")
        kept = next(i for i, n in enumerate(norms) if n.readers == (kind,))
        assert norm.input[1:] == [f"g{kept}", f"b{kept}"]
        weights = {name for name in initializers(case.proto()) if name.startswith(f"r{kept}_0_")}
        assert weights <= initializers(after)


@pytest.mark.parametrize("second", ["padded", "same", "transposed", "relu", "output", "moved output"])
@pytest.mark.parametrize("first", [*PADDED, *OTHER])
def test_two_that_cannot_keep_two_norms(first, second):
    agree(pair(first, second), 2)


@pytest.mark.parametrize(
    "readers", [(first, second) for first in PADDED for second in ("same", "matmul", "relu")]
)
@pytest.mark.parametrize("norm", [Norm(bias=None), Norm(bias=0.0), Norm()])
def test_padding_is_no_obstacle_where_nothing_is_shifted(readers, norm):
    first = dataclasses.replace(norm, readers=readers[:1])
    second = dataclasses.replace(first, readers=readers[1:])
    if norm.bias:  # both have the same shift in proportion
        second = Norm(readers[1:], like=0, ratio=-0.5)
    agree(Norms((first, second)), 1)


@pytest.mark.parametrize(
    "norms",
    [
        (Norm(), Norm(attrs={"epsilon": 1e-5})),
        (Norm(), Norm(of="z")),
        (Norm(), Norm(second=True)),
        (Norm(), Norm(scale="input")),
        (Norm(("relu",), scale="input"), Norm(("relu",), scale="input")),  # biases differ
        (Norm(("relu",)), Norm(("relu",), like=0, ratio=2.0)),
        (Norm(("relu",), scale=1.5), Norm(("relu",), scale=1.5)),  # biases differ
        (Norm(("relu", "matmul")), Norm(("matmul", "relu"))),
        (Norm(("matmul", "padded")), Norm(("same", "conv3"))),
        (Norm(scale=1e-3), Norm(("padded",), scale=(1.0, 2.0), at={0: 1e-4})),  # too small there
        (Norm(("padded",), at={2: 0.0}), Norm()),
        (Norm(("relu",), at={2: 0.0}), Norm()),
        (Norm(("relu",), scale=1e-3, bias=None), Norm(scale=2.0)),  # a ratio too large
        (Norm(("relu",), bias=3e2), Norm(bias=None)),  # would cost digits
    ],
    ids=str,
)
def test_a_near_miss_is_declined(norms):
    agree(Norms(norms), 2)


@pytest.mark.parametrize("attrs", [{"axis": 3}, {"stash_type": 1}, {"axis": -1}])
def test_the_same_attributes_written_otherwise_are_the_same(attrs):
    agree(Norms((Norm(), Norm(attrs=attrs))), 1)


def test_a_scale_too_small_to_divide_by_gives_a_norm_without_scale_and_bias():
    attrs = {"epsilon": 0.25}
    first, second = Norm(at={2: 0.0}, attrs=attrs), Norm(("conv3",), at={1: 1e-6}, attrs=attrs)
    after = agree(Norms((first, second)), 1)
    norm = next(n for n in after.graph.node if n.op_type == "LayerNormalization")
    assert len(norm.input) == 2
    scale = next(numpy_helper.to_array(i) for i in after.graph.initializer if i.name == norm.input[1])
    np.testing.assert_array_equal(scale, np.ones(C, np.float32), strict=True)


def test_of_two_only_the_norm_with_a_scale_to_divide_by_is_kept():
    after = agree(Norms((Norm(at={2: 0.0}), Norm())), 1)
    norm = next(n for n in after.graph.node if n.op_type == "LayerNormalization")
    assert norm.input[1:] == ["g1", "b1"]


def test_a_large_bias_is_folded_and_not_computed_from():
    after = agree(Norms((Norm(bias=3e2), Norm(bias=None))), 1)
    norm = next(n for n in after.graph.node if n.op_type == "LayerNormalization")
    assert norm.input[1:] == ["g1"]


def test_no_product_gets_a_bias_where_another_choice_spares_it():
    for readers in (("matmul", "matmul bias"), ("matmul bias", "matmul")):
        proto = pair(*readers).proto()
        assert ops(agree((proto, pair(*readers).feeds()), 1)).count("Add") == 1


@pytest.mark.parametrize(
    ("norms", "left"),
    [
        ((Norm(), Norm(), Norm()), 1),
        ((Norm(("relu",)), Norm(), Norm(("padded",))), 2),
        ((Norm(("relu",)), Norm(("conv3", "grouped")), Norm(like=0), Norm(("matmul", "shared"))), 1),
        ((Norm(("relu",)), Norm(("output",)), Norm(), Norm()), 2),
        ((Norm(), Norm(of="z"), Norm(), Norm(of="z")), 2),
        ((Norm(()), Norm()), 1),
        ((Norm(whole=True), Norm()), 1),
        ((Norm(whole=True), Norm(("relu",), whole=True)), 1),
    ],
    ids=str,
)
def test_as_few_as_can_be_are_left(norms, left):
    agree(Norms(norms), left)


def test_weights_that_others_use_stay_as_they_are_for_them():
    case = Norms((Norm(("shared", "padded")), Norm(("shared", "matmul")), Norm(("shared",))))
    after = agree(case, 1)
    before = run(case.proto(), **case.feeds())
    np.testing.assert_array_equal(run(after, **case.feeds())["other"], before["other"])
    assert "shared" in {i.name for i in after.graph.initializer}


@pytest.mark.parametrize("opset", [17, 18, 20])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [(("b", 3, 5, C), (3, 3, 5, C)), (("b", "h", "w", C), (1, 4, 6, C)), (("b", "h", "w", "c"),) * 2],
)
def test_sizes_need_not_be_known(shape, sizes, opset):
    sizes = (2, 3, 4, C) if sizes == shape else sizes
    agree(Norms((Norm(("padded",)), Norm(("matmul bias", "conv3"))), shape, sizes, opset), 1)


def test_without_a_rank_it_declines():
    case = dataclasses.replace(pair("matmul", "matmul"), shape=None, sizes=(2, 3, 5, C))
    after, changes = rewritten(case.proto())
    assert changes == 0
    same(case.proto(), after, case.feeds())


def test_float64_is_shared_in_float64():
    agree(Norms((Norm(), Norm(("moved matmul",))), dtype="float64"), 1, tolerance=1e-12)


def test_weights_are_rounded_once():
    """Each new one is the float32 next to the exact one, however many norms there are."""
    case = Norms((*(Norm() for _ in range(6)), Norm(("relu",), scale=(3.0, 4.0))))
    before = {i.name: numpy_helper.to_array(i).astype(np.float64) for i in case.proto().graph.initializer}
    after = agree(case, 1)
    new = {i.name: numpy_helper.to_array(i) for i in after.graph.initializer}
    made = {n.output[0]: n for n in after.graph.node}
    for i in range(6):
        ratio = before[f"g{i}"] / before["g6"]
        shift = before[f"b{i}"] - ratio * before["b6"]
        old = before[f"r{i}_0_w"]
        weight, bias = new[made[f"r{i}_0_p"].input[1]], new[made[f"r{i}_0"].input[1]]
        np.testing.assert_array_equal(weight, (old * ratio[:, None]).astype(np.float32), strict=True)
        exact = shift @ old + before[f"r{i}_0_b"]
        np.testing.assert_array_max_ulp(bias, exact.astype(np.float32), 1)


def test_a_product_whose_bias_is_added_in_a_branch_is_left():
    """Its Add is not to be touched; the product itself gets a bias before."""
    case = pair("relu", "matmul")
    proto = case.proto()
    end = next(n for n in proto.graph.node if n.output[0] == "r1_0_end")
    proto.graph.node.remove(end)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(OUT, np.float32), "late"))
    branches = [
        helper.make_graph([node(op, inputs, [f"o{i}"])], f"b{i}", [], [value(f"o{i}", [2, 3, 5, OUT])])
        for i, (op, inputs) in enumerate((("Add", ["r1_0", "late"]), ("Identity", ["other"])))
    ]
    proto.graph.node.append(node("If", ["c"], ["r1_0_end"], then_branch=branches[0], else_branch=branches[1]))
    proto.graph.input.append(value("c", [], TensorProto.BOOL))
    agree((proto, case.feeds() | {"c": np.array(True)}), 2)


def test_norms_in_a_branch_are_not_touched():
    case = Norms((Norm(("matmul",)),))
    proto = case.proto()
    inner = [
        node("LayerNormalization", ["h", "g0"], ["in"], epsilon=1e-6),
        node("MatMul", ["in", "shared"], ["in_y"]),
    ]
    other = helper.make_graph([node("Identity", ["other"], ["e"])], "else", [], [value("e", [2, 3, 5, OUT])])
    then = helper.make_graph(inner, "then", [], [value("in_y", [2, 3, 5, OUT])])
    proto.graph.node.append(node("If", ["c"], ["taken"], then_branch=then, else_branch=other))
    proto.graph.input.append(value("c", [], TensorProto.BOOL))
    proto.graph.output.append(value("taken", [2, 3, 5, OUT]))
    after, changes = rewritten(proto)
    assert changes == 0
    same(proto, after, case.feeds() | {"c": np.array(True)})


def test_a_dead_reader_does_not_keep_a_norm_from_the_second_round():
    case = Norms((Norm(("matmul",)), Norm(("matmul",), like=0), Norm(("padded",)), Norm(("same",))))
    proto = case.proto()
    proto.graph.node.append(node("Relu", ["y0"], ["dead"]))
    agree((proto, case.feeds()), 2)


def test_somebody_elses_operator_of_that_name_is_left():
    proto = pair("matmul", "matmul").proto()
    for n in proto.graph.node:
        if n.op_type == "LayerNormalization":
            n.domain = "own"
    proto.opset_import.append(helper.make_opsetid("own", 1))
    assert rewritten(proto)[1] == 0


def test_norms_written_out_with_one_mean_are_shared():
    """Two scales of one norm, as after a clean-up: two operators for one pass, one for the other."""
    rng = np.random.default_rng(0)
    constants = {
        "axes": np.array([-1]),
        "two": np.full((), 2, np.float32),
        "eps": np.full((), 1e-6, np.float32),
        **{f"g{i}": rng.uniform(0.5, 2, C).astype(np.float32) for i in range(2)},
        **{f"w{i}": rng.standard_normal((C, OUT)).astype(np.float32) for i in range(2)},
    }
    nodes = [
        node("ReduceMean", ["x", "axes"], ["m"]),
        node("Sub", ["x", "m"], ["d"]),
        node("Pow", ["d", "two"], ["s"]),
        node("ReduceMean", ["s", "axes"], ["v"]),
        node("Add", ["v", "eps"], ["a"]),
        node("Sqrt", ["a"], ["r"]),
        node("Div", ["d", "r"], ["n"]),
    ]
    for i in range(2):
        nodes += [node("Mul", ["n", f"g{i}"], [f"n{i}"]), node("MatMul", [f"n{i}", f"w{i}"], [f"y{i}"])]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    proto = model(nodes, [value("x", [2, 3, C])], ["y0", "y1"], initializers)
    graph = to_graph(proto)
    assert fuse_layer_norm(graph) == 2
    assert share_norms(graph) == 1
    after = to_proto(graph)
    assert sorted(ops(after)) == ["LayerNormalization", "MatMul", "MatMul"]
    same(proto, after, {"x": rng.standard_normal((2, 3, C)).astype(np.float32)})


def test_work_is_far_from_the_square_of_the_number_of_norms():
    def work(count, of_one):
        nodes, outputs = [], []
        rng = np.random.default_rng(0)
        constants = [numpy_helper.from_array(rng.standard_normal((C, C)).astype(np.float32), "w")]
        x = "x"
        for i in range(count):
            scale = rng.uniform(0.5, 2, C).astype(np.float32)
            constants.append(numpy_helper.from_array(scale, f"g{i}"))
            nodes += [
                node("LayerNormalization", [x, f"g{i}"], [f"n{i}"]),
                node("MatMul", [f"n{i}", "w"], [f"y{i}"]),
            ]
            outputs.append(f"y{i}")
            x = f"y{i - 1}" if i % 2 and not of_one else x  # else a chain of pairs
        graph = to_graph(
            model(nodes, [value("x", [2, C])], outputs[-1:] if not of_one else outputs[:9], constants)
        )
        changes = []
        made = calls(lambda: changes.append(share_norms(graph)))
        assert changes[0] >= (count - 1 if of_one else count // 2 - 1)
        return made

    # Ten times as many; the square would be a hundred. More than ten, as a node's place in the graph is found
    # by comparing it with those before it.
    for of_one in (False, True):
        assert work(200, of_one) < 30 * work(20, of_one)


# --- random norms ---


@st.composite
def cases(draw):
    count = draw(st.integers(2, 4))
    norms = []
    readers = st.sampled_from(SHIFTED * 2 + PADDED + OTHER)
    for i in range(count):
        like = draw(st.sampled_from((None, None, *range(i))))
        of = norms[like].of if like is not None else draw(st.sampled_from(("x",) * 6 + ("z",)))
        norms.append(
            Norm(
                readers=tuple(draw(st.lists(readers, min_size=1, max_size=2))),
                bias=draw(st.sampled_from(((-1.0, 1.0), (-1.0, 1.0), None, 0.0))),
                like=like,
                ratio=draw(st.sampled_from((1.0, 1.0, 2.0, -0.5))) if like is not None else 1.0,
                of=of,
                whole=draw(st.booleans()) if like is None else norms[like].whole,
            )
        )
    return Norms(
        tuple(norms),
        opset=draw(st.sampled_from((17, 18, 20))),
        prefix=draw(st.sampled_from(("", "y0/", "h/weight"))),
        shuffle=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 99)),
        shape=draw(st.sampled_from(((2, 3, 5, C), (2, 3, 5, C), ("b", 3, 5, C)))),
        sizes=(2, 3, 5, C),
    )


def fewest(case):
    """How many norms at least, by trying every choice of those to keep."""
    total = 0
    for of in "xz":
        merged = {}
        for i, norm in enumerate(case.norms):
            if norm.of == of:
                key = origin(case, i)
                merged.setdefault(key, set()).update(norm.readers)
        items = list(merged.items())
        best = len(items)
        for chosen in range(1 << len(items)):
            kept = [key for k, (key, _) in enumerate(items) if chosen >> k & 1]
            for plain in ([], [(None, 0.0, 1.0)]):
                if all(
                    key in kept or any(folds(readers, key, onto) for onto in kept + plain)
                    for key, readers in items
                ):
                    best = min(best, len(kept) + len(plain))
        total += best
    return total


def origin(case, i):
    """(the norm whose constants it has, their bias, their multiple)."""
    factor = 1.0
    while case.norms[i].like is not None:
        factor *= case.norms[i].ratio
        i = case.norms[i].like
    return i, case.norms[i].bias or 0.0, factor


def folds(readers, key, onto):
    if readers & set(OTHER):
        return False
    return key[0] == onto[0] or key[1] == onto[1] == 0.0 or not readers & set(PADDED)


@settings(RANDOM, max_examples=120)
@given(cases())
def test_random_norms_give_the_same_outputs_from_the_fewest(case):
    agree(case, fewest(case))


@settings(RANDOM, max_examples=40)
@given(cases(), st.integers(1, 99))
def test_order_and_names_do_not_matter(case, seed):
    one, first = rewritten(case.proto())
    two, second = rewritten(dataclasses.replace(case, shuffle=seed, prefix="t/").proto())
    assert first == second
    assert sorted(ops(one)) == sorted(ops(two))
    expected, actual = run(one, **case.feeds()), run(two, **dataclasses.replace(case, prefix="t/").feeds())
    for name, array in expected.items():
        other = actual["t/" + name.removeprefix(case.prefix)]
        np.testing.assert_allclose(other, array, rtol=0, atol=1e-6 * max(np.abs(array).max(), 1e-6))


@settings(RANDOM, max_examples=60)
@given(st.integers(0, 10**6), st.floats(-4, 4), st.floats(-4, 4), st.sampled_from(SHIFTED))
def test_whatever_the_constants_no_digits_are_lost(seed, scale, bias, kind):
    """Norms that differ by orders of magnitude are shared exactly or not at all."""
    rng = np.random.default_rng(seed)
    at = {c: float(10 ** rng.uniform(-4, 4)) for c in rng.integers(0, C, rng.integers(0, 3))}
    first = Norm((kind,), scale=(0.5 * 10**scale, 10**scale), bias=(0.0, 10**bias), at=at)
    case = Norms((first, Norm(("relu",)), Norm(("matmul",), bias=(0.0, 10**-bias))), seed=seed)
    proto = case.proto()
    after, _ = rewritten(proto)
    same(proto, after, case.feeds())


# --- models of ours ---


@functools.cache
def block(shared_norm):
    """An MEA block with lively norms, its graph, cleaned up, and an input."""
    torch.manual_seed(0)
    mea = MEABlock(8, 2, stripe_width=2, shared_norm=shared_norm).eval()
    with torch.no_grad():
        for parameter in mea.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(2, 8, 4, 6)
        with quiet():
            options = {"dynamo": True, "optimize": False, "opset_version": 20, "verbose": False}
            program = torch.onnx.export(mea, (x,), input_names=["x"], **options)
        expected = mea(x).numpy()
    return run_passes(program.model_proto, ["clean-up"])[0], x.numpy(), expected


def test_the_block_of_meta_with_two_norms_computes_one():
    """As where training shared them: the convolution's is kept, attention's goes into its projection."""
    clean, x, expected = block(shared_norm=False)
    after = agree((clean, {"x": x}), 1)
    assert sorted(ops(after)) == sorted(ops(block(shared_norm=True)[0]))
    (actual,) = run(after, x=x).values()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    norm = next(n for n in after.graph.node if n.op_type == "LayerNormalization")
    assert norm.input[1] == "ffn_norm.weight"


def test_there_is_nothing_to_share_where_training_did():
    clean, x, _ = block(shared_norm=True)
    agree((clean, {"x": x}), 1)


@pytest.mark.slow
def test_a_model_whose_blocks_have_two_norms_has_as_many_as_one_whose_blocks_have_one():
    clean, shared = (
        run_passes(e.literal, ["clean-up"])[0]
        for e in (exported("segmenter", shared_norm=False), exported("segmenter"))
    )
    graph = to_graph(clean)
    assert fuse_layer_norm(graph) == 0
    changes = share_norms(graph)
    after = to_proto(graph)
    assert ops(after).count("LayerNormalization") == ops(shared).count("LayerNormalization")
    assert changes == ops(clean).count("LayerNormalization") - ops(shared).count("LayerNormalization") > 0
    assert sorted(ops(after)) == sorted(ops(shared))
    same(clean, after, {"images": pictures(1).numpy()}, 2e-5)
