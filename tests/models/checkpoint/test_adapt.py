"""Weights fitted to a model: position embeddings, and plain ViTs from elsewhere."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch.nn import functional as F

from meta_deploy.models.checkpoint.load import load_model, load_vit_weights
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.registry import build_model, config_to_dict, get_config
from tests.models.checkpoint.checkpoints import prefixed, refusal, same, small


def test_a_position_embedding_of_another_grid_is_resized(path, state):
    grid = torch.randn(1, 10 * 10, 128)
    torch.save({"model": {**state, "backbone.vit.pos_embed": grid}, "config": config_to_dict(small())}, path)
    notes: list[str] = []
    loaded = load_model(path, log=notes.append)
    expected = F.interpolate(
        grid.reshape(1, 10, 10, 128).permute(0, 3, 1, 2), size=(14, 14), mode="bicubic", align_corners=False
    )
    result = loaded.model.state_dict()["backbone.vit.pos_embed"]
    torch.testing.assert_close(result.reshape(14, 14, 128).permute(2, 0, 1), expected[0])
    assert any("resized to 14x14" in note for note in notes)


def test_a_position_embedding_with_a_class_token_loses_it(path, state):
    embed = state["backbone.vit.pos_embed"]
    torch.save({**state, "backbone.vit.pos_embed": torch.cat([torch.ones(1, 1, 128), embed], dim=1)}, path)
    assert torch.equal(load_model(path).model.state_dict()["backbone.vit.pos_embed"], embed)


def timm_vit(width=128, depth=8, grid=12, extra_tokens=1, mlp_ratio=4):
    """A ViT's weights in timm's naming, class token, final norm and classifier included."""
    torch.manual_seed(1)

    def linear(name, inputs, outputs):
        return {f"{name}.weight": torch.randn(outputs, inputs), f"{name}.bias": torch.randn(outputs)}

    def norm(name):
        return {f"{name}.weight": torch.randn(width), f"{name}.bias": torch.randn(width)}

    state = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, grid * grid + extra_tokens, width),
        "patch_embed.proj.weight": torch.randn(width, 3, 16, 16),
        "patch_embed.proj.bias": torch.randn(width),
        **norm("norm"),
        **linear("head", width, 10),
    }
    if extra_tokens == 2:
        state["dist_token"] = torch.randn(1, 1, width)
        state |= linear("head_dist", width, 10)
    for i in range(depth):
        block = f"blocks.{i}."
        state |= norm(block + "norm1") | norm(block + "norm2")
        state |= linear(block + "attn.qkv", width, 3 * width) | linear(block + "attn.proj", width, width)
        state |= linear(block + "mlp.fc1", width, mlp_ratio * width)
        state |= linear(block + "mlp.fc2", mlp_ratio * width, width)
    return state


def dino(state):
    heads = {"head.mlp.0.weight": torch.ones(4, 4)}
    student = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {
        "student": prefixed(student, "module.backbone."),
        "teacher": {**prefixed(state, "backbone."), **heads},
        "args": argparse.Namespace(arch="vit_tiny"),
        "epoch": 100,
    }


@pytest.mark.parametrize("nest", [lambda s: s, lambda s: {"model": s}, dino], ids=["timm", "DeiT", "DINO"])
@pytest.mark.parametrize("extra_tokens", [0, 1, 2])
def test_a_plain_vit_loads_into_the_vit_part(path, nest, extra_tokens):
    vit = timm_vit(extra_tokens=extra_tokens)
    torch.save(nest(vit), path)
    model = build_model(get_config("meta-nano-upernet"))
    before = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("backbone.vit.")}
    report = load_vit_weights(model, path)
    after = model.state_dict()
    grid = vit["pos_embed"][:, extra_tokens:].reshape(1, 12, 12, 128).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(14, 14), mode="bicubic", align_corners=False)
    assert torch.equal(after["backbone.vit.pos_embed"], resized.flatten(2).transpose(1, 2))
    for name in model.backbone.vit.state_dict():
        if name != "pos_embed":
            assert torch.equal(after[f"backbone.vit.{name}"], vit[name])
    assert same(before, {n: after[n] for n in before})
    assert report.complete
    assert report.resized == ["pos_embed"]
    assert not report.unexpected


def test_a_position_embedding_of_the_same_grid_is_taken_as_it_is(path):
    vit = timm_vit(grid=14)
    torch.save(vit, path)
    model = build_model(get_config("meta-nano-upernet"))
    assert load_vit_weights(model, path).resized == []
    assert torch.equal(model.backbone.vit.pos_embed, vit["pos_embed"][:, 1:])


def test_separate_q_k_v_are_fused(path):
    vit = timm_vit()
    split = {}
    for name, tensor in vit.items():
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace("qkv", part)] = piece.clone()
        else:
            split[name] = tensor
    torch.save(split, path)
    model = build_model(get_config("meta-nano-upernet"))
    load_vit_weights(model, path)
    for i, block in enumerate(model.backbone.vit.blocks):
        assert torch.equal(block.attn.qkv.weight, vit[f"blocks.{i}.attn.qkv.weight"])
        assert torch.equal(block.attn.qkv.bias, vit[f"blocks.{i}.attn.qkv.bias"])


def test_a_plain_vit_is_no_whole_model(path):
    torch.save(timm_vit(), path)
    for arguments in ((), ("meta-nano-mask-rcnn",), (None, True)):
        message = refusal(path, *arguments)
        assert "without META's adapter and head" in message
        assert "--allow-partial" in message
    loaded = load_model(path, "meta-nano-mask-rcnn", allow_partial=True)
    assert len(loaded.report.loaded) == len(loaded.model.backbone.vit.state_dict())
    assert "roi_head.bbox_head.fc_cls.weight" in loaded.report.missing
    assert not any(name.startswith("backbone.vit.") for name in loaded.report.missing)


def test_layer_scale_of_a_plain_vit_is_kept(path):
    scales = {f"blocks.{i}.ls{j}.gamma": torch.full((128,), 0.5) for i in range(8) for j in (1, 2)}
    torch.save({**timm_vit(), **scales}, path)
    loaded = load_model(path, "meta-nano-mask-rcnn", allow_partial=True)
    assert loaded.config.backbone.layer_scale
    assert torch.equal(loaded.model.backbone.vit.blocks[3].ls2.gamma, scales["blocks.3.ls2.gamma"])


@pytest.mark.parametrize(
    ("vit", "says"),
    [
        (timm_vit(width=192), "meta-t"),
        (timm_vit(depth=4), "depth 4"),
        ({**timm_vit(), "blocks.0.attn.q_norm.weight": torch.ones(32)}, "unexpected"),
        ({**timm_vit(), "pos_embed": torch.randn(1, 30, 128)}, "pos_embed: 1x30x128 instead of 1x196x128"),
        ({n: t for n, t in timm_vit().items() if n != "pos_embed"}, "1 missing (pos_embed)"),
    ],
    ids=["width", "depth", "another attention", "not square", "no position embedding"],
)
def test_a_vit_of_another_size_or_kind_is_refused(path, vit, says):
    torch.save(vit, path)
    assert says in refusal(path, "meta-nano-mask-rcnn", allow_partial=True)


def test_training_starts_from_the_vit_of_our_own_checkpoint(path, model, state):
    save_checkpoint(path, model, small())
    other = build_model(small("upernet"))
    load_vit_weights(other, path)
    assert torch.equal(
        other.backbone.vit.blocks[1].mlp.fc1.weight, state["backbone.vit.blocks.1.mlp.fc1.weight"]
    )
