"""plain_attention: opset 23's Attention, written out, answers as ONNX Runtime's; near-misses stay."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from meta_deploy.graph.passes.fuse_attention import fuse_attention
from meta_deploy.graph.passes.plain_attention import plain_attention
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, TYPES, node, ops
from tests.small_graphs import model, value

B, H, N, M, D = 2, 3, 4, 5, 8


def attention(
    three=False,
    mask=None,
    hides=False,
    boolean=False,
    width=D,
    kv_heads=H,
    computed=False,
    dtype="float32",
    batch=None,
    extra=(),
    **attrs,
):
    """One Attention of q, k and v of four axes, or of three."""
    sizes = {"q": (H, N, D), "k": (kv_heads, M, D), "v": (kv_heads, M, width)}
    b, kind, inputs = batch or B, TYPES[dtype], []
    for name, (heads, tokens, channels) in sizes.items():
        shape = [b, tokens, heads * channels] if three else [b, heads, tokens, channels]
        inputs.append(value(name, shape, kind))
    if three:
        attrs |= {"q_num_heads": H, "kv_num_heads": kv_heads}
    rng, initializers, names = np.random.default_rng(0), [], ["q", "k", "v"]
    if mask is not None:
        numbers = rng.standard_normal(mask)
        numbers = numbers > -0.5 if boolean else numbers.astype(dtype)
        numbers[..., 0] = True if boolean else 0
        if hides:
            numbers[..., 0, :] = False if boolean else -np.inf
        names.append("mask")
        if computed:
            inputs.append(value("mask", mask, TYPES["bool" if boolean else dtype]))
        else:
            initializers.append(numpy_helper.from_array(numbers, "mask"))
    outputs = ["a", *extra]
    nodes = [node("Attention", names, outputs, **attrs), node("Neg", ["a"], ["y"])]
    out = helper.make_tensor_value_info("y", kind, None)
    return model(nodes, inputs, [out], initializers, opset_imports=[helper.make_opsetid("", 23)])


def agree(proto, changes, **more):
    after = rewriting.agree(plain_attention, proto, None, changes, **more)
    assert ("Attention" not in ops(after)) == bool(changes)
    return after


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"scale": 0.7},
        {"width": 5},
        {"mask": (N, M)},
        {"mask": (H, N, M)},
        {"mask": (B, 1, N, M), "boolean": True},
        {"mask": (N, M), "boolean": True},
        {"batch": "b"},
        {"softmax_precision": 1},
    ],
    ids=str,
)
def test_it_is_written_out(case, three):
    agree(attention(three, **case), 1)


def test_half_precision():
    agree(attention(dtype="float16"), 1, tolerance=3e-3)


@pytest.mark.parametrize(
    "case",
    [
        {"kv_heads": 1},
        {"mask": (N, M), "computed": True},
        {"mask": (N, M), "boolean": True, "hides": True},
        {"mask": (N, M), "hides": True},
        {"is_causal": 1},
        {"softcap": 2.0},
        {"dtype": "float64"},
    ],
    ids=str,
)
def test_a_near_miss_is_declined(case):
    agree(attention(**case), 0, runs=False)


def test_it_is_fused_then_without_a_move():
    proto, _ = rewriting.rewritten(plain_attention, attention(three=True, mask=(N, M)))
    fused, changes = rewriting.rewritten(fuse_attention, proto)
    assert changes == 1
    fused, _ = rewriting.rewritten(rewriting.collapse_chains, fused)
    assert ops(fused) == ["MultiHeadAttention", "Neg"]


@settings(RANDOM, max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    three=st.booleans(),
    mask=st.sampled_from((None, (N, M), (H, N, M), (B, H, N, M), (1, 1, N, M))),
    boolean=st.booleans(),
    width=st.integers(1, 9),
    scale=st.sampled_from((None, 0.25, 2.0)),
)
def test_random_attention_answers_as_before(three, mask, boolean, width, scale):
    attrs = {} if scale is None else {"scale": scale}
    agree(attention(three, mask, boolean=boolean, width=width, **attrs), 1)
