"""join_kernels: kernels of several sizes over one map are one, with the same outputs; near-misses stay."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meta_deploy.graph.explain import explaining
from meta_deploy.graph.graph import to_graph
from meta_deploy.graph.passes.join_kernels import join_kernels
from meta_deploy.graph.prices import CPU, GPU, Cost
from tests.graph.rewriting import RANDOM, Writer, agree, feeds, node, ops, rewritten
from tests.small_graphs import any_batch, model, value, without_size

NODES = Cost(node=1e9, value=0)  # the number of nodes decides
FREE = Cost(node=0, value=0)  # starting a node costs nothing


@dataclasses.dataclass(frozen=True)
class Map:
    """A convolution by a kernel, or with `k` None a product of the tokens. `bias`: "none", "own" or "add"."""

    k: tuple | None = (1, 1)
    out: int = 2
    bias: str = "own"
    attrs: dict = dataclasses.field(default_factory=dict)
    end: str = "Tanh"  # what reads it; "" where it is an output itself
    constant: bool = True


BLOCK = (Map(None, 6, "add"), Map((3, 3), 2))


@dataclasses.dataclass(frozen=True)
class Case:
    """Maps of a map (B, C, H, W), which is made of tokens unless `tokens` is 0.

    `tokens` is how many axes they have, `perm` how their places are turned first.
    """

    maps: tuple = BLOCK
    shape: tuple = (2, 3, 4, 6)
    tokens: int = 4
    perm: tuple = (0, 3, 1, 2)
    reader: bool = False  # something else reads the map
    output: str = ""
    branch: str = ""
    dtype: str = "float32"
    opset: int = 18
    shuffle: int = 0

    def n(self, name):
        return name

    def proto(self):
        w = Writer(self)
        b, c, *space = self.shape
        x = w.input("t" if self.tokens else "x", [b, *space, c] if self.tokens else self.shape)
        if self.tokens == 4:
            w.add("Transpose", ["t"], "x", perm=self.perm)
        elif self.tokens == 3:
            w.add("Reshape", ["t", w.integers([b, int(np.prod(space)), c])], "rows")
            w.add("Transpose", ["rows"], "columns", perm=(0, 2, 1))
            w.add("Reshape", ["columns", w.integers(self.shape)], "x")
            x = "rows"
        ends = [self.map(w, one, x, f"y{i}") for i, one in enumerate(self.maps)]
        return w.model(ends, "x" if self.reader else "", self.output, self.branch, self.shuffle)

    def map(self, w, one, tokens, y):
        apart = one.bias == "add"
        product = f"{y}p" if apart else y
        channels = self.shape[1]
        size = (channels, one.out) if one.k is None else (one.out, channels, *one.k)
        weight = w.numbers(f"{y}w", size) if one.constant else w.input(f"{y}w", size)
        if one.k is None:
            w.add("MatMul", [tokens, weight], product)
        else:
            attrs = {"pads": [k // 2 for k in one.k] * 2, **one.attrs}
            own = [w.numbers(f"{y}b", [one.out])] if one.bias == "own" else []
            w.add("Conv", ["x", weight, *own], product, **attrs)
        if apart:
            shape = [one.out] if one.k is None else [one.out, 1, 1]
            w.add("Add", [product, w.numbers(f"{y}b", shape)], y)
        return w.add(one.end, [y], f"{y}e") if one.end else y


def joined(case, changes=1, cost=NODES, **given):
    return agree(join_kernels, case.proto(), None, changes, cost, collapse=True, **given)


@pytest.mark.parametrize("tokens", [3, 4])
def test_a_product_of_tokens_joins_the_convolution_of_their_map(tokens):
    after = joined(Case(tokens=tokens))
    assert ops(after).count("Conv") == 1
    assert "MatMul" not in ops(after)
    (conv,) = (n for n in after.graph.node if n.op_type == "Conv")
    weight = next(i for i in after.graph.initializer if i.name == conv.input[1])
    assert list(weight.dims) == [8, 3, 3, 3]


def test_kernels_of_several_sizes_are_the_largest():
    maps = (Map((1, 1)), Map((3, 3)), Map((1, 5), bias="add"), Map((5, 1), bias="none"))
    after = joined(Case(maps, tokens=0), 3)
    (conv,) = (n for n in after.graph.node if n.op_type == "Conv")
    weight = next(i for i in after.graph.initializer if i.name == conv.input[1])
    assert list(weight.dims) == [8, 3, 5, 5]


STAYS = {
    "a stride": Case((BLOCK[0], Map((3, 3), attrs={"strides": [2, 2]}))),
    "a dilation": Case((BLOCK[0], Map((3, 3), attrs={"dilations": [2, 2], "pads": [2] * 4}))),
    "no padding": Case((BLOCK[0], Map((3, 3), attrs={"pads": [0] * 4}))),
    "padding to one side": Case((BLOCK[0], Map((3, 3), attrs={"pads": [2, 2, 0, 0]}))),
    "an even kernel": Case((BLOCK[0], Map((2, 2), attrs={"pads": [1, 1, 0, 0]}))),
    "automatic padding": Case((BLOCK[0], Map((3, 3), attrs={"auto_pad": "SAME_UPPER", "pads": None}))),
    "weights that are computed": Case((BLOCK[0], Map((3, 3), constant=False))),
    "places that are turned": Case(perm=(0, 3, 2, 1), shape=(2, 3, 4, 4)),
    "one kernel, which merge-siblings joins": Case((Map((3, 3)), Map((3, 3), 3)), tokens=0),
    "one alone": Case(BLOCK[1:]),
    "products of tokens alone": Case((BLOCK[0], Map(None, 3)), reader=True),
    "an old Split": Case(opset=11),
}


@pytest.mark.parametrize("case", STAYS.values(), ids=STAYS)
def test_near_misses_stay(case):
    joined(case, 0)


def test_grouped_convolutions_stay():
    proto = model(
        [
            node("Conv", ["x", "a"], ["p"]),
            node("Conv", ["x", "b"], ["q"], group=3, pads=[1] * 4),
            node("Concat", ["p", "q"], ["y"], axis=1),
        ],
        [value("x", (1, 3, 4, 4))],
        ["y"],
        [
            *(numpy(shape, name) for name, shape in (("a", (2, 3, 1, 1)), ("b", (3, 1, 3, 3)))),
        ],
    )
    agree(join_kernels, proto, None, 0, NODES)


def numpy(shape, name):
    from onnx import numpy_helper

    array = np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)
    return numpy_helper.from_array(array, name)


def test_a_map_of_unknown_size_stays_and_says_so():
    proto = without_size(Case(tokens=0, maps=(Map((1, 1)), Map((3, 3)))).proto(), 2)
    with explaining() as reasons:
        rewritten(join_kernels, proto, NODES)
    assert any("the shape of" in one.reason and "not known" in one.reason for one in reasons)


@pytest.mark.parametrize("tokens", [0, 3, 4])
def test_any_batch(tokens):
    maps = (Map((1, 1)), Map((3, 3))) if not tokens else BLOCK
    proto = any_batch(Case(maps, tokens=4 if tokens else 0).proto())
    agree(join_kernels, proto, feeds(proto, 5), 1, NODES)


# --- prices ---


def test_small_maps_are_joined_on_a_gpu_and_none_on_a_cpu():
    small, large = Case(shape=(1, 24, 32, 32)), Case(shape=(1, 96, 64, 64))
    maps = (Map(None, 72, "add"), Map((3, 3), 6))
    joined(dataclasses.replace(small, maps=maps), 1, GPU)
    joined(dataclasses.replace(small, maps=maps), 0, CPU)
    joined(dataclasses.replace(large, maps=(Map(None, 288, "add"), Map((3, 3), 24))), 0, GPU)


@pytest.mark.parametrize(("between", "stays"), [([], True), (["Gelu"], True), (["Softmax"], False)])
def test_a_part_that_another_product_reads_costs_a_copy(between, stays):
    """Two become one, and a kernel would have to cut the part out; what stands between may do it."""
    w = Writer(Case(opset=20))
    w.input("x", (1, 3, 4, 4))
    w.add("Conv", ["x", w.numbers("a", (3, 3, 1, 1))], "p")
    w.add("Conv", ["x", w.numbers("b", (2, 3, 3, 3))], "q", pads=[1] * 4)
    end = "p"
    for op in between:
        end = w.add(op, [end], f"{end}{op}")
    w.add("Conv", [end, w.numbers("c", (2, 3, 3, 3))], "y")
    w.add("Tanh", ["q"], "z")
    agree(join_kernels, w.model(["y", "z"]), None, 0 if stays else 1, NODES)


def test_what_only_arithmetic_costs_is_left():
    with explaining() as reasons:
        rewritten(join_kernels, Case().proto(), FREE)
    assert any("one convolution costs" in one.reason for one in reasons)


# --- random maps ---


@st.composite
def cases(draw):
    tokens = draw(st.sampled_from((0, 3, 4)))
    kernels = [(1, 1), (3, 3), (1, 3), (3, 1), (5, 3)] + [None] * (2 if tokens else 0)
    maps = tuple(
        Map(
            draw(st.sampled_from(kernels)),
            draw(st.integers(1, 4)),
            draw(st.sampled_from(("none", "own", "add"))),
            {},
            draw(st.sampled_from(("Tanh", ""))),
        )
        for _ in range(draw(st.integers(1, 4)))
    )
    maps = tuple(dataclasses.replace(m, bias="add") if m.k is None and m.bias == "own" else m for m in maps)
    return Case(
        maps,
        tuple(draw(st.integers(1, 5)) for _ in range(4)),
        tokens,
        reader=draw(st.booleans()),
        output=draw(
            st.sampled_from(("", "x" if tokens else "", "y0", "y0p" if maps[0].bias == "add" else ""))
        ),
        branch=draw(st.sampled_from(("", "", "x", "y0"))),
        dtype=draw(st.sampled_from(("float32", "float32", "float16"))),
        shuffle=draw(st.integers(0, 3)),
    )


@settings(RANDOM, max_examples=150)
@given(cases())
def test_random_maps_answer_as_before(case):
    proto = case.proto()
    tolerance = 2e-5 if case.dtype == "float32" else 2e-2
    after = agree(join_kernels, proto, None, None, NODES, tolerance=tolerance, floor=1e-2)
    assert len(to_graph(after).nodes) <= len(to_graph(proto).nodes) + 4 * len(case.maps)
