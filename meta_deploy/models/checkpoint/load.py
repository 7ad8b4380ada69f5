"""Checkpoints: read one, tell which model it is, load it. Only `CheckpointError` comes out.

Nothing in a file is trusted or run. `load_model` is the order: read.py (file.py, unwrap.py), recognise.py
(foreign.py), configure.py, adapt.py; plain_vit.py (vit_names.py) for a ViT from a file of its own. Knows
neither ONNX nor TensorRT.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meta_deploy.errors import CheckpointError, InputError
from meta_deploy.models.checkpoint.adapt import (
    COUNTER,
    HARMLESS_IN_MODEL,
    LoadReport,
    compare,
    fit_pos_embed,
)
from meta_deploy.models.checkpoint.configure import choose_config
from meta_deploy.models.checkpoint.file import first_few, one_line, refuse, shown
from meta_deploy.models.checkpoint.foreign import foreign_adapter
from meta_deploy.models.checkpoint.plain_vit import Classifier, PlainViT, models_of_width, plain_vit
from meta_deploy.models.checkpoint.read import Checkpoint, read_candidates, read_checkpoint
from meta_deploy.models.checkpoint.recognise import ALLOW, find_backbone, refuse_foreign, width_of
from meta_deploy.models.checkpoint.vit_names import width_of_vit
from meta_deploy.models.heads.head import HEADS
from meta_deploy.models.registry import ModelConfig, backbone_of, build_model, get_config

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
    path: str | os.PathLike[str] | None,
    model_name: str | None = None,
    allow_partial: bool = False,
    log: Callable[[str], None] = lambda message: None,
    backbone_ckpt: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """A checkpoint's model, ready for inference.

    Args:
        path: the file; None: a new model around what `backbone_ckpt` holds, the rest of it random.
        model_name: a model's name; its settings then go before embedded ones (unless those have the same
            name), but the number of classes and the position grid are the tensors'; without embedded ones
            all that shapes tell is.
        allow_partial: what is missing or does not fit stays at its initialization, what is unexpected is
            left out; otherwise either is an error. At least one tensor must fit.
        log: called with each note for the user, one line each.
        backbone_ckpt: a file with a plain ViT, whose weights are taken where the checkpoint has none; without
            a checkpoint also what timm publishes for a backbone of its own.

    Raises:
        CheckpointError: a file cannot be read, or does not fit.
        InputError: no model has this name, or it has no plain ViT; nothing is given.
    """
    if model_name is not None:
        get_config(model_name)  # an unknown name is refused before a file is read
    if path is not None:
        vit = None if backbone_ckpt is None else read_vit(backbone_ckpt)
        loaded = _load_best(path, model_name, allow_partial, vit)
    elif backbone_ckpt is not None:
        loaded = _load_around(read_pretrained(backbone_ckpt, model_name), model_name)
    else:
        raise InputError("there is no checkpoint to load; give one, or one for the backbone")
    for note in loaded.report.notes:
        log(note)
    return loaded


def _load_best(
    path: str | os.PathLike[str], model_name: str | None, allow_partial: bool, vit: PlainViT | None
) -> LoadedModel:
    """The first of a file's states that fits."""
    candidates = read_candidates(path)
    passed_over: list[str] = []
    # In part only if none fits whole: averaged weights without a head do not win over whole plain ones.
    for partial in (False, True) if allow_partial else (False,):
        for candidate in candidates:
            try:
                loaded = _load(candidate.open(), model_name, partial, vit)
            except CheckpointError as error:
                refusal = error
                if not partial:
                    passed_over.append(f"the {candidate.title} are left out: {_reason(error, path)}")
                continue
            if not partial:
                loaded.report.notes[:0] = passed_over
            return loaded
    raise refusal


def _load(
    checkpoint: Checkpoint, model_name: str | None, allow_partial: bool, vit: PlainViT | None = None
) -> LoadedModel:
    """`load_model` with one of a file's states."""
    state = checkpoint.state
    if find_backbone(state) is None:
        alone = allow_partial and model_name is not None and vit is None
        if alone and width_of_vit(state) is not None and not foreign_adapter(state):
            return _load_around(plain_vit(state, checkpoint.path, checkpoint.notes), model_name)
        refuse_foreign(checkpoint)
    filled = checkpoint if vit is None else _named_alike(checkpoint, vit)
    config, notes = choose_config(filled, model_name, allow_partial)
    if vit is not None:
        checkpoint, more = _completed(checkpoint, vit, config)
        notes += more
    model, report = _load_all(checkpoint, config, allow_partial)
    names, decisions = _class_names(checkpoint, config)
    report.notes.extend([*checkpoint.notes, *notes, *decisions, *_summary(report, model)])
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
        vit_names = tuple(vit + start for start in ("patch_embed.", "pos_embed", "blocks."))
        if report.problems() == LoadReport(missing=report.missing).problems() and all(
            name.startswith(vit_names) for name in report.missing
        ):
            hint = "give the ViT that it was trained with by --backbone-ckpt"
        else:
            hint = "name the right model with --model"
        refuse(path, f"does not fit {name}: {report.problems()}; {hint}, or pass {ALLOW} to load what fits")
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
    if any(name not in values for name, _ in model.named_buffers()):  # some are computed and not saved
        model = _build(config, path)
        model.load_state_dict(values)
    return model, report


