"""Mask R-CNN (He et al., ICCV 2017) with FPN, in the semantics of MMDetection 2.x's test path.

State-dict names of neck and heads are MMDetection's. Boxes are clipped to the (padded) input, the one size
that the network knows; MMDetection clips to the picture inside it, which the runtime does afterwards.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_deploy.models.backbones.backbone import BackboneModule
from meta_deploy.models.class_names import COCO_CLASSES
from meta_deploy.models.config import Count, CountOrZero, Fraction, Positive
from meta_deploy.models.heads.fpn import FPN, ChannelMapper, ConvModule
from meta_deploy.models.heads.head import Head, HeadConfig, register
from meta_deploy.models.heads.rpn import RPNHead
from meta_deploy.models.init import zero_bias
from meta_deploy.models.ops.boxes import INVALID, decode_boxes, has_area, nms, select_top, separate, take
from meta_deploy.models.ops.roi_align import pyramid_roi_align
from meta_deploy.models.shapes import State, any_starts_with, count_of, known, size_of

BOX_STDS = (0.1, 0.1, 0.2, 0.2)
_ROI_STRIDES = [4, 8, 16, 32]


class MaskRCNNConfig(HeadConfig, frozen=True, tag="mask-rcnn"):
    """Mask R-CNN, with the defaults of MMDetection 2.x's `mask_rcnn_*_fpn`.

    Attributes:
        fpn_channels, fc_channels, mask_channels: widths of the pyramid, the box head and the mask head.
        neck: "fpn", or "mapper" for a 1x1 convolution a map and no pyramid.
        rpn_convs: 3x3 convolutions of the RPN.
        box_convs, box_channels: 3x3 convolutions of the box head, and their width.
        box_fcs: hidden linear layers of the box head.
        neck_norm, box_norm, mask_norm: batch norms after the convolutions of the pyramid and the two heads.
        anchor_scale: side of a square anchor, in strides of its level.
        rpn_pre_nms: anchors kept per level before NMS.
        rpn_nms, nms: IoU above which NMS drops a proposal, a detection.
        proposals, max_detections: the most per image.
        score_threshold: detections below it are dropped.
        shown_score: the least score of those that are shown unless asked otherwise.
    """

    num_classes: Count = 80
    task: Literal["instance-segmentation"] = "instance-segmentation"
    fpn_channels: Count = 256
    fc_channels: Count = 1024
    mask_channels: Count = 256
    neck: Literal["fpn", "mapper"] = "fpn"
    rpn_convs: Count = 1
    box_convs: CountOrZero = 0
    box_channels: Count = 256
    box_fcs: Count = 2
    neck_norm: bool = False
    box_norm: bool = False
    mask_norm: bool = False
    anchor_scale: Positive = 8.0
    rpn_pre_nms: Count = 1000
    rpn_nms: Positive = 0.7
    proposals: Count = 1000
    score_threshold: Fraction = 0.05
    shown_score: Fraction = 0.3
    nms: Positive = 0.5
    max_detections: Count = 100


class BoxHead(nn.Module):
    """Shared convolutions and linear layers, then class scores (background last) and class-specific boxes."""

    def __init__(self, config: MaskRCNNConfig, boxes: int | None = None) -> None:
        """`boxes` is the number of boxes that are predicted for a proposal; None: one a class."""
        super().__init__()
        widths = [config.fpn_channels] + [config.box_channels] * config.box_convs
        self.shared_convs = nn.ModuleList(
            ConvModule(before, after, 3, norm=config.box_norm, relu=True)
            for before, after in itertools.pairwise(widths)
        )
        hidden = config.fc_channels
        self.shared_fcs = nn.ModuleList(
            nn.Linear(hidden if i else widths[-1] * 7 * 7, hidden) for i in range(config.box_fcs)
        )
        self.fc_cls = nn.Linear(hidden, config.num_classes + 1)
        self.fc_reg = nn.Linear(hidden, 4 * (boxes or config.num_classes))
        for fc in self.modules():
            if isinstance(fc, nn.Linear):
                nn.init.xavier_uniform_(fc.weight)
                zero_bias(fc)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, 7, 7) -> logits (R, classes + 1), deltas (R, 4 * classes)."""
        for conv in self.shared_convs:
            pooled = conv(pooled)
        x = pooled.flatten(1)
        for fc in self.shared_fcs:
            x = F.relu(fc(x))
        return self.fc_cls(x), self.fc_reg(x)


