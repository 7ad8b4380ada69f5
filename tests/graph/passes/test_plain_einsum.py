"""plain_einsum: the same sums by a product of matrices; near-misses declined."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from meta_deploy.graph.explain import explaining
from meta_deploy.graph.graph import BATCH
from meta_deploy.graph.passes.fuse_attention import fuse_attention
from meta_deploy.graph.passes.plain_einsum import plain_einsum
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, node, ops, rewritten, same
from tests.small_graphs import any_batch, model, value

SIZES = dict(zip("abcdefgh", (2, 3, 4, 5, 1, 6, 2, 3), strict=True))


def einsum(equation, sizes=None, constant=False, shapes=None, kind=1):
    """Two operands of these sizes; the second one a constant or not."""
    operands = equation.replace(" ", "").partition("->")[0].split(",")
    shapes = shapes or [[(sizes or SIZES).get(letter, 2) for letter in axes] for axes in operands]
    names = ["x", "w", "v"][: len(operands)]
    inputs = [value(name, shape, kind) for name, shape in zip(names, shapes, strict=True)]
    initializers = []
    if constant:
        numbers = np.random.default_rng(1).standard_normal(shapes[1]).astype(np.float32)
        inputs, initializers = inputs[:1], [numpy_helper.from_array(numbers, "w")]
    return model(
        [node("Einsum", names, ["y"], equation=equation)], inputs, [value("y", None, kind)], initializers
    )


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(
    ("equation", "moves"),
    [
        ("abcd,abfd->abcf", 1),  # q and k
        ("abcf,abfd->abcd", 0),  # weights and values
        ("abd,df->abf", 0),  # a linear map
        ("abd,fd->abf", 1),
        ("a bc, dc -> dab", 2),
        ("ab,b->a", 2),
        ("ab,cb", 1),  # the result's axes in the alphabet's order
        ("fa,fb->ba", 2),
    ],
)
def test_a_sum_of_products_becomes_a_product(equation, moves, constant):
    after = rewriting.agree(plain_einsum, einsum(equation, constant=constant), None, 1)
    left = [op for op in ops(after) if op != "MatMul"]
    assert len(left) <= moves
    assert set(left) <= {"Transpose", "Reshape"}


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (einsum("aab,bc->ac"), "an axis twice"),
        (einsum("ab,bc,cd->ad"), "two operands"),
        (einsum("...ab,bc->...ac", shapes=[[2, 3], [3, 4]]), "two operands"),
        (einsum("ab,cd->acd"), "sums an axis"),
        (einsum("ab,ab->ab"), "or none of both"),
        (einsum("ab,cd->abcd"), "or none of both"),
        (einsum("abe,eb->ab", shapes=[[2, 3, 4], [1, 3]]), "broadcast"),
        (einsum("ab,bc->ac", shapes=[[3, "n"], ["n", 4]]), "not of known sizes"),
        (einsum("ab,bc->ac", kind=7), "floating point"),
        (einsum("abcdf,dgf->abcdg"), "takes 5 moves"),  # relative positions: d is in all three
        (einsum("abc,abd->cd"), "takes 3 moves"),
    ],
    ids=range(11),
)
def test_a_near_miss_is_declined(proto, reason):
    with explaining() as told:
        after, changes = rewritten(plain_einsum, proto)
    assert changes == 0
    assert ops(after) == ["Einsum"]
    assert reason in next(iter(told)).reason


def test_an_einsum_of_one_operand_is_declined():
    proto = model([node("Einsum", ["x"], ["y"], equation="ab->a")], [value("x", [2, 3])])
    assert rewritten(plain_einsum, proto)[1] == 0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("equation", ["abd,df->abf", "abcd,abfd->abcf", "cad,df->caf"])
def test_a_batch_of_any_size(equation, batch):
    proto = any_batch(einsum(equation, {**SIZES, "a": BATCH}))
    if equation == "cad,df->caf":  # of the first input, the first axis is the batch
        proto = einsum(equation, SIZES)
    after, changes = rewritten(plain_einsum, proto)
    assert changes == 1
    rng = np.random.default_rng(0)
    shapes = {i.name: [d.dim_value or batch for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}
    same(
        proto, after, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    )


def test_attention_in_sums_is_found():
    """As CvT writes it."""
    nodes = [
        node("Einsum", ["q", "k"], ["products"], equation="bhlk,bhtk->bhlt"),
        node("Mul", ["products", "scale"], ["scaled"]),
        node("Softmax", ["scaled"], ["weights"], axis=-1),
        node("Einsum", ["weights", "v"], ["y"], equation="bhlt,bhtv->bhlv"),
    ]
    shapes = {"q": [2, 3, 5, 8], "k": [2, 3, 4, 8], "v": [2, 3, 4, 8]}
    inputs = [value(name, shape) for name, shape in shapes.items()]
    proto = model(nodes, inputs, initializers=[numpy_helper.from_array(np.float32(0.4), "scale")])
    plain, changes = rewritten(plain_einsum, proto)
    assert changes == 2
    fused, changes = rewritten(fuse_attention, plain)
    assert changes == 1
    same(proto, fused)


@st.composite
def equations(draw):
    letters = draw(st.permutations("abcdefgh"))
    kinds = [draw(st.sampled_from("blrs")) for _ in range(draw(st.integers(1, 6)))]
    named = {kind: [x for x, k in zip(letters, kinds, strict=False) if k == kind] for kind in "blrs"}
    if not named["s"]:
        named["s"] = [letters[7]]
    a, b, out = (
        draw(st.permutations([x for kind in groups for x in named[kind]])) for groups in ("bls", "brs", "blr")
    )
    return f"{''.join(a)},{''.join(b)}->{''.join(out)}"


@settings(RANDOM, max_examples=60)
@given(equations(), st.booleans())
def test_any_sum_answers_as_before(equation, constant):
    proto = einsum(equation, constant=constant)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meta_deploy.graph.passes.plain_einsum.MOST_MOVES", 99)
        after, changes = rewritten(plain_einsum, proto)
    assert changes == 1
    same(proto, after, floor=1.0)
