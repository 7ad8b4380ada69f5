"""Semantic FPN: the head against MMSegmentation's steps written out, names, and telling it from UPerNet."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch.nn import functional as F

from meta_deploy.models.backbones.meta import METAConfig
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.heads.semantic_fpn import FPNHead, SemanticFPNConfig
from meta_deploy.models.registry import build_model, get_config
from tests.models import references as ref

TINY = SemanticFPNConfig(
    "tiny",
    METAConfig(16, 4, 2, inplanes=4, adapter_parts=2, pos_grid=4),
    num_classes=7,
    fpn_channels=8,
    channels=6,
)
CONVS = {0: (0,), 1: (0,), 2: (0, 2), 3: (0, 2, 4)}  # scale head -> places of its convolutions


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = FPNHead(5, (4, 8, 16, 32), 6, 3).double().eval()
    with torch.no_grad():
        for name, value in head.state_dict().items():
            if "running_var" in name:
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.1)
    return head


@pytest.mark.parametrize("size", [(32, 32), (96, 160)])
def test_head_follows_mmsegmentations_steps(head, size):
    """Convolution, batch norm and ReLU as PyTorch's functions, doubling and the classifier in numpy."""
    state = head.state_dict()
    generator = torch.Generator().manual_seed(1)
    maps = [
        torch.randn(1, 5, size[0] // s, size[1] // s, generator=generator, dtype=torch.float64)
        for s in (4, 8, 16, 32)
    ]
    total = 0
    for i, places in CONVS.items():
        x = maps[i]
        for j in places:
            name = f"scale_heads.{i}.{j}."
            bn = [state[f"{name}bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
            x = F.relu(F.batch_norm(F.conv2d(x, state[name + "conv.weight"], padding=1), *bn, eps=1e-5))
            if i > 0:
                x = torch.from_numpy(ref.upsample(x[0].numpy(), 2))[None]
        total = total + x[0].numpy()
    weight, bias = state["conv_seg.weight"].numpy()[:, :, 0, 0], state["conv_seg.bias"].numpy()
    expected = np.einsum("oc,chw->ohw", weight, total) + bias[:, None, None]
    np.testing.assert_allclose(head(maps)[0].detach().numpy(), expected, atol=1e-10)


def test_state_dict_names_are_mmsegmentations():
    names = {n for n in build_model(TINY).state_dict() if not n.startswith("backbone.")}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    convs = [f"decode_head.scale_heads.{i}.{j}" for i, places in CONVS.items() for j in places]
    expected = {f"{c}.conv.weight" for c in convs} | {f"{c}.bn.{p}" for c in convs for p in norm}
    neck = [f"neck.{kind}.{i}.conv" for kind in ("lateral_convs", "fpn_convs") for i in range(4)]
    expected |= {f"{c}.{p}" for c in [*neck, "decode_head.conv_seg"] for p in ("weight", "bias")}
    assert names == expected


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_logits_are_at_a_quarter_of_the_input(size):
    torch.manual_seed(0)
    outputs = build_model(TINY)(torch.randn(2, 3, *size), stages=True)
    assert outputs["logits"].shape == (2, 7, size[0] // 4, size[1] // 4)
    assert outputs["logits"].isfinite().all()
    assert [outputs[f"feature_{i}"].shape[1] for i in range(4)] == [16] * 4


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = build_model(TINY).double()
    for interaction in model.backbone.interactions:
        interaction.gamma.data.fill_(0.1)
    logits = model(torch.randn(1, 3, 64, 64, dtype=torch.float64))["logits"]
    (logits * torch.randn_like(logits)).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_defaults_are_mmsegmentations():
    config = get_config("meta-t-semantic-fpn")
    assert (config.num_classes, config.fpn_channels, config.channels) == (150, 256, 128)
    assert config.backbone == get_config("meta-t-upernet").backbone


def test_a_bare_state_dict_is_told_from_upernets(tmp_path):
    """Both heads' names start with `decode_head.`."""
    config = replace(get_config("meta-nano-semantic-fpn", 5), fpn_channels=16, channels=8)
    torch.save(build_model(config).state_dict(), tmp_path / "bare.pth")
    loaded = load_model(tmp_path / "bare.pth")
    assert loaded.config == config
    assert loaded.report.complete
