"""What no manifest can hold is refused before the long work."""

import onnx
import pytest
import torch

from meta_deploy.errors import InputError
from meta_deploy.export import export
from meta_deploy.export.sources.checkpoint import CheckpointSource
from meta_deploy.models.registry import config_to_dict
from tests.bundles_by_hand import detector, raw_model, segmenter
from tests.models.checkpoint.checkpoints import build, small


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"std": [1e-9, 1.0, 1.0]}, "preprocess.std"),
        ({"mean": [1e9, 0.0, 0.0]}, "preprocess.mean"),
        ({"mean": [float("inf"), 0.0, 0.0]}, "preprocess.mean"),
        ({"std": [float("nan"), 1.0, 1.0]}, "std"),
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"score_threshold": -0.1}, "score_threshold"),
        ({"shown_score": 1.5}, "shown_score"),
        ({"name": "a\nb"}, "model.name"),
        ({"name": "\x1b[31m"}, "model.name"),
        ({"name": "x" * 500}, "model.name"),
    ],
)
def test_a_configuration_that_no_manifest_holds(tmp_path, monkeypatch, changes, said):
    config = small()
    content = {"model": build(config).state_dict(), "config": {**config_to_dict(config), **changes}}
    torch.save(content, tmp_path / "x.pth")
    monkeypatch.setattr(CheckpointSource, "graph", lambda *_: pytest.fail("the long work began"))
    with pytest.raises(InputError, match=said) as caught:
        export(tmp_path / "x.pth", out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", ['["a\\nb", "b", "c"]', '["", "b", "c"]', '["\\u001b[31m", "b", "c"]'])
def test_class_names_in_an_onnx_file(tmp_path, names):
    proto = onnx.ModelProto.FromString(detector((64, 64)))
    onnx.helper.set_model_props(proto, {"meta_deploy.classes": names})
    onnx.save(proto, tmp_path / "x.onnx")
    with pytest.raises(InputError, match=r"classes\[0\]"):
        export(tmp_path / "x.onnx", out=tmp_path / "out")


def test_a_file_of_any_name_is_exported(tmp_path):
    (tmp_path / "a\nb\x1b.onnx").write_bytes(raw_model())
    bundle = export(tmp_path / "a\nb\x1b.onnx", out=tmp_path / "out")
    assert bundle.model_name == "a\\nb\\x1b"


def test_a_graph_that_is_not_sound_is_said_to_be_so_without_verification(tmp_path):
    proto = onnx.ModelProto.FromString(raw_model())
    del proto.graph.node[-1]
    onnx.save(proto, tmp_path / "x.onnx")
    with pytest.raises(InputError, match="not a sound model"):
        export(tmp_path / "x.onnx", out=tmp_path / "out", check=False)


def test_more_classes_than_there_can_be(tmp_path):
    proto = onnx.ModelProto.FromString(segmenter((64, 64)))
    next(o for o in proto.graph.output if o.name == "logits").type.tensor_type.shape.dim[1].dim_value = 2**40
    onnx.save(proto, tmp_path / "x.onnx")
    with pytest.raises(InputError, match="1099511627776 classes"):
        export(tmp_path / "x.onnx", out=tmp_path / "out", check=False)
