"""Conditions that fail a report, and an earlier report that is compared with; on entries by hand."""

import math

import pytest
from msgspec.structs import replace

from meta_deploy.errors import InputError
from meta_deploy.report import words
from meta_deploy.report.baseline import check_same, compared, read_baseline
from meta_deploy.report.gates import METRICS, parse
from meta_deploy.report.markdown import to_markdown
from meta_deploy.report.page import to_html
from meta_deploy.report.schema import (
    Accuracy,
    EngineRow,
    Entry,
    GpuTime,
    Latency,
    Machine,
    Ratio,
    Report,
    Settings,
    Spread,
    Throughput,
)

MACHINE = Machine(
    cpu="A CPU",
    instruction_sets=("avx2",),
    cpus=2,
    memory_gb=8.0,
    governor=None,
    system="Linux",
    versions={"numpy": "2", "onnxruntime": "1"},
    load=0.1,
)
SETTINGS = Settings(images=("here/one.jpg",), warm_up=3, runs=40, threads=2)


ENGINE = EngineRow(
    library="tensorrt",
    version="11",
    gpu=None,
    compute_capabilities=(),
    layer_count=9,
    generated_kernels=3,
    reformats=1,
    fused_attentions=2,
    attention_count=4,
    kinds={},
    activation_mb=1.5,
    weights_mb=2.5,
    plan_mb=3.0,
    seconds=1.0,
)


def entry(name, total, ratio=None, memory=200.0, **accuracy):
    times = Spread(median=total, p5=total, p90=2 * total, p99=3 * total)
    found = ratio and Ratio(value=ratio, low=ratio - 0.1, high=ratio + 0.1, verdict="slower")
    latency = Latency(
        rounds=40,
        pre=times,
        model=times,
        post=times,
        total=times,
        total_ratio=found,
        model_ratio=found,
        drift=1.0,
    )
    return Entry(
        name=name,
        path=name,
        kind="bundle",
        backend="onnxruntime",
        latency=latency,
        peak_memory_mb=memory,
        files={"model.onnx": 1_500_000},
        accuracy=Accuracy(against="annotations", images=1, **accuracy) if accuracy else None,
    )


FIRST, SECOND = entry("first", 10.0, box_ap=0.5), entry("second", 12.0, 1.2, box_ap=0.4)
BROKEN = Entry(name="broken", path="x", kind=None, backend="auto", error="there is no 'x'")
REPORT = Report(
    date="2026-01-01",
    command="meta-report",
    machine=MACHINE,
    settings=SETTINGS,
    entries=(FIRST, SECOND, BROKEN),
)


def hold(text, entries=REPORT.entries, before=None):
    return parse(text, before is not None).hold(entries, {one.name: one for one in before or ()})


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("latency_ratio > 1.05", ("second",)),
        ("latency_ratio_low>1.05", ("second",)),
        ("latency_ratio >= 1.2", ("second",)),
        ("latency_ratio > 1.2", ()),
        ("latency_ms <= 10", ("first",)),
        ("latency_p90_ms > 1.9e1", ("first", "second")),
        ("files_mb > 1.49", ("first", "second")),
        ("box_ap < .45", ("second",)),
    ],
)
def test_a_condition_names_the_entries_that_it_is_true_of(text, failed):
    gate = hold(text)
    assert (gate.failed, gate.passed) == (failed, not failed)
    assert "broken" not in gate.values


def test_a_condition_that_nothing_can_be_held_against_has_not_passed():
    gate = hold("mean_iou < 0.5")
    assert (gate.passed, gate.failed, gate.values) == (False, (), {})
    assert words.gate(gate) == "FAILED mean_iou < 0.5: no entry has such a value"


def test_an_error_that_is_no_number_has_not_passed():
    bad = entry("bad", 1.0, max_relative_error=math.nan)
    assert hold("max_relative_error > 0.1", [bad]).failed == ("bad",)


def test_a_baseline_is_divided_by_or_taken_away():
    before = [entry("first", 8.0, box_ap=0.52), entry("another", 1.0)]
    assert hold("latency_ms / baseline > 1.2", before=before).values == {"first": 1.25}
    assert hold("box_ap-baseline < -0.01", before=before).failed == ("first",)
    assert hold("box_ap - baseline < -0.03", before=before).passed


