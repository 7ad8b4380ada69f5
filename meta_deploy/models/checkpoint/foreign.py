"""Names for models of others, by the tensor names that their code gives: to say what a checkpoint is.

ViT-Adapter (Chen et al., ICLR 2023) and ViT-CoMer (Xia et al., CVPR 2024) as published, and the backbones and
heads of MMDetection and MMSegmentation. Knows nothing of our own models.
"""

from __future__ import annotations

from collections.abc import Callable

from meta_deploy.models.shapes import State, count_of, size_of

_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}  # of ViTs
_BOTTLENECKS = {4: 26, 6: 50, 23: 101, 36: 152}  # blocks in a ResNet's third stage -> layers in all
_HEADS = ("rpn_head.", "roi_head.", "bbox_head.", "decode_head.", "panoptic_head.")

# A part of a name that only this head has, the most special first; the head's title.
# fmt: off
_HEAD_TITLES: tuple[tuple[str, str], ...] = (
    ("roi_head.semantic_head.", "HTC"),
    ("rpn_head.init_proposal_bboxes.", "Sparse R-CNN"),
    ("head.pixel_decoder.", "Mask2Former"),
    ("roi_head.mask_head.0.", "Cascade Mask R-CNN"),
    ("roi_head.bbox_head.0.", "Cascade R-CNN"),
    ("roi_head.mask_head.", "Mask R-CNN"),
    ("roi_head.bbox_head.", "Faster R-CNN"),
    ("bbox_head.atss_cls.", "ATSS"),
    ("bbox_head.gfl_cls.", "GFL"),
    ("bbox_head.retina_cls.", "RetinaNet"),
    ("decode_head.psp_modules.", "UPerNet"),
    ("decode_head.scale_heads.", "Semantic FPN"),
)
# Layers with an output a class, and how many outputs they have besides.
_CLASSIFIERS: tuple[tuple[str, int], ...] = (
    ("roi_head.mask_head.conv_logits", 0), ("roi_head.mask_head.0.conv_logits", 0),
    ("roi_head.bbox_head.fc_cls", 1), ("bbox_head.atss_cls", 0), ("bbox_head.gfl_cls", 0),
    ("decode_head.cls_embed", 1), ("panoptic_head.cls_embed", 1), ("decode_head.conv_seg", 0),
)
# fmt: on


def foreign_adapter(state: State) -> str | None:
    """ "ViT-Adapter (tiny, Mask R-CNN head, 80 classes)", and likewise ViT-CoMer; None if it is neither."""
    names = {name.removeprefix("backbone.") for name in state}
    if any(".cti_tov." in name or ".cti_toc." in name for name in names):
        return _describe("ViT-CoMer", state, _vit_size(state))
    if any(name.startswith("spm.") for name in names) or {"level_embed", "norm1.weight"} <= names:
        return _describe("ViT-Adapter", state, _vit_size(state))
    return None


def foreign_detector(state: State) -> str | None:
    """The same of a detector or segmenter on a Swin, ResNet or plain ViT; None if it is none of these."""
    if not any(name.startswith(_HEADS) for name in state):
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
            return _describe(title, state, size(state))
    return None


def _describe(title: str, state: State, size: str | None) -> str:
    """The title, with what else is known of the model behind it."""
    head = next((name for part, name in _HEAD_TITLES if any(part in n for n in state)), None)
    classes = next(
        (n - extra for layer, extra in _CLASSIFIERS if (n := size_of(state, f"{layer}.weight", 0))), None
    )
    facts = (size, head and f"{head} head", classes and f"{classes} classes")
    known = ", ".join(fact for fact in facts if fact)
    return f"{title} ({known})" if known else title


def _vit_size(state: State) -> str | None:
    parts = ("patch_embed.proj", "visual_embed.patch_embed.proj", "norm1")
    widths = (size_of(state, f"{at}{part}.weight", 0) for at in ("backbone.", "") for part in parts)
    return _WIDTHS.get(next((width for width in widths if width), 0))


def _swin_size(state: State) -> str | None:
    width = size_of(state, "backbone.patch_embed.projection.weight", 0) or size_of(
        state, "backbone.patch_embed.proj.weight", 0
    )
    deep = (count_of(state, "backbone.stages.2.blocks.") or count_of(state, "backbone.layers.2.blocks.")) != 6
    return {96: "small" if deep else "tiny", 128: "base", 192: "large"}.get(width or 0)


def _resnet_size(state: State) -> str | None:
    third = count_of(state, "backbone.layer3.")
    if "backbone.layer1.0.conv3.weight" in state:
        layers = _BOTTLENECKS.get(third or 0)
    else:
        layers = {2: 18, 6: 34}.get(third or 0)
    return f"{layers} layers" if layers else None
