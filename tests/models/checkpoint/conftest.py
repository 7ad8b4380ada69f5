"""A small detector, built once a module, and a path for its checkpoint."""

from __future__ import annotations

import pytest

from tests.models.checkpoint.checkpoints import build, small


@pytest.fixture(scope="module")
def model():
    return build(small())


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"
