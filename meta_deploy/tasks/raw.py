"""Any graph: named arrays in, named arrays out. The task, its result, and the files that arrays come from.

Knows arrays; must not know back ends.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.files import atomic_write
from meta_deploy.bundle.manifest import Size
from meta_deploy.errors import InputError
from meta_deploy.imaging.preprocess import Placement
from meta_deploy.tasks.comparison import Comparison, RawComparison
from meta_deploy.tasks.results import Result, listed
from meta_deploy.tasks.task import Output, Task

MOST_VALUES = 16  # that `to_dict` gives


@dataclass(frozen=True, eq=False, repr=False)
class Arrays(Result):
    """A graph's `outputs` by name, as the graph gives them, the batch's dimension included."""

    outputs: Mapping[str, np.ndarray]

    def __repr__(self) -> str:
        return listed([f"{name} {array.dtype} {array.shape}" for name, array in self.outputs.items()])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: path, outputs (dtype, shape, and `values` where there are at most 16), timings.

        What is not finite is null, as JSON has no such numbers.
        """
        outputs: dict[str, dict[str, Any]] = {}
        for name, array in self.outputs.items():
            outputs[name] = {"dtype": str(array.dtype), "shape": list(array.shape)}
            if array.size <= MOST_VALUES:
                values = array
                if array.dtype.kind == "f":
                    values = array.astype(object)
                    values[~np.isfinite(array)] = None
                outputs[name]["values"] = values.tolist()
        return {"path": self.path, "outputs": outputs, "timings": self.timings.to_dict()}

    def filter(self, score: float) -> Arrays:
        """Itself: arrays have no scores."""
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the arrays as a compressed .npz, whole or not at all.

        Raises:
            InputError: another suffix, or the file cannot be written.
        """
        if not os.fspath(path).lower().endswith(".npz"):
            raise InputError(f"cannot write arrays to '{path}'; use .npz")
        # Not numpy's savez, which takes names as its own arguments.
        with atomic_write(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in self.outputs.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    # ONNX Runtime has text as objects, which only a pickle could hold.
                    plain = array.astype(str) if array.dtype == object else array
                    np.lib.format.write_array(entry, np.asanyarray(plain), allow_pickle=False)


class Raw(Task):
    """Any graph. Its outputs are those of its manifest."""

    name = "raw"
    joins = False
    outputs: ClassVar[Mapping[str, Output]] = {}

    def decode(
        self,
        bundle: Bundle,
        outputs: Mapping[str, np.ndarray],
        index: int,
        placement: Placement,
        padded: Size,
        score_threshold: float,
    ) -> Arrays:
        """All outputs of the run: which of their dimensions is the batch is not known."""
        return Arrays(outputs)

    def comparison(self, tolerance: Mapping[str, float], score_threshold: float = 0.0) -> Comparison:
        return RawComparison(tolerance)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Pickled objects, which can run code, are refused.

    Raises:
        InputError: it is missing, damaged, empty or no .npz.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is not a regular file")  # a pipe could make it wait for ever
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it is a single array, an .npy")
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it holds other files than arrays")
    except Exception as error:  # a damaged one raises anything from zipfile, zlib or numpy
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(
            f"cannot read arrays from '{path}': {' '.join(reason.split())}; write it with numpy.savez"
        ) from error
    if not arrays:
        raise InputError(f"there is no array in '{path}'; write it with numpy.savez")
    return arrays
