"""What a manifest promises of its model, held against what a library says of it and against what comes out.

Knows names, types and sizes; must not know which library runs the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import Profile, RawInput, RawManifest, TensorSpec
from meta_deploy.errors import BackendError
from meta_deploy.targets.target import profiles
from meta_deploy.tasks import get_task

_IMAGES = ("batch", 3, "height", "width")


@dataclass(frozen=True)
class Value:
    """A model's input or output. `dtype` is numpy's name for its type; a dimension that is no int is free."""

    dtype: str
    shape: Sequence[Any]


class Contract:
    """A bundle's promise about one of its model files.

    Attributes:
        what: the file, for messages.
        outputs: the names of the outputs that are promised, in order.
    """

    def __init__(self, bundle: Bundle, file: str):
        self.what = f"{file} of bundle '{bundle.path}'"
        manifest = bundle.manifest
        if isinstance(manifest, RawManifest):
            self._inputs = {given.name: _raw(given) for given in manifest.inputs}
            self._outputs = {given.name: _raw(given) for given in manifest.outputs}
        else:
            self._inputs = {manifest.input.name: Value(manifest.input.dtype, _IMAGES)}
            self._outputs = {name: Value(*output) for name, output in get_task(bundle.task).outputs.items()}
        self._profiles = {profile.name: profile for profile in profiles(bundle)}
        self._classes = len(bundle.classes)
        self.outputs = tuple(self._outputs)

    def check(self, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> None:
        """Names, types, and dimensions where the model fixes them; more outputs than promised are fine.

        Raises:
            BackendError: one is not what the manifest says.
        """
        if set(inputs) != set(self._inputs) or not set(outputs).issuperset(self.outputs):
            raise BackendError(
                f"{self.what} takes {sorted(inputs)} and gives {sorted(outputs)}, not what its manifest "
                "says; export it again"
            )
        sizes: dict[str, int | None] = {"classes": self._classes}
        for name, promised in self._inputs.items():
            profile = self._profiles[name]
            # None: the model must not fix it.
            ends = zip(profile.min, profile.max, strict=True)
            sizes |= _named(promised.shape, [least if least == most else None for least, most in ends])
        promises = [(inputs, self._inputs), (outputs, self._outputs)]
        for values, promised_values in promises:
            for name, promised in promised_values.items():
                value = values[name]
                if value.dtype != promised.dtype or not _agree(value.shape, promised.shape, sizes):
                    raise BackendError(
                        f"{self.what} has '{name}' as {value.dtype} {list(value.shape)}, not what its "
                        "manifest says; export it again"
                    )

    def check_range(self, profiles: Mapping[str, Profile]) -> None:
        """That every shape the manifest promises to take is one that the model takes. Raises BackendError."""
        for name, promised in self._profiles.items():
            given = profiles[name]
            below = all(least <= wanted for least, wanted in zip(given.min, promised.min, strict=True))
            above = all(most >= wanted for most, wanted in zip(given.max, promised.max, strict=True))
            if not (below and above):
                raise BackendError(
                    f"{self.what} takes {given.min} to {given.max}, and its manifest says {promised.min} to "
                    f"{promised.max}; export it again"
                )

    def check_inputs(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Names, types and shapes of what goes in. Raises BackendError."""
        if set(arrays) != set(self._inputs):
            raise BackendError(f"{self.what} takes {sorted(self._inputs)}, not {sorted(arrays)}")
        for name, promised in self._inputs.items():
            array, profile = arrays[name], self._profiles[name]
            if array.dtype.name != promised.dtype:
                raise BackendError(
                    f"{self.what} takes '{name}' as {promised.dtype}, not {array.dtype}; convert it"
                )
            inside = len(array.shape) == len(profile.max) and all(
                low <= size <= high
                for low, size, high in zip(profile.min, array.shape, profile.max, strict=True)
            )
            if not inside:
                takes = f"{profile.min} to {profile.max}" if profile.min != profile.max else f"{profile.max}"
                raise BackendError(
                    f"{self.what} takes '{name}' of {takes}, not {array.shape}; resize it, or export the "
                    "model for it"
                )

    def check_outputs(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """The shapes of what came out for `inputs`. Raises BackendError as `check` does."""
        sizes: dict[str, int | None] = {"classes": self._classes}
        for name, promised in self._inputs.items():
            sizes |= _named(promised.shape, inputs[name].shape)
        for name, array in outputs.items():
            if not _agree(array.shape, self._outputs[name].shape, sizes):
                raise BackendError(f"{self.what} gave {name} of shape {array.shape}; export it again")


def _raw(given: RawInput | TensorSpec) -> Value:
    """A raw graph's input or output. The names of its dimensions promise nothing, so each is its own."""
    dims = [
        size if isinstance(size, int) else f"{given.name}.{axis}" for axis, size in enumerate(given.shape)
    ]
    return Value(given.dtype, dims)


def _named(dims: Sequence[Any], sizes: Sequence[int | None]) -> dict[str, int | None]:
    """The sizes of those dimensions that have a name."""
    return {dim: size for dim, size in zip(dims, sizes, strict=True) if isinstance(dim, str)}


def _agree(shape: Sequence[Any], wanted: Sequence[str | int], sizes: dict[str, int | None]) -> bool:
    """Whether the dimensions that are fixed are as wanted; `sizes` takes up those not known before."""
    if len(shape) != len(wanted):
        return False
    return all(
        given == (name if isinstance(name, int) else sizes.setdefault(name, given))
        for given, name in zip(shape, wanted, strict=True)
        if isinstance(given, int)
    )
