"""Which target and precision can be written, and what is said of those that cannot."""

import pytest

from meta_deploy.errors import InputError
from meta_deploy.export import targets
from meta_deploy.export.targets import PRECISIONS, TARGETS, choose_target


def test_onnxruntime_in_float32_is_written():
    assert choose_target("onnxruntime", "fp32")[0] == "onnxruntime"


@pytest.mark.parametrize(
    ("installed", "reason"), [(True, "does not write engines yet"), (False, "not installed")]
)
def test_auto_says_what_it_chose_and_why(installed, reason, monkeypatch):
    monkeypatch.setattr(targets, "find_spec", lambda name: object() if installed else None)
    target, why = choose_target("auto", "fp32")
    assert target == "onnxruntime"
    assert reason in why


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "onnxruntime"])
def test_a_target_that_is_not_written_yet_is_refused(target):
    with pytest.raises(InputError, match=f"target {target} is not written by this version yet; use --target"):
        choose_target(target, "fp32")


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "fp32"])
def test_a_precision_that_is_not_written_yet_is_refused(precision):
    """It is not ignored: a bundle that says fp16 would hold fp16."""
    with pytest.raises(
        InputError, match=f"precision {precision} is not written by this version yet; use --fp32"
    ):
        choose_target("auto", precision)


@pytest.mark.parametrize(
    ("target", "precision", "named"), [("cuda", "fp32", "cuda"), ("auto", "fp64", "fp64")]
)
def test_an_unknown_one_is_named_with_the_choices(target, precision, named):
    with pytest.raises(InputError, match=f"'{named}' is not a .*; choose .*"):
        choose_target(target, precision)
