"""The memory-efficient adapter block of META (Zhang et al., ICLR 2025) and its cascade.

Marked [paper] is what is published; [reading] is this project's choice where the paper is silent.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_deploy.models.backbones.vit import attention
from meta_deploy.models.backbones.windows import divides, merge, partition


class CrossShapedAttention(nn.Module):
    """Cross-shaped self-attention: half of the heads in horizontal stripes, half in vertical ones [paper].

    Stripes are `stripe_width` wide and don't overlap. A map that the width does not divide is padded, and
    the padding gets no attention [reading].

    Args:
        dim: channels C.
        num_heads: heads, an even number.
        stripe_width: rows (columns) a stripe.
    """

    def __init__(self, dim: int, num_heads: int, stripe_width: int) -> None:
        super().__init__()
        self.heads_per_direction = num_heads // 2
        self.stripe_width = stripe_width
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        _, H, W, _ = x.shape
        horizontal, vertical = self.qkv(x).chunk(2, dim=-1)  # each (B, H, W, 3C/2): q, k, v of its heads
        return self.proj(
            torch.cat(
                [
                    self._attend(horizontal, (self.stripe_width, W)),
                    self._attend(vertical, (H, self.stripe_width)),
                ],
                dim=-1,
            )
        )

    def _attend(self, qkv: Tensor, stripe: tuple[int, int]) -> Tensor:
        """Attention inside stripes: (B, H, W, 3c) -> (B, H, W, c)."""
        B, H, W, _ = qkv.shape
        tokens = partition(qkv, stripe)  # (B * stripes, N, 3c)
        stripes, N, heads = tokens.shape[0], tokens.shape[1], self.heads_per_direction
        d = qkv.shape[-1] // (3 * heads)
        q, k, v = tokens.reshape(stripes, N, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        if divides(H, stripe[0]) and divides(W, stripe[1]):
            out = attention(q, k, v)
        else:
            inside = partition(qkv.new_ones(B, H, W, 1), stripe)  # 1 on the map, 0 on its padding
            out = attention(q, k, v, valid=inside.reshape(stripes, 1, 1, N) > 0)
        return merge(out.transpose(1, 2).reshape(stripes, N, -1), stripe, (B, H, W))


class ConvFFN(nn.Module):
    """The FFN branch: an MLP of two 3x3 convolutions [paper], narrow in the middle [reading]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.conv2(F.gelu(self.conv1(x)))


class ConvBranch(nn.Module):
    """The lightweight branch for local inductive bias [paper]: gated 1x1, depthwise 3x3, 1x1 [reading]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(dim, 2 * dim, 1)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.project = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.project(self.depthwise(F.glu(self.expand(x), dim=1)))


class MEABlock(nn.Module):
    """Three parallel branches, concatenated and fused; attention and FFN share one LayerNorm [paper].

    Args:
        dim: channels C.
        num_heads: heads of the attention branch.
        stripe_width: of the attention branch.
        ffn_ratio: hidden width of the FFN branch over C.
        shared_norm: False gives the FFN branch a LayerNorm of its own (the paper's ablation).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stripe_width: int = 4,
        ffn_ratio: float = 0.25,
        shared_norm: bool = True,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn_norm = None if shared_norm else nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossShapedAttention(dim, num_heads, stripe_width)
        self.ffn = ConvFFN(dim, max(1, int(dim * ffn_ratio)))
        self.conv = ConvBranch(dim)
        self.fuse = nn.Conv2d(3 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x_last = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        z = self.norm(x_last)
        z_ffn = z if self.ffn_norm is None else self.ffn_norm(x_last)
        a = self.attn(z).permute(0, 3, 1, 2)
        f = self.ffn(z_ffn.permute(0, 3, 1, 2))
        k = self.conv(x)
        return self.fuse(torch.cat([a, f, k], dim=1))


class Cascade(nn.Module):
    """MEA blocks one after another over the parts of a channel split [paper]; sizes are [reading].

    Each part also receives the output of the part before it (EfficientViT, Liu et al., CVPR 2023, eq. 3).

    Args:
        in_channels: channels of the concatenated input.
        out_channels: D.
        hidden: d, channels over all parts.
        parts: number of parts n; divides `hidden`.
        block: arguments of each `MEABlock`.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int, parts: int, **block) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, hidden, 1)
        self.blocks = nn.ModuleList(MEABlock(hidden // parts, **block) for _ in range(parts))
        self.expand = nn.Conv2d(hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        outputs: list[Tensor] = []
        for part, block in zip(self.reduce(x).chunk(len(self.blocks), dim=1), self.blocks, strict=True):
            outputs.append(block(part + outputs[-1] if outputs else part))
        return self.expand(torch.cat(outputs, dim=1))
