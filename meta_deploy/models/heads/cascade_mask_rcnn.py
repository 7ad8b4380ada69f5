"""Cascade Mask R-CNN (Cai and Vasconcelos, TPAMI 2019), in the semantics of MMDetection 2.x's test path.

Each stage classifies and refines the boxes of the one before; at the end the stages' class logits and mask
probabilities are averaged. State-dict names are MMDetection's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from meta_deploy.models.backbones.backbone import BackboneModule
from meta_deploy.models.class_names import COCO_CLASSES
from meta_deploy.models.config import Count, CountOrZero
from meta_deploy.models.heads import mask_rcnn
from meta_deploy.models.heads.head import Head, register
from meta_deploy.models.heads.mask_rcnn import (
    BOX_STDS,
    BoxHead,
    MaskHead,
    MaskRCNN,
    MaskRCNNConfig,
    RoIStage,
    image_of,
    mask_of_label,
)
from meta_deploy.models.ops.boxes import decode_boxes, take
from meta_deploy.models.shapes import State, size_of

# The boxes of later stages are nearer to the objects, and their deltas smaller.
STAGE_STDS = (BOX_STDS, (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


class CascadeMaskRCNNConfig(MaskRCNNConfig, frozen=True, tag="cascade-mask-rcnn"):
    """Cascade Mask R-CNN of three stages, with the box heads of ViT-Adapter's published configurations.

    Attributes:
        class_agnostic: whether a box head predicts one box for all classes, not one for each.
    """

    box_convs: CountOrZero = 4
    box_fcs: Count = 1
    box_norm: bool = True
    class_agnostic: bool = False


class CascadeRoIHead(RoIStage):
    """Second stage in three: each refines the boxes of the one before by its best foreground class."""

    def __init__(self, config: CascadeMaskRCNNConfig) -> None:
        super().__init__(config)
        self.boxes = 1 if config.class_agnostic else config.num_classes
        self.bbox_head = nn.ModuleList(BoxHead(config, self.boxes) for _ in STAGE_STDS)
        self.mask_head = nn.ModuleList(
            MaskHead(config.fpn_channels, config.mask_channels, config.num_classes, config.mask_norm)
            for _ in STAGE_STDS
        )

    def detect(
        self, features: list[Tensor], proposals: Tensor, proposal_logits: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, P, _ = proposals.shape
        rois, all_logits = proposals, []
        for head, stds in zip(self.bbox_head, STAGE_STDS, strict=True):
            logits, deltas = head(self.box_pool(features, rois.reshape(-1, 4), image_of(rois)))
            deltas = deltas.reshape(B, P, self.boxes, 4)
            boxes = decode_boxes(rois[:, :, None], deltas, stds, image_size)  # (B, P, boxes, 4)
            all_logits.append(logits)
            if len(all_logits) < len(STAGE_STDS):
                rois = self._of_best_class(boxes, logits)
        return self.choose(sum(all_logits) / len(all_logits), boxes, proposal_logits, image_size)

    def _of_best_class(self, boxes: Tensor, logits: Tensor) -> Tensor:
        """Boxes (B, P, boxes, 4), logits (B * P, classes + 1) -> those of the best classes (B, P, 4)."""
        if self.boxes == 1:
            return boxes[:, :, 0]
        best = logits[:, : self.num_classes].argmax(dim=1, keepdim=True)  # (B * P, 1)
        return take(boxes.flatten(0, 1), best).reshape(boxes.shape[0], -1, 4)

    def masks(self, features: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        pooled = self.mask_pool(features, boxes.reshape(-1, 4), image_of(boxes))
        masks = [mask_of_label(head(pooled), labels) for head in self.mask_head]
        return (sum(masks[1:], masks[0]) / len(masks)).reshape(*labels.shape, *masks[0].shape[2:])


def build(config: CascadeMaskRCNNConfig, backbone: BackboneModule) -> MaskRCNN:
    """The whole model; the backbone's strides are 4 to 32."""
    return MaskRCNN(config, backbone, CascadeRoIHead(config))


def measure(config: CascadeMaskRCNNConfig, state: State) -> dict[str, Any]:
    """The layers and widths that names and shapes tell; all stages are alike."""
    own = mask_rcnn.measure(config, state, "0.")
    if "box_convs" in own:  # whose norms are the default here
        own["box_norm"] = "roi_head.bbox_head.0.shared_convs.0.bn.weight" in state
    if boxes := size_of(state, "roi_head.bbox_head.0.fc_reg.weight", 0):
        own["class_agnostic"] = boxes == 4 and num_classes_of(state) != 1
    return own


def num_classes_of(state: State) -> int | None:
    """Classes of the first stage, the background not counted."""
    return mask_rcnn.num_classes_of(state, "0.")


def recognise(state: State) -> bool:
    """Whether a mask head of several stages is there, and not those of HTC, which mix features and masks."""
    names = ("roi_head.mask_head.0.", "roi_head.semantic_head.")
    cascade, htc = (any(name.startswith(start) for name in state) for start in names)
    return cascade and not htc


register(
    Head(
        config=CascadeMaskRCNNConfig,
        model=build,
        recognise=recognise,
        num_classes=num_classes_of,
        measure=measure,
        class_names=COCO_CLASSES,
        by_size={
            "nano": {
                "fpn_channels": 64,
                "box_channels": 64,
                "fc_channels": 192,
                "mask_channels": 64,
                "input_size": (320, 320),
            }
        },
    )
)
