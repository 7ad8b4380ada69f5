"""What each target says of itself holds; which one is chosen, and what is said of those that cannot be."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from meta_deploy.errors import BackendError, InputError
from meta_deploy.export.operators import TRANSLATIONS
from meta_deploy.graph.pipeline import PASSES
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.targets import BACKEND_NAMES, TARGET_NAMES, TARGETS, choose_target, get_target
from meta_deploy.targets.target import BuildOptions
from meta_deploy.targets.tensorrt import target as tensorrt

ENGINES = ("tensorrt", "tensorrt-rtx")


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

        monkeypatch.setattr(tensorrt, "load", load)
        monkeypatch.setattr(tensorrt, "Here", SimpleNamespace(find=find))

    return call


# --- the objects ---


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_names_only_what_there_is(name):
    target = TARGETS[name]
    assert target.name == name
    assert target.title
    assert set(target.required_passes) <= set(target.passes) <= set(PASSES)
    assert set(target.operators) <= set(TRANSLATIONS)
    assert set(target.precisions) <= set(PRECISIONS)
    for some in (target.lowered_by_build, target.float32_operators, target.gpu_only):
        assert set(some) <= set(target.precisions)
    assert set(target.automatic) <= set(target.backends) <= set(BACKEND_NAMES)
    assert set(target.eight_bits) == {name for name in target.precisions if PRECISIONS[name].calibrates}


def test_the_choices_are_the_targets_and_their_back_ends_and_auto():
    assert ("auto", *TARGETS) == TARGET_NAMES
    assert set(BACKEND_NAMES) == {"auto", *(name for target in TARGETS.values() for name in target.backends)}


@pytest.mark.parametrize(("command", "option"), [("infer", "--backend"), ("export", "--target")])
def test_help_offers_the_choices_at_once(command, option):
    script = f"""
import sys
from meta_deploy.cli.{command} import main
try:
    main(["--help"])
except SystemExit:
    pass
print(sorted(name for name in sys.modules if name in ("numpy", "torch", "onnx", "openvino", "onnxruntime")))
"""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    after = os.times()
    assert done.stdout.endswith("\n[]\n")
    offered = re.search(rf"{option} {{([^}}]*)}}", " ".join(done.stdout.split()))[1]
    assert tuple(offered.split(",")) == (BACKEND_NAMES if command == "infer" else TARGET_NAMES)
    # Processor time, which others on the machine do not add to.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.3


# --- which one ---


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
    assert choose_target("auto", "fp32") == (TARGETS[chosen], reason)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_asked_for_is_taken(name):
    for precision in TARGETS[name].precisions:
        assert choose_target(name, precision) == (TARGETS[name], "asked for")


@pytest.mark.parametrize("target", ENGINES)
def test_a_library_that_is_not_here_is_told_before_the_work(machine, target):
    machine()
    with pytest.raises(InputError, match=f"{target} cannot be imported"):
        get_target(target).check(BuildOptions())


def test_a_precision_that_is_not_written_is_refused_with_what_is():
    """It is not ignored: a bundle that says bf16 would hold bf16."""
    wanted = (
        "precision bf16 is not written for onnxruntime; use --target openvino, tensorrt or tensorrt-rtx, "
        "or --fp32, --fp16 or --int8"
    )
    with pytest.raises(InputError, match=wanted):
        choose_target("onnxruntime", "bf16")


@pytest.mark.parametrize(
    ("target", "precision", "named"),
    [("cuda", "fp32", "cuda"), ("auto", "fp64", "fp64"), ("onnxruntime", "int4", "int4")],
)
def test_an_unknown_one_is_named_with_the_choices(target, precision, named):
    with pytest.raises(InputError, match=f"'{named}' is not a .*; choose .*"):
        choose_target(target, precision)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("option", [{"gpus": ("8.6",)}, {"workspace_mb": 64}])
def test_an_option_that_a_target_does_not_take_is_refused(name, option):
    with pytest.raises(InputError, match=f"--gpu and --workspace are for TensorRT.*{name}"):
        get_target(name).check(BuildOptions(**option))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_what_is_not_bound_to_a_machine_is_not_rebuilt(name):
    bundle = SimpleNamespace(path="b")
    with pytest.raises(InputError, match=f"nothing to rebuild: bundle 'b' is made for {name}"):
        get_target(name).rebuild(bundle)


def test_operators_are_the_targets_own_choice_or_one_that_it_runs():
    assert {get_target(name).choose_operators(None) for name in ("onnxruntime", "openvino")} == {"native"}
    assert {get_target(name).choose_operators(None) for name in ENGINES} == {"lowered"}
    assert get_target("tensorrt").choose_operators("native") == "native"
    assert get_target("onnxruntime").choose_operators("lowered") == "lowered"
    with pytest.raises(
        InputError, match="tensorrt-rtx does not run native operators; use --operators lowered"
    ):
        get_target("tensorrt-rtx").choose_operators("native")


def test_a_broken_tensorrt_is_one_that_is_not_there(tmp_path, monkeypatch):
    for module in ("tensorrt", "tensorrt_rtx"):
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('driver too old')")
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match="driver too old"):
        get_target("tensorrt-rtx").check(BuildOptions())
    assert choose_target("auto", "fp32")[0].name == "onnxruntime"
