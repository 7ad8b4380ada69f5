"""ViT-Adapter: a plain ViT, a convolutional prior, and deformable attention between the two.

Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023. Semantics and state-dict names are
those of the published code, so that its checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_deploy.models.backbones.backbone import Backbone, BackboneConfig, BackboneModule, register
from meta_deploy.models.backbones.spatial_prior import SpatialPrior
from meta_deploy.models.backbones.vit import Mlp, PatchEmbed, SelfAttention, pos_grid_of, resize_pos_embed
from meta_deploy.models.backbones.windows import merge, partition
from meta_deploy.models.config import Count, CountOrZero, NotNegative, Positive
from meta_deploy.models.ops.deformable_attention import (
    DeformableAttention,
    Size,
    reference_points,
    split_maps,
)
from meta_deploy.models.shapes import State, any_starts_with, count_of, known, ratio_of, size_of


class ViTAdapterConfig(BackboneConfig, frozen=True, tag="vit-adapter"):
    """A ViT and its adapter.

    Attributes:
        embed_dim, depth, num_heads, patch_size, mlp_ratio, layer_scale, pos_grid: the ViT.
        window: attention window in patches, the last block of each quarter global; 0: global everywhere.
        vit_feature: what of the ViT is added to the four maps: the output of its last block to all ("last",
            the published detectors), that of interaction i to map i ("each", the segmenters), or "none".
        inplanes: channels of the spatial prior's stem.
        interactions: exchanges between ViT and prior, one after each part of the blocks.
        extra_extractors: further extractors after the last interaction.
        points: of a head of deformable attention on a map.
        deform_heads, deform_ratio: of deformable attention: heads, and width of the values over D.
        ffn_ratio: width of the extractors' convolutional FFN over D; 0: none.
    """

    embed_dim: Count
    depth: Count
    num_heads: Count
    deform_heads: Count
    patch_size: Count = 16
    mlp_ratio: Positive = 4.0
    layer_scale: bool = True
    pos_grid: Count = 14
    window: CountOrZero = 0
    vit_feature: Literal["last", "each", "none"] = "last"
    inplanes: Count = 64
    interactions: Count = 4
    extra_extractors: CountOrZero = 2
    points: Count = 4
    deform_ratio: Positive = 1.0
    ffn_ratio: NotNegative = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        dim, parts, value = self.embed_dim, self.interactions, int(self.embed_dim * self.deform_ratio)
        self.require(self.depth % 4 == 0, f"depth {self.depth} is not a multiple of 4")
        self.require(self.depth % parts == 0, f"{parts} interactions do not divide depth {self.depth}")
        self.require(dim % self.num_heads == 0, f"{self.num_heads} heads do not divide width {dim}")
        self.require(self.patch_size == 16, f"patch size {self.patch_size} is not 16")
        self.require(
            value > 0 and value % self.deform_heads == 0,
            f"{self.deform_heads} heads of deformable attention do not divide its {value} channels",
        )
        self.require(
            self.vit_feature != "each" or parts == 4,
            f"vit_feature 'each' takes 4 interactions, one a map, and there are {parts}",
        )

    @property
    def width(self) -> int:
        return self.embed_dim

    @property
    def blocks(self) -> int:
        return max(self.depth, self.interactions, self.extra_extractors)


class Block(nn.Module):
    """Pre-norm transformer block on the tokens of a map; `window` 0 means global attention.

    Windows that reach over the map are filled with keys and values of zero, which take part in the softmax.
    """

    gamma1: Tensor | None
    gamma2: Tensor | None

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, window: int, layer_scale: bool) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        for name in ("gamma1", "gamma2"):  # LayerScale
            self.register_parameter(name, nn.Parameter(torch.ones(dim)) if layer_scale else None)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """(B, N, C) -> (B, N, C), tokens of a map of this (height, width), row by row."""
        B, H, W = x.shape[0], *size
        qkv = self.attn.qkv(self.norm1(x))
        if self.window:
            window = (self.window, self.window)
            y = self.attn.attend(partition(qkv.reshape(B, H, W, -1), window))
            y = merge(y, window, (B, H, W)).reshape(B, H * W, -1)
        else:
            y = self.attn.attend(qkv)
        x = x + self._scaled(self.attn.proj(y), self.gamma1)
        return x + self._scaled(self.mlp(self.norm2(x)), self.gamma2)

    @staticmethod
    def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
        return x if gamma is None else gamma * x


class SharedDepthwise(nn.Module):
    """One 3x3 depthwise convolution over several maps, under the published name `dwconv`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, sizes: Sequence[Size]) -> Tensor:
        """(B, N, C), the maps one after the other -> (B, N, C)."""
        maps = split_maps(tokens, sizes)
        return torch.cat([self.dwconv(x).flatten(2) for x in maps], dim=2).transpose(1, 2)


