"""A histogram of numbers that come in parts. Knows numpy alone."""

from __future__ import annotations

import numpy as np

BINS = 8192  # half of them below zero
_HALF = BINS // 2


class Histogram:
    """Counts of numbers in bins of one width around zero, for any range.

    The bins end at a power of two, which doubles when a larger number comes: two neighbours become one then,
    and the counts are the same in whatever order, and in however many parts, the numbers came.

    Attributes:
        counts: (BINS,) int64.
        limit: the bins reach from -limit to limit, a power of two above all magnitudes; 0 before any number
            but zero came.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.limit = 0.0

    def add(self, numbers: np.ndarray) -> None:
        """Count finite numbers of any shape."""
        numbers = numbers.ravel().astype(np.float64)
        most = float(np.abs(numbers).max(initial=0.0))
        if most > 0:
            self._widen(float(2.0 ** np.frexp(most)[1]))
        # Scaled by a power of two a number stays exact, so that two bins hold what their union will.
        places = np.floor(numbers * (_HALF / self.limit)) if self.limit else np.zeros(len(numbers))
        self.counts += np.bincount(places.astype(np.int64) + _HALF, minlength=BINS)

    def _widen(self, limit: float) -> None:
        if not self.limit:
            self.limit = limit
        while self.limit < limit:
            inner = self.counts.reshape(_HALF, 2).sum(axis=1)
            self.counts = np.concatenate(
                [np.zeros(_HALF // 2, np.int64), inner, np.zeros(_HALF // 2, np.int64)]
            )
            self.limit *= 2

    @property
    def width(self) -> float:
        """Of one bin."""
        return self.limit / _HALF

    @property
    def centres(self) -> np.ndarray:
        """The middle of each bin, (BINS,) float64."""
        return (np.arange(BINS) - _HALF + 0.5) * self.width

    def quantile(self, share: float) -> float:
        """The end of the bin up to which at least this share of the numbers lies."""
        total = np.cumsum(self.counts)
        place = int(np.searchsorted(total, share * total[-1]))
        return (min(place, BINS - 1) - _HALF + 1) * self.width

    def magnitudes(self) -> np.ndarray:
        """Counts of magnitudes, (BINS / 2,), from zero up."""
        return self.counts[_HALF:] + self.counts[_HALF - 1 :: -1]
