"""Arrays print as one line, go into JSON and .npz; an .npz gives its arrays or is refused in one sentence."""

import json
import os
import zipfile

import numpy as np
import pytest

from meta_deploy.errors import InputError
from meta_deploy.tasks.raw import Arrays, read_arrays
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
    Arrays({"text": np.array(["a", "bc"], object)}).save(tmp_path / "text.npz")
    assert read_arrays(tmp_path / "text.npz")["text"].tolist() == ["a", "bc"]
    with pytest.raises(InputError, match=r"use \.npz"):
        Arrays(OUTPUTS).save(tmp_path / "out.npy")


def test_the_arrays_come_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.ones((2, 2), np.float16))
    arrays = read_arrays(tmp_path / "a.npz")
    assert list(arrays) == ["x", "y"]
    assert arrays["y"].dtype == np.float16
    np.testing.assert_array_equal(arrays["x"], np.arange(3))


def damaged(path, harm):
    np.savez_compressed(path, x=np.random.default_rng(0).random(1000))
    path.write_bytes(harm(path.read_bytes()))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no archive"),
        lambda path: damaged(path, lambda data: data[: len(data) // 2]),
        lambda path: damaged(path, lambda data: data[:500] + bytes(100) + data[600:]),
        lambda path: np.savez(path, x=np.array([{"an": "object"}], object)),
        lambda path: np.save(path.open("wb"), np.arange(3)),
        lambda path: np.savez(path),
        lambda path: zipfile.ZipFile(path, "w").writestr("notes.txt", "hello"),
    ],
)
def test_anything_else_is_one_sentence(tmp_path, make):
    make(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"a\.npz.*numpy\.savez") as caught:
        read_arrays(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(InputError, match="not a regular file"):
        read_arrays(tmp_path / "a.npz")
