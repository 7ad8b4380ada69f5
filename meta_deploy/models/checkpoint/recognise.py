"""What a state dict is of: a backbone and a head of ours, a plain ViT, or a model that we can only name."""

from __future__ import annotations

from typing import NoReturn

from meta_deploy.models.backbones.backbone import BACKBONES, Backbone
from meta_deploy.models.checkpoint.file import first_few, refuse
from meta_deploy.models.checkpoint.foreign import describe, foreign_adapter, foreign_detector, head_title
from meta_deploy.models.checkpoint.plain_vit import models_of_width
from meta_deploy.models.checkpoint.read import Checkpoint
from meta_deploy.models.checkpoint.vit_names import width_of_vit
from meta_deploy.models.heads.head import HEADS, Head
from meta_deploy.models.registry import NAMES_IN_SHORT
from meta_deploy.models.shapes import State, without_prefix

ALLOW = "--allow-partial (allow_partial=True)"


def find_backbone(state: State) -> Backbone | None:
    """The registered backbone that these tensors are of, complete or not."""
    part = without_prefix(state, "backbone.")
    return next((backbone for backbone in BACKBONES.values() if backbone.recognise(part)), None)


def find_head(state: State) -> Head | None:
    """The registered head, by names; None where there is none or more than one."""
    heads = [head for head in HEADS.values() if head.recognise(state)]
    return heads[0] if len(heads) == 1 else None


def width_of(state: State, backbone: Backbone) -> int | None:
    """The backbone's width."""
    return backbone.width(without_prefix(state, "backbone."))


def nearest_model(state: State, backbone: Backbone) -> str | None:
    """The model that these tensors are most like; None where width or head is none that we know."""
    head, size = find_head(state), backbone.size_of_width(width_of(state, backbone))
    return f"{backbone.name}-{size}-{head.name}" if head and size else None


def refuse_foreign(checkpoint: Checkpoint) -> NoReturn:
    """Say what a checkpoint is that none of our models can take.

    Raises:
        CheckpointError: always.
    """
    state, path = checkpoint.state, checkpoint.path
    what = foreign_adapter(state) or foreign_detector(state)
    if what is None and (backbone := find_backbone(state)) and head_title(state):
        what = describe(backbone.title, state)
    if what is not None:
        titles = " or ".join(backbone.title for backbone in BACKBONES.values())
        refuse(
            path,
            f"is {what}; not supported, give a {titles} model (of a plain ViT) with the head "
            f"{', '.join(sorted(HEADS))}",
        )
    if (width := width_of_vit(state)) is not None:
        refuse(
            path,
            f"holds a ViT of width {width} without an adapter and a head; give it as --backbone-ckpt, and "
            f"name a model around it with --model{models_of_width(width)}",
        )
    refuse(
        path,
        f"is of no supported model: it holds {len(state)} tensors ({first_few(list(state))}); supported are "
        f"{NAMES_IN_SHORT}; what is pretrained alone is given by --backbone-ckpt",
    )
