"""Samples of more than 8 bits to 8: which of their values is white, and what to say of it.

Knows arrays; must not know files and their formats.

16-bit files often hold 10, 12 or 14 bits of a camera or microscope, and nothing says so. The order is: the
depth that the caller sets; what the file declares; 16 bits where all values are 8 bits that were scaled up to
16; else the range of the picture's own values, rounded up to the next usual depth, for which a sensor's few
hot pixels do not count. That is decided for each picture by itself, so that it does not depend on which
others are read with it. A dark picture may come out brighter for it, which the note says.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from meta_deploy.errors import InputError

MAX_DEPTH = 32
_USUAL = (8, 10, 12, 14, 16, 20, 24, 32)
_ROWS = 1 << 22  # samples that are worked on at a time
_HOT = 1e-4  # of the samples may lie above the range and become white
_MUCH = 0.01  # of the samples above the depth that was set is said
_SET = "set --depth (in Python depth=)"


@dataclass(frozen=True)
class Note:
    """Something to say once of many pictures: of a `kind`, with the `value` decided on, in a sentence."""

    kind: str
    value: str
    text: str


def check_depth(depth: int | None) -> None:
    """Raises InputError when it is not None and not a number of bits from 1 to MAX_DEPTH."""
    if depth is None:
        return
    if isinstance(depth, bool) or not isinstance(depth, numbers.Integral) or not 1 <= depth <= MAX_DEPTH:
        raise InputError(f"depth must be bits from 1 to {MAX_DEPTH}, not {depth!r}")


def to_8_bits(
    values: np.ndarray, depth: int | None = None, declared: int | None = None, inverted: bool = False
) -> tuple[np.ndarray, list[Note]]:
    """Samples of any integer or float dtype as uint8 of the same shape, and what was decided, if anything.

    `depth` and `declared` are bits: white is 2**bits - 1; one bit is floats from 0 to 1. Values that depth
    leaves out are clipped. With `inverted` 0 is white. Floats are not all NaN or infinite; those that are
    become 0.
    """
    floats = values.dtype.kind == "f"
    low, high, infinite = _range(values) if floats else (*_extremes(values), False)
    if values.dtype == np.uint16 and depth is None:
        counts = _counts(values)
        high = _without_hot(counts)
        declared = declared or (16 if _scaled_up(np.flatnonzero(counts)) else None)
    note, (black, white) = _limits(values.dtype, low, high, depth, declared)
    out = np.empty(values.shape, np.uint8)
    above = 0
    for rows in _bands(values):
        above += int(np.count_nonzero(values[rows] > white))
        _convert(values[rows], black, white, out[rows])
    if depth is not None and above > _MUCH * values.size:
        text = (
            f"has {100 * above / values.size:.0f}% of its samples above {depth} bits, and they become white"
        )
        note = Note("clipped", f"{depth} bits", text)
    if inverted:
        np.subtract(255, out, out=out)
    notes = [note] if note is not None else []
    if infinite:
        bad = "holds numbers that are not finite (NaN or infinite), which are taken as 0"
        notes.insert(0, Note("finite", "not", bad))
    return out, notes


def _extremes(values: np.ndarray) -> tuple[float, float]:
    return values.min().item(), values.max().item()


def _range(values: np.ndarray) -> tuple[float, float, bool]:
    """Least and greatest of the finite numbers, of which there are some, and whether there are others."""
    low, high = float(values.min()), float(values.max())
    if np.isfinite(low) and np.isfinite(high):
        return low, high, False
    finite = values[np.isfinite(values)]
    return float(finite.min()), float(finite.max()), True


def _bands(values: np.ndarray) -> Iterator[slice]:
    """Rows, few at a time."""
    step = max(1, _ROWS // max(1, values[0].size))
    return (slice(top, top + step) for top in range(0, len(values), step))


def _counts(values: np.ndarray) -> np.ndarray:
    """How often each value occurs among 16-bit samples: (65536,)."""
    counts = np.zeros(1 << 16, np.int64)
    for rows in _bands(values):
        counts += np.bincount(values[rows].ravel(), minlength=len(counts))
    return counts


def _without_hot(counts: np.ndarray) -> int:
    """The value that all but `_HOT` of the samples reach at most; the greatest of few samples."""
    total = int(counts.sum())
    return int(np.searchsorted(np.cumsum(counts), total - int(_HOT * total)))


def _scaled_up(values: np.ndarray) -> bool:
    """Whether these are what 8 bits become as 16, times 257 or 256: such steps are in no sensor's data."""
    return len(values) > 2 and any(not (values % step).any() for step in (257, 256))


def _limits(
    dtype: np.dtype, low: float, high: float, depth: int | None, declared: int | None
) -> tuple[Note | None, tuple[float, float]]:
    """The values that become black and white, and the note."""
    title = f"{8 * dtype.itemsize}-bit {'float' if dtype.kind == 'f' else 'signed' if low < 0 else 'data'}"
    if depth is not None:
        half = 2 ** (depth - 1)
        return None, (-half, half - 1) if low < 0 and depth > 1 else (0, 2**depth - 1)
    if low < 0:
        text = f"holds {title} values from {low:g} to {high:g}, taken as black and white"
        return Note("depth", "its own range", f"{text}; {_SET} to treat all alike"), (low, high)
    if dtype.kind == "f" and high <= 1.001:
        return Note("depth", "0 to 1", f"holds {title} values, taken as 0 to 1; if that is wrong, {_SET}"), (
            0,
            1,
        )
    if dtype.kind == "f" and not 16 <= high < 2**MAX_DEPTH:  # neither 0 to 1 nor 0 to 255 and so on
        text = f"holds {title} values from 0 to {high:g}, taken as black and white"
        return Note("depth", "its own range", f"{text}; {_SET} to treat all alike"), (0, high)
    if declared is not None and high < 2**declared:
        bits, why = declared, "as it declares"
    else:
        bits = next((b for b in _USUAL if high < 2**b), MAX_DEPTH)
        if dtype.kind == "i" and bits == 8 * dtype.itemsize:
            bits -= 1  # the sign's
        why = f"by its values up to {high:g}"
    if dtype.kind == "u" and bits == 8 * dtype.itemsize and declared is not None:
        return None, (0, 2**bits - 1)
    advice = "" if bits == declared else f"; if that is wrong, {_SET}"
    note = Note("depth", f"{bits} bits", f"holds {title} taken as {bits} bits, {why}{advice}")
    return note, (0, 2**bits - 1)


def _convert(values: np.ndarray, black: float, white: float, out: np.ndarray) -> None:
    """Write samples into uint8; whole bits of integers are shifted, so that the high ones stay."""
    bits = int(white).bit_length()
    if values.dtype.kind in "iu" and black == 0 and bits >= 8:
        out[...] = values.clip(0, min(int(white), np.iinfo(values.dtype).max)) >> values.dtype.type(bits - 8)
        return
    scaled = np.nan_to_num(values.astype(np.float64), nan=0, posinf=0, neginf=0).clip(black, white)
    scaled = (scaled - black) * (255 / (white - black) if white > black else 0)
    out[...] = scaled + 0.5
