"""Training losses of Mask R-CNN as in MMDetection 2.x: target assignment, sampling, the five losses.

Knows the model's parts, but no data, optimizers or schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from meta_deploy.models.ops.boxes import INVALID, box_iou, encode_boxes

NEGATIVE, IGNORED = -1, -2
RPN_STDS = (1.0, 1.0, 1.0, 1.0)
ROI_STDS = (0.1, 0.1, 0.2, 0.2)


@dataclass(frozen=True)
class Truth:
    """An image's objects: boxes (G, 4) float32 xyxy in pixels, labels (G,) int64, masks (G, H, W) uint8."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor


@dataclass(frozen=True)
class LossSettings:
    """How many anchors, RoIs and masks per image enter the losses, and each loss's weight.

    The assignment thresholds are MMDetection's; the numbers of RoIs suit a small model on small images.
    """

    anchors: int = 256
    anchor_positives: float = 0.5
    proposals_pre_nms: int = 120  # per level
    proposals: int = 100
    rois: int = 64
    roi_positives: float = 0.25
    masks: int = 12
    rpn_box_weight: float = 1.0
    roi_box_weight: float = 2.0


def assign(overlaps: Tensor, positive: float, negative: float, low_quality: float | None = None) -> Tensor:
    """Match candidates to objects as MMDetection's MaxIoUAssigner does.

    Args:
        overlaps: IoU (G, N) of G objects with N candidates.
        positive: a candidate with at least this IoU is assigned to the object it overlaps most.
        negative: a candidate with less than this IoU with every object is background.
        low_quality: if given, the best candidates of each object (ties included) are assigned to it if their
            IoU is at least this.

    Returns:
        (N,) int64: index of the object, `NEGATIVE` or `IGNORED`.
    """
    objects, candidates = overlaps.shape
    if objects == 0:
        return torch.full((candidates,), NEGATIVE, device=overlaps.device)
    best, index = overlaps.max(dim=0)
    assigned = torch.full_like(index, IGNORED)
    assigned[best < negative] = NEGATIVE
    assigned = torch.where(best >= positive, index, assigned)
    if low_quality is not None:
        best_of_object = overlaps.max(dim=1, keepdim=True).values
        best = (overlaps == best_of_object) & (best_of_object >= low_quality)
        number = torch.arange(1, objects + 1, dtype=torch.int32, device=overlaps.device)
        last = (best * number[:, None]).amax(dim=0) - 1  # a later object wins over an earlier one
        assigned = torch.where(last >= 0, last, assigned)
    return assigned


def sample(assigned: Tensor, count: int, positives: float) -> tuple[Tensor, Tensor]:
    """Sample at most `count` candidates, of which at most the fraction `positives` is positive.

    Args:
        assigned: (N,), from `assign`.

    Returns:
        Indices of the positive and of the negative candidates; negatives fill the rest.
    """
    positive = _choose((assigned >= 0).nonzero().squeeze(1), int(count * positives))
    negative = _choose((assigned == NEGATIVE).nonzero().squeeze(1), count - len(positive))
    return positive, negative


def _choose(indices: Tensor, count: int) -> Tensor:
    return (
        indices[torch.randperm(len(indices), device=indices.device)[:count]]
        if len(indices) > count
        else indices
    )


def detection_losses(
    model: torch.nn.Module, images: Tensor, truths: list[Truth], settings: LossSettings
) -> dict[str, Tensor]:
    """The losses of a batch, to be summed.

    Args:
        model: the Mask R-CNN, in training mode.
        images: (B, 3, H, W) normalized RGB.
        truths: one per image.

    Returns:
        Scalars `rpn_score`, `rpn_box`, `roi_class`, `roi_box`, `mask`.
    """
    features = model.extract_features(images)
    logits, deltas = model.rpn_head(features)
    logits, deltas = [x.float() for x in logits], [x.float() for x in deltas]
    losses = rpn_losses(logits, deltas, model.rpn_head.anchors(features), truths, settings)
    with torch.no_grad():
        proposals, scores = model.rpn_head.proposals(
            [x.detach() for x in logits],
            [x.detach() for x in deltas],
            images.shape[-2:],
            settings.proposals_pre_nms,
            settings.proposals,
        )
    candidates = [boxes[score > INVALID] for boxes, score in zip(proposals, scores, strict=True)]
    losses |= roi_losses(model.roi_head, features, candidates, truths, settings)
    return losses


