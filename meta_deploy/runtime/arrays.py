"""Arrays by name from an .npz file, without trust in it.

Knows numpy's files; must not know what the arrays are for.
"""

from __future__ import annotations

import os

import numpy as np

from meta_deploy.errors import InputError


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Pickled objects, which can run code, are refused.

    Raises:
        InputError: it is missing, damaged, empty or no .npz.
    """
    try:
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
