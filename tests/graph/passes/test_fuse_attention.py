"""fuse_attention: the same attention by one operator; near-misses declined."""

import dataclasses
import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.graph.graph import BATCH, CONTRIBUTED
from meta_deploy.graph.passes.collapse_chains import collapse_chains
from meta_deploy.graph.passes.fuse_attention import fuse_attention
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, TYPES, node, ops, same
from tests.small_graphs import any_batch, model, value

FIVE = {"q": (2, 4, 3, 5, 8), "k": (2, 4, 3, 6, 8), "v": (2, 4, 3, 6, 8)}


@dataclasses.dataclass(frozen=True)
class Attention:
    """softmax(q @ k^T) @ v to vary.

    Each scale is (operator, value, shape of the constant, whether the constant is the first operand).
    """

    b: int = 2
    heads: int = 3
    n: int = 5
    m: int = 4
    d: int = 8
    q_scale: tuple | None = ("Mul", 0.4, (), False)
    k_scale: tuple | None = None  # after the Transpose
    k_before: tuple | None = None  # before it
    scale: tuple | None = None  # on the product
    perm: tuple = (0, 1, 3, 2)
    axis: int | None = -1
    shapes: dict = dataclasses.field(default_factory=dict)  # of q, k or v, in place of (b, heads, n, d)
    between: str = ""  # an operator between the product and the softmax
    mask: tuple | None = None  # the shape of what is added to the product
    swap_mask: bool = False  # the products are added to it
    hides: bool = False  # some of it is -inf
    computed_mask: bool = False  # what is added, also between two Reshapes, is computed
    second: tuple | None = None  # the shapes between two Reshapes, and of what is added there
    normed: bool = False  # q is transposed to heads first, and divided by its length
    rank: int = 4
    vary: bool = False  # constants that scale are of several numbers
    reader: str = ""  # another node reads this tensor
    output: str = ""  # this tensor is an output as well
    swapped: bool = False  # the weights are the right operand
    end: bool = True
    batch: str = ""  # a name for it
    dtype: str = "float32"
    opset: int = 18
    loud: float = 1.0  # how large the inputs are
    seed: int = 0
    prefix: str = ""
    computed: bool = False  # the scale is an input of the graph

    def shape(self, name):
        default = (self.b, self.heads, self.n if name == "q" else self.m, self.d)
        return self.shapes.get(name, default if self.rank == 4 else default[1:])

    def n_(self, name):
        return self.prefix + name

    def proto(self):
        n, nodes, initializers = self.n_, [], []
        dtype = np.dtype(self.dtype)

        def scaled(x, scale, out):
            if scale is None:
                return x
            op, number, shape, first = scale
            numbers = np.full(shape, number, dtype)
            if self.vary:
                numbers *= 1 + np.arange(numbers.size, dtype=dtype).reshape(shape)
            initializers.append(numpy_helper.from_array(numbers, n(f"c_{out}")))
            c = n("factor") if self.computed else initializers[-1].name
            nodes.append(node(op, [c, x] if first else [x, c], [n(out)]))
            return n(out)

        for name in "qkv":
            nodes.append(node("Identity", [n(f"{name}_in")], [n(name)]))
        if self.normed:
            for start, end in (("q_in", "tokens"), ("tokens", "q_moved")):
                nodes.append(node("Transpose", [n(start)], [n(end)], perm=[0, 2, 1, 3]))
            initializers.append(numpy_helper.from_array(np.array([-1]), n("last")))
            nodes[0] = node("ReduceL2", [n("q_moved"), n("last")], [n("length")])
            nodes.append(nodes.pop(0))
            nodes.append(node("Div", [n("q_moved"), n("length")], [n("q")]))
        if self.computed_mask and (self.mask or self.second):
            nodes.append(node("ReduceMean", [n("q_in")], [n("q_mean")], keepdims=0))
        q = scaled(n("q"), self.q_scale, "q_scaled")
        k = scaled(n("k"), self.k_before, "k_before")
        nodes.append(node("Transpose", [k], [n("kt")], perm=self.perm))
        kt = scaled(n("kt"), self.k_scale, "k_scaled")
        nodes.append(node("MatMul", [q, kt], [n("product")]))
        weights = scaled(n("product"), self.scale, "product_scaled")
        if self.mask is not None:
            numbers = np.random.default_rng(1).standard_normal(self.mask).astype(dtype)
            if self.hides:
                numbers[..., 1:] = -np.inf
            initializers.append(
                numpy_helper.from_array(numbers, n("mask_in" if self.computed_mask else "mask"))
            )
            if self.computed_mask:
                nodes.append(node("Mul", [n("mask_in"), n("q_mean")], [n("mask")]))
            operands = [weights, n("mask")]
            nodes.append(node("Add", operands[::-1] if self.swap_mask else operands, [n("masked")]))
            weights = n("masked")
        if self.second is not None:
            shape, size = self.second
            back = [self.shape("q")[0], self.heads, self.n, self.m]
            numbers = np.random.default_rng(2).standard_normal(size).astype(dtype)
            constants = {"shape": np.array(shape), "added": numbers, "back": np.array(back)}
            initializers += [numpy_helper.from_array(v, n(name)) for name, v in constants.items()]
            nodes.append(node("Reshape", [weights, n("shape")], [n("reshaped")]))
            if self.computed_mask:
                nodes.append(node("Mul", [n("added"), n("q_mean")], [n("added_now")]))
            added = n("added_now" if self.computed_mask else "added")
            nodes.append(node("Add", [n("reshaped"), added], [n("summed")]))
            nodes.append(node("Reshape", [n("summed"), n("back")], [n("second")]))
            weights = n("second")
        if self.between:
            nodes.append(node(self.between, [weights], [n("between")]))
            weights = n("between")
        axis = {} if self.axis is None else {"axis": self.axis}
        nodes.append(node("Softmax", [weights], [n("weights")], **axis))
        operands = [n("weights"), n("v")]
        nodes.append(node("MatMul", operands[::-1] if self.swapped else operands, [n("out")]))
        outputs = []
        if self.reader:
            nodes.append(node("Neg", [n(self.reader)], [n("read")]))
            outputs.append(n("read"))
        if self.output:
            outputs.append(n(self.output))
        if self.end:
            nodes.append(node("Identity", [n("out")], [n("y")]))
        else:
            nodes = [self.renamed(nd, n("out"), n("y")) for nd in nodes]
        outputs = [helper.make_empty_tensor_value_info(name) for name in [*outputs, n("y")]]
        for out in outputs:
            out.type.tensor_type.elem_type = TYPES[self.dtype]
        inputs = []
        for name in "qkv":
            shape = list(self.shape(name))
            inputs.append(value(n(f"{name}_in"), [self.batch or shape[0], *shape[1:]], TYPES[self.dtype]))
        if self.computed:
            inputs.append(value(n("factor"), [], TYPES[self.dtype]))
            kept = {n("mask"), n("shape"), n("added"), n("back")}
            initializers = [i for i in initializers if i.name in kept]
        imports = [helper.make_opsetid("", self.opset)]
        return model(nodes, inputs, outputs, initializers, opset_imports=imports)

    @staticmethod
    def renamed(nd, old, new):
        for field in (nd.input, nd.output):
            field[:] = [new if name == old else name for name in field]
        return nd

    def feeds(self):
        rng = np.random.default_rng(self.seed)
        feeds = {
            self.n_(f"{name}_in"): (self.loud * rng.standard_normal(self.shape(name))).astype(self.dtype)
            for name in "qkv"
        }
        return {**feeds, **({self.n_("factor"): np.array(0.3, self.dtype)} if self.computed else {})}


