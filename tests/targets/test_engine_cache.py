"""What is kept for next time comes back whole, for the same model, library and GPU, or not at all."""

import json
import os
import stat
from dataclasses import replace

import pytest
from msgspec import structs

from meta_deploy.bundle.bundle import write_bundle
from meta_deploy.errors import InputError
from meta_deploy.targets import cache as user_cache
from meta_deploy.targets.tensorrt import cache as engine_cache
from meta_deploy.targets.tensorrt.library import Machine
from tests.bundles_by_hand import ENGINE, manifest

MACHINE = Machine("tensorrt-rtx", "1.7.1", "NVIDIA GeForce RTX 4090", "8.9")
SECTION = structs.replace(ENGINE, compute_capabilities=("8.9",))
posix = pytest.mark.skipif(os.name != "posix", reason="about the permissions of POSIX")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of engines, in an empty cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "meta-deploy" / "engines"


@pytest.fixture
def make(tmp_path):
    def call(model=b"model", **changes):
        content = manifest("detection", (64, 64), target="tensorrt-rtx", engine=SECTION, **changes)
        return write_bundle(tmp_path / "b", content, {"model.onnx": model, "model.engine": b"old"})

    return call


def test_what_is_stored_is_found_with_its_sha256(make, cache):
    bundle = make()
    assert engine_cache.find(bundle, MACHINE) is None
    path = engine_cache.store(bundle, MACHINE, b"plan", SECTION)
    assert path.parent == cache
    data, sha256 = engine_cache.find(bundle, MACHINE)
    assert (data, len(sha256)) == (b"plan", 64)
    assert len(list(cache.iterdir())) == 1  # nothing temporary
    engine_cache.store(bundle, MACHINE, b"newer plan", SECTION)
    assert engine_cache.find(bundle, MACHINE)[0] == b"newer plan"
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"version": "1.8.0"},
        {"gpu": "NVIDIA GeForce RTX 5090"},
        {"compute_capability": "12.0"},
        {"library": "tensorrt"},
    ],
)
def test_another_machine_finds_nothing(make, other):
    bundle = make()
    engine_cache.store(bundle, MACHINE, b"plan", SECTION)
    assert engine_cache.find(bundle, replace(MACHINE, **other)) is None


def test_another_model_or_range_finds_nothing(make):
    engine_cache.store(make(), MACHINE, b"plan", SECTION)
    assert engine_cache.find(make(b"another"), MACHINE) is None
    wider = manifest("detection", (64, 64), batch=2).input
    assert engine_cache.find(make(input=wider), MACHINE) is None
    assert engine_cache.find(make(precision="fp16"), MACHINE) is not None  # the same model, the same range


def alter(path, change):
    record, data = path.read_bytes().split(b"\n", 1)
    path.write_bytes(json.dumps(change(json.loads(record))).encode() + b"\n" + data)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"plan"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(b"\xff\nplan"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text("[1]\nplan"),
        lambda path: alter(path, lambda r: r | {"sha256": "0" * 64}),
        lambda path: alter(path, lambda r: r | {"engine": None}),
        lambda path: alter(path, lambda r: r | {"engine": r["engine"] | {"version": "1.8.0"}}),
        lambda path: alter(path, lambda r: r | {"engine": r["engine"] | {"version": None}}),
        lambda path: alter(path, lambda r: r | {"engine": r["engine"] | {"compute_capabilities": ["12.0"]}}),
    ],
)
def test_anything_wrong_is_as_if_absent_and_is_replaced(make, harm):
    bundle = make()
    harm(engine_cache.store(bundle, MACHINE, b"plan", SECTION))
    assert engine_cache.find(bundle, MACHINE) is None
    engine_cache.store(bundle, MACHINE, b"plan", SECTION)
    assert engine_cache.find(bundle, MACHINE)[0] == b"plan"


@posix
def test_a_folder_that_others_can_write_to_is_not_trusted(make, cache):
    bundle = make()
    engine_cache.store(bundle, MACHINE, b"plan", SECTION)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    for mode in (0o770, 0o702):
        cache.chmod(mode)
        assert engine_cache.find(bundle, MACHINE) is None
        with pytest.raises(InputError, match=r"others can write to it.*chmod go-w"):
            engine_cache.store(bundle, MACHINE, b"plan", SECTION)
    cache.chmod(0o755)
    assert engine_cache.find(bundle, MACHINE) is not None


@posix
def test_another_users_folder_is_not_trusted(make, monkeypatch):
    bundle = make()
    engine_cache.store(bundle, MACHINE, b"plan", SECTION)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert engine_cache.find(bundle, MACHINE) is None
    with pytest.raises(InputError, match="is another user's"):
        engine_cache.store(bundle, MACHINE, b"plan", SECTION)


def test_a_place_that_cannot_be_written_is_one_line(make, monkeypatch, tmp_path):
    bundle = make()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert engine_cache.find(bundle, MACHINE) is None
    with pytest.raises(InputError, match=r"cannot make the cache folder .*XDG_CACHE_HOME") as caught:
        engine_cache.store(bundle, MACHINE, b"plan", SECTION)
    assert "\n" not in str(caught.value)
    engine_cache.store_kernels("0" * 64, MACHINE, b"kernels")  # they only save time


def test_kernels_are_of_an_engine_and_a_machine(cache):
    engine_cache.store_kernels("a" * 64, MACHINE, b"kernels")
    assert engine_cache.find_kernels("a" * 64, MACHINE) == b"kernels"
    assert engine_cache.find_kernels("b" * 64, MACHINE) is None
    assert engine_cache.find_kernels("a" * 64, replace(MACHINE, version="1.8.0")) is None


def test_the_folder_is_in_the_users_cache(monkeypatch, tmp_path):
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert user_cache.root("engines") == tmp_path / ".cache" / "meta-deploy" / "engines"
