"""distribute_sums: the same outputs for less, no convolution over a sum; near-misses left as they are."""

import dataclasses
import functools
import math
from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.graph.graph import tidy
from meta_deploy.graph.passes.distribute_sums import distribute_sums
from meta_deploy.graph.prices import CPU, GPU, Cost
from tests.graph import rewriting
from tests.graph.rewriting import (
    RANDOM,
    TYPES,
    Writer,
    contents,
    feeds,
    form,
    loop,
    node,
    ops,
    price,
    same,
    sizes_of,
)
from tests.small_graphs import model, value, without_size

FREE = Cost(node=0, value=0)  # only multiply-adds count
FEW_NODES = Cost(node=10**10, value=0)
FEW_VALUES = Cost(node=0, value=10**7)
BIASES = ("none", "own", "add", "first")
FULL = "full"  # a constant of the sum's shape


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution that makes a term; what it reads gets the size that fits.

    `bias` is "none", its "own", in an "add", or there "first"; `of` is a Sum that it reads, not an input.
    """

    k: tuple = (3, 3)
    bias: str = "own"
    pads: tuple = (1, 1, 1, 1)
    strides: tuple = (1, 1)
    dilations: tuple = (1, 1)
    group: int = 1
    channels: int = 2  # of its input, a group
    attrs: dict = dataclasses.field(default_factory=dict)
    of: object = None


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A transposed convolution that makes a term; its padding is what fits."""

    k: tuple = (2, 2)
    bias: str = "own"
    strides: tuple = (2, 2)
    output_padding: tuple = (0, 0)
    dilations: tuple = (1, 1)
    group: int = 1
    channels: int = 2
    output_shape: bool = False  # says the size, not the padding
    of: object = None


@dataclasses.dataclass(frozen=True)
class Resized:
    """A Resize of a map of this size."""

    size: tuple = (2, 3)
    by: str = "sizes"  # or "scales", of which the sizes are rounded down
    attrs: dict = dataclasses.field(default_factory=dict)
    of: object = None
    scales: tuple = (1, 1)  # of batch and channels
    computed: bool = False  # scales are not constant


