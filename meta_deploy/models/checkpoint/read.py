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

from meta_deploy.errors import CheckpointError
from meta_deploy.models.backbones.backbone import BACKBONES
from meta_deploy.models.checkpoint.file import first_few, one_line, read_file, refuse
from meta_deploy.models.checkpoint.unwrap import (
    Weights,
    find_class_names,
    find_normalization,
    find_weights,
    plain_weights,
)
from meta_deploy.models.registry import ModelConfig, config_from_dict


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, unwrapped.

    Attributes:
        state: name -> tensor, on the CPU, floating-point ones float32 and finite.
        config: what our own trainer embedded, or None.
        class_names: as the trainer saved them, or None.
        normalization: (mean, std) of RGB images of 0..255 that the trainer's configuration names, or None.
        path: where it came from.
        notes: what was decided on the way, for the user.
    """

    state: dict[str, Tensor]
    config: ModelConfig | None
    class_names: list[str] | None
    path: Path
    notes: tuple[str, ...] = ()
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read .pth, .pt, .bin or .safetensors, told apart by content; averaged (EMA) weights are preferred.

    Raises:
        CheckpointError: absent, not a checkpoint, damaged, naming code, without tensors, or with NaN in them.
    """
    return read_candidates(path)[0].open()


@dataclass(frozen=True)
class Candidate:
    """One of the states that a file holds, and what was saved beside it; `title` is for people."""

    weights: Weights
    beside: Mapping[str, Any]
    path: Path

    @property
    def title(self) -> str:
        return self.weights.title

    def open(self) -> Checkpoint:
        """Check and convert the tensors.

        Raises:
            CheckpointError: NaN in them, or tensors that are no weights; a configuration that is none.
        """
        tensors = self.weights.tensors
        if any(backbone.recognise(tensors) for backbone in BACKBONES.values()):  # saved without the rest
            tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
        return Checkpoint(
            state=plain_weights(tensors, self.path),
            config=_embedded_config(self.beside.get("config"), len(tensors), self.path),
            class_names=find_class_names(self.beside),
            path=self.path,
            notes=self.weights.notes,
            normalization=find_normalization(self.beside),
        )


def read_candidates(path: str | os.PathLike[str]) -> list[Candidate]:
    """The states that a file holds, at least one, the best first: averaged (EMA) weights before plain ones.

    Raises:
        CheckpointError: absent, not a checkpoint, damaged, naming code, or without tensors.
    """
    raw, metadata = read_file(path)
    try:
        found = find_weights(raw, path)
        own = {**_parse_metadata(metadata), **(raw if isinstance(raw, Mapping) and not metadata else {})}
        contents = _contents(raw)
    except CheckpointError:
        raise
    except Exception as error:  # untrusted: a saved mapping may carry attributes instead of its own methods
        refuse(path, f"holds what is no plain dict ({one_line(error)}); save model.state_dict()", error)
    if not found:
        refuse(path, f"holds no tensors by name (it holds {contents}); save model.state_dict()")
    return [Candidate(weights, own, Path(path)) for weights in found]


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
