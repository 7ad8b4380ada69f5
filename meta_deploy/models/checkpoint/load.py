"""Checkpoints: read one, tell which model it is, load it. Only `CheckpointError` comes out.

Nothing in a file is trusted or run. `load_model` is the order: read.py (file.py, unwrap.py), recognise.py
(foreign.py), configure.py, adapt.py. Knows neither ONNX nor TensorRT.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from meta_deploy.errors import CheckpointError, InputError
from meta_deploy.models.backbones.vit import VisionTransformer
from meta_deploy.models.checkpoint.adapt import (
    COUNTER,
    HARMLESS_IN_MODEL,
    HARMLESS_IN_VIT,
    LoadReport,
    compare,
    fit_pos_embed,
    fuse_qkv,
)
from meta_deploy.models.checkpoint.configure import choose_config, config_around_vit
from meta_deploy.models.checkpoint.file import first_few, one_line, refuse, shown
from meta_deploy.models.checkpoint.foreign import foreign_adapter
from meta_deploy.models.checkpoint.read import Checkpoint, read_candidates, read_checkpoint
from meta_deploy.models.checkpoint.recognise import (
    ALLOW,
    find_backbone,
    models_of_width,
    refuse_foreign,
    vit_prefix,
)
from meta_deploy.models.heads.head import HEADS
from meta_deploy.models.registry import ModelConfig, backbone_of, build_model, get_config
from meta_deploy.models.shapes import without_prefix

MAX_NAME = 200  # characters of a class name
BACKGROUND = ("background", "bg")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and what is known of it."""

    model: nn.Module
    config: ModelConfig
    class_names: list[str]
    report: LoadReport


