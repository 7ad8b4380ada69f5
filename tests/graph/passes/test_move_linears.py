"""move_linears: products beside windows change places with them, with the same outputs; near-misses stay."""

import dataclasses
import functools
import math

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.export.trace import quiet
from meta_deploy.graph.passes.collapse_chains import collapse_chains
from meta_deploy.graph.passes.move_linears import move_linears
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.models.backbones.vit import Block
from tests.graph.rewriting import (
    MOVES,
    RANDOM,
    Writer,
    agree_among_moves,
    contents,
    moves_of,
    node,
    ops,
    put_inside,
    rewritten,
)
from tests.small_graphs import model, run, value

# --- products among moves ---


@dataclasses.dataclass(frozen=True)
class Product:
    """x through moves, a product, its bias, and what follows. A step is (operator, values...).

    Steps: ("Reshape", shape), ("Transpose", perm), ("Squeeze" or "Unsqueeze", axes), ("Flatten", axis),
    ("Pad", pads, axes, value, mode), ("Slice", starts, ends, axes, steps), or (operator,) of one input.
    """

    before: tuple = ()
    out: int = 6  # channels
    bias: tuple | None = None  # shape of the constant, or ("map",): another for every place
    first: bool = False  # the bias is Add's first operand
    weight: str = "constant"  # "input", "shared" with the product before, "three" axes, "computed"
    left: bool = False  # the weight is the left operand
    after: tuple = ()
    gemm: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """Products in a row, to vary.

    Tensors are x, t1, t2, ... in their order, y the last.
    """

    products: tuple = (Product(),)
    shape: tuple = (2, 4, 6, 5)
    sizes: tuple | None = None  # of the data, where the shape has a name
    reader: int | None = None  # this tensor has another reader
    output: int | None = None  # is an output as well
    branch: int | None = None  # is read inside of an If as well
    opset: int = 18
    dtype: str = "float32"
    prefix: str = ""
    shuffle: int = 0

    def n(self, name):
        return self.prefix + name

    def proto(self):
        return Builder(self).proto()

    def feeds(self):
        rng = np.random.default_rng(0)
        feeds = {self.n("x"): rng.standard_normal(self.sizes or self.shape).astype(self.dtype)}
        if any(product.weight == "input" for product in self.products):
            for i in self.proto().graph.input:
                if i.name.startswith(self.n("w")):
                    shape = [d.dim_value for d in i.type.tensor_type.shape.dim]
                    feeds[i.name] = rng.standard_normal(shape).astype(self.dtype)
        if self.branch is not None:
            feeds[self.n("c")] = np.array(True)
        return feeds


class Builder(Writer):
    """Writes the model of a line."""

    def __init__(self, line):
        super().__init__(line, seed=1)
        self.tensors, self.weight = [self.input("x", line.sizes or line.shape)], None

    def go_on(self, op, inputs, **attrs):
        self.tensors.append(self.add(op, inputs, f"t{len(self.tensors)}", **attrs))

    def step(self, step):
        op, *values = step
        x = self.tensors[-1]
        if op in ("Reshape", "Squeeze", "Unsqueeze"):
            self.go_on(op, [x, self.integers(values[0])])
        elif op == "Transpose":
            self.go_on(op, [x], **({"perm": values[0]} if values[0] else {}))
        elif op == "Flatten":
            self.go_on(op, [x], axis=values[0])
        elif op == "Pad":
            pads, axes, number, mode = values
            inputs = [x, self.integers(pads)]
            if number is not None or axes is not None:
                inputs.append("" if number is None else self.floats(number))
            self.go_on(op, [*inputs, *([self.integers(axes)] if axes is not None else [])], mode=mode)
        elif op == "Slice":
            self.go_on(op, [x, *(self.integers(v) for v in values if v is not None)])
        else:
            self.go_on(op, [x])

    def product(self, product, channels):
        x = self.tensors[-1]
        if product.weight == "shared" and self.weight:
            weight = self.weight
        elif product.weight in ("constant", "shared", "computed"):
            weight = self.floats(self.rng.standard_normal((channels, product.out)))
        elif product.weight == "three":
            weight = self.floats(self.rng.standard_normal((1, channels, product.out)))
        else:
            weight = self.input(f"w{len(self.tensors)}", [channels, product.out])
        if product.weight == "computed":
            weight = self.add("Softmax", [x], f"soft{len(self.tensors)}", axis=-1)
        self.weight = weight
        self.go_on("Gemm" if product.gemm else "MatMul", [weight, x] if product.left else [x, weight])
        if product.bias is not None:
            shape = self.shape() if product.bias == ("map",) else product.bias
            operands = [self.tensors[-1], self.floats(self.rng.standard_normal(shape))]
            self.go_on("Add", operands[::-1] if product.first else operands)

    def shape(self):
        """Of the last tensor, by shape inference."""
        proto = self.model(self.tensors[-1:])
        return [d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim]

    def proto(self):
        line, channels = self.case, self.case.shape[-1]
        for product in line.products:
            for step in product.before:
                self.step(step)
            if product.before:
                channels = self.shape()[-1]
            self.product(product, channels)
            for step in product.after:
                self.step(step)
            channels = product.out if not product.after else self.shape()[-1]
        self.inputs[0] = value(self.n("x"), list(line.shape), self.kind)
        places = (line.reader, line.output, line.branch)
        others = ["" if place is None else self.tensors[place] for place in places]
        return self.model(self.tensors[-1:], *others, line.shuffle)