class MaskHead(nn.Module):
    """Four 3x3 convolutions, a stride-2 transposed one, and a mask per class."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, norm: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            ConvModule(channels if i else in_channels, channels, 3, norm, relu=True) for i in range(4)
        )
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                zero_bias(module)

    def forward(self, pooled: Tensor) -> Tensor:
        """(R, C, 14, 14) -> logits (R, classes, 28, 28)."""
        x = pooled
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(F.relu(self.upsample(x)))


class RoIStage(nn.Module):
    """What second stages of one and of several heads share: pooling, and the choice of detections."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.score_threshold = config.score_threshold
        self.nms_threshold = config.nms
        self.max_detections = config.max_detections

    def detect(
        self, features: list[Tensor], proposals: Tensor, proposal_logits: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals (B, P, 4) and their logits (B, P) -> what `choose` gives."""
        raise NotImplementedError

    def masks(self, features: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Boxes (B, K, 4) and their labels (B, K) -> mask probabilities (B, K, 28, 28)."""
        raise NotImplementedError

    @staticmethod
    def box_pool(features: list[Tensor], rois: Tensor, batch_index: Tensor) -> Tensor:
        """Maps at strides 4..32, RoIs (R, 4), image of each (R,) -> (R, C, 7, 7)."""
        return pyramid_roi_align(features, rois, batch_index, _ROI_STRIDES, 7)

    @staticmethod
    def mask_pool(features: list[Tensor], rois: Tensor, batch_index: Tensor) -> Tensor:
        """Maps at strides 4..32, RoIs (R, 4), image of each (R,) -> (R, C, 14, 14)."""
        return pyramid_roi_align(features, rois, batch_index, _ROI_STRIDES, 14)

    def choose(
        self, logits: Tensor, boxes: Tensor, proposal_logits: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The K best of all proposals' boxes, after NMS within each class.

        Args:
            logits: (B * P, classes + 1), background last.
            boxes: (B, P, classes, 4), or (B, P, 1, 4) for all classes, clipped to the image.
            proposal_logits: (B, P); `INVALID` where a proposal is only padding.
            image_size: (H, W).

        Returns:
            Boxes (B, K, 4), scores (B, K) and labels (B, K), best first; padded entries have the score
            `INVALID`.
        """
        B, P, per_class, _ = boxes.shape
        scores = logits.softmax(dim=-1)[:, : self.num_classes].reshape(B, P, -1)
        valid = (proposal_logits > INVALID)[:, :, None] & has_area(boxes)
        scores = torch.where(valid, scores, INVALID).reshape(B, -1)
        if per_class == 1:
            boxes = boxes.expand(-1, -1, self.num_classes, -1)
        boxes = boxes.reshape(B, -1, 4)
        classes = torch.arange(self.num_classes, device=boxes.device).repeat(P)
        apart = separate(boxes, classes.to(boxes.dtype), image_size)
        kept = nms(apart, scores, self.nms_threshold, self.score_threshold, self.max_detections)
        scores, index = select_top(torch.where(kept, scores, INVALID), self.max_detections)
        return take(boxes, index), scores, index % self.num_classes


class RoIHead(RoIStage):
    """Second stage: classifies and refines proposals, then predicts a mask in each kept box."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__(config)
        self.bbox_head = BoxHead(config)
        self.mask_head = MaskHead(
            config.fpn_channels, config.mask_channels, config.num_classes, config.mask_norm
        )

    def detect(
        self, features: list[Tensor], proposals: Tensor, proposal_logits: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, P, _ = proposals.shape
        logits, deltas = self.bbox_head(
            self.box_pool(features, proposals.reshape(-1, 4), image_of(proposals))
        )
        deltas = deltas.reshape(B, P, self.num_classes, 4)
        boxes = decode_boxes(proposals[:, :, None], deltas, BOX_STDS, image_size)  # (B, P, classes, 4)
        return self.choose(logits, boxes, proposal_logits, image_size)

    def masks(self, features: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        pooled = self.mask_pool(features, boxes.reshape(-1, 4), image_of(boxes))
        masks = mask_of_label(self.mask_head(pooled), labels)
        return masks.reshape(*labels.shape, *masks.shape[2:])


def mask_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (R, classes, h, w), labels of R boxes -> the probabilities of each one's class (R, 1, h, w)."""
    index = labels.reshape(-1, 1, 1, 1).expand(-1, 1, *logits.shape[-2:])
    return logits.gather(1, index).sigmoid()


def image_of(boxes: Tensor) -> Tensor:
    """The image that each row of (B, N, 4), flattened, belongs to: (B * N,) int64."""
    B, N, _ = boxes.shape
    return torch.arange(B, device=boxes.device)[:, None].expand(B, N).reshape(-1)


class MaskRCNN(nn.Module):
    """Image in, boxes, classes and masks out; the backbone's strides are 4 to 32.

    Args:
        config: of the model.
        backbone: images to maps.
        roi_head: the second stage; None for `RoIHead`.
    """

    def __init__(
        self, config: MaskRCNNConfig, backbone: BackboneModule, roi_head: RoIStage | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.neck = (
            FPN(backbone.out_channels, config.fpn_channels, norm=config.neck_norm)
            if config.neck == "fpn"
            else ChannelMapper(backbone.out_channels, config.fpn_channels)
        )
        self.rpn_head = RPNHead(
            config.fpn_channels,
            config.rpn_pre_nms,
            config.rpn_nms,
            config.proposals,
            config.anchor_scale,
            config.rpn_convs,
        )
        self.roi_head = roi_head or RoIHead(config)

    def extract_features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> five maps at strides 4 to 64."""
        return self.neck(self.backbone(images))

    def forward(self, images: Tensor, stages: bool = False) -> dict[str, Tensor]:
        """(B, 3, H, W), normalized RGB; H and W multiples of 32.

        Args:
            images: the batch.
            stages: also return what verification compares on the way: the pyramid maps `feature_0` ..
                `feature_4`, `proposals` (B, P, 4) and `proposal_logits` (B, P).

        Returns:
            `num_detections` (B,) int32; padded to K, best first: `boxes` (B, K, 4) xyxy in input pixels,
            `scores` (B, K), `labels` (B, K) int32 (-1 where padded), `masks` (B, K, 28, 28) probabilities.
        """
        image_size = (images.shape[2], images.shape[3])
        features = self.extract_features(images)
        logits, deltas = self.rpn_head(features)
        proposals, proposal_logits = self.rpn_head.proposals(logits, deltas, image_size)
        boxes, scores, labels = self.roi_head.detect(features[:4], proposals, proposal_logits, image_size)
        masks = self.roi_head.masks(features[:4], boxes, labels)
        found = scores > 0
        outputs = {
            "num_detections": found.sum(dim=1).to(torch.int32),
            "boxes": torch.where(found[..., None], boxes, 0.0),
            "scores": scores.clamp(min=0.0),
            "labels": torch.where(found, labels, -1).to(torch.int32),
            "masks": torch.where(found[..., None, None], masks, 0.0),
        }
        if stages:
            outputs |= {f"feature_{i}": feature for i, feature in enumerate(features)}
            outputs |= {"proposals": proposals, "proposal_logits": proposal_logits}
        return outputs


def num_classes_of(state: State, stage: str = "") -> int | None:
    """Classes of the box head, the background not counted, else those of the mask head."""
    with_background = size_of(state, f"roi_head.bbox_head.{stage}fc_cls.weight", 0)
    if with_background is None:
        return size_of(state, f"roi_head.mask_head.{stage}conv_logits.weight", 0)
    return with_background - 1


def measure(config: MaskRCNNConfig, state: State, stage: str = "") -> dict[str, Any]:
    """The layers and widths that names and shapes tell; what has no tensor here is left out.

    Args:
        config: not used.
        state: of the whole model.
        stage: what stands before the names within the heads of one stage of a cascade, such as "0.".
    """
    neck, box = "neck.lateral_convs.0.", f"roi_head.bbox_head.{stage}"
    mask = f"roi_head.mask_head.{stage}convs.0."
    mapped = size_of(state, "neck.convs.0.conv.weight", 0)
    has_box, convs = f"{box}fc_cls.weight" in state, count_of(state, f"{box}shared_convs.")
    return known(
        fpn_channels=mapped or size_of(state, f"{neck}conv.weight", 0),
        fc_channels=size_of(state, f"{box}shared_fcs.0.weight", 0),
        mask_channels=size_of(state, f"{mask}conv.weight", 0),
        neck="mapper" if mapped else None,
        rpn_convs=count_of(state, "rpn_head.rpn_conv."),
        box_convs=(convs or 0) if has_box else None,
        box_channels=size_of(state, f"{box}shared_convs.0.conv.weight", 0),
        box_fcs=count_of(state, f"{box}shared_fcs."),
        neck_norm=f"{neck}bn.weight" in state or None,
        box_norm=f"{box}shared_convs.0.bn.weight" in state or None,
        mask_norm=f"{mask}bn.weight" in state or None,
    )


# Stages of a cascade, and what Sparse R-CNN has in place of anchors.
_OTHERS = re.compile(r"roi_head\.(bbox|mask)_head\.\d|roi_head\.semantic_head\.|rpn_head\.init_proposal")


def recognise(state: State) -> bool:
    """Whether RPN and RoI head are there, and are not those of a cascade or of Sparse R-CNN."""
    return any_starts_with("rpn_head.", "roi_head.")(state) and not any(map(_OTHERS.match, state))


register(
    Head(
        config=MaskRCNNConfig,
        model=MaskRCNN,
        recognise=recognise,
        num_classes=num_classes_of,
        measure=measure,
        class_names=COCO_CLASSES,
        # Narrow, so that checkpoint and bundle ship with the package.
        by_size={
            "nano": {"fpn_channels": 64, "fc_channels": 192, "mask_channels": 64, "input_size": (320, 320)}
        },
    )
)
