"""An output file is there whole or not at all."""

import os

import pytest

from meta_deploy.bundle.files import atomic_write, check_writable
from meta_deploy.errors import InputError


def test_a_file_appears_when_it_is_whole(tmp_path):
    with atomic_write(tmp_path / "a") as stream:
        stream.write(b"whole")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_keeps_what_was_there(tmp_path, error):
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(error), atomic_write(tmp_path / "a"):
        raise error("halfway")
    assert (tmp_path / "a").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="No space left"), atomic_write(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["/dev/null", "/", "/nowhere/a", "/proc/a"])
def test_what_cannot_be_written_is_refused_before_anything_is(path):
    with pytest.raises(InputError, match="cannot write"), atomic_write(path):
        pass
    assert os.path.exists("/dev/null")
    assert not os.path.isfile("/dev/null")


def test_a_link_keeps_pointing_where_it_did(tmp_path):
    (tmp_path / "link").symlink_to("target")
    with atomic_write(tmp_path / "link") as stream:
        stream.write(b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"x"


def test_a_name_that_is_too_long_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="too long"):
        check_writable(tmp_path / ("x" * 300))
    with atomic_write(tmp_path / ("a." + "x" * 253)) as stream:
        stream.write(b"fits")
    assert len(os.listdir(tmp_path)) == 1
