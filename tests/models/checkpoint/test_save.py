"""Saving: whole or not at all."""

from __future__ import annotations

import pytest

from meta_deploy.errors import CheckpointError
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