def _build(config: ModelConfig, path: Path) -> nn.Module:
    try:
        return build_model(config)
    except Exception as error:  # an embedded configuration can ask for anything
        refuse(path, f"embeds a configuration of which no model can be built: {one_line(error)}", error)


def _vit_name(config: ModelConfig) -> str:
    """What stands before the names of the ViT inside of a model."""
    return f"backbone.{backbone_of(config).vit or ''}"


# --- a pretrained backbone from a file of its own -----------------------------------------------------------


def read_pretrained(path: str | os.PathLike[str], model_name: str | None) -> PlainViT | Classifier:
    """What a model's backbone can start from: a plain ViT, or a classifier of the library it is from.

    Raises:
        CheckpointError: the file cannot be read, or holds no such thing.
    """
    if model_name is None or backbone_of(get_config(model_name)).adopt is None:
        return read_vit(path)
    checkpoint = read_checkpoint(path)
    return Classifier(checkpoint.path, checkpoint.state, checkpoint.notes)


def read_vit(path: str | os.PathLike[str]) -> PlainViT:
    """The plain ViT in a file: of timm, MAE, DINO, DINOv2 or transformers, or inside of a model of ours.

    Raises:
        CheckpointError: the file cannot be read, or holds no ViT that our backbones can take.
    """
    refusals = []
    for candidate in read_candidates(path):
        try:
            checkpoint = candidate.open()
            return plain_vit(checkpoint.state, checkpoint.path, checkpoint.notes)
        except CheckpointError as error:
            refusals.append(error)
    raise refusals[0]


def load_vit_weights(
    model: nn.Module, pretrained: PlainViT | Classifier | str | os.PathLike[str]
) -> LoadReport:
    """Load a plain ViT, or what `read_pretrained` gave, into a model of ours, in place.

    Raises:
        CheckpointError: not a ViT, or one of other size or kind.
        InputError: the model has none.
    """
    if not isinstance(pretrained, (PlainViT, Classifier)):
        pretrained = read_vit(pretrained)
    config: Any = model.config
    state, notes = pretrained.fitted(config)
    model.load_state_dict(state, strict=False)
    other_grid = isinstance(pretrained, PlainViT) and pretrained.grid != config.backbone.pos_grid
    resized = [_vit_name(config) + "pos_embed"] if other_grid else []
    return LoadReport(
        loaded=sorted(state),
        ignored=list(pretrained.left_out),
        resized=resized,
        notes=[*pretrained.notes, *notes],
    )


def _load_around(pretrained: PlainViT | Classifier, model_name: str | None) -> LoadedModel:
    """A model of which only the ViT, or a backbone of another kind, has weights."""
    if model_name is None:
        assert isinstance(pretrained, PlainViT)
        refuse(
            pretrained.path,
            f"holds a ViT of {pretrained.size} and no adapter and head; name the model around it with --model"
            f"{models_of_width(pretrained.width)}",
        )
    config = pretrained.configure(get_config(model_name))
    model = build_model(config)
    part = load_vit_weights(model, pretrained)
    loaded, sizes = set(part.loaded), {name: p.numel() for name, p in model.named_parameters()}
    every, rest = sum(sizes.values()), sum(size for name, size in sizes.items() if name not in loaded)
    names, _ = _class_names(Checkpoint({}, None, None, pretrained.path), config)
    warning = (
        f"warning: of {config.name} only {'the ViT' if isinstance(pretrained, PlainViT) else 'the backbone'} "
        f"has weights; the rest, {rest / 1e6:.1f} of {every / 1e6:.1f} M parameters, is random, and what it "
        "finds means nothing before it is trained"
    )
    missing = [name for name in model.state_dict() if name not in loaded and not name.endswith(COUNTER)]
    report = replace(part, missing=missing, notes=[*part.notes, warning])
    return LoadedModel(model.eval(), config, names, report)


def _named_alike(checkpoint: Checkpoint, vit: PlainViT) -> Checkpoint:
    """The checkpoint with the ViT's tensors where it has none, as they are: to tell the model by.

    Raises:
        CheckpointError: the ViT is of another width than the checkpoint's backbone.
        InputError: there is no plain ViT in that.
    """
    backbone = backbone_of(checkpoint.config) if checkpoint.config else find_backbone(checkpoint.state)
    assert backbone is not None
    named, width = vit.named(backbone), width_of(checkpoint.state, backbone)
    if width not in (None, vit.width):
        refuse(
            vit.path,
            f"holds a ViT of {vit.size}, and '{shown(checkpoint.path, 300)}' is a {backbone.title} model of "
            f"width {width}; give the ViT that it was trained with",
        )
    return replace(checkpoint, state={**named, **checkpoint.state})


def _completed(checkpoint: Checkpoint, vit: PlainViT, config: ModelConfig) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with the ViT's tensors where it has none, fitted to the model; and notes.

    Raises:
        CheckpointError: it has them all, or the ViT is of another size.
    """
    fitted, notes = vit.fitted(config)
    taken = fitted.keys() - checkpoint.state.keys()
    if not taken:
        refuse(
            checkpoint.path,
            "has the whole ViT, so that nothing is taken of another; leave out --backbone-ckpt",
        )
    notes = [*vit.notes, *notes, f"{len(taken)} of the ViT's {len(fitted)} tensors are taken from it"]
    return replace(checkpoint, state={**fitted, **checkpoint.state}), notes


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
