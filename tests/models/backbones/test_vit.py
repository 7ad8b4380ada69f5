"""The plain ViT: against PyTorch's own attention and encoder layer, and loops over windows."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meta_deploy.models.backbones.vit import (
    Block,
    PatchEmbed,
    SelfAttention,
    VisionTransformer,
    attention,
    resize_pos_embed,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def perturb(module):
    """Float64, every parameter random: biases and norms are no longer 0 and 1."""
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return module


def test_attention_is_scaled_dot_product_attention():
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64).unbind(0)
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_masked_attention_is_scaled_dot_product_attention_with_a_mask():
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64).unbind(0)
    valid = torch.rand(2, 1, 7, 7) > 0.4
    valid[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=valid)
    torch.testing.assert_close(attention(q, k, v, valid), expected)


def test_a_masked_key_has_no_influence():
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
    valid = torch.tensor([True, True, False, True, True]).reshape(1, 1, 1, 5)
    before = attention(q, k, v, valid)
    k[:, :, 2], v[:, :, 2] = 100.0, -1000.0
    assert torch.equal(attention(q, k, v, valid), before)


@pytest.mark.parametrize("heads", [1, 3, 6])
def test_self_attention_is_torchs_multihead_attention(heads):
    ours, theirs = (
        perturb(SelfAttention(12, heads)),
        nn.MultiheadAttention(12, heads, batch_first=True).double(),
    )
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_a_global_block_is_torchs_pre_norm_encoder_layer():
    block = perturb(Block(12, 3, 4.0))
    layer = nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).double()
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    state = block.state_dict()
    layer.load_state_dict({a + k: state[b + k] for a, b in names.items() for k in ("weight", "bias")})
    x = torch.randn(2, 4, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(block(x), layer(x.reshape(2, 20, 12)).reshape(2, 4, 5, 12))


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (2, 2), (3, 8)])
def test_a_windowed_block_attends_inside_zero_padded_windows(size):
    H, W = size
    block = perturb(Block(8, 2, 2.0, window=4))
    x = torch.randn(2, H, W, 8, dtype=torch.float64)
    normed = F.layer_norm(x, (8,), block.norm1.weight, block.norm1.bias, 1e-6)
    attended = torch.zeros_like(x)
    for top in range(0, H, 4):
        for left in range(0, W, 4):
            inside = normed[:, top : top + 4, left : left + 4]
            h, w = inside.shape[1:3]
            window = torch.zeros(2, 4, 4, 8, dtype=torch.float64)  # the padding stays in the softmax
            window[:, :h, :w] = inside
            out = block.attn(window.reshape(2, 16, 8)).reshape(2, 4, 4, 8)
            attended[:, top : top + 4, left : left + 4] = out[:, :h, :w]
    y = x + attended
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


def test_a_window_as_large_as_the_map_is_global_attention():
    windowed, glob = Block(8, 2, 2.0, window=6), Block(8, 2, 2.0)
    glob.load_state_dict(windowed.state_dict())
    x = torch.randn(1, 6, 6, 8)
    torch.testing.assert_close(windowed(x), glob(x))


def test_layer_scale_multiplies_both_residual_branches():
    block = perturb(Block(8, 2, 2.0, layer_scale=True))
    x = torch.randn(1, 3, 3, 8, dtype=torch.float64)
    tokens = block.norm1(x).reshape(1, 9, 8)
    y = x + block.ls1.gamma * block.attn(tokens).reshape(1, 3, 3, 8)
    torch.testing.assert_close(block(x), y + block.ls2.gamma * block.mlp(block.norm2(y)))
    assert not any("ls1" in name for name in Block(8, 2, 2.0).state_dict())


def test_patch_embedding_is_a_linear_map_of_each_patch():
    embed = PatchEmbed(16, 10).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    patches = images.reshape(2, 3, 2, 16, 3, 16).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 768)
    expected = patches @ embed.proj.weight.reshape(10, 768).T + embed.proj.bias
    torch.testing.assert_close(embed(images), expected.transpose(1, 2).reshape(2, 10, 2, 3))


def cubic_matrix(size, grid):
    """Bicubic (a = -0.75, corners not aligned, edges repeated, no antialiasing) along one axis."""
    a = -0.75
    matrix = np.zeros((size, grid))
    for i in range(size):
        at = (i + 0.5) * grid / size - 0.5
        base = int(np.floor(at))
        for tap in range(base - 1, base + 3):
            d = abs(at - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(tap, 0), grid - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return matrix


@pytest.mark.parametrize("size", [(14, 14), (2, 2), (6, 10), (32, 32), (14, 20), (21, 14)])
def test_position_embedding_is_resized_bicubically_without_antialiasing(size):
    pos = torch.randn(1, 196, 3, dtype=torch.float64)
    grid = pos[0].numpy().reshape(14, 14, 3)
    expected = np.einsum("yi,xj,ijc->cyx", cubic_matrix(size[0], 14), cubic_matrix(size[1], 14), grid)
    np.testing.assert_allclose(resize_pos_embed(pos, size)[0].numpy(), expected, atol=1e-12)


def test_embed_adds_the_position_to_the_patches():
    vit = VisionTransformer(8, 4, 2, pos_grid=4).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    grid = vit.pos_embed.reshape(4, 4, 8)
    torch.testing.assert_close(vit.embed(images), vit.patch_embed(images) + grid.permute(2, 0, 1))


def test_the_last_block_of_each_quarter_is_global():
    windows = [block.window for block in VisionTransformer(8, 12, 2, window=14).blocks]
    assert windows == [14, 14, 0] * 4
    assert [block.window for block in VisionTransformer(8, 8, 2).blocks] == [0] * 8


@pytest.mark.parametrize("window", [0, 2])
def test_the_quarters_together_are_all_blocks_in_order(window):
    vit = perturb(VisionTransformer(8, 8, 2, window=window))
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    y = x
    for index in range(4):
        y = vit.run_quarter(y, index)
    tokens = x.permute(0, 2, 3, 1)
    for block in vit.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(y, tokens.permute(0, 3, 1, 2))


def test_state_dict_names_are_timms():
    parts = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    blocks = {f"blocks.{i}.{p}.{k}" for i in range(4) for p in parts for k in ("weight", "bias")}
    expected = {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"} | blocks
    assert set(VisionTransformer(8, 4, 2).state_dict()) == expected
    scales = {f"blocks.{i}.ls{j}.gamma" for i in range(4) for j in (1, 2)}
    assert set(VisionTransformer(8, 4, 2, layer_scale=True).state_dict()) == expected | scales


@pytest.mark.parametrize(
    ("dim", "depth", "heads", "timm_parameters"),
    [
        (192, 12, 3, 5_717_416),
        (384, 12, 6, 22_050_664),
        (768, 12, 12, 86_567_656),
        (1024, 24, 16, 304_326_632),
    ],
    ids=["T", "S", "B", "L"],
)
def test_parameters_are_timms_without_class_token_final_norm_and_classifier(
    dim, depth, heads, timm_parameters
):
    with torch.device("meta"):
        vit = VisionTransformer(dim, depth, heads)
    dropped = 2 * dim + 2 * dim + 1000 * (dim + 1)  # class token and its position, norm, head
    assert sum(p.numel() for p in vit.parameters()) == timm_parameters - dropped
