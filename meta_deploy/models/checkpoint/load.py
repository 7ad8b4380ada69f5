"""Checkpoints: read one, tell which model it is, load it, write one. Only `CheckpointError` comes out.

Nothing in a file is trusted or run. Bytes are read in `checkpoint_file`, trainers' nests are unwrapped in
`checkpoint_nests`, configurations are inferred in `checkpoint_infer`. Knows neither ONNX nor TensorRT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from meta_deploy.errors import CheckpointError, InputError
from meta_deploy.models.backbones.vit import VisionTransformer, resize_pos_embed
from meta_deploy.models.checkpoint import infer
from meta_deploy.models.checkpoint.file import first_few, read_file, refuse, shown
from meta_deploy.models.checkpoint.unwrap import find_class_names, find_weights, plain_weights
from meta_deploy.models.class_names import default_class_names
from meta_deploy.models.registry import (
    MODEL_NAMES,
    ModelConfig,
    build_model,
    config_from_dict,
    config_to_dict,
    get_config,
)

_ALLOW = "--allow-partial (allow_partial=True)"
_VIT = "backbone.vit."
_COUNTER = "num_batches_tracked"  # of batch norms; nothing at inference depends on it
# What trainers and classifiers leave beside the weights of interest; dropped without an error.
_HARMLESS_PREFIXES = ("auxiliary_head.", "data_preprocessor.", "ema_", "head.", "norm.", "fc_norm.")
_HARMLESS_IN_VIT = (
    *("cls_token", "dist_token", "mask_token", "norm.", "fc_norm.", "head.", "head_dist.", "pre_logits."),
)
_temporaries = itertools.count()


MAX_NAME = 200  # characters of a class name


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, unwrapped.

    Attributes:
        state: name -> tensor, on the CPU, floating-point ones float32 and finite.
        config: what our own trainer embedded, or None.
        class_names: as the trainer saved them, or None.
        path: where it came from.
        notes: what was decided on the way, for the user.
    """

    state: dict[str, Tensor]
    config: ModelConfig | None
    class_names: list[str] | None
    path: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadReport:
    """What of a checkpoint went where; lists hold every name.

    Attributes:
        loaded: names in model and checkpoint, of the same shape.
        missing: in the model only; these stay at their initialization.
        mismatched: of another shape or type, as "name: 80x4 instead of 81x4"; initialization, too.
        unexpected: in the checkpoint only, and not known to be harmless.
        ignored: in the checkpoint only, known to be harmless.
        resized: position embeddings fitted to the model's grid.
        notes: decisions, for the user.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every tensor of the model was loaded."""
        return not self.missing and not self.mismatched

    def problems(self) -> str:
        """Counts and first names of what does not match, in one line; empty where everything does."""
        kinds = (
            ("missing", self.missing),
            ("of the wrong shape", self.mismatched),
            ("unexpected", self.unexpected),
        )
        return ", ".join(f"{len(names)} {kind} ({first_few(names)})" for kind, names in kinds if names)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and what is known of it."""

    model: nn.Module
    config: ModelConfig
    class_names: list[str]
    report: LoadReport


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read .pth, .pt, .bin or .safetensors, told apart by content; averaged (EMA) weights are preferred.

    Raises:
        CheckpointError: absent, not a checkpoint, damaged, naming code, without tensors, or with NaN in them.
    """
    raw, metadata = read_file(path)
    tensors, notes = find_weights(raw, path)
    if not tensors:
        refuse(path, f"holds no tensors by name (it holds {_contents(raw)}); save model.state_dict()")
    if any(name.startswith(("interactions.", "spatial_prior.")) for name in tensors):
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    own = {**_parse_metadata(metadata), **(raw if isinstance(raw, Mapping) and not metadata else {})}
    return Checkpoint(
        state=plain_weights(tensors, path),
        config=_embedded_config(own.get("config"), len(tensors), path),
        class_names=find_class_names(own),
        path=Path(path),
        notes=tuple(notes),
    )


def infer_config(checkpoint: Checkpoint) -> ModelConfig:
    """The embedded configuration, else what names and shapes tell.

    Shapes don't tell attention heads, windows, stripe width and thresholds: those are the zoo's for this
    width and head.

    Raises:
        CheckpointError: these are not one of our models' tensors, or not enough of them.
    """
    if checkpoint.config is not None:
        return checkpoint.config
    state, path = checkpoint.state, checkpoint.path
    if not infer.is_meta_model(state):
        _refuse_foreign(checkpoint)
    name, width = infer.zoo_name(state), state[_VIT + "patch_embed.proj.weight"].shape[0]
    if infer.head_of(state) is None:
        refuse(
            path,
            f"holds a META backbone of width {width} without a head that we know; name the model with "
            f"--model and pass {_ALLOW}",
        )
    if name is None:
        refuse(
            path,
            f"has a ViT of width {width}, and its attention heads can't be told from shapes; embed the "
            "configuration (models.checkpoint.save_checkpoint does) or name the model with --model",
        )
    try:
        return infer.with_shapes(get_config(name), state)
    except InputError as error:
        refuse(path, f"looks like {name}, but its shapes don't fit together: {shown(error, 200)}", error)