def test_a_baseline_of_zero_is_divided_by():
    before, now = (entry("a", 1.0, max_relative_error=value) for value in (0.0, 0.1))
    assert hold("max_relative_error / baseline > 2", [now], [before]).failed == ("a",)
    assert hold("max_relative_error / baseline > 2", [before], [before]).passed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latency_ration > 1", "did you mean latency_ratio?"),
        ("speed > 1", "choose latency_ms"),
        ("latency_ratio", "is no condition"),
        ("", "is no condition"),
        ("latency_ratio > fast", "is no condition"),
        ("latency_ratio > 1.05; import os", "is no condition"),
        ("latency_ratio == 1", "is no condition"),
        ("latency_ratio > nan", "is no condition"),
        ("1.05 < latency_ratio", "is no condition"),
        ("latency_ms / baseline > 1", "give --baseline"),
        ("latency_ratio >\n\u0663", "is no condition"),
    ],
)
def test_what_says_nothing_is_refused_in_one_line(text, said):
    with pytest.raises(InputError) as refused:
        parse(text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_metric_is_a_number_of_some_entry():
    full = entry("a", 1.0, 1.0, **dict.fromkeys(("box_ap", "box_ap50", "mask_ap", "mask_ap50"), 0.5))
    full = replace(
        full,
        accuracy=replace(
            full.accuracy,
            mean_iou=0.5,
            pixel_accuracy=0.5,
            max_relative_error=0.5,
            mean_score_difference=0.5,
            max_score_difference=0.5,
            logit_error=0.5,
        ),
        engine=ENGINE,
        gpu=GpuTime(memory_mb=1.0, **dict.fromkeys(("to_device", "compute", "to_host"), full.latency.total)),
        throughput=(Throughput(batch=1, images_per_second=2.0), Throughput(batch=9, reason="no")),
    )
    assert all(isinstance(get(full), float) for get in METRICS.values())
    assert all(get(BROKEN) is None for get in METRICS.values())


# --- the baseline -------------------------------------------------------------------------------------------


def test_a_report_is_a_baseline_of_itself(tmp_path):
    (tmp_path / "x.json").write_text(REPORT.to_json())
    before = read_baseline(tmp_path / "x.json")
    assert before == REPORT
    check_same("x.json", before, MACHINE, replace(SETTINGS, images=("there/one.jpg",)), REPORT.entries)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not a report"),
        ("[]", "is not a report"),
        ('{"schema": 1}', "is not a report"),
        ('{"schema": 2, "entries": []}', "has schema 2 and not 1"),
        ("[" * 100_000, "is not a report"),
        (b"\xff\xfe", "is not a report"),
    ],
)
def test_what_is_no_report_is_no_baseline(tmp_path, text, said):
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said):
        read_baseline(tmp_path / "x.json")
    with pytest.raises(InputError, match="cannot read"):
        read_baseline(tmp_path)


@pytest.mark.parametrize(
    ("machine", "settings", "names", "said"),
    [
        ({"cpu": "Another"}, {}, "first", "another CPU: A CPU, and not Another"),
        ({"instruction_sets": ()}, {}, "first", "avx2, and not none"),
        ({"cpus": 4}, {}, "first", "number of CPUs: 2, and not 4"),
        ({"gpus": ("H100",)}, {}, "first", "GPU: none, and not H100"),
        ({}, {"threads": 1}, "first", "threads: 2, and not 1"),
        ({}, {"images": ("two.jpg",)}, "first", "images: one.jpg, and not two.jpg"),
        ({}, {"annotations": "truth.json"}, "first", "annotation: none, and not truth.json"),
        ({}, {}, "third", "none of these entries, but first, second"),
    ],
)
def test_a_baseline_of_something_else_is_refused(machine, settings, names, said):
    with pytest.raises(InputError) as refused:
        check_same(
            "x.json", REPORT, replace(MACHINE, **machine), replace(SETTINGS, **settings), [entry(names, 1.0)]
        )
    assert said in str(refused.value)


def test_changes_are_told_in_every_format():
    now = entry("first", 20.0, box_ap=0.45)
    other = replace(MACHINE, versions={"numpy": "2", "onnxruntime": "1.1"})
    found = compared("old.json", REPORT, [now, entry("new", 1.0), BROKEN], other)
    assert list(found.changes) == ["first"]
    assert (found.changes["first"]["latency_ms"].then, found.changes["first"]["latency_ms"].now) == (10, 20)
    assert found.versions == {"onnxruntime": ("1", "1.1")}
    report = replace(
        REPORT, entries=(now,), baseline=found, gates=(hold("latency_ms > 19", [now]), hold("box_ap < 0.1"))
    )
    for text in (to_markdown(report), to_html(report).replace("&gt;", ">").replace("&lt;", "<")):
        for said in ("10.0 → 20.0 (2.000)", "0.5 → 0.45", "onnxruntime 1 → 1.1", "old.json"):
            assert said in text
        assert "FAILED latency_ms > 19: first 20" in text
        assert "passed box_ap" in text
