"""The configuration of a model from its tensors' names and shapes. Knows no files.

Shapes don't tell everything. Heads and adapter heads are the zoo's for that width, windows, stripe width,
pool scales and thresholds the zoo's for that head: `GUESSED` says so to the user.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from torch import Tensor

from meta_deploy.errors import InputError
from meta_deploy.models.registry import (
    MODEL_NAMES,
    BackboneConfig,
    MaskRCNNConfig,
    ModelConfig,
    UPerNetConfig,
    get_config,
)

State = dict[str, Tensor]

GUESSED = "attention heads, windows, stripe width and thresholds, which shapes don't tell, are the zoo's"
_VIT = "backbone.vit."
_HEAD_PREFIXES = {"mask-rcnn": ("rpn_head.", "roi_head."), "upernet": ("decode_head.",)}


def is_meta_model(state: State) -> bool:
    """Whether these are tensors of one of our models, complete or not."""
    return _size(state, _VIT + "patch_embed.proj.weight", 0) is not None and any(
        name.startswith(("backbone.interactions.", "backbone.spatial_prior.")) for name in state
    )


def vit_prefix(state: State) -> str | None:
    """What stands before a ViT's names in timm's naming ("" for a plain one); None where there is no ViT."""
    end = "patch_embed.proj.weight"
    for name in sorted((n for n in state if n.endswith(end)), key=len):
        prefix = name.removesuffix(end)
        if any(n.startswith(prefix + "blocks.0.attn.") for n in state):
            return prefix
    return None


def head_of(state: State) -> str | None:
    """The kind of head, by names; None where there is none or more than one."""
    heads = [h for h, prefixes in _HEAD_PREFIXES.items() if any(n.startswith(prefixes) for n in state)]
    return heads[0] if len(heads) == 1 else None


def zoo_name(state: State) -> str | None:
    """The zoo model that these tensors are most like; None where width or head is none of the zoo's."""
    width, head = _size(state, _VIT + "patch_embed.proj.weight", 0), head_of(state)
    for name in MODEL_NAMES:
        config = get_config(name)
        if config.head == head and config.backbone.embed_dim == width:
            return name
    return None


def zoo_size(width: int) -> str | None:
    """The zoo's letter for a ViT of this width."""
    sizes = (n.split("-")[1] for n in MODEL_NAMES if get_config(n).backbone.embed_dim == width)
    return next(sizes, None)


def with_shapes(config: ModelConfig, state: State) -> ModelConfig:
    """`config` with everything that shapes tell taken from them; what is missing stays.

    Raises:
        InputError: sizes that no model can have.
    """
    backbone = dataclasses.replace(config.backbone, **_backbone_sizes(config.backbone, state))
    if isinstance(config, MaskRCNNConfig):
        return dataclasses.replace(config, backbone=backbone, **_mask_rcnn_sizes(state))
    return dataclasses.replace(config, backbone=backbone, **_upernet_sizes(config, state))


def num_classes_of(state: State, head: str) -> int | None:
    """How many classes the head's last layers have."""
    if head == "upernet":
        return _size(state, "decode_head.conv_seg.weight", 0)
    with_background = _size(state, "roi_head.bbox_head.fc_cls.weight", 0)
    if with_background is None:
        return _size(state, "roi_head.mask_head.conv_logits.weight", 0)
    return with_background - 1


def pos_grid_of(state: State, prefix: str = _VIT) -> int | None:
    """Side of the square position grid, class and distillation token not counted."""
    tokens = _size(state, prefix + "pos_embed", 1)
    for extra in (0, 1, 2):
        if tokens and math.isqrt(max(tokens - extra, 0)) ** 2 == tokens - extra:
            return math.isqrt(tokens - extra)
    return None


def _backbone_sizes(base: BackboneConfig, state: State) -> dict[str, Any]:
    width = _size(state, _VIT + "patch_embed.proj.weight", 0) or base.embed_dim
    cascade = "backbone.interactions.0.injector."
    hidden = _size(state, cascade + "reduce.weight", 0)
    parts = _count(state, cascade + "blocks.")
    part = hidden // parts if hidden and parts else None
    sizes: dict[str, Any] = {
        "embed_dim": width,
        "depth": _count(state, _VIT + "blocks."),
        "patch_size": _size(state, _VIT + "patch_embed.proj.weight", 2),
        "mlp_ratio": _ratio(_size(state, _VIT + "blocks.0.mlp.fc1.weight", 0), width, base.mlp_ratio),
        "layer_scale": any(n.startswith(_VIT) and n.endswith(".ls1.gamma") for n in state),
        "pos_grid": pos_grid_of(state),
        "inplanes": _size(state, "backbone.spatial_prior.stem.0.weight", 0),
        "adapter_ratio": _ratio(hidden, width, base.adapter_ratio),
        "adapter_parts": parts,
        "ffn_ratio": _ratio(_size(state, cascade + "blocks.0.ffn.conv1.weight", 0), part, base.ffn_ratio),
    }
    if parts:
        sizes["shared_norm"] = not any(".ffn_norm." in n for n in state)
    return {key: value for key, value in sizes.items() if value is not None}


def _mask_rcnn_sizes(state: State) -> dict[str, Any]:
    sizes = {
        "num_classes": num_classes_of(state, "mask-rcnn"),
        "fpn_channels": _size(state, "neck.lateral_convs.0.conv.weight", 0),
        "fc_channels": _size(state, "roi_head.bbox_head.shared_fcs.0.weight", 0),
        "mask_channels": _size(state, "roi_head.mask_head.convs.0.conv.weight", 0),
    }
    return {key: value for key, value in sizes.items() if value is not None}


def _upernet_sizes(base: UPerNetConfig, state: State) -> dict[str, Any]:
    scales = _count(state, "decode_head.psp_modules.")
    if scales not in (None, len(base.pool_scales)):
        raise InputError(
            f"{scales} pooling scales, and shapes don't tell which (the zoo's are {base.pool_scales})"
        )
    sizes = {
        "num_classes": num_classes_of(state, "upernet"),
        "channels": _size(state, "decode_head.conv_seg.weight", 1),
    }
    return {key: value for key, value in sizes.items() if value is not None}


def _size(state: State, name: str, axis: int) -> int | None:
    tensor = state.get(name)
    return tensor.shape[axis] if tensor is not None and tensor.ndim > axis else None


def _count(state: State, prefix: str) -> int | None:
    """How many numbers follow `prefix`."""
    number = re.compile(re.escape(prefix) + r"(\d+)\.")
    found = {match[1] for name in state if (match := number.match(name))}
    return len(found) or None


def _ratio(part: int | None, whole: int | None, usual: float) -> float | None:
    """The ratio r for which int(whole * r) is `part`; `usual` where it is one."""
    if not part or not whole:
        return None
    if max(1, int(whole * usual)) == part:
        return usual
    ratio = part / whole
    return ratio if int(whole * ratio) == part else math.nextafter(ratio, math.inf)
