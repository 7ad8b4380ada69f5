"""On a machine with the GPU, what was built is compared and timed there (on a stand-in for the GPU)."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from meta_deploy.bundle.manifest import TensorRTRTXEngine
from meta_deploy.cli.export import summary
from meta_deploy.errors import VerificationError
from meta_deploy.export import export
from meta_deploy.targets.tensorrt import build
from tests.small_graphs import model, value
from tests.targets.gpu_stand_in import engine_of, install

GPU = "TensorRT-RTX 1.7.1 on NVIDIA GeForce RTX 4090"
CPU = "ONNX Runtime"


def network():
    """A product, and two moves that `collapse-chains` removes."""
    weight = np.random.default_rng(0).normal(0, 0.3, (8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["x"], ["there"], perm=[0, 2, 1]),
        helper.make_node("Transpose", ["there"], ["back"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["back", "w"], ["y"]),
    ]
    weights = [numpy_helper.from_array(weight, "w")]
    return model(nodes, [value("x", (1, 4, 8))], [value("y", (1, 4, 8))], weights)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A machine with a GPU, where a build makes engines that the stand-in runs: `gpu.plan` of the graph."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    onnx.save(network(), "net.onnx")
    bindings, library = install(monkeypatch)
    here = SimpleNamespace(bindings=bindings, library=library, plan=engine_of, capabilities=())

    def build_engine(graph, name, profiles, **options):
        section = TensorRTRTXEngine(
            version="1.7.1", gpu=None, compute_capabilities=here.capabilities, layers=3,
            fused_attention=0, attention=0, activation_mb=1.0, weights_mb=1.0, plan_mb=1.0,
        )  # fmt: skip
        return SimpleNamespace(plan=here.plan(graph, *profiles), layers=(), section=lambda: section)

    monkeypatch.setattr(build, "build_engine", build_engine)
    monkeypatch.setattr(build, "check_gpus", lambda library, gpus: None)
    return here


def exported(**options):
    return export("net.onnx", target="tensorrt-rtx", out="b", **options)


def test_the_engine_is_what_is_compared(gpu):
    bundle = exported()
    assert bundle.manifest.verification["backend"].startswith(f"{GPU}; stages on {CPU}")
    assert "has not run here" not in summary(bundle, 1.0)
    assert gpu.bindings.calls.count("cudaStreamSynchronize") >= 2
    assert not gpu.bindings.held()


def test_an_engine_that_is_wrong_is_no_bundle(gpu):
    def wrong(graph, *profiles):
        proto = onnx.load_from_string(graph)
        for weight in proto.graph.initializer:
            weight.CopyFrom(numpy_helper.from_array(1.1 * numpy_helper.to_array(weight), weight.name))
        return engine_of(proto.SerializeToString(), *profiles)

    gpu.plan = wrong
    with pytest.raises(VerificationError, match="y are off"):
        exported()


@pytest.mark.parametrize("why", ["load", "context", "run", "another GPU"])
def test_where_the_engine_does_not_run_the_graph_is_compared(gpu, why):
    if why == "another GPU":
        gpu.capabilities = ("12.0",)
    else:
        gpu.library.refuse = why
    bundle = exported(tune=True)
    assert bundle.manifest.verification["backend"].startswith(CPU)
    assert "it has not run here" in summary(bundle, 1.0)
    assert {tried.layers for tried in bundle.manifest.tuning.tried} == {3}  # by what the builds tell
    assert not gpu.bindings.held()


def test_pipelines_are_timed_on_the_gpu(gpu):
    tuning = exported(tune=True).manifest.tuning
    assert tuning.rounds >= 3
    assert all(tried.ms > 0 and tried.layers is None for tried in tuning.tried)
    assert not gpu.bindings.held()
