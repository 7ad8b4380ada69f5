"""Models by name: sizes, round trips through JSON, and configurations that are refused."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from meta_deploy.errors import InputError
from meta_deploy.models.backbones.meta import METAConfig
from meta_deploy.models.heads.head import HEADS
from meta_deploy.models.heads.mask_rcnn import MaskRCNNConfig
from meta_deploy.models.heads.upernet import UPerNetConfig
from meta_deploy.models.registry import MODEL_NAMES, build_model, config_from_dict, config_to_dict, get_config

VIT = {  # width, depth, heads
    "t": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
}


def parameters(config):
    with torch.device("meta"):
        model = build_model(config)
    return sum(p.numel() for p in model.parameters())


def test_there_is_a_model_of_each_size_for_each_head():
    assert {"mask-rcnn", "upernet"} <= set(HEADS)
    metas = {name for name in MODEL_NAMES if name.startswith("meta-")}
    assert metas == {f"meta-{s}-{h}" for s in ("nano", *VIT) for h in HEADS}


@pytest.mark.parametrize("folder", ["backbones", "heads"])
def test_what_is_registered_does_not_import_the_registry(folder):
    for path in Path(str(files("meta_deploy") / "models" / folder)).glob("*.py"):
        assert "models.registry" not in path.read_text(), path.name


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_configuration_round_trips_through_json(name):
    for config in (get_config(name), get_config(name, num_classes=3)):
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", VIT)
def test_vits_are_the_published_sizes(size, head):
    backbone = get_config(f"meta-{size}-{head}").backbone
    assert (backbone.embed_dim, backbone.depth, backbone.num_heads) == VIT[size]
    assert (backbone.patch_size, backbone.mlp_ratio, backbone.pos_grid) == (16, 4.0, 14)
    assert (backbone.adapter_parts, backbone.stripe_width) == (4, 4)
    assert backbone.shared_norm


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("size", VIT)
def test_detection_has_windows_and_segmentation_none(size, head):
    window = 0 if head.task == "semantic-segmentation" else 14
    assert get_config(f"meta-{size}-{head.name}").backbone.window == window


@pytest.mark.parametrize("head", HEADS)
def test_a_heads_state_dict_is_recognised_by_it_alone(head):
    with torch.device("meta"):
        state = build_model(get_config(f"meta-nano-{head}")).state_dict()
    assert [entry.name for entry in HEADS.values() if entry.recognise(state)] == [head]


def test_mask_rcnn_defaults_are_mmdetections():
    config = get_config("meta-t-mask-rcnn")
    assert (config.num_classes, config.fpn_channels, config.fc_channels) == (80, 256, 1024)
    assert (config.rpn_pre_nms, config.rpn_nms, config.proposals) == (1000, 0.7, 1000)
    assert (config.score_threshold, config.nms, config.max_detections) == (0.05, 0.5, 100)
    assert config.mean == (123.675, 116.28, 103.53)
    assert config.std == (58.395, 57.12, 57.375)


def test_upernet_defaults_are_mmsegmentations():
    config = get_config("meta-b-upernet")
    assert (config.num_classes, config.channels, config.pool_scales) == (150, 512, (1, 2, 3, 6))


def test_number_of_classes_can_be_chosen():
    assert get_config("meta-nano-mask-rcnn", num_classes=8).num_classes == 8
    assert replace(get_config("meta-nano-mask-rcnn", 8), num_classes=80) == get_config("meta-nano-mask-rcnn")


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_model_can_be_built_in_evaluation_mode(name):
    with torch.device("meta"):
        model = build_model(get_config(name))
    assert not any(module.training for module in model.modules())
    assert model.config.name == name


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("meta-nano-mask-rcnn", 2.5e6, 4.5e6),  # float32 checkpoint and bundle: 30 MB at most together
        ("meta-nano-upernet", 2.0e6, 4.0e6),
        ("meta-t-mask-rcnn", 20e6, 30e6),
        ("meta-s-mask-rcnn", 40e6, 50e6),
        ("meta-b-mask-rcnn", 110e6, 130e6),
        ("meta-l-mask-rcnn", 340e6, 365e6),
        ("meta-t-upernet", 15e6, 45e6),
    ],
)
def test_models_have_the_size_that_their_name_promises(name, low, high):
    count = parameters(get_config(name))
    print(f"{name}: {count:,} parameters")
    assert low <= count <= high


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", VIT)
def test_meta_is_no_larger_than_vit_adapter(size, head):
    """The paper's claim, with the same ViT and head."""
    meta, other = (parameters(get_config(f"{name}-{size}-{head}")) for name in ("meta", "vit-adapter"))
    print(f"{size} {head}: META {meta / 1e6:.1f} M, ViT-Adapter {other / 1e6:.1f} M")
    assert meta <= other


