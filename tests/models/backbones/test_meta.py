"""The META backbone: shapes, the interaction's equations, what its parts may and may not touch, its size."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from meta_deploy.models.backbones.mea import Cascade, MEABlock
from meta_deploy.models.backbones.meta import META, METAConfig
from meta_deploy.models.backbones.vit import VisionTransformer
from meta_deploy.models.registry import get_config
from tests.models import references as ref

TINY = METAConfig(embed_dim=16, depth=4, num_heads=2, inplanes=4, adapter_parts=2, pos_grid=4)
SIZES = [(32, 32), (64, 32), (96, 160), (32, 224)]


def tiny(**changes):
    """A small float64 backbone, its norms and gammas away from their initial values."""
    torch.manual_seed(0)
    model = META(replace(TINY, **changes)).double().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_var" in name:
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.1)
    return model


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("window", [0, 14, 2])
@pytest.mark.parametrize("size", SIZES)
def test_maps_have_width_d_at_four_scales(size, window):
    maps = tiny(window=window)(images(2, 3, *size))
    assert [tuple(m.shape) for m in maps] == [(2, 16, size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_backbone_follows_the_equations(size):
    model = tiny()
    x = images(1, 3, *size)
    state = ref.numpy_state(model)

    def module(name, value):
        """One part of the model, its own tests' business, as a function of numpy maps."""
        return name(torch.from_numpy(value)[None])[0].detach().numpy()

    def run_quarter(value, index):
        return model.vit.run_quarter(torch.from_numpy(value)[None], index)[0].detach().numpy()

    def batch_norm(value, i):
        n = {
            k: state[f"norms.{i}.{k}"][:, None, None]
            for k in ("weight", "bias", "running_mean", "running_var")
        }
        return (value - n["running_mean"]) / np.sqrt(n["running_var"] + 1e-5) * n["weight"] + n["bias"]

    c1, c2, c3, c4 = (c[0].detach().numpy() for c in model.spatial_prior(x))
    c2, c3, c4 = (c + e[:, None, None] for c, e in zip((c2, c3, c4), state["level_embed"], strict=True))
    nearest = c4.repeat(2, axis=1).repeat(2, axis=2)
    prior = ref.conv1x1(np.concatenate([ref.halve(c2), c3, nearest]), state, "merge_prior")
    tokens = model.vit.embed(x)[0].detach().numpy()
    for i, interaction in enumerate(model.interactions):
        gamma = state[f"interactions.{i}.gamma"][:, None, None]
        tokens = tokens + gamma * module(interaction.injector, np.concatenate([prior, tokens]))
        tokens = run_quarter(tokens, i)
        prior = prior + module(interaction.extractor, np.concatenate([prior, tokens]))
    c2, c3, c4 = c2 + ref.upsample(prior, 2), c3 + prior, c4 + ref.halve(prior)
    _, h, w = c2.shape
    up = np.einsum("iyx,iokl->oykxl", c2, state["up.weight"]).reshape(-1, 2 * h, 2 * w)
    c1 = c1 + up + state["up.bias"][:, None, None]
    maps = [
        c1 + ref.upsample(tokens, 4),
        c2 + ref.upsample(tokens, 2),
        c3 + tokens,
        c4 + ref.halve(tokens),
    ]
    for i, (got, expected) in enumerate(zip(model(x), maps, strict=True)):
        np.testing.assert_allclose(got[0].detach().numpy(), batch_norm(expected, i), atol=1e-10)


@pytest.mark.parametrize("window", [0, 2])
def test_at_the_start_the_injector_leaves_vit_features_untouched(window):
    torch.manual_seed(0)
    model = META(replace(TINY, window=window)).double().eval()
    assert all((i.gamma == 0).all() for i in model.interactions)
    seen = []
    for i, interaction in enumerate(model.interactions):
        interaction.extractor.register_forward_pre_hook(
            lambda _, args, i=i: seen.append((i, args[0][:, 16:]))
        )
    x = images(2, 3, 64, 96)
    model(x)
    plain = model.vit.embed(x)
    for i, features in seen:
        plain = model.vit.run_quarter(plain, i)
        assert torch.equal(features, plain)
    assert len(seen) == 4


