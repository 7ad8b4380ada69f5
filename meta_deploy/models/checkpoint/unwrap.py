"""What training programs wrap around a state dict: nests, averaged weights, prefixes, class names.

Knows the habits of trainers, not the models.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meta_deploy.models.checkpoint.file import first_few, refuse

_MAX_DEPTH = 8
_MAX_FOUND = 8  # states of one file that are looked at
# Names of entries, and what stands before the names of tensors. A teacher is the averaged model of DINO and
# its kin; where it is another model, it does not fit.
_AVERAGED = (
    *("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict"),
    *("teacher", "target_encoder", "swa_model", "averaged_model"),
)
_PLAIN = (
    *("state_dict", "model_state_dict", "model", "model_state", "student"),
    *("net", "network", "module", "weights", "params", "detector", "segmentor"),
)
_NOT_WEIGHTS = ("optim", "sched", "scaler", "loss", "criterion", "callback", "loop", "meta", "message_hub")
# Modules that wrap a model or a part of it; no module of ours or of a plain ViT has such a name.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_MOST_SHARED = 8  # tied weights share theirs among two or three
# In the text of a configuration of MMDetection or MMSegmentation: mean=[123.675, 116.28, 103.53], std=[…].
_MEAN_STD = re.compile(r"\bmean=[\[(]([-\d., e]{1,99})[\])],\s*std=[\[(]([-\d., e]{1,99})[\])]")
_IN_RGB = re.compile(r"\b(to_rgb|bgr_to_rgb)=True\b")
_LONGEST_TEXT = 1_000_000
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # what averaging leaves out


@dataclass(frozen=True)
class Weights:
    """A state dict: name -> tensor as it was saved, without wrappers' prefixes; and notes for the user."""

    tensors: dict[str, Tensor]
    averaged: bool = False
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return "averaged (EMA) weights" if self.averaged else "weights"


def find_weights(raw: Any, path: str | os.PathLike[str]) -> list[Weights]:
    """The state dicts inside of whatever was saved, averaged (EMA) weights first.

    Which of them is whole, only the model can tell.
    """
    return _Search(path).weights(raw, 0)[:_MAX_FOUND]