def rpn_losses(
    logits: list[Tensor],
    deltas: list[Tensor],
    anchors: list[Tensor],
    truths: list[Truth],
    settings: LossSettings,
) -> dict[str, Tensor]:
    """Losses of the proposals' scores and boxes, each averaged over the sampled anchors of the batch.

    Args:
        logits: per level (B, A, H, W).
        deltas: per level (B, 4A, H, W).
        anchors: per level (H * W * A, 4), xyxy in pixels.
    """
    batch = len(truths)
    all_logits = torch.cat([x.permute(0, 2, 3, 1).reshape(batch, -1) for x in logits], dim=1)
    all_deltas = torch.cat([x.permute(0, 2, 3, 1).reshape(batch, -1, 4) for x in deltas], dim=1)
    all_anchors = torch.cat(anchors)
    score_loss, box_loss, count = all_logits.new_zeros(()), all_logits.new_zeros(()), 0
    for image, truth in enumerate(truths):
        assigned = assign(box_iou(truth.boxes, all_anchors), 0.7, 0.3, low_quality=0.3)
        positive, negative = sample(assigned, settings.anchors, settings.anchor_positives)
        chosen = torch.cat([positive, negative])
        target = torch.zeros(len(chosen), device=chosen.device)
        target[: len(positive)] = 1
        score_loss = score_loss + F.binary_cross_entropy_with_logits(
            all_logits[image, chosen], target, reduction="sum"
        )
        box_target = encode_boxes(all_anchors[positive], truth.boxes[assigned[positive]], RPN_STDS)
        box_loss = box_loss + F.l1_loss(all_deltas[image, positive], box_target, reduction="sum")
        count += len(chosen)
    return {"rpn_score": score_loss / count, "rpn_box": settings.rpn_box_weight * box_loss / count}


@dataclass(frozen=True)
class SampledRois:
    """RoIs of one image: boxes (R, 4), of which the first P are positive; objects (P,) are their indices."""

    boxes: Tensor
    objects: Tensor


def sample_rois(proposals: Tensor, truth: Truth, settings: LossSettings) -> SampledRois:
    """Sample RoIs (R, 4) from the proposals (N, 4) and the ground-truth boxes."""
    candidates = torch.cat([truth.boxes, proposals])
    assigned = assign(box_iou(truth.boxes, candidates), 0.5, 0.5)
    positive, negative = sample(assigned, settings.rois, settings.roi_positives)
    return SampledRois(candidates[torch.cat([positive, negative])], assigned[positive])


def roi_losses(
    roi_head: torch.nn.Module,
    features: list[Tensor],
    proposals: list[Tensor],
    truths: list[Truth],
    settings: LossSettings,
) -> dict[str, Tensor]:
    """Losses of the second stage: class and box averaged over all RoIs, mask over the positive ones.

    Args:
        features: the FPN's maps; proposals: one (N, 4) per image.
    """
    rois = [sample_rois(p, truth, settings) for p, truth in zip(proposals, truths, strict=True)]
    boxes = torch.cat([roi.boxes for roi in rois])
    # Per image: the true labels of its positive RoIs, then background.
    background = roi_head.num_classes
    labels = torch.cat(
        [
            F.pad(truth.labels[roi.objects], (0, len(roi.boxes) - len(roi.objects)), value=background)
            for roi, truth in zip(rois, truths, strict=True)
        ]
    )
    positive = (labels != background).nonzero().squeeze(1)
    true_boxes = torch.cat([truth.boxes[roi.objects] for roi, truth in zip(rois, truths, strict=True)])

    logits, deltas = roi_head.bbox_head(
        pool_by_image(roi_head.box_pool, features, [roi.boxes for roi in rois])
    )
    logits, deltas = logits.float(), deltas.float().reshape(len(boxes), -1, 4)
    box_target = encode_boxes(boxes[positive], true_boxes, ROI_STDS)
    box_loss = F.l1_loss(deltas[positive, labels[positive]], box_target, reduction="sum") / len(boxes)
    return {
        "roi_class": F.cross_entropy(logits, labels),
        "roi_box": settings.roi_box_weight * box_loss,
        "mask": mask_loss(roi_head, features, rois, truths, settings),
    }


