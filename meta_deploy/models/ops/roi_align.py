"""RoIAlign over a feature pyramid, in plain PyTorch: exact, differentiable, adaptive sampling ratio.

While a program is being exported it is one opaque operator, so that the exporter can emit ONNX's RoiAlign.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_FINEST_SCALE = 56.0  # sqrt(area) in pixels below which a RoI belongs to the first level
_PIECE = 2**26  # pixels, of all bins together, that are gathered at once on a GPU


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


def sampled_pixels(
    start: Tensor, length: Tensor, bins: int, samples: int, size: Tensor
) -> tuple[Tensor, Tensor]:
    """The pixels of one axis that each bin of that axis reads, and their weights; see `sampling_weights`.

    Args:
        start, length: (R,) of the RoI on this axis, in feature pixels, the centre of pixel 0 at 0.
        bins: number of output bins.
        samples: of a bin, at least as many as any RoI has.
        size: (R,) pixels of the RoI's map on this axis.

    Returns:
        Pixels (R, bins, 2 * samples) int64, and weights of the same shape.
    """
    start, length, size = (value[:, None, None] for value in (start, length, size))
    counts = torch.ceil(length / bins)
    i = torch.arange(samples, device=start.device)
    bin_index = torch.arange(bins, device=start.device)[:, None]
    at = start + (bin_index + (i + 0.5) / counts.clamp(min=1)) * (length / bins)  # (R, bins, samples)
    used = (i < counts) & (at >= -1.0) & (at <= size)
    at = torch.minimum(at.clamp(min=0), size - 1.0)
    low = at.floor()
    part = at - low
    pixels = torch.cat([low, torch.minimum(low + 1, size - 1.0)], dim=-1).long()
    return pixels, torch.cat([1 - part, part], dim=-1) * used.repeat(1, 1, 2) / counts.clamp(min=1)


def gathered_roi_align(
    features: list[Tensor], rois: Tensor, batch_index: Tensor, strides: list[int], output_size: int
) -> Tensor:
    """`pyramid_roi_align` of all images and levels at once, which is what a GPU is fast at.

    A bin is a weighted sum of some pixels of the pyramid, which is one table of pixels.
    """
    level = pyramid_level(rois, len(features))
    table = torch.cat([feature.permute(0, 2, 3, 1).flatten(0, 2) for feature in features])
    shapes = torch.tensor([(f.shape[0], *f.shape[2:]) for f in features], device=rois.device)
    pixels = shapes.prod(dim=1)
    height, width = shapes[level, 1], shapes[level, 2]
    first = (pixels.cumsum(0) - pixels)[level] + batch_index * height * width  # pixel of the RoI's map
    x1, y1, x2, y2 = (rois / rois.new_tensor(strides)[level][:, None] - 0.5).unbind(1)
    counts = torch.ceil(torch.maximum(x2 - x1, y2 - y1) / output_size).clamp(min=1)
    order, pooled = [], []
    # RoIs that need about equally many samples go together, in pieces that fit into memory.
    for power in range(int(counts.max().log2().ceil()) + 1 if len(rois) else 0):
        samples = 2**power
        alike = ((counts <= samples) & (counts > samples // 2)).nonzero()[:, 0]
        for r in alike.split(max(1, _PIECE // (2 * samples * output_size) ** 2)):
            rows, by_row = sampled_pixels(y1[r], (y2 - y1)[r], output_size, samples, height[r])
            columns, by_column = sampled_pixels(x1[r], (x2 - x1)[r], output_size, samples, width[r])
            lines = first[r, None, None] + rows * width[r, None, None]
            # (R, P, 1, 2 * samples, 1) and (R, 1, P, 1, 2 * samples)
            index = lines[:, :, None, :, None] + columns[:, None, :, None, :]
            weights = by_row[:, :, None, :, None] * by_column[:, None, :, None, :]
            order.append(r)
            pooled.append(
                F.embedding_bag(
                    index.flatten(3).flatten(0, 2),
                    table,
                    per_sample_weights=weights.flatten(3).flatten(0, 2).to(table.dtype),
                    mode="sum",
                )
            )
    if not pooled:
        return features[0].new_zeros(0, features[0].shape[1], output_size, output_size)
    bins = torch.cat(pooled).reshape(len(rois), output_size, output_size, -1)
    return bins.permute(0, 3, 1, 2)[torch.cat(order).argsort()]


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
    if torch.compiler.is_exporting():
        return _exported(features, rois, batch_index, strides, output_size)
    align = gathered_roi_align if rois.is_cuda else _pyramid_roi_align
    return align(features, rois, batch_index, strides, output_size)
