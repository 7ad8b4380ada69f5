"""The MEA block and its cascade: against meta-model.md's equations in numpy float64, token by token."""

import numpy as np
import pytest
import torch

from meta_deploy.models.backbones.mea import Cascade, ConvBranch, ConvFFN, CrossShapedAttention, MEABlock
from tests.models import references as ref


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomized(module):
    """Float64 with random parameters, so that no norm is 1 and no bias 0."""
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    return module


def sub(state, prefix):
    """The part of a state dict below `prefix`."""
    return {k[len(prefix) + 1 :]: v for k, v in state.items() if k.startswith(prefix + ".")}


def cross_shaped_attention(x, state, heads, width):
    """(H, W, C): every token looks for its stripe-mates one by one. No padding, so none to mask."""
    H, W, C = x.shape
    group, head_dim = heads // 2, C // heads
    qkv = ref.linear(x, state, "qkv").reshape(H, W, 2, 3, group, head_dim)
    out = np.zeros((H, W, 2, group, head_dim))
    for y in range(H):
        for x_ in range(W):
            for direction in (0, 1):  # horizontal stripes, vertical stripes
                mates = [
                    (j, i)
                    for j in range(H)
                    for i in range(W)
                    if (j // width == y // width if direction == 0 else i // width == x_ // width)
                ]
                for head in range(group):
                    q = qkv[y, x_, direction, 0, head]
                    k = np.array([qkv[j, i, direction, 1, head] for j, i in mates])
                    v = np.array([qkv[j, i, direction, 2, head] for j, i in mates])
                    out[y, x_, direction, head] = ref.softmax(k @ q / np.sqrt(head_dim)) @ v
    return ref.linear(out.reshape(H, W, C), state, "proj")


def ffn(z, state):
    return ref.conv3x3(ref.gelu(ref.conv3x3(z, state, "conv1")), state, "conv2")


def conv_branch(x, state):
    value, gate = np.split(ref.conv1x1(x, state, "expand"), 2)
    return ref.conv1x1(ref.conv3x3(value * ref.sigmoid(gate), state, "depthwise"), state, "project")


def mea_block(x, state, heads, width):
    """(C, H, W)."""
    last = x.transpose(1, 2, 0)
    z = ref.layer_norm(last, state, "norm")
    z_ffn = ref.layer_norm(last, state, "ffn_norm") if "ffn_norm.weight" in state else z
    a = cross_shaped_attention(z, sub(state, "attn"), heads, width).transpose(2, 0, 1)
    f = ffn(z_ffn.transpose(2, 0, 1), sub(state, "ffn"))
    k = conv_branch(x, sub(state, "conv"))
    return ref.conv1x1(np.concatenate([a, f, k]), state, "fuse")


def cascade(x, state, parts, heads, width):
    """(C, H, W)."""
    outputs = []
    for i, part in enumerate(np.split(ref.conv1x1(x, state, "reduce"), parts)):
        y = part + outputs[-1] if outputs else part
        outputs.append(mea_block(y, sub(state, f"blocks.{i}"), heads, width))
    return ref.conv1x1(np.concatenate(outputs), state, "expand")


@pytest.mark.parametrize(
    ("size", "width"),
    [((8, 8), 4), ((6, 10), 4), ((2, 2), 4), ((5, 3), 4), ((7, 4), 1), ((4, 9), 3), ((3, 5), 7)],
)
@pytest.mark.parametrize("heads", [2, 4])
def test_attention_is_inside_stripes_and_padding_gets_none(size, width, heads):
    attn = randomized(CrossShapedAttention(8, heads, width))
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    state = ref.numpy_state(attn)
    expected = [cross_shaped_attention(image, state, heads, width) for image in x.numpy()]
    np.testing.assert_allclose(attn(x).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("half", "direction"), [(slice(0, 4), 0), (slice(4, 8), 1)], ids=["rows", "columns"])
def test_half_of_the_channels_see_only_their_rows_and_half_only_their_columns(half, direction):
    attn = randomized(CrossShapedAttention(8, 2, 3))
    attn.proj.weight.data, attn.proj.bias.data = torch.eye(8, dtype=torch.float64), torch.zeros(8).double()
    x = torch.randn(1, 7, 8, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(attn(x)[0, 4, 1, half].sum(), x)
    seen = gradient[0].abs().sum(-1) > 0
    expected = torch.zeros(7, 8, dtype=torch.bool)
    if direction == 0:
        expected[3:6] = True
    else:
        expected[:, 0:3] = True
    assert torch.equal(seen, expected)


def test_ffn_branch_is_two_3x3_convolutions_with_gelu():
    branch = randomized(ConvFFN(8, 2))
    x = torch.randn(8, 5, 6, dtype=torch.float64)
    expected = ffn(x.numpy(), ref.numpy_state(branch))
    np.testing.assert_allclose(branch(x[None])[0].detach().numpy(), expected, atol=1e-12)


def test_conv_branch_is_gate_depthwise_project():
    branch = randomized(ConvBranch(6))
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    expected = conv_branch(x.numpy(), ref.numpy_state(branch))
    np.testing.assert_allclose(branch(x[None])[0].detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shared_norm", [True, False])
@pytest.mark.parametrize("size", [(4, 8), (5, 6), (2, 2)])
def test_block_is_the_equation(size, shared_norm):
    block = randomized(MEABlock(8, 2, 4, shared_norm=shared_norm))
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    expected = [mea_block(image, ref.numpy_state(block), 2, 4) for image in x.numpy()]
    np.testing.assert_allclose(block(x).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("shared_norm", "calls"), [(True, 1), (False, 2)])
def test_shared_norm_is_computed_once(shared_norm, calls):
    block = MEABlock(8, 2, shared_norm=shared_norm)
    seen = []
    for module in block.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda *_: seen.append(1))
    block(torch.randn(1, 8, 4, 4))
    assert len(seen) == calls


def test_separate_norms_with_equal_weights_give_the_shared_result():
    shared, separate = randomized(MEABlock(8, 2)), randomized(MEABlock(8, 2, shared_norm=False))
    state = shared.state_dict()
    separate.load_state_dict(state | {f"ffn_norm.{k}": state[f"norm.{k}"] for k in ("weight", "bias")})
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(separate(x), shared(x))


def test_ffn_is_a_quarter_as_wide_by_default_and_never_empty():
    assert MEABlock(24, 2).ffn.conv1.out_channels == 6
    assert MEABlock(2, 2, ffn_ratio=0.1).ffn.conv1.out_channels == 1


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_cascade_is_the_equation(parts):
    model = randomized(Cascade(12, 10, hidden=16, parts=parts, num_heads=2, stripe_width=4))
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    expected = [cascade(image, ref.numpy_state(model), parts, 2, 4) for image in x.numpy()]
    np.testing.assert_allclose(model(x).detach().numpy(), expected, atol=1e-12)


def test_each_part_receives_the_output_of_the_part_before():
    model = randomized(Cascade(12, 10, hidden=16, parts=4, num_heads=2))
    inputs, outputs = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        block.register_forward_hook(lambda _, args, out: outputs.append(out))
    x = torch.randn(1, 12, 4, 4, dtype=torch.float64)
    model(x)
    parts = model.reduce(x).split(4, dim=1)
    assert len(inputs) == 4
    torch.testing.assert_close(inputs[0], parts[0])
    for i in (1, 2, 3):
        torch.testing.assert_close(inputs[i], parts[i] + outputs[i - 1])


def test_a_part_has_no_influence_on_the_parts_before_it():
    model = randomized(Cascade(12, 10, hidden=16, parts=4, num_heads=2))
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: outputs.append(out))
    x = torch.randn(1, 12, 4, 4, dtype=torch.float64)
    model(x)
    model.reduce.bias.data[8:12] += 1.0  # the third of four parts
    model(x)
    same = [torch.equal(outputs[i], outputs[i + 4]) for i in range(4)]
    assert same == [True, True, False, False]


def test_images_of_a_batch_do_not_mix():
    model = randomized(Cascade(12, 10, hidden=8, parts=2, num_heads=2))
    x = torch.randn(3, 12, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.cat([model(image[None]) for image in x]))
