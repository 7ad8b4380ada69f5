"""What the models for semantic segmentation share: backbone, optional neck, decode head. Names no head."""

from __future__ import annotations

from torch import Tensor, nn

from meta_deploy.models.backbones.backbone import BackboneModule
from meta_deploy.models.heads.head import HeadConfig
from meta_deploy.models.shapes import State, size_of


class Segmenter(nn.Module):
    """Image in, class logits at a quarter of its size out, under MMSegmentation's names.

    Args:
        config: of the model.
        backbone: images to maps at strides 4, 8, 16 and 32.
        decode_head: maps to logits at stride 4; its last layer is called `conv_seg`.
        neck: between the two, maps to maps.
    """

    def __init__(
        self,
        config: HeadConfig,
        backbone: BackboneModule,
        decode_head: nn.Module,
        neck: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.neck = neck or nn.Identity()
        self.decode_head = decode_head

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
        outputs = {"logits": self.decode_head(self.neck(maps))}
        if stages:
            outputs |= {f"feature_{i}": feature for i, feature in enumerate(maps)}
        return outputs


def num_classes_of(state: State) -> int | None:
    """Classes of the last layer."""
    return size_of(state, "decode_head.conv_seg.weight", 0)
