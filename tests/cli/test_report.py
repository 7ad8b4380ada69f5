"""meta-report: what it prints, writes and refuses, and by which exit code."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from meta_deploy.cli.report import main
from meta_deploy.report import roofline
from meta_deploy.report.schema import Report, Roofline


@pytest.fixture(autouse=True)
def roof(monkeypatch):
    """Measured elsewhere; it takes seconds."""
    monkeypatch.setattr(roofline, "measure", lambda threads: Roofline(bandwidth_gb_s=10, peak_gflop_s=50))


def one_line(capsys):
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


def test_the_report_is_written_and_told_and_a_missing_model_is_code_2(
    bundles, small_images, tmp_path, capsys
):
    outs = [tmp_path / f"x{suffix}" for suffix in (".html", ".md", ".json")]
    models = [str(bundles / "raw"), str(bundles / "raw"), str(tmp_path / "gone")]
    trace = tmp_path / "trace.json"
    options = [
        "--runs",
        "20",
        "--threads",
        "1",
        "--images",
        str(small_images),
        "--json",
        "--trace",
        str(trace),
    ]
    assert main([*models, *options, *(f"--out={out}" for out in outs)]) == 2
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert [entry["error"] is None for entry in document["entries"]] == [True, True, False]
    assert len(document["settings"]["images"]) == 2
    assert f"gone: there is no '{tmp_path / 'gone'}'" in captured.err
    assert "raw #2" in captured.err  # the comparison; standard output is the document's
    assert any(event["ph"] == "X" for event in json.loads(trace.read_text())["traceEvents"])
    html, markdown, file = (out.read_text() for out in outs)
    assert html.startswith("<!doctype html>")
    assert markdown.startswith("# Comparison")
    assert msgspec.json.decode(file, type=Report) == msgspec.json.decode(captured.out, type=Report)


def test_a_condition_that_is_met_is_code_3_after_the_report_is_written(
    bundles, small_images, tmp_path, capsys
):
    common = [str(bundles / "raw"), "--runs", "20", "--threads", "1", "--images", str(small_images)]
    before, out = tmp_path / "before.json", tmp_path / "now.md"
    assert main([*common, "--out", str(before), "--fail-if", "latency_ms > 1e9"]) == 0
    capsys.readouterr()
    conditions = ["--fail-if", "files_mb / baseline > 0.99", "--fail-if", "files_mb / baseline > 1"]
    assert main([*common, "--baseline", str(before), "--out", str(out), *conditions]) == 3
    assert "FAILED files_mb / baseline > 0.99: raw 1\n" in capsys.readouterr().err
    assert "passed files_mb / baseline > 1\n" in out.read_text()
    assert "## Since the baseline" in out.read_text()


def test_without_one_model_that_runs_there_is_no_report(tmp_path, capsys):
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    out = tmp_path / "out.html"
    assert main([str(tmp_path / "x.onnx"), "--out", str(out)]) == 2
    assert "no report" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "report.pdf"], "report.pdf"),
        (["--out", "{bundle}/report.html"], "a model"),
        (["--out", "x.md", "--out", "x.md"], "x.md"),
        (["--out", "x.json", "--trace", "x.json"], "x.json"),
        (["--trace", "{tmp}/no/x.json"], "there is no folder"),
        (["--out", "{tmp}/no/x.md"], "there is no folder"),
        (["--images", "{tmp}", "--json"], "no image in the folder"),
        (["--annotations", "{tmp}/other.json", "--json"], "annotates none"),
        (["--runs", "5", "--json"], "5 runs are too few"),
        (["--fail-if", "latency_ratio = 1", "--json"], "is no condition"),
        (["--fail-if", "box_ap > 1", "--fail-if", "speed < 1", "--json"], "'speed' in 'speed < 1'"),
        (["--fail-if", "latency_ms - baseline > 1", "--json"], "give --baseline"),
        (["--baseline", "{tmp}/other.json", "--json"], "other.json' is not a report"),
        (["--baseline", "{tmp}/none.json", "--json"], "none.json': No such file"),
        (["--baseline", "{tmp}/other.json", "--out", "{tmp}/other.json"], "the baseline"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(bundles, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    image = {"id": 1, "file_name": "another.jpg"}
    other = {"images": [image], "categories": [], "annotations": []}
    (tmp_path / "other.json").write_text(json.dumps(other))
    filled = [option.format(bundle=bundles / "raw", tmp=tmp_path) for option in options]
    assert main([str(bundles / "raw"), *filled]) == 2
    assert said in one_line(capsys)
    assert not list(tmp_path.glob("*.html"))


def lives(pid):
    """Whether the process runs; one that ended may wait to be noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_interrupted_it_leaves_no_report_and_no_process(bundles, tmp_path):
    out = tmp_path / "report.html"
    command = [sys.executable, "-m", "meta_deploy.cli.report", str(bundles / "detector"), "--runs", "1000000"]
    process = subprocess.Popen(
        [*command, "--out", str(out)], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not tell of children")
    deadline = time.monotonic() + 60
    while not (pids := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr.read() == "meta-report: interrupted\n"
    assert pids
    # One that was just starting sees that nobody asks any more.
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, pids))
    assert not list(tmp_path.iterdir())
