"""A tiny detector for the benchmarks to run on: a real one takes half a minute to export."""

from types import SimpleNamespace

import pytest

from meta_deploy.export.pipeline import export
from meta_deploy.models.checkpoint.save import save_checkpoint
from tests.tiny_models import SIZE, detector, lively


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Its checkpoint, its bundle for ONNX Runtime, and how benchmarks call it."""
    folder = tmp_path_factory.mktemp("tiny")
    config = detector()
    save_checkpoint(folder / "tiny.pth", lively(config), config, list("abcde"))
    bundle = export(folder / "tiny.pth", target="onnxruntime", out=folder / "bundle")
    case = f"{config.name}@{SIZE[0]}x{SIZE[1]}"
    return SimpleNamespace(checkpoint=folder / "tiny.pth", bundle=bundle.path, case=case, size=SIZE)
