"""Names for models of others, by the tensor names that their code gives: to say what a checkpoint is.

ViT-Adapter (Chen et al., ICLR 2023) and ViT-CoMer (Xia et al., CVPR 2024) as published, and the backbones and
heads of MMDetection and MMSegmentation. Knows nothing of our own models.
"""

from __future__ import annotations

from collections.abc import Callable

from meta_deploy.models.shapes import State, count_of, size_of

_WIDTHS = {192: "T", 384: "S", 768: "B", 1024: "L"}  # of ViTs
_BOTTLENECKS = {4: 26, 6: 50, 23: 101, 36: 152}  # blocks in a ResNet's third stage -> layers in all
_HEADS = ("rpn_head.", "roi_head.", "bbox_head.", "decode_head.", "panoptic_head.")

# Parts of names that only this head has, all of them, the most special head first; the head's title.
# fmt: off
_HEAD_TITLES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("roi_head.semantic_head.", "roi_head.bbox_head.0.shared_convs."), "HTC++"),
    (("roi_head.semantic_head.",), "HTC"),
    (("rpn_head.init_proposal_bboxes.",), "Sparse R-CNN"),
    (("head.pixel_decoder.",), "Mask2Former"),
    (("roi_head.mask_head.0.",), "Cascade Mask R-CNN"),
    (("roi_head.bbox_head.0.",), "Cascade R-CNN"),
    (("roi_head.mask_head.",), "Mask R-CNN"),
    (("roi_head.bbox_head.",), "Faster R-CNN"),
    (("bbox_head.atss_cls.",), "ATSS"),
    (("bbox_head.gfl_cls.",), "GFL"),
    (("bbox_head.retina_cls.",), "RetinaNet"),
    (("decode_head.psp_modules.",), "UPerNet"),
    (("decode_head.scale_heads.",), "Semantic FPN"),
)
# Of ViTs of other kinds, which have adapters and detectors too.
_VITS: tuple[tuple[str, str], ...] = (
    (".attn.relative_position_bias_table", "BEiT"),
    (".attn.q_bias", "BEiT"),
    ("visual_embed.", "Uni-Perceiver"),
    (".self_attn.in_proj.", "Uni-Perceiver"),
)
# Layers with an output a class, and how many outputs they have besides.
_CLASSIFIERS: tuple[tuple[str, int], ...] = (
    ("roi_head.mask_head.conv_logits", 0), ("roi_head.mask_head.0.conv_logits", 0),
    ("roi_head.bbox_head.fc_cls", 1), ("bbox_head.atss_cls", 0), ("bbox_head.gfl_cls", 0),
    ("decode_head.cls_embed", 1), ("panoptic_head.cls_embed", 1), ("decode_head.conv_seg", 0),
)
# fmt: on


def foreign_adapter(state: State) -> str | None:
    """As "ViT-Adapter-L (BEiT) with Mask2Former, 150 classes", and likewise ViT-CoMer; None if neither."""
    names = {name.removeprefix("backbone.") for name in state}
    if any(".cti_tov." in name or ".cti_toc." in name for name in names):
        return describe("ViT-CoMer", state)
    if any(name.startswith("spm.") for name in names) or {"level_embed", "norm1.weight"} <= names:
        return describe("ViT-Adapter", state)
    return None


def foreign_detector(state: State) -> str | None:
    """The same of a detector or segmenter on a Swin, ResNet or plain ViT; None if it is none of these."""
    if head_title(state) is None and not any(name.startswith(_HEADS) for name in state):
        return None
    has = {name.removeprefix("backbone.") for name in state if name.startswith("backbone.")}
    kinds: tuple[tuple[str, str, Callable[[State], str | None]], ...] = (
        ("stages.0.blocks.0.attn.w_msa.qkv.weight", "Swin", _swin_size),
        ("layers.0.blocks.0.attn.qkv.weight", "Swin", _swin_size),
        ("layer1.0.conv1.weight", "ResNet", _resnet_size),
        ("blocks.0.attn.qkv.weight", "a plain ViT", _vit_size),
    )
    for name, title, size in kinds:
        if name in has:
            return describe(title, state, size)
    return None


def head_title(state: State) -> str | None:
    """The head's name, as its paper has it."""
    for parts, title in _HEAD_TITLES:
        if all(any(part in name for name in state) for part in parts):
            return title
    return None


def describe(title: str, state: State, size: Callable[[State], str | None] | None = None) -> str:
    """The title of a backbone with what else is known of the model: its size, its ViT, head and classes.

    Args:
        title: of the backbone.
        state: of the whole model.
        size: a state dict's size, in letters or numbers (None: that of the ViT's width).
    """
    head, letters = head_title(state), (size or _vit_size)(state)
    kind = next((kind for part, kind in _VITS if any(part in name for name in state)), None)
    classes = next(
        (n - extra for layer, extra in _CLASSIFIERS if (n := size_of(state, f"{layer}.weight", 0))), None
    )
    return "".join(
        (
            title,
            f"-{letters}" if letters else "",
            f" ({kind})" if kind and not title.startswith("Swin") else "",
            f" with {head}" if head else "",
            f", {classes} classes" if classes else "",
        )
    )


def _vit_size(state: State) -> str | None:
    parts = ("patch_embed.proj", "visual_embed.patch_embed.proj", "norm1")
    widths = (size_of(state, f"{at}{part}.weight", 0) for at in ("backbone.", "") for part in parts)
    return _WIDTHS.get(next((width for width in widths if width), 0))


def _swin_size(state: State) -> str | None:
    width = size_of(state, "backbone.patch_embed.projection.weight", 0) or size_of(
        state, "backbone.patch_embed.proj.weight", 0
    )
    deep = (count_of(state, "backbone.stages.2.blocks.") or count_of(state, "backbone.layers.2.blocks.")) != 6
    return {96: "S" if deep else "T", 128: "B", 192: "L"}.get(width or 0)


def _resnet_size(state: State) -> str | None:
    third = count_of(state, "backbone.layer3.")
    if "backbone.layer1.0.conv3.weight" in state:
        layers = _BOTTLENECKS.get(third or 0)
    else:
        layers = {2: 18, 6: 34}.get(third or 0)
    return str(layers) if layers else None