rewritten = functools.partial(rewriting.rewritten, fuse_attention)


def agree(attention, changes, tolerance=1e-5):
    """As `rewriting.agree`; ONNX's checker does not know the fused operator."""
    values, collapse = attention.feeds(), changes > 0
    after = rewriting.agree(
        fuse_attention,
        attention.proto(),
        values,
        changes,
        collapse=collapse,
        valid=not changes,
        tolerance=tolerance,
        floor=1e-12,
    )
    assert ops(after).count("MultiHeadAttention") == changes
    return after


def test_attention_becomes_one_operator():
    after = agree(Attention(), 1)
    assert not {"MatMul", "Softmax", "Mul"} & set(ops(after))
    (fused,) = (n for n in after.graph.node if n.op_type == "MultiHeadAttention")
    attributes = {a.name: helper.get_attribute_value(a) for a in fused.attribute}
    assert attributes["num_heads"] == 3
    assert attributes["scale"] == pytest.approx(0.4)
    assert {o.domain: o.version for o in after.opset_import} == {"": 18, CONTRIBUTED: 1}


@pytest.mark.parametrize(
    "attention",
    [
        Attention(q_scale=None),
        Attention(q_scale=("Mul", 0.4, (1,), True)),
        Attention(q_scale=("Mul", 0.4, (1, 1, 1, 1), False)),
        Attention(q_scale=("Mul", -0.4, (), False)),
        Attention(q_scale=("Div", 2.5, (), False)),
        Attention(q_scale=None, k_scale=("Mul", 0.4, (), False)),
        Attention(q_scale=None, k_scale=("Div", 2.5, (1, 1), False)),
        Attention(q_scale=None, k_before=("Mul", 0.4, (), False)),
        Attention(q_scale=None, scale=("Mul", 0.4, (), True)),
        Attention(q_scale=None, scale=("Div", 2.5, (1,), False)),
        Attention(k_scale=("Mul", 0.7, (), False), scale=("Div", 0.5, (), False)),
        Attention(axis=3),
        Attention(axis=None),
        Attention(end=False),
        Attention(b=1, heads=1, n=1, m=1, d=1),
        Attention(n=1),
        Attention(m=1),
        Attention(d=1),
        Attention(heads=1),
        Attention(n=64, m=64),
        Attention(n=70, m=33, d=20),
        # k's tokens before its heads, as an exporter writes that joins two Transposes
        Attention(perm=(0, 2, 3, 1), shapes={"k": (2, 4, 3, 8)}),
        Attention(perm=(0, 2, 3, 1), shapes={"k": (2, 4, 3, 8)}, k_scale=("Mul", 0.4, (), False)),
        Attention(perm=(0, 2, 3, 1), shapes={"k": (2, 4, 3, 8)}, k_before=("Mul", 0.4, (), False)),
        Attention(perm=(0, 3, 1, 2), shapes={"k": (2, 8, 4, 3)}),
        Attention(perm=(0, 1, 2, 3), shapes={"k": (2, 3, 8, 4)}),
        Attention(reader="q"),
        Attention(reader="k"),
        Attention(reader="v"),
        Attention(output="v"),
        Attention(reader="q_scaled"),  # then the scale stays, and q is what comes after it
        Attention(reader="out"),
        Attention(output="out"),
        Attention(loud=30.0),  # weights of zero and one
        Attention(loud=1e-4),
        Attention(opset=13),
        Attention(opset=20),
        Attention(prefix="out/q"),
        Attention(mask=(5, 4)),
        Attention(mask=(3, 5, 4)),
        Attention(mask=(1, 5, 4)),
        Attention(mask=(1, 3, 5, 4)),
        Attention(mask=(2, 1, 5, 4)),
        Attention(mask=(2, 3, 5, 4), swap_mask=True),
        Attention(mask=(5, 4), hides=True),
        Attention(mask=(5, 4), scale=("Mul", 0.5, (), False), q_scale=None),
        Attention(mask=(3, 5, 4), reader="mask"),
        Attention(n=70, m=33, d=20, mask=(3, 70, 33)),
        Attention(mask=(1,)),
        Attention(mask=(4,)),  # one for every key
        # the mask of shifted windows: four windows of two images
        Attention(b=8, second=((2, 4, 3, 5, 4), (1, 4, 1, 5, 4)), mask=(1, 3, 5, 4)),
        Attention(
            b=8, second=((2, 4, 3, 5, 4), (1, 4, 1, 5, 4)), q_scale=None, scale=("Mul", 0.5, (), False)
        ),
        Attention(b=8, second=((8, 3, 20), (8, 1, 20))),
        Attention(
            b=8, second=((8, 1, 3, 5, 4), (1, 3, 1, 4)), vary=True, scale=("Mul", 0.5, (3, 1, 1), False)
        ),
        # a scale for each head, and one that is the same for all
        Attention(scale=("Mul", 0.5, (3, 1, 1), False), vary=True),
        Attention(scale=("Div", 0.5, (1, 3, 1, 1), False), vary=True, mask=(5, 4)),
        Attention(scale=("Mul", 0.5, (3, 5, 4), True)),
        Attention(scale=("Add", 0.5, (), False)),
        Attention(scale=("Sub", 0.5, (4,), False), vary=True),
        Attention(shapes={"v": (2, 3, 4, 6)}),  # values of another width
        Attention(shapes={"v": (2, 3, 4, 16)}, mask=(3, 5, 4)),
        # one head, or heads in the batch
        Attention(rank=3, perm=(0, 2, 1)),
        Attention(rank=3, perm=(0, 2, 1), mask=(3, 5, 4), axis=2),
        Attention(rank=3, perm=(0, 2, 1), mask=(5, 4), shapes={"v": (3, 4, 6)}),
        Attention(rank=3, perm=(0, 1, 2), shapes={"k": (3, 8, 4)}),
        Attention(rank=3, perm=(2, 1, 0), shapes={"k": (4, 8, 3)}),
        Attention(mask=(5, 1)),
        Attention(mask=(2, 1, 1, 4)),
        Attention(mask=(2, 3, 5, 4), computed_mask=True),
        Attention(mask=(3, 5, 4), computed_mask=True),
        Attention(mask=(5, 4), computed_mask=True, swap_mask=True, scale=("Mul", 0.5, (), False)),
        Attention(mask=(2, 1, 5, 4), computed_mask=True, dtype="float32"),
        Attention(rank=3, perm=(0, 2, 1), mask=(3, 5, 4), computed_mask=True),
        Attention(rank=3, perm=(0, 2, 1), mask=(1, 5, 4), computed_mask=True),
        Attention(n=6, second=((2, 3, 2, 3, 4), (2, 3, 2, 3, 4)), computed_mask=True),
        # windows beside the heads
        Attention(shapes=FIVE, perm=(0, 1, 2, 4, 3)),
        Attention(shapes=FIVE | {"v": (2, 4, 3, 6, 7)}, perm=(0, 1, 2, 4, 3), axis=4),
        Attention(shapes=FIVE | {"k": (8, 3, 4, 6, 2)}, perm=(4, 2, 1, 0, 3)),
        Attention(shapes=FIVE, perm=(0, 1, 2, 4, 3), q_scale=None, scale=("Mul", 0.5, (), False)),
    ],
    ids=str,
)
def test_variants_become_one_operator(attention):
    agree(attention, 1)


