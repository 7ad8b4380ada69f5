"""What a task is: the outputs that its graphs have, how they become results, how two sets are compared.

Knows names, dtypes and dimensions; must not know which library runs the graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import Size
from meta_deploy.errors import BackendError, BundleError
from meta_deploy.imaging.preprocess import Placement
from meta_deploy.tasks.comparison import Comparison
from meta_deploy.tasks.results import Result
from meta_deploy.tasks.tiles import Tile


class Output(NamedTuple):
    """An output's dtype, by numpy's name, and its dimensions: what has the same name has the same size."""

    dtype: str
    dims: tuple[str | int, ...]


class Task(ABC):
    """What a model is for.

    Attributes:
        name: as the manifest calls it.
        joins: whether results of an image's tiles can be joined.
        slides: whether outputs of sliding windows can be averaged.
        columns: of the results' tables; none where they have none.
        outputs: what the graph gives, by name. Empty for `raw`, whose manifests list their own.
    """

    name: ClassVar[str]
    joins: ClassVar[bool] = True
    slides: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[Mapping[str, Output]]

    @abstractmethod
    def decode(
        self,
        bundle: Bundle,
        outputs: Mapping[str, np.ndarray],
        index: int,
        placement: Placement,
        padded: Size,
        score_threshold: float,
    ) -> Result:
        """The result of image `index` of a batch, in its own pixels.

        Args:
            bundle: whose graph it was.
            outputs: of the whole batch, by name.
            placement: where the image lay in the input.
            padded: the input's (height, width).
            score_threshold: the least score of a detection.

        Raises:
            BackendError: values that are not finite.
            BundleError: more classes than the manifest names.
        """

    def join(self, size: Size, tiles: Sequence[Tile], results: Sequence[Any]) -> Result:
        """One result of an image of `size` from those of its tiles, where the task `joins`."""
        raise NotImplementedError(self.name)

    def average(
        self,
        bundle: Bundle,
        size: Size,
        resized: Size,
        windows: Sequence[Tile],
        outputs: Sequence[Mapping[str, np.ndarray]],
    ) -> Result:
        """The result of an image of `size` whose windows were run, where the task `slides`.

        Args:
            bundle: whose graph it was.
            size: of the image, (height, width).
            resized: of the image that the windows are in.
            windows: each of the input's size.
            outputs: of each window, by name.

        Raises:
            As `decode`.
        """
        raise NotImplementedError(self.name)

    @abstractmethod
    def comparison(self, tolerance: Mapping[str, float], score_threshold: float = 0.0) -> Comparison:
        """What compares two sides' outputs; `score_threshold` is where the model cuts its list off."""


def check_finite(bundle: Bundle, *arrays: np.ndarray) -> None:
    """Raise BackendError unless all values are finite."""
    for values in arrays:
        # NaN gets through both.
        if values.size and not (np.isfinite(values.max()) and np.isfinite(values.min())):
            raise BackendError(
                f"the model of bundle '{bundle.path}' gave values that are not finite; export it again, "
                "or use another back end or precision"
            )


def check_classes(bundle: Bundle, needed: int) -> None:
    """Raise BundleError where the model gives more classes than the manifest names."""
    if needed > len(bundle.classes):
        raise BundleError(
            f"the model of bundle '{bundle.path}' gives {needed} classes, and its manifest names "
            f"{len(bundle.classes)}; export it again"
        )