def load_model(
    path: str | os.PathLike[str],
    model_name: str | None = None,
    allow_partial: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> LoadedModel:
    """A checkpoint's model, ready for inference.

    Args:
        path: the file.
        model_name: a zoo name; its settings then go before embedded ones (unless those have the same name),
            but the number of classes and the position grid are the tensors'.
        allow_partial: what is missing or does not fit stays at its initialization, what is unexpected is
            left out; otherwise either is an error. At least one tensor must fit.
        log: called with each note for the user, one line each.

    Raises:
        CheckpointError: the file cannot be read, or does not fit.
        InputError: no model has this name.
    """
    if model_name is not None:
        get_config(model_name)
    checkpoint = read_checkpoint(path)
    if infer.is_meta_model(checkpoint.state):
        config, notes = _choose_config(checkpoint, model_name, allow_partial)
        model, report = _load_meta(checkpoint, config, allow_partial)
    elif infer.vit_prefix(checkpoint.state) is not None:
        config, notes = _config_around_vit(checkpoint, model_name, allow_partial), []
        model, report = _load_around_vit(checkpoint, config)
    else:
        _refuse_foreign(checkpoint)
    names = checkpoint.class_names
    if names is not None and len(names) != config.num_classes:
        notes.append(f"{len(names)} class names for {config.num_classes} classes: not used")
        names = None
    if names is not None and not all(map(_is_name, names)):
        notes.append(f"class names that are empty, over {MAX_NAME} characters or not printable: not used")
        names = None
    if report.resized:
        notes.append(f"position embedding resized to {config.backbone.pos_grid}x{config.backbone.pos_grid}")
    if report.ignored:
        notes.append(f"{len(report.ignored)} tensors not needed: {first_few(report.ignored)}")
    if report.problems():
        notes.append(f"partly loaded ({len(report.loaded)} tensors): {report.problems()}")
    report.notes.extend([*checkpoint.notes, *notes])
    for note in report.notes:
        log(note)
    names = names or default_class_names(config.head, config.num_classes)
    return LoadedModel(model.eval(), config, names, report)


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
        raise InputError(f"{type(model).__name__} has no ViT to load weights into; give a model of the zoo.")
    prefix = infer.vit_prefix(checkpoint.state)
    if prefix is None:
        _refuse_foreign(checkpoint)
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.state.items()
        if name.startswith(prefix)
    }
    state, resized = _fit_pos_embed(_fuse_qkv(state), "", round(vit.pos_embed.shape[1] ** 0.5))
    report = _compare(vit.state_dict(), state, _HARMLESS_IN_VIT)
    report.resized.extend(resized)
    if report.problems():
        width = state["patch_embed.proj.weight"].shape[0]
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        refuse(
            checkpoint.path,
            f"holds a ViT of width {width} and depth {depth}, which does not fit the model's (width "
            f"{vit.pos_embed.shape[2]}, depth {len(vit.blocks)}): {report.problems()}; choose the model of "
            f"that size{_of_size(width)}",
        )
    vit.load_state_dict({name: state[name] for name in report.loaded}, strict=False)
    return report


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    config: ModelConfig,
    class_names: list[str] | tuple[str, ...] | None = None,
) -> None:
    """Write weights, configuration and class names, whole or not at all; .safetensors or .pth by suffix.

    Raises:
        CheckpointError: the file cannot be written, or its suffix is none of a checkpoint.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt", ".bin", ".safetensors"):
        refuse(path, "cannot be written: its suffix tells no format; use .pth or .safetensors")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    names = list(class_names) if class_names is not None else None
    temporary = path.with_name(f".tmp-{os.getpid()}-{next(_temporaries)}{path.suffix}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            metadata = {"format": "pt", "config": json.dumps(config_to_dict(config))}
            save_file(state, temporary, metadata | ({"classes": json.dumps(names)} if names else {}))
        else:
            data: dict[str, Any] = {"model": state, "config": config_to_dict(config)}
            torch.save(data | ({"classes": names} if names else {}), temporary)
        os.replace(temporary, path)
    except Exception as error:  # OSError, or what torch and safetensors make of it
        refuse(path, f"cannot be written: {_one_line(error)}; free space or choose another place", error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# --- reading ------------------------------------------------------------------------------------------------


def _parse_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for key in ("config", "classes", "class_names"):
        # Other tools put other text under such names; what is not JSON is not ours.
        with contextlib.suppress(ValueError, RecursionError):
            parsed[key] = json.loads(metadata.get(key, ""))
    return parsed


def _embedded_config(data: Any, tensors: int, path: str | os.PathLike[str]) -> ModelConfig | None:
    """Our own trainer's configuration; other trainers' `config` is none of ours."""
    if not isinstance(data, Mapping) or not {"head", "backbone"} <= set(data):
        return None
    try:
        config = config_from_dict(dict(data))
        depths = (config.backbone.depth, config.backbone.adapter_parts)
    except Exception as error:  # untrusted: any type can stand in any field
        refuse(path, f"embeds a configuration that can't be read: {_one_line(error)}", error)
    if max(depths) > tensors:
        refuse(path, f"embeds a configuration with more blocks ({max(depths)}) than tensors ({tensors})")
    return config


def _contents(raw: Any) -> str:
    if isinstance(raw, Mapping):
        return f"a dict of {first_few([str(key) for key in raw])}"
    return f"a {type(raw).__name__}"


def _is_name(name: str) -> bool:
    return len(name.strip()) > 0 and len(name) <= MAX_NAME and name.isprintable()


def _one_line(error: BaseException) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__, 160).rstrip(".")


# --- choosing the configuration -----------------------------------------------------------------------------


def _choose_config(
    checkpoint: Checkpoint, model_name: str | None, allow_partial: bool
) -> tuple[ModelConfig, list[str]]:
    """The configuration to load into, and notes on what was decided."""
    embedded, state = checkpoint.config, checkpoint.state
    if model_name is None:
        config = infer_config(checkpoint)
        if embedded is not None:
            return config, []
        return config, [f"the tensors look like {config.name}: {infer.GUESSED}"]
    wanted = get_config(model_name)
    head, width = infer.head_of(state), state[_VIT + "patch_embed.proj.weight"].shape[0]
    same_width = width == wanted.backbone.embed_dim
    if not same_width or (head != wanted.head and not allow_partial):
        actual = infer.zoo_name(state) or f"a META model of width {width} with head {head or 'unknown'}"
        refuse(
            checkpoint.path,
            f"does not fit {model_name}: its tensors look like {actual}; leave out --model, or name the "
            "one that the checkpoint is of",
        )
    if embedded is not None and embedded.name == model_name:
        return embedded, []
    grid = infer.pos_grid_of(state) or wanted.backbone.pos_grid
    classes = infer.num_classes_of(state, wanted.head) if head == wanted.head else None
    try:
        config = get_config(model_name, classes)
    except InputError as error:
        refuse(checkpoint.path, f"has a head of {classes} classes; take another checkpoint", error)
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, pos_grid=grid))
    if embedded is None or embedded.head != config.head:
        return config, []
    return config, [
        f"--model {model_name} overrides what is embedded: {d}" for d in _differ(embedded, config)
    ]


def _differ(old: ModelConfig, new: ModelConfig) -> list[str]:
    """The settings that differ, as "window 7 -> 14"."""
    flat = [{**config_to_dict(c), **config_to_dict(c)["backbone"]} for c in (old, new)]
    return [
        f"{key} {shown(flat[0][key])} -> {value}"
        for key, value in flat[1].items()
        if key not in ("backbone", "name") and flat[0].get(key) != value
    ]


def _refuse_foreign(checkpoint: Checkpoint) -> NoReturn:
    names = list(checkpoint.state)
    if (prefix := infer.vit_prefix(checkpoint.state)) is not None:
        width = checkpoint.state[prefix + "patch_embed.proj.weight"].shape[0]
        refuse(
            checkpoint.path,
            f"holds a ViT backbone of width {width} without META's adapter and head; train the whole model"
            f"{_of_size(width)}, or name one with --model and pass {_ALLOW} to leave the rest random",
        )
    refuse(
        checkpoint.path,
        f"is of no supported model: it holds {len(names)} tensors ({first_few(names)}); supported are "
        f"{', '.join(MODEL_NAMES)}, and plain ViTs in timm's naming",
    )


def _of_size(width: int) -> str:
    size = infer.zoo_size(width)
    return f" (meta-{size}-...)" if size else ""


def _config_around_vit(checkpoint: Checkpoint, model_name: str | None, allow_partial: bool) -> ModelConfig:
    if model_name is None or not allow_partial:
        _refuse_foreign(checkpoint)
    config = get_config(model_name)
    layer_scale = any(name.endswith((".ls1.gamma", ".gamma_1")) for name in checkpoint.state)
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, layer_scale=layer_scale))


# --- loading ------------------------------------------------------------------------------------------------


def _load_meta(
    checkpoint: Checkpoint, config: ModelConfig, allow_partial: bool
) -> tuple[nn.Module, LoadReport]:
    """Build the model of `config` and fill it."""
    path = checkpoint.path
    state, resized = _fit_pos_embed(checkpoint.state, _VIT, config.backbone.pos_grid)
    with torch.device("meta"):  # names and shapes only: nothing is allocated before they are known to fit
        model = _build(config, path)
    report = _compare(model.state_dict(), state, _HARMLESS_PREFIXES)
    report.resized.extend(resized)
    if report.problems() and not allow_partial:
        refuse(
            path,
            f"does not fit {shown(config.name)}: {report.problems()}; name the right model with --model, or "
            f"pass {_ALLOW} to load what fits",
        )
    if not report.loaded:
        refuse(path, f"has nothing that fits {shown(config.name)}; name the right model with --model")
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
        refuse(path, f"embeds a configuration of which no model can be built: {_one_line(error)}", error)


def _load_around_vit(checkpoint: Checkpoint, config: ModelConfig) -> tuple[nn.Module, LoadReport]:
    """A freshly initialized model with the checkpoint's ViT in it."""
    model = build_model(config)
    part = load_vit_weights(model, checkpoint)
    loaded = {_VIT + name for name in part.loaded}
    report = dataclasses.replace(
        part,
        loaded=sorted(loaded),
        missing=[n for n in model.state_dict() if n not in loaded and not n.endswith(_COUNTER)],
        resized=[_VIT + name for name in part.resized],
    )
    return model, report