@pytest.mark.parametrize("head", HEADS)
def test_the_nano_runs(head):
    torch.manual_seed(0)
    with torch.no_grad():
        out = build_model(get_config(f"meta-nano-{head}", num_classes=4))(torch.randn(1, 3, 64, 96))
    assert all(value.isfinite().all() for value in out.values())


@pytest.mark.parametrize(
    "name", ["", "meta", "meta-t", "meta-x-mask-rcnn", "meta-t-retinanet", "META-T-UPERNET"]
)
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(InputError, match="meta-t-mask-rcnn") as error:
        get_config(name)
    assert f"'{name}'" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 6}, "depth 6"),
        ({"depth": 0}, "depth 0"),
        ({"num_heads": 5}, "5 heads"),
        ({"num_heads": 0}, "num_heads 0"),
        ({"embed_dim": 0}, "embed_dim 0"),
        ({"patch_size": 14}, "patch size 14"),
        ({"adapter_parts": 5}, "5 parts"),
        ({"adapter_parts": 0}, "adapter_parts 0"),
        ({"adapter_ratio": 0.0}, "adapter_ratio 0.0"),
        ({"adapter_ratio": 0.001}, "parts do not divide 0"),
        ({"adapter_heads": 3}, "3 adapter heads"),
        ({"adapter_heads": 0}, "adapter_heads 0"),
        ({"adapter_heads": 16}, "16 adapter heads"),
        ({"stripe_width": 0}, "stripe_width 0"),
        ({"window": -1}, "window -1: expected `int` >= 0"),
        ({"embed_dim": "192"}, "embed_dim '192': expected `int`, got `str`"),
        ({"depth": True}, "depth True"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio nan"),
        ({"inplanes": 0}, "inplanes 0"),
        ({"pos_grid": 0}, "pos_grid 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio 0.0"),
        ({"ffn_ratio": -0.25}, "ffn_ratio -0.25"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(changes, message):
    good = {"embed_dim": 192, "depth": 12, "num_heads": 3}
    METAConfig(**good)
    with pytest.raises(InputError, match=message):
        METAConfig(**{**good, **changes})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_classes", 0),
        ("num_classes", -3),
        ("max_detections", 0),
        ("proposals", 0),
        ("rpn_pre_nms", -1),
        ("score_threshold", -0.1),
        ("std", (1.0, 0.0, 1.0)),
    ],
)
def test_a_detector_without_classes_or_boxes_is_refused(field, value):
    with pytest.raises(InputError, match=field):
        MaskRCNNConfig("x", get_config("meta-t-mask-rcnn").backbone, **{field: value})


def test_a_segmenter_without_classes_is_refused():
    with pytest.raises(InputError, match="num_classes 0"):
        UPerNetConfig("x", get_config("meta-t-upernet").backbone, num_classes=0)
    with pytest.raises(InputError, match="num_classes -1"):
        get_config("meta-t-upernet", num_classes=-1)


