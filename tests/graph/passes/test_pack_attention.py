"""pack_attention: the same attention with its projection in one operator; near-misses declined."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from meta_deploy.graph.explain import explaining
from meta_deploy.graph.graph import BATCH
from meta_deploy.graph.passes.pack_attention import pack_attention
from meta_deploy.targets.openvino import compile_model
from tests.graph.rewriting import RANDOM, node, ops, rewritten, same
from tests.small_graphs import any_batch, model, run, value

MICROSOFT = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]


@dataclasses.dataclass(frozen=True)
class Packed:
    """MatMul, Add, Split and MultiHeadAttention, to vary."""

    b: int = 2
    n: int = 5
    c: int = 6
    heads: int = 2
    d: int = 4
    width: int = 4  # of a head's values
    bias: bool = True
    order: tuple = (0, 1, 2)  # of q, k and v among the parts
    added: tuple | None = None  # the shape of what is added to the products
    reader: str = ""  # another node reads this tensor
    between: str = ""  # an operator between the parts and the attention
    masked: bool = False
    computed: bool = False  # the weight is an input
    scale: float | None = 0.3

    def proto(self):
        rng = np.random.default_rng(0)
        sizes = [0, 0, 0]
        for part, size in zip(self.order, (self.d, self.d, self.width), strict=True):
            sizes[part] = self.heads * size
        constants = {"w": rng.standard_normal((self.c, sum(sizes))).astype(np.float32)}
        nodes = [node("MatMul", ["x", "w"], ["p"])]
        if self.bias:
            constants["b"] = rng.standard_normal(sum(sizes)).astype(np.float32)
            nodes.append(node("Add", ["p", "b"], ["packed"]))
        parts = [f"part{i}" for i in self.order]
        constants["sizes"] = np.array(sizes)
        split = node("Split", ["packed" if self.bias else "p", "sizes"], ["part0", "part1", "part2"], axis=2)
        nodes.append(split)
        if self.between:
            nodes.append(node(self.between, [parts[0]], ["q"]))
            parts[0] = "q"
        if self.added is not None:
            constants["added"] = rng.standard_normal(self.added).astype(np.float32)
            parts += ["", "", "added"]
        if self.masked:
            constants["lengths"] = np.full(self.b, self.n, np.int32)
            parts = [*parts[:3], "", "lengths", *parts[5:]]
        attributes = {} if self.scale is None else {"scale": self.scale}
        nodes.append(
            node(
                *("MultiHeadAttention", parts, ["a"]),
                domain="com.microsoft",
                num_heads=self.heads,
                **attributes,
            )
        )
        nodes.append(node("Neg", ["a"], ["y"]))
        outputs = ["y"]
        if self.reader:
            nodes.append(node("Neg", [self.reader], ["read"]))
            outputs.append("read")
        inputs = [value("x", [self.b, self.n, self.c])]
        if self.computed:
            inputs.append(value("w", list(constants.pop("w").shape)))
        initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        return model(nodes, inputs, [value(name) for name in outputs], initializers, opset_imports=MICROSOFT)


def agree(packed, changes):
    proto = packed.proto()
    with explaining() as told:
        after, made = rewritten(pack_attention, proto)
    assert made == changes
    assert bool(told) != bool(changes)
    assert ops(after).count("Attention") == changes
    same(proto, after)
    return after


@pytest.mark.parametrize(
    "packed",
    [
        Packed(),
        Packed(bias=False),
        Packed(order=(2, 0, 1)),
        Packed(width=7),
        Packed(width=3, order=(1, 2, 0)),
        Packed(added=(2, 2, 5, 5)),
        Packed(added=(1, 2, 5, 5)),
        Packed(added=(1, 1, 5, 5), bias=False),
        Packed(b=1, heads=1),
        Packed(scale=0.5),  # the operator's own
        Packed(scale=None),
        Packed(scale=-0.7, bias=False, order=(1, 0, 2)),
    ],
    ids=str,
)
def test_projection_and_attention_are_one_operator(packed):
    assert ops(agree(packed, 1)) == ["Attention", "Neg"]


@pytest.mark.parametrize(
    "packed",
    [
        Packed(reader="packed"),
        Packed(reader="part1"),
        Packed(between="Relu"),
        Packed(masked=True),
        Packed(computed=True),
    ],
    ids=str,
)
def test_a_near_miss_is_declined(packed):
    assert "MultiHeadAttention" in ops(agree(packed, 0))


def test_a_product_that_something_else_reads_stays():
    after = agree(Packed(reader="p"), 0)
    assert "MultiHeadAttention" in ops(after)


def three_products(x=("x", "x", "x"), bias=(True, True, True)):
    """q, k and v as products of their own, of these tokens."""
    rng = np.random.default_rng(0)
    nodes, constants = [], {}
    for name, tokens, biased in zip("qkv", x, bias, strict=True):
        constants[f"w{name}"] = rng.standard_normal((6, 8)).astype(np.float32)
        constants[f"b{name}"] = rng.standard_normal(8).astype(np.float32)
        nodes.append(node("MatMul", [tokens, f"w{name}"], [f"{name}0" if biased else name]))
        if biased:
            nodes.append(node("Add", [f"{name}0", f"b{name}"], [name]))
    nodes.append(node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=2))
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    inputs = [value(name, [2, 5, 6]) for name in dict.fromkeys(x)]
    return model(nodes, inputs, [value("y")], initializers, opset_imports=MICROSOFT)


@pytest.mark.parametrize("bias", [(True, True, True), (True, False, True), (False, False, False)])
def test_three_products_of_the_same_tokens_are_one(bias):
    proto = three_products(bias=bias)
    after, changes = rewritten(pack_attention, proto)
    assert changes == 1
    assert ops(after) == ["Attention"]
    same(proto, after)


def two_and_one(tokens="x", parts=("k", "q"), reader=""):
    """q and k as parts of one product of x, v as a product of its own of these tokens."""
    rng = np.random.default_rng(0)
    sizes = {"wqk": (6, 8 * len(parts)), "bqk": (8 * len(parts),), "wv": (6, 12), "bv": (12,)}
    nodes = [
        node("MatMul", ["x", "wqk"], ["qk0"]),
        node("Add", ["qk0", "bqk"], ["qk"]),
        node("Split", ["qk"], list(parts), axis=2, num_outputs=len(parts)),
        node("MatMul", [tokens, "wv"], ["v0"]),
        node("Add", ["v0", "bv"], ["v"]),
        node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=2),
        *([node("Neg", [reader], ["read"])] if reader else []),
    ]
    initializers = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in sizes.items()
    ]
    inputs = [value(name, [2, 5, 6]) for name in dict.fromkeys(("x", tokens))]
    outputs = [value(name) for name in ("y", *(["read"] if reader else []))]
    return model(nodes, inputs, outputs, initializers, opset_imports=MICROSOFT)


def test_two_parts_and_a_product_of_the_same_tokens_are_one():
    """As in a Transformer in Transformer."""
    proto = two_and_one()
    after, changes = rewritten(pack_attention, proto)
    assert changes == 1
    assert ops(after) == ["Attention"]
    same(proto, after)


@pytest.mark.parametrize(
    "proto",
    [two_and_one("z"), two_and_one(parts=("k", "q", "more"), reader="more"), two_and_one(reader="q")],
    ids=["other tokens", "a part that is not of it", "a part read twice"],
)
def test_parts_that_something_else_needs_stay(proto):
    with explaining() as told:
        after, changes = rewritten(pack_attention, proto)
    assert changes == 0
    assert told
    same(proto, after)


def test_attention_to_other_tokens_stays():
    proto = three_products(("x", "z", "z"))
    with explaining() as told:
        assert rewritten(pack_attention, proto)[1] == 0
    assert "not of the same tokens" in next(iter(told)).reason


@dataclasses.dataclass(frozen=True)
class HeadByHead:
    """The Split cuts the channels of each head (or of all at once), between Reshapes; to vary."""

    b: int = 2
    n: int = 5
    heads: tuple = (2, 12)  # the axes of the channels of the product
    axis: int = 3  # that the Split cuts
    sizes: tuple = (4, 4, 4)
    order: tuple = (0, 1, 2)
    tokens: bool = True  # the Reshape before leaves the tokens as they are
    reader: str = ""

    def proto(self):
        rng, b = np.random.default_rng(0), self.b
        channels = math.prod(self.heads)
        shape = (b, self.n, *self.heads) if self.tokens else (b, self.heads[0], self.n, *self.heads[1:])
        merged = (0, self.n, -1)
        constants = {
            "w": rng.standard_normal((6, channels)).astype(np.float32),
            "b": rng.standard_normal(channels).astype(np.float32),
            "apart": np.array(shape),
            "merged": np.array(merged),
            "sizes": np.array(self.sizes),
        }
        q, k, v = (f"joined{i}" for i in self.order)
        nodes = [
            node("MatMul", ["x", "w"], ["p"]),
            node("Add", ["p", "b"], ["packed"]),
            node("Reshape", ["packed", "apart"], ["heads"]),
            node("Split", ["heads", "sizes"], ["part0", "part1", "part2"], axis=self.axis),
            *(node("Reshape", [f"part{i}", "merged"], [f"joined{i}"]) for i in range(3)),
            node("MultiHeadAttention", [q, k, v], ["y"], domain="com.microsoft", num_heads=2),
        ]
        outputs = ["y"]
        if self.reader:
            nodes.append(node("Neg", [self.reader], ["read"]))
            outputs.append("read")
        initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        inputs = [value("x", [b, self.n, 6])]
        return model(nodes, inputs, [value(name) for name in outputs], initializers, opset_imports=MICROSOFT)


@pytest.mark.parametrize(
    "packed",
    [
        HeadByHead(),
        HeadByHead(heads=(2, 14), sizes=(3, 3, 8)),
        HeadByHead(heads=(2, 14), sizes=(8, 3, 3), order=(1, 2, 0)),
        HeadByHead(heads=(3, 2, 4), axis=2, sizes=(1, 1, 1)),
        HeadByHead(heads=(2, 3, 4), axis=3, sizes=(1, 1, 1), order=(2, 1, 0)),
    ],
    ids=str,
)
def test_each_head_of_the_projection_may_be_cut(packed):
    assert ops(agree(packed, 1)) == ["Attention"]


@pytest.mark.parametrize(
    "packed",
    [
        HeadByHead(tokens=False),
        HeadByHead(heads=(2, 12), axis=1, n=6, sizes=(2, 2, 2)),  # tokens, not channels
        HeadByHead(reader="heads"),
        HeadByHead(reader="part1"),
        HeadByHead(reader="packed"),
    ],
    ids=str,
)
def test_what_is_not_a_cut_of_heads_is_declined(packed):
    assert "MultiHeadAttention" in ops(agree(packed, 0))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("packed", [Packed(b=BATCH), HeadByHead(b=BATCH)], ids=str)
def test_any_number_of_images(packed, images):
    proto = any_batch(packed.proto())
    after, changes = rewritten(pack_attention, proto)
    assert changes == 1
    x = np.random.default_rng(0).standard_normal((images, 5, 6)).astype(np.float32)
    same(proto, after, {"x": x})


@pytest.mark.parametrize("added", [None, (1, 2, 5, 5), (2, 2, 5, 5)])
def test_openvino_answers_alike(added):
    pytest.importorskip("openvino")
    proto = Packed(added=added).proto()
    after, _ = rewritten(pack_attention, proto)
    x = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    compiled = compile_model(after.SerializeToString(), b"", "f32", 1)
    actual = compiled([x])[0]
    expected = run(proto, x=x)["y"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@settings(RANDOM, max_examples=30)
@given(
    st.builds(
        Packed,
        b=st.integers(1, 3),
        n=st.integers(1, 6),
        c=st.integers(1, 9),
        heads=st.integers(1, 4),
        d=st.integers(1, 9),
        width=st.integers(1, 9),
        bias=st.booleans(),
        order=st.permutations((0, 1, 2)).map(tuple),
        reader=st.sampled_from(("", "", "part0", "p", "a")),
    )
)
def test_random_attention_answers_as_before(packed):
    agree(packed, int(packed.reader in ("", "a")))
