"""A model compared with itself: what a row says of a report by hand."""

from types import SimpleNamespace

import onnx
import pytest

from benchmarks import report_aa
from meta_deploy.report.schema import ClassRow, Entry, Profile


def entry(ratio, *shares, ms=10.0):
    nothing = dict.fromkeys(("nodes", "bytes_read", "bytes_written", "flops"), 0)
    classes = tuple(ClassRow(name="other", ms=ms * share, share=share, **nothing) for share in shares)
    profile = Profile(by="", runs=1, ms=ms, classes=classes, nodes=())
    latency = SimpleNamespace(total_ratio=ratio)
    return Entry(name="a", path="a", kind="onnx", backend="auto", latency=latency, profile=profile)


def test_a_row_has_the_verdict_and_how_far_the_classes_are_from_the_run(monkeypatch):
    ratio = SimpleNamespace(value=1.02, low=1.01, high=1.03, verdict="slower")
    found = SimpleNamespace(entries=(entry(None, 0.5, 0.5), entry(ratio, 0.5, 0.47)), disturbances=())
    monkeypatch.setattr(report_aa, "report", lambda paths, **options: found)
    rows = list(report_aa.comparisons("x", 2, 20, 1))
    assert [row["run"] for row in rows] == [1, 2]
    assert (rows[0]["verdict"], rows[0]["disturbed"]) == ("slower", False)
    assert rows[0]["class_sum"] == pytest.approx(0.03)


def test_the_network_that_is_compared_is_sound():
    onnx.checker.check_model(report_aa.small(), full_check=True)