def check(line, changes=None):
    """As `agree_among_moves`; products are no larger than they were, and moves are no more."""
    proto = line.proto()
    after = agree_among_moves(move_linears, proto, line.feeds(), changes, line.dtype)
    if contents(after) != contents(proto):
        assert moves_of(after) <= moves_of(proto)
        assert sorted(elements(after, "MatMul")) <= sorted(elements(proto, "MatMul"))
    return after


def elements(proto, op):
    """How many elements each node of an operator puts out."""
    proto = onnx.shape_inference.infer_shapes(proto)
    infos = [*proto.graph.value_info, *proto.graph.output]
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in infos}
    return [math.prod(shapes[n.output[0]]) for n in proto.graph.node if n.op_type == op]


def window(shape, size):
    """The steps that cut (B, H, W, C) into windows (B * windows, h * w, C), and back."""
    (B, H, W, C), (h, w) = shape, size
    rows, columns = -(-H // h), -(-W // w)
    pads = (0, 0, 0, 0, 0, rows * h - H, columns * w - W, 0)
    pad = (("Pad", pads, None, None, "constant"),) if any(pads) else ()
    crop = (("Slice", (0, 0), (H, W), (1, 2), None),) if any(pads) else ()
    cut = ("Reshape", (B, rows, h, columns, w, C))
    swap = ("Transpose", (0, 1, 3, 2, 4, 5))
    return (
        (*pad, cut, swap, ("Reshape", (B * rows * columns, h * w, C))),
        (
            ("Reshape", (B, rows, columns, h, w, C)),
            swap,
            ("Reshape", (B, rows * h, columns * w, C)),
            *crop,
        ),
    )


def windowed(bias=(6,), shape=(2, 4, 6, 5), size=(2, 3), out=6, heads=2, **changes):
    """The product after a window partition, with a cut into heads behind."""
    before, _ = window(shape, size)
    tokens = size[0] * size[1]
    windows = shape[0] * -(-shape[1] // size[0]) * -(-shape[2] // size[1])
    after = (("Reshape", (windows, tokens, heads, out // heads)), ("Transpose", (0, 2, 1, 3)))
    return Line((Product(before, out, bias, after=after),), shape, **changes)


def merged(bias=(6,), shape=(2, 4, 6, 6), size=(2, 3), heads=2, end=(), **changes):
    """The product after heads are joined, before windows are."""
    windows = shape[0] * -(-shape[1] // size[0]) * -(-shape[2] // size[1])
    tokens, channels = size[0] * size[1], shape[3]
    before = (
        ("Transpose", (0, 2, 1, 3)),
        ("Reshape", (windows, tokens, channels)),
    )
    _, after = window(shape, size)
    start = (windows, heads, tokens, channels // heads)
    return Line((Product(before, channels, bias, after=(*after, *end)),), start, **changes)


@pytest.mark.parametrize("bias", [None, (6,), (1,), (), (1, 6), (1, 1, 6), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("size", [(2, 3), (3, 4), (1, 6), (4, 6), (1, 1), (9, 2)])
def test_a_product_behind_a_window_partition_goes_before_it(bias, first, size):
    line = windowed(bias, size=size)
    line = dataclasses.replace(line, products=(dataclasses.replace(line.products[0], first=first),))
    after = check(line, None)
    assert "Pad" not in ops(after)[: ops(after).index("MatMul")]
    assert moves_of(after) <= 3


@pytest.mark.parametrize("bias", [None, (6,), (1, 1, 6)], ids=str)
@pytest.mark.parametrize("size", [(2, 3), (3, 4), (2, 5), (9, 2)])
@pytest.mark.parametrize("end", [(), (("Relu",),)], ids=["output", "read"])
def test_a_product_before_windows_are_joined_goes_behind(bias, size, end):
    after = check(merged(bias, size=size, end=end), 1)
    assert moves_of(after) <= 3
    product = ops(after).index("MatMul")
    assert not {"Slice", *MOVES} & set(ops(after)[product:])
    assert elements(after, "MatMul") == [2 * 4 * 6 * 6]


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("make", [windowed, merged])
def test_every_opset_and_type(opset, dtype, make):
    check(make(opset=opset, dtype=dtype, size=(3, 4)), 1)


def test_padding_is_added_its_bias_behind_it():
    """Zeros times a matrix are zeros, but then they get the bias."""
    after = ops(check(windowed(size=(3, 4)), 1))
    assert after.index("MatMul") < after.index("Pad") < after.index("Add") < after.index("Transpose")


TURN = ("Transpose", (0, 2, 1, 3))


@pytest.mark.parametrize("bias", [None, (6,)], ids=str)
@pytest.mark.parametrize(
    "pad",
    [
        ("Pad", (0, 1, 2, 0, 0, 3, 1, 0), None, None, "constant"),
        ("Pad", (1, 0, 0, 0, 0, 0, 0, 0), None, 0.0, "constant"),
        ("Pad", (0, 2, 0, 0, 0, -1, 0, 0), None, -0.0, "constant"),
        ("Pad", (2, 1), (1,), 0.0, "constant"),
        ("Pad", (2, 1, -1, 0), (-2, 0), None, "constant"),
        ("Pad", (0, 1, 0, 2), (3, 2), 0.0, "constant"),
    ],
    ids=str,
)
def test_zeros_around_any_axes_but_the_last(pad, bias):
    after = ops(check(Line((Product((TURN, pad, TURN), 6, bias, after=(TURN,)),)), 1))
    assert after.index("MatMul") < after.index("Pad")


@pytest.mark.parametrize(
    "pad",
    [
        ("Pad", (0, 1, 0, 0, 0, 0, 0, 0), None, 1.0, "constant"),
        ("Pad", (0, 1, 0, 0, 0, 0, 0, 0), None, math.nan, "constant"),
        ("Pad", (0, 1, 0, 0, 0, 0, 0, 0), None, None, "reflect"),
        ("Pad", (0, 1, 0, 0, 0, 0, 0, 0), None, None, "edge"),
        ("Pad", (0, 0, 0, 1, 0, 0, 0, 0), None, None, "constant"),
        ("Pad", (0, 0, 0, 1, 0, 0, 0, -1), None, None, "constant"),  # the last axis is as long as it was
        ("Pad", (1, -1), (-1,), None, "constant"),
        ("Pad", (1, -1), (3,), None, "constant"),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [None, (6,)], ids=str)
def test_other_paddings_stay_before_the_product(pad, bias):
    line = Line((Product((pad, TURN), 6, bias, after=(TURN,)),))
    after = ops(check(line, 1))  # which goes as far as that
    assert after[:2] == ["Pad", "MatMul"]
    check(Line((Product((pad,), 6, bias, after=(TURN,)),)), 0)


@pytest.mark.parametrize(
    "cut",
    [
        ("Slice", (1, 0), (3, 4), (1, 2), None),
        ("Slice", (0,), (2,), (-3,), None),
        ("Slice", (-3, -9), (-1, 2**31 - 1), (-2, 1), (1, 2)),
        ("Slice", (3,), (-9,), (1,), (-2,)),
    ],
    ids=str,
)
def test_cropping_is_done_before_the_product(cut):
    after = check(Line((Product((TURN,), 6, (6,), after=(cut, TURN)),)), 1)
    assert ops(after).index("Slice") < ops(after).index("MatMul")
    assert elements(after, "MatMul") < elements(
        Line((Product((TURN,), 6, (6,), after=(cut,)),)).proto(), "MatMul"
    )


@pytest.mark.parametrize(
    "cut",
    [
        ("Slice", (1,), (3,), (3,), None),
        ("Slice", (1,), (3,), (-1,), None),
        ("Slice", (5, 0), (-9, 2), (3, 1), (-1, 1)),  # the channels in the other direction
        ("Slice", (0, 0, 0, 5), (2, 2, 2, -9), None, None),
    ],
    ids=str,
)
def test_channels_are_cut_behind_the_product(cut):
    if cut[3] is None:
        cut = (*cut[:3], (0, 1, 2, 3), (1, 1, 1, -1))
    check(Line((Product((TURN,), 6, (6,), after=(cut, TURN)),)), 0)


def test_a_product_is_not_moved_before_what_crops():
    """It would be the larger one. The moves behind it are passed all the same."""
    cut = ("Slice", (0,), (1,), (1,), None)
    after = check(Line((Product((TURN, cut, TURN), 6, after=(TURN,)),), (2, 4, 6, 5)), 1)
    assert ops(after)[:3] == ["Transpose", "Slice", "MatMul"]


def test_padding_goes_behind_even_where_no_moves_meet():
    pad = ("Pad", (0, 0, 0, 0, 0, 1, 1, 0), None, None, "constant")
    after = check(Line((Product((("Relu",), pad), 6, (6,), after=(("Relu",),)),)), 1)
    assert ops(after) == ["Relu", "MatMul", "Pad", "Add", "Relu"]


LONG = {
    "split channels": (("Reshape", (2, 4, 6, 3, 2)), ("Transpose", (0, 3, 1, 2, 4))),
    "to channels first": (("Transpose", (0, 3, 1, 2)),),
}
FROM = {
    "from channels first": (("Transpose", (0, 2, 3, 1)),),
    "from heads": (("Transpose", (0, 2, 1, 3)), ("Reshape", (2, 4, 6, 5))),
}


@pytest.mark.parametrize("start", [*FROM, None])
@pytest.mark.parametrize("end", [*LONG, None])
@pytest.mark.parametrize("passed", [0, 1, 2])
@pytest.mark.parametrize("follow", [0, 1])
def test_it_does_not_go_back_and_forth(start, end, passed, follow):
    """Moves on both sides that it may pass, beyond them such that it may not."""
    before = FROM[start] if start else ()
    shape = {"from channels first": (2, 5, 4, 6), "from heads": (2, 6, 4, 5), None: (2, 4, 6, 5)}[start]
    before += (TURN, TURN)[:passed] if passed != 1 else (TURN, ("Reshape", (2, 4, 6, 5)))
    after = (TURN, TURN) if follow else ()
    check(Line((Product(before, 6, (6,), after=after + (LONG[end] if end else ())),), shape))


@pytest.mark.parametrize(
    "line",
    [
        Line((Product((TURN,), after=(("Relu",),)),)),  # no moves to meet
        Line((Product((("Relu",),), after=(TURN,)),)),
        Line((Product((("Reshape", (2, 24, 5)),), after=(("Reshape", (2, 4, 6, 3, 2)),)),)),  # Reshapes alone
        Line((Product((("Transpose", (0, 1, 3, 2)),), after=(("Transpose", (0, 1, 3, 2)),)),)),  # of channels
        Line((Product((TURN,), weight="input", after=(TURN,)),)),
        Line((Product((TURN,), weight="three", after=(TURN,)),)),
        Line((Product((TURN,), weight="computed", out=6, after=(TURN,)),), (2, 4, 4, 4)),
        Line((Product((TURN,), left=True, after=(TURN,)),), (2, 6, 6, 6)),
        Line((Product((TURN,), bias=("map",), after=(TURN,)),)),
        Line((Product((TURN,), bias=(4, 1), after=(TURN,)),)),
        Line((Product((TURN,), bias=(1, 1, 1, 1, 6), after=(("Transpose", (0, 1, 3, 2, 4)),)),)),
        Line((Product((("Transpose", (1, 0)),), gemm=True, after=(("Transpose", (1, 0)),)),), (4, 6)),
        Line((Product((TURN,), 6, (6,), after=(TURN,)),), ("a", "b", "c", 5), (3, 4, 6, 5)),
    ],
    ids=str,
)
def test_a_near_miss_is_declined(line):
    check(line, 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_any_size_is_passed(batch):
    line = Line((Product((TURN,), 6, (6,), after=(TURN,)),), (batch, 4, 6, 5))
    named = dataclasses.replace(line, shape=("b", *line.shape[1:]), sizes=line.shape)
    assert ops(check(named, 1)) == ops(check(line, 1))


THROUGH = ("Transpose", (1, 0, 2, 3))
AMONG = Line((Product((("Relu",), TURN, THROUGH), 6, (6,), after=(TURN, ("Relu",))),))


@pytest.mark.parametrize("use", ["reader", "output", "branch"])
def test_what_others_read_stays_as_it_is(use):
    """t1: Relu, t2, t3: moves, t4: product, t5: bias, t6: move."""
    changes = {1: 1, 2: 1, 3: 0, 4: 0, 5: 0, 6: 1}
    for tensor, made in changes.items():
        check(dataclasses.replace(AMONG, **{use: tensor}), made)


@pytest.mark.parametrize("bias", [None, (6,)], ids=str)
@pytest.mark.parametrize("moves", [0, 1])
def test_what_a_branch_goes_on_with_stays_there(bias, moves):
    """After the product, whose bias it adds, or after a move outside that the product meets."""
    line = Line((Product((TURN,), 6, bias, after=(THROUGH, TURN)),))
    tensor = f"t{2 + moves + (moves and bias is not None)}"
    proto, changes = put_inside(line.proto(), [tensor]), moves
    agree_among_moves(move_linears, proto, {**line.feeds(), "c": np.array(True)}, changes)


def test_what_runs_in_a_loop_stays():
    body = helper.make_graph(
        [
            node("Transpose", ["outer"], ["turned"], perm=(0, 2, 1, 3)),
            node("MatMul", ["turned", "w"], ["product"]),
            node("Transpose", ["product"], ["back"], perm=(0, 2, 1, 3)),
            node("Add", ["state", "back"], ["next"]),
            node("Identity", ["cond"], ["go"]),
        ],
        "body",
        [
            value("i", [], TensorProto.INT64),
            value("cond", [], TensorProto.BOOL),
            value("state", [2, 4, 6, 5]),
        ],
        [value("go", [], TensorProto.BOOL), value("next", [2, 4, 6, 5])],
    )
    nodes = [
        node("Transpose", ["x"], ["moved"], perm=(0, 2, 1, 3)),
        node("MatMul", ["moved", "w"], ["first"]),
        node("Transpose", ["first"], ["outer"], perm=(0, 2, 1, 3)),
        node("Loop", ["count", "", "x"], ["y"], body=body),
    ]
    w = numpy_helper.from_array(np.random.default_rng(0).standard_normal((5, 5)).astype(np.float32), "w")
    count = numpy_helper.from_array(np.array(3), "count")
    proto = model(
        nodes, [value("x", [2, 4, 6, 5])], outputs=[value("y", [2, 4, 6, 5])], initializers=[w, count]
    )
    x = np.random.default_rng(1).standard_normal((2, 4, 6, 5)).astype(np.float32)
    after = agree_among_moves(move_linears, proto, {"x": x}, 1)
    loop = next(n for n in after.graph.node if n.op_type == "Loop")
    assert [n.op_type for n in loop.attribute[0].g.node] == [n.op_type for n in body.node]


def test_a_matrix_that_two_products_share_serves_both():
    products = (
        Product((TURN,), 5, (5,), after=(TURN,)),
        Product((TURN,), 5, weight="shared", after=(TURN, TURN)),
    )
    after = check(Line(products))
    weights = {n.input[1] for n in after.graph.node if n.op_type == "MatMul"}
    assert len(weights) == 1


def test_the_channels_may_be_one():
    line = Line((Product((TURN,), 1, (1,), after=(TURN, ("Relu",)), weight="constant"),), (2, 4, 6, 1))
    assert moves_of(check(line, 1)) == 0


def test_a_vector_is_moved_as_well():
    """A product of one axis."""
    before = (("Transpose", (1, 0, 2)), ("Reshape", (5,)))
    after = (("Unsqueeze", (0, 1)), ("Transpose", (1, 0, 2)), ("Transpose", (2, 0, 1)))
    check(Line((Product(before, 6, (6,), after=after),), (1, 1, 5)))
    check(Line((Product((("Relu",),), 6, (6,), after=after),), (5,)))


def test_several_products_take_one_run():
    product = Product((TURN, THROUGH), 6, (6,), after=(THROUGH, TURN, ("Relu",)))
    assert moves_of(check(Line((product,) * 5), 5)) == 0


def test_without_shapes_it_declines():
    proto = AMONG.proto()
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    assert rewritten(move_linears, proto)[1] == 0


def test_somebody_elses_operator_of_that_name_is_left():
    for op in ("MatMul", "Transpose", "Add"):
        proto = AMONG.proto()
        for n in proto.graph.node:
            if n.op_type == op:
                n.domain = "own"
        proto.opset_import.append(helper.make_opsetid("own", 1))
        assert rewritten(move_linears, proto)[1] == 0, op


# --- random lines ---


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def steps(draw, shape, opset, most=4):
    """Moves, and the shape after them: mostly such that leave the last axis alone."""
    result, shape = [], list(shape)
    for _ in range(draw(st.integers(0, most))):
        kind = draw(st.sampled_from(("Reshape",) * 3 + ("Transpose",) * 4 + ("Pad", "Slice", "One", "Other")))
        rank = len(shape)
        if kind == "Reshape":
            whole = draw(st.sampled_from((False, False, False, True)))  # the channels, too
            left, new = math.prod(shape if whole else shape[:-1]), []
            while left > 1 and len(new) < 3:
                new.append(draw(st.sampled_from(divisors(left))))
                left //= new[-1]
            new += [left] if left > 1 or not new else []
            shape = new if whole else [*new, shape[-1]]
            result.append(("Reshape", tuple(shape)))
        elif kind == "Transpose":
            keep = draw(st.sampled_from((True, True, True, False)))
            perm = (
                [*draw(st.permutations(range(rank - 1))), rank - 1]
                if keep
                else draw(st.permutations(range(rank)))
            )
            shape = [shape[p] for p in perm]
            result.append(("Transpose", tuple(perm)))
        elif kind == "Pad":
            pads = np.zeros((2, rank), int)
            axis = draw(st.integers(0, rank - 1 if draw(st.booleans()) else max(rank - 2, 0)))
            for side in (0, 1):
                low = -1 if shape[axis] > 2 else 0
                pads[side, axis] = draw(st.integers(low, 2))
            mode = draw(st.sampled_from(("constant",) * 5 + ("edge",)))
            number = draw(st.sampled_from((None, 0.0, 0.0, 0.5))) if mode == "constant" else None
            if opset >= 18 and draw(st.booleans()):
                axes, values = (draw(st.sampled_from((axis, axis - rank))),), tuple(pads[:, axis].tolist())
            else:
                axes, values = None, tuple(pads.flatten().tolist())
            if mode == "edge" and min(pads.flatten()) < 0:
                mode = "constant"
            shape[axis] += int(pads[:, axis].sum())
            result.append(("Pad", values, axes, number, mode))
        elif kind == "Slice":
            axis = draw(st.integers(0, rank - 1 if draw(st.booleans()) else max(rank - 2, 0)))
            size, name = shape[axis], draw(st.sampled_from((axis, axis - rank)))
            step = draw(st.sampled_from((1, 1, 2, -1)))
            start = draw(st.integers(0, size - 1))
            if step > 0:
                end = draw(st.integers(start + 1, size))
                values = (
                    (start if draw(st.booleans()) else start - size,),
                    (end if end < size else 2**31 - 1,),
                )
            else:
                end = draw(st.integers(-1, start - 1))
                values = ((start,), (end if end >= 0 else -size - 1,))
            shape[axis] = len(range(start, end, step))
            result.append(("Slice", *values, (name,), (step,) if step != 1 or draw(st.booleans()) else None))
        elif kind == "One":
            axis = draw(st.integers(0, rank))
            ones = [i for i, size in enumerate(shape) if size == 1 and rank > 1]
            if ones and draw(st.booleans()):
                shape.pop(ones[0])
                result.append(("Squeeze", (ones[0],)))
            elif rank > 2 and draw(st.booleans()):
                shape = [math.prod(shape[: rank - 1]), shape[-1]]
                result.append(("Flatten", draw(st.sampled_from((rank - 1, -1)))))
            else:
                shape.insert(axis, 1)
                result.append(("Unsqueeze", (axis,)))
        else:
            result.append((draw(st.sampled_from(("Relu", "Identity"))),))
    return tuple(result), shape


@st.composite
def lines(draw):
    opset = draw(st.sampled_from((13, 17, 18, 20)))
    shape = draw(st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=2, max_size=4))
    start, products, tensors, inner = tuple(shape), [], 0, None
    for i in range(draw(st.sampled_from((1, 1, 2)))):
        before, shape = draw(steps(shape, opset))
        channels, rank = shape[-1], len(shape)
        out = draw(st.sampled_from((1, 2, 4, 6)))
        weight = draw(st.sampled_from(("constant",) * 6 + ("input", "three" if rank > 1 else "constant")))
        if i and products[0].weight == "constant" and channels == inner and draw(st.booleans()):
            weight, out = "shared", products[0].out
        inner = channels
        rank = max(rank, 3) if weight == "three" else rank
        vectors = [(1,) * ones + (out,) for ones in range(rank)]
        bias = draw(st.sampled_from((None, (out,), (), (1,), ("map",), *vectors)))
        shape = [*([1] * (rank - len(shape))), *shape[:-1], out]
        after, shape = draw(steps(shape, opset))
        products.append(Product(before, out, bias, draw(st.booleans()), weight, after=after))
        tensors += len(before) + 1 + (bias is not None) + len(after)
    kind = draw(st.sampled_from(("",) * 6 + ("reader", "output", "branch")))
    use = {kind: draw(st.integers(1, tensors))} if kind else {}
    return Line(
        tuple(products),
        start,
        **use,
        opset=opset,
        dtype=draw(st.sampled_from(("float32",) * 4 + ("float16",))),
        prefix=draw(st.sampled_from(("", "y/product", "t1/moved"))),
    )


@settings(RANDOM, max_examples=150)
@given(lines())
def test_random_lines_give_the_same_outputs(line):
    check(line)


@settings(RANDOM, max_examples=40)
@given(lines(), st.integers(1, 9))
def test_order_and_names_do_not_matter(line, seed):
    other = dataclasses.replace(line, shuffle=seed, prefix="other/")
    results = [rewritten(move_linears, each.proto()) for each in (line, other)]
    assert results[0][1] == results[1][1]
    assert sorted(ops(results[0][0])) == sorted(ops(results[1][0]))


@st.composite
def blocks(draw):
    """Windows of any size around a product, from a map of any size: they are always passed."""
    shape = (*(draw(st.integers(1, most)) for most in (2, 7, 7)), 4)
    size = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    bias = draw(st.sampled_from((None, (4,), (1, 1, 4))))
    make = draw(st.sampled_from((windowed, merged)))
    return make(
        bias, shape, size, **({"out": 4} if make is windowed else {}), opset=draw(st.sampled_from((17, 20)))
    )


@settings(RANDOM, max_examples=60)
@given(blocks())
def test_windows_of_any_size_are_passed(line):
    after = check(line)
    collapsed, _ = rewritten(collapse_chains, after)
    assert sum(op in MOVES for op in ops(collapsed)) <= 3
    assert elements(after, "MatMul") <= elements(line.proto(), "MatMul")


# --- as PyTorch writes it ---


@functools.cache
def block(size, window):
    """A block of the ViT with windows, as exported."""
    torch.manual_seed(0)
    module = Block(16, 2, 2.0, window).eval()
    x = torch.randn(2, *size, 16)
    with quiet():
        proto = torch.onnx.export(module, (x,), dynamo=True, opset_version=20, verbose=False).model_proto
    with torch.inference_mode():
        return proto, x.numpy(), module(x).numpy()


@pytest.mark.parametrize(("size", "window"), [((8, 8), 4), ((9, 7), 4)])
def test_a_block_with_windows_moves_its_tokens_twice(size, window):
    """Once before attention and once behind; the third Transpose is the one of the keys."""
    proto, x, expected = block(size, window)
    proto, _ = run_passes(proto, ["clean-up", "slices-to-split", "collapse-chains"])
    assert (ops(proto).count("Transpose"), ops(proto).count("Reshape")) == (5, 6)
    after = agree_among_moves(move_linears, proto, {proto.graph.input[0].name: x}, 2)
    after, _ = rewritten(collapse_chains, after)
    assert (ops(after).count("Transpose"), ops(after).count("Reshape")) == (3, 4)
    (actual,) = run(after, **{proto.graph.input[0].name: x}).values()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
