"""UPerNet (Xiao et al., ECCV 2018), in the semantics and names of MMSegmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_deploy.errors import InputError
from meta_deploy.models.backbones.backbone import BackboneModule
from meta_deploy.models.class_names import ADE20K_CLASSES
from meta_deploy.models.config import Count
from meta_deploy.models.heads.fpn import ConvModule
from meta_deploy.models.heads.head import Head, HeadConfig, register
from meta_deploy.models.heads.segmenter import Segmenter, num_classes_of
from meta_deploy.models.init import zero_bias
from meta_deploy.models.shapes import State, any_starts_with, count_of, known, size_of


class UPerNetConfig(HeadConfig, frozen=True, tag="upernet"):
    """UPerNet, with the defaults of MMSegmentation's `UPerHead`.

    Attributes:
        channels: width of all the head's maps.
        pool_scales: sides of the grids that the pyramid pooling pools to.
    """

    num_classes: Count = 150
    task: Literal["semantic-segmentation"] = "semantic-segmentation"
    channels: Count = 512
    pool_scales: tuple[Count, ...] = (1, 2, 3, 6)


def pooling_weights(size: int, bins: int, like: Tensor) -> Tensor:
    """Adaptive average pooling of one axis as a matrix (bins, size): each row averages its own pixels.

    Written as a product because ONNX has no adaptive pooling, and so that the size may be known only at run
    time. Bin i covers [floor(i * size / bins), ceil((i + 1) * size / bins)), as in PyTorch.
    """
    i = torch.arange(bins, device=like.device)[:, None]
    pixel = torch.arange(size, device=like.device)[None, :]
    start, end = i * size // bins, ((i + 1) * size + bins - 1) // bins
    inside = (pixel >= start) & (pixel < end)
    return inside.to(like.dtype) / (end - start).to(like.dtype)


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, an FPN over all four, one classifier on their concatenation.

    Args:
        in_channels: of the four maps.
        channels, pool_scales, num_classes: as in `UPerNetConfig`.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, pool_scales: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        self.pool_scales = pool_scales

        def conv(inputs: int, kernel_size: int) -> ConvModule:
            return ConvModule(inputs, channels, kernel_size, norm=True, relu=True)

        # Index 0 of each pair is the pooling, which has no parameters: the names stay MMSegmentation's.
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.Identity(), conv(in_channels[3], 1)) for _ in pool_scales
        )
        self.bottleneck = conv(in_channels[3] + len(pool_scales) * channels, 3)
        self.lateral_convs = nn.ModuleList(conv(c, 1) for c in in_channels[:3])
        self.fpn_convs = nn.ModuleList(conv(channels, 3) for _ in range(3))
        self.fpn_bottleneck = conv(4 * channels, 3)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        zero_bias(self.conv_seg)

    def pyramid_pool(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, channels, h, w)."""
        h, w = x.shape[-2:]
        pooled = [x]
        for bins, branch in zip(self.pool_scales, self.psp_modules, strict=True):
            if bins == 1:  # a product with a row of ones, which TensorRT-RTX 1.7 cannot fold
                small = x.mean(dim=(2, 3), keepdim=True)
            else:
                rows, columns = pooling_weights(h, bins, x), pooling_weights(w, bins, x)
                small = rows @ x @ columns.transpose(0, 1)
            small = branch(small)  # (B, channels, bins, bins)
            pooled.append(F.interpolate(small, size=(h, w), mode="bilinear", align_corners=False))
        return self.bottleneck(torch.cat(pooled, dim=1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps at 1/4..1/32 -> logits (B, classes, H/4, W/4)."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps[:3], strict=True)]
        laterals.append(self.pyramid_pool(maps[3]))
        for i in (2, 1, 0):
            laterals[i] = laterals[i] + F.interpolate(
                laterals[i + 1], scale_factor=2.0, mode="bilinear", align_corners=False
            )
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:3], strict=True)]
        outputs.append(laterals[3])
        for i in (1, 2, 3):
            outputs[i] = F.interpolate(
                outputs[i], scale_factor=float(2**i), mode="bilinear", align_corners=False
            )
        return self.conv_seg(self.fpn_bottleneck(torch.cat(outputs, dim=1)))


def build(config: UPerNetConfig, backbone: BackboneModule) -> Segmenter:
    """The whole model; the backbone's strides are 4, 8, 16 and 32."""
    head = UPerHead(backbone.out_channels, config.channels, config.pool_scales, config.num_classes)
    return Segmenter(config, backbone, head)


def measure(config: UPerNetConfig, state: State) -> dict[str, Any]:
    """The settings that shapes tell.

    Raises:
        InputError: another number of pooling scales than `config` has, since shapes don't tell which.
    """
    scales = count_of(state, "decode_head.psp_modules.")
    if scales not in (None, len(config.pool_scales)):
        raise InputError(
            f"{scales} pooling scales, and shapes don't tell which ({config.name} has {config.pool_scales})"
        )
    return known(channels=size_of(state, "decode_head.conv_seg.weight", 1))


_PARTS = ("psp_modules", "bottleneck", "lateral_convs", "fpn_convs", "fpn_bottleneck")

register(
    Head(
        config=UPerNetConfig,
        model=build,
        recognise=any_starts_with(*(f"decode_head.{part}." for part in _PARTS)),
        num_classes=num_classes_of,
        measure=measure,
        class_names=ADE20K_CLASSES,
        by_size={"nano": {"channels": 64, "input_size": (320, 320)}},
    )
)
