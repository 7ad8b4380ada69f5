"""META: a plain ViT and its memory-efficient adapter as one multi-scale backbone.

Zhang et al., "Memory Efficient Transformer Adapter for Dense Predictions", ICLR 2025. The interaction on the
single 1/16 grid is this project's reading of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_deploy.models.backbones.backbone import Backbone, BackboneConfig, BackboneModule, register
from meta_deploy.models.backbones.mea import Cascade
from meta_deploy.models.backbones.spatial_prior import SpatialPrior
from meta_deploy.models.backbones.vit import VisionTransformer, pos_grid_of
from meta_deploy.models.config import Count, CountOrZero, Positive
from meta_deploy.models.shapes import State, any_starts_with, count_of, known, ratio_of, size_of


class METAConfig(BackboneConfig, frozen=True, tag="meta"):
    """A ViT and its META adapter.

    Attributes:
        embed_dim, depth, num_heads, patch_size, mlp_ratio, layer_scale, pos_grid: the ViT.
        window: attention window in patches, the last block of each quarter global; 0: global everywhere.
        inplanes: channels of the spatial prior's stem.
        adapter_ratio: cascade width d over D.
        adapter_parts: cascade parts n.
        adapter_heads: attention heads of one MEA block, an even number.
        stripe_width, ffn_ratio, shared_norm: of the MEA block.
    """

    embed_dim: Count
    depth: Count
    num_heads: Count
    patch_size: Count = 16
    mlp_ratio: Positive = 4.0
    layer_scale: bool = False
    pos_grid: Count = 14
    window: CountOrZero = 0
    inplanes: Count = 64
    adapter_ratio: Positive = 0.5
    adapter_parts: Count = 4
    adapter_heads: Count = 2
    stripe_width: Count = 4
    ffn_ratio: Positive = 0.25
    shared_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        dim, parts, hidden = self.embed_dim, self.adapter_parts, int(self.embed_dim * self.adapter_ratio)
        part = hidden // parts
        self.require(self.depth % 4 == 0, f"depth {self.depth} is not a multiple of 4")
        self.require(dim % self.num_heads == 0, f"{self.num_heads} heads do not divide width {dim}")
        self.require(self.patch_size == 16, f"patch size {self.patch_size} is not 16")
        self.require(part > 0 and hidden % parts == 0, f"{parts} parts do not divide {hidden}")
        self.require(
            self.adapter_heads % 2 == 0 and part % self.adapter_heads == 0,
            f"{self.adapter_heads} adapter heads are not an even divisor of {part} channels",
        )

    @property
    def width(self) -> int:
        return self.embed_dim

    @property
    def blocks(self) -> int:
        return max(self.depth, self.adapter_parts)


def resize(x: Tensor, factor: float) -> Tensor:
    """Bilinear, corners not aligned."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


class Interaction(nn.Module):
    """One exchange between spatial prior and ViT: inject, run a quarter of the ViT, extract."""

    def __init__(self, config: METAConfig) -> None:
        super().__init__()
        dim = config.embed_dim

        def cascade() -> Cascade:
            return Cascade(
                2 * dim,
                dim,
                hidden=int(dim * config.adapter_ratio),
                parts=config.adapter_parts,
                num_heads=config.adapter_heads,
                stripe_width=config.stripe_width,
                ffn_ratio=config.ffn_ratio,
                shared_norm=config.shared_norm,
            )

        self.injector = cascade()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.extractor = cascade()

    def inject(self, prior: Tensor, x: Tensor) -> Tensor:
        """Spatial prior into ViT: two maps (B, D, h, w) -> the new ViT map."""
        return x + self.gamma.reshape(1, -1, 1, 1) * self.injector(torch.cat([prior, x], dim=1))

    def extract(self, prior: Tensor, x: Tensor) -> Tensor:
        """ViT into spatial prior: two maps (B, D, h, w) -> the new spatial prior."""
        return prior + self.extractor(torch.cat([prior, x], dim=1))


