"""The convolutional spatial prior: against its layers written out with functional calls."""

import pytest
import torch
from torch.nn import functional as F

from meta_deploy.models.backbones.spatial_prior import SpatialPrior


@pytest.fixture
def prior():
    torch.manual_seed(0)
    model = SpatialPrior(12, inplanes=4).double().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(
                    torch.rand_like(value) + 0.5 if "running_var" in name else torch.randn_like(value) * 0.5
                )
    return model


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (96, 160)])
def test_maps_are_at_a_quarter_to_a_thirty_second(prior, size):
    H, W = size
    shapes = [tuple(c.shape) for c in prior(torch.randn(2, 3, H, W, dtype=torch.float64))]
    assert shapes == [(2, 12, H // s, W // s) for s in (4, 8, 16, 32)]


def test_maps_follow_the_layers_of_vit_adapter(prior):
    state = prior.state_dict()

    def conv_bn_relu(x, conv, bn, stride):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, var = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return (x * state[f"{bn}.weight"][:, None, None] + state[f"{bn}.bias"][:, None, None]).clamp(min=0)

    def project(x, index):
        weight, bias = state[f"fc{index}.weight"][:, :, 0, 0], state[f"fc{index}.bias"]
        return torch.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None]

    images = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    x = conv_bn_relu(images, "stem.0", "stem.1", 2)
    x = conv_bn_relu(x, "stem.3", "stem.4", 1)
    x = conv_bn_relu(x, "stem.6", "stem.7", 1)
    maps = [F.max_pool2d(x, 3, 2, 1)]
    for index in (2, 3, 4):
        maps.append(conv_bn_relu(maps[-1], f"conv{index}.0", f"conv{index}.1", 2))
    for got, (i, expected) in zip(prior(images), enumerate(maps, 1), strict=True):
        torch.testing.assert_close(got, project(expected, i))


def test_widths_are_one_two_four_four_times_inplanes(prior):
    assert [getattr(prior, f"fc{i}").in_channels for i in (1, 2, 3, 4)] == [4, 8, 16, 16]
    assert SpatialPrior(192).fc1.in_channels == 64
