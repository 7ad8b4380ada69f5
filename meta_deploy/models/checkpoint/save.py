"""Write a checkpoint that `load_model` reads without guessing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meta_deploy.models.checkpoint.file import one_line, refuse
from meta_deploy.models.registry import ModelConfig, config_to_dict

_temporaries = itertools.count()


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    config: ModelConfig,
    class_names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights, configuration and class names, whole or not at all; .safetensors or .pth by suffix.

    Floating-point weights are written as `dtype`, such as float16 for half the size (None: as they are).

    Raises:
        CheckpointError: the file cannot be written, its suffix is none of a checkpoint, or a weight is beyond
            the range of `dtype`.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt", ".bin", ".safetensors"):
        refuse(path, "cannot be written: its suffix tells no format; use .pth or .safetensors")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if dtype is not None:
        state = {name: _as(dtype, path, name, tensor) for name, tensor in state.items()}
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
        refuse(path, f"cannot be written: {one_line(error)}; free space or choose another place", error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _as(dtype: torch.dtype, path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A floating-point tensor in another type; any other as it is."""
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    if not torch.equal(converted.isfinite(), tensor.isfinite()):
        refuse(path, f"cannot be written: '{name}' has values beyond the range of {str(dtype)[6:]}")
    return converted
