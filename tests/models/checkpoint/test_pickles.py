"""Pickles that torch's own reader would crash on, hang on or fill the memory for are refused before it."""

import argparse
import collections
import datetime
import io
import pickle
import struct
import sys
import time
import types
import typing
import zipfile

import numpy as np
import pytest
import torch

from meta_deploy.models.checkpoint.load import load_model
from tests.models.checkpoint.checkpoints import build, prefixed, refusal, same, small

START = b"\x80\x02"


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def integer(value):
    data = value.to_bytes(11, "little")
    return b"\x8a\x0b" + data


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


MANY = b"".join(b"h\x00h\x02X\x06\x00\x00\x00latin1\x86R" for _ in range(3000))
HARMFUL = {
    "a tuple 300,000 deep as a key": (b"}" + b")" + b"\x85" * 300_000 + b"K\x01s.", "deep"),
    "tuples that share their parts": (
        b"}K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s.",
        "without end",
    ),
    "a terabyte of zeros": (named("__builtin__", "bytearray") + integer(10**12) + b"\x85R.", "asks for"),
    "a tensor by its sizes": (
        named("torch", "FloatTensor") + integer(10**6) + integer(10**6) + b"\x86\x81.",
        "asks for",
    ),
    "a slow encoding": (
        named("_codecs", "encode") + text(b"\xc3\xa9" * 100_000) + text(b"idna") + b"\x86R.",
        "idna",
    ),
    "integers that collide": (
        b"}(" + b"".join(integer(i * (2**61 - 1)) + b"K\x01" for i in range(20_000)) + b"u.",
        "60 bits",
    ),
    "copies of a long text": (
        named("__builtin__", "bytearray") + b"q\x00](" + text(b"a" * 100_000) + b"q\x02" + MANY + b"e.",
        "without end",
    ),
    "a set of a long list, often": (
        named("__builtin__", "set")
        + b"q\x00](]("
        + b"K\x01" * 99_999
        + b"eq\x01"
        + b"h\x00h\x01\x85R" * 300
        + b"e.",
        "without end",
    ),
    "a call by another": (
        named("torch._tensor", "_rebuild_from_type_v2")
        + b"("
        + named("__builtin__", "bytearray")
        + named("torch", "Tensor")
        + integer(10**12)
        + b"\x85}tR.",
        "bytearray",
    ),
}


def zipped(content, path):
    """A checkpoint of torch's own making, with another main pickle."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, content if entry.filename.endswith("/data.pkl") else old.read(entry))


def legacy(content, path):
    """The same in the format before zip."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in head) + content)


@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize("case", HARMFUL)
def test_what_would_do_harm_is_refused_in_no_time(path, case, write):
    content, reason = HARMFUL[case]
    write(START + content, path)
    began = time.perf_counter()
    message = refusal(path)
    assert "is not loaded, as it" in message
    assert reason in message
    assert time.perf_counter() - began < 5


