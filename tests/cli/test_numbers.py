"""Numbers on the command line: digits as a programmer writes them, in ranges that fit."""

import argparse

import pytest

from meta_deploy.cli.common import fraction, number, positive_int, thread_count
from meta_deploy.errors import InputError
from meta_deploy.targets import get_target
from meta_deploy.targets.target import BuildOptions

WRONG = [
    "",
    " ",
    "1_0",
    "٣",
    "１",
    "²",
    "nan",
    "inf",
    "-inf",
    "0x10",
    "1 ",
    " 1",
    "1\n",
    "--1",
    "1e",
    "e1",
    ".",
    "9" * 5000,
]


@pytest.mark.parametrize("text", [*WRONG, "0", "-1", "1.5", "+-2", str(2**31)])
def test_whole_numbers(text):
    for kind in (positive_int, thread_count):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


@pytest.mark.parametrize("text", [text for text in WRONG if text != "9" * 5000] + ["1e400", "-1e999"])
def test_real_numbers(text):
    for kind in (number, fraction):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_what_is_a_number_is_read():
    assert (positive_int("007"), positive_int("2147483647"), thread_count("1024")) == (7, 2**31 - 1, 1024)
    assert [number(text) for text in ("-1.5", "+2", ".5", "3.", "1e-3", "2E+2")] == [
        -1.5,
        2.0,
        0.5,
        3.0,
        1e-3,
        200.0,
    ]
    assert (fraction("0"), fraction("1.0"), fraction("5e-1")) == (0.0, 1.0, 0.5)


@pytest.mark.parametrize("megabytes", [0, -1, 2**43, 2**64])
def test_a_workspace_of_more_than_64_bits_is_refused(megabytes):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(InputError, match="--workspace"):
        get_target("tensorrt-rtx").check(BuildOptions(workspace_mb=megabytes))
