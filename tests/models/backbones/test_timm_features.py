"""Backbones of timm: as any other in names, checkpoints and heads. Most of it on a stand-in for timm."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from meta_deploy.errors import CheckpointError, InputError
from meta_deploy.export.options import Options
from meta_deploy.export.pipeline import export
from meta_deploy.export.sources.checkpoint import CheckpointSource
from meta_deploy.models.backbones.timm_features import TimmConfig, TimmFeatures, import_timm
from meta_deploy.models.checkpoint.load import load_model, load_vit_weights, read_pretrained
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.heads.head import HEADS
from meta_deploy.models.registry import MODEL_NAMES, build_model, config_from_dict, config_to_dict, get_config


class Pyramid(nn.Module):
    """Maps of a stage each, as timm's `features_only` models give them, with what they have of theirs."""

    def __init__(self, strides, output_fmt="NCHW", img_size=None):
        super().__init__()
        widths = [8 * 2**i for i in range(len(strides))]
        steps = [after // before for before, after in zip([1, *strides], strides, strict=False)]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, max(step, 1), max(step, 1)), nn.ReLU())
            for i, o, step in zip([3, *widths], widths, steps, strict=False)
        )
        self.output_fmt, self.img_size, self.fused_attn = output_fmt, img_size, True
        self.feature_info = SimpleNamespace(reduction=lambda: list(strides), channels=lambda: widths)
        self.register_buffer("computed", torch.arange(8.0), persistent=False)

    def forward(self, x):
        assert self.img_size in (None, tuple(x.shape[2:])), "Input size does not match"
        maps = []
        for stage in self.stages:
            x = stage(x)
            x = x + (self.attend(x) if stage is self.stages[-1] else 0)
            x = x + self.computed.repeat(x.shape[1] // 8)[:, None, None] / 10
            maps.append(x.permute(0, 2, 3, 1) if self.output_fmt == "NHWC" else x)
        return maps

    def attend(self, x):
        """Attention over all pixels, of five dimensions, which the exporter does not translate fused."""
        tokens = x.flatten(2).transpose(1, 2)[:, None, None]
        if self.fused_attn:
            y = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        else:
            weights = (tokens * tokens.shape[-1] ** -0.5) @ tokens.transpose(-2, -1)
            y = weights.softmax(dim=-1) @ tokens
        return y[:, 0, 0].transpose(1, 2).reshape(x.shape)


def plain(name):
    return Pyramid((4, 8, 16, 32))


def stem(name, img_size):
    """One that gives a map before the usual ones too, channels last, and is made for one size."""
    return Pyramid((2, 4, 8, 16, 32), "NHWC", img_size)


MADE = {
    "conv_tiny": plain,
    "conv_tiny.tag": plain,
    "windows": stem,
    "vit": lambda name: Pyramid((16, 16, 16)),
}


@pytest.fixture
def timm(monkeypatch):
    """timm with four models, that downloads nothing."""

    def create_model(name, pretrained, features_only, pretrained_cfg_overlay=None, num_classes=None, **told):
        assert features_only
        model = MADE[name](name, **told)
        if pretrained:  # would download weights that it is not given
            assert (num_classes, pretrained_cfg_overlay["num_classes"]) == (0, 0)
            model.load_state_dict(pretrained_cfg_overlay["state_dict"])
        return model

    made = SimpleNamespace(
        create_model=create_model,
        is_model=MADE.__contains__,
        get_pretrained_cfg=lambda name: SimpleNamespace(classifier="head.fc"),
    )
    monkeypatch.setitem(sys.modules, "timm", made)


def small(model="conv_tiny", head="semantic-fpn", size=(64, 96)):
    config = get_config(f"timm:{model}-{head}", 3)
    narrow = {"channels": 8} | ({"fpn_channels": 8} if head != "upernet" else {})
    if config.task == "instance-segmentation":
        narrow = {"fpn_channels": 8, "fc_channels": 8, "mask_channels": 8, "rpn_pre_nms": 20, "proposals": 10}
    if config.task == "detection":
        narrow = {"fpn_channels": 8, "channels": 64}  # in 32 groups
    backbone = replace(config.backbone, image_size=size)
    return replace(config, backbone=backbone, input_size=size, **narrow)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


@pytest.mark.parametrize("head", HEADS)
def test_a_model_of_timm_stands_under_every_head(timm, head):
    config = small(head=head)
    assert config.name == f"timm:conv_tiny-{head}"
    assert config_from_dict(config_to_dict(config)) == config
    assert config.name not in MODEL_NAMES  # of which there is no end
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = build_model(config)(torch.randn(1, 3, 64, 96))
    assert all(value.isfinite().all() for value in outputs.values())


@pytest.mark.parametrize("model", ["conv_tiny", "windows"])
def test_maps_are_at_the_strides_that_heads_want_channels_first(timm, model):
    backbone = TimmFeatures(TimmConfig(model, (64, 96)))
    images = torch.randn(2, 3, 64, 96)
    maps = backbone(images)
    for x, stride, channels in zip(maps, (4, 8, 16, 32), backbone.out_channels, strict=True):
        assert x.shape == (2, channels, 64 // stride, 96 // stride)
    every = backbone.timm(images)
    assert torch.equal(maps[0], every[0] if model == "conv_tiny" else every[1].permute(0, 3, 1, 2))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_brings_its_weights_and_what_timm_computes(timm, path, suffix):
    model = build_model(small("windows"))
    path = path.with_suffix(suffix)
    save_checkpoint(path, model, small("windows"), ["a", "b", "c"])
    loaded = load_model(path)
    assert loaded.config == small("windows")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded.model(images)["logits"], model(images)["logits"])


def test_tensors_alone_do_not_tell_which_model_of_timm_it_is(timm, path):
    config = small("conv_tiny.tag")
    torch.save(build_model(config).state_dict(), path)
    with pytest.raises(CheckpointError, match="name it with --model timm:NAME-HEAD"):
        load_model(path)
    assert load_model(path, config.name).config == replace(
        config, input_size=(512, 512), backbone=TimmConfig("conv_tiny.tag")
    )


def test_a_model_without_a_pyramid_is_refused(timm):
    with pytest.raises(InputError, match="gives maps at strides 16, 16, 16, and not at 4, 8, 16 and 32"):
        build_model(get_config("timm:vit-mask-rcnn"))


def test_images_of_a_size_that_the_model_is_not_made_for_are_refused(timm):
    backbone = TimmFeatures(TimmConfig("windows", (64, 96)))
    with pytest.raises(
        InputError, match=r"made for images of 64x96, does not take 96x96 \(Input size does not"
    ):
        backbone(torch.zeros(1, 3, 96, 96))


@pytest.mark.parametrize("name", ["nope", "", "hf-hub:user/model", "local-dir:/tmp/x", "../x", "a b"])
def test_what_timm_does_not_have_or_would_download_is_refused(timm, name):
    with pytest.raises(InputError) as error:
        get_config(f"timm:{name}-mask-rcnn")
    assert f"'{name}'" in str(error.value) or "No model is named" in str(error.value)
    if name != "nope":
        with pytest.raises(InputError, match="is no name of a timm model"):
            TimmConfig(name)


def test_without_timm_it_is_said_how_to_install_it(monkeypatch, path):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install 'meta-deploy\[timm\]'"):
        get_config("timm:conv_tiny-mask-rcnn")
    data = config_to_dict(get_config("meta-nano-semantic-fpn", 3))
    data |= {"name": "timm:x-semantic-fpn", "backbone": {"type": "timm", "model": "x"}}
    torch.save({"model": {"backbone.timm.a": torch.ones(1)}, "config": data}, path)
    with pytest.raises(CheckpointError, match=r"pip install 'meta-deploy\[timm\]'"):
        load_model(path)


def test_a_backbone_starts_from_what_timm_publishes_for_it(timm, path):
    classifier = Pyramid((4, 8, 16, 32)).state_dict()
    torch.save({**classifier, "head.fc.weight": torch.ones(10, 64)}, path)
    said: list[str] = []
    loaded = load_model(None, "timm:conv_tiny-semantic-fpn", log=said.append, backbone_ckpt=path)
    for name, tensor in loaded.model.backbone.timm.state_dict().items():
        assert torch.equal(tensor, classifier[name])
    assert said[0] == "8 tensors of the backbone are of model.pth"
    assert said[1].startswith(
        "warning: of timm:conv_tiny-semantic-fpn only the backbone has weights; the rest"
    )


def test_a_backbone_does_not_start_from_another_ones_weights(timm, path):
    torch.save(build_model(get_config("meta-nano-upernet")).backbone.vit.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"does not fit timm's conv_tiny: Error.*Missing key") as error:
        load_model(None, "timm:conv_tiny-mask-rcnn", backbone_ckpt=path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_timm_takes_no_plain_vit(timm, path, tmp_path):
    save_checkpoint(path, build_model(small()), small())
    torch.save(build_model(get_config("meta-nano-upernet")).backbone.vit.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(InputError, match=r"timm has no plain ViT inside.*META and ViT-Adapter have one"):
        load_model(path, backbone_ckpt=tmp_path / "vit.pth")


def test_it_is_exported_for_one_size(timm, path):
    save_checkpoint(path, build_model(small()), small())
    with pytest.raises(InputError, match="exported for one size; leave out --dynamic-size"):
        CheckpointSource(path, Options(dynamic_size=True), lambda note: None)


@pytest.mark.slow
def test_it_is_exported_and_verified_as_any_other(timm, path, tmp_path):
    torch.manual_seed(0)
    save_checkpoint(path, build_model(small("windows")), small("windows"))
    manifest = export(path, target="onnxruntime", out=tmp_path / "bundle").manifest
    assert manifest.verification["passed"]
    assert manifest.model.config["backbone"] == {"type": "timm", "model": "windows", "image_size": [64, 96]}


def test_features_of_the_real_timm_are_its_own(path):
    try:
        timm = import_timm()
    except InputError as error:
        pytest.skip(str(error))
    for name in ("convnext_atto", "swin_tiny_patch4_window7_224"):
        torch.manual_seed(0)
        sized = {"img_size": (64, 96)} if "swin" in name else {}
        reference = timm.create_model(name, pretrained=False, **sized).eval()
        torch.save(reference.state_dict(), path)
        config = replace(get_config(f"timm:{name}-gfl"), backbone=TimmConfig(name, (64, 96)))
        own = build_model(config)
        load_vit_weights(own, read_pretrained(path, config.name))
        images = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            expected = reference.forward_intermediates(images, intermediates_only=True)
            for x, y in zip(own.backbone(images), expected, strict=True):
                torch.testing.assert_close(x, y)