def test_storages_larger_than_the_file_are_refused(path):
    torch.save({"a": torch.ones(7)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"K\x07N") == 1  # the storage's number of elements, before its view
    path.write_bytes(data.replace(b"K\x07N", integer(10**12) + b"N"))
    assert "claims tensors of 1000000000000 elements" in refusal(path)


def test_endless_work_is_counted(path, monkeypatch):
    monkeypatch.setattr("meta_deploy.models.checkpoint.pickles.MAX_OPCODES", 1000)
    zipped(START + b"](" + b"N" * 2000 + b"e.", path)
    assert "more than 1000 steps" in refusal(path)


def test_attributes_in_place_of_methods_are_refused(path):
    zipped(START + named("collections", "OrderedDict") + b")R}" + text(b"items") + b"K\x01sb.", path)
    assert "no plain dict" in refusal(path)


ODD = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "by channel": lambda: torch.quantize_per_channel(
        torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8
    ),
    "meta": lambda: torch.ones(3, device="meta"),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_no_weights_are_named(path, state, kind):
    torch.save({**state, "odd.one": ODD[kind]()}, path)
    assert "(odd.one)" in refusal(path)


def test_views_without_end_of_one_storage_are_refused(path):
    base = torch.ones(1 << 16)
    torch.save({f"a{i}": base[:] for i in range(100)}, path)
    assert "share" in refusal(path)


def test_numbers_and_options_beside_the_weights_do_no_harm(path, state):
    extras = {"lr": np.float32(0.1), "sizes": torch.Size([4096, 4096]), "large": [2**100, (1, (2, (3,)))]}
    torch.save({"model": state, **extras, "key": {(1, 2): 3}}, path)
    assert same(load_model(path).model.state_dict(), state)


def test_a_checkpoint_with_much_beside_the_weights_is_read(path, state):
    log = [{"step": i, "loss": 0.5, "name": "train"} for i in range(5000)]
    torch.save({"module." + name: tensor for name, tensor in state.items()} | {"log": log}, path)
    assert same(load_model(path).model.state_dict(), state)


@pytest.mark.parametrize("zipped_too", [True, False])
def test_options_of_many_kinds_beside_the_weights_are_read_as_nothing(path, state, monkeypatch, zipped_too):
    counts = collections.defaultdict(int)
    counts["x"] = 3
    options = [
        argparse.Namespace(lr=0.1, inner=argparse.Namespace(a=1)),
        types.SimpleNamespace(a=1),
        datetime.datetime(2026, 1, 1),
        [np.float32(1), np.int64(2), np.bool_(True), np.str_("a"), np.arange(3), np.array(["a"])],
        counts,
        {1, 2},
        b"abc",
        *_stand_ins(monkeypatch),
    ]
    torch.save(
        {"state_dict": state, "hyper_parameters": options}, path, _use_new_zipfile_serialization=zipped_too
    )
    assert same(load_model(path).model.state_dict(), state)


def _stand_ins(monkeypatch):
    """Objects that pickle as OmegaConf's and EasyDict's do, without these libraries."""
    made = []
    for name, base, content in (
        ("omegaconf.dictconfig.DictConfig", object, {"_content": {"a": 1}, "_metadata": typing.Any}),
        ("easydict.EasyDict", dict, {"a": 1}),
    ):
        module, _, last = name.rpartition(".")
        kind = type(last, (base,), {"__module__": module})
        for part in (module.split(".")[0], module):
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        setattr(sys.modules[module], last, kind)
        thing = kind()
        thing.__dict__.update(content)
        if base is dict:
            thing.update(content)
        made.append(thing)
    return made


@pytest.mark.parametrize("count", [1, 2, 36, 93])
def test_any_number_of_classes_is_loaded(path, count):
    config = small(num_classes=count)
    names = [f"kind {i}" for i in range(count)]
    content = {"state_dict": build(config).state_dict(), "meta": {"CLASSES": names}}
    torch.save(content, path)
    loaded = load_model(path)
    assert (loaded.config.num_classes, loaded.class_names) == (count, names)
    content["meta"] = {"CLASSES": [*names, "background"]}
    torch.save(content, path)
    assert load_model(path).class_names == names
    content["meta"] = {"CLASSES": ["__background__", *names]}
    torch.save(content, path)
    assert load_model(path).class_names == names


# --- which of several states -------------------------------------------------------------------------------


def test_an_ema_without_the_head_does_not_win_over_whole_weights(path, state):
    backbone = {n: torch.zeros_like(t) for n, t in state.items() if n.startswith("backbone.")}
    torch.save({"model": state, "ema": backbone}, path)
    notes: list[str] = []
    assert same(load_model(path, log=notes.append).model.state_dict(), state)
    assert any("EMA" in note and "left out" in note for note in notes)
    assert same(load_model(path, allow_partial=True).model.state_dict(), state)


def test_an_ema_with_nan_does_not_win_either(path, state):
    torch.save({"model": state, "ema": {n: t * float("nan") for n, t in state.items()}}, path)
    assert same(load_model(path).model.state_dict(), state)


def test_a_teacher_of_another_shape_does_not_win_over_the_student(path, state):
    teacher = {n: torch.zeros(*t.shape, 2) for n, t in state.items()}
    torch.save({**prefixed(teacher, "teacher."), **prefixed(state, "student.")}, path)
    assert same(load_model(path).model.state_dict(), state)


@pytest.mark.parametrize(
    "prefix",
    [
        "student.",
        "teacher.",
        "ema.",
        "ema.module.",
        "module.student.model.",
        "model._orig_mod.teacher.module.",
    ],
)
def test_prefixes_come_in_any_combination(path, state, prefix):
    torch.save({"state_dict": prefixed(state, prefix)}, path)
    assert same(load_model(path).model.state_dict(), state)


def test_the_averaged_half_of_a_training_module_is_taken(path, state):
    plain = {n: torch.zeros_like(t) for n, t in state.items()}
    torch.save(
        {**prefixed(plain, "student."), **prefixed(state, "teacher."), "dino.center": torch.ones(3)}, path
    )
    notes: list[str] = []
    assert same(load_model(path, log=notes.append).model.state_dict(), state)
    assert any("dino.center" in note for note in notes)


def test_a_counter_of_batches_may_be_a_float(path, state):
    counted = {n: t.float() if n.endswith("num_batches_tracked") else t for n, t in state.items()}
    assert any(n.endswith("num_batches_tracked") for n in state)
    torch.save(counted, path)
    assert load_model(path).report.complete
