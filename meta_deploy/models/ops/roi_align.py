"""RoIAlign over a feature pyramid, in plain PyTorch: exact, differentiable, adaptive sampling ratio.

While a program is being exported it is one opaque operator, so that the exporter can emit ONNX's RoiAlign.
"""

import torch
from torch import Tensor

_FINEST_SCALE = 56.0  # sqrt(area) in pixels below which a RoI belongs to the first level


def pyramid_level(rois: Tensor, levels: int) -> Tensor:
    """The level of each RoI by its size, (R, 4) -> (R,) int64 (FPN, Lin et al. 2017, eq. 1)."""
    scale = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).clamp(min=0).sqrt()
    return torch.floor(torch.log2(scale / _FINEST_SCALE + 1e-6)).clamp(0, levels - 1).long()


def sampling_weights(start: Tensor, length: Tensor, bins: int, size: int) -> Tensor:
    """What each pixel of one axis contributes to each bin of that axis.

    A bin averages ceil(length / bins) evenly spaced samples, each a bilinear interpolation (Mask R-CNN, He et
    al. 2017, section 3; ONNX RoiAlign with sampling_ratio 0). Interpolation is separable, and so is the
    rule that samples more than a pixel outside the map are zero: RoIAlign is rows @ map @ columns^T.

    Args:
        start, length: (R,) of the RoI on this axis, in feature pixels, the centre of pixel 0 at 0.
        bins: number of output bins.
        size: pixels of the map on this axis.

    Returns:
        (R, bins, size).
    """
    counts = torch.ceil(length / bins)  # samples a bin, (R,)
    pixels = torch.arange(size, device=start.device)
    bin_index = torch.arange(bins, device=start.device)
    weights = start.new_zeros(len(start), bins, size)
    step = (length / bins / counts.clamp(min=1))[:, None]
    for i in range(int(counts.max().item()) if len(counts) else 0):
        at = start[:, None] + bin_index * (length / bins)[:, None] + (i + 0.5) * step  # (R, bins)
        used = (i < counts[:, None]) & (at >= -1.0) & (at <= size)
        hat = (1 - (at.clamp(0, size - 1)[..., None] - pixels).abs()).clamp(min=0)
        weights += hat * used[..., None]
    return weights / counts.clamp(min=1)[:, None, None]


def roi_align(feature: Tensor, rois: Tensor, output_size: int, stride: int) -> Tensor:
    """RoIAlign (aligned) of one image's map.

    Args:
        feature: (C, H, W).
        rois: (R, 4) xyxy in input pixels.
        output_size: bins on each axis, P.
        stride: of the map.

    Returns:
        (R, C, P, P).
    """
    C, H, W = feature.shape
    by_row = feature.transpose(0, 1).reshape(H, C * W)
    # Pieces keep the product with the rows, R x P x C x W, near 64 MB; and RoIs that begin at about the same
    # row share few rows of the map, so that each piece need only look at those.
    order = rois[:, 1].argsort()
    out = []
    for part in rois[order].split(max(1, min(32, 2**24 // (output_size * C * W)))):
        x1, y1, x2, y2 = (part / stride - 0.5).unbind(1)
        rows = sampling_weights(y1, y2 - y1, output_size, H)  # (R, P, H)
        columns = sampling_weights(x1, x2 - x1, output_size, W)  # (R, P, W)
        used = (rows > 0).any(dim=0).any(dim=0).nonzero()[:, 0]
        top, bottom = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        banded = (rows[:, :, top:bottom] @ by_row[top:bottom]).reshape(-1, output_size * C, W)
        pooled = (banded @ columns.transpose(1, 2)).reshape(-1, output_size, C, output_size)
        out.append(pooled.transpose(1, 2))
    return torch.cat(out)[order.argsort()]


def _pyramid_roi_align(
    features: list[Tensor], rois: Tensor, batch_index: Tensor, strides: list[int], output_size: int
) -> Tensor:
    level = pyramid_level(rois, len(features))
    order, pooled = [], []
    for i, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        for b in range(feature.shape[0]):
            index = ((level == i) & (batch_index == b)).nonzero()[:, 0]
            if len(index):
                order.append(index)
                pooled.append(roi_align(feature[b], rois[index], output_size, stride))
    if not pooled:
        return features[0].new_zeros(0, features[0].shape[1], output_size, output_size)
    return torch.cat(pooled)[torch.cat(order).argsort()]


@torch.library.custom_op("meta_deploy::pyramid_roi_align", mutates_args=())
def _exported(
    features: list[Tensor], rois: Tensor, batch_index: Tensor, strides: list[int], output_size: int
) -> Tensor:
    return _pyramid_roi_align(features, rois, batch_index, strides, output_size)


@_exported.register_fake
def _(features, rois, batch_index, strides, output_size):
    return features[0].new_empty(rois.shape[0], features[0].shape[1], output_size, output_size)


def pyramid_roi_align(
    features: list[Tensor], rois: Tensor, batch_index: Tensor, strides: list[int], output_size: int
) -> Tensor:
    """RoIAlign, each RoI on the pyramid level of its size.

    Args:
        features: one (B, C, H/stride, W/stride) per level.
        rois: (R, 4) xyxy in input pixels.
        batch_index: (R,) int64, the image of each RoI.
        strides: one per level.
        output_size: bins on each axis, P.

    Returns:
        (R, C, P, P).
    """
    align = _exported if torch.compiler.is_exporting() else _pyramid_roi_align
    return align(features, rois, batch_index, strides, output_size)
