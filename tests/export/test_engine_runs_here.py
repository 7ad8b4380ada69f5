"""On a machine with the GPU, what was built is compared and timed there (on a stand-in for the GPU)."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from meta_deploy.bundle.manifest import Profile, TensorRTRTXEngine
from meta_deploy.calib import estimated
from meta_deploy.cli.export import summary
from meta_deploy.errors import VerificationError
from meta_deploy.export import Progress, export
from meta_deploy.targets.tensorrt import build
from meta_deploy.targets.tensorrt.layers import Layer, LayerTensor
from tests.small_graphs import model, value
from tests.targets.gpu_stand_in import engine_of, install

GPU = "TensorRT-RTX 1.7.1 on NVIDIA GeForce RTX 4090"
CPU = "ONNX Runtime"
SHAPE = (1, 1024, 256)


def kernels(proto):
    """A layer for each product, whose multiply-adds cost less where its weights are in 8 bits."""
    made = {node.output[0]: node.op_type for node in proto.graph.node}
    for node in proto.graph.node:
        if node.op_type == "MatMul":
            kind = "Int8" if made.get(node.input[1]) == "DequantizeLinear" else "Half"
            weights = LayerTensor(shape=(1, SHAPE[-1], SHAPE[-1]), datatype=kind)
            x = LayerTensor(shape=SHAPE, datatype=kind)
            yield Layer(name=node.name, inputs=(x,), constants=(weights,), outputs=(x,))


def network():
    """A product between two that stay as they are, and two moves that `collapse-chains` removes."""
    weight = np.random.default_rng(0).normal(0, 0.1, (SHAPE[-1], SHAPE[-1])).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["x"], ["there"], perm=[0, 2, 1]),
        helper.make_node("Transpose", ["there"], ["back"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["back", "w"], ["a"]),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["c"]),
        helper.make_node("Tanh", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    weights = [numpy_helper.from_array(weight, "w")]
    return model(nodes, [value("x", SHAPE)], [value("y", SHAPE)], weights)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A machine with a GPU, where a build makes engines that the stand-in runs: `gpu.plan` of the graph."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    onnx.save(network(), "net.onnx")
    bindings, library = install(monkeypatch)
    here = SimpleNamespace(path=tmp_path, bindings=bindings, library=library)
    here.plan, here.capabilities = engine_of, ()

    def build_engine(graph, name, profiles, **options):
        layers = tuple(kernels(onnx.load_from_string(graph)))
        profiles = profiles or [Profile("x", SHAPE, SHAPE, SHAPE)]
        section = TensorRTRTXEngine(
            version="1.7.1", gpu=None, compute_capabilities=here.capabilities, layers=3,
            fused_attention=0, attention=0, activation_mb=1.0, weights_mb=1.0, plan_mb=1.0,
        )  # fmt: skip
        return SimpleNamespace(plan=here.plan(graph, *profiles), layers=layers, section=lambda: section)

    monkeypatch.setattr(build, "build_engine", build_engine)
    monkeypatch.setattr(build, "check_gpus", lambda library, gpus: None)
    return here


def exported(out="b", **options):
    return export("net.onnx", target="tensorrt-rtx", out=out, **options)


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


@pytest.mark.parametrize("ratio", [0.5, 0.99])
def test_8_bits_are_timed_on_the_gpu(gpu, monkeypatch, ratio):
    def turns(runs, feed):
        *low, rest = [run(feed) for run in runs]  # they do run
        assert all(set(found) == set(rest) for found in low)
        return [[ratio] * len(low) + [1.0]] * 5

    monkeypatch.setattr(estimated, "interleaved", turns)
    (gpu.path / "in").mkdir()
    for i in range(2):
        np.savez(
            gpu.path / "in" / f"{i}.npz", x=np.random.default_rng(i).normal(size=SHAPE).astype(np.float32)
        )
    lines = []
    bundle = exported(precision="int8", calib_images="in", out=None, progress=Progress(note=lines.append))
    assert not gpu.bindings.held()
    if ratio == 0.5:
        assert bundle.precision == "int8", lines
        assert "int8 takes 0.50 of fp16's time on this machine (500.0 ms)" in lines
        assert bundle.manifest.verification["speed"]["rest_ms"] == 1000
    else:
        assert bundle.precision == "fp16"
        assert any("8 bits take 0.99 of float16's time on this machine" in line for line in lines)
        assert "speed" not in bundle.manifest.verification
