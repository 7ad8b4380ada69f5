"""Region proposal network (Ren et al., NeurIPS 2015), in semantics and names MMDetection 2.x's `RPNHead`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_deploy.models.heads.fpn import ConvModule
from meta_deploy.models.init import zero_bias
from meta_deploy.models.ops.boxes import INVALID, decode_boxes, has_area, nms, select_top, take

_RATIOS = (0.5, 1.0, 2.0)
_STDS = (1.0, 1.0, 1.0, 1.0)


class RPNHead(nn.Module):
    """One scale, three ratios, strides 4 to 64.

    Args:
        channels: of the pyramid.
        pre_nms: anchors kept per level before NMS.
        nms_threshold: IoU.
        max_proposals: proposals per image.
        anchor_scale: side of a square anchor, in strides of its level.
        convs: 3x3 convolutions before the two outputs.
    """

    strides = (4, 8, 16, 32, 64)

    def __init__(
        self,
        channels: int,
        pre_nms: int,
        nms_threshold: float,
        max_proposals: int,
        anchor_scale: float = 8.0,
        convs: int = 1,
    ) -> None:
        super().__init__()
        self.pre_nms = pre_nms
        self.nms_threshold = nms_threshold
        self.max_proposals = max_proposals
        self.anchor_scale = anchor_scale
        # Names as in MMDetection: of one convolution other than of several.
        self.rpn_conv: nn.Module = nn.Conv2d(channels, channels, 3, padding=1)
        if convs > 1:
            self.rpn_conv = nn.Sequential(
                *(ConvModule(channels, channels, 3, relu=True) for _ in range(convs))
            )
        self.rpn_cls = nn.Conv2d(channels, len(_RATIOS), 1)
        self.rpn_reg = nn.Conv2d(channels, len(_RATIOS) * 4, 1)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, std=0.01)
                zero_bias(conv)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: logits (B, 3, h, w) and deltas (B, 12, h, w)."""
        hidden = [F.relu(self.rpn_conv(x)) for x in features]
        return [self.rpn_cls(x) for x in hidden], [self.rpn_reg(x) for x in hidden]

    def anchors(self, features: list[Tensor]) -> list[Tensor]:
        """Per level (h * w * 3, 4) xyxy in input pixels, rows first, ratios last."""
        return [self._level_anchors(x, stride) for x, stride in zip(features, self.strides, strict=True)]

    def _level_anchors(self, feature: Tensor, stride: int) -> Tensor:
        h, w = feature.shape[-2:]
        root = feature.new_tensor(_RATIOS).sqrt()
        side = stride * self.anchor_scale
        half_w, half_h = side / root / 2, side * root / 2
        base = torch.stack([-half_w, -half_h, half_w, half_h], dim=1)  # (3, 4)
        x = torch.arange(w, device=feature.device, dtype=feature.dtype)[None, :].expand(h, w) * stride
        y = torch.arange(h, device=feature.device, dtype=feature.dtype)[:, None].expand(h, w) * stride
        corners = torch.stack([x, y, x, y], dim=-1)  # (h, w, 4)
        return (corners[:, :, None] + base).reshape(-1, 4)

    @torch.no_grad()
    def proposals(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        image_size: tuple[int, int],
        pre_nms: int | None = None,
        max_proposals: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The best boxes of all levels after NMS within each level.

        Logits rank them, where MMDetection takes their sigmoid: the order is the same, but a runtime's
        float32 sigmoid maps all very unlikely boxes to one value, and then their order is chance.

        Args:
            logits, deltas: what `forward` gave.
            image_size: (H, W) of the input, to which boxes are clipped.
            pre_nms, max_proposals: override the test-time settings (training uses fewer).

        Returns:
            Boxes (B, max_proposals, 4) and their logits (B, max_proposals), best first; missing ones have
            the logit `INVALID`.
        """
        pre_nms = pre_nms or self.pre_nms
        max_proposals = max_proposals or self.max_proposals
        boxes, scores = [], []
        for level, anchors in enumerate(self.anchors(logits)):
            B = logits[level].shape[0]
            score = logits[level].permute(0, 2, 3, 1).reshape(B, -1)
            delta = deltas[level].permute(0, 2, 3, 1).reshape(B, -1, 4)
            score, index = select_top(score, pre_nms)
            box = decode_boxes(anchors[index], take(delta, index), _STDS, image_size)
            boxes.append(box)
            scores.append(torch.where(has_area(box), score, INVALID))
        # A level of an image is a set of its own: (B, levels, pre_nms).
        box, score = torch.stack(boxes, dim=1), torch.stack(scores, dim=1)
        kept = nms(box.flatten(0, 1), score.flatten(0, 1), self.nms_threshold, INVALID, max_proposals)
        score = torch.where(kept.reshape(score.shape), score, INVALID).flatten(1)
        score, index = select_top(score, max_proposals)
        box = box.flatten(1, 2)
        return take(box, index), score
