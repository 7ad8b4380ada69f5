"""What detectors without a second stage share: pyramid, towers, selection; MMDetection 2.x's test path.

State-dict names are MMDetection's. Names no head.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_deploy.models.backbones.backbone import BackboneModule
from meta_deploy.models.config import Count, Fraction, Positive
from meta_deploy.models.heads.fpn import FPN
from meta_deploy.models.heads.head import HeadConfig
from meta_deploy.models.init import zero_bias
from meta_deploy.models.ops.boxes import INVALID, has_area, nms, select_top, separate, take
from meta_deploy.models.shapes import State, count_of, known, size_of

GROUPS = 32  # of the towers' norms
STRIDES = (8, 16, 32, 64, 128)


class DenseConfig(HeadConfig, frozen=True):
    """A dense detector, with the defaults of MMDetection 2.x.

    Attributes:
        fpn_channels, channels: widths of the pyramid and the towers.
        convs: of a tower.
        pre_nms: the most candidates, pairs of a place and a class, of a level.
        score_threshold: candidates below it are dropped.
        shown_score: the least score of detections that are shown unless asked otherwise.
        nms: IoU above which NMS drops a detection.
        max_detections: the most per image.
    """

    num_classes: Count = 80
    task: Literal["detection"] = "detection"
    fpn_channels: Count = 256
    channels: Count = 256
    convs: Count = 4
    pre_nms: Count = 1000
    score_threshold: Fraction = 0.05
    shown_score: Fraction = 0.3
    nms: Positive = 0.6
    max_detections: Count = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.channels % GROUPS == 0, f"{self.channels} channels are not a multiple of {GROUPS}")


class GroupNormConv(nn.Module):
    """A 3x3 convolution, group norm and ReLU, under MMCV's names (`conv`, `gn`)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.gn = nn.GroupNorm(GROUPS, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        return F.relu(self.gn(self.conv(x)))


class Scale(nn.Module):
    """A learned factor, one a level."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class DenseHead(nn.Module):
    """Two towers over each level, of classes and of boxes; subclasses have the last layers."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        widths = [config.fpn_channels] + [config.channels] * config.convs
        self.cls_convs = nn.ModuleList(GroupNormConv(a, b) for a, b in itertools.pairwise(widths))
        self.reg_convs = nn.ModuleList(GroupNormConv(a, b) for a, b in itertools.pairwise(widths))
        self.scales = nn.ModuleList(Scale() for _ in STRIDES)

    def initialize(self, classifier: nn.Conv2d) -> None:
        """Small weights, and a classifier that begins by saying 0.01 everywhere (focal loss, section 3.3)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                zero_bias(module)
        if classifier.bias is not None:
            nn.init.constant_(classifier.bias, -math.log(99))

    def towers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A level's map -> what the classifier sees, what the regressor sees."""
        classes = boxes = x
        for conv in self.cls_convs:
            classes = conv(classes)
        for conv in self.reg_convs:
            boxes = conv(boxes)
        return classes, boxes

    def forward(self, features: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """Per level the raw outputs: class logits (B, classes, h, w), then the head's own."""
        raise NotImplementedError

    def candidates(
        self,
        level: tuple[Tensor, ...],
        stride: int,
        image_size: tuple[int, int],
        pre_nms: int,
        threshold: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The level's best pairs of a place and a class.

        Args:
            level: what `forward` gives of it.
            stride: of the level.
            image_size: (H, W), to which boxes are clipped.
            pre_nms: the most pairs.
            threshold: pairs of a lower score are left out; the head's own factors come after it.

        Returns:
            Boxes (B, pre_nms, 4), scores (B, pre_nms), `INVALID` where missing, labels (B, pre_nms).
        """
        raise NotImplementedError


def best_pairs(logits: Tensor, most: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of a place and a class of a level.

    Logits rank them; their sigmoid, which MMDetection ranks, is in the same order.

    Args:
        logits: (B, classes, h, w).
        most: pairs.
        threshold: of the sigmoid; only pairs above it count.

    Returns:
        Places (B, most), row by row, labels (B, most), scores (B, most); the score is `INVALID` where there
        are fewer.
    """
    classes = logits.shape[1]
    flat = logits.permute(0, 2, 3, 1).flatten(1)
    least = (
        math.log(threshold / (1 - threshold))
        if 0 < threshold < 1
        else math.copysign(math.inf, threshold - 0.5)
    )
    best, index = select_top(torch.where(flat > least, flat, INVALID), most)
    scores = torch.where(best > INVALID, best.sigmoid(), INVALID)
    return index // classes, index % classes, scores


def centres(like: Tensor, stride: int) -> Tensor:
    """The corner of each cell of a map (B, C, h, w), in input pixels: (h * w, 2), x before y, row by row."""
    h, w = like.shape[-2:]
    x = torch.arange(w, device=like.device, dtype=like.dtype)[None, :].expand(h, w) * stride
    y = torch.arange(h, device=like.device, dtype=like.dtype)[:, None].expand(h, w) * stride
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def rows(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C)."""
    return x.flatten(2).transpose(1, 2)


class DenseDetector(nn.Module):
    """Image in, boxes and classes out; of the backbone's maps the one at stride 4 is not used."""

    def __init__(self, config: DenseConfig, backbone: BackboneModule, head: DenseHead) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.neck = FPN(backbone.out_channels[1:], config.fpn_channels, extra_level=False, extra_convs=2)
        self.bbox_head = head

    def extract_features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> five maps at strides 8 to 128."""
        return self.neck(self.backbone(images)[1:])

    def forward(self, images: Tensor, stages: bool = False) -> dict[str, Tensor]:
        """(B, 3, H, W), normalized RGB; H and W multiples of 32.

        Args:
            images: the batch.
            stages: also return what verification compares on the way: the pyramid maps `feature_0` ..
                `feature_4`.

        Returns:
            `num_detections` (B,) int32; padded to K, best first: `boxes` (B, K, 4) xyxy in input pixels,
            `scores` (B, K), `labels` (B, K) int32 (-1 where padded).
        """
        features = self.extract_features(images)
        boxes, scores, labels = self.detect(features, (images.shape[2], images.shape[3]))
        found = scores > INVALID
        outputs = {
            "num_detections": found.sum(dim=1).to(torch.int32),
            "boxes": torch.where(found[..., None], boxes, 0.0),
            "scores": scores.clamp(min=0.0),
            "labels": torch.where(found, labels, -1).to(torch.int32),
        }
        if stages:
            outputs |= {f"feature_{i}": feature for i, feature in enumerate(features)}
        return outputs

    def detect(self, features: list[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, K, 4), scores (B, K) and labels (B, K), best first; padded ones have `INVALID` scores."""
        config = self.config
        levels = [
            self.bbox_head.candidates(level, stride, image_size, config.pre_nms, config.score_threshold)
            for level, stride in zip(self.bbox_head(features), STRIDES, strict=True)
        ]
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        scores = torch.where(has_area(boxes), scores, INVALID)
        apart = separate(boxes, labels.to(boxes.dtype), image_size)
        kept = nms(apart, scores, config.nms, INVALID, config.max_detections)
        scores, index = select_top(torch.where(kept, scores, INVALID), config.max_detections)
        return take(boxes, index), scores, labels.gather(1, index)


def measure(config: DenseConfig, state: State) -> dict[str, Any]:
    """The widths that shapes tell."""
    return known(
        fpn_channels=size_of(state, "neck.lateral_convs.0.conv.weight", 0),
        channels=size_of(state, "bbox_head.cls_convs.0.conv.weight", 0),
        convs=count_of(state, "bbox_head.cls_convs."),
    )