@dataclasses.dataclass(frozen=True)
class Sum:
    """A tree of Adds. Terms may be "input", "relu", FULL, "row" (which broadcasts), the index of another."""

    terms: tuple = (Conv(), Conv((1, 1), pads=(0, 0, 0, 0)))
    tree: str = "left"  # "right", "balanced"


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution of a sum, to vary.

    Tensors: terms are t0, t1, ..., those of a sum below t0 are t0/0, t0/1, ...; sums ts0, ts1, ... and t,
    and t0/s0, ... and t0/s. Products before their bias end in "p", weights in "w".
    """

    sum: Sum = Sum()
    out: int = 4
    bias: str = "own"
    attrs: dict = dataclasses.field(default_factory=dict)
    k: int = 1
    group: int = 1
    shape: tuple = (1, 4, 4, 6)  # of the sum
    weight: str = "constant"  # "input"
    end: str = "Identity"  # what reads the convolution; "" if it is the output itself
    reader: str = ""  # this tensor has another reader
    output: str = ""  # is an output as well
    branch: str = ""  # is read inside of an If as well
    dtype: str = "float32"
    opset: int = 18
    prefix: str = ""

    def n(self, name):
        return self.prefix + name

    def proto(self):
        return Builder(self).proto()


class Builder(Writer):
    """Writes the model of a case."""

    def proto(self):
        case = self.case
        x = self.sum(case.sum, case.shape, "t")
        y = self.linear(
            "Conv", x, [case.out, case.shape[1] // case.group, case.k, case.k], case, "y", case.attrs
        )
        if case.end:
            self.nodes.append(node(case.end, [y], [self.n("end")]))
        others = [self.n(name) if name else "" for name in (case.reader, case.output, case.branch)]
        return self.model([self.n("end")] if case.end else [y], *others)

    def sum(self, total, shape, name):
        terms = []
        for i, term in enumerate(total.terms):
            terms.append(terms[term] if isinstance(term, int) else self.term(term, shape, f"{name}{i}"))
        count = 0
        while len(terms) > 1:
            i = {"left": 0, "right": len(terms) - 2, "balanced": count % (len(terms) - 1)}[total.tree]
            out = self.n(f"{name}s{count}" if len(terms) > 2 else "t" if name == "t" else f"{name}s")
            self.nodes.append(node("Add", terms[i : i + 2], [out]))
            terms[i : i + 2] = [out]
            count += 1
        return terms[0]

    def term(self, term, shape, name):
        if isinstance(term, Conv):
            return self.conv(term, shape, name)
        if isinstance(term, Transposed):
            return self.transposed(term, shape, name)
        if isinstance(term, Resized):
            return self.resized(term, shape, name)
        if term == FULL:
            return self.numbers(name, shape)
        if term == "row":
            return self.input(name, [*shape[:3], 1])
        if term == "input":
            return self.input(name, shape)
        self.nodes.append(node("Relu", [self.input(f"{name}x", shape)], [self.n(name)]))
        return self.n(name)

    def source(self, term, shape, name):
        return self.input(f"{name}x", shape) if term.of is None else self.sum(term.of, shape, f"{name}/")

    def conv(self, term, shape, name):
        size = []
        for i in range(2):
            covered = (shape[2 + i] - 1) * term.strides[i] + term.dilations[i] * (term.k[i] - 1) + 1
            size.append(covered - term.pads[i] - term.pads[2 + i])
        if term.attrs.get("auto_pad", "VALID") != "VALID":
            size = shape[2:]
        attrs = {"strides": term.strides, "dilations": term.dilations, "pads": term.pads, **term.attrs}
        if "auto_pad" in term.attrs:
            del attrs["pads"]
        x = self.source(term, [shape[0], term.channels * term.group, *size], name)
        return self.linear("Conv", x, [shape[1], term.channels, *term.k], term, name, attrs)

    def transposed(self, term, shape, name):
        size, pads = [], []
        for i in range(2):
            more = term.dilations[i] * (term.k[i] - 1) + 1 + term.output_padding[i]
            size.append(max(0, -(-(shape[2 + i] - more) // term.strides[i])) + 1)
            pads.append((size[i] - 1) * term.strides[i] + more - shape[2 + i])
        attrs = {"strides": term.strides, "dilations": term.dilations, "output_padding": term.output_padding}
        attrs["pads"] = [p // 2 for p in pads] + [p - p // 2 for p in pads]
        if term.output_shape:
            attrs["output_shape"] = shape[2:]
            del attrs["pads"]
        x = self.source(term, [shape[0], term.channels * term.group, *size], name)
        kernel = [term.channels * term.group, shape[1] // term.group, *term.k]
        return self.linear("ConvTranspose", x, kernel, term, name, attrs)

    def resized(self, term, shape, name):
        axes = term.attrs.get("axes", (0, 1, 2, 3))
        small = [math.ceil(n / s) for n, s in zip(shape[:2], term.scales, strict=True)]
        x = self.source(term, [*small, *term.size], name)
        roi = self.constant(f"{name}roi", [0.1] * 4 + [0.8] * 4, np.float32) if self.case.opset < 13 else ""
        if term.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
            roi = self.constant(f"{name}roi", [0, 0, 0.1, 0.1, 1, 1, 0.8, 0.8], np.float32)
        if term.by == "sizes":
            inputs = [x, roi, "", self.constant(f"{name}sizes", [shape[a] for a in axes], np.int64)]
        else:
            whole = [*term.scales, *((shape[2 + i] + 0.25) / term.size[i] for i in range(2))]
            scales = self.constant(f"{name}scales", [whole[a] for a in axes], np.float32)
            if term.computed:
                self.nodes.append(
                    node("Relu", [self.input(f"{name}in", [4], TensorProto.FLOAT)], [f"{name}r"])
                )
                scales = f"{name}r"
            inputs = [x, roi, scales]
        self.nodes.append(node("Resize", inputs, [self.n(name)], **term.attrs))
        return self.n(name)

    def linear(self, op, x, kernel, spec, name, attrs):
        out = kernel[1] * spec.group if op == "ConvTranspose" else kernel[0]
        if getattr(spec, "weight", "") == "input":
            weight = self.input(f"{name}w", kernel)
        else:
            weight = self.numbers(f"{name}w", kernel)
        inputs = [x, weight, *([self.numbers(f"{name}b", [out])] if spec.bias == "own" else [])]
        apart = spec.bias in ("add", "first")
        product = self.n(f"{name}p" if apart else name)
        group = {"group": spec.group} if spec.group > 1 else {}
        self.nodes.append(node(op, inputs, [product], **attrs, **group))
        if apart:
            operands = [product, self.numbers(f"{name}b", [out, 1, 1])]
            self.nodes.append(node("Add", operands[:: -1 if spec.bias == "first" else 1], [self.n(name)]))
        return self.n(name)


# --- what is asserted ---


rewritten = functools.partial(rewriting.rewritten, distribute_sums)


def agree(proto, cost=FREE, changes=None):
    """As `rewriting.agree`, for less."""
    after = rewriting.agree(distribute_sums, proto, None, changes, cost)
    assert (price(after, cost) < price(proto, cost)) == (contents(after) != contents(tidied(proto)))
    return after


def tidied(proto):
    return rewriting.rewritten(tidy, proto)[0]


def over_sums(proto):
    """How many 1x1 convolutions read a sum."""
    made = {n.output[0]: n.op_type for n in proto.graph.node}
    weights = {i.name: list(i.dims) for i in proto.graph.initializer}
    convs = [n for n in proto.graph.node if n.op_type == "Conv" and n.input[1] in weights]
    return sum(made.get(n.input[0]) == "Add" and weights[n.input[1]][2:] == [1, 1] for n in convs)


def makers(proto):
    """What each convolution reads: the operator that makes it, or ''."""
    made = {n.output[0]: n.op_type for n in proto.graph.node}
    convs = [n for n in proto.graph.node if n.op_type.startswith("Conv")]
    return sorted(made.get(n.input[0], "") for n in convs)


# --- what folds ---


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("inner", BIASES)
@pytest.mark.parametrize("cost", [GPU, FREE, FEW_VALUES], ids=str)
def test_two_convolutions_take_the_third_in(bias, inner, cost):
    terms = (Conv(bias=inner), Conv((1, 1), inner, (0, 0, 0, 0)))
    after = agree(Case(Sum(terms), bias=bias).proto(), cost, 1)
    assert Counter(ops(after)) == {"Conv": 2, "Add": 1, "Identity": 1}


CONVS = (
    Conv((1, 1), pads=(0, 0, 0, 0)),
    Conv((1, 1), pads=(1, 0, 0, 2), strides=(2, 1)),
    Conv((2, 2), pads=(0, 0, 0, 0), strides=(2, 2)),
    Conv((3, 1), pads=(2, 0, 1, 0), dilations=(2, 1)),
    Conv((5, 3), pads=(1, 1, 1, 1), strides=(1, 3), channels=1),
    Conv((3, 2), attrs={"auto_pad": "SAME_UPPER"}),
    Conv((2, 3), attrs={"auto_pad": "SAME_LOWER"}),
    Conv((3, 2), pads=(0, 0, 0, 0), attrs={"auto_pad": "VALID"}),
    Conv(attrs={"kernel_shape": (3, 3), "group": 1}),
)
TRANSPOSED = (
    Transposed(),
    Transposed((3, 3)),
    Transposed((4, 4), channels=5),
    Transposed((3, 3), output_padding=(1, 1)),
    Transposed((4, 3), strides=(3, 2), output_padding=(2, 0)),
    Transposed((3, 2), dilations=(2, 3)),
    Transposed((3, 3), strides=(1, 1)),
    Transposed((1, 1), strides=(1, 1)),
    Transposed((3, 3), output_shape=True),
)


@pytest.mark.parametrize("term", CONVS + TRANSPOSED, ids=str)
@pytest.mark.parametrize("out", [2, 9])
def test_any_convolution_takes_it_in(term, out):
    terms = (term, dataclasses.replace(term, bias="none"), dataclasses.replace(term, bias="add"))
    after = agree(Case(Sum(terms), out).proto(), FEW_NODES, 1)
    assert len(makers(after)) == 3
    assert ops(after).count("Add") == 2


@pytest.mark.parametrize(
    "term", [Conv(group=2), Transposed(group=2), Transposed((3, 3), group=4, channels=1)]
)
@pytest.mark.parametrize("bias", BIASES)
def test_a_grouped_convolution_stays(term, bias):
    terms = (dataclasses.replace(term, bias=bias), Conv(channels=7))
    after = agree(Case(Sum(terms), 1, bias).proto(), FREE, 1)
    before = Counter(ops(Case(Sum(terms), 1, bias).proto()))
    assert Counter(ops(after)) == {**before, "Add": 1 + (bias in ("add", "first"))}


@pytest.mark.parametrize("tree", ["left", "right", "balanced"])
@pytest.mark.parametrize("count", [2, 3, 6, 16])
def test_any_tree_of_sums(tree, count):
    after = agree(
        Case(Sum((Conv(), Transposed()) * (count // 2) + (Conv(),) * (count % 2), tree)).proto(), GPU, 1
    )
    assert len(makers(after)) == count
    assert ops(after).count("Add") == count - 1


def test_more_terms_than_that_are_left():
    agree(Case(Sum((Conv(),) * 17)).proto(), GPU, 0)


def test_what_comes_last_is_a_convolution():
    """Which adds in passing what is there already."""
    terms = (Conv(), Transposed(), Conv(), Resized())
    after = agree(Case(Sum(terms)).proto(), FREE, 1)
    made = {n.output[0]: n.op_type for n in after.graph.node}
    adds = [n for n in after.graph.node if n.op_type == "Add"]
    assert [made[n.input[1]] for n in adds[-2:]] == ["Conv", "Conv"]


# --- prices ---


def test_where_nodes_are_dear_nothing_becomes_more():
    terms = (Conv(), "input", Transposed())
    agree(Case(Sum(terms)).proto(), FEW_NODES, 0)
    agree(Case(Sum(terms[::2])).proto(), FEW_NODES, 1)


def test_where_values_are_dear_a_narrow_output_comes_first():
    terms = ("input", "relu", FULL, "input")
    after = agree(Case(Sum(terms), 1).proto(), FEW_VALUES, 1)
    assert ops(after).count("Conv") == 4
    agree(Case(Sum(terms), 2).proto(), FEW_VALUES, 0)
    agree(Case(Sum(terms), 1).proto(), FREE, 0)


def test_a_widening_convolution_is_not_taken_to_the_larger_kernel():
    agree(Case(Sum((Conv(), Conv())), 5, shape=(1, 4, 5, 5)).proto(), FREE, 0)
    agree(Case(Sum((Conv(), Conv())), 4, shape=(1, 4, 5, 5)).proto(), FREE, 1)


def test_a_transposed_convolution_is_as_dear_as_its_input_is_large():
    """One channel more for 2 * 4 * 6 * 10 of the other's weights, against 24 * 4 * 5 that it had itself."""
    for channels, changes in ((9, 1), (10, 0)):
        agree(Case(Sum((Transposed(channels=channels),) * 2), 5).proto(), FREE, changes)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("inner", BIASES)
