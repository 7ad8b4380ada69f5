"""What the commands print: names that no terminal obeys, on streams that take little or nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meta_deploy.cli.common import Parser, run
from meta_deploy.errors import InputError
from meta_deploy.text import escaped

PICTURE = Path(__file__).parents[2] / "meta_deploy/assets/images/fluorescence-4.png"
ODD_NAMES = [b"a\nb.jpg", b"\x1b[31mred.jpg", b"na\xefve.jpg", "\u202egnp.jpg".encode(), "käse.jpg".encode()]


def infer(*arguments, cwd=None, **variables):
    return subprocess.run(
        [sys.executable, "-m", "meta_deploy.cli.infer", *arguments],
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables},
        timeout=120,
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain é 漢 👍.jpg", "plain é 漢 👍.jpg"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x1b[2J\x07\x9b31m", "\\x1b[2J\\x07\\x9b31m"),
        ("\u202eabc\u2066\u2028", "\\u202eabc\\u2066\\u2028"),
        (os.fsdecode(b"\xff\xfe.jpg"), "\\xff\\xfe.jpg"),
        ("\ud800", "\\ud800"),
        ("می\u200cخواهم 👩\u200d🚒", "می\u200cخواهم 👩\u200d🚒"),
        ("C:\\new", "C:\\new"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(name, shown):
    assert escaped(name) == shown


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_of_any_bytes_are_printed_a_line_each(tmp_path, detector_bundle, encoding):
    for name in ODD_NAMES:
        shutil.copy(PICTURE, os.fsencode(tmp_path) + b"/" + name)
    inputs = (".", "missing\n\x1b(1m.jpg", "--model", detector_bundle.path)
    done = infer(*inputs, "--out", "o\nut", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 2  # of the missing one
    assert len(done.stdout.splitlines()) == len(ODD_NAMES) + 1
    for output in (done.stdout, done.stderr):
        assert not {b for b in output if b < 32} - {ord("\n")}
        assert "\u202e".encode() not in output
    assert b"a\\nb.jpg" in done.stdout
    assert b"\\x1b[31mred.jpg" in done.stdout
    assert b"missing\\n\\x1b(1m.jpg" in done.stderr
    assert len(os.listdir(tmp_path / "o\nut")) == len(ODD_NAMES)


def test_json_holds_the_exact_names(tmp_path, detector_bundle):
    shutil.copy(PICTURE, os.fsencode(tmp_path) + b"/n\xe9\n.jpg")
    path = os.fsdecode(os.fsencode(tmp_path) + b"/n\xe9\n.jpg")
    done = infer(path, "--json", "--model", detector_bundle.path, PYTHONIOENCODING="ascii")
    (image,) = json.loads(done.stdout)["images"]
    assert os.fsencode(image["path"]).endswith(b"/n\xe9\n.jpg")


def test_help_is_printed_in_any_encoding():
    for module in ("infer", "export"):
        command = [sys.executable, "-m", f"meta_deploy.cli.{module}", "--help"]
        done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert (done.returncode, done.stderr) == (0, b"")


def under(redirection, *arguments):
    command = " ".join([sys.executable, "-m", "meta_deploy.cli.infer", *arguments, redirection])
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_what_standard_error_cannot_take_is_no_reason_to_stop(tmp_path, detector_bundle, redirection):
    done = under(
        redirection, str(PICTURE), "--model", str(detector_bundle.path), "--out", str(tmp_path / "out")
    )
    assert done.returncode == 0
    assert "fluorescence-4.png" in done.stdout
    assert os.listdir(tmp_path / "out") == ["fluorescence-4-overlay.png"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_standard_output_is_one_line(detector_bundle):
    done = under(">/dev/full", str(PICTURE), "--json", "--model", str(detector_bundle.path))
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if "space" in line]) == 1


def test_an_error_with_a_name_in_it_is_one_line(capsys):
    def fail():
        raise InputError("there is no file 'a\nb\x1b[1m'; check the path")

    assert run(fail, "prog") == 2
    assert capsys.readouterr().err == "prog: there is no file 'a\\nb\\x1b[1m'; check the path\n"


def test_a_usage_error_is_one_line(capsys):
    with pytest.raises(SystemExit):
        Parser(prog="prog").parse_args(["--no\nsuch\x1b"])
    assert capsys.readouterr().err == "prog: unrecognized arguments: --no\\nsuch\\x1b (see prog --help)\n"


def test_a_deleted_current_folder_is_one_line(tmp_path):
    (tmp_path / "gone").mkdir()
    code = f"cd {tmp_path}/gone && rmdir ../gone && {sys.executable} -m meta_deploy.cli.infer {PICTURE}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["sh", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["meta-infer: the current folder is gone; change to another"]
