"""Checkpoints: what is read, what is refused, what is inferred, what is loaded."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.torch import save_file
from torch.nn import functional as F

from meta_deploy.errors import CheckpointError, InputError
from meta_deploy.models.checkpoint.configure import infer_config
from meta_deploy.models.checkpoint.load import load_model, load_vit_weights
from meta_deploy.models.checkpoint.read import Checkpoint, read_checkpoint
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.class_names import ADE20K_CLASSES, COCO_CATEGORY_IDS, COCO_CLASSES
from meta_deploy.models.registry import MODEL_NAMES, build_model, config_to_dict, get_config


def small(head="mask-rcnn", num_classes=3, backbone=None, **options):
    """A nano with everything narrow but the width, by which the zoo knows it."""
    config = get_config(f"meta-nano-{head}", num_classes)
    narrow = {"fpn_channels": 16, "fc_channels": 24, "mask_channels": 8} if head == "mask-rcnn" else {}
    narrow = narrow or {"channels": 16}
    sizes = {"depth": 4, "mlp_ratio": 1.0, "adapter_ratio": 0.125, "adapter_parts": 2, "inplanes": 4}
    return replace(
        config,
        backbone=replace(config.backbone, **{**sizes, **(backbone or {})}),
        **{**narrow, **options},
    )


def build(config):
    torch.manual_seed(0)
    return build_model(config)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refusal(path, *args, **kwargs):
    """The message with which loading fails; one line that names the file."""
    with pytest.raises(CheckpointError) as error:
        load_model(path, *args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 1200
    return message


@pytest.fixture(scope="module")
def model():
    return build(small())


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


# --- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("head", ["mask-rcnn", "upernet"])
def test_what_is_saved_comes_back_equal(tmp_path, head, suffix):
    config = small(head, 5, backbone={"window": 7, "stripe_width": 2})
    model = build(config)
    save_checkpoint(tmp_path / f"m{suffix}", model, config, ["a", "b", "c", "d", "e"])
    loaded = load_model(tmp_path / f"m{suffix}")
    assert same(loaded.model.state_dict(), model.state_dict())
    assert loaded.config == config
    assert loaded.class_names == ["a", "b", "c", "d", "e"]
    assert loaded.report.complete
    assert not loaded.model.training
    assert [p.name for p in tmp_path.iterdir()] == [f"m{suffix}"]


def test_a_loaded_model_computes_what_the_saved_one_did(path):
    config = small("upernet")
    model = build(config)
    save_checkpoint(path, model, config)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load_model(path).model(images)["logits"], model(images)["logits"])


def test_a_loaded_model_does_not_change_with_its_file(path, model, state):
    save_checkpoint(path, model, small())
    loaded = load_model(path)
    with path.open("r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    assert same(loaded.model.state_dict(), state)


def test_a_file_is_known_by_its_content_not_its_suffix(tmp_path, model):
    save_checkpoint(tmp_path / "a.safetensors", model, small())
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pth")
    assert load_model(tmp_path / "a.pth").config == small()


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


def test_counters_of_batch_norm_may_be_missing(path, state):
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    loaded = load_model(path)
    assert loaded.report.complete
    assert not any(p.is_meta for p in loaded.model.state_dict().values())


@pytest.mark.parametrize("name", ["model.onnx", "model", "model.json"])
def test_saving_under_an_unknown_suffix_is_refused(tmp_path, model, name):
    with pytest.raises(CheckpointError, match="suffix"):
        save_checkpoint(tmp_path / name, model, small())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_saving_where_one_cannot_write_leaves_nothing(tmp_path, model, suffix):
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "absent" / f"m{suffix}", model, small())
    (tmp_path / f"m{suffix}").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / f"m{suffix}", model, small())
    assert [p.name for p in tmp_path.iterdir()] == [f"m{suffix}"]


# --- nests --------------------------------------------------------------------------------------------------


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def compiled_in_the_middle(state):
    return {name.replace("backbone.", "backbone._orig_mod.", 1): t for name, t in state.items()}


def dict_of_dicts(state):
    parts: dict = {}
    for name, tensor in state.items():
        part, rest = name.split(".", 1)
        parts.setdefault(part, {})[rest] = tensor
    return parts


NESTS = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}}},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": torch.tensor(0.5)},
    "nested twice": lambda s: {"state_dict": {"model": s}},
    "an unknown name": lambda s: {"generator_9": s, "optim_state": {"m": torch.ones(3)}},
    "DataParallel": lambda s: {"model": prefixed(s, "module.")},
    "Lightning": lambda s: {"state_dict": {**prefixed(s, "model."), "step": torch.tensor(3)}},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled, DDP, Lightning": lambda s: {"state_dict": prefixed(s, "model._orig_mod.module.")},
    "DDP inside compile": lambda s: prefixed(s, "module._orig_mod."),
    "a compiled part": compiled_in_the_middle,
    "swa": lambda s: {**prefixed(s, "module."), "n_averaged": torch.tensor(7)},
    "a dict a module": lambda s: {"modules": dict_of_dicts(s)},
}


@pytest.mark.parametrize("nest", NESTS)
def test_every_nest_is_unwrapped(path, state, nest):
    torch.save(NESTS[nest](state), path)
    loaded = load_model(path)
    assert same(loaded.model.state_dict(), state)
    assert loaded.config == small()


@pytest.mark.parametrize("key", ["ema", "model_ema", "state_dict_ema", "ema_state_dict"])
@pytest.mark.parametrize("inside", ["bare", "DataParallel", "an unknown name"])
def test_averaged_weights_are_preferred_and_said(path, state, key, inside):
    plain = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": plain, key: NESTS[inside](state)}, path)
    notes: list[str] = []
    loaded = load_model(path, log=notes.append)
    assert same(loaded.model.state_dict(), state)
    assert any("EMA" in note for note in notes)


def test_what_was_not_averaged_is_taken_from_the_plain_weights(path, model, state):
    parameters = dict(model.named_parameters())
    plain = {n: torch.zeros_like(t) if n in parameters else t for n, t in state.items()}
    torch.save({"model": plain, "ema": {n: state[n] for n in parameters}}, path)
    assert same(load_model(path).model.state_dict(), state)


def test_an_ema_without_tensors_is_no_ema(path, state):
    torch.save({"model": state, "ema": {"decay": 0.999, "updates": torch.tensor(10)}}, path)
    assert same(load_model(path).model.state_dict(), state)


def test_mmengine_has_the_average_under_state_dict(path, state):
    plain = {"module." + name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"state_dict": state, "ema_state_dict": plain, "message_hub": {}, "meta": {}}, path)
    assert same(load_model(path).model.state_dict(), state)


def test_cycles_and_depth_are_survived(path, state):
    cycle: dict = {"a": {}}
    cycle["a"]["b"] = cycle
    torch.save(cycle, path)
    assert "holds no tensors" in refusal(path)
    cycle["model"] = state
    torch.save(cycle, path)
    assert same(load_model(path).model.state_dict(), state)
    deep: dict = {"w": torch.ones(2)}
    for _ in range(200):
        deep = {"x": deep}
    torch.save(deep, path)
    assert "holds no tensors" in refusal(path)


def test_a_name_twice_after_unwrapping_is_refused(path):
    torch.save({"a.weight": torch.ones(2), "module.a.weight": torch.zeros(2)}, path)
    assert "twice" in refusal(path)


def test_leaves_that_are_no_tensors_are_ignored(path, state):
    torch.save({**state, "epoch": 3, "note": "x", "list": [1, torch.ones(2)], 7: torch.ones(1)}, path)
    assert same(load_model(path).model.state_dict(), state)


def test_training_extras_are_no_reason_to_refuse(path, state):
    extras = {
        "args": argparse.Namespace(lr=1e-4, out=Path("/tmp/x")),
        "best": np.float64(0.5),
        "history": np.arange(4.0),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "rng": torch.get_rng_state(),
    }
    torch.save({"model": state, **extras}, path)
    assert same(load_model(path).model.state_dict(), state)


def test_mmengines_message_hub_is_read_as_nothing(path, state, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def mean(self): ...

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    buffer = HistoryBuffer()
    buffer.history, buffer.statistics = np.arange(3.0), {"mean": HistoryBuffer.mean}
    hub = {"log_scalars": {"train/loss": buffer}}
    torch.save({"state_dict": state, "message_hub": hub, "meta": {"dataset_meta": {}}}, path)
    assert same(load_model(path).model.state_dict(), state)


# --- class names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {"classes": ["x", "y", "z"]},
        {"class_names": ("x", "y", "z")},
        {"names": {0: "x", 1: "y", 2: "z"}},
        {"meta": {"CLASSES": ("x", "y", "z"), "mmdet_version": "2.25"}},
        {"meta": {"dataset_meta": {"classes": ("x", "y", "z")}}},
        {"dataset_meta": {"CLASSES": ["x", "y", "z"]}},
    ],
)
def test_class_names_are_found_where_trainers_put_them(path, state, extra):
    torch.save({"state_dict": state, **extra}, path)
    assert load_model(path).class_names == ["x", "y", "z"]


def test_class_names_of_the_wrong_count_are_not_used(path, state):
    torch.save({"state_dict": state, "classes": ["x", "y"]}, path)
    notes: list[str] = []
    assert load_model(path, log=notes.append).class_names == ["class 0", "class 1", "class 2"]
    assert any("2 class names for 3 classes" in note for note in notes)


@pytest.mark.parametrize("bad", ["", "  ", "x" * 201, "a\nb", "\x1b[31m"])
def test_class_names_that_cannot_be_shown_are_not_used(path, state, bad):
    torch.save({"state_dict": state, "classes": ["x", "y", bad]}, path)
    notes: list[str] = []
    assert load_model(path, log=notes.append).class_names == ["class 0", "class 1", "class 2"]
    assert any("class names that are empty" in note for note in notes)


@pytest.mark.parametrize(
    ("head", "count", "names"), [("mask-rcnn", 80, COCO_CLASSES), ("upernet", 150, ADE20K_CLASSES)]
)
def test_missing_class_names_are_the_usual_data_sets(path, head, count, names):
    torch.save(build(small(head, count)).state_dict(), path)
    assert load_model(path).class_names == list(names)


def test_class_lists_are_complete():
    assert len(set(COCO_CLASSES)) == len(set(COCO_CATEGORY_IDS)) == 80
    assert (COCO_CATEGORY_IDS[0], COCO_CATEGORY_IDS[11], COCO_CATEGORY_IDS[-1]) == (1, 13, 90)
    assert len(ADE20K_CLASSES) == 150
    assert len(set(ADE20K_CLASSES)) == 150
    assert all(name == name.strip() and "\n" not in name for name in COCO_CLASSES + ADE20K_CLASSES)


# --- what is no checkpoint ----------------------------------------------------------------------------------


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


# --- telling the model --------------------------------------------------------------------------------------


def on_meta(config):
    """The checkpoint of a model of which only names and shapes exist."""
    with torch.device("meta"):
        state = build_model(config).state_dict()
    return Checkpoint(state, None, None, Path("m.pth"))


ALTERED = [
    {},
    {"adapter_parts": 2},
    {"shared_norm": False},
    {"layer_scale": True},
    {"inplanes": 48, "pos_grid": 32},
    {"adapter_ratio": 1 / 3, "ffn_ratio": 0.5, "mlp_ratio": 3.0},
]


@pytest.mark.parametrize("altered", ALTERED, ids=str)
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_configuration_is_told_from_names_and_shapes(name, altered):
    if "adapter_ratio" in altered and get_config(name).backbone.embed_dim % 96:
        altered = {**altered, "adapter_ratio": 0.25}
    config = get_config(name, 7)
    config = replace(config, backbone=replace(config.backbone, **altered))
    inferred = infer_config(on_meta(config))
    if "adapter_ratio" in altered:  # a ratio is known up to the integer that it gives
        ratio = inferred.backbone.adapter_ratio
        width = config.backbone.embed_dim
        assert int(width * ratio) == int(width * altered["adapter_ratio"])
        backbone = replace(inferred.backbone, adapter_ratio=altered["adapter_ratio"])
        inferred = replace(inferred, backbone=backbone)
    assert inferred == config


@pytest.mark.parametrize("width", [128, 192, 384, 768, 1024])
@pytest.mark.parametrize("hidden", [32, 48, 80, 112, 144, 176])
def test_an_inferred_adapter_ratio_gives_the_same_width(width, hidden):
    config = next(get_config(n) for n in MODEL_NAMES if get_config(n).backbone.embed_dim == width)
    name = "backbone.interactions.0.injector.reduce.weight"
    state = {**on_meta(config).state, name: torch.empty(hidden, 2 * width, 1, 1, device="meta")}
    backbone = infer_config(Checkpoint(state, None, None, Path("m"))).backbone
    assert int(width * backbone.adapter_ratio) == hidden


def test_head_widths_are_told_from_shapes():
    for config in (small(), small("upernet")):
        assert infer_config(on_meta(config)) == config


def test_a_width_outside_the_zoo_needs_an_embedded_configuration(tmp_path):
    config = small(backbone={"embed_dim": 64, "num_heads": 2, "adapter_heads": 2})
    model = build(config)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert "attention heads can't be told" in refusal(tmp_path / "bare.pth")
    save_checkpoint(tmp_path / "own.pth", model, config)
    assert load_model(tmp_path / "own.pth").config == config


def test_other_pooling_scales_need_an_embedded_configuration(tmp_path):
    config = small("upernet", pool_scales=(1, 2))
    model = build(config)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert "2 pooling scales" in refusal(tmp_path / "bare.pth")
    save_checkpoint(tmp_path / "own.pth", model, config)
    assert load_model(tmp_path / "own.pth").config == config


def test_what_was_guessed_is_said(path, state):
    torch.save(state, path)
    notes: list[str] = []
    load_model(path, log=notes.append)
    assert any("meta-nano-mask-rcnn" in note and "windows" in note for note in notes)


def test_another_model_is_refused_with_what_it_holds(path):
    names = ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight"]
    torch.save({name: torch.ones(4, 3) for name in names}, path)
    message = refusal(path)
    assert "conv1.weight, bn1.weight, layer1.0.conv1.weight and 1 more" in message
    assert "meta-t-mask-rcnn" in message


@pytest.mark.parametrize("named", ["meta-t-mask-rcnn", "meta-nano-upernet", "meta-t-upernet"])
def test_naming_another_model_is_refused_with_both_names(path, state, named):
    torch.save(state, path)
    message = refusal(path, named)
    assert named in message
    assert "look like meta-nano-mask-rcnn" in message


def test_an_unknown_model_name_is_refused_before_reading(path):
    with pytest.raises(InputError, match="meta-t-mask-rcnn"):
        load_model(path, "yolo")


def test_a_named_model_takes_its_classes_from_the_tensors(path):
    config = get_config("meta-nano-mask-rcnn", 5)
    torch.save(build(config).state_dict(), path)
    assert load_model(path, "meta-nano-mask-rcnn").config == config


def test_an_embedded_configuration_of_the_named_model_is_used(path, model):
    save_checkpoint(path, model, small())
    assert load_model(path, "meta-nano-mask-rcnn").config == small()


def test_a_named_model_overrides_other_embedded_settings_and_says_so(path):
    own = replace(get_config("meta-nano-mask-rcnn", 5), name="mine", score_threshold=0.3, max_detections=7)
    save_checkpoint(path, build(own), own)
    notes: list[str] = []
    loaded = load_model(path, "meta-nano-mask-rcnn", log=notes.append)
    assert loaded.config == get_config("meta-nano-mask-rcnn", 5)
    assert any("score_threshold 0.3 -> 0.05" in note for note in notes)
    assert load_model(path).config == own


@pytest.mark.parametrize(
    "change",
    [
        {"head": "yolo"},
        {"head": ["x"]},
        {"backbone": 7},
        {"surprise": 1},
        {"num_classes": "many"},
        {"num_classes": -3},
        {"fpn_channels": 2**62},
        {"backbone": {"depth": 10**9}},
        {"backbone": {"depth": "12"}},
        {"backbone": {"embed_dim": 2**40}},
        {"backbone": {"num_heads": 0}},
        {"backbone": {"adapter_ratio": float("nan")}},
        {"mean": "abc"},
        {"score_threshold": None},
    ],
    ids=str,
)
def test_an_embedded_configuration_that_lies_is_refused(path, state, change):
    config = config_to_dict(small())
    nested = change.get("backbone")
    config.update(change)
    if isinstance(nested, dict):
        config["backbone"] = {**config_to_dict(small())["backbone"], **nested}
    torch.save({"model": state, "config": config}, path)
    refusal(path)


@pytest.mark.parametrize("config", [{"lr": 0.1}, "model:\n  x", argparse.Namespace(head=1), 7])
def test_the_configuration_of_another_trainer_is_no_concern(path, state, config):
    torch.save({"model": state, "config": config}, path)
    assert load_model(path).config == small()


# --- incomplete loads ---------------------------------------------------------------------------------------


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


def test_missing_tensors_are_listed_and_refused(path, state):
    gone = ["neck.fpn_convs.3.conv.bias", "rpn_head.rpn_reg.bias"]
    torch.save(without(state, *gone), path)
    message = refusal(path)
    assert "2 missing (neck.fpn_convs.3.conv.bias, rpn_head.rpn_reg.bias)" in message
    assert "--allow-partial" in message
    loaded = load_model(path, allow_partial=True)
    assert loaded.report.missing == gone
    assert not loaded.report.complete
    assert same(without(loaded.model.state_dict(), *gone), without(state, *gone))


def test_tensors_of_the_wrong_shape_or_type_are_listed_and_refused(path, state):
    wrong = {
        "rpn_head.rpn_reg.bias": torch.zeros(36),
        "rpn_head.rpn_cls.bias": torch.zeros(3, dtype=torch.int8),
    }
    torch.save({**state, **wrong}, path)
    message = refusal(path)
    assert "2 of the wrong shape" in message
    assert "rpn_head.rpn_reg.bias: 36 instead of 12" in message
    assert "torch.int8 instead of torch.float32" in message
    loaded = load_model(path, allow_partial=True)
    assert len(loaded.report.mismatched) == 2
    assert not any(tensor.is_meta for tensor in loaded.model.state_dict().values())


def test_unexpected_tensors_are_listed_and_refused(path, state):
    torch.save({**state, "roi_head.mask_iou_head.fc.weight": torch.ones(3)}, path)
    assert "1 unexpected (roi_head.mask_iou_head.fc.weight)" in refusal(path)
    loaded = load_model(path, allow_partial=True)
    assert loaded.report.unexpected == ["roi_head.mask_iou_head.fc.weight"]
    assert loaded.report.complete


def test_known_leftovers_of_training_are_only_noted(path, state):
    extra = {
        "backbone.vit.norm.weight": torch.ones(128),
        "backbone.vit.cls_token": torch.ones(1, 1, 128),
        "auxiliary_head.conv_seg.weight": torch.ones(3, 4, 1, 1),
        "data_preprocessor.mean": torch.ones(3, 1, 1),
    }
    torch.save({**state, **extra}, path)
    notes: list[str] = []
    loaded = load_model(path, log=notes.append)
    assert sorted(loaded.report.ignored) == sorted(extra)
    assert any("4 tensors not needed" in note for note in notes)


def test_a_backbone_alone_needs_a_name_and_consent(path, state):
    torch.save({n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}, path)
    assert "without a head" in refusal(path)
    assert "does not fit meta-nano-upernet" in refusal(path, "meta-nano-upernet")
    named = build(get_config("meta-nano-mask-rcnn")).state_dict()
    torch.save({n: t for n, t in named.items() if n.startswith("backbone.")}, path)
    loaded = load_model(path, "meta-nano-mask-rcnn", allow_partial=True)
    assert {n.split(".")[0] for n in loaded.report.missing} == {"neck", "rpn_head", "roi_head"}
    assert loaded.config.num_classes == 80


def test_a_position_embedding_of_another_grid_is_resized(path, state):
    grid = torch.randn(1, 10 * 10, 128)
    torch.save({"model": {**state, "backbone.vit.pos_embed": grid}, "config": config_to_dict(small())}, path)
    notes: list[str] = []
    loaded = load_model(path, log=notes.append)
    expected = F.interpolate(
        grid.reshape(1, 10, 10, 128).permute(0, 3, 1, 2), size=(14, 14), mode="bicubic", align_corners=False
    )
    result = loaded.model.state_dict()["backbone.vit.pos_embed"]
    torch.testing.assert_close(result.reshape(14, 14, 128).permute(2, 0, 1), expected[0])
    assert any("resized to 14x14" in note for note in notes)


def test_a_position_embedding_with_a_class_token_loses_it(path, state):
    embed = state["backbone.vit.pos_embed"]
    torch.save({**state, "backbone.vit.pos_embed": torch.cat([torch.ones(1, 1, 128), embed], dim=1)}, path)
    assert torch.equal(load_model(path).model.state_dict()["backbone.vit.pos_embed"], embed)


# --- plain ViTs ---------------------------------------------------------------------------------------------


def timm_vit(width=128, depth=8, grid=12, extra_tokens=1, mlp_ratio=4):
    """A ViT's weights in timm's naming, class token, final norm and classifier included."""
    torch.manual_seed(1)

    def linear(name, inputs, outputs):
        return {f"{name}.weight": torch.randn(outputs, inputs), f"{name}.bias": torch.randn(outputs)}

    def norm(name):
        return {f"{name}.weight": torch.randn(width), f"{name}.bias": torch.randn(width)}

    state = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, grid * grid + extra_tokens, width),
        "patch_embed.proj.weight": torch.randn(width, 3, 16, 16),
        "patch_embed.proj.bias": torch.randn(width),
        **norm("norm"),
        **linear("head", width, 10),
    }
    if extra_tokens == 2:
        state["dist_token"] = torch.randn(1, 1, width)
        state |= linear("head_dist", width, 10)
    for i in range(depth):
        block = f"blocks.{i}."
        state |= norm(block + "norm1") | norm(block + "norm2")
        state |= linear(block + "attn.qkv", width, 3 * width) | linear(block + "attn.proj", width, width)
        state |= linear(block + "mlp.fc1", width, mlp_ratio * width)
        state |= linear(block + "mlp.fc2", mlp_ratio * width, width)
    return state


def dino(state):
    heads = {"head.mlp.0.weight": torch.ones(4, 4)}
    student = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {
        "student": prefixed(student, "module.backbone."),
        "teacher": {**prefixed(state, "backbone."), **heads},
        "args": argparse.Namespace(arch="vit_tiny"),
        "epoch": 100,
    }


@pytest.mark.parametrize("nest", [lambda s: s, lambda s: {"model": s}, dino], ids=["timm", "DeiT", "DINO"])
@pytest.mark.parametrize("extra_tokens", [0, 1, 2])
def test_a_plain_vit_loads_into_the_vit_part(path, nest, extra_tokens):
    vit = timm_vit(extra_tokens=extra_tokens)
    torch.save(nest(vit), path)
    model = build_model(get_config("meta-nano-upernet"))
    before = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("backbone.vit.")}
    report = load_vit_weights(model, path)
    after = model.state_dict()
    grid = vit["pos_embed"][:, extra_tokens:].reshape(1, 12, 12, 128).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(14, 14), mode="bicubic", align_corners=False)
    assert torch.equal(after["backbone.vit.pos_embed"], resized.flatten(2).transpose(1, 2))
    for name in model.backbone.vit.state_dict():
        if name != "pos_embed":
            assert torch.equal(after[f"backbone.vit.{name}"], vit[name])
    assert same(before, {n: after[n] for n in before})
    assert report.complete
    assert report.resized == ["pos_embed"]
    assert not report.unexpected


def test_a_position_embedding_of_the_same_grid_is_taken_as_it_is(path):
    vit = timm_vit(grid=14)
    torch.save(vit, path)
    model = build_model(get_config("meta-nano-upernet"))
    assert load_vit_weights(model, path).resized == []
    assert torch.equal(model.backbone.vit.pos_embed, vit["pos_embed"][:, 1:])


def test_separate_q_k_v_are_fused(path):
    vit = timm_vit()
    split = {}
    for name, tensor in vit.items():
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace("qkv", part)] = piece.clone()
        else:
            split[name] = tensor
    torch.save(split, path)
    model = build_model(get_config("meta-nano-upernet"))
    load_vit_weights(model, path)
    for i, block in enumerate(model.backbone.vit.blocks):
        assert torch.equal(block.attn.qkv.weight, vit[f"blocks.{i}.attn.qkv.weight"])
        assert torch.equal(block.attn.qkv.bias, vit[f"blocks.{i}.attn.qkv.bias"])


def test_a_plain_vit_is_no_whole_model(path):
    torch.save(timm_vit(), path)
    for arguments in ((), ("meta-nano-mask-rcnn",), (None, True)):
        message = refusal(path, *arguments)
        assert "without META's adapter and head" in message
        assert "--allow-partial" in message
    loaded = load_model(path, "meta-nano-mask-rcnn", allow_partial=True)
    assert len(loaded.report.loaded) == len(loaded.model.backbone.vit.state_dict())
    assert "roi_head.bbox_head.fc_cls.weight" in loaded.report.missing
    assert not any(name.startswith("backbone.vit.") for name in loaded.report.missing)


def test_layer_scale_of_a_plain_vit_is_kept(path):
    scales = {f"blocks.{i}.ls{j}.gamma": torch.full((128,), 0.5) for i in range(8) for j in (1, 2)}
    torch.save({**timm_vit(), **scales}, path)
    loaded = load_model(path, "meta-nano-mask-rcnn", allow_partial=True)
    assert loaded.config.backbone.layer_scale
    assert torch.equal(loaded.model.backbone.vit.blocks[3].ls2.gamma, scales["blocks.3.ls2.gamma"])


@pytest.mark.parametrize(
    ("vit", "says"),
    [
        (timm_vit(width=192), "meta-t"),
        (timm_vit(depth=4), "depth 4"),
        ({**timm_vit(), "blocks.0.attn.q_norm.weight": torch.ones(32)}, "unexpected"),
        ({**timm_vit(), "pos_embed": torch.randn(1, 30, 128)}, "pos_embed: 1x30x128 instead of 1x196x128"),
        ({n: t for n, t in timm_vit().items() if n != "pos_embed"}, "1 missing (pos_embed)"),
    ],
    ids=["width", "depth", "another attention", "not square", "no position embedding"],
)
def test_a_vit_of_another_size_or_kind_is_refused(path, vit, says):
    torch.save(vit, path)
    assert says in refusal(path, "meta-nano-mask-rcnn", allow_partial=True)


def test_training_starts_from_the_vit_of_our_own_checkpoint(path, model, state):
    save_checkpoint(path, model, small())
    other = build_model(small("upernet"))
    load_vit_weights(other, path)
    assert torch.equal(
        other.backbone.vit.blocks[1].mlp.fc1.weight, state["backbone.vit.blocks.1.mlp.fc1.weight"]
    )
