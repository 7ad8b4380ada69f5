"""Checkpoints of ViT-Adapter as MMDetection and MMSegmentation write them: what they are taken for."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from meta_deploy.errors import CheckpointError
from meta_deploy.models.checkpoint.load import _load, load_model
from meta_deploy.models.checkpoint.read import Checkpoint
from meta_deploy.models.registry import build_model, get_config

PUBLISHED = Path(__file__).resolve().parents[4] / "shared" / "data" / "vit-adapter" / "keys"
HEADS = {
    "MaskRCNN": "mask-rcnn",
    "CascadeRCNN": "cascade-mask-rcnn",
    "ATSS": "atss",
    "GFL": "gfl",
    "EncoderDecoder": "upernet",
}
published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published names are not here")


@functools.cache
def facts():
    return {p.stem: json.loads(p.read_text()) for p in PUBLISHED.glob("*.json") if p.stem != "classes"}


def supported(fact):
    return fact["backbone"]["type"] == "ViTAdapter" and fact["detector"] in HEADS


def on_meta(fact):
    """The published state dict, names, types and shapes without values."""
    state = {
        name: torch.empty(shape, dtype=getattr(torch, kind), device="meta")
        for name, (kind, *shape) in fact["state_dict"].items()
    }
    return Checkpoint(state, None, None, Path("x.pth"))


def test_the_published_configurations_are_counted():
    if PUBLISHED.is_dir():
        assert sum(map(supported, facts().values())) == 25


@functools.cache
def loaded():
    """Name -> the facts and the model, without values, of each supported configuration."""
    return {n: (fact, _load(on_meta(fact), None, False)) for n, fact in facts().items() if supported(fact)}


@published
def test_every_supported_configuration_loads_with_no_tensor_missing_and_none_left():
    for name, (fact, model) in loaded().items():
        report = model.report
        assert report.complete, name
        assert not report.unexpected, name
        assert not report.resized, name
        left = fact["state_dict"].keys() - set(report.loaded)
        assert all(n.startswith("auxiliary_head.") for n in left), name


@published
def test_every_supported_configuration_is_inferred_as_it_was_trained():
    for name, (fact, model) in loaded().items():
        backbone, config = fact["backbone"], model.config
        size = next(s for s in ("tiny", "small", "base", "large") if s in name)[0]
        assert config.name == f"vit-adapter-{size}-{HEADS[fact['detector']]}", name
        assert config.num_classes == fact["classes"]
        own = config.backbone
        expected = {
            key: backbone[key] for key in ("embed_dim", "depth", "num_heads", "mlp_ratio", "deform_ratio")
        }
        expected |= {"deform_heads": backbone["deform_num_heads"], "points": backbone["n_points"]}
        expected |= {"layer_scale": fact["backbone_effective"]["block_gammas"]}
        expected |= {"pos_grid": fact["backbone_effective"]["pretrain_size"][0] // 16}
        expected |= {"interactions": len(backbone["interaction_indexes"])}
        expected |= {"extra_extractors": 2 * backbone.get("use_extra_extractor", True)}
        expected |= {
            "ffn_ratio": 0.25 * backbone.get("with_cffn", True),
            "inplanes": backbone["conv_inplane"],
        }
        if backbone.get("add_vit_feature", True):
            expected["vit_feature"] = "each" if fact["detector"] == "EncoderDecoder" else "last"
        else:
            expected["vit_feature"] = "none"
        assert {key: getattr(own, key) for key in expected} == expected, name
        windows = [block.window or None for block in model.model.backbone.blocks]
        assert windows == backbone["window_size"], name
        transforms = fact["preprocessing_test"][0]["transforms"]
        (norm,) = [t for t in transforms if t["type"] == "Normalize"]
        assert (list(config.mean), list(config.std)) == (norm["mean"], norm["std"]), name


@published
def test_parameters_are_those_of_the_published_models():
    """Less the class token's position and, in segmenters, the auxiliary head, which only training needs."""
    for name, (fact, model) in loaded().items():
        count = sum(p.numel() for p in model.model.parameters())
        unused = fact["backbone"]["embed_dim"] + fact["parameters_by_part"].get("auxiliary_head", 0)
        assert count + unused == fact["parameters"], name


@published
def test_every_other_configuration_is_refused_by_name():
    for name, fact in facts().items():
        if supported(fact):
            continue
        with pytest.raises(
            CheckpointError, match=r"is (ViT-Adapter|a plain ViT)-[TSBL].* with .*; not supp"
        ) as e:
            _load(on_meta(fact), None, False)
        assert "missing" not in str(e.value), name


# --- whole files, of a small model ---


def small(head="mask-rcnn", **backbone):
    narrow = {
        "mask-rcnn": {"fpn_channels": 16, "fc_channels": 24, "mask_channels": 8},
        "upernet": {"channels": 16},
    }
    config = get_config(f"vit-adapter-t-{head}", 5)
    sizes = {"depth": 4, "mlp_ratio": 1.0, "inplanes": 4, "pos_grid": 3}
    return replace(config, backbone=replace(config.backbone, **{**sizes, **backbone}), **narrow[head])