class ConvFFN(nn.Module):
    """Two linear layers with a depthwise convolution and GELU between them, over the tokens of all maps."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = SharedDepthwise(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor, sizes: Sequence[Size]) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(tokens), sizes)))


class Exchange(nn.Module):
    """What injector and extractor share: norms of queries and features, deformable attention."""

    def __init__(self, config: ViTAdapterConfig, levels: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, config.deform_heads, levels, config.points, config.deform_ratio)

    def attend(
        self, query: Tensor, queries: Sequence[Size], feature: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        """Tokens of maps of the sizes `queries` look at tokens of maps of the sizes `sizes`."""
        references = reference_points(queries, query)
        return self.attn(self.query_norm(query), references, self.feat_norm(feature), sizes)


class Injector(Exchange):
    """Spatial prior into ViT."""

    def __init__(self, config: ViTAdapterConfig) -> None:
        super().__init__(config, levels=3)
        self.gamma = nn.Parameter(torch.zeros(config.embed_dim))

    def forward(self, x: Tensor, c: Tensor, sizes: Sequence[Size]) -> Tensor:
        """The ViT's tokens (B, n, D), the prior's (B, N, D) on maps of `sizes` -> the ViT's new ones."""
        return x + self.gamma * self.attend(x, sizes[1:2], c, sizes)


class Extractor(Exchange):
    """ViT into spatial prior."""

    def __init__(self, config: ViTAdapterConfig) -> None:
        super().__init__(config, levels=1)
        hidden = int(config.embed_dim * config.ffn_ratio)
        self.ffn = ConvFFN(config.embed_dim, hidden) if hidden else None
        self.ffn_norm = nn.LayerNorm(config.embed_dim, eps=1e-6) if hidden else None

    def forward(self, c: Tensor, x: Tensor, sizes: Sequence[Size]) -> Tensor:
        """The prior's tokens (B, N, D) on maps of `sizes`, the ViT's (B, n, D) -> the prior's new ones."""
        c = c + self.attend(c, sizes, x, sizes[1:2])
        if self.ffn is None or self.ffn_norm is None:
            return c
        return c + self.ffn(self.ffn_norm(c), sizes)


class Interaction(nn.Module):
    """One exchange: inject, run a part of the ViT, extract. The ViT's grid is the prior's second map."""

    def __init__(self, config: ViTAdapterConfig, extra_extractors: int) -> None:
        super().__init__()
        self.injector = Injector(config)
        self.extractor = Extractor(config)
        self.extra_extractors = nn.ModuleList(Extractor(config) for _ in range(extra_extractors))

    def forward(
        self, x: Tensor, c: Tensor, blocks: nn.ModuleList, sizes: Sequence[Size]
    ) -> tuple[Tensor, Tensor]:
        """The tokens of the ViT (B, n, D) and of the prior (B, N, D) -> the new ones."""
        x = self.injector(x, c, sizes)
        for block in blocks:
            x = block(x, sizes[1])
        for extractor in (self.extractor, *self.extra_extractors):
            c = extractor(c, x, sizes)
        return x, c


