"""What trainers wrap around weights: nests, averages, prefixes, class names."""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.class_names import ADE20K_CLASSES, COCO_CATEGORY_IDS, COCO_CLASSES
from tests.models.checkpoint.checkpoints import prefixed, refusal, same, small


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


def test_class_lists_are_complete():
    assert len(set(COCO_CLASSES)) == len(set(COCO_CATEGORY_IDS)) == 80
    assert (COCO_CATEGORY_IDS[0], COCO_CATEGORY_IDS[11], COCO_CATEGORY_IDS[-1]) == (1, 13, 90)
    assert len(ADE20K_CLASSES) == 150
    assert len(set(ADE20K_CLASSES)) == 150
    assert all(name == name.strip() and "\n" not in name for name in COCO_CLASSES + ADE20K_CLASSES)