def test_gamma_lets_the_spatial_prior_into_the_vit():
    model = tiny()
    prior, x = images(2, 1, 16, 4, 6).unbind(0)
    interaction = model.interactions[0]
    change = interaction.inject(prior, x) - x
    expected = interaction.gamma[:, None, None] * interaction.injector(torch.cat([prior, x], dim=1))
    torch.testing.assert_close(change, expected)
    assert change.abs().min() > 0


def test_the_extractor_sees_the_vit_after_the_quarter():
    """A change of the last quarter's blocks reaches the maps also through the prior, not only directly."""
    model = tiny()
    before = []
    model.interactions[3].extractor.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    x = images(1, 3, 32, 32)
    model(x)
    model.vit.blocks[3].mlp.fc2.bias.data += 1.0
    model(x)
    prior, tokens = (before[1] - before[0]).split(16, dim=1)
    assert prior.abs().max() == 0
    torch.testing.assert_close(tokens, torch.ones_like(tokens))


@pytest.mark.parametrize("size", ["t", "s", "b", "l"])
def test_there_are_sixteen_blocks_in_the_injectors_and_sixteen_in_the_extractors(size):
    with torch.device("meta"):
        model = META(get_config(f"meta-{size}-mask-rcnn").backbone)
    for part in ("injector", "extractor"):
        cascades = [getattr(i, part) for i in model.interactions]
        assert all(isinstance(c, Cascade) for c in cascades)
        assert sum(isinstance(m, MEABlock) for c in cascades for m in c.modules()) == 16


@pytest.mark.parametrize("size", [(32, 32), (96, 160)])
def test_a_batch_of_two_is_two_batches_of_one(size):
    model = tiny(window=4)
    x = images(2, 3, *size)
    for both, a, b in zip(model(x), model(x[:1]), model(x[1:]), strict=True):
        torch.testing.assert_close(both, torch.cat([a, b]))


def test_every_parameter_is_used_and_gets_a_gradient():
    model = tiny(window=2, layer_scale=True, shared_norm=False)
    weights = [torch.randn_like(m) for m in model(images(1, 3, 64, 64))]
    sum((m * w).sum() for m, w in zip(model(images(1, 3, 64, 64)), weights, strict=True)).backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not unused


def test_float32_agrees_with_float64():
    model = tiny(window=4)
    x = images(1, 3, 96, 160)
    expected = model(x)
    for got, want in zip(model.float()(x.float()), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_an_own_norm_for_the_ffn_costs_two_vectors_a_block():
    def count(shared):
        with torch.device("meta"):
            return parameters(META(replace(TINY, shared_norm=shared)))

    # 8 cascades of 2 blocks, each with 4 channels.
    assert count(False) - count(True) == 8 * 2 * 2 * 4


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def adapter(size):
    """The parts that META adds to the ViT, and their parameters in all."""
    with torch.device("meta"):
        model = META(get_config(f"meta-{size}-upernet").backbone)
    added = parameters(model) - parameters(model.vit)
    print(
        f"META-{size.upper()}: {added:,} in the adapter, of these {parameters(model.interactions):,} in the "
        f"interactions and {parameters(model.spatial_prior):,} in the spatial prior"
    )
    return model, added


@pytest.mark.parametrize(
    ("size", "count"),
    [("nano", 749_984), ("t", 2_161_088), ("s", 5_221_952), ("b", 12_392_000), ("l", 22_907_968)],
)
def test_the_adapters_size_does_not_change(size, count):
    assert adapter(size)[1] == count


@pytest.mark.parametrize(
    ("size", "vit_adapter"),
    [
        pytest.param("t", 2.6e6, id="T against 2.6 M"),
        pytest.param("b", 14.0e6, id="B against 14 M"),
        pytest.param("l", 23.7e6, id="L against 23.7 M"),
    ],
)
def test_adapter_is_no_larger_than_vit_adapters(size, vit_adapter):
    assert adapter(size)[1] <= vit_adapter


def test_the_interactions_of_meta_t_have_about_0_7_million_parameters():
    model, added = adapter("t")
    assert parameters(model.interactions) == pytest.approx(0.7e6, rel=0.05)
    assert added == pytest.approx(2.16e6, rel=0.01)


def test_the_vit_inside_is_the_plain_vit():
    model = tiny()
    plain = VisionTransformer(16, 4, 2, pos_grid=4)
    assert {n: v.shape for n, v in plain.state_dict().items()} == {
        n: v.shape for n, v in model.vit.state_dict().items()
    }