def _compare(
    expected: Mapping[str, Tensor], state: dict[str, Tensor], harmless: tuple[str, ...]
) -> LoadReport:
    report = LoadReport()
    for name, wanted in expected.items():
        if name not in state:
            if not name.endswith(_COUNTER):
                report.missing.append(name)
        elif name.endswith(_COUNTER) and state[name].shape != wanted.shape:
            report.ignored.append(name)
        elif state[name].shape != wanted.shape:
            report.mismatched.append(f"{name}: {_dims(state[name])} instead of {_dims(wanted)}")
        elif state[name].is_floating_point() != wanted.is_floating_point():
            report.mismatched.append(f"{name}: {state[name].dtype} instead of {wanted.dtype}")
        else:
            report.loaded.append(name)
    for name, tensor in state.items():
        if name not in expected:
            known = name.startswith(harmless) or name.removeprefix(_VIT).startswith(_HARMLESS_IN_VIT)
            (report.ignored if known or tensor.ndim == 0 else report.unexpected).append(name)
    return report


def _dims(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"


def _fit_pos_embed(state: dict[str, Tensor], prefix: str, grid: int) -> tuple[dict[str, Tensor], list[str]]:
    """Drop the class token's position and resize the grid; what can't be fitted stays, and won't match."""
    name = prefix + "pos_embed"
    embed, own_grid = state.get(name), infer.pos_grid_of(state, prefix)
    if embed is None or embed.ndim != 3 or embed.shape[0] != 1 or not own_grid:
        return state, []
    positions = embed[:, embed.shape[1] - own_grid**2 :]
    if own_grid == grid:
        return {**state, name: positions}, []
    if not 0 < grid <= 1024 or not embed.is_floating_point():
        return state, []
    resized = resize_pos_embed(positions, (grid, grid)).flatten(2).transpose(1, 2).contiguous()
    return {**state, name: resized}, [name]


def _fuse_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate q, k, v projections (and BEiT's biases) to timm's `qkv`; LayerScale's older names too."""
    fused = dict(state)
    for name in state:
        block, _, last = name.rpartition(".attn.")
        attn = block + ".attn."
        for kind in ("weight", "bias"):
            parts = [attn + f"{part}.{kind}" for part in "qkv"]
            if last == f"q.{kind}" and all(part in fused for part in parts):
                fused[attn + f"qkv.{kind}"] = torch.cat([fused.pop(part) for part in parts])
        if last == "q_bias" and attn + "v_bias" in fused:
            q, v = fused.pop(attn + "q_bias"), fused.pop(attn + "v_bias")
            fused[attn + "qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        for old, new in (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")):
            if name.endswith("." + old):
                fused[name.removesuffix(old) + new] = fused.pop(name)
    return fused


__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "LoadedModel",
    "infer_config",
    "load_model",
    "load_vit_weights",
    "read_checkpoint",
    "save_checkpoint",
]