def test_an_add_of_a_bias_that_goes_is_worth_a_node(bias, inner):
    """Else there are as many nodes as before, which do no less."""
    case = Case(Sum((Conv(bias=inner), "input")), bias=bias)
    agree(case.proto(), FEW_NODES, int({bias, inner} & {"add", "first"} != set()))


def test_one_term_may_fold_and_another_not():
    terms = (Conv(channels=1), Conv((5, 5), pads=(2,) * 4, channels=8), Resized((1, 1)))
    after = agree(Case(Sum(terms), 5).proto(), FREE, 0)
    terms = (Conv((1, 1), pads=(0,) * 4, channels=1), Conv((5, 5), pads=(2,) * 4, channels=8))
    after = agree(Case(Sum(terms), 4, shape=(1, 3, 4, 4)).proto(), FREE, 0)
    assert over_sums(after) == 1
    terms = (Conv((2, 2), channels=9, pads=(0,) * 4), Conv((5, 5), pads=(2,) * 4, channels=8))
    after = agree(Case(Sum(terms), 3, shape=(1, 4, 4, 4)).proto(), FREE, 1)
    assert ops(after).count("Conv") == 2


def test_nothing_goes_before_a_resize_to_a_smaller_map():
    """Where there are fewer places to convolve behind it."""
    terms = (Conv(channels=8), Resized((9, 9)))
    after = agree(Case(Sum(terms), 2).proto(), FREE, 1)
    assert makers(after) == ["", "Resize"]


