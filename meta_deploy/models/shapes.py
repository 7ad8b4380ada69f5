"""Sizes of layers, read from the names and shapes of a state dict. Knows no model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]


def size_of(state: State, name: str, axis: int) -> int | None:
    """The length of one axis of a tensor; None where the tensor is missing or has no such axis."""
    tensor = state.get(name)
    return tensor.shape[axis] if tensor is not None and tensor.ndim > axis else None


def count_of(state: State, prefix: str) -> int | None:
    """How many different numbers follow `prefix` in the names; None for none."""
    number = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in state if (match := number.match(name))}) or None


def ratio_of(part: int | None, whole: int | None, usual: float) -> float | None:
    """The ratio r for which int(whole * r) is `part`; `usual` where it is one."""
    if not part or not whole:
        return None
    if max(1, int(whole * usual)) == part:
        return usual
    ratio = part / whole
    return ratio if int(whole * ratio) == part else math.nextafter(ratio, math.inf)


def known(**sizes: Any) -> dict[str, Any]:
    """The sizes that are not None."""
    return {name: size for name, size in sizes.items() if size is not None}


def any_starts_with(*prefixes: str) -> Callable[[State], bool]:
    """A test whether any name of a state dict starts with one of these."""
    return lambda state: any(name.startswith(prefixes) for name in state)


def without_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """The part of a state dict under a prefix, which the names then lack."""
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
