"""The fuzzer runs, finds what is wrong, and the commands take some of its inputs of each kind."""

import json
import os
import random

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_inputs import ODD_VALUES, mutated, places, restructured


def test_some_inputs_end_in_an_answer_or_a_line(tmp_path):
    report = tmp_path / "fuzz.json"
    argv = [
        "--minutes",
        "0",
        "--least",
        "25",
        "--seed",
        "3",
        "--only",
        "manifests,images",
        "--json",
        str(report),
    ]
    assert fuzz.main(argv) == 0
    kinds = json.loads(report.read_text())["kinds"]
    assert all(kind["inputs"] >= 20 for kind in kinds.values())


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (0, "", []),
        (2, "meta-infer: no\n", []),
        (1, "meta-infer: internal error: x\n", ["ended with 1", "an internal error"]),
        ("late", "", ["ended with late"]),
        (2, "Traceback (most recent call last):\n", ["a traceback"]),
        (2, "x\n" * 50, ["50 lines on standard error"]),
        (0, "\x1b[31m", ["control characters on standard error"]),
    ],
)
def test_what_is_wrong_is_seen(code, said, wrong):
    assert list(fuzz.judged(code, said)) == wrong


def test_what_is_left_is_seen(tmp_path):
    folder = tmp_path / "input"
    for path in (folder / "out", tmp_path / "home", tmp_path / "tmp"):
        path.mkdir(parents=True)
    assert list(fuzz.left_behind(2, ["meta-export"], folder, {"out"}, tmp_path)) == []
    (folder / ".out.tmp-1").mkdir()
    (tmp_path / "home" / ".cache").mkdir()
    left = list(fuzz.left_behind(2, ["meta-export"], folder, set(), tmp_path))
    assert any("['.out.tmp-1', 'out']" in line for line in left)
    assert any("home" in line for line in left)
    assert os.listdir(tmp_path / "home") == []


def test_a_process_that_dies_is_a_finding(monkeypatch, tmp_path, capsys):
    script = tmp_path / "dies.py"
    script.write_text("import os; print('{\"start\": 7}', flush=True); os.kill(os.getpid(), 11)")
    monkeypatch.setattr(fuzz, "__file__", str(script))
    tally = fuzz.Tally()
    assert fuzz._watch("onnx", 0, 7, 60, 0, tally) == 8
    assert tally.findings[0]["wrong"] == ["died with -11"]
    assert tally.findings[0]["again"].endswith("--only onnx --input 7")


def test_an_input_is_its_seeds_alone():
    data = bytes(range(256)) * 4
    assert mutated(random.Random("a"), data) == mutated(random.Random("a"), data) != data
    content = {"a": [1, {"b": 2}], "c": "x"}
    assert len(places(content)) == 5
    changed = [restructured(random.Random(i), content) for i in range(50)]
    assert content == {"a": [1, {"b": 2}], "c": "x"}
    assert len({repr(c) for c in changed}) > 20
    assert len(ODD_VALUES) > 30
