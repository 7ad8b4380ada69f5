"""The benchmark of foreign graphs runs on a small model, goes on where it stopped, tells what is behind."""

import json

import onnx
import pytest
from torch import nn

from benchmarks import foreign_graphs, foreign_models
from benchmarks.optimizers import STOCK, optimized, route

MINE = "ours: ONNX Runtime"


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.qkv = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        B, N, C = tokens.shape
        q, k, v = self.qkv(tokens).reshape(B, N, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return tokens + y.transpose(1, 2).reshape(B, N, C)


def in_this_process(form, source, made):
    onnx.save(route(form)(onnx.load(source)), made)
    return {"seconds": 0.0, "peak MB": 0.0}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The benchmark on that model; its rows."""
    monkeypatch.setattr(foreign_models, "import_timm", lambda: None)
    monkeypatch.setitem(foreign_models.MODELS, "small", lambda: (Pixels(), (1, 3, 16, 16)))
    monkeypatch.setattr(foreign_graphs, "WORK", tmp_path / "work")
    monkeypatch.setattr(foreign_graphs, "TIMED", ("small",))
    monkeypatch.setattr(foreign_graphs, "optimized", in_this_process)
    monkeypatch.setattr(foreign_graphs, "SLOWER", 99)  # the clock is no subject of tests
    path = tmp_path / "numbers.json"

    def run(*options):
        code = foreign_graphs.main(["--exporters", "torchscript", *options, "--json", str(path)])
        return code, json.loads(path.read_text())["rows"] if path.exists() else []

    return run


def test_every_optimizer_is_measured(run, capsys):
    code, rows = run("--models", "small", "small+batch", "--only", "graphs")
    assert code == 0
    assert {row["model"] for row in rows} == {"small, torchscript", "small+batch, torchscript"}
    for row in (row["graphs"] for row in rows):
        assert row["difference"] < 1e-5
        assert row["nodes"] > row["moves"]
    ours = [row["graphs"]["nodes"] for row in rows if row["graph"] in foreign_graphs.OURS]
    assert max(ours) < min(row["graphs"]["nodes"] for row in rows if row["graph"] == STOCK)
    assert "small+batch, torchscript" in capsys.readouterr().out


def test_a_run_goes_on_where_one_stopped(run, monkeypatch):
    options = ("--models", "small", "--forms", STOCK, MINE, "--only", "graphs", "times")
    assert run(*options, "--seconds", "-1") == (2, [])
    code, rows = run(*options)
    assert code == 0
    assert rows[1]["times"]["ORT"] > 0
    monkeypatch.setattr(foreign_graphs, "optimized", None)  # is not called again
    assert run(*options) == (0, rows)


def test_what_cannot_be_exported_is_recorded(run, monkeypatch):
    monkeypatch.setitem(foreign_models.MODELS, "small", lambda: 1 / 0)
    _, rows = run("--models", "small", "--only", "graphs")
    assert {row["graphs"]["failed"] for row in rows} == {"division by zero"}


def test_an_optimizer_runs_in_its_own_process(tmp_path):
    x = onnx.helper.make_tensor_value_info("x", 1, [2])
    y = onnx.helper.make_tensor_value_info("y", 1, [2])
    nodes = [onnx.helper.make_node("Identity", ["x"], ["a"]), onnx.helper.make_node("Relu", ["a"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, ir_version=10), tmp_path / "in.onnx")
    costs = optimized("ONNX Runtime, offline", tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert costs["peak MB"] > 10
    assert [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node] == ["Relu"]
    (tmp_path / "in.onnx").write_bytes(b"none")
    with pytest.raises(RuntimeError):
        optimized("ONNX Runtime, offline", tmp_path / "in.onnx", tmp_path / "out.onnx")


def test_what_is_wrong_or_behind_is_told():
    stock = {
        "graphs": {"nodes": 10, "difference": 0.0, "seconds": None},
        "engines": {"layers": 5, "activation_mb": 2.0},
        "times": {"ORT": 1.0},
    }
    slim = {**stock, "graphs": {"nodes": 8, "difference": 0.0, "seconds": 1.0}}
    rows = [{"model": "m", "graph": STOCK, **stock}, {"model": "m", "graph": "onnxslim", **slim}]
    mine = {"model": "m", "graph": MINE, **slim}
    assert foreign_graphs.misses([*rows, mine]) == []
    for step, worse in (
        ("graphs", {"nodes": 9}),
        ("graphs", {"seconds": 1.5}),
        ("graphs", {"difference": 1e-3}),
        ("graphs", {"difference": float("nan")}),
        ("engines", {"layers": 6}),
        ("engines", {"activation_mb": 2.1}),
        ("times", {"ORT": 1.03}),
        ("polygraphy", {"passed": False}),
        ("engines", {"failed": "no"}),
    ):
        behind = {**mine, step: {**mine.get(step, {}), **worse}}
        assert len(foreign_graphs.misses([*rows, behind])) == 1
