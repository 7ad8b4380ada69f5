"""GFL (Li et al., "Generalized Focal Loss", NeurIPS 2020), in MMDetection 2.x's test path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meta_deploy.models.backbones.backbone import BackboneModule
from meta_deploy.models.class_names import COCO_CLASSES
from meta_deploy.models.config import Count
from meta_deploy.models.heads import dense
from meta_deploy.models.heads.dense import DenseConfig, DenseDetector, DenseHead, best_pairs, centres, rows
from meta_deploy.models.heads.head import Head, register
from meta_deploy.models.ops.boxes import take
from meta_deploy.models.shapes import State, any_starts_with, size_of


class GFLConfig(DenseConfig, frozen=True, tag="gfl"):
    """GFL.

    Attributes:
        reg_max: the longest distance from a place to a side, in strides; there are reg_max + 1 bins.
    """

    reg_max: Count = 16


class Integral(nn.Module):
    """The mean of a distribution over 0 .. reg_max, under MMDetection's name `project`."""

    def __init__(self, reg_max: int) -> None:
        super().__init__()
        self.project: Tensor
        self.register_buffer("project", torch.linspace(0, reg_max, reg_max + 1))

    def forward(self, logits: Tensor) -> Tensor:
        """(B, N, 4 * bins) -> (B, N, 4)."""
        # A sum and no product with a vector, which OpenVINO 2026 fails to merge with the stride's factor.
        return (logits.unflatten(2, (4, -1)).softmax(dim=-1) * self.project).sum(dim=-1)


class GFLHead(DenseHead):
    """Class logits, which say how good the box is, too, and four distributions at each place."""

    def __init__(self, config: GFLConfig) -> None:
        super().__init__(config)
        self.gfl_cls = nn.Conv2d(config.channels, config.num_classes, 3, padding=1)
        self.gfl_reg = nn.Conv2d(config.channels, 4 * (config.reg_max + 1), 3, padding=1)
        self.integral = Integral(config.reg_max)
        self.initialize(self.gfl_cls)

    def forward(self, features: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """Per level class logits (B, classes, h, w) and logits of distances (B, 4 * bins, h, w)."""
        outputs: list[tuple[Tensor, ...]] = []
        for x, scale in zip(features, self.scales, strict=True):
            classes, boxes = self.towers(x)
            outputs.append((self.gfl_cls(classes), scale(self.gfl_reg(boxes))))
        return outputs

    def candidates(
        self,
        level: tuple[Tensor, ...],
        stride: int,
        image_size: tuple[int, int],
        pre_nms: int,
        threshold: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, distances = level
        place, labels, scores = best_pairs(logits, pre_nms, threshold)
        sides = (
            self.integral(take(rows(distances), place)) * stride
        )  # (B, pre_nms, 4): left, top, right, bottom
        middle = centres(logits, stride)[place]
        x1, y1 = (middle - sides[..., :2]).unbind(-1)
        x2, y2 = (middle + sides[..., 2:]).unbind(-1)
        H, W = image_size
        boxes = torch.stack([x1.clamp(0, W), y1.clamp(0, H), x2.clamp(0, W), y2.clamp(0, H)], dim=-1)
        return boxes, scores, labels


def build(config: GFLConfig, backbone: BackboneModule) -> DenseDetector:
    """The whole model; the backbone's strides are 4 to 32."""
    return DenseDetector(config, backbone, GFLHead(config))


def measure(config: GFLConfig, state: State) -> dict[str, Any]:
    """The widths and the number of bins that shapes tell."""
    outputs = size_of(state, "bbox_head.gfl_reg.weight", 0)
    return dense.measure(config, state) | ({"reg_max": outputs // 4 - 1} if outputs else {})


register(
    Head(
        config=GFLConfig,
        model=build,
        recognise=any_starts_with("bbox_head.gfl_"),
        num_classes=lambda state: size_of(state, "bbox_head.gfl_cls.weight", 0),
        measure=measure,
        class_names=COCO_CLASSES,
        by_size={"nano": {"fpn_channels": 64, "channels": 64, "input_size": (320, 320)}},
    )
)
