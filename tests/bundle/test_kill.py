"""At every system call of writing: whoever looks finds old or new, a killed process leaves what the next one
clears away, and after an interrupt the exit code says which of both is there."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from msgspec.structs import replace

from meta_deploy.bundle import bundle as module
from meta_deploy.bundle import files, folders
from meta_deploy.bundle.bundle import Bundle, reserve_bundle, write_bundle
from meta_deploy.bundle.files import atomic_write
from meta_deploy.bundle.manifest import ModelInfo
from meta_deploy.cli import common
from meta_deploy.errors import BundleReplaced, InputError
from meta_deploy.targets import cache
from tests.bundles_by_hand import manifest
from tests.system_calls import Stepped, each_call, needs_ptrace

pytestmark = needs_ptrace
MANIFEST = manifest("instance-segmentation", (64, 64))


@pytest.fixture
def out(tmp_path):
    """A path in an empty folder, in memory where that can be: these tests write some thousand bundles."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) as folder:
        yield Path(folder) / "b"


@pytest.fixture
def two_renames(monkeypatch):
    """A file system that cannot exchange two names."""
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)


def write(out, name, written=lambda: None):
    """A bundle that has its name in each of its files."""
    content = {"model.onnx": name.encode(), "more.bin": name.encode() * 2}
    with reserve_bundle(out) as reserved:
        reserved.write(replace(MANIFEST, model=ModelInfo(name=name)), content, written)
    return 0


def name_of(bundle):
    assert bundle.read("model.onnx") * 2 == bundle.read("more.bin") == bundle.model_name.encode() * 2
    return bundle.model_name


def look(out):
    return Bundle.use(out, name_of)


def export(out, name):
    """The end of meta-export, with its exit code."""
    return common.run(lambda: write(out, name, common.done), "meta-export")


def test_whoever_looks_finds_the_old_or_the_new_bundle(out):
    write(out, "old")
    seen = []
    child = Stepped(lambda: write(out, "new"))
    for _ in child:
        seen.append(look(out))
    assert child.code == 0
    assert seen == sorted(seen, reverse=True)  # "old", and from one call on "new"
    assert set(seen) == {"old", "new"}


def test_without_an_exchange_whoever_looks_in_between_waits(out, two_renames, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0)
    write(out, "old")
    seen = []
    child = Stepped(lambda: write(out, "new"))
    for _ in child:
        try:
            seen.append(look(out))
        except BundleReplaced:
            seen.append("neither")
    assert child.code == 0
    assert set(seen) == {"old", "neither", "new"}
    assert seen.count("neither") <= 3


def test_a_bundle_replaced_at_any_moment_of_reading_is_read_as_one_of_both(out):
    write(out, "0")
    for number, child in enumerate(each_call(lambda: look(out) and 0), 1):
        write(out, str(number))
        assert child.end() == 0
    assert number > 20


@pytest.mark.parametrize("there", ["a bundle", "nothing", "two renames"])
def test_killed_at_any_moment_it_leaves_old_or_new_and_the_next_one_clears_up(out, there, request):
    if there == "two renames":
        request.getfixturevalue("two_renames")
    seen = set()
    if there != "nothing":
        write(out, "old")
    for child in each_call(lambda: write(out, "new")):
        child.kill()
        if there == "two renames" and not out.exists():
            files._clear(out.parent)  # as the next writer does first
            seen.add("put back")
        seen.add(look(out) if out.exists() else "nothing")
        write(out, "old")
        assert os.listdir(out.parent) == ["b"]
        if there == "nothing":
            shutil.rmtree(out)
    expected = {"a bundle": {"old", "new"}, "nothing": {"nothing", "new"}}
    assert seen == expected.get(there, {"old", "put back", "new"})


@pytest.mark.parametrize(
    ("there", "number", "step"),
    [("a bundle", signal.SIGINT, 1), ("a bundle", signal.SIGTERM, 4), ("two renames", signal.SIGINT, 2)],
)
def test_interrupted_at_any_moment_the_exit_code_says_which_is_there(out, number, step, there, request):
    if there == "two renames":
        request.getfixturevalue("two_renames")
    codes = set()
    write(out, "old")
    for child in each_call(lambda: export(out, "new"), step=step):
        code = child.end(number)
        assert look(out) == ("new" if code == 0 else "old"), code
        codes.add(code)
        write(out, "old")
        assert os.listdir(out.parent) == ["b"]
    stopped = {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert {0, stopped} <= codes <= {0, stopped, 99, -number}  # the latter two before there was a handler


def test_of_several_writers_one_wins_and_the_others_say_so(out, capsys):
    write(out, "old")
    with reserve_bundle(out) as reserved:
        for path in (out, out.parent / "x" / ".." / "b"):
            assert export(path, "second") == 2
            assert "another process is writing it; wait for it" in capsys.readouterr().err
        assert look(out) == "old"
        write(out.parent / "c", "beside")
        reserved.write(MANIFEST, {"model.onnx": b"first"})
    assert Bundle.open(out).read("model.onnx") == b"first"
    assert export(out, "third") == 0
    assert sorted(os.listdir(out.parent)) == ["b", "c"]


def test_what_lives_is_not_cleared_away(out):
    for child in each_call(lambda: write(out, "new"), step=3):
        files._cleared.clear()
        with atomic_write(out.parent / "file") as stream:  # clears up in the same folder
            stream.write(b"x")
        assert child.end() == 0
        assert look(out) == "new"
        assert sorted(os.listdir(out.parent)) == ["b", "file"]


def test_a_file_written_in_a_killed_process_is_whole_or_not_there(out):
    def save():
        files._cleared.clear()
        with atomic_write(out) as stream:
            stream.write(b"new")
        return 0

    seen = set()
    out.write_bytes(b"old")
    for child in each_call(save):
        child.kill()
        seen.add(out.read_bytes())
        save()
        assert os.listdir(out.parent) == ["b"]
        out.write_bytes(b"old")
    assert seen == {b"old", b"new"}


def test_a_cache_with_two_writers_one_of_them_killed_has_a_whole_entry(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def keep(data):
        cache.write("engines", "key", data, {"of": data.decode()})
        return 0

    keep(b"before")
    for child in each_call(lambda: keep(b"killed")):
        keep(b"whole")
        child.kill()
        data, record = cache.read("engines", "key")
        assert data in (b"whole", b"killed")
        assert record["of"] == data.decode()
    files._cleared.clear()
    keep(b"next")
    assert os.listdir(tmp_path / "meta-deploy" / "engines") == ["key.bin"]


def test_a_place_that_fails_at_the_last_step_keeps_the_old_bundle(out, two_renames, monkeypatch):
    write(out, "old")
    rename = folders.Path.rename

    def fail_into_place(self, target):
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders.Path, "rename", fail_into_place)
        with pytest.raises(InputError, match="No space left"):
            write(out, "new")
    assert look(out) == "old"
    assert os.listdir(out.parent) == ["b"]
    assert write_bundle(out, MANIFEST, {"model.onnx": b""})


def test_an_old_bundle_that_cannot_be_put_back_at_once_is_not_removed(out, two_renames, monkeypatch):
    write(out, "old")
    rename = folders.Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(folders.Path, "rename", lambda a, b: rename(a, b) if a == out else b.stat())
        with pytest.raises(InputError):
            write(out, "new")
    write(out.parent / "another", "one")
    assert look(out) == "old"
