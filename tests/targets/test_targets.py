"""Which target, precision and operators can be written here, and what is said of those that cannot."""

import sys
from types import SimpleNamespace

import pytest

from meta_deploy.errors import BackendError, InputError
from meta_deploy.export.operators import TRANSLATIONS
from meta_deploy.graph.pipeline import COSTS, PIPELINES
from meta_deploy.targets import table as targets
from meta_deploy.targets.table import PRECISIONS, TARGETS, choose_operators, choose_target
from meta_deploy.targets.tensorrt.library import MODULES


@pytest.fixture
def machine(monkeypatch):
    """Says which TensorRTs are installed, and which GPU is there."""

    def call(installed=(), gpu=None):
        def load(name):
            if name not in installed:
                raise BackendError(f"{name} cannot be imported")

        def find(name):
            if gpu is None:
                raise BackendError("no GPU")
            return SimpleNamespace(machine=SimpleNamespace(gpu=gpu))

        monkeypatch.setattr(targets, "load", load)
        monkeypatch.setattr(targets, "Here", SimpleNamespace(find=find))

    return call


@pytest.mark.parametrize(
    ("installed", "gpu", "chosen", "reason"),
    [
        ((), None, "onnxruntime", "TensorRT is not installed"),
        ((), "L4", "onnxruntime", "TensorRT is not installed"),
        (("tensorrt-rtx",), None, "onnxruntime", "TensorRT-RTX is installed, and no GPU can be used"),
        (("tensorrt-rtx",), "L4", "tensorrt-rtx", "installed, for L4"),
        (("tensorrt", "tensorrt-rtx"), "L4", "tensorrt", "installed, for L4"),
    ],
)
def test_auto_takes_tensorrt_where_it_can_run_and_says_why(machine, installed, gpu, chosen, reason):
    machine(installed, gpu)
    assert choose_target("auto", "fp32") == (chosen, reason)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_asked_for_is_taken(machine, target):
    machine(("tensorrt", "tensorrt-rtx"))
    assert choose_target(target, "fp16") == (target, "asked for")


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_a_library_that_is_not_here_is_told_at_once(machine, target):
    machine()
    with pytest.raises(InputError, match=f"{target} cannot be imported"):
        choose_target(target, "fp32")


@pytest.mark.parametrize(
    ("target", "precision", "remedy"),
    [
        ("onnxruntime", "bf16", "use --target tensorrt-rtx"),
        ("onnxruntime", "int8", "use --fp16"),
        ("tensorrt-rtx", "fp8", "use --bf16"),
    ],
)
def test_a_precision_that_is_not_written_is_refused_with_what_is(machine, target, precision, remedy):
    """It is not ignored: a bundle that says int8 would hold int8."""
    machine(("tensorrt", "tensorrt-rtx"))
    with pytest.raises(InputError, match=f"precision {precision} is not written for {target}; {remedy}"):
        choose_target(target, precision)


@pytest.mark.parametrize(
    ("target", "precision", "named"), [("cuda", "fp32", "cuda"), ("auto", "fp64", "fp64")]
)
def test_an_unknown_one_is_named_with_the_choices(target, precision, named):
    with pytest.raises(InputError, match=f"'{named}' is not a .*; choose .*"):
        choose_target(target, precision)


def test_operators_are_the_targets_own_choice_or_one_that_it_runs():
    assert [choose_operators(target, None) for target in TARGETS] == ["native", "lowered", "lowered"]
    assert choose_operators("tensorrt", "native") == "native"
    assert choose_operators("onnxruntime", "lowered") == "lowered"
    with pytest.raises(
        InputError, match="tensorrt-rtx does not run native operators; use --operators lowered"
    ):
        choose_operators("tensorrt-rtx", "native")


def test_a_target_names_only_what_there_is():
    for target in TARGETS.values():
        assert target.pipeline in PIPELINES
        assert target.pipeline in COSTS
        assert set(target.operators) <= set(TRANSLATIONS)
        assert set(target.float32_operators) <= set(target.precisions) <= set(PRECISIONS)


def test_a_broken_tensorrt_is_one_that_is_not_there(tmp_path, monkeypatch):
    for module in MODULES.values():
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('driver too old')")
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match="driver too old"):
        choose_target("tensorrt-rtx", "fp32")
    assert choose_target("auto", "fp32")[0] == "onnxruntime"