def broken(change):
    data = json.loads(json.dumps(config_to_dict(get_config("meta-t-mask-rcnn"))))
    change(data)
    return data


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(head="fcos"),
        lambda d: d.update(head=["mask-rcnn"]),
        lambda d: d.update(task="panoptic"),
        lambda d: d.update(surprise=1),
        lambda d: d.pop("head"),
        lambda d: d.pop("name"),
        lambda d: d.pop("backbone"),
        lambda d: d.update(backbone=7),
        lambda d: d.update(backbone=None),
        lambda d: d["backbone"].update(surprise=1),
        lambda d: d["backbone"].pop("depth"),
        lambda d: d["backbone"].update(depth="12"),
        lambda d: d["backbone"].update(depth=12.0),
        lambda d: d["backbone"].update(depth=None),
        lambda d: d["backbone"].update(shared_norm=1),
        lambda d: d["backbone"].update(adapter_ratio="half"),
        lambda d: d["backbone"].update(depth=7),
        lambda d: d.update(num_classes="80"),
        lambda d: d.update(num_classes=None),
        lambda d: d.update(nms=[0.5]),
        lambda d: d.update(mean="grey"),
        lambda d: d.update(mean=[1.0, 2.0]),
        lambda d: d.update(std=[1.0, 2.0, "3"]),
        lambda d: d.update(name=3),
    ],
)
def test_a_damaged_configuration_is_refused(change):
    with pytest.raises(InputError):
        config_from_dict(broken(change))


@pytest.mark.parametrize("data", [None, [], "meta-t-mask-rcnn", 3, {}])
def test_what_is_no_configuration_is_refused(data):
    with pytest.raises(InputError):
        config_from_dict(data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["backbone"].update(depth="12"), "backbone.depth '12': expected `int`, got `str`"),
        (lambda d: d["backbone"].update(depth=0), "backbone.depth 0: expected `int` >= 1"),
        (lambda d: d["backbone"].update(depth=7), "backbone configuration: depth 7 is not a multiple of 4"),
        (lambda d: d.update(std=[1.0, 2.0, "3"]), "std[2] '3': expected `float`, got `str`"),
        (lambda d: d.update(head="fcos"), "head 'fcos': not known to this version"),
        (lambda d: d.update(task="panoptic"), "task 'panoptic': not known to this version"),
        (lambda d: d["backbone"].update(type="swin"), "backbone.type 'swin': not known to this version"),
        (lambda d: d.update(surprise=1), "object contains unknown field `surprise`"),
        (lambda d: d.update({"a\n - at `$.b": 1}), "object contains unknown field `a - at `$.b`"),
    ],
)
def test_the_message_has_the_path_and_value_of_the_bad_field(change, says):
    with pytest.raises(InputError) as error:
        config_from_dict(broken(change))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_the_configuration_in_a_bundle_of_the_first_version_reads_as_before():
    """Flat, with the head's name and task, and a backbone whose kind is not said."""
    data = json.loads("""
        {"name": "meta-nano-mask-rcnn", "head": "mask-rcnn", "task": "instance-segmentation",
         "backbone": {"embed_dim": 128, "depth": 8, "num_heads": 4, "patch_size": 16, "mlp_ratio": 4.0,
                      "layer_scale": false, "pos_grid": 14, "window": 0, "inplanes": 32, "adapter_ratio": 0.5,
                      "adapter_parts": 4, "adapter_heads": 2, "stripe_width": 4, "ffn_ratio": 0.25,
                      "shared_norm": true},
         "num_classes": 8, "fpn_channels": 64, "fc_channels": 192, "mask_channels": 64,
         "rpn_pre_nms": 1000, "rpn_nms": 0.7, "proposals": 1000, "score_threshold": 0.05, "nms": 0.5,
         "max_detections": 100, "input_size": [320, 320],
         "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
    """)
    assert config_from_dict(data) == get_config("meta-nano-mask-rcnn", 8)
    written = config_to_dict(config_from_dict(data))
    assert data | written == written  # what it did not say yet is written with its default


def test_a_whole_number_may_stand_for_a_float():
    """JSON written by other tools has 4 for 4.0."""
    data = broken(lambda d: (d["backbone"].update(mlp_ratio=4), d.update(std=[58, 57, 57])))
    assert config_from_dict(data).backbone.mlp_ratio == 4
