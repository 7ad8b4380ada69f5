"""What training programs wrap around a state dict: nests, averaged weights, prefixes, class names.

Knows the habits of trainers, not the models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from meta_deploy.models.checkpoint.file import first_few, refuse

_MAX_DEPTH = 8
_EMA_KEYS = ("ema", "model_ema", "state_dict_ema", "ema_state_dict")
# Of several, the first that holds tensors. A teacher is the averaged model of DINO and its kin.
_MODEL_KEYS = (
    *("state_dict", "model_state_dict", "model", "model_state", "teacher", "target_encoder"),
    *("net", "network", "module", "weights", "params"),
)
_NOT_WEIGHTS = ("optim", "sched", "scaler", "loss", "criterion", "callback", "loop", "meta", "message_hub")
# Modules that wrap a model or a part of it; no module of ours or of a plain ViT has such a name.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_PREFIXES = ("model.", "ema_model.", "net.", "network.", "detector.", "segmentor.")


def find_weights(raw: Any, path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict inside of whatever was saved, averaged (EMA) weights first.

    Returns:
        Name -> tensor as it was saved, wrappers' prefixes stripped (empty where there are no tensors), and
        notes for the user.
    """
    notes: list[str] = []
    return _Search(path, notes).weights(raw, 0), notes


class _Search:
    """A walk over nested mappings, each visited once, to a limited depth."""

    def __init__(self, path: str | os.PathLike[str], notes: list[str]) -> None:
        self.path = path
        self.notes = notes
        self.seen: set[int] = set()

    def weights(self, node: Any, depth: int) -> dict[str, Tensor]:
        if not isinstance(node, Mapping) or id(node) in self.seen or depth > _MAX_DEPTH:
            return {}
        self.seen.add(id(node))
        plain = self._first_of(_MODEL_KEYS, node, depth) or self._direct(node)
        # MMEngine exchanges the two when it saves: there `state_dict` holds the averaged weights.
        ema = {} if "message_hub" in node else self._first_of(_EMA_KEYS, node, depth)
        if ema:
            return self._merge(plain, ema)
        return plain or self._children(node, depth)

    def _first_of(self, keys: tuple[str, ...], node: Mapping, depth: int) -> dict[str, Tensor]:
        for key in keys:
            if found := self.weights(node.get(key), depth + 1):
                return found
        return {}

    def _direct(self, node: Mapping) -> dict[str, Tensor]:
        tensors = {k: v for k, v in node.items() if isinstance(k, str) and isinstance(v, Tensor)}
        # A counter or two (steps, decay) is no state dict.
        return self._strip(tensors) if any(t.ndim > 0 for t in tensors.values()) else {}

    def _children(self, node: Mapping, depth: int) -> dict[str, Tensor]:
        """Weights under names that say nothing: the one child's, or those of a dict of dicts per module."""
        found = {
            key: weights
            for key, child in node.items()
            if isinstance(key, str)
            and not any(word in key.lower() for word in _NOT_WEIGHTS)
            and (weights := self.weights(child, depth + 1))
        }
        if len(found) == 1:
            return next(iter(found.values()))
        return {f"{key}.{name}": tensor for key, part in found.items() for name, tensor in part.items()}

    def _merge(self, plain: dict[str, Tensor], ema: dict[str, Tensor]) -> dict[str, Tensor]:
        """The averaged weights, and from the plain ones what was not (running statistics)."""
        rest = {k: v for k, v in plain.items() if k not in ema} if set(plain) & set(ema) else {}
        self.notes.append(
            "the averaged (EMA) weights are used"
            + (f", and {len(rest)} tensors that they lack from the plain ones" if rest else "")
        )
        return {**ema, **rest}

    def _strip(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names without what wrappers put before them."""
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            if short in renamed:
                refuse(self.path, f"holds '{first_few([short])}' twice, once wrapped; save one of them")
            renamed[short] = tensor
        while True:
            for prefix in _PREFIXES:
                having = [name for name in renamed if name.startswith(prefix)]
                if 2 * len(having) > len(renamed):
                    break
            else:
                return renamed
            stripped = {name.removeprefix(prefix): tensor for name, tensor in renamed.items()}
            if len(stripped) < len(renamed):
                return renamed
            renamed = stripped


def plain_weights(tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Dense tensors that hold data, floating-point ones as float32 and finite.

    Raises:
        CheckpointError: quantized, sparse, complex or empty-handed tensors; NaN or infinity.
    """
    state, odd, wild = {}, [], []
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if not _is_plain(tensor):
            odd.append(name)
            continue
        if tensor.is_floating_point():
            tensor = tensor.float()
            # One pass and no copy; a sum can overflow where no term does, so that is looked at again.
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                wild.append(name)
        state[name] = tensor
    if odd:
        what = "tensors that are quantized, sparse, complex or without data"
        refuse(path, f"has {len(odd)} {what} ({first_few(odd)}); save plain float tensors")
    if wild:
        what = "NaN or infinite values" if len(wild) > 1 else "a NaN or infinite value"
        refuse(path, f"has {what} in {len(wild)} tensor(s): {first_few(wild)}; take an earlier checkpoint")
    return state


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
        return False
    # Overlapping views can claim any size; weights are as large as what is stored of them.
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def find_class_names(raw: Any) -> list[str] | None:
    """Class names that a trainer saved: ours, MMDetection's and MMSegmentation's (1.x, 2.x, 3.x), others'."""
    places = [raw]
    for key in ("meta", "dataset_meta", "dataset_meta"):
        inner = [place[key] for place in places if isinstance(place, Mapping) and key in place]
        places += [place for place in inner if not any(place is other for other in places)]
    for place in places:
        for key in ("classes", "class_names", "CLASSES", "names"):
            names = place.get(key) if isinstance(place, Mapping) else None
            if isinstance(names, Mapping):  # {0: "person", ...}
                in_order = all(i in names for i in range(len(names)))
                names = [names[i] for i in range(len(names))] if in_order else None
            if isinstance(names, (list, tuple)) and names and all(isinstance(n, str) for n in names):
                return list(names)
    return None
