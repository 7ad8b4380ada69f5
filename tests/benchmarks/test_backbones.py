"""Models side by side: figures of each graph, and ratios to the first's that say what they should."""

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from benchmarks import backbones
from benchmarks.backbones import Contender, group, peak_mb, ratios
from benchmarks.common import Case
from tests.small_graphs import model, value
from tests.tiny_models import exported


def test_cases_joined_by_commas_are_a_table():
    assert group("meta-t-gfl@512,a.pth,b.pth@320x640") == [
        Case("meta-t-gfl", (512, 512)),
        Case("a.pth", None),
        Case("b.pth", (320, 640)),
    ]


def test_ratios_are_to_the_first_and_of_figures_that_both_have():
    first = {"model": "a", "nodes": 100, "fp16 layers": None, "difference": 1e-6}
    other = {"model": "b", "nodes": 50, "fp16 layers": 9, "difference": 1e-5}
    assert ratios(other, first) == {"model": "b", "nodes": 0.5, "fp16 layers": None}


@pytest.mark.slow
def test_a_model_against_itself(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backbones, "export_onnx", lambda *_: exported("detector").literal_copy())
    monkeypatch.setattr(backbones, "peak_mb", lambda one: 10.0)
    path = tmp_path / "numbers.json"
    pair = f"{tiny_checkpoint},{tiny_checkpoint}"
    options = ["--no-engines", "--eager", "--rounds", "3", "--threads", "1", "--json", str(path)]
    assert backbones.main([pair, *options]) == 0
    (tables,) = json.loads(path.read_text())["tables"]
    first, second = tables["rows"]
    assert first["nodes"] == second["nodes"] > 100
    assert first["difference"] < 1e-5
    assert all(first[f"{library} ms"] > 0 for library in ("ONNX Runtime", "OpenVINO", "PyTorch"))
    for over in tables["ratios"]:
        assert (over["nodes"], over["ONNX Runtime peak MB"]) == (1, 1)
        assert 0.2 < over["PyTorch ms"] < 5
    assert len(capsys.readouterr().out.strip().split("\n\n")) == 2


@pytest.mark.slow
def test_peak_memory_is_that_of_the_graph_and_not_of_this_process(tmp_path):
    """A graph that makes 200 MB of its input."""
    shape = numpy_helper.from_array(np.array([50_000_000], dtype=np.int64), "n")
    nodes = [helper.make_node("Expand", ["images", "n"], ["y"])]
    onnx.save(model(nodes, [value("images", [1])], initializers=[shape]), tmp_path / "g.onnx")
    held = np.ones(30_000_000)  # 240 MB here
    taken = peak_mb(Contender("ONNX Runtime", tmp_path / "g.onnx", np.ones(1, np.float32), 1))
    assert 190 < taken < 230
    assert held.all()