def load_model(
    path: str | os.PathLike[str],
    model_name: str | None = None,
    allow_partial: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> LoadedModel:
    """A checkpoint's model, ready for inference.

    Args:
        path: the file.
        model_name: a model's name; its settings then go before embedded ones (unless those have the same
            name), but the number of classes and the position grid are the tensors'; without embedded ones
            all that shapes tell is.
        allow_partial: what is missing or does not fit stays at its initialization, what is unexpected is
            left out; otherwise either is an error. At least one tensor must fit.
        log: called with each note for the user, one line each.

    Raises:
        CheckpointError: the file cannot be read, or does not fit.
        InputError: no model has this name.
    """
    if model_name is not None:
        get_config(model_name)  # an unknown name is refused before the file is read
    candidates = read_candidates(path)
    passed_over: list[str] = []
    # In part only if none fits whole: averaged weights without a head do not win over whole plain ones.
    for partial in (False, True) if allow_partial else (False,):
        for candidate in candidates:
            try:
                loaded = _load(candidate.open(), model_name, partial)
            except CheckpointError as error:
                refusal = error
                if not partial:
                    passed_over.append(f"the {candidate.title} are left out: {_reason(error, path)}")
                continue
            if not partial:
                loaded.report.notes[:0] = passed_over
            for note in loaded.report.notes:
                log(note)
            return loaded
    raise refusal


def _load(checkpoint: Checkpoint, model_name: str | None, allow_partial: bool) -> LoadedModel:
    """`load_model` with one of a file's states."""
    notes = list(checkpoint.notes)
    if find_backbone(checkpoint.state):
        config, decisions = choose_config(checkpoint, model_name, allow_partial)
        notes += decisions
        model, report = _load_all(checkpoint, config, allow_partial)
    elif vit_prefix(checkpoint.state) is not None and not foreign_adapter(checkpoint.state):
        config = config_around_vit(checkpoint, model_name, allow_partial)
        model, report = _load_around_vit(checkpoint, config)
    else:
        refuse_foreign(checkpoint)
    names, decisions = _class_names(checkpoint, config)
    report.notes.extend(notes + decisions + _summary(report, model))
    return LoadedModel(model.eval(), config, names, report)


def _reason(error: CheckpointError, path: str | os.PathLike[str]) -> str:
    """What a refusal says of the file, without what to do about it."""
    return str(error).removeprefix(f"checkpoint '{shown(path, 300)}' ").split(";")[0]


def _load_all(
    checkpoint: Checkpoint, config: ModelConfig, allow_partial: bool
) -> tuple[nn.Module, LoadReport]:
    """Build the model of `config` and fill it."""
    path, name = checkpoint.path, shown(config.name)
    with torch.device("meta"):  # names and shapes only: nothing is allocated before they are known to fit
        model = _build(config, path)
    vit = _vit_name(config)
    state, resized = fit_pos_embed(checkpoint.state, model.state_dict(), vit)
    report = compare(model.state_dict(), state, HARMLESS_IN_MODEL, vit)
    report.resized.extend(resized)
    if report.problems() and not allow_partial:
        refuse(
            path,
            f"does not fit {name}: {report.problems()}; name the right model with --model, or pass {ALLOW} "
            "to load what fits",
        )
    if not report.loaded:
        refuse(path, f"has nothing that fits {name}; name the right model with --model")
    values = {name: state[name].clone() for name in report.loaded}
    if not report.complete:
        model = _build(config, path)
        model.load_state_dict(values, strict=False)
        return model, report
    for name, value in model.state_dict().items():
        if name not in values:
            values[name] = torch.zeros(value.shape, dtype=value.dtype)  # a batch norm's counter
    model.load_state_dict(values, assign=True)
    return model, report


def _build(config: ModelConfig, path: Path) -> nn.Module:
    try:
        return build_model(config)
    except Exception as error:  # an embedded configuration can ask for anything
        refuse(path, f"embeds a configuration of which no model can be built: {one_line(error)}", error)


def _load_around_vit(checkpoint: Checkpoint, config: ModelConfig) -> tuple[nn.Module, LoadReport]:
    """A freshly initialized model with the checkpoint's ViT in it."""
    model = build_model(config)
    part = load_vit_weights(model, checkpoint)
    vit = _vit_name(config)
    loaded = {vit + name for name in part.loaded}
    report = replace(
        part,
        loaded=sorted(loaded),
        missing=[n for n in model.state_dict() if n not in loaded and not n.endswith(COUNTER)],
        resized=[vit + name for name in part.resized],
    )
    return model, report


def _vit_name(config: ModelConfig) -> str:
    """What stands before the names of the ViT inside of a model."""
    return f"backbone.{backbone_of(config).vit or ''}"


def load_vit_weights(model: nn.Module, checkpoint: Checkpoint | str | os.PathLike[str]) -> LoadReport:
    """Load plain ViT weights in timm's naming (DeiT, AugReg, DINO) into the ViT part of `model`, in place.

    Class token, final norm and classifier are dropped, separate q, k and v are fused, and the position
    embedding is resized to the model's grid.

    Raises:
        CheckpointError: not a ViT, or one of other size or kind.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    vit = next((m for m in model.modules() if isinstance(m, VisionTransformer)), None)
    if vit is None:
        raise InputError(f"{type(model).__name__} has no ViT to load weights into; give a model with a ViT.")
    prefix = vit_prefix(checkpoint.state)
    if prefix is None:
        refuse_foreign(checkpoint)
    state = fuse_qkv(without_prefix(checkpoint.state, prefix))
    state, resized = fit_pos_embed(state, vit.state_dict(), "")
    report = compare(vit.state_dict(), state, HARMLESS_IN_VIT)
    report.resized.extend(resized)
    if report.problems():
        width = state["patch_embed.proj.weight"].shape[0]
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        refuse(
            checkpoint.path,
            f"holds a ViT of width {width} and depth {depth}, which does not fit the model's (width "
            f"{vit.pos_embed.shape[2]}, depth {len(vit.blocks)}): {report.problems()}; choose the model of "
            f"that size{models_of_width(width)}",
        )
    vit.load_state_dict({name: state[name] for name in report.loaded}, strict=False)
    return report


def _class_names(checkpoint: Checkpoint, config: ModelConfig) -> tuple[list[str], list[str]]:
    """The checkpoint's class names where they can be used, else the usual data set's; and notes."""
    names, notes = checkpoint.class_names, []
    if names is not None and len(names) == config.num_classes + 1:
        names = _without_background(names)
    if names is not None and len(names) != config.num_classes:
        notes.append(f"{len(names)} class names for {config.num_classes} classes: not used")
    elif names is not None and not all(map(_is_name, names)):
        notes.append(f"class names that are empty, over {MAX_NAME} characters or not printable: not used")
    elif names is not None:
        return [name.strip() for name in names], notes
    usual = HEADS[config.head].class_names
    if len(usual) == config.num_classes:
        notes.append(
            f"no class names in the checkpoint: with {len(usual)} classes they are taken for the usual ones "
            f"({first_few(list(usual))})"
        )
        return list(usual), notes
    return [f"class {i}" for i in range(config.num_classes)], notes


def _without_background(names: list[str]) -> list[str]:
    """Class names without a background at either end, which trainers count or do not count as a class."""
    if names[0].strip(" _").lower() in BACKGROUND:
        return names[1:]
    return names[:-1] if names[-1].strip(" _").lower() in BACKGROUND else names


def _is_name(name: str) -> bool:
    return len(name.strip()) > 0 and len(name) <= MAX_NAME and name.isprintable()


def _summary(report: LoadReport, model: nn.Module) -> list[str]:
    """What of the checkpoint was changed or left out, for the user."""
    notes = []
    if report.resized:
        grid = round(model.state_dict()[report.resized[0]].shape[1] ** 0.5)
        notes.append(f"position embedding resized to {grid}x{grid}")
    if report.ignored:
        notes.append(f"{len(report.ignored)} tensors not needed: {first_few(report.ignored)}")
    if report.problems():
        notes.append(f"partly loaded ({len(report.loaded)} tensors): {report.problems()}")
    return notes
