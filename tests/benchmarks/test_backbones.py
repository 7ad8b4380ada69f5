"""Models side by side: figures of each graph, and ratios to the first's that say what they should."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from benchmarks import backbones
from benchmarks.backbones import Contender, Subject, group, peak_mb, ratios
from benchmarks.common import Case
from meta_deploy.export.options import Options
from meta_deploy.export.sources.checkpoint import input_spec
from tests.small_graphs import model, value


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


class Small(nn.Module):
    """A convolution and its batch norm, called as a model is."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, images, stages=False):
        return {"map_0": self.body(images)}


def test_each_model_is_measured_against_the_first(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    def load(case, part, folder):
        model = Small(case.size[0]).eval()
        return Subject(case, model, input_spec((64, 64), Options()), [], torch.randn(1, 3, 64, 64).numpy())

    monkeypatch.setattr(backbones.Subject, "load", load)
    monkeypatch.setattr(backbones, "peak_mb", lambda contender: 10.0)
    path = tmp_path / "numbers.json"
    pair = f"{tiny_checkpoint}@32,{tiny_checkpoint}@64"
    options = [
        "--part",
        "backbone",
        "--no-engines",
        "--eager",
        "--profile",
        "--rounds",
        "3",
        "--threads",
        "1",
        "--json",
        str(path),
    ]
    assert backbones.main([pair, *options]) == 0
    (numbers,) = json.loads(path.read_text())["tables"]
    for row, width in zip(numbers["rows"], (32, 64), strict=True):
        assert row["M parameters"] == pytest.approx((3 * 9 + 3) * width / 1e6)
        assert row["nodes"] == 2  # the norm is in the convolution
        assert row["difference"] < 1e-5
        assert all(row[f"{library} ms"] > 0 for library in ("ONNX Runtime", "OpenVINO", "PyTorch"))
    assert [over["M parameters"] for over in numbers["ratios"]] == [1, 2]
    assert [over["ONNX Runtime peak MB"] for over in numbers["ratios"]] == [1, 1]
    assert numbers["ratios"][0]["OpenVINO ms"] == 1
    convolutions = next(row for row in numbers["classes"] if row["class"] == "convolution")
    for row, width in zip(numbers["rows"], (32, 64), strict=True):
        assert convolutions[f"{row['model']}: nodes"] == 1
        gflop = 2 * 27 * width * 32 * 32 / 1e9
        assert convolutions[f"{row['model']}: GFLOP"] == pytest.approx(gflop, rel=0.1)
        times = sum(one[f"{row['model']}: ms"] for one in numbers["classes"])
        assert 0 < convolutions[f"{row['model']}: ms"] < times
    assert len(capsys.readouterr().out.strip().split("\n\n")) == 3


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
