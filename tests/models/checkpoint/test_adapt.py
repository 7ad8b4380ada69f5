"""Weights fitted to a model: position embeddings."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.registry import config_to_dict
from tests.models.checkpoint.checkpoints import small


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
