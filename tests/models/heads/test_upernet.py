"""UPerNet: adaptive pooling against PyTorch's, the head against MMSegmentation's steps written out."""

import pytest
import torch
from torch.nn import functional as F

from meta_deploy.models.backbones.meta import METAConfig
from meta_deploy.models.heads.upernet import UPerHead, UPerNetConfig, pooling_weights
from meta_deploy.models.registry import build_model

TINY = UPerNetConfig(
    "tiny", METAConfig(16, 4, 2, inplanes=4, adapter_parts=2, pos_grid=4), num_classes=7, channels=8
)


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = UPerHead((6,) * 4, 8, (1, 2, 3, 6), 5).double().eval()
    with torch.no_grad():
        for name, value in head.state_dict().items():
            if "running_var" in name:
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.1)
    return head


def maps(H, W, B=2):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, 6, H // s, W // s, generator=generator, dtype=torch.float64) for s in (4, 8, 16, 32)
    ]


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_pooling_weights_are_adaptive_average_pooling(bins):
    for size in range(1, 40):
        x = torch.randn(1, 1, size, dtype=torch.float64)
        expected = F.adaptive_avg_pool1d(x, bins)
        torch.testing.assert_close(x @ pooling_weights(size, bins, x).T, expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16), (7, 2)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_pooling_both_axes_is_adaptive_average_pooling_of_a_map(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    rows, columns = (pooling_weights(n, bins, x) for n in size)
    torch.testing.assert_close(rows @ x @ columns.T, F.adaptive_avg_pool2d(x, bins))


@pytest.mark.parametrize("size", [(32, 32), (96, 160), (64, 192)])
def test_head_follows_mmsegmentations_steps(head, size):
    state = head.state_dict()

    def conv(x, name):
        x = F.conv2d(x, state[f"{name}.conv.weight"], padding=state[f"{name}.conv.weight"].shape[-1] // 2)
        bn = [state[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *bn, eps=1e-5))

    def resize(x, like):
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    inputs = maps(*size)
    x = inputs[3]
    pooled = [conv(F.adaptive_avg_pool2d(x, n), f"psp_modules.{i}.1") for i, n in enumerate((1, 2, 3, 6))]
    laterals = [conv(inputs[i], f"lateral_convs.{i}") for i in range(3)]
    laterals.append(conv(torch.cat([x, *(resize(p, x) for p in pooled)], dim=1), "bottleneck"))
    for i in (3, 2, 1):
        laterals[i - 1] = laterals[i - 1] + resize(laterals[i], laterals[i - 1])
    outputs = [conv(laterals[i], f"fpn_convs.{i}") for i in range(3)] + [laterals[3]]
    fused = conv(torch.cat([resize(o, outputs[0]) for o in outputs], dim=1), "fpn_bottleneck")
    expected = F.conv2d(fused, state["conv_seg.weight"], state["conv_seg.bias"])
    torch.testing.assert_close(head(inputs), expected)


def test_state_dict_names_are_mmsegmentations(head):
    convs = [f"psp_modules.{i}.1" for i in range(4)] + ["bottleneck", "fpn_bottleneck"]
    convs += [f"{kind}.{i}" for kind in ("lateral_convs", "fpn_convs") for i in range(3)]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"{c}.conv.weight" for c in convs} | {f"{c}.bn.{p}" for c in convs for p in norm}
    assert set(head.state_dict()) == expected | {"conv_seg.weight", "conv_seg.bias"}


@pytest.mark.parametrize("size", [(32, 32), (96, 160)])
def test_logits_are_at_a_quarter_of_the_input(size):
    torch.manual_seed(0)
    logits = build_model(TINY)(torch.randn(1, 3, *size))["logits"]
    assert logits.shape == (1, 7, size[0] // 4, size[1] // 4)
    assert logits.isfinite().all()


def test_a_batch_of_two_is_two_batches_of_one():
    torch.manual_seed(0)
    model = build_model(TINY).double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    alone = torch.cat([model(image[None])["logits"] for image in images])
    torch.testing.assert_close(model(images)["logits"], alone)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = build_model(TINY).double()
    for interaction in model.backbone.interactions:
        interaction.gamma.data.fill_(0.1)
    logits = model(torch.randn(1, 3, 64, 64, dtype=torch.float64))["logits"]
    (logits * torch.randn_like(logits)).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
