"""A tiny detector for the benchmarks to run on: a real one takes half a minute to export."""

from types import SimpleNamespace

import pytest

from meta_deploy.export.pipeline import export
from meta_deploy.export.sources import checkpoint
from tests.tiny_models import SIZE, exported


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint, tmp_path_factory):
    """Its checkpoint, its bundle for ONNX Runtime, and how benchmarks call it."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "export_onnx", lambda *_: exported("detector").literal_copy())
        bundle = export(tiny_checkpoint, target="onnxruntime", out=folder / "bundle")
    case = f"{bundle.model_name}@{SIZE[0]}x{SIZE[1]}"
    return SimpleNamespace(checkpoint=tiny_checkpoint, bundle=bundle.path, case=case, size=SIZE)
