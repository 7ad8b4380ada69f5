"""The configuration of a checkpoint: the embedded one, the named model's, or what names and shapes tell.

Shapes don't tell everything. Attention heads, windows, stripe width, pooling scales and thresholds are then
those of the named model nearest to the tensors; the notes say so to the user.
"""

from __future__ import annotations

from msgspec.structs import replace

from meta_deploy.errors import InputError
from meta_deploy.models.backbones.backbone import Backbone
from meta_deploy.models.checkpoint.file import refuse, shown
from meta_deploy.models.checkpoint.foreign import head_title
from meta_deploy.models.checkpoint.read import Checkpoint
from meta_deploy.models.checkpoint.recognise import (
    ALLOW,
    find_backbone,
    find_head,
    nearest_model,
    refuse_foreign,
    width_of,
)
from meta_deploy.models.heads.head import HEADS
from meta_deploy.models.registry import ModelConfig, backbone_of, config_to_dict, get_config
from meta_deploy.models.shapes import State, known, without_prefix

GUESSED = "what shapes don't tell (attention heads, windows, thresholds) is that model's"


def choose_config(
    checkpoint: Checkpoint, model_name: str | None, allow_partial: bool
) -> tuple[ModelConfig, list[str]]:
    """The configuration to load a checkpoint of one of our backbones into, and notes on what was decided.

    Raises:
        CheckpointError: the tensors are not the named model's, or don't tell which model they are of.
    """
    embedded, state = checkpoint.config, checkpoint.state
    if embedded is None and not allow_partial and find_head(state) is None and head_title(state):
        refuse_foreign(checkpoint)
    if model_name is None:
        config = infer_config(checkpoint)
        if embedded:
            return config, []
        notes = [f"the tensors look like {config.name} ({_facts(config)}): {GUESSED}"]
        usual = get_config(config.name)
        if (config.mean, config.std) != (usual.mean, usual.std):
            source = "the training's configuration" if checkpoint.normalization else "the ViT's pretraining"
            notes.append(f"mean {_numbers(config.mean)} and std {_numbers(config.std)} are those of {source}")
        return config, notes
    config = _named_config(checkpoint, model_name, allow_partial)
    if embedded is None or embedded.head != config.head:
        return config, []
    return config, [
        f"--model {model_name} overrides what is embedded: {d}" for d in _differ(embedded, config)
    ]


def infer_config(checkpoint: Checkpoint) -> ModelConfig:
    """The embedded configuration, else what names and shapes tell.

    Raises:
        CheckpointError: these are not one of our models' tensors, or not enough of them.
    """
    if checkpoint.config is not None:
        return checkpoint.config
    state, path = checkpoint.state, checkpoint.path
    backbone = find_backbone(state)
    if backbone is None:
        refuse_foreign(checkpoint)
    width, name = width_of(state, backbone), nearest_model(state, backbone)
    if find_head(state) is None:
        refuse(
            path,
            f"holds a {backbone.title} backbone of width {width} without a head that we know; name the model "
            f"with --model and pass {ALLOW}",
        )
    if backbone.settings is not None:
        refuse(
            path,
            f"has a backbone of {backbone.title}, and which one can't be told from shapes; embed the "
            f"configuration (save_checkpoint does) or name it with --model {backbone.name}:NAME-HEAD",
        )
    if name is None:
        refuse(
            path,
            f"has a ViT of width {width}, and its attention heads can't be told from shapes; embed the "
            "configuration (save_checkpoint does) or name the model with --model",
        )
    return _measured(get_config(name), checkpoint, backbone)


def _measured(config: ModelConfig, checkpoint: Checkpoint, backbone: Backbone) -> ModelConfig:
    """`config` with what the checkpoint tells.

    Raises:
        CheckpointError: sizes that no model can have.
    """
    try:
        measured = _with_shapes(config, checkpoint.state)
        return replace(measured, **_normalization(checkpoint, backbone))
    except InputError as error:
        refuse(
            checkpoint.path,
            f"looks like {config.name}, but its shapes don't fit together: {shown(error, 200)}",
            error,
        )


