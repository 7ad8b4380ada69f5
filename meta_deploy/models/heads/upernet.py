"""UPerNet (Xiao et al., ECCV 2018) on the META backbone, in the semantics and names of MMSegmentation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_deploy.models.backbones.meta import META
from meta_deploy.models.heads.fpn import ConvModule
from meta_deploy.models.init import zero_bias
from meta_deploy.models.registry import UPerNetConfig


def pooling_weights(size: int, bins: int, like: Tensor) -> Tensor:
    """Adaptive average pooling of one axis as a matrix (bins, size): each row averages its own pixels.

    Written as a product because ONNX has no adaptive pooling, and so that the size may be known only at run
    time. Bin i covers [floor(i * size / bins), ceil((i + 1) * size / bins)), as in PyTorch.
    """
    i = torch.arange(bins, device=like.device)[:, None]
    pixel = torch.arange(size, device=like.device)[None, :]
    start, end = i * size // bins, ((i + 1) * size + bins - 1) // bins
    inside = (pixel >= start) & (pixel < end)
    return inside.to(like.dtype) / (end - start).to(like.dtype)


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, an FPN over all four, one classifier on their concatenation."""

    def __init__(
        self, in_channels: int, channels: int, pool_scales: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        self.pool_scales = pool_scales

        def conv(inputs: int, kernel_size: int) -> ConvModule:
            return ConvModule(inputs, channels, kernel_size, norm=True, relu=True)

        # Index 0 of each pair is the pooling, which has no parameters: the names stay MMSegmentation's.
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.Identity(), conv(in_channels, 1)) for _ in pool_scales
        )
        self.bottleneck = conv(in_channels + len(pool_scales) * channels, 3)
        self.lateral_convs = nn.ModuleList(conv(in_channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(conv(channels, 3) for _ in range(3))
        self.fpn_bottleneck = conv(4 * channels, 3)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        zero_bias(self.conv_seg)

    def pyramid_pool(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, channels, h, w)."""
        h, w = x.shape[-2:]
        pooled = [x]
        for bins, branch in zip(self.pool_scales, self.psp_modules, strict=True):
            if bins == 1:  # a product with a row of ones, which TensorRT-RTX 1.7 cannot fold
                small = x.mean(dim=(2, 3), keepdim=True)
            else:
                rows, columns = pooling_weights(h, bins, x), pooling_weights(w, bins, x)
                small = rows @ x @ columns.transpose(0, 1)
            small = branch(small)  # (B, channels, bins, bins)
            pooled.append(F.interpolate(small, size=(h, w), mode="bilinear", align_corners=False))
        return self.bottleneck(torch.cat(pooled, dim=1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps at 1/4..1/32 -> logits (B, classes, H/4, W/4)."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps[:3], strict=True)]
        laterals.append(self.pyramid_pool(maps[3]))
        for i in (2, 1, 0):
            laterals[i] = laterals[i] + F.interpolate(
                laterals[i + 1], scale_factor=2.0, mode="bilinear", align_corners=False
            )
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:3], strict=True)]
        outputs.append(laterals[3])
        for i in (1, 2, 3):
            outputs[i] = F.interpolate(
                outputs[i], scale_factor=float(2**i), mode="bilinear", align_corners=False
            )
        return self.conv_seg(self.fpn_bottleneck(torch.cat(outputs, dim=1)))


class UPerNet(nn.Module):
    """Image in, class logits at a quarter of its size out."""

    def __init__(self, config: UPerNetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = META(config.backbone)
        self.decode_head = UPerHead(
            config.backbone.embed_dim, config.channels, config.pool_scales, config.num_classes
        )

    def forward(self, images: Tensor, stages: bool = False) -> dict[str, Tensor]:
        """(B, 3, H, W), normalized RGB; H and W multiples of 32.

        Args:
            images: the batch.
            stages: also return what verification compares on the way: the backbone's maps `feature_0` ..
                `feature_3`.

        Returns:
            `logits` (B, classes, H/4, W/4).
        """
        maps = self.backbone(images)
        outputs = {"logits": self.decode_head(maps)}
        if stages:
            outputs |= {f"feature_{i}": feature for i, feature in enumerate(maps)}
        return outputs