def windows(heads_first, batch=2):
    """Attention in each of four windows of five tokens (B, 4, 5, 24), of three heads."""
    perm = (0, 3, 1, 2, 4) if heads_first else (0, 1, 3, 2, 4)
    constants = {"apart": np.array([0, 4, 5, 3, 8]), "joined": np.array([0, 4, 5, 24])}
    nodes = []
    for name in "qkv":
        nodes.append(node("Reshape", [f"{name}_in", "apart"], [f"{name}_apart"]))
        nodes.append(node("Transpose", [f"{name}_apart"], [name], perm=perm))
    back = [perm.index(axis) for axis in range(5)]
    nodes += [
        node("Transpose", ["k"], ["kt"], perm=(0, 1, 2, 4, 3)),
        node("MatMul", ["q", "kt"], ["product"]),
        node("Softmax", ["product"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["out"]),
        node("Transpose", ["out"], ["moved"], perm=back),
        node("Reshape", ["moved", "joined"], ["y"]),
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    inputs = [value(f"{name}_in", [batch, 4, 5, 24]) for name in "qkv"]
    return model(nodes, inputs, ["y"], initializers)


@pytest.mark.parametrize("batch", [2, "n"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_windows_join_the_batch_without_a_transpose(heads_first, batch):
    proto = windows(heads_first, batch)
    after, changes = rewriting.rewritten(
        lambda graph: fuse_attention(graph) and collapse_chains(graph), proto
    )
    assert changes
    assert sorted(ops(after)) == ["MultiHeadAttention", *["Reshape"] * 4]
    same(proto, after)


@pytest.mark.parametrize(
    "attention",
    [
        Attention(reader="product"),
        Attention(reader="weights"),
        Attention(reader="kt"),
        Attention(reader="product_scaled", scale=("Mul", 0.5, (), False)),
        Attention(reader="product", scale=("Mul", 0.5, (), False)),
        Attention(output="product"),
        Attention(output="weights"),
        Attention(output="kt"),
        Attention(axis=2, m=5),
        Attention(axis=-2),
        Attention(axis=1),
        Attention(k_scale=("Mul", 0.5, (4,), False), vary=True),  # another scale for every key
        Attention(between="Relu"),
        Attention(between="Identity"),
        Attention(mask=(4,), computed_mask=True),  # the operator wants one for each query
        Attention(mask=(2, 1, 1, 4), computed_mask=True),
        Attention(mask=(1, 1, 1, 5, 4), computed_mask=True),
        Attention(mask=(5, 4), computed_mask=True, between="Relu"),
        Attention(mask=(5, 4), computed_mask=True, reader="product"),
        Attention(n=6, second=((2, 3, 2, 3, 4), (2, 3, 2, 1, 4)), computed_mask=True),
        Attention(rank=3, perm=(0, 2, 1), mask=(1, 5, 4), computed_mask=True, reader="masked"),
        Attention(mask=(1, 1, 1, 5, 4)),
        Attention(mask=(5, 4), reader="product"),
        Attention(mask=(5, 4), reader="masked"),
        Attention(mask=(5, 4), output="masked"),
        Attention(mask=(5, 4), between="Relu"),
        Attention(mask=(5, 4), scale=("Mul", 0.5, (), False), reader="product_scaled"),
        Attention(scale=("Mul", 0.5, (4,), False), vary=True),  # another scale for every key
        Attention(scale=("Mul", 0.5, (2, 1, 1, 1), False), vary=True),  # and for every image
        Attention(scale=("Mul", 0.5, (5, 1), False), vary=True),
        Attention(scale=("Mul", 0.5, (3, 5, 1), False), vary=True),
        Attention(rank=3, perm=(0, 2, 1), scale=("Mul", 0.5, (3, 1, 1), False), vary=True),
        Attention(rank=3, perm=(0, 2, 1), axis=1),
        Attention(rank=3, perm=(0, 2, 1), shapes={"v": (1, 4, 8)}),
        Attention(rank=3, perm=(0, 2, 1), mask=(1, 3, 5, 4)),
        Attention(shapes=FIVE, perm=(0, 1, 2, 4, 3), mask=(5, 6)),
        Attention(shapes=FIVE, perm=(0, 1, 2, 4, 3), mask=(3, 5, 6), computed_mask=True),
        Attention(shapes=FIVE, perm=(0, 1, 2, 4, 3), scale=("Mul", 0.5, (3, 1, 1), False), vary=True),
        Attention(shapes=FIVE, perm=(0, 1, 2, 4, 3), axis=3),
        Attention(shapes=FIVE | {"v": (2, 1, 3, 6, 8)}, perm=(0, 1, 2, 4, 3)),
        Attention(shapes={name: (1, *shape) for name, shape in FIVE.items()}, perm=(0, 1, 2, 3, 5, 4)),
        Attention(b=8, second=((2, 4, 3, 5, 4), (1, 4, 1, 5, 4)), reader="reshaped"),
        Attention(b=8, second=((2, 4, 3, 5, 4), (1, 4, 1, 5, 4)), output="summed"),
        Attention(b=8, batch="b", second=((-1, 4, 3, 5, 4), (1, 4, 1, 5, 4))),
        Attention(b=8, second=((2, 4, 3, 5, 4), (1, 4, 1, 5, 4)), between="Relu"),
        Attention(scale=("Div", 0.5, (), True)),  # the inverse
        Attention(scale=("Sub", 0.5, (), True)),
        Attention(scale=("Pow", 2.0, (), False)),
        Attention(q_scale=None, scale=("Mul", 0.0, (), False)),
        Attention(q_scale=("Mul", 0.4, (1, 1, 1, 1, 1), False)),  # q gets a fifth axis by it
        Attention(q_scale=None, scale=("Mul", 0.4, (1, 1, 1, 1, 1), False)),
        Attention(q_scale=None, k_scale=("Mul", 0.4, (1, 1, 1, 1, 1), False)),
        Attention(q_scale=("Mul", 1e-30, (), False), k_scale=("Mul", 1e-30, (), False)),  # 0 in float32
        Attention(shapes={"k": (1, 3, 4, 8)}),
        Attention(shapes={"k": (2, 1, 4, 8), "v": (2, 1, 4, 8)}),  # one head of keys for all
        Attention(shapes={"v": (1, 3, 4, 8)}),
        Attention(shapes={"q": (1, 3, 5, 8)}),
        Attention(shapes={"v": (4, 8)}),
        Attention(shapes={"q": (3, 5, 8)}),
        Attention(swapped=True, n=4, m=4, d=4),
        Attention(n=0),
        Attention(b=0),
        Attention(dtype="float64"),
        Attention(q_scale=None, scale=("Mul", 0.4, (), False), computed=True),
    ],
    ids=str,
)
def test_a_near_miss_is_declined(attention):
    if attention.dtype == "float64":
        agree(attention, 0, tolerance=1e-12)
    else:
        agree(attention, 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_any_size_is_fused(batch):
    agree(Attention(b=batch, batch="b"), 1)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(
    "attention",
    [
        Attention(second=((BATCH, 4, 3, 5, 4), (1, 4, 1, 5, 4)), mask=(1, 3, 5, 4)),
        Attention(
            second=((BATCH, 4, 3, 5, 4), (1, 4, 3, 5, 4)), scale=("Mul", 0.5, (3, 1, 1), False), vary=True
        ),
        Attention(second=((BATCH, 4, 3, 5, 4), (3, 1, 4)), mask=(5, 4)),
        Attention(second=((BATCH, 4, 3, 5, 4), (1, 4, 1, 5, 4)), normed=True),
        Attention(second=((BATCH, 4, 3, 5, 4), (4, 1, 5, 4)), shapes={"v": (4 * BATCH, 3, 4, 7)}),
    ],
)
def test_masks_of_windows_of_any_number_of_images(attention, images):
    """Shifted windows: each image has the same masks, and its four windows count as heads."""
    proto = dataclasses.replace(attention, b=4 * BATCH).proto()
    proto.graph.input.insert(0, value("images", [BATCH]))  # what the size of a batch is known by
    shapes = {name: (4 * images, *shape[1:]) for name, shape in attention.shapes.items()}
    feeds = dataclasses.replace(attention, b=4 * images, shapes=shapes).feeds()
    feeds["images"] = np.zeros(images, np.float32)
    after = rewriting.agree(fuse_attention, any_batch(proto), feeds, 1, valid=False, floor=1e-12)
    heads = next(n for n in after.graph.node if n.op_type == "MultiHeadAttention").attribute
    assert next(a.i for a in heads if a.name == "num_heads") in (3, 12)


@pytest.mark.parametrize("perm", [(0, 2, 1), (1, 2, 0), (0, 1, 2)])
def test_keys_transposed_with_three_axes(perm):
    """PyTorch joins batch and heads to do it. Other permutations of these axes make other keys."""
    nodes = [
        node("Reshape", ["k", "three"], ["k3"]),
        node("Transpose", ["k3"], ["kt3"], perm=perm),
        node("Reshape", ["kt3", "four"], ["kt"]),
        node("MatMul", ["q", "kt"], ["product"]),
        node("Softmax", ["product"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["y"]),
    ]
    shapes = {"three": [6, 5, 5], "four": [2, 3, 5, 5]}
    initializers = [numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()]
    proto = model(nodes, [value(name, [2, 3, 5, 5]) for name in "qkv"], initializers=initializers)
    after, changes = rewritten(proto)
    assert changes == 1
    rng = np.random.default_rng(0)
    same(proto, after, {name: rng.standard_normal((2, 3, 5, 5)).astype(np.float32) for name in "qkv"})


@pytest.mark.parametrize("perm", [(0, 2, 1), None])
def test_keys_that_heads_share_are_transposed_with_three_axes(perm):
    """Grouped queries: keys and values of one head, expanded. Without the Transpose it is another product."""
    shapes = {"all": [2, 1, 3, 5, 5], "three": [6, 5, 5], "four": [2, 3, 5, 5]}
    nodes = [
        node("Unsqueeze", ["k", "two"], ["k5"]),
        node("Expand", ["k5", "all"], ["k_all"]),
        node("Reshape", ["k_all", "three"], ["k3"]),
        node("Transpose", ["k3"], ["kt3"], perm=perm) if perm else node("Neg", ["k3"], ["kt3"]),
        node("Reshape", ["kt3", "four"], ["kt"]),
        node("MatMul", ["q", "kt"], ["product"]),
        node("Softmax", ["product"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["y"]),
    ]
    initializers = [numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()]
    initializers.append(numpy_helper.from_array(np.array([2]), "two"))
    inputs = [value("q", [2, 3, 5, 5]), value("k", [2, 1, 5, 5]), value("v", [2, 3, 5, 5])]
    proto = model(nodes, inputs, initializers=initializers)
    after, changes = rewritten(proto)
    assert changes == (perm is not None)
    same(proto, after)


@pytest.mark.parametrize("constant", ["q", "kt"])
def test_learned_queries_beside_a_computed_mask(constant):
    """Attention pooling. What multiplies q on the right without being computed is a linear map, not keys."""
    nodes = [
        node("Transpose", ["k"], ["kt"], perm=(0, 2, 1)),
        node("MatMul", ["q", "kt"], ["product"]),
        node("Exp", ["mask"], ["added"]),
        node("Add", ["added", "product"], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["y"]),
    ][constant == "kt" :]
    shapes = {"q": [3, 2, 8], "k": [3, 5, 8], "kt": [3, 8, 5], "v": [3, 5, 8], "mask": [3, 2, 5]}
    numbers = np.random.default_rng(0).standard_normal(shapes[constant]).astype(np.float32)
    names = [name for name in ("q", "k", "v", "mask") if name != constant and (name, constant) != ("k", "kt")]
    inputs = [value(name, shapes[name]) for name in names]
    proto = model(nodes, inputs, initializers=[numpy_helper.from_array(numbers, constant)])
    after, changes = rewritten(proto)
    assert changes == (constant == "q")
    same(proto, after)


@pytest.mark.parametrize("operand", [0, 1])
def test_a_vector_on_q_or_k_stays_and_the_rest_is_fused(operand):
    scale = ("Mul", 0.5, (8,), bool(operand))
    assert "Mul" in ops(agree(Attention(q_scale=scale), 1))


@pytest.mark.parametrize("mask", [None, (3, 5, 4)])
def test_half_precision_stays_so(mask):
    """ONNX Runtime's CPU computes it in float32, and rounds."""
    attention = Attention(dtype="float16", mask=mask, b=1)
    after = agree(attention, 1, tolerance=3e-3)
    assert {tensor.data_type for tensor in after.graph.initializer} <= {TYPES["float16"], TYPES["int64"]}


def test_a_softmax_of_before_opset_13_without_an_axis_is_declined():
    """It goes over all axes from the second on."""
    proto = Attention(axis=None, opset=11).proto()
    after, changes = rewritten(proto)
    assert changes == 0
    same(proto, after, Attention().feeds())


def test_without_shapes_it_declines():
    proto = Attention().proto()
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    assert rewritten(proto)[1] == 0


def test_q_k_and_v_of_one_tensor():
    nodes = [
        node("Transpose", ["x"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["x", "kt"], ["product"]),
        node("Softmax", ["product"], ["weights"], axis=-1),
        node("MatMul", ["weights", "x"], ["y"]),
    ]
    proto = model(nodes, [value("x", [2, 3, 5, 8])])
    after, changes = rewritten(proto)
    assert changes == 1
    same(proto, after, {"x": np.random.default_rng(0).standard_normal((2, 3, 5, 8)).astype(np.float32)})


def row(count):
    """Attentions one after another, each the query of the next."""
    nodes, q = [], "x"
    for i in range(count):
        out = "y" if i == count - 1 else f"o{i}"
        nodes += [
            node("Transpose", ["k"], [f"kt{i}"], perm=[0, 1, 3, 2]),
            node("MatMul", [q, f"kt{i}"], [f"p{i}"]),
            node("Softmax", [f"p{i}"], [f"w{i}"], axis=-1),
            node("MatMul", [f"w{i}", "k"], [out]),
        ]
        q = out
    return model(nodes, [value("x", [1, 2, 3, 4]), value("k", [1, 2, 5, 4])])


def test_a_long_row_of_attentions_does_not_exhaust_the_stack():
    proto = row(400)
    after, changes = rewritten(proto)
    assert changes == 400
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 2, 3, 4), "k": (1, 2, 5, 4)}
    same(proto, after, {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()})


def test_attention_that_ends_in_a_branch_is_left():
    nodes = [
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "kt"], ["product"]),
        node("Softmax", ["product"], ["weights"], axis=-1),
    ]
    then = helper.make_graph([node("MatMul", ["weights", "v"], ["t"])], "then", [], [value("t", None)])
    other = helper.make_graph([node("Neg", ["v"], ["e"])], "else", [], [value("e", None)])
    nodes.append(node("If", ["c"], ["y"], then_branch=then, else_branch=other))
    inputs = [value(name, [2, 3, 5, 8]) for name in "qkv"]
    proto = model(nodes, [*inputs, value("c", [], TensorProto.BOOL)])
    after, changes = rewritten(proto)
    assert changes == 0
    x = np.ones((2, 3, 5, 8), np.float32)
    same(proto, after, {"q": x, "k": x, "v": x, "c": np.array(True)})


def test_a_domain_already_there_is_named_once():
    proto = Attention().proto()
    proto.opset_import.append(helper.make_opsetid(CONTRIBUTED, 1))
    after, _ = rewritten(proto)
    assert [o.domain for o in after.opset_import].count(CONTRIBUTED) == 1


# --- random attention ---

SCALES = st.one_of(
    st.none(),
    st.tuples(
        st.sampled_from(("Mul", "Div")),
        st.sampled_from((0.5, 1.0, -0.25, 0.125, 3.0)),
        st.sampled_from(((), (), (1,), (1, 1, 1))),
        st.sampled_from((False, False, True)),
    ),
)


@st.composite
def attentions(draw):
    b, heads, n, m, d = (draw(st.integers(1, size)) for size in (3, 3, 6, 6, 6))
    tensors = ("",) * 8 + ("q", "k", "v", "kt", "product", "weights", "out")
    shapes = {}
    if draw(st.sampled_from((0, 0, 0, 1))):
        name = draw(st.sampled_from("qkv"))
        shape = [b, heads, n if name == "q" else m, d]
        shape[draw(st.integers(0, 1))] = 1
        shapes[name] = tuple(shape)
    elif draw(st.booleans()):
        shapes["v"] = (b, heads, m, draw(st.integers(1, 9)))  # of another width
    scale = draw(SCALES)
    if scale is not None and draw(st.booleans()):
        scale = (*scale[:2], (heads, 1, 1), scale[3])
    between = (1, b, heads, n, m), draw(st.sampled_from(((1, b, 1, n, m), (n, m), (b, heads, 1, m))))
    return Attention(
        b=b,
        heads=heads,
        n=n,
        m=m,
        d=d,
        q_scale=draw(SCALES),
        k_before=draw(SCALES),
        k_scale=draw(SCALES),
        scale=scale,
        vary=draw(st.booleans()),
        second=draw(st.sampled_from((None, None, between))) if shapes.keys() <= {"v"} else None,
        shapes=shapes,
        axis=draw(st.sampled_from((-1, -1, -1, 3, None, 2))),
        mask=draw(st.sampled_from((None, None, (n, m), (heads, n, m), (b, 1, n, m), (1, 1, 1, n, m)))),
        computed_mask=draw(st.booleans()),
        between=draw(st.sampled_from(("",) * 6 + ("Relu",))),
        reader=draw(st.sampled_from(tensors)),
        output=draw(st.sampled_from(tensors)),
        end=True,
        opset=draw(st.sampled_from((13, 18, 20))),
        seed=draw(st.integers(0, 9)),
        prefix=draw(st.sampled_from(("", "out/", "y/q/"))),
    )


@settings(RANDOM, max_examples=120)
@given(attentions())
def test_random_attention_answers_as_before(attention):
    inner = ("kt", "product", "weights")
    alone = attention.reader not in inner and attention.output not in inner
    plain = not attention.between and len(attention.mask or ()) < 5 and attention.axis != 2
    scales = (attention.scale, attention.k_scale)
    inverse = any(scale is not None and scale[0] == "Div" and scale[3] for scale in scales)
    heads = (attention.b, attention.heads)
    whole = all(tuple(shape[:2]) == heads for shape in attention.shapes.values())
    if attention.computed_mask and attention.second is not None:
        # Only what is computed for all elements may be reshaped, and no constants are added before.
        elements = attention.b * attention.heads * attention.n * attention.m
        whole = whole and math.prod(attention.second[1]) == elements and attention.mask is None
    agree(attention, int(alone and plain and not inverse and whole))


def with_relative_positions(five):
    """As in Segment Anything: the rows' and columns' positions are products with q, added as maps of five
    axes, either to the products, reshaped so, or reshaped together.
    """
    b, height, width, d = 2, 3, 4, 8
    n = height * width
    rng = np.random.default_rng(0)
    constants = {
        "scale": np.float32(0.3),
        "rows": rng.standard_normal((d, height)).astype(np.float32),
        "columns": rng.standard_normal((d, width)).astype(np.float32),
        "map": np.array([b, height, width, d]),
        "five": np.array([b, height, width, height, width]),
        "back": np.array([b, n, n]),
        "last": np.array([-1]),
        "before": np.array([-2]),
    }
    nodes = [
        node("Mul", ["q", "scale"], ["scaled"]),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["scaled", "kt"], ["product"]),
        node("Reshape", ["q", "map"], ["q_map"]),
        node("MatMul", ["q_map", "rows"], ["of_rows"]),
        node("Unsqueeze", ["of_rows", "last"], ["by_row"]),
        node("MatMul", ["q_map", "columns"], ["of_columns"]),
        node("Unsqueeze", ["of_columns", "before"], ["by_column"]),
    ]
    if five:
        nodes += [
            node("Reshape", ["product", "five"], ["apart"]),
            node("Add", ["apart", "by_row"], ["one"]),
            node("Add", ["one", "by_column"], ["both"]),
            node("Reshape", ["both", "back"], ["sum"]),
        ]
    else:
        nodes += [
            node("Add", ["by_row", "by_column"], ["both"]),
            node("Reshape", ["both", "back"], ["bias"]),
            node("Add", ["product", "bias"], ["sum"]),
        ]
    nodes += [node("Softmax", ["sum"], ["weights"], axis=-1), node("MatMul", ["weights", "v"], ["y"])]
    initializers = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    return model(nodes, [value(name, [b, n, d]) for name in "qkv"], initializers=initializers)


@pytest.mark.parametrize("five", [True, False])
def test_relative_positions_of_segment_anything_are_a_bias(five):
    proto = with_relative_positions(five)
    after, changes = rewritten(proto)
    assert changes == 1
    assert "Softmax" not in ops(after)
    same(proto, after)