class _Search:
    """A walk over nested mappings, each visited once, to a limited depth."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.seen: set[int] = set()

    def weights(self, node: Any, depth: int) -> list[Weights]:
        if not isinstance(node, Mapping) or id(node) in self.seen or depth > _MAX_DEPTH:
            return []
        self.seen.add(id(node))
        plain = self._all_of(_PLAIN, node, depth) or self._direct(node)
        # MMEngine exchanges the two when it saves: there `state_dict` holds the averaged weights.
        averaged = [] if "message_hub" in node else self._all_of(_AVERAGED, node, depth)
        return [*_filled(averaged, plain), *plain] or self._children(node, depth)

    def _all_of(self, keys: tuple[str, ...], node: Mapping, depth: int) -> list[Weights]:
        return [found for key in keys for found in self.weights(node.get(key), depth + 1)]

    def _direct(self, node: Mapping) -> list[Weights]:
        tensors = {k: v for k, v in node.items() if isinstance(k, str) and isinstance(v, Tensor)}
        # A counter or two (steps, decay) is no state dict.
        return self._parts(tensors) if any(t.dim() > 0 for t in tensors.values()) else []

    def _children(self, node: Mapping, depth: int) -> list[Weights]:
        """Weights under names that say nothing: the one child's, or those of a dict of dicts per module."""
        found = {
            key: weights
            for key, child in node.items()
            if isinstance(key, str)
            and not any(word in key.lower() for word in _NOT_WEIGHTS)
            and (weights := self.weights(child, depth + 1))
        }
        if len(found) < 2:
            return next(iter(found.values()), [])
        joined = {f"{key}.{name}": t for key, part in found.items() for name, t in part[0].tensors.items()}
        return [Weights(joined)]

    def _parts(self, tensors: dict[str, Tensor]) -> list[Weights]:
        """The models of one state dict, told apart by what stands before their names and does not after."""
        tensors = self._unwrapped(tensors)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            of_group = bool(rest) and first in (*_AVERAGED, *_PLAIN)
            groups.setdefault(first if of_group else "", {})[rest if of_group else name] = tensor
        others = groups.pop("", {})
        if 2 * len(others) >= len(tensors):
            return [Weights(tensors)]
        notes: tuple[str, ...] = ()
        if len(groups) == 1:
            (key,) = groups
            if others.keys() & groups[key].keys():
                return [Weights(tensors)]
            groups[key] |= others
        elif others:
            notes = (f"{len(others)} tensors beside the model's are left out: {first_few(list(others))}",)
        averaged, plain = (
            [
                replace(w, notes=w.notes + notes)
                for key in keys
                if key in groups
                for w in self._parts(groups[key])
            ]
            for keys in (_AVERAGED, _PLAIN)
        )
        return [*_filled(averaged, plain), *plain]

    def _unwrapped(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names without the wrappers in them."""
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            if short in renamed:
                refuse(self.path, f"holds '{first_few([short])}' twice, once wrapped; save one of them")
            renamed[short] = tensor
        return renamed


def _filled(averaged: list[Weights], plain: list[Weights]) -> list[Weights]:
    """Averaged weights, with the running statistics of the plain ones, which trainers do not average."""
    filled = []
    for weights in averaged:
        ours = weights.tensors
        theirs = next((p.tensors for p in plain if p.tensors.keys() & ours.keys()), {})
        rest = {k: v for k, v in theirs.items() if k not in ours and k.endswith(_BUFFERS)}
        more = f", and {len(rest)} tensors that they lack from the plain ones" if rest else ""
        said = () if weights.averaged else (f"the averaged (EMA) weights are used{more}",)
        filled.append(Weights({**ours, **rest}, averaged=True, notes=weights.notes + said))
    return filled


def plain_weights(tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Dense tensors that hold data, floating-point ones as float32 and finite.

    Raises:
        CheckpointError: quantized, sparse, complex or empty-handed tensors; NaN or infinity.
    """
    odd = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
    if odd:
        what = "tensors that are quantized, sparse, nested, complex or without data"
        refuse(path, f"has {len(odd)} {what} ({first_few(odd)}); save plain float tensors")
    _check_shared(tensors, path)
    state, wild = {}, []
    for name, tensor in tensors.items():
        tensor = Tensor.detach(tensor)
        if tensor.is_floating_point():
            tensor = tensor.float()
            # One pass and no copy; a sum can overflow where no term does, so that is looked at again.
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                wild.append(name)
        state[name] = tensor
    if wild:
        what = "NaN or infinite values" if len(wild) > 1 else "a NaN or infinite value"
        refuse(path, f"has {what} in {len(wild)} tensor(s): {first_few(wild)}; take an earlier checkpoint")
    return state


def _is_plain(tensor: Tensor) -> bool:
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    if tensor.is_complex():
        return False
    # Overlapping views can claim any size; weights are as large as what is stored of them.
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_shared(tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse many views of the same data, of which each would become a copy of its own."""
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    used = sum(t.numel() * t.element_size() for t in tensors.values())
    if used > _MOST_SHARED * sum(stored.values()):
        refuse(
            path,
            f"has tensors of {used >> 20} MB that share {sum(stored.values()) >> 20} MB; save each by itself",
        )


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


def find_normalization(raw: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std of RGB images of 0..255, where the text of a trainer's configuration names one pair.

    The configurations of MMDetection and MMSegmentation are Python; this looks for the one thing, runs
    nothing, and answers None where there is more than one pair or it is not of RGB.
    """
    meta = raw.get("meta") if isinstance(raw, Mapping) else None
    text = (meta.get("config") or meta.get("cfg")) if isinstance(meta, Mapping) else None
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT or not _IN_RGB.search(text):
        return None
    pairs = {(_three(mean), _three(std)) for mean, std in _MEAN_STD.findall(text)}
    if len(pairs) != 1:
        return None
    ((mean, std),) = pairs
    return (mean, std) if mean and std and min(mean) >= 0 and min(std) > 0 else None


def _three(text: str) -> tuple[float, ...] | None:
    """Three finite numbers."""
    try:
        numbers = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        return None
    return numbers if len(numbers) == 3 and all(map(math.isfinite, numbers)) else None
