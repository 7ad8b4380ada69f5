"""META: a plain ViT and its memory-efficient adapter as one multi-scale backbone.

Zhang et al., "Memory Efficient Transformer Adapter for Dense Predictions", ICLR 2025. The interaction on the
single 1/16 grid is this project's reading of it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_deploy.models.backbones.mea import Cascade
from meta_deploy.models.backbones.spatial_prior import SpatialPrior
from meta_deploy.models.backbones.vit import VisionTransformer
from meta_deploy.models.registry import BackboneConfig


def resize(x: Tensor, factor: float) -> Tensor:
    """Bilinear, corners not aligned."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


class Interaction(nn.Module):
    """One exchange between spatial prior and ViT: inject, run a quarter of the ViT, extract."""

    def __init__(self, config: BackboneConfig) -> None:
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


class META(nn.Module):
    """Image (B, 3, H, W) to four maps of D channels at 1/4, 1/8, 1/16, 1/32; H and W multiples of 32."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        dim = config.embed_dim
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
