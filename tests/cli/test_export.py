"""meta-export keeps its contract: what it prints, its exit codes, one line for bad input, nothing left."""

import contextlib
import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from meta_deploy.bundle import folders
from meta_deploy.bundle.bundle import Bundle
from meta_deploy.cli.export import StageDisplay, main, passes_table, verdict
from meta_deploy.errors import BundleError
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.registry import build_model, get_config
from tests.tiny_models import detector, exported, lively

CONFIG = detector()
KEYS = {
    *("bundle", "model", "target", "precision", "parameters", "nodes", "passes", "verification", "seconds"),
    *("peak_rss_mb", "engine", "operators", "conversion", "task", "tuning", "left_out", "triton"),
}
STAGES = [
    "loading the model",
    "exporting to ONNX",
    "running graph passes",
    "comparing with the original",
    "writing the bundle",
]
QUICK = ("--no-verify", "--passes", "none")

# meta-export with its translation read from a file, and slow at the stage to be killed in.
CHILD = """
import sys, time
import onnx
from meta_deploy.export.sources import checkpoint
from meta_deploy.bundle import bundle
from meta_deploy.cli.export import main

checkpoint.export_onnx = lambda model, spec, operators: onnx.load({graph!r})
if {slow_write!r}:
    fsync = bundle.os.fsync
    def slow(descriptor):
        print("syncing", file=sys.stderr, flush=True)
        time.sleep(0.4)
        fsync(descriptor)
    bundle.os.fsync = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with tiny.pth, its translated graph, and a picture in pictures/."""
    folder = tmp_path_factory.mktemp("material")
    save_checkpoint(folder / "tiny.pth", lively(CONFIG), CONFIG)
    onnx.save(exported("detector").literal, folder / "literal.onnx")
    (folder / "pictures").mkdir()
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC).save(folder / "pictures" / "a.png")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def meta_export(material, here, capfd, monkeypatch):
    """Run meta-export on the tiny checkpoint, its translation made before: exit code, stdout, stderr."""
    from meta_deploy.export.sources import checkpoint

    monkeypatch.setattr(checkpoint, "export_onnx", lambda *_: onnx.load(material / "literal.onnx"))

    def call(*options, ckpt=material / "tiny.pth"):
        capfd.readouterr()
        try:
            code = main(["--ckpt", str(ckpt), "--no-tune", *map(str, options)])
        except SystemExit as exit:
            code = exit.code
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def pictures(material):
    return ("--calib-images", material / "pictures")


