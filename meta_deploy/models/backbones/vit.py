"""A plain Vision Transformer as the adapter needs it: patches to blocks, no class token, no head.

State-dict names follow timm, so that DeiT, AugReg and DINO weights load as they are.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_deploy.models.backbones.windows import merge, partition
from meta_deploy.models.init import zero_bias
from meta_deploy.models.shapes import State, size_of


def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1).

    Args:
        q, k, v: (B, heads, N, head_dim).
        valid: bool, broadcastable to (B, heads, N, N); False keys get no weight.

    Returns:
        (B, heads, N, head_dim).
    """
    if not torch.compiler.is_exporting():  # an export holds the plain operators, which the passes know
        return F.scaled_dot_product_attention(q, k, v, attn_mask=valid)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if valid is not None:
        weights = weights.masked_fill(~valid, float("-inf"))
    return weights.softmax(dim=-1) @ v


class SelfAttention(nn.Module):
    """Multi-head self-attention over a set of tokens (B, N, C)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """What lies between the two projections: (B, N, 3C) -> (B, N, C)."""
        B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q, k, v = qkv.reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return attention(q, k, v).transpose(1, 2).reshape(B, N, C)  # q, k, v: (B, heads, N, head_dim)


class Mlp(nn.Module):
    """Two linear layers with GELU between them: (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel, the last axis (CaiT, Touvron et al., ICCV 2021, eq. 3)."""

    def __init__(self, dim: int, initial: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block on a map (B, H, W, C); `window` 0 means global attention."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, window: int = 0, layer_scale: bool = False
    ) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, num_heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), H and W in patches."""
        B, H, W, C = x.shape
        y = self.norm1(x)
        if self.window:
            # Padding is zeros after the norm and takes part in the softmax, as in ViTDet.
            window = (self.window, self.window)
            y = merge(self.attn(partition(y, window)), window, (B, H, W))
        else:
            y = self.attn(y.reshape(B, H * W, C)).reshape(B, H, W, C)
        x = x + self.ls1(y)
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Image to patches: a strided convolution, (B, 3, H, W) -> (B, D, H/patch, W/patch)."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


def resize_pos_embed(pos_embed: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a square grid of position embeddings bicubically, without antialiasing.

    Args:
        pos_embed: (1, G * G, D), no class token.
        size: (h, w) of the new grid.

    Returns:
        (1, D, h, w).
    """
    grid = round(pos_embed.shape[1] ** 0.5)
    x = pos_embed.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    if size == (grid, grid):
        return x
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False)


def pos_grid_of(state: State, prefix: str) -> int | None:
    """Side of the square position grid in a state dict, class and distillation token not counted."""
    tokens = size_of(state, prefix + "pos_embed", 1)
    for extra in (0, 1, 2):
        if tokens and math.isqrt(max(tokens - extra, 0)) ** 2 == tokens - extra:
            return math.isqrt(tokens - extra)
    return None


class VisionTransformer(nn.Module):
    """Patch embedding, position embedding and blocks; the adapter calls the blocks in quarters.

    Args:
        dim: width D.
        depth: number of blocks, a multiple of four.
        num_heads: attention heads.
        patch_size: pixels a patch side.
        mlp_ratio: hidden width of the MLP over D.
        window: side of the attention window in patches; the last block of each quarter stays global.
            0: global attention everywhere.
        layer_scale: whether blocks have LayerScale.
        pos_grid: side of the learned position grid.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        window: int = 0,
        layer_scale: bool = False,
        pos_grid: int = 14,
    ) -> None:
        super().__init__()
        self.quarter = depth // 4
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, pos_grid * pos_grid, dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, 0 if (i + 1) % self.quarter == 0 else window, layer_scale)
            for i in range(depth)
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            zero_bias(module)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, H/16, W/16), with position."""
        x = self.patch_embed(images)
        return x + resize_pos_embed(self.pos_embed, (x.shape[2], x.shape[3]))

    def run_quarter(self, x: Tensor, index: int) -> Tensor:
        """Run the `index`-th quarter of the blocks over a map (B, D, h, w)."""
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks[index * self.quarter : (index + 1) * self.quarter]:
            x = block(x)
        return x.permute(0, 3, 1, 2)
