"""The ViT-Adapter backbone: windows, what of the ViT is added where, sizes, and what tensors tell of it."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch.nn import functional as F

from meta_deploy.errors import InputError
from meta_deploy.models.backbones.meta import META, METAConfig
from meta_deploy.models.backbones.vit_adapter import (
    SIZES,
    Block,
    ConvFFN,
    ViTAdapter,
    ViTAdapterConfig,
    measure,
    recognise,
)
from meta_deploy.models.registry import get_config
from tests.models import references as ref

TINY = ViTAdapterConfig(
    embed_dim=16, depth=4, num_heads=2, deform_heads=2, inplanes=4, pos_grid=4, extra_extractors=1
)


def random(module):
    """Float64, no weight and no statistic at its initialization."""
    torch.manual_seed(0)
    module = module.double().eval()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if "running_var" in name:
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.3)
    return module


def tiny(**changes):
    return random(ViTAdapter(replace(TINY, **changes)))


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
@pytest.mark.parametrize("window", [0, 3])
def test_maps_have_width_d_at_four_scales(size, window):
    maps = tiny(window=window)(images(2, 3, *size))
    assert [tuple(m.shape) for m in maps] == [(2, 16, size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("layer_scale", [True, False])
def test_windows_are_padded_with_keys_and_values_of_zero(layer_scale):
    block = random(Block(8, num_heads=2, mlp_ratio=2.0, window=3, layer_scale=layer_scale))
    x = images(1, 4, 5, 8)
    state = ref.numpy_state(block)
    y = x[0].numpy()
    qkv = ref.linear(ref.layer_norm(y, state, "norm1"), state, "attn.qkv")
    padded = np.zeros((6, 6, 24))
    padded[:4, :5] = qkv
    mixed = np.zeros((6, 6, 8))
    for top, left in ((0, 0), (0, 3), (3, 0), (3, 3)):
        tokens = padded[top : top + 3, left : left + 3].reshape(9, 3, 2, 4)
        for head in range(2):
            q, k, v = tokens[:, 0, head], tokens[:, 1, head], tokens[:, 2, head]
            out = ref.softmax(q @ k.T / 2) @ v
            mixed[top : top + 3, left : left + 3, 4 * head : 4 * head + 4] = out.reshape(3, 3, 4)
    gamma1, gamma2 = (state.get(f"gamma{i}", 1.0) for i in (1, 2))
    y = y + gamma1 * ref.linear(mixed[:4, :5], state, "attn.proj")
    hidden = ref.gelu(ref.linear(ref.layer_norm(y, state, "norm2"), state, "mlp.fc1"))
    y = y + gamma2 * ref.linear(hidden, state, "mlp.fc2")
    out = block(x.flatten(1, 2), (4, 5))[0].reshape(4, 5, 8)
    np.testing.assert_allclose(out.detach().numpy(), y, atol=1e-12)


def test_the_depthwise_convolution_is_shared_by_the_maps_and_does_not_mix_them():
    ffn = random(ConvFFN(8, 4))
    sizes = [(4, 2), (2, 1), (1, 1)]
    tokens = images(1, 11, 8)
    state = ref.numpy_state(ffn)
    hidden = ref.linear(tokens[0].numpy(), state, "fc1")
    parts = np.split(hidden, [8, 10])
    maps = [part.reshape(h, w, 4).transpose(2, 0, 1) for part, (h, w) in zip(parts, sizes, strict=True)]
    maps = [ref.conv3x3(m, state, "dwconv.dwconv").reshape(4, -1).T for m in maps]
    expected = ref.linear(ref.gelu(np.concatenate(maps)), state, "fc2")
    np.testing.assert_allclose(ffn(tokens, sizes)[0].detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("vit_feature", ["last", "each", "none"])
def test_what_of_the_vit_is_added_to_which_map(vit_feature):
    x, seen = images(1, 3, 64, 96), []
    model, without = tiny(vit_feature=vit_feature), tiny(vit_feature="none")
    without.load_state_dict(model.state_dict())
    for interaction in model.interactions:
        interaction.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    maps, plain = model(x), without(x)
    features = {"last": [seen[3]] * 4, "each": seen, "none": [0 * seen[0]] * 4}[vit_feature]
    factors = (4, 2, 1, 0.5)
    for i, (feature, factor) in enumerate(zip(features, factors, strict=True)):
        grid = feature.transpose(1, 2).unflatten(2, (4, 6))
        added = F.interpolate(grid, scale_factor=factor, mode="bilinear")
        norm = getattr(model, f"norm{i + 1}")
        gain = norm.weight / (norm.running_var + 1e-5).sqrt()
        torch.testing.assert_close(maps[i] - plain[i], gain[:, None, None] * added)


def test_only_the_last_interaction_has_extra_extractors():
    names = [name for name, _ in tiny(extra_extractors=2).named_parameters() if ".extra_extractors." in name]
    assert {name.split(".")[1] for name in names} == {"3"}
    assert {name.split(".")[3] for name in names} == {"0", "1"}
    assert not any(".extra_extractors." in name for name, _ in tiny(extra_extractors=0).named_parameters())


def test_gradients_reach_every_parameter():
    model = tiny().train()
    sum(m.square().sum() for m in model(images(2, 3, 64, 64))).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(
    ("size", "count", "positions"),  # of the published configurations: positions are class token and grid
    [("t", 7_966_640, 197), ("s", 27_503_888, 197), ("b", 99_495_392, 197), ("l", 326_973_632, 577)],
)
def test_sizes_have_the_published_parameters(size, count, positions):
    config = get_config(f"vit-adapter-{size}-mask-rcnn").backbone
    with torch.device("meta"):
        model = ViTAdapter(config)
    own = config.pos_grid**2
    assert sum(p.numel() for p in model.parameters()) == count - (positions - own) * config.embed_dim


@pytest.mark.parametrize("task", ["mask-rcnn", "upernet"])
def test_detectors_have_windows_and_segmenters_a_feature_of_each_interaction(task):
    for size in SIZES:
        backbone = get_config(f"vit-adapter-{size}-{task}").backbone
        facts = (backbone.window, backbone.vit_feature)
        assert facts == ((14, "last") if task == "mask-rcnn" else (0, "each"))


def with_windows(window):
    model = ViTAdapter(replace(TINY, depth=12, interactions=4, window=window))
    return [block.window for block in model.blocks]


def test_the_last_block_of_each_quarter_is_global():
    assert with_windows(14) == [14, 14, 0] * 4
    assert with_windows(0) == [0] * 12


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_scale": False, "extra_extractors": 0},
        {"deform_ratio": 0.5, "deform_heads": 4},
        {"interactions": 1, "vit_feature": "none", "ffn_ratio": 0.0, "extra_extractors": 0},
        {"depth": 8, "mlp_ratio": 2.0, "pos_grid": 7, "inplanes": 8, "ffn_ratio": 0.5},
    ],
)
def test_tensors_tell_the_configuration(changes):
    config = replace(TINY, **changes)
    with torch.device("meta"):
        state = ViTAdapter(config).state_dict()
    other = ViTAdapterConfig(embed_dim=32, depth=12, num_heads=2, deform_heads=2)
    assert replace(other, **measure(other, state)) == config
    assert recognise(state)


def test_other_adapters_are_not_taken_for_it():
    with torch.device("meta"):
        state = ViTAdapter(TINY).state_dict()
        meta = META(METAConfig(embed_dim=16, depth=4, num_heads=2)).state_dict()
    assert not recognise(meta)
    for name in ("blocks.0.attn.q_bias", "layers.0.self_attn.in_proj.weight", "interactions.0.cti_tov.gamma"):
        assert not recognise({**state, name: state["level_embed"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 6}, "depth 6"),
        ({"depth": 4, "interactions": 3}, "3 interactions"),
        ({"num_heads": 3}, "3 heads"),
        ({"deform_heads": 3}, "3 heads of deformable attention"),
        ({"deform_ratio": 0.01}, "its 0 channels"),
        ({"patch_size": 14}, "patch size 14"),
        ({"vit_feature": "each", "interactions": 2}, "vit_feature 'each'"),
        ({"vit_feature": "all"}, "vit_feature 'all'"),
        ({"points": 0}, "points 0"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(TINY, **changes)
