"""The configuration of a checkpoint: told from names and shapes, embedded, or of the named model."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from meta_deploy.errors import InputError
from meta_deploy.models.checkpoint.configure import infer_config
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.checkpoint.read import Checkpoint
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.registry import MODEL_NAMES, build_model, config_to_dict, get_config
from tests.models.checkpoint.checkpoints import build, refusal, small


def on_meta(config):
    """The checkpoint of a model of which only names and shapes exist."""
    with torch.device("meta"):
        state = build_model(config).state_dict()
    return Checkpoint(state, None, None, Path("m.pth"))


ALTERED = [
    {"adapter_parts": 2},
    {"shared_norm": False},
    {"layer_scale": True},
    {"inplanes": 48, "pos_grid": 32},
    {"adapter_ratio": 1 / 3, "ffn_ratio": 0.5, "mlp_ratio": 3.0},
]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_configuration_is_told_from_names_and_shapes(name):
    config = get_config(name, 7)
    assert infer_config(on_meta(config)) == config


@pytest.mark.parametrize("altered", ALTERED, ids=str)
@pytest.mark.parametrize("size", ["nano", "t", "s", "b", "l"])
def test_the_adapters_settings_are_told_from_names_and_shapes(size, altered):
    config = get_config(f"meta-{size}-upernet", 7)
    if "adapter_ratio" in altered and config.backbone.embed_dim % 96:
        altered = {**altered, "adapter_ratio": 0.25}
    config = replace(config, backbone=replace(config.backbone, **altered))
    inferred = infer_config(on_meta(config))
    if "adapter_ratio" in altered:  # a ratio is known up to the integer that it gives
        ratio = inferred.backbone.adapter_ratio
        width = config.backbone.embed_dim
        assert int(width * ratio) == int(width * altered["adapter_ratio"])
        backbone = replace(inferred.backbone, adapter_ratio=altered["adapter_ratio"])
        inferred = replace(inferred, backbone=backbone)
    assert inferred == config


@pytest.mark.parametrize("width", [128, 192, 384, 768, 1024])
@pytest.mark.parametrize("hidden", [32, 48, 80, 112, 144, 176])
def test_an_inferred_adapter_ratio_gives_the_same_width(width, hidden):
    config = next(get_config(n) for n in MODEL_NAMES if get_config(n).backbone.width == width)
    name = "backbone.interactions.0.injector.reduce.weight"
    state = {**on_meta(config).state, name: torch.empty(hidden, 2 * width, 1, 1, device="meta")}
    backbone = infer_config(Checkpoint(state, None, None, Path("m"))).backbone
    assert int(width * backbone.adapter_ratio) == hidden


def test_head_widths_are_told_from_shapes():
    for config in (small(), small("upernet")):
        assert infer_config(on_meta(config)) == config


def test_a_width_outside_the_zoo_needs_an_embedded_configuration(tmp_path):
    config = small(backbone={"embed_dim": 64, "num_heads": 2, "adapter_heads": 2})
    model = build(config)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert "attention heads can't be told" in refusal(tmp_path / "bare.pth")
    save_checkpoint(tmp_path / "own.pth", model, config)
    assert load_model(tmp_path / "own.pth").config == config


def test_other_pooling_scales_need_an_embedded_configuration(tmp_path):
    config = small("upernet", pool_scales=(1, 2))
    model = build(config)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert "2 pooling scales" in refusal(tmp_path / "bare.pth")
    save_checkpoint(tmp_path / "own.pth", model, config)
    assert load_model(tmp_path / "own.pth").config == config


def test_what_was_guessed_is_said(path, state):
    torch.save(state, path)
    notes: list[str] = []
    load_model(path, log=notes.append)
    assert any("meta-nano-mask-rcnn" in note and "windows" in note for note in notes)


def test_another_model_is_refused_with_what_it_holds(path):
    names = ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight"]
    torch.save({name: torch.ones(4, 3) for name in names}, path)
    message = refusal(path)
    assert "conv1.weight, bn1.weight, layer1.0.conv1.weight and 1 more" in message
    assert "meta-t-mask-rcnn" in message


@pytest.mark.parametrize("named", ["meta-t-mask-rcnn", "meta-nano-upernet", "meta-t-upernet"])
def test_naming_another_model_is_refused_with_both_names(path, state, named):
    torch.save(state, path)
    message = refusal(path, named)
    assert named in message
    assert "look like meta-nano-mask-rcnn" in message


def test_an_unknown_model_name_is_refused_before_reading(path):
    with pytest.raises(InputError, match="meta-t-mask-rcnn"):
        load_model(path, "yolo")


def test_a_named_model_takes_its_classes_from_the_tensors(path):
    config = get_config("meta-nano-mask-rcnn", 5)
    torch.save(build(config).state_dict(), path)
    assert load_model(path, "meta-nano-mask-rcnn").config == config


def test_an_embedded_configuration_of_the_named_model_is_used(path, model):
    save_checkpoint(path, model, small())
    assert load_model(path, "meta-nano-mask-rcnn").config == small()


def test_a_named_model_overrides_other_embedded_settings_and_says_so(path):
    own = replace(get_config("meta-nano-mask-rcnn", 5), name="mine", score_threshold=0.3, max_detections=7)
    save_checkpoint(path, build(own), own)
    notes: list[str] = []
    loaded = load_model(path, "meta-nano-mask-rcnn", log=notes.append)
    assert loaded.config == get_config("meta-nano-mask-rcnn", 5)
    assert any("score_threshold 0.3 -> 0.05" in note for note in notes)
    assert load_model(path).config == own


@pytest.mark.parametrize(
    "change",
    [
        {"head": "yolo"},
        {"head": ["x"]},
        {"backbone": 7},
        {"surprise": 1},
        {"num_classes": "many"},
        {"num_classes": -3},
        {"fpn_channels": 2**62},
        {"backbone": {"depth": 10**9}},
        {"backbone": {"depth": "12"}},
        {"backbone": {"embed_dim": 2**40}},
        {"backbone": {"num_heads": 0}},
        {"backbone": {"adapter_ratio": float("nan")}},
        {"mean": "abc"},
        {"score_threshold": None},
    ],
    ids=str,
)
def test_an_embedded_configuration_that_lies_is_refused(path, state, change):
    config = config_to_dict(small())
    nested = change.get("backbone")
    config.update(change)
    if isinstance(nested, dict):
        config["backbone"] = {**config_to_dict(small())["backbone"], **nested}
    torch.save({"model": state, "config": config}, path)
    refusal(path)


@pytest.mark.parametrize("config", [{"lr": 0.1}, "model:\n  x", argparse.Namespace(head=1), 7])
def test_the_configuration_of_another_trainer_is_no_concern(path, state, config):
    torch.save({"model": state, "config": config}, path)
    assert load_model(path).config == small()
