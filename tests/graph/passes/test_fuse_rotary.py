"""fuse_rotary: the same rotation by one operator, however it is written; near-misses left as they are."""

import dataclasses

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from meta_deploy.graph.explain import explaining
from meta_deploy.graph.graph import to_graph
from meta_deploy.graph.passes.fuse_attention import fuse_attention
from meta_deploy.graph.passes.fuse_rotary import fuse_rotary
from meta_deploy.targets.openvino import compile_model
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, TYPES, node, ops
from tests.small_graphs import model, run, value

STYLES = ("stack", "halves", "sliced halves", "products", "interleaved products")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Attention whose q and k are rotated, but for the first `prefix` tokens, to vary."""

    style: str = "stack"
    b: int = 1
    heads: int = 2
    n: int = 5
    d: int = 8
    prefix: int = 1
    early: bool = False  # rotated before heads and tokens change places
    swap: bool = False  # the other order of operands
    lopsided: bool = False  # another cosine for the second of a pair
    by_head: bool = False  # other angles for each head
    computed: bool = False  # the tables are inputs
    sign: int = 1  # of the sine
    shift: int = 0  # which of the others is a number's partner
    scaled: float = 1.0  # tables times this: no rotation any more, and as good
    reader: str = ""  # another node reads this tensor
    dtype: str = "float32"
    batch: str = ""
    seed: int = 0

    def tables(self):
        tokens = self.n - self.prefix
        angles = np.random.default_rng(self.seed).uniform(-3, 3, (tokens, self.d // 2))
        if self.by_head:
            angles = angles[None] * np.arange(1, self.heads + 1).reshape(-1, 1, 1)
        half = self.style in ("stack", "interleaved products")
        full = np.repeat(angles, 2, -1) if half else np.concatenate([angles, angles], -1)
        if "products" in self.style:
            full = angles
        cos, sin = self.scaled * np.cos(full), self.sign * self.scaled * np.sin(full)
        if self.lopsided:
            cos[..., -1] *= 1.5
        if self.early:
            cos, sin = (t.swapaxes(0, 1) if self.by_head else t[:, None] for t in (cos, sin))
        return {"cos": cos.astype(self.dtype), "sin": sin.astype(self.dtype)}

    def proto(self):
        self_nodes, constants = [], {} if self.computed else self.tables()
        token_axis = 1 if self.early else 2

        def add(op, inputs, out, **attrs):
            self_nodes.append(node(op, inputs, [out], **attrs))
            return out

        def integers(*numbers):
            name = f"i{len(constants)}"
            constants[name] = np.array(numbers)
            return name

        def cut(x, start, end, axis, out, step=1):
            axes = [integers(number) for number in (start, end, axis, step)]
            return add("Slice", [x, *axes], out)

        def multiply(x, table, out):
            return add("Mul", [table, x] if self.swap else [x, table], out)

        def turned(x):
            half, shape = self.d // 2, [self.b, self.heads, self.n - self.prefix, self.d]
            if self.early:
                shape[1:3] = shape[2:0:-1]
            if self.batch:
                shape[0] = 0
            if self.style in ("products", "interleaved products"):
                step = 2 if self.style != "products" else 1
                ends = ((0, self.d), (1, self.d)) if step == 2 else ((0, half), (half, self.d))
                one, two = (cut(x, *end, -1, f"{x}/part{i}", step) for i, end in enumerate(ends))
                parts = [
                    add("Sub", [multiply(one, "cos", f"{x}/a"), multiply(two, "sin", f"{x}/b")], f"{x}/c"),
                    add("Add", [multiply(one, "sin", f"{x}/d"), multiply(two, "cos", f"{x}/e")], f"{x}/f"),
                ]
                if step == 1:
                    return add("Concat", parts, f"{x}/turned", axis=-1)
                parts = [add("Unsqueeze", [part, integers(-1)], f"{part}/u") for part in parts]
                joined = add("Concat", parts, f"{x}/g", axis=-1)
                return add("Reshape", [joined, integers(*shape)], f"{x}/turned")
            if self.style == "stack":
                even, odd = cut(x, 0, 2**40, 3, f"{x}/even", 2), cut(x, 1, 2**40, 3, f"{x}/odd", 2)
                parts = [add("Neg", [odd], f"{x}/neg"), even]
                parts = [add("Unsqueeze", [part, integers(-1)], f"{part}/u") for part in parts]
                joined = add("Concat", parts, f"{x}/pairs", axis=-1)
                other = add("Reshape", [joined, integers(*shape)], f"{x}/other")
            else:
                if self.style == "halves":
                    self_nodes.append(
                        node("Split", [x, integers(half, half)], [f"{x}/one", f"{x}/two"], axis=-1)
                    )
                else:
                    cut(x, 0, half, -1, f"{x}/one"), cut(x, half, self.d, -1, f"{x}/two")
                other = add(
                    "Concat", [add("Neg", [f"{x}/two"], f"{x}/neg"), f"{x}/one"], f"{x}/other", axis=-1
                )
            if self.shift:
                ends = (self.d - self.shift, self.d), (0, self.d - self.shift)
                parts = [cut(other, *end, -1, f"{x}/s{i}") for i, end in enumerate(ends)]
                other = add("Concat", parts, f"{x}/shifted", axis=-1)
            terms = [multiply(x, "cos", f"{x}/cosined"), multiply(other, "sin", f"{x}/sined")]
            return add("Add", terms[::-1] if self.swap else terms, f"{x}/turned")

        for name in "qk":
            x = add("Identity", [name], f"{name}0")
            if self.prefix:
                rest = cut(x, self.prefix, 2**40, token_axis, f"{name}1")
                first = cut(x, 0, self.prefix, token_axis, f"{name}2")
                x = add("Concat", [first, turned(rest)], f"{name}3", axis=token_axis)
            else:
                x = turned(x)
            if self.early:
                x = add("Transpose", [x], f"{name}4", perm=[0, 2, 1, 3])
            add("Identity", [x], f"{name}5") if self.reader == name else None
            add("Transpose", [x], f"{name}t", perm=[0, 1, 3, 2]) if name == "k" else None
            last = x
            if name == "q":
                query = last
        add("MatMul", [query, "kt"], "product")
        add("Softmax", ["product"], "weights", axis=-1)
        add("MatMul", ["weights", "v"], "y")
        return self._model(self_nodes, constants)

    def _model(self, nodes, constants):
        kind = TYPES[self.dtype]
        shape = [self.batch or self.b, self.heads, self.n, self.d]
        early = [shape[0], self.n, self.heads, self.d]
        inputs = [value(name, early if self.early else shape, kind) for name in "qk"]
        inputs.append(value("v", shape, kind))
        if self.computed:
            inputs += [value(name, table.shape, kind) for name, table in self.tables().items()]
        initializers = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
        outputs = [helper.make_tensor_value_info("y", kind, shape)]
        if self.reader:
            outputs.append(helper.make_empty_tensor_value_info(f"{self.reader}5"))
            outputs[-1].type.tensor_type.elem_type = kind
        return model(nodes, inputs, outputs, initializers)


def fused(case):
    """The model with its attention fused; the number of operators is as it was."""
    proto, _ = rewriting.rewritten(fuse_attention, case.proto())
    assert "MultiHeadAttention" in ops(proto) or case.dtype == "float64"
    return proto


def agree(case, changes, **more):
    values = rewriting.feeds(case.proto(), batch=case.b)
    after = rewriting.agree(fuse_rotary, fused(case), values, changes, valid=False, **more)
    assert changes is None or ops(after).count("RotaryEmbedding") == changes
    return after


@pytest.mark.parametrize(
    "case",
    [
        *(Rotary(style) for style in STYLES),
        *(Rotary(style, early=True, swap=True) for style in STYLES),
        *(Rotary(style, prefix=0, b=2) for style in STYLES),
        Rotary(prefix=5, n=7, d=2),
        Rotary("halves", d=2, heads=1),
        Rotary(sign=-1),
        Rotary("halves", sign=-1),
        Rotary(scaled=1.7),
        Rotary("halves", batch="b", b=3),
        Rotary("stack", batch="b", b=3),
        Rotary(reader="q"),
        Rotary(heads=5, n=70, d=20),
    ],
    ids=str,
)
def test_a_rotation_becomes_one_operator(case):
    after = agree(case, 2)
    if not case.reader and not case.batch:
        assert not {"Neg", "Concat", "Slice", "Mul", "Sub"} & set(ops(after))
    tables = [i for i in after.graph.initializer if i.name.endswith("/table") or "/table_" in i.name]
    assert len(tables) == 2  # which q and k share


@pytest.mark.parametrize(
    "case",
    [
        Rotary(lopsided=True),
        Rotary("halves", lopsided=True),
        Rotary(by_head=True),
        Rotary("halves", by_head=True, early=True),
        Rotary(computed=True),
        Rotary(shift=1),
        Rotary("halves", shift=2),
        Rotary(dtype="float64"),
    ],
    ids=str,
)
def test_a_near_miss_is_declined(case):
    agree(case, 0)


@pytest.mark.parametrize("style", ["stack", "halves"])
@pytest.mark.parametrize("batch", ["", "b"])
def test_openvino_answers_alike(style, batch):
    """A bundle for ONNX Runtime may be opened by it, too."""
    pytest.importorskip("openvino")
    case = Rotary(style, batch=batch, b=3)
    after, _ = rewriting.rewritten(fuse_rotary, fused(case))
    values = rewriting.feeds(case.proto(), batch=3)
    compiled = compile_model(after.SerializeToString(), b"", "f32")
    (actual,) = compiled([values[port.any_name] for port in compiled.inputs]).values()
    np.testing.assert_allclose(actual, run(case.proto(), **values)["y"], atol=1e-5)


def test_why_is_told():
    graph = to_graph(fused(Rotary(by_head=True, prefix=0)))
    with explaining() as told:
        fuse_rotary(graph)
    assert "no rotation of pairs of 'q0' (1, 2, 5, 8), the same for all heads" in next(iter(told)).reason


def test_half_precision():
    agree(Rotary(dtype="float16"), 2, tolerance=5e-3)


def test_a_sum_of_other_things_is_left_alone():
    nodes = [node("Add", ["q", "p"], ["a"]), node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2])]
    nodes += [node("MatMul", ["a", "kt"], ["s"]), node("Softmax", ["s"], ["w"], axis=-1)]
    nodes.append(node("MatMul", ["w", "v"], ["y"]))
    proto = model(nodes, [value(name, [1, 2, 5, 8]) for name in "qpkv"])
    proto, _ = rewriting.rewritten(fuse_attention, proto)
    rewriting.agree(fuse_rotary, proto, None, 0, valid=False)


@settings(RANDOM, max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    case=st.builds(
        Rotary,
        style=st.sampled_from(STYLES),
        b=st.integers(1, 2),
        heads=st.integers(1, 3),
        prefix=st.integers(0, 2),
        d=st.sampled_from((2, 4, 6)),
        early=st.booleans(),
        swap=st.booleans(),
        lopsided=st.sampled_from((False, False, True)),
        by_head=st.sampled_from((False, False, True)),
        sign=st.sampled_from((1, -1)),
        shift=st.sampled_from((0, 0, 0, 1)),
        seed=st.integers(0, 9),
    )
)
def test_random_rotations_answer_as_before(case):
    shifted = case.shift and "products" not in case.style
    if case.d == 2 and (shifted or "products" in case.style):
        agree(case, None)  # a pair has but one partner
        return
    wrong = case.lopsided and "products" not in case.style
    agree(case, 0 if wrong or shifted or (case.by_head and case.heads > 1) else 2)
