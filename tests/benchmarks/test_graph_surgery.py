"""The benchmark of graph passes runs on a small model; its goals are judged by what our graphs reach."""

import json

import pytest
import torch
from torch import nn

from benchmarks import graph_surgery
from benchmarks.common import Case
from benchmarks.graph_surgery import CASES, ERROR, GOALS, ORT, OURS, missed, side_by_side
from meta_deploy.targets.tensorrt.build import available


class Small(nn.Module):
    """A convolution and attention over its pixels."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, 2, 1), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, images):
        x = torch.relu(self.conv(images))
        tokens = x.flatten(2).transpose(1, 2)
        B, N, C = tokens.shape
        q, k, v = self.qkv(self.norm(tokens)).reshape(B, N, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.out(y.transpose(1, 2).reshape(B, N, C))
        return x, tokens.transpose(1, 2).reshape(x.shape)


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    return Small().eval(), torch.randn(1, 3, 16, 16)


@pytest.fixture(scope="module")
def graphs(subject):
    """Made once: exporting takes longer than what is done with them here."""
    return list(graph_surgery.make_graphs(*subject))


@pytest.fixture
def small(subject, graphs, monkeypatch):
    monkeypatch.setattr(graph_surgery, "subject", lambda case, folder: subject)
    monkeypatch.setattr(graph_surgery, "make_graphs", lambda model, images: iter(graphs))


@pytest.mark.slow
def test_every_graph_is_measured(small, tmp_path, capsys):
    path = tmp_path / "numbers.json"
    assert graph_surgery.main(["--case", "small@16", "--rounds", "1", "--json", str(path)]) == 0
    graphs = json.loads(path.read_text())["cases"]["small@16x16"]["graphs"]
    assert {"stock", *(f"ours: {target}" for target in OURS)} <= set(graphs)
    stock, ours = graphs["stock"], graphs["ours: onnxruntime"]
    for measures in graphs.values():
        assert measures["nodes"] > measures["moves"] >= 0
        assert measures["MB moved"] > 0
        assert measures[ORT] > 0
    assert 0 <= ours[ERROR] < 1e-5
    assert ours["nodes"] < stock["nodes"]
    if available("tensorrt-rtx"):
        assert stock["fp16 attention"] == 1
        assert stock["fp32 layers"] > stock["fp16 layers"] > stock["fp16 generated"] > 0
        assert "fp16 layers" not in ours  # its attention is ONNX Runtime's own operator
    assert capsys.readouterr().out.startswith("small@16x16\n\n| ")


@pytest.mark.slow
def test_engines_and_times_are_left_out_on_request(small, tmp_path):
    path = tmp_path / "numbers.json"
    options = ["--case", "small@16", "--no-engines", "--no-time", "--json", str(path)]
    assert graph_surgery.main(options) == 0
    graphs = json.loads(path.read_text())["cases"]["small@16x16"]["graphs"]
    assert not [name for measures in graphs.values() for name in measures if "fp16" in name or "ms" in name]


@pytest.mark.slow
def test_what_is_not_installed_leaves_its_column_out(subject, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graph_surgery, "subject", lambda case, folder: subject)
    found = graph_surgery.importlib.util.find_spec
    absent = ("tensorrt_rtx", "openvino", "onnxslim")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else found(name))
    path = tmp_path / "numbers.json"
    assert graph_surgery.main(["--case", "small@16", "--rounds", "1", "--json", str(path)]) == 0
    graphs = json.loads(path.read_text())["cases"]["small@16x16"]["graphs"]
    assert "onnxslim" not in graphs
    assert not [name for m in graphs.values() for name in m if name.startswith(("fp16", "OpenVINO"))]
    err = capsys.readouterr().err
    assert all(f"{name} is not installed" in err for name in ("tensorrt-rtx", "openvino", "onnxslim"))


GRAPHS = {
    "stock": {"nodes": 50, "layers": 9},
    "ours: a": {"nodes": 20, "layers": None, "error": 1e-6},
    "ours: b": {"nodes": 12, "layers": 7, "error": 1e-3},
}


def test_a_goal_is_for_the_best_of_our_graphs_and_an_error_for_every_one():
    assert missed(GRAPHS, {"nodes": 12, "layers": 7, "unmeasured": 1}) == []
    assert missed(GRAPHS, {"nodes": 11, "layers": 6}) == ["nodes 12, goal 11", "layers 7, goal 6"]
    wrong = {name: {ERROR: measures.get("error")} for name, measures in GRAPHS.items()}
    assert missed(wrong, {ERROR: 2e-4}) == [f"{ERROR} 0.001, goal 0.0002"]
    assert missed({"ours: c": {ERROR: float("nan")}}, {ERROR: 2e-4}) == [f"{ERROR} nan, goal 0.0002"]


@pytest.mark.slow
def test_a_missed_goal_is_exit_code_1(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(GOALS, "small@16x16", {"nodes": 1})
    path = tmp_path / "numbers.json"
    options = ["--case", "small@16", "--no-engines", "--no-time", "--json", str(path)]
    assert graph_surgery.main(options) == 1
    assert "missed: nodes " in capsys.readouterr().out
    assert json.loads(path.read_text())["cases"]["small@16x16"]["missed"]


def test_there_are_goals_for_the_default_case():
    assert {str(Case.parse(case)) for case in CASES} <= set(GOALS)


def test_the_table_has_a_column_for_each_graph_and_one_for_goals():
    lines = side_by_side(GRAPHS, {"nodes": 11}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["", "stock", "ours: a", "ours: b", "goal"]
    assert cells[2] == ["nodes", "50", "20", "12", "<= 11"]
    assert cells[3] == ["layers", "9", "-", "7", ""]
