"""The feature pyramid: against its sums written out, and its names."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meta_deploy.models.heads.fpn import FPN, ChannelMapper, ConvModule


def maps(channels, H=96, W=160):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, channels, H // s, W // s) for s in (4, 8, 16, 32)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def test_pyramid_is_lateral_plus_nearest_upsampled_then_smoothed():
    torch.manual_seed(0)
    fpn = FPN((6,) * 4, 4).double()
    inputs, state = maps(6), fpn.state_dict()
    top = None
    expected = []
    for i in (3, 2, 1, 0):
        weight, bias = state[f"lateral_convs.{i}.conv.weight"], state[f"lateral_convs.{i}.conv.bias"]
        lateral = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], inputs[i]) + bias[:, None, None]
        if top is not None:
            lateral = lateral + top.repeat_interleave(2, 2).repeat_interleave(2, 3)
        top = lateral
        weight, bias = state[f"fpn_convs.{i}.conv.weight"], state[f"fpn_convs.{i}.conv.bias"]
        expected.insert(0, F.conv2d(top, weight, bias, padding=1))
    expected.append(expected[-1][:, :, ::2, ::2])
    for got, want in zip(fpn(inputs), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("size", [(32, 32), (96, 160), (64, 32)])
def test_there_are_five_levels_at_strides_4_to_64(size):
    H, W = size
    shapes = [tuple(f.shape) for f in FPN((6,) * 4, 4).double()(maps(6, H, W))]
    expected = [(2, 4, H // s, W // s) for s in (4, 8, 16, 32)]
    assert shapes == [*expected, (2, 4, -(-H // 64), -(-W // 64))]


def test_state_dict_names_are_mmdetections():
    kinds = ("lateral_convs", "fpn_convs")
    expected = {f"{k}.{i}.conv.{p}" for k in kinds for i in range(4) for p in ("weight", "bias")}
    assert set(FPN((6,) * 4, 4).state_dict()) == expected


def test_conv_module_is_convolution_norm_relu():
    torch.manual_seed(0)
    module = ConvModule(3, 5, 3, norm=True, relu=True).double().eval()
    module.bn.running_mean.copy_(torch.randn(5))
    module.bn.running_var.copy_(torch.rand(5) + 0.5)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    y = F.conv2d(x, module.conv.weight, padding=1) - module.bn.running_mean[:, None, None]
    expected = (y / (module.bn.running_var[:, None, None] + 1e-5).sqrt()).clamp(min=0)
    torch.testing.assert_close(module(x), expected)
    assert module.conv.bias is None
    assert (module(x) == 0).any()


def test_conv_module_alone_is_a_convolution_with_bias():
    module = ConvModule(3, 5, 1)
    assert set(module.state_dict()) == {"conv.weight", "conv.bias"}
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(module(x), F.conv2d(x, module.conv.weight, module.conv.bias))


def test_a_pyramid_can_have_batch_norms():
    torch.manual_seed(0)
    fpn = FPN((6,) * 4, 4, norm=True).double().eval()
    for norm in (m for m in fpn.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    x = maps(6, 96, 64)
    plain = FPN((6,) * 4, 4).double().eval()
    for ours, theirs in zip((m.conv for m in convolutions(plain)), convolutions(fpn), strict=True):
        scale = theirs.bn.weight / (theirs.bn.running_var + theirs.bn.eps).sqrt()
        ours.weight.data = theirs.conv.weight * scale[:, None, None, None]
        ours.bias.data = theirs.bn.bias - theirs.bn.running_mean * scale
    for a, b in zip(fpn(x), plain(x), strict=True):
        torch.testing.assert_close(a, b)


def convolutions(module):
    return [m for m in module.modules() if isinstance(m, ConvModule)]


def test_the_mapper_is_a_convolution_and_relu_a_map_and_a_pooled_last_one():
    torch.manual_seed(0)
    mapper = ChannelMapper((6,) * 4, 4).double()
    x = maps(6, 96, 160)
    *outputs, last = mapper(x)
    for i, (given, out) in enumerate(zip(x, outputs, strict=True)):
        conv = mapper.convs[i].conv
        expected = torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], given) + conv.bias[:, None, None]
        torch.testing.assert_close(out, expected.clamp(min=0))
    B, C, H, W = outputs[3].shape
    quarters = outputs[3][:, :, : H // 2 * 2, : W // 2 * 2].reshape(B, C, H // 2, 2, W // 2, 2)
    torch.testing.assert_close(last, quarters.amax(dim=(3, 5)))
    assert set(mapper.state_dict()) == {f"convs.{i}.conv.{n}" for i in range(4) for n in ("weight", "bias")}
