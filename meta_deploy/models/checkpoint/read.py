"""A checkpoint file to plain tensors by name, and what its trainer wrote beside them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from meta_deploy.models.backbones.backbone import BACKBONES
from meta_deploy.models.checkpoint.file import first_few, one_line, read_file, refuse
from meta_deploy.models.checkpoint.unwrap import find_class_names, find_weights, plain_weights
from meta_deploy.models.registry import ModelConfig, config_from_dict


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


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read .pth, .pt, .bin or .safetensors, told apart by content; averaged (EMA) weights are preferred.

    Raises:
        CheckpointError: absent, not a checkpoint, damaged, naming code, without tensors, or with NaN in them.
    """
    raw, metadata = read_file(path)
    tensors, notes = find_weights(raw, path)
    if not tensors:
        refuse(path, f"holds no tensors by name (it holds {_contents(raw)}); save model.state_dict()")
    if any(backbone.recognise(tensors) for backbone in BACKBONES.values()):  # saved without the rest
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    own = {**_parse_metadata(metadata), **(raw if isinstance(raw, Mapping) and not metadata else {})}
    return Checkpoint(
        state=plain_weights(tensors, path),
        config=_embedded_config(own.get("config"), len(tensors), path),
        class_names=find_class_names(own),
        path=Path(path),
        notes=tuple(notes),
    )


def _contents(raw: Any) -> str:
    if isinstance(raw, Mapping):
        return f"a dict of {first_few([str(key) for key in raw])}"
    return f"a {type(raw).__name__}"


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
        config = config_from_dict(data)
        blocks = config.backbone.blocks
    except Exception as error:  # untrusted: any type can stand in any field
        refuse(path, f"embeds a configuration that can't be read: {one_line(error)}", error)
    if blocks > tensors:
        refuse(path, f"embeds a configuration with more blocks ({blocks}) than tensors ({tensors})")
    return config