# --- resized maps ---

MODES = ({"mode": "nearest"}, {"mode": "linear"}, {"mode": "cubic", "cubic_coeff_a": -0.5}, {"mode": "cubic"})
PLACES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
ROUNDING = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
SMALL = ((2, 3), (1, 1), (3, 4), (1, 4))


def before_resize(case, opset=19, cost=FREE):
    """The new model, after asserting that the convolution now is before all Resizes."""
    after = agree(dataclasses.replace(case, opset=opset).proto(), cost, 1)
    assert set(makers(after)) == {""}
    return after


@pytest.mark.parametrize("bias", ["none", "own"])
@pytest.mark.parametrize("by", ["sizes", "scales"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_it_goes_before_a_resize(mode, place, by, bias):
    """Whose weights add up to one, at the borders too."""
    attrs = {**mode, "coordinate_transformation_mode": place}
    terms = tuple(Resized(size, by, attrs) for size in SMALL)
    before_resize(Case(Sum(terms), 5, bias))


@pytest.mark.parametrize("rounding", ROUNDING)
def test_however_nearest_is_rounded(rounding):
    terms = tuple(Resized(size, attrs={"mode": "nearest", "nearest_mode": rounding}) for size in SMALL)
    before_resize(Case(Sum(terms)))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("by", ["sizes", "scales"])
def test_it_goes_before_an_antialiased_resize(mode, by):
    attrs = {"mode": mode, "antialias": 1, "coordinate_transformation_mode": "half_pixel"}
    terms = (Resized((3, 5), by, attrs), Resized((1, 8), by, attrs))
    before_resize(Case(Sum(terms), 3))


def test_it_goes_before_a_resize_of_an_older_opset():
    attrs = {"mode": "nearest", "coordinate_transformation_mode": "tf_half_pixel_for_nn"}
    terms = (Resized((2, 3), "scales", attrs), Resized((2, 2), "scales", {"mode": "linear"}))
    before_resize(Case(Sum(terms)), 11)


@pytest.mark.parametrize(
    "term",
    [
        Resized(attrs={"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 3.0}),
        Resized(attrs={"axes": (2, 3)}),
        Resized(attrs={"axes": (0, 1, 2, 3)}),
        Resized(attrs={"mode": "cubic", "exclude_outside": 1}),
        Resized(by="scales", scales=(1, 1.2)),  # four channels out of four, but not as they were
        Resized(by="scales", computed=True),
        Resized(scales=(1, 2)),
    ],
    ids=str,
)
def test_a_resize_that_may_change_constants_stays(term):
    """It keeps all channels, and what has its size is convolved."""
    case = Case(Sum((Conv(channels=9), term)), 1)
    proto = case.proto()
    if term.computed:  # of known shape nevertheless
        proto.graph.value_info.append(value("t1", list(case.shape)))
        after, changes = rewritten(proto, FREE)
        values = feeds(proto)
        values["t1in"] = np.float32([1, 1, 2, 2])
        same(proto, after, values)
    else:
        after = agree(proto, FREE)
        changes = 1
    assert changes == 1
    assert sizes_of(after)[next(n.output[0] for n in after.graph.node if n.op_type == "Resize")][1] == 4


def test_a_resize_that_keeps_the_ratio_stays():
    """Its channels would then be more than the convolution puts out."""
    term = Resized((9, 9), attrs={"keep_aspect_ratio_policy": "not_smaller"})
    agree(Case(Sum((term, term)), 2, shape=(1, 1, 13, 13)).proto(), FREE, 0)
    agree(Case(Sum((Resized((9, 9)),) * 2), 2, shape=(1, 1, 13, 13)).proto(), FREE, 1)


def test_sums_before_a_resize_are_taken_apart_as_well():
    inner = Sum((Conv(), Resized((1, 1), of=Sum((Conv(), Transposed())))))
    after = agree(Case(Sum((Resized(of=inner), Conv()))).proto(), FREE, 3)
    assert set(makers(after)) == {""}
    assert Counter(ops(after)) == {"Conv": 3, "ConvTranspose": 1, "Resize": 2, "Add": 3, "Identity": 1}


def test_sums_that_a_folded_convolution_reads_are_taken_apart_as_well():
    inner = Conv((1, 1), pads=(0,) * 4, channels=4, of=Sum((Conv(), Transposed(), Conv())))
    after = agree(Case(Sum((inner, Conv()))).proto(), FREE, 2)
    assert set(makers(after)) == {""}
    assert len(makers(after)) == 4


# --- near-misses ---


@pytest.mark.parametrize(
    "case",
    [
        Case(reader="t"),
        Case(output="t"),
        Case(branch="t"),
        Case(k=3),
        Case(attrs={"pads": (1, 1, 1, 1)}),
        Case(attrs={"pads": (0, 0, 0, 1)}),
        Case(attrs={"strides": (2, 2)}),
        Case(attrs={"strides": (1, 2)}),
        Case(group=2),
        Case(weight="input"),
        Case(Sum((Conv(),))),
        Case(Sum((Conv(bias="add"),))),
        Case(Sum((Conv(), "row"))),
        Case(Sum(("row", Conv()))),
        Case(Sum(("input", 0))),
        Case(Sum((Conv(), Conv(), 1))),
        Case(Sum((Conv(), Conv(), 0, Conv()), "balanced")),
        Case(Sum((Conv(group=2), "input", "relu"))),
        Case(Sum(("input", "relu", "input", 0)), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("cost", [CPU, GPU, FREE, FEW_VALUES], ids=str)
def test_a_near_miss_is_left(case, cost):
    agree(case.proto(), cost, 0)


@pytest.mark.parametrize("end", ["", "Identity"])
@pytest.mark.parametrize(
    "attrs", [{"auto_pad": "SAME_UPPER"}, {"auto_pad": "VALID"}, {"strides": (1, 1)}], ids=str
)
def test_what_only_looks_like_one_is_rewritten(attrs, end):
    agree(Case(attrs=attrs, end=end).proto(), FREE, 1)
    agree(Case(attrs=attrs, end=end, bias="add").proto(), FREE, 1)


@pytest.mark.parametrize("kind", ["reader", "output", "branch"])
def test_a_sum_in_the_middle_that_something_else_reads_is_a_term(kind):
    case = Case(Sum((Conv(), Conv(), Conv(channels=3))), 1, **{kind: "ts0"})
    after = agree(case.proto(), FREE, 1)
    assert makers(after) == ["", "", "", "Add"]


@pytest.mark.parametrize("kind", ["reader", "output", "branch"])
@pytest.mark.parametrize("term", [Conv(), Conv(bias="add"), Transposed(), Resized()])
def test_a_term_that_something_else_reads_stays(kind, term):
    case = Case(Sum((Conv(channels=8), term)), 1, **{kind: "t1"})
    made = ops(case.proto())
    after = agree(case.proto(), FREE, 1)
    assert ops(after).count("Conv") == made.count("Conv")  # one of its own more, and the last less
    assert ops(after).count("Resize") == made.count("Resize")
    agree(dataclasses.replace(case, out=4).proto(), FEW_NODES, 0)


@pytest.mark.parametrize("kind", ["reader", "output", "branch"])
def test_a_product_before_its_bias_that_something_else_reads_stays(kind):
    case = Case(Sum((Conv(channels=8), Conv(bias="add"))), 1, **{kind: "t1p"})
    after = agree(case.proto(), FREE, 1)
    assert makers(after) == ["", "", "Add"]


@pytest.mark.parametrize("kind", ["reader", "output", "branch"])
@pytest.mark.parametrize("name", ["y", "yp"])
def test_what_is_put_out_keeps_its_name(kind, name):
    case = Case(bias="add", **{kind: name})
    agree(case.proto(), FREE, 1)


def test_what_broadcasts_is_one_term_with_what_it_is_added_to():
    terms = (Conv(channels=8), Conv(channels=8), "row", Conv(channels=8))
    after = agree(Case(Sum(terms), 1).proto(), FREE, 1)
    assert makers(after) == ["", "", "", "Add"]


def test_a_constant_is_convolved_as_well():
    after = agree(Case(Sum((FULL, Conv())), 1).proto(), FREE, 1)
    assert ops(after).count("Conv") == 2


def test_a_bias_on_one_place_is_a_bias():
    """The constant has the sum's whole shape."""
    case = Case(Sum((Conv((1, 1), "add", (0,) * 4), Conv((1, 1), "none", (0,) * 4))), shape=(1, 4, 1, 1))
    proto = case.proto()
    next(i for i in proto.graph.initializer if i.name == "t0b").dims[:] = case.shape
    after = agree(proto, FREE, 1)
    assert Counter(ops(after)) == {"Conv": 2, "Add": 1, "Identity": 1}


def test_empty_maps_are_left():
    assert rewritten(Case(shape=(0, 4, 4, 6)).proto(), FEW_NODES)[1] == 0


def test_what_no_output_needs_is_no_reader():
    proto = Case().proto()
    proto.graph.node.append(node("Neg", ["t"], ["unused"]))
    assert rewritten(proto, FREE)[1] == 1


@pytest.mark.parametrize("axis", [2, 3, None])
def test_without_shapes_it_declines(axis):
    proto = without_size(Case().proto(), axis)
    after, changes = rewritten(proto, FREE)
    assert changes == 0
    same(proto, after, feeds(Case().proto()))


@pytest.mark.parametrize("cost", [GPU, FREE, FEW_VALUES, FEW_NODES], ids=str)
@pytest.mark.parametrize("bias", ["none", "add"])
@pytest.mark.parametrize("term", [Conv(), Transposed(), Resized(by="scales")])
def test_a_batch_of_any_size_is_priced_as_one_image(term, bias, cost):
    case = Case(Sum((Conv(channels=8), term)), 1, bias, shape=(1, 4, 4, 6))
    proto = case.proto()
    expected, made = rewritten(proto, cost)
    for info in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
        info.type.tensor_type.shape.dim[0].dim_param = "n"
    after, changes = rewritten(proto, cost)
    assert (changes, ops(after)) == (made, ops(expected))
    for batch in (1, 3):
        same(proto, after, feeds(dataclasses.replace(case, shape=(batch, *case.shape[1:])).proto()))


def test_sizes_that_hang_on_the_batch_are_left():
    """As constants they could not be written."""
    case = Case(Sum((Conv(channels=8), Resized())), 1)
    assert ops(agree(case.proto(), FREE, 1)).count("Conv") == 2
    proto = case.proto()
    target = next(n for n in proto.graph.node if n.op_type == "Resize")
    proto.graph.node.insert(0, node("Shape", ["full"], ["whole"]))
    proto.graph.input.append(value("full", list(case.shape)))
    target.input[3] = "whole"
    for info in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
        info.type.tensor_type.shape.dim[0].dim_param = "n"
    after, _ = rewritten(proto, FREE)
    onnx.checker.check_model(after, full_check=True)
    same(proto, after, feeds(case.proto()) | {"full": np.zeros(case.shape, np.float32)})


@pytest.mark.parametrize("op", ["Add", "Conv"])
def test_somebody_elses_operator_of_that_name_is_left(op):
    proto = Case().proto()
    next(n for n in reversed(proto.graph.node) if n.op_type == op).domain = "own"
    proto.opset_import.append(helper.make_opsetid("own", 1))
    assert rewritten(proto, FREE)[1] == 0


@pytest.mark.parametrize("rank", [3, 5])
def test_maps_of_another_rank_are_left(rank):
    rng, shape = np.random.default_rng(0), [1, 2, *[3] * (rank - 2)]
    weight = numpy_helper.from_array(rng.standard_normal([2, 2, *[1] * (rank - 2)]).astype(np.float32), "w")
    nodes = [node("Conv", [x, "w"], [f"{x}y"]) for x in "ab"]
    nodes += [node("Add", ["ay", "by"], ["t"]), node("Conv", ["t", "w"], ["y"])]
    agree(model(nodes, [value("a", shape), value("b", shape)], initializers=[weight]), FREE, 0)


def test_a_convolution_in_a_branch_is_left():
    """And the sum outside that it reads."""
    proto = Case(end="").proto()
    conv, condition = proto.graph.node[-1], value("c", [], TensorProto.BOOL)
    sides = []
    for i in range(2):
        one = onnx.NodeProto.FromString(conv.SerializeToString())
        one.output[0] = f"y{i}"
        sides.append(helper.make_graph([one], f"side{i}", [], [value(f"y{i}", [1, 4, 4, 6])]))
    proto.graph.node[-1].CopyFrom(node("If", ["c"], ["y"], then_branch=sides[0], else_branch=sides[1]))
    proto.graph.input.append(condition)
    agree(proto, FREE, 0)


@pytest.mark.parametrize("read", ["t", "t0", "ts0", "y"])
def test_what_a_loop_reads_is_kept(read):
    proto = Case(Sum((Conv(channels=8),) * 3), 1).proto()
    rounds = numpy_helper.from_array(np.array(3), "rounds")
    proto.graph.initializer.append(rounds)
    channels = 1 if read == "y" else 4
    out = value("scanned", [3, 1, channels, 4, 6])
    proto.graph.node.append(
        loop([node("Neg", [read], ["neg"])], [value("neg", [1, channels, 4, 6])], ["scanned"])
    )
    proto.graph.output.append(out)
    after, changes = rewritten(proto, FREE)
    assert changes == (read != "t")
    same(proto, after)


def test_a_bias_in_a_branch_is_left():
    """The convolution is outside, its bias' Add is the branch's own."""
    case = Case(bias="none", end="")
    proto = case.proto()
    bias = numpy_helper.from_array(np.arange(4, dtype=np.float32).reshape(4, 1, 1), "bias")
    then = helper.make_graph([node("Add", ["y", "bias"], ["a"])], "then", [], [value("a", [1, 4, 4, 6])])
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [1, 4, 4, 6], np.zeros(96))
    constant = node("Constant", [], ["b"], value=zero)
    other = helper.make_graph([constant], "else", [], [value("b", [1, 4, 4, 6])])
    proto.graph.node.append(node("If", ["c"], ["z"], then_branch=then, else_branch=other))
    proto.graph.initializer.append(bias)
    proto.graph.input.append(value("c", [], TensorProto.BOOL))
    proto.graph.output[0].CopyFrom(value("z", [1, 4, 4, 6]))
    after, _ = rewritten(proto, FREE)
    onnx.checker.check_model(after, full_check=True)
    for taken in (True, False):
        same(proto, after, {**feeds(proto), "c": np.array(taken)})


# --- weights ---


def test_shared_weights_stay_what_they_are_for_others():
    proto = Case(Sum((Conv((1, 1), pads=(0,) * 4, channels=4), Conv())), reader="t0x").proto()
    for n in proto.graph.node:
        if n.output[0] in ("y", "t0"):
            n.input[1] = "yw"
        if n.op_type == "Neg":
            n.CopyFrom(node("Conv", [n.input[0], "yw", "yb"], [n.output[0]]))
    proto = onnx.shape_inference.infer_shapes(proto)
    after = agree(proto, FREE, 1)
    shared = {i.name: i for i in after.graph.initializer}["yw"]
    assert shared == {i.name: i for i in proto.graph.initializer}["yw"]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_types_keep_theirs(dtype):
    terms = (Conv(), Transposed((3, 3)), Resized(attrs={"mode": "linear"}))
    case = Case(Sum(terms), 3, dtype=dtype)
    after = agree(case.proto(), FREE, 1)
    assert {i.data_type for i in after.graph.initializer if i.data_type != TensorProto.INT64} == {
        TYPES[dtype]
    }


@pytest.mark.parametrize("name", ["w", "b"])
def test_weights_too_large_for_their_type_are_not_made(name):
    proto = Case(dtype="float16").proto()
    for i in proto.graph.initializer:
        if i.name in (f"t0{name}", "yw"):
            i.CopyFrom(numpy_helper.from_array(np.full(i.dims, 300, np.float16), i.name))
    assert rewritten(proto, FREE)[1] == 0


# --- random sums ---


# --- the parts of a Concat ---


def levels(sizes, channels=(3, 5), out=4, order="raster", bias=True, axis=1, reader="", to=(4, 6)):
    """Maps of tokens of several levels, each a product, resized alike, joined and convolved, as in SegFormer.

    `order` of the tokens in the map; `reader` is another reader of this tensor.
    """
    rng = np.random.default_rng(0)
    nodes, inputs, constants, parts = [], [], {"size": np.array([1, 8, *to])}, []
    for i, (height, width) in enumerate(sizes):
        inputs.append(value(f"x{i}", [1, height * width, channels[i]]))
        constants[f"w{i}"] = rng.standard_normal((channels[i], 8)).astype(np.float32)
        constants[f"b{i}"] = rng.standard_normal(8).astype(np.float32)
        constants[f"shape{i}"] = np.array([1, 8, height, width])
        nodes += [node("MatMul", [f"x{i}", f"w{i}"], [f"p{i}"]), node("Add", [f"p{i}", f"b{i}"], [f"t{i}"])]
        if order == "raster":
            nodes.append(node("Transpose", [f"t{i}"], [f"c{i}"], perm=[0, 2, 1]))
            nodes.append(node("Reshape", [f"c{i}", f"shape{i}"], [f"m{i}"]))
        else:  # columns first
            constants[f"shape{i}"] = np.array([1, width, height, 8])
            nodes.append(node("Reshape", [f"t{i}", f"shape{i}"], [f"c{i}"]))
            nodes.append(node("Transpose", [f"c{i}"], [f"m{i}"], perm=[0, 3, 2, 1]))
        parts.append(f"m{i}")
        if (height, width) != to:
            nodes.append(node("Resize", [f"m{i}", "", "", "size"], [f"r{i}"], mode="linear"))
            parts[-1] = f"r{i}"
    nodes.append(node("Concat", parts, ["joined"], axis=axis))
    width = 8 * (len(parts) if axis == 1 else 1)
    constants["kernel"] = rng.standard_normal((out, width, 1, 1)).astype(np.float32)
    constants["bias"] = rng.standard_normal(out).astype(np.float32)
    nodes.append(node("Conv", ["joined", "kernel", *(["bias"] if bias else [])], ["y"], kernel_shape=[1, 1]))
    outputs = ["y"]
    if reader:
        nodes.append(node("Neg", [reader], ["read"]))
        outputs.append("read")
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return model(nodes, inputs, outputs, initializers)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [[(4, 6), (2, 3)], [(2, 3), (4, 3)], [(2, 2), (4, 6), (1, 1)]])
def test_levels_of_tokens_meet_the_kernel_before_they_are_resized(sizes, bias):
    after = agree(levels(sizes, (3, 5, 2)[: len(sizes)], bias=bias), FREE, None)
    assert not {"Conv", "Concat"} & set(ops(after))
    assert ops(after).count("MatMul") == len(sizes)
    assert ops(after).count("Resize") == len([size for size in sizes if size != (4, 6)])


def test_tokens_in_another_order_are_convolved_before_they_are_resized():
    after = agree(levels([(2, 3), (3, 2)], order="columns"), FREE, None)
    assert ops(after).count("Conv") == 2
    assert "Concat" not in ops(after)


@pytest.mark.parametrize("reader", ["joined", "r1", "t1"])
def test_levels_that_something_else_reads(reader):
    """What is read elsewhere stays, and the others go on."""
    after = agree(levels([(2, 3), (1, 2)], reader=reader), FREE, None)
    assert ("Concat" in ops(after)) == (reader == "joined")
    assert ("Conv" in ops(after)) == (reader in ("joined", "r1", "t1"))


def test_what_is_joined_along_the_height_is_left():
    assert "Concat" in ops(agree(levels([(2, 3), (4, 3)], axis=2), FREE, 0))


def test_parts_of_one_size_are_left_where_nodes_are_dear():
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Neg", ["x"], ["b"]),
        node("Concat", ["a", "b"], ["c"], axis=1),
        node("Conv", ["c", "w"], ["y"], kernel_shape=[1, 1]),
    ]
    weights = numpy_helper.from_array(np.ones((3, 8, 1, 1), np.float32), "w")
    proto = model(nodes, [value("x", [1, 4, 5, 6])], initializers=[weights])
    assert ops(agree(proto, CPU, 0)) == ["Relu", "Neg", "Concat", "Conv"]


def small(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convs(draw, channels, depth):
    group = draw(st.sampled_from((1, 1, 1, 1, channels)))
    pads = tuple(draw(st.integers(0, 1)) for _ in range(4))
    conv = Conv(
        draw(small(1, 4)), draw(st.sampled_from(BIASES)), pads, draw(small(1, 2)), draw(small(1, 2)), group
    )
    conv = dataclasses.replace(conv, channels=draw(st.integers(1, 4)))
    if group == 1 and depth and draw(st.sampled_from((0, 0, 1))):
        inner = draw(sums(conv.channels, depth - 1))
        pads = draw(st.sampled_from((0, 1)))
        conv = Conv((1 + 2 * pads,) * 2, conv.bias, (pads,) * 4, channels=conv.channels, of=inner)
    return conv


@st.composite
def transposed(draw, channels, depth):
    strides, dilations, group = (
        draw(small(1, 3)),
        draw(small(1, 2)),
        draw(st.sampled_from((1, 1, 1, channels))),
    )
    padding = tuple(draw(st.integers(0, stride - 1)) for stride in strides)
    padding = padding if draw(st.booleans()) else (0, 0)
    term = Transposed(draw(small(1, 4)), draw(st.sampled_from(BIASES)), strides, padding, dilations, group)
    return dataclasses.replace(term, channels=draw(st.integers(1, 4)))


@st.composite
def resized(draw, channels, depth):
    attrs = dict(draw(st.sampled_from(MODES)))
    attrs["coordinate_transformation_mode"] = draw(st.sampled_from(PLACES))
    if attrs["mode"] == "nearest":
        attrs["nearest_mode"] = draw(st.sampled_from(ROUNDING))
    of = draw(sums(channels, depth - 1)) if depth and draw(st.sampled_from((0, 1))) else None
    size = draw(small(3 if of else 1, 7))
    return Resized(size, draw(st.sampled_from(("sizes", "scales"))), attrs, of)


@st.composite
def sums(draw, channels, depth=1):
    terms = []
    for i in range(draw(st.sampled_from((2, 2, 3, 3, 4, 6)))):
        plain = ["input", "relu", *([FULL, "row", draw(st.integers(0, i - 1))] if i else [])]
        kind = draw(st.sampled_from(("conv", "conv", "conv", "transposed", "resized", "resized", "plain")))
        made = {"conv": convs, "transposed": transposed, "resized": resized}.get(kind)
        terms.append(draw(made(channels, depth)) if made else draw(st.sampled_from(plain)))
    return Sum(tuple(terms), draw(st.sampled_from(("left", "right", "balanced"))))


COSTS = st.one_of(
    st.sampled_from((CPU, GPU, FREE, FEW_NODES, FEW_VALUES)),
    st.builds(Cost, st.sampled_from((0, 10, 100, 1000, 10000)), st.sampled_from((0, 1, 10, 100))),
)
OTHERS = st.sampled_from(("",) * 12 + ("t", "ts0", "t0", "t1", "y"))


@st.composite
def cases(draw):
    channels = draw(st.integers(1, 4))
    case = Case(
        draw(sums(channels)),
        draw(st.integers(1, 6)),
        draw(st.sampled_from(BIASES)),
        draw(st.sampled_from(({},) * 6 + ({"pads": (1, 1, 1, 1)}, {"strides": (2, 2)}))),
        draw(st.sampled_from((1,) * 6 + (3,))),
        shape=(draw(st.integers(1, 2)), channels, *draw(small(3, 7))),
        end=draw(st.sampled_from(("Identity", ""))),
        opset=draw(st.sampled_from((19, 20))),
    )
    names = [
        f"t{i}" for i, term in enumerate(case.sum.terms) if not isinstance(term, int) and term not in (FULL,)
    ]
    names += ["t", "y", *(["ts0"] if len(case.sum.terms) > 2 else [])]
    for kind in ("reader", "output", "branch"):
        if (name := draw(OTHERS)) in names and not (kind == "output" and name[1:].isdigit()):
            case = dataclasses.replace(case, **{kind: name})
    return case


@settings(RANDOM, max_examples=80)
@given(cases(), COSTS)
def test_random_sums_give_the_same_for_less(case, cost):
    agree(case.proto(), cost)


@settings(RANDOM, max_examples=40)
@given(cases(), COSTS, st.integers(1, 1000), st.sampled_from(("", "t/", "y/term", "y")))
def test_names_and_order_do_not_matter(case, cost, shuffle, prefix):
    expected, changes = rewritten(case.proto(), cost)
    other = dataclasses.replace(case, prefix=prefix).proto()
    actual, made = rewritten(other, cost, shuffle=shuffle)
    assert (made, form(actual)) == (changes, form(expected))
    same(other, actual)
