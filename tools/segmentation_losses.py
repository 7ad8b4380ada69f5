"""Training targets and losses of semantic segmentation that tells touching objects apart.

The classes are background, the objects' categories, and the boundary between touching objects, as in U-Net's
separation borders (Ronneberger et al., MICCAI 2015).
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BACKGROUND, BOUNDARY = "background", "boundary"
BOUNDARY_WEIGHT = 4.0  # its pixels are few


def class_names(categories: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of a segmentation model of these categories."""
    return (BACKGROUND, *categories, BOUNDARY)


def class_target(masks: np.ndarray, labels: np.ndarray, categories: int, width: int = 5) -> np.ndarray:
    """Objects to the class of every pixel.

    Args:
        masks: (G, H, W) uint8, 0 or 1; later objects cover earlier ones.
        labels: (G,) from 0, the categories.
        categories: how many there are.
        width: a pixel is boundary where the square of this side (odd) around it touches two objects.

    Returns:
        (H, W) int64: 0 background, label + 1, and `categories` + 1 for the boundary.
    """
    owner = np.zeros(masks.shape[1:], np.float32)  # which object, from 1; exact up to 2^24
    for number, mask in enumerate(masks, 1):
        owner[mask > 0] = number
    square = np.ones((width, width), np.uint8)
    nearest = cv2.erode(np.where(owner == 0, np.float32(len(masks) + 1), owner), square)
    target = np.concatenate([[0], labels + 1]).astype(np.int64)[owner.astype(np.int64)]
    target[(nearest <= len(masks)) & (cv2.dilate(owner, square) > nearest)] = categories + 1
    return target


def segmentation_losses(model: torch.nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The losses of a batch, to be summed: `cross_entropy`, weighted by class, and `dice` of the objects.

    Args:
        model: images to `logits` (B, classes, H/4, W/4).
        images: (B, 3, H, W), normalized.
        targets: (B, H, W) int64, from `class_target`.
    """
    logits = model(images)["logits"].float()
    logits = F.interpolate(logits, size=targets.shape[-2:], mode="bilinear", align_corners=False)
    classes = logits.shape[1]
    weight = torch.ones(classes, device=logits.device)
    weight[-1] = BOUNDARY_WEIGHT
    truth = F.one_hot(targets, classes).permute(0, 3, 1, 2)[:, 1:]
    found = logits.softmax(dim=1)[:, 1:]
    both, either = (found * truth).sum(dim=(0, 2, 3)), (found + truth).sum(dim=(0, 2, 3))
    return {
        "cross_entropy": F.cross_entropy(logits, targets, weight),
        "dice": (1 - (2 * both + 1) / (either + 1)).mean(),
    }
