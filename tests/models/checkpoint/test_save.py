"""Saving: whole or not at all."""

from __future__ import annotations

import copy

import pytest
import torch

from meta_deploy.errors import CheckpointError
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.checkpoint.save import save_checkpoint
from tests.models.checkpoint.checkpoints import small


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


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_in_float16_are_half_the_file_and_load_as_what_float16_holds(tmp_path, model, suffix):
    whole, half = tmp_path / f"whole{suffix}", tmp_path / f"half{suffix}"
    save_checkpoint(whole, model, small())
    save_checkpoint(half, model, small(), dtype=torch.float16)
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    loaded = load_model(half).model.state_dict()
    for name, value in model.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        torch.testing.assert_close(loaded[name], expected, rtol=0, atol=0)


def test_a_weight_beyond_float16_is_refused(tmp_path, model):
    large = copy.deepcopy(model)
    with torch.no_grad():
        next(large.parameters()).view(-1)[0] = 1e5
    with pytest.raises(CheckpointError, match="beyond the range of float16"):
        save_checkpoint(tmp_path / "m.pth", large, small(), dtype=torch.float16)
    assert not list(tmp_path.iterdir())
