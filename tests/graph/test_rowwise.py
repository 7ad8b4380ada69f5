"""Moves of heads go past what treats each row alike, as norms of q and k do; past nothing else."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from meta_deploy.graph.passes.collapse_chains import collapse_chains
from meta_deploy.graph.passes.fuse_attention import fuse_attention
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, node, ops, same
from tests.small_graphs import model, value

B, H, N, D = 2, 3, 4, 6
# Constants of several shapes that a row-wise operator may have.
SHAPES = ((), (1,), (D,), (N, 1), (H, 1, 1), (H, N, D), (1, H, 1, D), (B, 1, 1, 1))


def attention(steps, reader=""):
    """Attention whose q goes through steps, (kind, constant's shape), after its heads were taken apart."""
    rng = np.random.default_rng(0)
    nodes, constants = [], {"heads": np.array([B, N, H, D]), "joined": np.array([B, N, H * D])}
    for name in "qkv":
        nodes.append(node("Reshape", [name, "heads"], [f"{name}1"]))
        nodes.append(node("Transpose", [f"{name}1"], [f"{name}2"], perm=[0, 2, 1, 3]))
    x = "q2"
    for i, (kind, shape) in enumerate(steps):
        out, c = f"s{i}", f"c{i}"
        constants[c] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        if kind == "norm":
            constants[c] = rng.uniform(0.5, 1.5, D).astype(np.float32)
            nodes.append(node("LayerNormalization", [x, c], [out], axis=-1))
        elif kind in ("l2", "l2 of heads"):
            constants[f"{c}/axes"] = np.array([-1 if kind == "l2" else 1])
            constants[f"{c}/to"], constants[f"{c}/least"] = np.array([B, H, N, D]), np.float32(1e-6)
            nodes += [
                node("ReduceL2", [x, f"{c}/axes"], [f"{out}/l2"], keepdims=1),
                node("Clip", [f"{out}/l2", f"{c}/least"], [f"{out}/clip"]),
                node("Expand", [f"{out}/clip", f"{c}/to"], [f"{out}/full"]),
                node("Div", [x, f"{out}/full"], [out]),
            ]
        elif kind == "twice":
            nodes += [node("Sigmoid", [x], [f"{out}/gate"]), node("Mul", [x, f"{out}/gate"], [out])]
        else:
            nodes.append(node(kind, [x, c] if i % 2 else [c, x], [out]))
        x = out
    nodes += [
        node("Transpose", ["k2"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", [x, "kt"], ["product"]),
        node("Softmax", ["product"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v2"], ["o"]),
        node("Transpose", ["o"], ["o2"], perm=[0, 2, 1, 3]),
        node("Reshape", ["o2", "joined"], ["y"]),
    ]
    if reader:
        nodes.append(node("Neg", [reader], ["read"]))
    initializers = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    inputs = [value(name, [B, N, H * D]) for name in "qkv"]
    return model(nodes, inputs, ["y", *(["read"] if reader else [])], initializers)


def transposes(proto):
    """After fusing and collapsing: how many are left. It answers as before."""
    after, changes = rewriting.rewritten(fuse_attention, proto)
    assert changes == 1
    after, _ = rewriting.rewritten(collapse_chains, after)
    same(proto, after, rewriting.feeds(proto))
    return ops(after).count("Transpose")


@pytest.mark.parametrize(
    "steps",
    [
        *([("Mul", shape)] for shape in SHAPES),
        [("l2", ()), ("Mul", (H, 1, 1))],  # Swin V2
        [("norm", ()), ("Add", (N, 1))],
        [("twice", ()), ("Div", (H, N, D))],
    ],
    ids=str,
)
def test_moves_cancel_past_rows(steps):
    assert transposes(attention(steps)) == 0


def test_moves_stay_where_rows_are_mixed_or_others_read():
    assert transposes(attention([("l2 of heads", ())])) == 2
    assert transposes(attention([("l2 of heads", ()), ("l2", ())])) == 2
    assert transposes(attention([("l2", ())], reader="s0/clip")) == 2
    assert transposes(attention([("Mul", (D,))], reader="s0")) == 2


@settings(RANDOM, max_examples=40, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(("Add", "Sub", "Mul", "Div", "norm", "l2", "twice", "l2 of heads")),
            st.sampled_from(SHAPES),
        ),
        max_size=4,
    ),
    reader=st.sampled_from(("", "", "q2", "product", "s0")),
)
def test_random_steps_answer_as_before(steps, reader):
    if reader == "product" or (reader == "s0" and not steps):
        return
    mixed = any(kind == "l2 of heads" for kind, _ in steps)
    assert transposes(attention(steps, reader)) == (
        0 if not mixed and not reader else pytest.approx(1, abs=1)
    )
