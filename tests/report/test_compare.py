"""A report of bundles, files and a checkpoint: whose rows say what, and that one entry's fault is its own."""

import json
import os
import signal
import time

import msgspec
import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace
from onnx import helper, numpy_helper

from meta_deploy import Predictor
from meta_deploy.bundle.shipped import ASSETS
from meta_deploy.errors import BackendError, InputError
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.report import machine, roofline
from meta_deploy.report.compare import _asked, image_files, interleave, latencies, report, throughputs
from meta_deploy.report.markdown import to_markdown
from meta_deploy.report.page import to_html
from meta_deploy.report.schema import Report, Roofline, Settings
from meta_deploy.report.subject import Subject
from meta_deploy.report.worker import Failed, Worker
from meta_deploy.targets import TARGETS
from meta_deploy.tasks.results import Timings
from tests.bundles_by_hand import detector, raw_model
from tests.small_graphs import model, value
from tests.tiny_models import lively, segmenter

ROOF = Roofline(bandwidth_gb_s=10, peak_gflop_s=50)


@pytest.fixture(autouse=True, scope="module")
def roof():
    """Measured elsewhere; it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "measure", lambda threads: ROOF)
        yield


@pytest.fixture(scope="module")
def made(bundles, small_images, tmp_path_factory):
    """Entries of every kind, sound ones and others; and the report on them."""
    folder = tmp_path_factory.mktemp("entries")
    (folder / "model.onnx").write_bytes(detector((64, 64)))
    (folder / "broken.onnx").write_bytes(b"no model")
    (folder / "notes.txt").write_text("no model either")
    named = {
        "detector": bundles / "detector",
        "detector #2": bundles / "detector",
        "model.onnx": folder / "model.onnx",
        "raw": bundles / "raw",
        "broken.onnx": folder / "broken.onnx",
        "notes.txt": folder / "notes.txt",
    }
    return named, report(list(named.values()), images=small_images, runs=20, threads=1)


def test_every_entry_has_a_row_by_a_name_of_its_own(made):
    named, found = made
    assert [entry.name for entry in found.entries] == list(named)
    assert [entry.path for entry in found.entries] == list(map(str, named.values()))
    assert [entry.kind for entry in found.entries] == ["bundle", "bundle", "onnx", "bundle", "onnx", None]


def test_an_entry_that_fails_says_why_and_the_rest_goes_on(made):
    broken, notes = made[1].entries[4:]
    assert "ONNX" in broken.error
    assert "notes.txt" in notes.error
    assert broken.latency is None
    assert all(entry.error is None and entry.latency.rounds == 20 for entry in made[1].entries[:4])


def test_the_first_is_what_the_others_are_compared_with(made):
    first, *others = (entry.latency for entry in made[1].entries[:4])
    assert first.total_ratio is first.model_ratio is None
    assert all(one.total_ratio.low <= one.total_ratio.value <= one.total_ratio.high for one in others)


def test_rows_tell_what_ran_where(made):
    bundle, _, file, raw = made[1].entries[:4]
    assert bundle.runs_on.startswith("ONNX Runtime")
    assert (bundle.task, bundle.precision) == ("instance-segmentation", "fp32")
    assert file.files == {"model.onnx": len(detector((64, 64)))}
    assert raw.files == {"model.onnx": len(raw_model())}
    assert raw.latency.pre.median == raw.latency.post.median == 0  # arrays go in and out


def test_every_entry_on_onnx_runtime_has_its_profile(made):
    assert made[1].roofline == ROOF
    for entry in made[1].entries[:4]:
        assert sum(row.ms for row in entry.profile.classes) == pytest.approx(entry.profile.ms)
        assert any(node.bound == "memory" for node in entry.profile.nodes)


def test_the_same_results_agree(made):
    first, again, file, raw = (entry.accuracy for entry in made[1].entries[:4])
    assert first is raw is None
    for same in (again, file):
        assert (same.box_ap, same.mask_ap, same.images) == (pytest.approx(1), pytest.approx(1), 2)


def test_memory_is_of_the_entry_and_not_of_who_asks(made):
    ballast = np.ones(100_000_000)  # 800 MB
    with Worker(str(made[0]["raw"]), "auto", 1, []) as worker:
        assert 20 < worker.call("facts")["peak_memory_mb"] < 700
    del ballast


def test_the_report_is_json_and_back(made):
    text = made[1].to_json()
    assert json.loads(text)["schema"] == 1
    assert msgspec.json.decode(text, type=Report) == made[1]


def test_a_back_end_that_does_not_run_it_is_a_row(bundles, small_images):
    backends = ["tensorrt", "onnxruntime"]
    found = report([bundles / "detector"], images=small_images, backends=backends, runs=20, threads=1)
    refused, ran = found.entries
    assert refused.name == "detector (tensorrt)"
    assert "TensorRT" in refused.error
    assert (ran.name, ran.error, ran.latency.total_ratio) == ("detector (onnxruntime)", None, None)


def test_a_checkpoint_is_what_pytorch_makes_of_it(tmp_path, photo):
    config = segmenter()
    model = lively(config).eval()
    path = tmp_path / "tiny.pth"
    save_checkpoint(path, model, config)
    subject = Subject(str(path), "auto", 1, [], tmp_path)
    images = subject.predictor._preprocess([photo])[0]
    with torch.inference_mode():
        expected = model(torch.from_numpy(images))["logits"].numpy()
    outputs = subject.predictor.run({"images": images})
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-5)
    assert subject.facts()["task"] == "semantic-segmentation"
    assert subject.predictor.bundle.input.batch.max > 100  # which PyTorch does not mind
    with pytest.raises(BackendError, match="only PyTorch runs"):
        Subject(str(path), "onnxruntime", 1, [], tmp_path)


def test_logits_are_those_of_the_image_as_the_model_gets_it(bundles, small_images, tmp_path):
    images = image_files(small_images)
    subject = Subject(str(bundles / "segmenter"), "onnxruntime", 1, images, tmp_path)
    (red, green, blue), level = subject.logits(3)[0], int(os.path.basename(images[1])[:-4])
    for plane, expected in ((red, level), (green, 128), (blue, 255 - level)):
        assert plane[2, 2] == pytest.approx(expected / 255, abs=0.01)
    assert Subject(str(bundles / "detector"), "onnxruntime", 1, images, tmp_path).logits(0) is None


def test_a_file_gives_what_its_bundle_gives(made, photo, tmp_path):
    subject = Subject(str(made[0]["model.onnx"]), "onnxruntime", 1, [], tmp_path)
    boxes = subject.predictor(photo).boxes
    np.testing.assert_array_equal(boxes, Predictor(made[0]["detector"], score_threshold=0.0)(photo).boxes)


class InProcess:
    """A worker without a process of its own."""

    def __init__(self, subject):
        self.subject = subject

    def call(self, method, *args):
        try:
            return getattr(self.subject, method)(*args)
        except BackendError as error:
            raise Failed(str(error)) from error


def test_throughput_counts_a_batchs_images_and_marks_sizes_that_are_not_taken(made, bundles, small_images):
    images = tuple(image_files(small_images))
    names = ["detector", "detector-dynamic", "raw", "raw-image"]
    workers = {
        name: InProcess(Subject(str(bundles / name), "onnxruntime", 1, images, bundles)) for name in names
    }
    settings = Settings(images=images, batches=(1, 4), warm_up=1, runs=20, threads=1)
    found = throughputs(workers, settings, {"gone": "it failed before"})
    for one in (one for rates in found.values() for one in rates):
        assert (one.reason is None) == (one.images_per_second is not None)
        assert one.ms is None or one.images_per_second == pytest.approx(1000 * one.batch / one.ms.median)
    arrays = "it takes arrays, which are no images to count"
    assert {name: [one.reason for one in rates] for name, rates in found.items()} == {
        "detector": [None, "it takes batches of 1"],
        "detector-dynamic": [None, None],
        "raw": [arrays, arrays],
        "raw-image": [None, "it takes batches of 1"],
    }
    first = replace(made[1].entries[0], throughput=found["detector"])
    shown = replace(made[1], settings=settings, entries=(first,))
    for text in (to_markdown(shown), to_html(shown)):
        assert "it takes batches of 1" in text
        assert f"{found['detector'][0].images_per_second:,.0f}" in text


def test_each_pass_is_told_with_the_time_after_it_by_class(made, bundles, tmp_path, monkeypatch):
    files = ["fuse-layer-norm", "collapse-chains"]
    monkeypatch.setattr(type(TARGETS["onnxruntime"]), "passes", ("share-norms", *files))
    nodes = [
        helper.make_node("Transpose", ["x"], ["a"], perm=[1, 0]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Transpose", ["b"], ["c"], perm=[1, 0]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[1, 0]),
        helper.make_node("Add", ["d", "w"], ["y"]),
    ]
    proto = model(
        nodes,
        [value("x", [4, 8])],
        [value("y", [8, 4])],
        [numpy_helper.from_array(np.ones((8, 4), np.float32), "w")],
    )
    onnx.save(proto, tmp_path / "x.onnx")
    subject = Subject(str(tmp_path / "x.onnx"), "onnxruntime", 1, [], tmp_path)
    first, idle, _, last = rows = subject.pass_profiles()
    assert [row.name for row in rows] == ["", "share-norms", *files]
    assert (idle.changes, idle.ms, idle.classes) == (0, first.ms, first.classes)
    assert last.changes > 0
    for row in rows:
        assert sum(one.ms for one in row.classes) == pytest.approx(row.ms)
    entry = replace(made[1].entries[2], pass_profiles=rows)
    shown = replace(made[1], settings=replace(made[1].settings, by_pass=True), entries=(entry,))
    assert "| as exported | 0 |" in to_markdown(shown)
    assert "<td>collapse-chains</td>" in to_html(shown)
    with pytest.raises(BackendError, match="holds its last graph alone"):
        Subject(str(bundles / "raw"), "onnxruntime", 1, [], tmp_path / "b").pass_profiles()


def test_a_batch_is_run_at_once_and_its_times_are_all_of_its_images(bundles, small_images, tmp_path):
    images = image_files(small_images)
    subject = Subject(str(bundles / "detector-dynamic"), "onnxruntime", 1, images, tmp_path)
    shapes, run = [], subject.predictor.run
    subject.predictor.run = lambda arrays: (
        shapes.append(arrays["images"].shape),
        time.sleep(0.02),
        run(arrays),
    )[2]
    took = subject.batch(0, 3)
    assert shapes == [(3, 3, 64, 64)]
    assert took.model >= 20  # of the whole batch


# --- processes ----------------------------------------------------------------------------------------------


def test_a_process_that_dies_is_a_failure_with_its_signal(bundles):
    with Worker(str(bundles / "raw"), "auto", 1, []) as worker:
        os.kill(worker._process.pid, signal.SIGSEGV)
        with pytest.raises(Failed, match=r"crashed \(SIGSEGV"):
            worker.call("facts")


def test_a_process_ends_with_who_asks(bundles):
    with Worker(str(bundles / "raw"), "auto", 1, []) as worker:
        process = worker._process
    assert process.returncode is not None


# --- rounds -------------------------------------------------------------------------------------------------


def scripted(log, fails=None):
    """A run that notes who ran what, and takes a time by who it is; one fails in a round."""

    def run(worker, turn):
        log.append((worker, turn))
        if (worker, turn) == fails:
            raise Failed("no more")
        return Timings(1, {"a": 10, "b": 20, "c": 40}[worker] + turn, 2)

    return run


def test_every_round_runs_every_entry_once_and_begins_with_another():
    log, errors = [], {}
    times = interleave({"a": "a", "b": "b", "c": "c"}, scripted(log), 1, 3, errors)
    turns = [[name for name, i in log if i == turn] for turn in (0, 1, 2)]
    assert turns == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert not errors
    np.testing.assert_array_equal(times["b"], [[1, 20, 2], [1, 21, 2], [1, 22, 2]])  # without the warm-up


def test_an_entry_that_fails_on_the_way_is_out():
    log, errors, seen = [], {}, []
    run = scripted(log, fails=("b", 1))
    times = interleave({"a": "a", "b": "b", "c": "c"}, run, 0, 3, errors, seen.append)
    assert errors == {"b": "no more"}
    assert list(times) == ["a", "c"]
    assert ("b", 2) not in log
    assert seen == [0, 1, 2]


def test_ratios_are_to_the_first_of_the_model_and_of_all_parts():
    ones = np.ones((20, 3))
    found = latencies({"a": ones, "b": ones * [1, 4, 1]}, 4)
    assert found["b"].total_ratio.value == pytest.approx(2)
    assert found["b"].model_ratio.value == pytest.approx(4)
    assert found["b"].model_ratio.verdict == "slower"
    assert found["b"].total.median == 6


# --- what is refused, what is noticed -----------------------------------------------------------------------


def test_names_are_one_line_and_no_two_alike():
    found = _asked(["no/a\nb", "other/a\nb"], ["auto"])
    assert [entry.name for entry in found] == ["a\\nb", "a\\nb #2"]


def test_shipped_bundles_go_by_name():
    (found,) = _asked(["nuclei"], ["auto"])
    assert (found.name, found.kind, found.path) == ("nuclei", "bundle", str(ASSETS / "nuclei"))


def test_nothing_to_compare_no_images_and_few_runs_are_refused(bundles, tmp_path):
    for arguments, options in (
        ([], {}),
        ([bundles / "raw"], {"runs": 19}),
        ([bundles / "raw"], {"batches": [4, 0]}),
        ([bundles / "raw"], {"backends": ["abacus"]}),
        ([bundles / "raw"], {"images": tmp_path}),
        ([bundles / "raw"], {"annotations": tmp_path / "none.json"}),
    ):
        with pytest.raises(InputError):
            report(arguments, **options)


def test_an_image_that_cannot_be_read_is_told_before_the_work(bundles, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match=r"cut\.jpg"):
        report([bundles / "detector"], images=tmp_path)


def test_a_model_that_cannot_be_profiled_keeps_its_figures(bundles, small_images, monkeypatch):
    call = Worker.call

    def failing(self, method, *args):
        if method == "profile":
            raise Failed("no room for it")
        return call(self, method, *args)

    monkeypatch.setattr(Worker, "call", failing)
    (entry,) = report([bundles / "raw"], images=small_images, runs=20, threads=1).entries
    assert (entry.error, entry.profile, entry.no_profile) == (None, None, "no room for it")
    assert entry.latency.rounds == 20


def test_arrays_are_no_images(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.ones(1))
    with pytest.raises(InputError, match=r"x\.npz"):
        image_files(tmp_path)


def test_load_a_saving_governor_and_drift_are_told():
    quiet = msgspec.structs.replace(machine.describe(), load=0.1, cpus=2, governor="performance")
    assert machine.disturbances(quiet, {"a": 1.05}) == ()
    busy = msgspec.structs.replace(quiet, load=1.5, governor="powersave")
    load, governor, drifted = machine.disturbances(busy, {"a": 0.8, "b": 1.0})
    assert "1.5 on 2 CPUs" in load
    assert "powersave" in governor
    assert "a became 25 % faster" in drifted


def test_the_machine_names_its_processor_and_packages():
    found = machine.describe()
    assert found.cpu
    assert found.versions["onnxruntime"]