def pool_by_image(
    pool: Callable[[list[Tensor], Tensor, Tensor], Tensor], features: list[Tensor], boxes: list[Tensor]
) -> Tensor:
    """Pool the RoIs of each image from that image's maps: (P, 4) per image -> (sum of P, C, S, S).

    On a CPU the batch is split once with `unbind`. Indexing it image by image would make a gradient of the
    whole batch's size each time.
    """
    if features[0].is_cuda:
        counts = torch.tensor([len(rois) for rois in boxes], device=features[0].device)
        images = torch.arange(len(boxes), device=features[0].device)
        return pool(features, torch.cat(boxes), images.repeat_interleave(counts))
    by_image = zip(*(feature.unbind(0) for feature in features[:4]), strict=True)
    return torch.cat(
        [
            pool([m[None] for m in maps], rois, torch.zeros(len(rois), dtype=torch.long, device=rois.device))
            for maps, rois in zip(by_image, boxes, strict=True)
        ]
    )


def mask_loss(
    roi_head: torch.nn.Module,
    features: list[Tensor],
    rois: list[SampledRois],
    truths: list[Truth],
    settings: LossSettings,
) -> Tensor:
    """Binary cross-entropy of the true class's mask, on at most `settings.masks` positive RoIs per image."""
    boxes, labels, targets = [], [], []
    for roi, truth in zip(rois, truths, strict=True):
        chosen = torch.randperm(len(roi.objects), device=roi.objects.device)[: settings.masks]
        objects = roi.objects[chosen]
        boxes.append(roi.boxes[chosen])
        labels.append(truth.labels[objects])
        targets.append(crop_masks(truth.masks, objects, roi.boxes[chosen]))
    label = torch.cat(labels)
    if len(label) == 0:
        return features[0].sum() * 0.0
    logits = roi_head.mask_head(pool_by_image(roi_head.mask_pool, features, boxes))
    return F.binary_cross_entropy_with_logits(
        logits[torch.arange(len(label), device=label.device), label].float(), torch.cat(targets)
    )


def crop_masks(masks: Tensor, objects: Tensor, boxes: Tensor, size: int = 28) -> Tensor:
    """Crop each mask to its box and resize it to (size, size), as RoIAlign with 2x2 bilinear samples per bin.

    The result is coverage in 0..1, which MMDetection rounds. Without rounding, masks pasted and cut at 0.5
    are accurate to a fraction of a bin.

    Args:
        masks: (G, H, W) uint8, 0 or 1.
        objects: (P,) index of the mask for each box.
        boxes: (P, 4) xyxy in pixels.

    Returns:
        (P, size, size) float32.
    """
    height, width = masks.shape[-2:]
    steps = (torch.arange(2 * size, device=boxes.device) + 0.5) / (2 * size)
    x = boxes[:, 0:1] + steps * (boxes[:, 2:3] - boxes[:, 0:1]) - 0.5  # (P, 2 * size)
    y = boxes[:, 1:2] + steps * (boxes[:, 3:4] - boxes[:, 1:2]) - 0.5
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    x0, y0 = x.floor().long().clamp(max=width - 2), y.floor().long().clamp(max=height - 2)
    fx, fy = (x - x0)[:, None, :], (y - y0)[:, :, None]
    corner = (objects[:, None, None] * height + y0[:, :, None]) * width + x0[:, None, :]  # (P, 2s, 2s)
    flat = masks.reshape(-1)
    top = torch.lerp(flat[corner].float(), flat[corner + 1].float(), fx)
    bottom = torch.lerp(flat[corner + width].float(), flat[corner + width + 1].float(), fx)
    return F.avg_pool2d(torch.lerp(top, bottom, fy)[:, None], 2)[:, 0]
