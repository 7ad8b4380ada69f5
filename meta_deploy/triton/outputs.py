"""What the Python model answers with: the tensors of each task, and how they are made of a result.

Knows results and manifests; must not know Triton's library, which only a server has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meta_deploy.bundle.manifest import Manifest, RawManifest
from meta_deploy.errors import InputError

IMAGE = "image"  # the input: an encoded file's bytes

# Triton's names of numpy's types.
_TYPES = {
    **{f"{sign}int{bits}": f"TYPE_{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"TYPE_FP{bits}" for bits in (16, 32, 64)},
    "bool": "TYPE_BOOL",
    "bytes": "TYPE_STRING",
}


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model in Triton: numpy's name of its type, and its sizes, -1 for any."""

    name: str
    dtype: str
    dims: Sequence[int]

    @property
    def triton_type(self) -> str:
        """Such as TYPE_FP32. Raises InputError: Triton has none."""
        if self.dtype not in _TYPES:
            raise InputError(f"Triton has no tensors of {self.dtype}, which '{self.name}' is; convert it")
        return _TYPES[self.dtype]


@dataclass(frozen=True)
class Answer:
    """An output of the Python model, and how it is taken from a result."""

    tensor: Tensor
    take: Callable[[Any], np.ndarray]
    labels: bool = False  # holds indices into the class names


def texts(lines: Sequence[str]) -> np.ndarray:
    """Strings as a tensor of Triton's has them: UTF-8 in an object array (N,)."""
    array = np.empty(len(lines), object)
    array[:] = [line.encode() for line in lines]
    return array


_BOXES = (
    Answer(Tensor("boxes", "float32", (-1, 4)), lambda found: found.boxes),
    Answer(Tensor("scores", "float32", (-1,)), lambda found: found.scores),
    Answer(Tensor("labels", "int32", (-1,)), lambda found: found.labels, labels=True),
    Answer(Tensor("names", "bytes", (-1,)), lambda found: texts(found.names)),
)
_MASKS = Answer(
    Tensor("masks", "bytes", (-1,)),
    lambda found: texts([json.dumps(mask.rle()) for mask in found.segments]),
)
_CLASS_MAP = Answer(Tensor("labels", "int16", (-1, -1)), lambda found: found.labels, labels=True)
_ANSWERS = {
    "detection": _BOXES,
    "instance-segmentation": (*_BOXES, _MASKS),
    "semantic-segmentation": (_CLASS_MAP,),
}


def answers_of(manifest: Manifest) -> tuple[Answer, ...]:
    """The outputs for a bundle that takes images; those of the graph itself where it is a raw one."""
    if not isinstance(manifest, RawManifest):
        return _ANSWERS[manifest.task]
    return tuple(
        Answer(
            Tensor(output.name, output.dtype, sizes(output.shape)),
            lambda found, name=output.name: found.outputs[name],  # type: ignore[misc]
        )
        for output in manifest.outputs
    )


def sizes(shape: Sequence[int | str]) -> tuple[int, ...]:
    """A manifest's shape as Triton writes it."""
    return tuple(size if isinstance(size, int) else -1 for size in shape)
