"""Semantic FPN (Kirillov et al., "Panoptic feature pyramid networks", CVPR 2019, section 3).

In the semantics and names of MMSegmentation's FPN neck and `FPNHead`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from meta_deploy.models.backbones.backbone import BackboneModule
from meta_deploy.models.class_names import ADE20K_CLASSES
from meta_deploy.models.config import Count
from meta_deploy.models.heads.fpn import FPN, ConvModule
from meta_deploy.models.heads.head import Head, HeadConfig, register
from meta_deploy.models.heads.segmenter import Segmenter, num_classes_of
from meta_deploy.models.init import zero_bias
from meta_deploy.models.shapes import State, any_starts_with, known, size_of


class SemanticFPNConfig(HeadConfig, frozen=True, tag="semantic-fpn"):
    """Semantic FPN, with the defaults of MMSegmentation's `fpn_r50`.

    Attributes:
        fpn_channels: width of the pyramid.
        channels: width of the head.
    """

    num_classes: Count = 150
    task: Literal["semantic-segmentation"] = "semantic-segmentation"
    fpn_channels: Count = 256
    channels: Count = 128


class FPNHead(nn.Module):
    """Adds the maps of a pyramid, brought to the largest one's size: a convolution before each doubling.

    Args:
        in_channels: of every map.
        strides: of the maps, each twice the one before.
        channels: width of the head.
        num_classes: outputs.
    """

    def __init__(self, in_channels: int, strides: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList(
            self._scale_head(in_channels, channels, int(math.log2(stride // strides[0])))
            for stride in strides
        )
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        zero_bias(self.conv_seg)

    @staticmethod
    def _scale_head(in_channels: int, channels: int, doublings: int) -> nn.Sequential:
        """(B, in_channels, h, w) -> (B, channels, h * 2^doublings, w * 2^doublings)."""
        layers: list[nn.Module] = []
        for i in range(max(1, doublings)):
            conv = ConvModule(channels if i else in_channels, channels, 3, norm=True, relu=True)
            nn.init.kaiming_normal_(conv.conv.weight, mode="fan_out", nonlinearity="relu")
            layers.append(conv)
            if doublings:
                layers.append(nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False))
        return nn.Sequential(*layers)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, in_channels, H / strides[i], W / strides[i]) -> logits of the size of the first."""
        total, *others = [head(x) for head, x in zip(self.scale_heads, maps, strict=True)]
        for x in others:
            total = total + x
        return self.conv_seg(total)


def build(config: SemanticFPNConfig, backbone: BackboneModule) -> Segmenter:
    """The whole model, for a backbone of any widths."""
    neck = FPN(backbone.out_channels, config.fpn_channels, extra_level=False)
    head = FPNHead(config.fpn_channels, backbone.strides, config.channels, config.num_classes)
    return Segmenter(config, backbone, head, neck)


def measure(config: SemanticFPNConfig, state: State) -> dict[str, Any]:
    """The widths that shapes tell."""
    return known(
        fpn_channels=size_of(state, "neck.lateral_convs.0.conv.weight", 0),
        channels=size_of(state, "decode_head.conv_seg.weight", 1),
    )


register(
    Head(
        config=SemanticFPNConfig,
        model=build,
        recognise=any_starts_with("decode_head.scale_heads."),
        num_classes=num_classes_of,
        measure=measure,
        class_names=ADE20K_CLASSES,
        by_size={"nano": {"fpn_channels": 64, "channels": 64, "input_size": (320, 320)}},
    )
)