class ViTAdapter(BackboneModule):
    """Image (B, 3, H, W) to four maps of D channels at 1/4, 1/8, 1/16, 1/32; H and W multiples of 32."""

    strides = (4, 8, 16, 32)

    def __init__(self, config: ViTAdapterConfig) -> None:
        super().__init__()
        dim, quarter = config.embed_dim, config.depth // 4
        self.vit_feature = config.vit_feature
        self.out_channels = (dim,) * 4
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_grid**2, dim))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.num_heads,
                config.mlp_ratio,
                0 if (i + 1) % quarter == 0 else config.window,
                config.layer_scale,
            )
            for i in range(config.depth)
        )
        self.spm = SpatialPrior(dim, config.inplanes)
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        last = config.interactions - 1
        self.interactions = nn.ModuleList(
            Interaction(config, config.extra_extractors if i == last else 0)
            for i in range(config.interactions)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.BatchNorm2d(dim) for _ in range(4))
        nn.init.normal_(self.level_embed)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps (B, D, H/s, W/s), s of `strides`."""
        c1, *prior = self.spm(images)
        sizes = [(m.shape[2], m.shape[3]) for m in prior]
        embeds = self.level_embed.reshape(3, 1, -1, 1, 1)
        maps = [(m + e).flatten(2) for m, e in zip(prior, embeds, strict=True)]
        c = torch.cat(maps, dim=2).transpose(1, 2)

        x = self.patch_embed(images)
        x = (x + resize_pos_embed(self.pos_embed, sizes[1])).flatten(2).transpose(1, 2)
        part = len(self.blocks) // len(self.interactions)
        features = []
        for i, interaction in enumerate(self.interactions):
            x, c = interaction(x, c, self.blocks[i * part : (i + 1) * part], sizes)
            features.append(x)

        c2, c3, c4 = split_maps(c, sizes)
        maps = [c1 + self.up(c2), c2, c3, c4]
        if self.vit_feature != "none":
            added = features if self.vit_feature == "each" else [x] * 4
            grids = [split_maps(feature, sizes[1:2])[0] for feature in added]
            maps = [m + self._resized(g, 16 / s) for m, g, s in zip(maps, grids, self.strides, strict=True)]
        return [
            norm(m) for norm, m in zip((self.norm1, self.norm2, self.norm3, self.norm4), maps, strict=True)
        ]

    @staticmethod
    def _resized(x: Tensor, factor: float) -> Tensor:
        """(B, D, h, w) -> (B, D, h * factor, w * factor): bilinear, corners not aligned."""
        if factor == 1:
            return x
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def measure(config: ViTAdapterConfig, state: State) -> dict[str, Any]:
    """The settings of `config` that shapes tell; what is missing from the state dict is left out."""
    width = embed_dim(state) or config.embed_dim
    interactions = count_of(state, "interactions.")
    extractor = "interactions.0.extractor."
    weights = size_of(state, extractor + "attn.attention_weights.weight", 0)
    hidden = size_of(state, extractor + "ffn.fc1.weight", 0)
    values = size_of(state, extractor + "attn.value_proj.weight", 0)
    whole = "blocks.0.norm1.weight" in state
    return known(
        embed_dim=width,
        depth=count_of(state, "blocks."),
        deform_heads=weights // config.points if weights else None,
        patch_size=size_of(state, "patch_embed.proj.weight", 2),
        mlp_ratio=ratio_of(size_of(state, "blocks.0.mlp.fc1.weight", 0), width, config.mlp_ratio),
        layer_scale="blocks.0.gamma1" in state if whole else None,
        pos_grid=pos_grid_of(state, ""),
        vit_feature="none" if interactions not in (None, 4) else None,
        inplanes=size_of(state, "spm.stem.0.weight", 0),
        interactions=interactions,
        extra_extractors=(
            count_of(state, f"interactions.{interactions - 1}.extra_extractors.") or 0
            if interactions
            else None
        ),
        deform_ratio=ratio_of(values, width, config.deform_ratio),
        ffn_ratio=ratio_of(hidden, width, config.ffn_ratio) if hidden else (0.0 if values else None),
    )


def embed_dim(state: State) -> int | None:
    """The ViT's width D."""
    return size_of(state, "patch_embed.proj.weight", 0) or size_of(state, "level_embed", 1)


def normalization(state: State) -> dict[str, tuple[float, ...]]:
    """That of AugReg's ViTs (Steiner et al., 2022) of 384 pixels, a grid of 24, in some published B and L."""
    augreg = pos_grid_of(state, "") == 24
    return {"mean": (127.5,) * 3, "std": (127.5,) * 3} if augreg else {}


# Of a BEiT and a Uni-Perceiver, which have published adapters too, and of ViT-CoMer.
_OTHERS = (".attn.q_bias", ".relative_position_bias_table", ".self_attn.", ".cti_tov.", ".cti_toc.")


def recognise(state: State) -> bool:
    """Whether these are tensors of ViT-Adapter with a plain ViT in it, complete or not."""
    adapter = any_starts_with("spm.")(state) or {"level_embed", "norm1.weight"} <= state.keys()
    return adapter and not any(part in name for name in state for part in _OTHERS)


SIZES: Mapping[str, Mapping[str, Any]] = {
    "t": {"embed_dim": 192, "depth": 12, "num_heads": 3, "window": 14, "deform_heads": 6},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6, "window": 14, "deform_heads": 6},
    "b": {
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        "window": 14,
        "deform_heads": 12,
        "deform_ratio": 0.5,
    },
    "l": {
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "window": 14,
        "deform_heads": 16,
        "deform_ratio": 0.5,
    },
}

register(
    Backbone(
        title="ViT-Adapter",
        config=ViTAdapterConfig,
        model=ViTAdapter,
        sizes=SIZES,
        recognise=recognise,
        width=embed_dim,
        measure=measure,
        normalization=normalization,
        by_task={"semantic-segmentation": {"window": 0, "vit_feature": "each"}},
        vit="",
        vit_names={"ls1.gamma": "gamma1", "ls2.gamma": "gamma2"},
    )
)
