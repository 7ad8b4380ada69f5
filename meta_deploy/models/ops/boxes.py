"""Boxes: overlap, coding, non-maximum suppression, top-k. Absolute xyxy floats; knows no network."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

INVALID = -1.0e4  # the score or logit of an entry that is only padding; float16 can hold it
MAX_SIZE_CHANGE = abs(math.log(16 / 1000))  # a decoded side grows by this factor at most, in log space
_NMS_HEAD = 32  # candidates that one step of `nms` looks at


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair: (..., N, 4) and (..., M, 4) -> (..., N, M)."""
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    top_left = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    bottom_right = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    inter = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    return inter / (area_a[..., :, None] + area_b[..., None, :] - inter).clamp(min=1e-6)


def encode_boxes(boxes: Tensor, targets: Tensor, stds: tuple[float, float, float, float]) -> Tensor:
    """What `decode_boxes` needs to turn `boxes` into `targets`: (..., 4) each -> (..., 4)."""
    size = boxes[..., 2:] - boxes[..., :2]
    target_size = targets[..., 2:] - targets[..., :2]
    shift = ((targets[..., :2] + targets[..., 2:]) - (boxes[..., :2] + boxes[..., 2:])) / 2 / size
    return torch.cat([shift, torch.log(target_size / size)], dim=-1) / boxes.new_tensor(stds)


def decode_boxes(
    boxes: Tensor,
    deltas: Tensor,
    stds: tuple[float, float, float, float],
    image_size: tuple[int, int],
) -> Tensor:
    """Move boxes by predicted deltas (Fast R-CNN, appendix C; MMDetection's DeltaXYWHBBoxCoder, means 0).

    Args:
        boxes: (..., 4), broadcastable to `deltas`.
        deltas: (..., 4): centre shift over size, log of the size's change, each divided by its std.
        stds: the four divisors.
        image_size: (H, W); the result is clipped to it.

    Returns:
        (..., 4) xyxy.
    """
    deltas = deltas * deltas.new_tensor(stds)
    size = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5 + deltas[..., :2] * size
    half = 0.5 * size * deltas[..., 2:].clamp(-MAX_SIZE_CHANGE, MAX_SIZE_CHANGE).exp()
    x1, y1 = (centre - half).unbind(-1)
    x2, y2 = (centre + half).unbind(-1)
    H, W = image_size
    return torch.stack([x1.clamp(0, W), y1.clamp(0, H), x2.clamp(0, W), y2.clamp(0, H)], dim=-1)


def has_area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...) bool: both sides longer than nothing."""
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)


def select_top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best per row, best first; where a row has fewer than k, the rest has `INVALID` and index 0.

    Args:
        scores: (B, N), not below `INVALID`. N may be known only at run time.

    Returns:
        Values (B, k) and indices (B, k) int64.
    """
    N = scores.shape[1]
    if isinstance(N, int) and k <= N:
        values, index = torch.topk(scores, k, dim=1)
        return values, index
    values, index = torch.topk(F.pad(scores, (0, k), value=INVALID), k, dim=1)
    return values, torch.where(index < N, index, 0)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: x (B, N, C), index (B, k) -> (B, k, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def separate(boxes: Tensor, groups: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Move boxes of different groups so far apart that they can't overlap, so that one NMS serves all.

    Args:
        boxes: (B, N, 4), inside the image.
        groups: integers, (N,) for all images alike or (B, N).
        image_size: (H, W).
    """
    step = torch.sym_max(*image_size) + 1
    return boxes + (groups * step)[..., None]


@torch.library.custom_op("meta_deploy::nms", mutates_args=())
def nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, max_output: int
) -> Tensor:
    """Greedy non-maximum suppression, image by image, in the semantics of ONNX's NonMaxSuppression.

    Args:
        boxes: (B, N, 4) float xyxy.
        scores: (B, N) float; those not above `score_threshold` are left out.
        iou_threshold: a box is suppressed by a better one that overlaps it by more than this.
        max_output: boxes kept per image at most.

    Returns:
        (B, N) bool: kept. Of equal scores the first is the better.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(boxes.shape[0]):
        candidates = (scores[b] > score_threshold).nonzero()[:, 0]
        candidates = candidates[scores[b, candidates].argsort(descending=True, stable=True)]
        room = max_output
        while len(candidates) and room > 0:
            # The overlaps of the best few at once: the greedy choice goes through them, and what it keeps
            # suppresses all the others in one step.
            head, rest = candidates[:_NMS_HEAD], candidates[_NMS_HEAD:]
            overlap = box_iou(boxes[b, head], boxes[b, candidates]) > iou_threshold  # (head, candidates)
            chosen: list[int] = []
            for i, row in enumerate(overlap[:, : len(head)].tolist()):
                if not any(row[j] for j in chosen):
                    chosen.append(i)
            chosen = chosen[:room]
            room -= len(chosen)
            kept[b, head[chosen]] = True
            candidates = rest[~overlap[chosen][:, len(head) :].any(dim=0)]
    return kept


@nms.register_kernel("cuda")
def nms_in_parallel(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, max_output: int
) -> Tensor:
    """`nms` without a loop over boxes: what a GPU is fast at.

    A box is kept if no kept better box overlaps it. Applied to all boxes at once until nothing changes, the
    rule ends at the greedy choice: after step n it holds for the first n boxes.
    """
    most = int((scores > score_threshold).sum(dim=1).max()) if scores.numel() else 0
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :most]
    boxes, best_first = take(boxes, order), scores.gather(1, order)
    candidate = best_first > score_threshold
    overlap = (box_iou(boxes, boxes) > iou_threshold).triu_(1)  # (B, better, worse)
    kept, before = candidate, torch.zeros_like(candidate)
    while not torch.equal(kept, before):
        before = kept
        kept = candidate & ~(overlap & before[:, :, None]).any(dim=1)
    kept = kept & (kept.cumsum(dim=1) <= max_output)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, kept)


@nms.register_fake
def _(boxes, scores, iou_threshold, score_threshold, max_output):
    return torch.empty_like(scores, dtype=torch.bool)