class META(BackboneModule):
    """Image (B, 3, H, W) to four maps of D channels at 1/4, 1/8, 1/16, 1/32; H and W multiples of 32."""

    strides = (4, 8, 16, 32)

    def __init__(self, config: METAConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.out_channels = (dim,) * 4
        self.vit = VisionTransformer(
            dim,
            config.depth,
            config.num_heads,
            config.patch_size,
            config.mlp_ratio,
            config.window,
            config.layer_scale,
            config.pos_grid,
        )
        self.spatial_prior = SpatialPrior(dim, config.inplanes)
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.merge_prior = nn.Conv2d(3 * dim, dim, 1)
        self.interactions = nn.ModuleList(Interaction(config) for _ in range(4))
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in range(4))
        nn.init.normal_(self.level_embed)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps (B, D, H/s, W/s), s of `strides`."""
        c1, c2, c3, c4 = self.spatial_prior(images)
        e2, e3, e4 = self.level_embed.reshape(3, 1, -1, 1, 1)
        c2, c3, c4 = c2 + e2, c3 + e3, c4 + e4

        # Everything that the adapter does happens on the ViT's own grid, 1/16.
        up4 = F.interpolate(c4, scale_factor=2.0, mode="nearest")
        prior = self.merge_prior(torch.cat([F.avg_pool2d(c2, 2), c3, up4], dim=1))
        x = self.vit.embed(images)
        for index, interaction in enumerate(self.interactions):
            assert isinstance(interaction, Interaction)
            x = interaction.inject(prior, x)
            x = self.vit.run_quarter(x, index)
            prior = interaction.extract(prior, x)

        c2 = c2 + resize(prior, 2.0)
        c3 = c3 + prior
        c4 = c4 + resize(prior, 0.5)
        c1 = c1 + self.up(c2)
        maps = [c1 + resize(x, 4.0), c2 + resize(x, 2.0), c3 + x, c4 + resize(x, 0.5)]
        return [norm(m) for norm, m in zip(self.norms, maps, strict=True)]


def measure(config: METAConfig, state: State) -> dict[str, Any]:
    """The settings of `config` that shapes tell; what is missing from the state dict is left out."""
    cascade = "interactions.0.injector."
    width = embed_dim(state) or config.embed_dim
    hidden, parts = size_of(state, cascade + "reduce.weight", 0), count_of(state, cascade + "blocks.")
    part = hidden // parts if hidden and parts else None
    return known(
        embed_dim=width,
        depth=count_of(state, "vit.blocks."),
        patch_size=size_of(state, "vit.patch_embed.proj.weight", 2),
        mlp_ratio=ratio_of(size_of(state, "vit.blocks.0.mlp.fc1.weight", 0), width, config.mlp_ratio),
        layer_scale=any(n.startswith("vit.") and n.endswith(".ls1.gamma") for n in state),
        pos_grid=pos_grid_of(state, "vit."),
        inplanes=size_of(state, "spatial_prior.stem.0.weight", 0),
        adapter_ratio=ratio_of(hidden, width, config.adapter_ratio),
        adapter_parts=parts,
        ffn_ratio=ratio_of(size_of(state, cascade + "blocks.0.ffn.conv1.weight", 0), part, config.ffn_ratio),
        shared_norm=not any(".ffn_norm." in n for n in state) if parts else None,
    )


def embed_dim(state: State) -> int | None:
    """The ViT's width D; of an adapter without its ViT, its own."""
    return size_of(state, "vit.patch_embed.proj.weight", 0) or size_of(state, "level_embed", 1)


def recognise(state: State) -> bool:
    """Whether these are tensors of META, complete or not."""
    if "vit.patch_embed.proj.weight" in state and any_starts_with("interactions.")(state):
        return True
    return embed_dim(state) is not None and any_starts_with("spatial_prior.")(state)


# The windows and the global attention of segmentation are those of the published ViT-Adapter configurations.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "nano": {"embed_dim": 128, "depth": 8, "num_heads": 4, "inplanes": 32},
    "t": {"embed_dim": 192, "depth": 12, "num_heads": 3, "window": 14},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6, "window": 14},
    # Narrower cascades than the usual half of D, with which these two would outweigh ViT-Adapter's adapters.
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "window": 14, "adapter_ratio": 1 / 3},
    "l": {
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "window": 14,
        "adapter_ratio": 0.375,
        "adapter_heads": 4,
    },
}

register(
    Backbone(
        title="META",
        config=METAConfig,
        model=META,
        sizes=SIZES,
        recognise=recognise,
        width=embed_dim,
        measure=measure,
        by_task={"semantic-segmentation": {"window": 0}},
        vit="vit.",
    )
)
