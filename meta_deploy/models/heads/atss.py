"""ATSS (Zhang et al., CVPR 2020): one anchor a place, and a centerness; MMDetection 2.x's test path."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meta_deploy.models.backbones.backbone import BackboneModule
from meta_deploy.models.class_names import COCO_CLASSES
from meta_deploy.models.config import Positive
from meta_deploy.models.heads.dense import (
    DenseConfig,
    DenseDetector,
    DenseHead,
    best_pairs,
    centres,
    measure,
    rows,
)
from meta_deploy.models.heads.head import Head, register
from meta_deploy.models.ops.boxes import INVALID, decode_boxes, take
from meta_deploy.models.shapes import any_starts_with, size_of

BOX_STDS = (0.1, 0.1, 0.2, 0.2)


class ATSSConfig(DenseConfig, frozen=True, tag="atss"):
    """ATSS.

    Attributes:
        anchor_scale: side of a square anchor, in strides of its level.
    """

    anchor_scale: Positive = 8.0


class ATSSHead(DenseHead):
    """Class logits, a box and a centerness at each place."""

    def __init__(self, config: ATSSConfig) -> None:
        super().__init__(config)
        self.anchor_scale = config.anchor_scale
        self.atss_cls = nn.Conv2d(config.channels, config.num_classes, 3, padding=1)
        self.atss_reg = nn.Conv2d(config.channels, 4, 3, padding=1)
        self.atss_centerness = nn.Conv2d(config.channels, 1, 3, padding=1)
        self.initialize(self.atss_cls)

    def forward(self, features: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """Per level class logits (B, classes, h, w), deltas (B, 4, h, w), centerness logits (B, 1, h, w)."""
        outputs: list[tuple[Tensor, ...]] = []
        for x, scale in zip(features, self.scales, strict=True):
            classes, boxes = self.towers(x)
            outputs.append((self.atss_cls(classes), scale(self.atss_reg(boxes)), self.atss_centerness(boxes)))
        return outputs

    def candidates(
        self,
        level: tuple[Tensor, ...],
        stride: int,
        image_size: tuple[int, int],
        pre_nms: int,
        threshold: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, deltas, centerness = level
        place, labels, scores = best_pairs(logits, pre_nms, threshold)
        middle, half = centres(logits, stride), stride * self.anchor_scale / 2
        anchors = torch.cat([middle - half, middle + half], dim=1)
        boxes = decode_boxes(anchors[place], take(rows(deltas), place), BOX_STDS, image_size)
        factor = take(rows(centerness), place)[..., 0].sigmoid()
        return boxes, torch.where(scores > INVALID, scores * factor, INVALID), labels


def build(config: ATSSConfig, backbone: BackboneModule) -> DenseDetector:
    """The whole model; the backbone's strides are 4 to 32."""
    return DenseDetector(config, backbone, ATSSHead(config))


register(
    Head(
        config=ATSSConfig,
        model=build,
        recognise=any_starts_with("bbox_head.atss_"),
        num_classes=lambda state: size_of(state, "bbox_head.atss_cls.weight", 0),
        measure=measure,
        class_names=COCO_CLASSES,
        by_size={"nano": {"fpn_channels": 64, "channels": 64, "input_size": (320, 320)}},
    )
)