def as_published(config):
    """A state dict as mmcv saves it: the class token has a position, segmenters an auxiliary head."""
    torch.manual_seed(0)
    state = build_model(config).state_dict()
    positions = state["backbone.pos_embed"]
    state["backbone.pos_embed"] = torch.cat([torch.full_like(positions[:, :1], 9.0), positions], dim=1)
    if config.head == "upernet":
        state["auxiliary_head.conv_seg.weight"] = torch.zeros(5, 8, 1, 1)
    return state


TEXT = """img_norm_cfg = dict(
    mean=[{0}, {0}, {0}], std=[50.0, 51.0, 52.0], to_rgb=True)
test_pipeline = [dict(
            type='Normalize',
            mean=[{0}, {0}, {0}],
            std=[50.0, 51.0, 52.0],
            to_rgb=True)]
"""


@pytest.mark.parametrize("head", ["mask-rcnn", "upernet"])
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar"])
def test_a_file_as_downloaded_loads_whole(tmp_path, head, suffix):
    config, path = small(head), tmp_path / f"x{suffix}"
    state = as_published(config)
    meta = {
        "config": TEXT.format(100.5),
        "CLASSES": ("bed ", "b", "c", "d", "e"),
        "PALETTE": np.zeros((5, 3), np.uint8),
        "hook_msgs": {"best_score": np.float64(0.425), "best_ckpt": "x"},
        "seed": np.int64(3),
    }
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    notes: list[str] = []
    loaded = load_model(path, log=notes.append)
    expected = replace(config, mean=(100.5,) * 3, std=(50.0, 51.0, 52.0))
    assert loaded.config == expected
    assert loaded.class_names == ["bed", "b", "c", "d", "e"]
    for name, tensor in loaded.model.state_dict().items():
        theirs = state[name][:, 1:] if name.endswith("pos_embed") else state[name]
        assert torch.equal(tensor, theirs), name
    said = "\n".join(notes)
    assert f"the tensors look like vit-adapter-t-{head} (num_classes 5, " in said
    assert "mean 100.5, 100.5, 100.5" in said
    assert ("auxiliary_head.conv_seg.weight" in said) == (head == "upernet")


@pytest.mark.parametrize(
    "text",
    [
        "mean=[1, 2, 3], std=[1, 1, 1]",  # of BGR
        "mean=[1, 2, 3], std=[1, 1, 1], to_rgb=False",
        "mean=[1, 2, 3], std=[1, 1, 1], to_rgb=True, mean=[2, 2, 3], std=[1, 1, 1]",
        "mean=[1, 2], std=[1, 1], to_rgb=True",
        "mean=[1, 2, 3], std=[1, 0, 1], to_rgb=True",
        "mean=[1e999, 2, 3], std=[1, 1, 1], to_rgb=True",
        7,
        {"mean": [1, 2, 3]},
    ],
)
def test_a_configuration_that_does_not_tell_one_normalization_is_not_used(tmp_path, text):
    path = tmp_path / "x.pth"
    torch.save({"meta": {"config": text}, "state_dict": as_published(small())}, path)
    assert load_model(path).config == small()


def test_the_grid_of_augreg_means_its_normalization(tmp_path):
    path, notes = tmp_path / "x.pth", []
    torch.save({"state_dict": as_published(small(pos_grid=24))}, path)
    config = load_model(path, log=notes.append).config
    assert (config.mean, config.std) == ((127.5,) * 3, (127.5,) * 3)
    assert any("the ViT's pretraining" in note for note in notes)
    named = load_model(path, "vit-adapter-t-mask-rcnn", allow_partial=True).config
    assert named.mean == config.mean


def test_a_name_leaves_to_the_tensors_what_they_tell(tmp_path):
    """Such as the extra extractors and LayerScale, which the MAE checkpoints lack."""
    path, config = tmp_path / "x.pth", small(extra_extractors=0, layer_scale=False)
    torch.save({"state_dict": as_published(config)}, path)
    loaded = load_model(path, "vit-adapter-t-mask-rcnn")
    assert loaded.config == config
    assert loaded.report.complete


def test_class_names_by_number_are_said_to_be_that(tmp_path):
    path, notes = tmp_path / "x.pth", []
    config = get_config("vit-adapter-t-upernet")
    torch.save(as_published(replace(small("upernet"), num_classes=150)), path)
    loaded = load_model(path, log=notes.append)
    assert loaded.class_names[:2] == ["wall", "building"]
    assert loaded.config.name == config.name
    assert any(note.startswith("no class names in the checkpoint: with 150 classes") for note in notes)


def test_a_backbone_saved_alone_needs_a_name_and_partial_loading(tmp_path):
    path = tmp_path / "x.pth"
    state = as_published(small(depth=12, mlp_ratio=4.0, inplanes=64))
    torch.save({n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}, path)
    with pytest.raises(CheckpointError, match="a ViT-Adapter backbone of width 192 without a head"):
        load_model(path)
    loaded = load_model(path, "vit-adapter-t-mask-rcnn", allow_partial=True)
    assert not [n for n in loaded.report.missing if n.startswith("backbone.")]
