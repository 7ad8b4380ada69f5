"""The benchmark of foreign graphs runs on a small model, and says where ours is behind."""

import json

from torch import nn

from benchmarks import foreign_graphs


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


def test_every_optimizer_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(foreign_graphs, "import_timm", lambda: None)
    monkeypatch.setitem(foreign_graphs.MODELS, "small", lambda: (Pixels(), (1, 3, 16, 16)))
    path = tmp_path / "numbers.json"
    options = ["--models", "small", "small+batch", "--exporters", "torchscript", "--no-engines"]
    assert foreign_graphs.main([*options, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["model"] for row in rows} == {"small, torchscript", "small+batch, torchscript"}
    for row in rows:
        assert row["difference"] < 1e-5
        assert row["nodes"] > row["Transpose+Reshape"]
    ours = [row["nodes"] for row in rows if row["graph"] in foreign_graphs.OURS]
    assert max(ours) < min(row["nodes"] for row in rows if row["graph"] == foreign_graphs.STOCK)
    assert "ours: TensorRT" in capsys.readouterr().out


def test_what_is_wrong_or_behind_is_told():
    row = {"nodes": 10, "difference": 0.0, "layers": 5}
    rows = [{**row, "graph": foreign_graphs.STOCK}, {**row, "graph": "onnxslim", "nodes": 8}]
    mine = {**row, "graph": "ours: TensorRT", "nodes": 8}
    assert foreign_graphs.misses([*rows, mine]) == []
    for worse in ({"nodes": 9}, {"layers": 6}, {"difference": 1e-3}, {"difference": float("nan")}):
        assert len(foreign_graphs.misses([*rows, {**mine, **worse}])) == 1
