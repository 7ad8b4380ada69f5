"""An .npz gives its arrays, or is refused in one sentence; nothing pickled is loaded."""

import zipfile

import numpy as np
import pytest

from meta_deploy.errors import InputError
from meta_deploy.runtime.arrays import read_arrays


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
