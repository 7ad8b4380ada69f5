"""Necks: the feature pyramid network (Lin et al., CVPR 2017) and a plain mapper, names as in MMDetection."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from meta_deploy.models.init import zero_bias


class ConvModule(nn.Module):
    """A convolution, optionally with batch norm and ReLU, under MMCV's names (`conv`, `bn`)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: bool = False,
        relu: bool = False,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=not norm
        )
        self.bn = nn.BatchNorm2d(out_channels) if norm else None
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up."""
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return F.relu(x) if self.relu else x


class FPN(nn.Module):
    """Maps, each half as large as the one before, to as many of one width, and optionally a coarser one.

    Args:
        in_channels: of each map, the largest map first.
        out_channels: of all outputs.
        extra_level: whether to add a last map, every other pixel of the one before, as detectors have.
        norm: whether each convolution has a batch norm.
        extra_convs: coarser maps, each a convolution of stride 2 over the one before, as dense heads have.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        extra_level: bool = True,
        norm: bool = False,
        extra_convs: int = 0,
    ) -> None:
        super().__init__()
        self.extra_level = extra_level
        self.lateral_convs = nn.ModuleList(ConvModule(c, out_channels, 1, norm) for c in in_channels)
        strides = [1] * len(in_channels) + [2] * extra_convs
        self.fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, norm, stride=stride) for stride in strides
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                zero_bias(module)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps (B, in_channels[i], h / 2^i, w / 2^i) -> (B, out_channels, h / 2^i, w / 2^i), and more."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in reversed(range(len(laterals) - 1)):
            laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], scale_factor=2.0, mode="nearest")
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)]
        for conv in self.fpn_convs[len(laterals) :]:
            outputs.append(conv(outputs[-1]))
        return [*outputs, F.max_pool2d(outputs[-1], 1, stride=2)] if self.extra_level else outputs


class ChannelMapper(nn.Module):
    """Maps to maps of one width, each on its own, and a coarser one: what ViT-Adapter has "without FPN".

    Args:
        in_channels: of each map, the largest map first.
        out_channels: of all outputs.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvModule(c, out_channels, 1, relu=True) for c in in_channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                zero_bias(module)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps (B, in_channels[i], h_i, w_i) -> maps (B, out_channels, h_i, w_i), and a last one of half."""
        outputs = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        return [*outputs, F.max_pool2d(outputs[-1], 2, stride=2)]
