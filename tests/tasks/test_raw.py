"""Arrays print as one line, go into JSON and into an .npz that numpy reads back."""

import json

import numpy as np
import pytest

from meta_deploy.errors import InputError
from meta_deploy.tasks.raw import Arrays
from meta_deploy.tasks.results import Timings

OUTPUTS = {
    "a/y": np.array([[1.5, np.nan], [np.inf, -2]], np.float16),
    "file": np.arange(40, dtype=np.int64),
    "more": np.array(True),
}


def test_arrays_print_as_names_types_and_shapes():
    assert repr(Arrays(OUTPUTS)) == "a/y float16 (2, 2), file int64 (40,), more bool ()"


def test_the_dictionary_is_json_with_values_where_they_are_few():
    content = json.loads(
        json.dumps(Arrays(OUTPUTS, path="x.npz", timings=Timings(model=2)).to_dict(), allow_nan=False)
    )
    assert content == {
        "path": "x.npz",
        "outputs": {
            "a/y": {"dtype": "float16", "shape": [2, 2], "values": [[1.5, None], [None, -2.0]]},
            "file": {"dtype": "int64", "shape": [40]},
            "more": {"dtype": "bool", "shape": [], "values": True},
        },
        "timings": {"pre_ms": 0, "model_ms": 2, "post_ms": 0},
    }


def test_what_is_saved_numpy_reads_back(tmp_path):
    Arrays(OUTPUTS).save(tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as stored:
        assert set(stored.files) == set(OUTPUTS)
        for name, array in OUTPUTS.items():
            assert stored[name].dtype == array.dtype
            np.testing.assert_array_equal(stored[name], array)
    with pytest.raises(InputError, match=r"use \.npz"):
        Arrays(OUTPUTS).save(tmp_path / "out.npy")