def _normalization(checkpoint: Checkpoint, backbone: Backbone) -> dict[str, tuple[float, ...]]:
    """Mean and std, where the training's configuration or the ViT's pretraining tell them."""
    if checkpoint.normalization is not None:
        return dict(zip(("mean", "std"), checkpoint.normalization, strict=True))
    return backbone.normalization(without_prefix(checkpoint.state, "backbone."))


def _with_shapes(config: ModelConfig, state: State) -> ModelConfig:
    """`config` with everything that shapes tell taken from them; what is missing stays.

    Raises:
        InputError: sizes that no model can have.
    """
    head, part = HEADS[config.head], without_prefix(state, "backbone.")
    return replace(
        config,
        backbone=replace(config.backbone, **backbone_of(config).measure(config.backbone, part)),
        **known(num_classes=head.num_classes(state)),
        **head.measure(config, state),
    )


def _named_config(checkpoint: Checkpoint, model_name: str, allow_partial: bool) -> ModelConfig:
    """The named model's settings, but the checkpoint's number of classes, position grid, mean and std.

    Where nothing is embedded and the tensors are of that backbone and head, all that they tell is theirs.
    """
    state, wanted, head = checkpoint.state, get_config(model_name), find_head(checkpoint.state)
    backbone = backbone_of(wanted)
    same_width = find_backbone(state) is backbone and width_of(state, backbone) == wanted.backbone.width
    same_head = head is HEADS[wanted.head]
    if not same_width or not (same_head or allow_partial):
        refuse(
            checkpoint.path,
            f"does not fit {model_name}: its tensors look like {_look(state, backbone)}; leave out --model, "
            "or name the one that the checkpoint is of",
        )
    if checkpoint.config is not None and checkpoint.config.name == model_name:
        return checkpoint.config
    classes = head.num_classes(state) if head is not None and same_head else None
    try:
        config = get_config(model_name, classes)
    except InputError as error:
        refuse(checkpoint.path, f"has a head of {classes} classes; take another checkpoint", error)
    if checkpoint.config is None and same_head and not allow_partial:
        return _measured(config, checkpoint, backbone)
    measured = backbone.measure(config.backbone, without_prefix(state, "backbone."))
    grid = {key: measured[key] for key in ("pos_grid",) if key in measured}
    backbone_config = replace(config.backbone, **grid)
    return replace(config, backbone=backbone_config, **_normalization(checkpoint, backbone))


def _look(state: State, wanted: Backbone) -> str:
    backbone, head = find_backbone(state) or wanted, find_head(state)
    width = width_of(state, backbone)
    return nearest_model(state, backbone) or (
        f"a {backbone.title} model{f' of width {width}' if width else ''} with head "
        f"{head.name if head else 'unknown'}"
    )


def _facts(config: ModelConfig) -> str:
    """What of a configuration is not the named model's, and its classes, as "num_classes 80, pos_grid 24"."""
    usual, own = (
        {**data, **data["backbone"]}
        for data in (config_to_dict(get_config(config.name)), config_to_dict(config))
    )
    said = {k: v for k, v in own.items() if k not in ("backbone", "mean", "std") and v != usual.get(k)}
    return ", ".join(
        f"{key} {shown(value)}" for key, value in ({"num_classes": config.num_classes} | said).items()
    )


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _differ(old: ModelConfig, new: ModelConfig) -> list[str]:
    """The settings that differ, as "window 7 -> 14"."""
    flat = [{**config_to_dict(c), **config_to_dict(c)["backbone"]} for c in (old, new)]
    return [
        f"{key} {shown(flat[0][key])} -> {value}"
        for key, value in flat[1].items()
        if key not in ("backbone", "name") and flat[0].get(key) != value
    ]
