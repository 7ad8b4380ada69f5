"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", ICLR 2021, eq. 3) in plain PyTorch.

Names are those of the published code; arithmetic and layout are arranged for a short exported graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = tuple[int, int]


def reference_points(sizes: Sequence[Size], like: Tensor) -> Tensor:
    """The centres of all pixels of maps of these (height, width), row by row.

    Returns:
        (sum of height * width, 2), x before y, from -1 at one edge of a map to 1 at the other.
    """
    points = []
    for h, w in sizes:
        y = (torch.arange(h, device=like.device, dtype=like.dtype) + 0.5) * (2 / h) - 1
        x = (torch.arange(w, device=like.device, dtype=like.dtype) + 0.5) * (2 / w) - 1
        points.append(torch.stack([x[None, :].expand(h, w), y[:, None].expand(h, w)], dim=-1).reshape(-1, 2))
    return torch.cat(points)


def split_maps(tokens: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """Tokens (B, N, C) of maps one after the other, row by row -> maps (B, C, h, w)."""
    channels_first = tokens.transpose(1, 2)
    if len(sizes) == 1:
        return [channels_first.unflatten(2, sizes[0])]
    parts = channels_first.split([h * w for h, w in sizes], dim=2)
    return [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


class DeformableAttention(nn.Module):
    """Each query looks at a few points of each map, around its reference point, at offsets that it chooses.

    Args:
        dim: channels C of queries and features.
        heads: attention heads, a divisor of `dim * ratio`.
        levels: maps.
        points: of a head on a map.
        ratio: channels of the values over `dim`.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int, ratio: float = 1.0) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        hidden = int(dim * ratio)
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, hidden)
        self.output_proj = nn.Linear(hidden, dim)
        self._initialize()

    def _initialize(self) -> None:
        """Heads begin by looking in different directions, points at 1, 2, … pixels, all with one weight."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # (heads, 2), on a square
        steps = torch.arange(1, self.points + 1)[:, None]
        offsets = (direction[:, None, None] * steps).expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.reshape(-1))

    def forward(self, query: Tensor, references: Tensor, feature: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Sample the feature maps for each query.

        Args:
            query: (B, Q, C).
            references: (Q, 2), what `reference_points` gives.
            feature: (B, N, C), the maps one after the other, row by row.
            sizes: (height, width) of each map.

        Returns:
            (B, Q, C).
        """
        B, Q, _ = query.shape
        heads, levels, points = self.heads, self.levels, self.points
        offsets = self._offsets(query, sizes).reshape(B, Q, heads, levels, points, 2)
        grids = offsets.permute(3, 0, 2, 4, 1, 5) + references  # (levels, B, heads, points, Q, 2)
        by_level = grids.flatten(1, 2).unbind(0) if levels > 1 else (grids.flatten(0, 2),)
        weights = self.attention_weights(query).reshape(B, Q, heads, levels * points).softmax(dim=-1)
        weights = weights.permute(0, 2, 3, 1).reshape(B * heads, 1, levels * points, Q)

        sampled = [
            F.grid_sample(image.reshape(B * heads, -1, h, w), grid, "bilinear", "zeros", align_corners=False)
            for image, grid, (h, w) in zip(
                split_maps(self.value_proj(feature), sizes), by_level, sizes, strict=True
            )
        ]  # (B * heads, d, points, Q) each
        together = torch.cat(sampled, dim=2) if levels > 1 else sampled[0]
        out = (together * weights).sum(dim=2)  # (B * heads, d, Q)
        return self.output_proj(out.reshape(B, -1, Q).transpose(1, 2))

    def _offsets(self, query: Tensor, sizes: Sequence[Size]) -> Tensor:
        """The layer's offsets, from pixels of each map to the units of `reference_points`.

        The factors go into the weights, where an export computes them in advance.
        """
        per_pixel = torch.stack([query.new_full((), 2 / side) for h, w in sizes for side in (w, h)])
        factor = per_pixel.reshape(1, self.levels, 1, 2).expand(self.heads, -1, self.points, -1).reshape(-1)
        layer = self.sampling_offsets
        return F.linear(query, layer.weight * factor[:, None], layer.bias * factor)