def refused(result, here, *patterns):
    """Assert exit code 2, one line on standard error that has the patterns, nothing printed nor left."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("meta-export: ")]
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    for pattern in patterns:
        assert re.search(pattern, lines[0]), lines[0]
    assert not list(here.rglob("manifest.json"))
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


# --- what it prints ---


@pytest.mark.slow
def test_json_is_one_document_with_the_keys_of_the_contract(meta_export, pictures, here):
    code, out, err = meta_export("--json", "--out", "b", *pictures)
    assert code == 0, err
    document = json.loads(out)
    assert set(document) == KEYS
    assert (document["bundle"], document["model"]) == ("b", "tiny-mask-rcnn")
    assert (document["target"], document["precision"], document["engine"]) == ("onnxruntime", "fp32", None)
    assert document["nodes"]["before"] > document["nodes"]["after"]
    assert {"name", "changes", "bytes_before", "bytes_after"} <= set(document["passes"][0])
    assert document["verification"]["passed"] is True
    assert set(document["seconds"]) >= {"load", "export", "passes", "verify"}
    assert document["parameters"] == Bundle.open("b").manifest.parameters
    assert document["peak_rss_mb"] > 0
    assert sorted(path.name for path in here.iterdir()) == ["b"]


@pytest.mark.slow
def test_text_names_passes_verdict_bundle_and_next_step(meta_export, pictures):
    code, out, err = meta_export("--out", "b", *pictures)
    assert code == 0, err
    assert re.search(r"^pass +changes +nodes +transpose\+reshape +MB moved +seconds$", out, re.MULTILINE)
    row = r"^clean-up +\d+ +\d+ -> \d+ +\d+ -> \d+ +>?\d+\.\d -> >?\d+\.\d +\d+\.\d$"
    assert re.search(row, out, re.MULTILINE)
    assert re.search(r"matches PyTorch on 1 image: maps within \d", out)
    assert "100.0% of detections agree" in out
    assert re.search(r"^b: \d+\.\d MB, fp32, in \d+ s", out, re.MULTILINE)
    assert out.endswith("next: meta-infer IMAGE --model b\n")
    assert "target onnxruntime" in err


@pytest.mark.slow
def test_the_default_folder_is_named_after_the_checkpoint_in_the_current_one(meta_export, here):
    code, out, _ = meta_export("--no-verify")
    assert code == 0
    assert [path.name for path in here.iterdir()] == ["tiny-onnxruntime-fp32"]
    assert "not compared with the original (--no-verify)" in out


@pytest.mark.slow
def test_a_stage_is_a_line_where_standard_error_is_no_terminal(meta_export, pictures):
    _, _, err = meta_export("--out", "b", *pictures)
    ended = [line for line in err.splitlines() if re.fullmatch(r".* \d+\.\d s", line)]
    assert [line.rsplit(" ", 2)[0] for line in ended] == STAGES
    assert "\r" not in err
    assert "\033" not in err


def pass_entry(name, changes, nodes, moves, moved, seconds, exact=True):
    """A pass in the manifest, from (before, after) of each measure."""
    entry = {"name": name, "changes": changes, "seconds": seconds, "bytes_exact": exact}
    for what, (before, after) in {"nodes": nodes, "moves": moves, "bytes": moved}.items():
        entry |= {f"{what}_before": before, f"{what}_after": after}
    return entry


def test_the_table_of_passes_lines_up_and_ends_with_all_of_them():
    entries = [
        pass_entry("clean-up", 1478, (14393, 12915), (1174, 906), (12_345_678_901, 12_000_000_000), 2.21),
        pass_entry("collapse-chains", 853, (12915, 834), (906, 37), (12_000_000_000, 54_321), 0.12),
    ]
    head, *rows = passes_table(entries).splitlines()
    assert {len(head)} == {len(row) for row in rows}
    assert [" ".join(row.split()) for row in rows] == [
        "clean-up 1478 14393 -> 12915 1174 -> 906 12345.7 -> 12000.0 2.2",
        "collapse-chains 853 12915 -> 834 906 -> 37 12000.0 -> 0.1 0.1",
        "all 2331 14393 -> 834 1174 -> 37 12345.7 -> 0.1 2.3",
    ]


def test_bytes_are_marked_as_more_where_some_are_not_known():
    exact = pass_entry("clean-up", 1, (2, 1), (0, 0), (3_000_000, 2_000_000), 0.0)
    more = pass_entry("fuse-attention", 1, (1, 1), (0, 0), (2_000_000, 1_000_000), 0.0, exact=False)
    rows = [" ".join(row.split()) for row in passes_table([exact, more]).splitlines()[1:]]
    assert [row.split("0 -> 0 ")[1] for row in rows] == [
        "3.0 -> 2.0 0.0",
        ">2.0 -> >1.0 0.0",
        ">3.0 -> >1.0 0.0",
    ]


def test_one_pass_alone_has_no_total():
    alone = passes_table([pass_entry("clean-up", 1, (2, 1), (0, 0), (0, 0), 0.0)])
    assert [line.split()[0] for line in alone.splitlines()] == ["pass", "clean-up"]


def test_nothing_found_says_so():
    line = verdict(
        {
            "images": 2,
            "stages": {
                "maps": {"max_relative_error": 1e-6, "passed": True},
                "detections": {"compared": 0, "agreement": 1.0, "passed": True},
            },
        }
    )
    assert line == "matches PyTorch on 2 images: maps within 1.0e-06, no detections on them to compare"


def read_all(terminal):
    """What was written to a terminal whose other end is or gets closed."""
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that it has closed
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    return shown.decode()


def test_a_terminal_sees_the_stage_while_it_runs(monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        display = StageDisplay()
        assert display.live
        display.start("verify")
        display.count(3, 8)
        display.note("a note")
        display.end("verify", 1.25)
        display.start("write")
        display.close()
    shown = read_all(ours)
    assert "\r\033[Kcomparing with the original…" in shown
    assert "\r\033[Kcomparing with the original 3/8" in shown
    assert re.search(r"\r\033\[Ka note\r?\n", shown)
    assert re.search(r"\r\033\[Kcomparing with the original 1\.2 s\r?\n", shown)
    assert shown.endswith("\r\033[K")  # the cursor is left on a clean line


# --- exit codes ---


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        (["--model", "resnet50"], ["'resnet50'", "meta-t-mask-rcnn"]),
        (["--target", "cuda"], ["'cuda'", "tensorrt"]),
        (["--target", "tensorrt"], ["tensorrt", "cannot be imported", "pip install"]),
        (
            ["--bf16"],
            ["precision bf16 is not written for onnxruntime", "openvino", "--fp32, --fp16 or --int8"],
        ),
        (["--fp4"], ["unrecognized arguments: --fp4"]),
        (
            ["--fp8"],
            [
                "precision fp8 is not written for onnxruntime; use --target tensorrt or tensorrt-rtx, "
                "or --fp32, --fp16 or --int8"
            ],
        ),
        (["--explain", "tidy"], ["'tidy' is not a graph pass", "clean-up"]),
        (["--onnx", "x.onnx"], ["not allowed with argument --ckpt"]),
        (["--mean", "0"], ["--mean is for an ONNX file"]),
        (["--mean", "1", "2"], ["--mean takes one number or three, not 2"]),
        (["--std", "0"], ["--std 0 is not above zero"]),
        (["--scale", "nan"], ["'nan' is not a number"]),
        (["--shape", "images"], ["'images' is not a name and a shape such as"]),
        (["--class-names", "missing.txt"], ["cannot read 'missing.txt'"]),
        (["--gpu", "8.6"], ["--gpu and --workspace are for TensorRT"]),
        (["--workspace", "64"], ["--gpu and --workspace are for TensorRT"]),
        (["--gpu", "Ampere"], ["'Ampere' is not a compute capability such as 8.9"]),
        (["--target", "tensorrt-rtx", "--gpu", "8.6,9.0"], ["'9.0'", "choose from", "8.9"]),
        (["--target", "tensorrt-rtx", "--operators", "native"], ["does not run native", "lowered"]),
        (["--fp32", "--fp16"], ["not allowed with argument"]),
        (["--passes", "fuse"], ["'fuse'", "clean-up"]),
        (["--passes", ""], ["choose all, none"]),
        (["--input-size", "100", "96"], ["height 100", "nearest is 96"]),
        (["--input-size", "96", "0"], ["'0' is not a whole number"]),
        (["--input-size", "96"], ["expected 2 arguments"]),
        (["--input-size", "96", "abc"], ["'abc'"]),
        (["--input-size", "3200000", "3200000"], ["too large"]),
        (["--batch", "0"], ["'0' is not a whole number of at least 1"]),
        (["--batch", "1.5"], ["'1.5'"]),
        (["--batch", "1000000000"], ["too large"]),
        (["--batch", "2", "--dynamic-batch", "1", "2", "4"], ["not allowed with argument"]),
        (["--dynamic-batch", "4", "2", "1"], ["batch range 4 2 1 does not rise"]),
        (["--batch", "1", "--dynamic-batch", "1", "2", "4"], ["not allowed with argument --batch"]),
        (["--dynamic-batch", "1", "2"], ["expected 3 arguments"]),
        (["--calib-images", "missing"], ["'missing' is not a folder", "--calib-images"]),
        (["--calib-images", "missing", "--no-verify"], ["'missing' is not a folder"]),
        (["--calib-images", "."], ["no image in the folder"]),
        (["--batches", "2"], ["--batches"]),
        (["stray.png"], ["stray.png"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else "",
)
def test_a_wrong_option_is_one_line(meta_export, here, options, patterns):
    refused(meta_export(*options), here, *patterns)


def test_a_missing_option_is_one_line(here, capfd):
    refused((main([]), *capfd.readouterr()), here, "--ckpt", "--onnx", "--backbone-ckpt")


def test_a_vit_that_no_model_is_named_for_or_that_does_not_fit_is_one_line(here, capfd):
    with torch.device("meta"):
        vit = build_model(get_config("meta-s-upernet")).backbone.vit.state_dict()
    torch.save({name: torch.zeros(tensor.shape) for name, tensor in vit.items()}, "vit.pth")
    given = ["--backbone-ckpt", "vit.pth", "--no-verify"]
    refused((main(given), *capfd.readouterr()), here, "name the model around it with --model", "meta-s-")
    code = main([*given, "--model", "meta-t-gfl"])
    refused((code, *capfd.readouterr()), here, "width 384, depth 12, and that of meta-t-gfl is of width 192")
    code = main([*given, "--onnx", "x.onnx"])
    refused((code, *capfd.readouterr()), here, "--backbone-ckpt is for a checkpoint")


def test_a_broken_picture_is_named_before_the_work(meta_export, here):
    (here / "pictures").mkdir()
    (here / "pictures" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    result = meta_export("--calib-images", "pictures")
    refused(result, here, r"broken\.jpg")
    assert "exporting to ONNX" not in result[2]


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_what_is_no_checkpoint_is_one_line(meta_export, here, content):
    if content is not None:
        (here / "x.pth").write_bytes(content)
    refused(meta_export("--no-verify", ckpt="x.pth"), here, r"x\.pth")


def test_a_truncated_checkpoint_is_one_line(meta_export, material, here):
    whole = (material / "tiny.pth").read_bytes()
    (here / "half.pth").write_bytes(whole[: len(whole) // 2])
    refused(meta_export("--no-verify", ckpt="half.pth"), here, r"half\.pth")


def test_a_checkpoint_of_another_model_is_one_line(meta_export, here):
    refused(meta_export("--no-verify", "--model", "meta-t-upernet"), here, "meta-t-upernet", "--model")


def test_a_file_or_a_strangers_folder_in_the_way_is_one_line_and_stays(meta_export, here):
    (here / "file").write_text("mine")
    (here / "folder").mkdir()
    (here / "folder" / "thesis.tex").write_text("mine")
    for out, pattern in (("file", "is a file"), ("folder", "not a bundle"), ("file/b", "cannot write")):
        refused(meta_export("--no-verify", "--out", out), here, out, pattern)
    assert (here / "file").read_text() == (here / "folder" / "thesis.tex").read_text() == "mine"


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_one_line(meta_export, here):
    refused(meta_export("--no-verify", "--out", "/proc/b"), here, "cannot write the bundle '/proc/b'")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_is_one_line_and_the_old_bundle_stays(meta_export, here, monkeypatch, call):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "rename")), full)
        refused(meta_export(*QUICK, "--out", "b"), here, "No space left on device", "free space")
        assert list(here.iterdir()) == []
    assert meta_export(*QUICK, "--out", "b")[0] == 0
    old = (here / "b" / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "rename")), full)
        patch.setattr(folders, "_exchange", lambda *_: False)
        assert meta_export(*QUICK, "--out", "b")[0] == 2
    assert (here / "b" / "manifest.json").read_bytes() == old
    Bundle.open("b")
    assert [path.name for path in here.iterdir()] == ["b"]


@pytest.mark.slow
def test_an_older_bundle_is_replaced(meta_export, pictures):
    assert meta_export(*QUICK, "--out", "b")[0] == 0
    assert Bundle.open("b").manifest.verification is None
    assert meta_export("--out", "b", *pictures)[0] == 0
    assert Bundle.open("b").manifest.verification["passed"]


@pytest.mark.slow
def test_a_failed_verification_is_3_and_leaves_no_bundle(meta_export, pictures, here, monkeypatch):
    from meta_deploy.export import pipeline
    from meta_deploy.graph.pipeline import PASSES

    def corrupt(graph):
        weights = [t for t in graph.tensors().values() if hasattr(t, "values") and t.values.ndim == 4]
        largest = max(weights, key=lambda t: t.values.size)
        largest.values = largest.values * np.float32(1.5)
        return 1

    monkeypatch.setitem(PASSES, "discarded-rows", corrupt)
    monkeypatch.setattr(pipeline, "at_fault", lambda *_: None)  # else it is left out
    code, out, err = meta_export("--out", "b", "--json", *pictures)
    assert code == 3
    assert out == ""
    assert re.fullmatch(
        r"meta-export: the exported model does not match PyTorch on 1 image: .*", err.splitlines()[-1]
    )
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_explain_says_what_a_pass_left_and_why(meta_export, here):
    code, out, err = meta_export("--no-verify", "--json", "--explain", "--out", "b")
    assert code == 0
    declined = {row["name"]: row["declined"] for row in json.loads(out)["passes"]}
    assert declined["distribute-sums"]
    for name, places in declined.items():
        assert all(set(place) == {"node", "op", "reason"} for place in places)
        assert (f"\n{name} left as they are:\n" in f"\n{err}") == bool(places)


def test_a_pass_to_explain_that_is_none_is_refused(meta_export, here):
    refused(meta_export("--explain", "fuse"), here, "'fuse' is not a graph pass", "fuse-attention")


def test_a_fault_of_ours_is_1_and_says_how_to_report_it(meta_export, here, monkeypatch):
    from meta_deploy.export.sources import checkpoint

    def fails(*_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(checkpoint, "export_onnx", fails)
    code, out, err = meta_export("--no-verify")
    assert (code, out) == (1, "")
    assert "ZeroDivisionError: oops" in err.splitlines()[-1]
    assert "META_DEPLOY_DEBUG=1" in err
    assert "Traceback" not in err
    assert list(here.iterdir()) == []


def test_ctrl_c_is_130(meta_export, here, monkeypatch):
    from meta_deploy.export.sources import checkpoint

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "export_onnx", interrupted)
    code, out, err = meta_export("--no-verify")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "meta-export: interrupted"
    assert list(here.iterdir()) == []


# --- as a process ---


def start(material, *options, slow_write=False, **popen):
    code = CHILD.format(graph=str(material / "literal.onnx"), slow_write=slow_write)
    command = [sys.executable, "-c", code, "--ckpt", material / "tiny.pth", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
    return subprocess.Popen(list(map(str, command)), text=True, env=environment, **pipes)


def wait_for(process, text):
    """Read standard error up to the line that has the text."""
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"the process ended before '{text}'")


@pytest.mark.slow
def test_killed_while_writing_it_leaves_no_bundle_that_loads(material, here):
    """At each system call of the writing: tests/bundle/test_kill.py."""
    process = start(material, "--out", "b", *QUICK, slow_write=True)
    wait_for(process, "syncing")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (here / "b").exists()
    for path in here.iterdir():  # what may be left is hidden, and no bundle until its last byte is there
        assert path.name.startswith(".meta-deploy-")
        with pytest.raises(BundleError):
            Bundle.open(path)
    # The next one clears it away.
    process = start(material, "--out", "b", *QUICK)
    process.communicate()
    assert process.returncode == 0
    Bundle.open("b")
    assert [path.name for path in here.iterdir()] == ["b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number", "code", "said"),
    [
        ("loading the model", signal.SIGINT, 130, "interrupted"),
        ("syncing", signal.SIGINT, 130, "interrupted"),
        ("syncing", signal.SIGTERM, 143, "terminated"),
    ],
)
def test_interrupted_it_leaves_nothing(material, here, moment, number, code, said):
    process = start(material, "--out", "b", *QUICK, slow_write=True)
    wait_for(process, moment)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out) == (code, "")
    assert err.splitlines()[-1] == f"meta-export: {said}"
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_a_real_export_prints_json_and_nothing_else_on_standard_output(material, here, pictures):
    """Nothing replaced: PyTorch and all the libraries get their chance to speak."""
    command = [sys.executable, "-m", "meta_deploy.cli.export", "--ckpt", material / "tiny.pth", "--json"]
    options = ["--out", "b", "--input-size", "64", "64", "--no-tune", *pictures]
    result = subprocess.run(
        list(map(str, [*command, *options])),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["verification"]["passed"]
    assert result.stdout.count("\n") == 1
    assert all(
        not line or re.match(r"target|tiny|position|" + "|".join(STAGES), line)
        for line in result.stderr.splitlines()
    )


@pytest.mark.slow
def test_on_a_terminal_the_stages_update_in_place(material, here, pictures):
    ours, theirs = pty.openpty()
    process = start(material, "--out", "b", "--no-tune", *pictures, stderr=theirs)
    os.close(theirs)
    text = read_all(ours)
    process.communicate()
    assert process.returncode == 0, text
    for stage in STAGES:
        assert f"\r\033[K{stage}…" in text
    assert "comparing with the original 1/1" in text


def test_help_imports_little_and_nothing_heavy():
    code = (
        "import sys\n"
        "from meta_deploy.cli.export import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'onnx', 'numpy', 'onnxruntime', 'cv2', 'onnx_graphsurgeon'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 250, sorted(sys.modules)"  # some 100, most of them Python's own
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for option in ("--ckpt", "--target", "--dynamic-batch", "--passes", "--no-verify", "--json"):
        assert option in result.stdout
