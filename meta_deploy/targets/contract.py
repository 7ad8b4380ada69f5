"""What a manifest promises of its model, held against what a library says of it and against what comes out.

Knows names, types and sizes; must not know which library runs the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.errors import BackendError

# Type and dimensions of the input and of every output; what has the same name has the same size.
_PROMISED: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "input": ("float32", ("batch", 3, "height", "width")),
    "num_detections": ("int32", ("batch",)),
    "boxes": ("float32", ("batch", "most", 4)),
    "scores": ("float32", ("batch", "most")),
    "labels": ("int32", ("batch", "most")),
    "masks": ("float32", ("batch", "most", "cells", "cells")),
    "logits": ("float32", ("batch", "classes", "rows", "columns")),
}


@dataclass(frozen=True)
class Value:
    """A model's input or output. `dtype` is numpy's name for its type; a dimension that is no int is free."""

    dtype: str
    shape: Sequence[Any]


class Contract:
    """A bundle's promise about one of its model files."""

    def __init__(self, bundle: Bundle, file: str):
        self.what = f"{file} of bundle '{bundle.path}'"
        self.outputs = bundle.output_names
        self._spec = bundle.input
        self._classes = len(bundle.classes)

    def check(self, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> None:
        """Names, types, and dimensions where the model fixes them; more outputs than promised are fine.

        Raises:
            BackendError: one is not what the manifest says.
        """
        if set(inputs) != {self._spec.name} or not set(outputs).issuperset(self.outputs):
            raise BackendError(
                f"{self.what} takes {sorted(inputs)} and gives {sorted(outputs)}, not what its manifest "
                "says; export it again"
            )
        sizes = self._sizes()
        values = {"input": inputs[self._spec.name], **{name: outputs[name] for name in self.outputs}}
        for name, value in values.items():
            dtype, shape = _PROMISED[name]
            if value.dtype != dtype or not _agree(value.shape, shape, sizes):
                shown = self._spec.name if name == "input" else name
                raise BackendError(
                    f"{self.what} has '{shown}' as {value.dtype} {list(value.shape)}, not what its manifest "
                    "says; export it again"
                )

    def check_range(self, least: Sequence[int], most: Sequence[int]) -> None:
        """That every input the manifest promises is one that the model takes. Raises BackendError."""
        smallest, largest = self._spec.profile.min, self._spec.profile.max
        below = all(given <= wanted for given, wanted in zip(least, smallest, strict=True))
        if not below or not all(given >= wanted for given, wanted in zip(most, largest, strict=True)):
            raise BackendError(
                f"{self.what} takes {tuple(least)} to {tuple(most)}, and its manifest says {smallest} to "
                f"{largest}; export it again"
            )

    def check_arrays(self, batch: int, arrays: Mapping[str, np.ndarray]) -> None:
        """The shapes of what came out for `batch` images. Raises BackendError as `check` does."""
        sizes: dict[str, int | None] = {"batch": batch, "classes": self._classes}
        for name, array in arrays.items():
            if not _agree(array.shape, _PROMISED[name][1], sizes):
                raise BackendError(f"{self.what} gave {name} of shape {array.shape}; export it again")

    def _sizes(self) -> dict[str, int | None]:
        """The sizes known beforehand; None: the model must not fix it."""
        spec = self._spec
        return {
            "batch": spec.batch.max if spec.static_batch else None,
            "height": spec.size.max[0] if spec.size.min[0] == spec.size.max[0] else None,
            "width": spec.size.max[1] if spec.size.min[1] == spec.size.max[1] else None,
            "classes": self._classes,
        }


def _agree(shape: Sequence[Any], wanted: Sequence[str | int], sizes: dict[str, int | None]) -> bool:
    """Whether the dimensions that are fixed are as wanted; `sizes` takes up those not known before."""
    if len(shape) != len(wanted):
        return False
    return all(
        given == (name if isinstance(name, int) else sizes.setdefault(name, given))
        for given, name in zip(shape, wanted, strict=True)
        if isinstance(given, int)
    )
