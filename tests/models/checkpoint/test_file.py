"""Files: formats that are read, and what is refused without being trusted or run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from meta_deploy.errors import CheckpointError
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.checkpoint.read import read_checkpoint
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.registry import config_to_dict, get_config
from tests.models.checkpoint.checkpoints import refusal, same, small


def test_torchs_old_format_is_read(path, state):
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    assert same(load_model(path).model.state_dict(), state)


def test_a_file_saved_without_checksums_is_read(path, state):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load_model(path).model.state_dict(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(path, state, dtype):
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, path)
    loaded = load_model(path).model.state_dict()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        torch.testing.assert_close(loaded[name], value.to(dtype).to(value.dtype), rtol=0, atol=0)


def test_a_file_is_known_by_its_content_not_its_suffix(tmp_path, model):
    save_checkpoint(tmp_path / "a.safetensors", model, small())
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pth")
    assert load_model(tmp_path / "a.pth").config == small()


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, exec, open, getattr])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, path, state, function, zipped):
    flag = tmp_path / "ran"
    arguments = {
        os.system: (f"touch {flag}",),
        eval: (f"open({str(flag)!r}, 'w')",),
        exec: (f"open({str(flag)!r}, 'w')",),
        open: (str(flag), "w"),
        getattr: (Runs(eval, f"open({str(flag)!r}, 'w')"), "close"),
    }[function]
    saved = {"model": state, "extra": Runs(function, *arguments)}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert "pickles code" in message
    assert {os.system: "system", getattr: "eval"}.get(function, function.__name__) in message
    assert "state_dict" in message
    assert not flag.exists()


def test_a_pickled_module_is_refused_with_its_name(path):
    torch.save(torch.nn.Linear(2, 2), path)
    message = refusal(path)
    assert "torch.nn.modules.linear.Linear" in message
    assert "state_dict" in message


def test_a_plain_pickle_is_refused(path):
    path.write_bytes(pickle.dumps({"a": [1, 2]}))
    assert "cannot be unpickled" in refusal(path)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    assert "TorchScript" in refusal(path)


def write_tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())


def write_npz(path):
    with path.open("wb") as stream:
        np.savez(stream, a=np.ones(3))


def write_zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))


def write_git_lfs(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: os.mkfifo(p), "not a regular file"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_bytes(b"hello world"), "neither by torch.save nor by safetensors"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n"), "HDF5"),
        (lambda p: p.write_text("<!DOCTYPE html>"), "web page"),
        (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(40)), "truncated or damaged"),
        (write_git_lfs, "Git LFS"),
        (write_tar, "tar archive"),
        (write_npz, "zip archive without a checkpoint"),
        (write_zip_bomb, "compressed"),
        (lambda p: torch.save([1, 2], p), "holds no tensors by name (it holds a list)"),
        (lambda p: torch.save(torch.ones(3), p), "holds no tensors by name (it holds a Tensor)"),
        (lambda p: torch.save({"step": torch.tensor(3)}, p), "holds no tensors by name"),
        (lambda p: save_file({}, p), "holds no tensors by name"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(path, write, says):
    write(path)
    assert says in refusal(path)


def safetensors_bytes(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "content",
    [
        safetensors_bytes({}, length=2**63),
        safetensors_bytes({}, length=2**40),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2**63, 2], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)),
        safetensors_bytes({"a": {"dtype": "X99", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors_bytes(b'{"a":' * 20000),
        safetensors_bytes(b"{\xff\xfe}"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    assert "not a whole safetensors file" in refusal(path)


def test_a_view_that_claims_more_than_is_stored_is_refused(path):
    torch.save({"a.weight": torch.ones(1).expand(2**20, 2**20)}, path)
    assert "without data" in refusal(path)


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize(
    "tensor",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(2, dtype=torch.complex64),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        lambda: torch.empty(2, device="meta"),
    ],
    ids=["sparse", "complex", "quantized", "meta"],
)
def test_tensors_that_hold_no_plain_numbers_are_refused(path, tensor):
    torch.save({"first": torch.ones(2), "odd.weight": tensor()}, path)
    assert "(odd.weight)" in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_and_infinity_are_refused_with_the_tensors_names(path, state, value, dtype):
    bad = dict(state)
    for name in ("backbone.up.bias", "rpn_head.rpn_reg.bias"):
        bad[name] = torch.full_like(state[name], value).to(dtype)
    torch.save(bad, path)
    message = refusal(path)
    assert "2 tensor(s): backbone.up.bias, rpn_head.rpn_reg.bias" in message


def test_names_with_control_characters_stay_in_one_line(path):
    torch.save({"a\nb\x1b[31m" + "c" * 500: torch.ones(2)}, path)
    message = refusal(path)
    assert "\x1b" not in message


@pytest.mark.parametrize("zipped", [True, False])
def test_every_truncation_is_refused(path, zipped):
    torch.save({"a": torch.ones(30), "b": torch.zeros(3)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in range(1, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def saved_bytes(**options):
    stream = io.BytesIO()
    data = {
        "a.weight": torch.ones(5, 2),
        "b": torch.zeros(3, dtype=torch.int64),
        "half": torch.ones(4).half(),
    }
    torch.save({"model": data, "classes": ["x"], "config": {"a": 1}}, stream, **options)
    return stream.getvalue()


def unchecked_bytes():
    torch.serialization.set_crc32_options(False)
    try:
        return saved_bytes()
    finally:
        torch.serialization.set_crc32_options(True)


ZIPPED, LEGACY = saved_bytes(), saved_bytes(_use_new_zipfile_serialization=False)
UNCHECKED = unchecked_bytes()  # damage reaches the unpickler
SAFETENSORS = safetensors_bytes(
    {
        "__metadata__": {"config": json.dumps(config_to_dict(get_config("meta-t-upernet"))), "classes": "[]"},
        "a": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
    },
    bytes(24),
)


@pytest.mark.parametrize("whole", [ZIPPED, UNCHECKED, LEGACY, SAFETENSORS], ids=lambda b: f"{len(b)} bytes")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_of_any_damage_only_a_checkpoint_error_comes(tmp_path, whole, data):
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        # Most of a zip's first kilobyte is the pickle.
        where = data.draw(st.one_of(st.integers(0, min(700, len(whole) - 1)), st.integers(0, len(whole) - 1)))
        damaged[where] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    path = tmp_path / "m.pth"
    path.write_bytes(damaged)
    refusal(path)


@pytest.fixture(scope="module")
def whole_model(state):
    """A file without checksums: damage reaches the unpickler, and what it makes reaches the model."""
    stream = io.BytesIO()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": state, "config": config_to_dict(small())}, stream)
    finally:
        torch.serialization.set_crc32_options(True)
    return stream.getvalue()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_of_a_damaged_model_only_a_model_or_a_checkpoint_error_comes(tmp_path, whole_model, data):
    damaged = bytearray(whole_model)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, 60_000))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "m.pth"
    path.write_bytes(damaged)
    for options in (
        {},
        {"allow_partial": True},
        {"model_name": "meta-nano-mask-rcnn", "allow_partial": True},
    ):
        try:
            loaded = load_model(path, **options)
        except CheckpointError:
            continue
        assert not any(tensor.is_meta for tensor in loaded.model.state_dict().values())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_name_that_is_no_text_is_read(tmp_path, model, suffix):
    plain = tmp_path / f"x{suffix}"
    save_checkpoint(plain, model, small())
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xef\n" + suffix.encode()))
    plain.rename(path)
    assert same(load_model(path).model.state_dict(), model.state_dict())


def packed(path, name, data, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("README.txt", "weights")
        archive.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_checkpoint_in_an_ordinary_archive_is_read(tmp_path, path, state, method):
    torch.save(state, path)
    whole = packed(tmp_path / "x.zip", "model/x.pth.tar", path.read_bytes(), method)
    assert same(read_checkpoint(whole).state, read_checkpoint(path).state)


def test_what_is_wrong_with_a_packed_checkpoint_is_said_of_the_archive(tmp_path, path, state):
    torch.save(state, path)
    data = path.read_bytes()
    assert "holds 'x.pth', which is truncated" in refusal(packed(tmp_path / "a.zip", "x.pth", data[:5000]))
    assert "packed tighter than weights" in refusal(packed(tmp_path / "b.zip", "x.pth", bytes(10_000_000)))
    inner = packed(tmp_path / "c.zip", "x.pth", data).read_bytes()
    twice = packed(tmp_path / "d.zip", "c.pth", inner)
    assert "holds 'c.pth', which is a zip archive without a checkpoint" in refusal(twice)
