"""The benchmark of the passes' own speed: its graphs are real ones, and it tells how time grows."""

import json

import numpy as np
import onnx
import pytest

from benchmarks.surgery_scaling import DIM, TOKENS, made_up, main, side_by_side
from meta_deploy.graph.pipeline import run_passes
from tests.small_graphs import run

PASSES = ["clean-up", "slices-to-split", "collapse-chains", "fuse-attention"]


def test_the_made_up_graph_is_one_that_passes_change_and_leave_right():
    proto = made_up(150)
    onnx.checker.check_model(proto, full_check=True)
    assert 150 <= len(proto.graph.node) < 250
    after, results = run_passes(proto, PASSES)
    assert all(result.changes for result in results)
    x = np.random.default_rng(0).normal(size=(1, TOKENS, DIM)).astype(np.float32)
    (expected,), (actual,) = (list(run(graph, x=x).values()) for graph in (proto, after))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_no_two_blocks_share_weights():
    weights = [t.raw_data for t in made_up(150).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    large = [data for data in weights if len(data) > 4]
    assert len(set(large)) == len(large)


def measured(nodes, seconds, changes=7):
    passes = [{"name": "clean-up", "seconds": seconds, "changes": changes}]
    return {"nodes": nodes, "seconds": seconds + 1, "peak_mb": 100, "passes": passes}


def test_the_table_says_how_seconds_grow():
    lines = side_by_side({1000: measured(1000, 0.01), 2000: measured(2000, 0.5), 8000: measured(8000, 8.0)})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
    assert cells[0] == ["seconds", "1,000 nodes", "2,000 nodes", "8,000 nodes", "grows with power", "changes"]
    assert cells[2] == ["clean-up", "0.010", "0.500", "8.00", "2.00", "7"]
    assert [row[0] for row in cells[3:]] == ["around them", "all", "peak MB"]


@pytest.mark.slow
def test_every_size_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    assert main(["--nodes", "200", "100", "--targets", "onnxruntime", "--json", str(path)]) == 0
    runs = json.loads(path.read_text())["targets"]["onnxruntime"]
    assert list(runs) == ["100", "200"]
    for size, result in runs.items():
        assert result["nodes"] >= int(size)
        assert result["seconds"] >= sum(entry["seconds"] for entry in result["passes"]) - 0.1
        assert 50 < result["peak_mb"] < 4096
    assert capsys.readouterr().out.startswith("onnxruntime\n\n| seconds ")
