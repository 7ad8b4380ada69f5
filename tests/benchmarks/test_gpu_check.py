"""The GPU check runs on the CPU's back ends, tells wrong answers from none, and survives what fails."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import common, gpu_backends, gpu_check
from benchmarks.common import ASSETS, PHOTOS, photos, table
from benchmarks.gpu_backends import KINDS, Exam, TorchModel, timed
from benchmarks.gpu_check import (
    Contender,
    choose,
    compare_times,
    exit_code,
    groups,
    read_rows,
    rows,
    run_group,
)

LIMITS = {"agreement": 0.99, "mean_score_difference": 1e-3}


def record(agreement=1.0, **more):
    """Of a back end that ran."""
    passed = agreement >= LIMITS["agreement"]
    figures = {"agreement": agreement, "mean_score_difference": 0.0}
    return {"reference_finds": 5, "passed": passed, "figures": figures, "tolerance": LIMITS, **more}


# --- running ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_back_ends_of_the_cpu_are_checked_and_timed(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "WORK", tmp_path)
    for module in (common, gpu_check):
        monkeypatch.setattr(module, "checkpoint", lambda case: tiny.checkpoint)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = ["--case", tiny.case, "--batch", "1", "--precision", "fp32", "int8"]
    options += ["--count", "2", "--runs", "2", "--backend", "pytorch", "onnxruntime", "cuda"]
    if not PHOTOS.is_dir():
        options += ["--photos", str(ASSETS / "images")]
    assert gpu_check.main([*options, "--json", str(tmp_path / "numbers.json")]) == 0
    told = capsys.readouterr()
    assert "int8 is left out" in told.err
    assert "left out, as there is no NVIDIA GPU here: ONNX Runtime (CUDA)" in told.err
    content = json.loads((tmp_path / "numbers.json").read_text())
    assert content["machine"]["versions"]["torch"]
    found = content["cases"][tiny.case]
    assert set(found) == {"pytorch fp32", "onnxruntime fp32"}
    for name in found:
        one = found[name]["1"]
        assert one["passed"]
        assert one["ms"] > 0
        assert one["runs"] == 2
        assert f"| {KINDS[name.split()[0]].title} " in told.out
    assert found["pytorch fp32"]["1"]["faster"] == 1


@pytest.fixture(scope="module")
def exam(tiny):
    return Exam(str(tiny.checkpoint), tiny.size, [str(path) for path in photos(ASSETS / "images", 1)])


def test_the_reference_agrees_with_itself_in_every_measure(exam):
    assert exam.expected["num_detections"].sum() > 0
    judged = exam.judge(exam.expected, "fp32")
    assert judged["passed"]
    assert judged["ap"]["box"] == 1.0
    assert judged["ap"]["mask"] >= 0.8  # random weights: all masks of one of the five classes are empty


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answers: answers | {"boxes": answers["boxes"] + 20},
        lambda answers: answers | {"masks": 1 - answers["masks"]},
        lambda answers: answers | {"num_detections": np.zeros_like(answers["num_detections"])},
        lambda answers: answers | {"scores": np.full_like(answers["scores"], np.nan)},
    ],
    ids=["moved boxes", "turned masks", "nothing found", "not finite"],
)
def test_wrong_answers_are_called_wrong(exam, spoil):
    judged = exam.judge(spoil(dict(exam.expected)), "fp16")
    assert not judged["passed"]
    assert gpu_check.verdict({"reference_finds": 5, **judged}).startswith("WRONG: ")
    assert min(judged["ap"].values()) < 0.9


def test_every_photo_is_answered_once_though_the_last_batch_is_filled_up():
    exam = Exam.__new__(Exam)
    exam.images = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1)
    exam.expected = {"boxes": exam.images}
    given = []

    def infer(batch):
        given.append(batch.ravel().tolist())
        return {"boxes": batch, "of no interest": batch}

    np.testing.assert_array_equal(exam.sit(infer, 2)["boxes"], exam.images)
    assert given == [[0, 1], [2, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_pytorch_agrees_with_the_reference_in_every_precision(exam, precision):
    answers = exam.sit(TorchModel(exam.model, precision, "cpu"), 1)
    assert exam.judge(answers, precision)["passed"]
    # Half precision could not place them.
    assert answers["boxes"].dtype == np.float32
    assert np.any(answers["boxes"] != answers["boxes"].astype(np.float16))


@pytest.mark.slow
def test_a_back_end_that_fails_leaves_the_others(tiny, tmp_path):
    job = {
        "checkpoint": str(tiny.checkpoint),
        "size": tiny.size,
        "photos": [str(photos(ASSETS / "images")[0])],
    }
    job |= {"reference": f"{tmp_path}/reference.npz", "batch": 1, "runs": 1, "seconds": 1}
    bundles = {"onnxruntime": tiny.bundle, "cuda": tiny.bundle, "tensorrt": "not installed"}
    group = [Contender(kind, "fp32") for kind in bundles]
    bundles = dict(zip(group, bundles.values(), strict=True))
    bundles[Contender("onnxruntime", "fp16")] = tmp_path / "nowhere"
    found = run_group(job, list(bundles), bundles, tmp_path)
    assert found["onnxruntime fp32"]["passed"]
    assert len(found["onnxruntime fp32"]["times"]) == 1
    assert found["tensorrt fp32"] == {"reason": "not installed"}
    assert "nowhere" in found["onnxruntime fp16"]["reason"]
    assert "\n" not in found["onnxruntime fp16"]["reason"]


def ended_process(outcomes):
    """In the place of `run_process`: what each process leaves behind, (code, records, culprit), in order."""
    asked = []

    def run(job, todo, bundles, folder):
        asked.append([str(one) for one in todo])
        return outcomes[len(asked) - 1]

    return asked, run


A, B = Contender("cuda", "fp32"), Contender("tensorrt", "fp16")
BUNDLES = {A: gpu_check.Path("a"), B: gpu_check.Path("b")}


@pytest.mark.parametrize(
    ("outcomes", "asked", "reasons"),
    [
        (
            [(-11, {}, str(A)), (0, {str(B): record()}, None)],
            [[str(A), str(B)], [str(B)]],
            ("signal 11", None),
        ),
        (
            [(3, {str(A): {"reason": "illegal address"}}, None), (0, {str(B): record()}, None)],
            [[str(A), str(B)], [str(B)]],
            ("illegal address", None),
        ),
        (
            [
                (0, {str(A): {"reason": "CUDA out of memory"}, str(B): record()}, None),
                (0, {str(A): record()}, None),
            ],
            [[str(A), str(B)], [str(A)]],
            (None, None),
        ),
        ([(-9, {}, None)], [[str(A), str(B)]], ("signal 9", "signal 9")),
    ],
    ids=["a crash", "CUDA broken", "memory", "nobody's fault"],
)
def test_who_ends_the_process_is_left_out_and_the_others_begin_again(
    monkeypatch, tmp_path, outcomes, asked, reasons
):
    calls, run = ended_process(outcomes)
    monkeypatch.setattr(gpu_check, "run_process", run)
    found = run_group({"batch": 1}, [A, B], BUNDLES, tmp_path)
    assert calls == asked
    for one, reason in zip((A, B), reasons, strict=True):
        assert (
            found[str(one)].get("reason") is None if reason is None else reason in found[str(one)]["reason"]
        )


def test_who_fails_while_timed_has_no_times_and_the_others_have():
    def fail(batch):
        raise RuntimeError("no\nmore")

    times, failures = timed({"good": lambda batch: {}, "bad": fail}, [np.zeros(1)], 4, 10)
    assert len(times["good"]) == 4
    assert failures == {"bad": "RuntimeError: no more"}


def test_slow_ones_have_fewer_runs():
    times, _ = timed({"slow": lambda batch: gpu_backends.np.linalg.svd(np.eye(60))}, [np.zeros(1)], 10**6, 0)
    assert len(times["slow"]) == gpu_backends.LEAST_ROUNDS


# --- what is checked where ----------------------------------------------------------------------------------


def test_without_a_gpu_only_the_cpu_is_checked():
    chosen, notes = choose(KINDS, ("fp32", "fp16"), gpu=False, torch_gpu=False)
    assert list(map(str, chosen)) == ["pytorch fp32", "compile fp32", "onnxruntime fp32", "onnxruntime fp16"]
    assert "TensorRT-RTX" in notes[0]
    assert groups(chosen, torch_gpu=False) == [chosen]


def test_with_a_gpu_all_are_checked_and_the_cpu_apart():
    chosen, notes = choose(KINDS, gpu_check.PRECISION_NAMES[:3], gpu=True, torch_gpu=True)
    assert not notes
    assert {one.kind for one in chosen} == set(KINDS)
    on_gpu, on_cpu = groups(chosen, torch_gpu=True)
    assert {one.kind for one in on_cpu} == {"onnxruntime"}
    assert str(on_gpu[0]) == gpu_check.BASE


def test_a_gpu_that_pytorch_cannot_use_is_for_the_others():
    chosen, notes = choose(KINDS, ("fp32", "fp16"), gpu=True, torch_gpu=False)
    assert notes == ["PyTorch runs on the CPU, in fp32 alone: it has no CUDA"]
    first, second = groups(chosen, torch_gpu=False)
    assert {one.kind for one in first} == {"pytorch", "compile", "onnxruntime"}
    assert {one.kind for one in second} == {"cuda", "ort-tensorrt", "tensorrt", "tensorrt-rtx"}


def test_a_library_that_is_not_installed_is_told_before_anything_is_exported(monkeypatch):
    monkeypatch.setattr(gpu_check, "available", lambda library: False)
    case = common.Case.parse("meta-nano-mask-rcnn@128")
    assert "TensorRT is not installed" in gpu_check.export(case, "tensorrt", "fp32", 1, SimpleNamespace())


def test_a_name_becomes_part_of_a_files():
    assert gpu_check.slug("NVIDIA GeForce RTX 4090 (x2)") == "nvidia-geforce-rtx-4090-x2"


# --- telling ------------------------------------------------------------------------------------------------


def test_lines_become_records_and_the_last_one_begun_is_the_culprit():
    lines = [{"reference_finds": 5}, {"at": "a"}, {"id": "a", "passed": True}, {"at": "b"}]
    assert read_rows(map(json.dumps, lines)) == ({"a": {"reference_finds": 5, "passed": True}}, "b")
    lines += [{"id": "b", "reason": "no"}, {"at": None}, {"id": "a", "times": [1.0]}]
    found, culprit = read_rows(map(json.dumps, lines))
    assert culprit is None
    assert found["a"]["times"] == [1.0]


def test_times_are_compared_round_by_round_within_a_group_and_by_medians_across():
    found = {"pytorch fp32": {"times": [2.0, 4.0, 9.0]}, "cuda fp32": {"times": [1.0, 1.0, 1.0]}}
    base = compare_times(found, None)
    assert found["cuda fp32"]["faster"] == 4
    other = {"onnxruntime fp32": {"times": [8.0]}, "onnxruntime fp16": {"reason": "no"}}
    compare_times(other, base)
    assert other["onnxruntime fp32"] == {"ms": 8.0, "p90_ms": 8.0, "runs": 1, "faster": 0.5}


def test_the_table_shows_the_worst_of_the_batches_and_why():
    records = {
        "cuda fp32": {1: record(ms=2.0, ap={"box": 1.0}), 8: record(0.5, ap={"box": 0.4}, memory_mb=7.0)},
        "tensorrt fp16": {1: {"reason": "a | b\nc" + "d" * 300}, 8: {"reason": "out of memory"}},
        "onnxruntime fp32": {1: record(), 8: record()},
    }
    wrong, failed, good = rows(records, [1, 8])
    assert wrong["result"] == "batch 1: ok; batch 8: WRONG: agreement 0.5 (wanted 0.99)"
    assert (wrong["batch 1, ms"], wrong["batch 8, ms"], wrong["memory, MB"], wrong["box AP"]) == (
        2,
        None,
        7,
        0.4,
    )
    assert failed["result"].startswith("batch 1: a / b c")
    assert failed["result"].endswith("…; batch 8: out of memory")
    assert good["result"] == "ok"
    assert len({line.count("|") for line in table([wrong, failed, good]).splitlines()}) == 1


def test_photos_in_which_nothing_is_found_prove_nothing():
    assert gpu_check.verdict({**record(), "reference_finds": 0}).startswith("nothing is found")


def test_only_wrong_results_make_the_exit_code():
    fine = {"case": {"cuda fp32": {1: record(), 8: {"reason": "out of memory"}}}}
    assert exit_code(fine) == 0
    assert exit_code({**fine, "other": {"cuda fp32": {1: record(0.5)}}}) == 1


def test_the_gpu_is_in_the_header_by_name_and_driver(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA L4, 570.86.15, 23034'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert common.machine()["gpu"] == {"name": "NVIDIA L4", "driver": "570.86.15", "memory_mb": 23034}
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert "gpu" not in common.machine()
