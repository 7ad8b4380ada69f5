"""Engines are built for real, without a GPU; what they consist of is read from the build's log."""

import dataclasses
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.bundle.manifest import Profile, read_engine
from meta_deploy.errors import EngineError, InputError
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.graph.precision.int8 import Quantization
from meta_deploy.graph.prices import GPU
from meta_deploy.targets import get_target
from meta_deploy.targets.target import BuildOptions
from meta_deploy.targets.tensorrt import build as engine_module
from meta_deploy.targets.tensorrt.build import Engine, available, build_engine, check_gpus
from meta_deploy.targets.tensorrt.build_log import parse_log
from meta_deploy.targets.tensorrt.layers import Layer, LayerTensor, read_json, to_json
from tests.small_graphs import model, value

RTX = "tensorrt-rtx"
node = helper.make_node
builds = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="elsewhere the dev extra does not bring tensorrt-rtx",
)


def floats(name, *shape, seed=0, scale=0.3):
    values = np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def ints(name, *numbers):
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def profiles(batch=(1, 1, 1), sizes=((16, 16), (16, 16), (16, 16)), name="x"):
    return [Profile(name, *((n, 3, *size) for n, size in zip(batch, sizes, strict=True)))]


def build(proto, inputs=None, **options):
    return build_engine(proto.SerializeToString(), RTX, inputs or profiles(), **options)


@pytest.fixture(scope="module")
def block():
    """A convolution, attention of two heads over its pixels, and a resize: a bit of everything."""
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("Reshape", ["r", "tokens"], ["t"]),
        node("Transpose", ["t"], ["u"], perm=[0, 2, 1]),
        node("MatMul", ["u", "qkv"], ["p"]),
        node("Reshape", ["p", "heads"], ["h"]),
        node("Transpose", ["h"], ["i"], perm=[2, 0, 3, 1, 4]),
        node("Split", ["i"], ["q1", "k1", "v1"], axis=0, num_outputs=3),
        *(node("Squeeze", [f"{name}1", "zero"], [name]) for name in "qkv"),
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("Constant", [], ["scale"], value_float=0.25),
        node("Mul", ["q", "scale"], ["qs"]),
        node("MatMul", ["qs", "kt"], ["s"]),
        node("Softmax", ["s"], ["a"], axis=-1),
        node("MatMul", ["a", "v"], ["o"]),
        node("Transpose", ["o"], ["ot"], perm=[0, 1, 3, 2]),
        node("Reshape", ["ot", "image"], ["m"]),
        node("Resize", ["m", "", "scales"], ["y"], mode="linear"),
    ]
    constants = [
        floats("w", 32, 3, 3, 3),
        floats("b", 32, seed=1),
        floats("qkv", 32, 96, seed=2),
        *(ints("tokens", 1, 32, 256), ints("heads", 1, 256, 3, 2, 16), ints("image", 1, 32, 16, 16)),
        ints("zero", 0),
        numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
    ]
    return model(nodes, [value("x", [1, 3, 16, 16])], [value("y", [1, 32, 32, 32])], constants)


@pytest.fixture(scope="module")
def half(block):
    return PRECISIONS["fp16"].convert(block)[0]


@pytest.fixture(scope="module")
def dynamic():
    """Takes any batch and size."""
    nodes = [
        node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["y"]),
    ]
    return model(
        nodes, [value("x", ["b", 3, "h", "w"])], [value("y", ["b", 8, "h", "w"])], [floats("w", 8, 3, 3, 3)]
    )


@pytest.fixture
def trt():
    return pytest.importorskip("tensorrt_rtx")


# --- what is built ---


@builds
def test_an_engine_of_float16_fuses_attention_and_its_section_says_so(half):
    engine = build(half)
    section = engine.section()
    assert section.fused_attention == 1
    assert section.fused_attention + section.generated_kernels < section.layers < 15
    kinds = section.kernels
    assert kinds["correlation"] == {"fp16": 1}
    assert sum(sum(types.values()) for types in kinds.values()) == section.layers
    assert all(layer.name and layer.kind for layer in engine.layers)
    assert 0 < section.activation_mb < 20  # of tensors and of the kernels' own
    # The weights, at two bytes each, and what the builder lays out anew.
    assert 2 * (32 * 27 + 32 + 32 * 96) / 1e6 <= section.weights_mb < section.plan_mb < 1
    assert section.plan_mb == len(engine.plan) / 1e6
    assert section.seconds > 0


@builds
def test_an_engine_of_float32_does_not_fuse_attention_and_takes_more_layers(block, half):
    section = build(block).section()
    assert section.fused_attention == 0
    assert section.layers > build(half).section().layers
    assert {kind for types in section.kernels.values() for kind in types} == {"fp32"}
    assert section.tf32 is False


@builds
@pytest.mark.parametrize("gpus", [(), ("8.6", "8.9")])
def test_a_section_is_what_a_manifest_wants_and_names_the_gpus(trt, half, gpus, tmp_path):
    section = build(half, compute_capabilities=gpus).section()
    assert read_engine(msgspec.to_builtins(section), tmp_path) == section
    assert section.library == RTX
    assert section.version == trt.__version__
    assert section.gpu is None
    assert section.compute_capabilities == gpus


@builds
def test_the_gpus_asked_for_are_set_in_their_order(trt, half, monkeypatch):
    asked = []
    plain = trt.IBuilderConfig.set_compute_capability
    monkeypatch.setattr(
        trt.IBuilderConfig,
        "set_compute_capability",
        lambda config, gpu, i: (
            asked.append((config.num_compute_capabilities, gpu, i)),
            plain(config, gpu, i),
        )[1],
    )
    build(half, compute_capabilities=("8.9", "8.6"))
    assert asked == [(2, trt.ComputeCapability.SM89, 0), (2, trt.ComputeCapability.SM86, 1)]


@builds
@pytest.mark.parametrize("limit", [None, 64])
def test_the_workspace_limit_is_in_megabytes_and_set_when_asked_for(trt, half, monkeypatch, limit):
    limits = []
    plain = trt.IBuilderConfig.set_memory_pool_limit
    monkeypatch.setattr(
        trt.IBuilderConfig,
        "set_memory_pool_limit",
        lambda config, pool, size: (limits.append((pool, size)), plain(config, pool, size))[1],
    )
    build(half, workspace_mb=limit)
    assert limits == ([] if limit is None else [(trt.MemoryPoolType.WORKSPACE, limit * 1024 * 1024)])


@builds
def test_a_workspace_that_is_too_small_is_an_error_with_tensorrts_reason(half):
    with pytest.raises(EngineError, match="workspace") as error:
        build(half, workspace_mb=0)
    assert "\n" not in str(error.value)


@builds
def test_a_dynamic_batch_and_size_become_the_profile(trt, dynamic, monkeypatch):
    given = []
    plain = trt.IOptimizationProfile.set_shape
    monkeypatch.setattr(
        trt.IOptimizationProfile,
        "set_shape",
        lambda profile, *shapes: (given.append(shapes), plain(profile, *shapes))[1],
    )
    build(dynamic, profiles((1, 2, 4), ((32, 64), (64, 96), (96, 128))))
    assert given == [("x", (1, 3, 32, 64), (2, 3, 64, 96), (4, 3, 96, 128))]
    build(dynamic, profiles((1, 2, 4)))
    build(dynamic, profiles(sizes=((32, 64), (64, 96), (96, 128))))
    assert given[1:] == [
        ("x", (1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16)),
        ("x", (1, 3, 32, 64), (1, 3, 64, 96), (1, 3, 96, 128)),
    ]


@builds
def test_a_static_engine_has_no_profile(trt, half, monkeypatch):
    monkeypatch.setattr(trt.Builder, "create_optimization_profile", None)
    assert build(half).plan


@builds
def test_progress_is_told_step_by_step_to_the_end(half):
    steps = []
    build(half, progress=lambda done, total: steps.append((done, total)))
    assert steps
    assert all(1 <= done <= total for done, total in steps)
    totals = [total for _, total in steps]
    assert totals == sorted(totals)  # a longer phase may follow
    last = [done for done, total in steps if total == totals[-1]]
    assert last == list(range(1, totals[-1] + 1))


@builds
def test_what_progress_raises_ends_the_build_and_is_raised(half):
    calls = []

    def fail(done, total):
        calls.append(done)
        raise BrokenPipeError("nobody listens")

    with pytest.raises(BrokenPipeError, match="nobody listens"):
        build(half, progress=fail)
    assert len(calls) == 1


# --- what is refused ---


@builds
def test_what_the_parser_does_not_take_is_named_by_node_and_operator():
    strange = model(
        [node("Strange", ["x"], ["y"], name="the odd one", domain="somebody")],
        [value("x", [2])],
        [value("y", [2])],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("somebody", 1)],
    )
    with pytest.raises(EngineError, match=r"node 'the odd one' \(Strange\)") as error:
        build(strange)
    assert "--passes" in str(error.value)
    assert "\n" not in str(error.value)


@builds
def test_what_parses_and_has_no_kernel_is_named_too():
    suppress = node("NonMaxSuppression", ["boxes", "scores"], ["y"], name="suppress")
    inputs = [value("boxes", [1, 4, 4]), value("scores", [1, 1, 4])]
    with pytest.raises(EngineError, match=r"TensorRT-RTX cannot build the graph: .*suppress"):
        build(model([suppress], inputs, [value("y", ["n", 3], TensorProto.INT64)]))


def sampling(mode, opset):
    return model(
        [node("GridSample", ["x", "grid"], ["y"], mode=mode)],
        [value("x", [1, 3, 16, 16]), value("grid", [1, 5, 7, 2])],
        [value("y", None)],
        opset_imports=[helper.make_opsetid("", opset)],
    )


SAMPLINGS = [("linear", 20), ("nearest", 20), ("bilinear", 18)]


@builds
@pytest.mark.parametrize(("mode", "opset"), SAMPLINGS)
def test_sampling_is_built_in_any_mode(mode, opset):
    assert build(sampling(mode, opset)).plan


@builds
@pytest.mark.parametrize(("mode", "opset"), SAMPLINGS)
def test_a_parser_that_takes_linear_for_nearest_may_only_read_what_it_knows(trt, monkeypatch, mode, opset):
    """As those of TensorRT 10 to 11.1, to which "bilinear" alone is linear."""

    class Old:
        def __init__(self, network, logger):
            self.network, self.parser = network, parser(network, logger)

        def parse(self, file):
            parsed = self.parser.parse(file)
            for i in range(self.network.num_layers):
                layer = self.network.get_layer(i)
                layer.__class__ = trt.IGridSampleLayer
                if b"bilinear" not in file:
                    layer.interpolation_mode = trt.InterpolationMode.NEAREST
            return parsed

    parser = trt.OnnxParser
    monkeypatch.setattr(trt, "OnnxParser", Old)
    if mode == "bilinear":
        assert build(sampling(mode, opset)).plan
    else:
        with pytest.raises(EngineError, match=r"TensorRT .* reads GridSample's mode 'linear' as 'nearest'"):
            build(sampling(mode, opset))


@builds
@pytest.mark.parametrize("file", [b"", b"no model"])
def test_what_is_no_model_is_an_error(file):
    with pytest.raises(EngineError, match="TensorRT"):
        build_engine(file, RTX, profiles())


@builds
def test_an_error_does_not_hang_over_to_the_next_build(half):
    with pytest.raises(EngineError):
        build_engine(b"no model", RTX, profiles())
    assert build(half).section().layers > 0


@builds
@pytest.mark.parametrize("gpus", [("9.0",), ("8.6", "sm_89")])
def test_a_gpu_that_cannot_be_built_for_is_refused_with_those_that_can(half, gpus):
    for refuse in (lambda: check_gpus(RTX, gpus), lambda: build(half, compute_capabilities=gpus)):
        with pytest.raises(InputError, match=rf"'{gpus[-1]}' is no compute .* 8\.6, 8\.9, 12\.0"):
            refuse()


@builds
def test_gpus_that_can_be_built_for_are_taken():
    check_gpus(RTX, ())
    check_gpus(RTX, ("7.5", "8.6", "8.9"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("gpus", [(), ("8.6",)])
def test_tensorrt_is_not_for_a_machine_without_it_or_a_gpu(gpus):
    for refuse in (lambda: check_gpus("tensorrt", gpus), lambda: build_engine(b"", "tensorrt", profiles())):
        with pytest.raises(InputError, match="--target tensorrt-rtx, which builds anywhere"):
            refuse()


def test_tensorrt_takes_no_compute_capability(monkeypatch):
    monkeypatch.setattr(engine_module, "_gpu_name", lambda library: "NVIDIA H200")
    monkeypatch.setattr(engine_module, "load", lambda library: SimpleNamespace(IBuilderConfig=object))
    check_gpus("tensorrt", ())
    with pytest.raises(InputError, match="--gpu is for tensorrt-rtx"):
        check_gpus("tensorrt", ("8.6",))


def test_a_library_is_available_where_it_can_be_found(monkeypatch):
    assert available(RTX) == (importlib.util.find_spec("tensorrt_rtx") is not None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not available(RTX)


# --- stopped ---


SLOW = """
    import sys, time
    from meta_deploy.targets.tensorrt.build import build_engine
    from meta_deploy.bundle.manifest import Profile

    def progress(done, total):
        print(done, flush=True)
        time.sleep(0.2)  # each of some hundred steps

    shape = (1, 8, 16, 16)
    profiles = [Profile("x", shape, shape, shape)]
    with open(sys.argv[1], "rb") as stream:
        build_engine(stream.read(), "tensorrt-rtx", profiles, progress=progress)
"""


@builds
@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_stops_a_build_within_seconds(tmp_path, times):
    nodes = []
    for i in range(40):
        nodes.append(node("Conv", [f"x{i}" if i else "x", "w"], [f"c{i}"], kernel_shape=[3, 3], pads=[1] * 4))
        nodes.append(node("Softmax", [f"c{i}"], [f"x{i + 1}"], axis=1 + i % 3))
    slow = model(
        nodes, [value("x", [1, 8, 16, 16])], [value("x40", [1, 8, 16, 16])], [floats("w", 8, 8, 3, 3)]
    )
    onnx.save(slow, tmp_path / "slow.onnx")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW), str(tmp_path / "slow.onnx")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "1\n"
    for i in range(times):  # the second and third find it stopping already
        time.sleep(0.05 if i else 0.3)
        os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, err
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    assert "terminate" not in err
    assert "FATAL" not in err
    assert "ERROR" not in err
    assert len(out.splitlines()) < 60


# --- logs ---


LOG = [
    "Total Activation Memory: 1500000 bytes",
    "Total Weights Memory: 250000 bytes",
    "Layers:\nName: conv, LayerType: correlation, Inputs: [ { Name: TacticName: trap, Dimensions: [1] }], "
    "TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: conv]\n"
    "Name: __myl_FcAdd_myl0_1, LayerType: runtime_fusion, Inputs: [ { Name: a, Datatype: Float } ], "
    "Outputs: [ { Name: b, Dimensions: [1], Datatype: Half } ], TacticName: , StreamId: 0\n"
    "Name: __myl_Add_myl0_2, LayerType: kgen, Inputs: [], Outputs: [ { Name: c, "
    "Format/Datatype: Float }], TacticName: __myl_Add_0x12, StreamId: 0\n"
    "Name: _gemm_mha_v2_myl0_3, LayerType: kgen, Inputs: [], Outputs: [ { Datatype: "
    "BFloat16 }, { Datatype: Int8 } ], TacticName: _gemm_mha_v2_0x34, StreamId: 0\n"
    "Name: signal_4, LayerType: signal, Inputs: [], TacticName: , StreamId: 1\n"
    "Name: wait_5, LayerType: wait, Inputs: [], TacticName: , StreamId: 0\n"
    "\nI/O Tensors:\n Name: x, IOMode: Input",
]


def test_a_log_is_read_layer_by_layer():
    layers, memory = parse_log(LOG)
    assert memory == {"Activation": 1.5, "Weights": 0.25}
    assert layers[0] == Layer(
        name="conv",
        kind="correlation",
        kernel="__myelin_CASK_STUB",
        inputs=(LayerTensor(name="TacticName: trap", shape=(1,)),),
        metadata="[ONNX Layer: conv]",
    )
    assert layers[0].nodes == ("conv",)
    assert [layer.type for layer in layers] == ["", "fp16", "fp32", "bf16", "", ""]
    assert [layer.generated for layer in layers] == [False, False, True, False, False, False]
    assert [layer.attention for layer in layers] == [False, False, False, True, False, False]
    assert [layer.synchronizes for layer in layers] == [False, False, False, False, True, True]


def test_the_last_of_several_logs_counts():
    again = ["Layers:\nName: a, LayerType: gemm, Inputs: [], TacticName: , StreamId: 0"]
    layers, memory = parse_log([*LOG, *again, "Total Weights Memory: 1000000 bytes"])
    assert layers == (Layer(name="a", kind="gemm"),)
    assert memory == {"Activation": 1.5, "Weights": 1.0}


@builds
def test_layers_tell_their_tensors_and_nodes_and_come_back_from_json(half):
    layers = build(half).layers
    assert read_json(to_json(layers), "x") == layers
    assert (layers[0].inputs[0].name, layers[0].inputs[0].shape, layers[0].inputs[0].type) == (
        *("x", (1, 3, 16, 16)),
        "fp32",
    )
    assert layers[-1].outputs[0].name == "y"
    names = {name for layer in layers for name in layer.nodes}
    nodes = [node for node in half.graph.node if node.op_type in ("Conv", "Softmax", "Resize")]
    assert {f"node_of_{node.output[0]}" for node in nodes} <= names  # they have no names of their own
    made = {tensor.name for layer in layers for tensor in layer.outputs} | {"x"}
    assert {tensor.name for layer in layers for tensor in layer.inputs} <= made


def test_the_inspectors_json_of_other_versions_is_read():
    text = b"""{"Layers": [{"Name": "conv", "LayerType": "CaskConvolution", "Inputs": [{"Name": "x",
        "Location": "Device", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Row major linear FP16 format"}],
        "Outputs": [{"Name": "y", "Dimensions": [1, 4, 8, 8], "Format/Datatype": "Half"}],
        "Metadata": "[ONNX Layer: a/conv]\\u001e[ONNX Layer: a/relu [1]]", "TacticName": "sm80_xmma"}],
        "Bindings": ["x", "y"]}"""
    (layer,) = read_json(text, "x")
    assert (layer.inputs[0].type, layer.type) == ("fp16", "fp16")
    assert layer.nodes == ("a/conv", "a/relu [1]")


def engine_of(lines):
    layers, memory = parse_log(lines)
    return Engine(b"plan", RTX, "1.7", ("8.9",), None, 1.234, layers, memory)


def test_a_section_counts_what_is_launched():
    section = engine_of(LOG).section()
    assert (section.layers, section.generated_kernels, section.fused_attention) == (4, 1, 1)
    assert section.kernels == {
        "correlation": {"": 1},
        "kgen": {"bf16": 1, "fp32": 1},
        "runtime_fusion": {"fp16": 1},
    }
    assert (section.activation_mb, section.weights_mb) == (1.5, 0.25)
    assert section.seconds == 1.23


@pytest.mark.parametrize("missing", range(3))
def test_what_a_log_does_not_tell_is_none_in_the_section_and_not_zero(missing, tmp_path):
    section = engine_of(line for i, line in enumerate(LOG) if i != missing).section()
    told = ["activation_mb", "weights_mb", "layers"]
    assert [getattr(section, name) is None for name in told] == [i == missing for i in range(3)]
    assert (section.generated_kernels is None) == (section.fused_attention is None) == (missing == 2)
    assert read_engine(msgspec.to_builtins(section), tmp_path) == section


# --- 8 bits ---


def products():
    """A convolution with ReLU between two norms, and a product of matrices with a GELU."""
    nodes = [
        node("LayerNormalization", ["x", "one"], ["n"]),
        node("Conv", ["n", "w", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("LayerNormalization", ["r", "one"], ["m"]),
        node("MatMul", ["m", "v"], ["p"]),
        node("Gelu", ["p"], ["y"]),
    ]
    for one in nodes:
        one.name = one.output[0]
    ones = numpy_helper.from_array(np.ones(16, np.float32), "one")
    constants = [ones, floats("w", 32, 16, 3, 3), floats("b", 32, seed=1), floats("v", 16, 32, seed=2)]
    opset = [helper.make_opsetid("", 20)]
    return model(nodes, [value("x", [1, 16, 16, 16])], ["y"], constants, opset_imports=opset)


def in_8_bits(number):
    rules = dataclasses.replace(get_target(RTX).eight_bits[number], value=0, node=0)
    quantization = Quantization(
        rules, lambda graph, found: (dict.fromkeys(found.readers, (-3.0, 3.0)), {}), []
    )
    return PRECISIONS[number].convert(products(), quantization=quantization)[0]


@builds
@pytest.mark.parametrize(
    ("number", "gpus", "found"),
    [
        ("int8", (), {"int8": 2}),
        ("int8", ("8.6",), {"int8": 2}),
        ("int8", ("7.5",), {"int8": 1}),  # there convolutions are computed in float16
        ("fp8", ("8.9", "12.0"), {"fp8": 2}),
    ],
)
def test_what_runs_in_8_bits_is_read_back(number, gpus, found):
    engine = build(in_8_bits(number), compute_capabilities=gpus)
    section = engine.section()
    assert section.eight_bits == found
    named = [name for layer in engine.layers if layer.eight_bits for name in layer.nodes]
    assert {"c", "p"} & set(named) == ({"p"} if gpus == ("7.5",) else {"c", "p"})
    line = get_target(RTX).describe(section)
    assert f"{found[number]} products in {number}, " in line


@builds
def test_a_convolution_in_8_bits_takes_its_bias_and_relu_in():
    """No kernel more than in float16: the norm before it quantizes, and its own kernel restores."""
    half, low = PRECISIONS["fp16"].convert(products())[0], in_8_bits("int8")
    made = {
        name: next(layer for layer in build(proto).layers if "c" in layer.nodes)
        for name, proto in (("half", half), ("low", low))
    }
    assert [set(made[name].nodes) >= {"c", "r"} for name in ("half", "low")] == [True, True]
    assert (made["half"].type, made["low"].type) == ("fp16", "fp16")
    assert (made["half"].eight_bits, made["low"].eight_bits) == ("", "int8")


@builds
def test_an_engine_is_estimated_by_layers_bytes_and_multiply_adds():
    target = get_target(RTX)
    protos = {"fp16": PRECISIONS["fp16"].convert(products())[0], "int8": in_8_bits("int8")}
    full, low = (
        target.estimate(target.build(proto.SerializeToString(), (), BuildOptions(precision)))
        for precision, proto in protos.items()
    )
    assert (full.eight_bits, low.eight_bits) == (0, 2)
    assert full.layers >= 3
    assert low.weights_mb < full.weights_mb
    assert full.ms >= full.layers * GPU.node / 15e9


def test_multiply_adds_are_those_of_the_graph():
    half = {"datatype": "Half"}
    conv = Layer(
        name="c",
        kind="correlation",
        inputs=(LayerTensor(shape=(1, 16, 20, 20), **half),),
        constants=(LayerTensor(shape=(32, 16, 3, 3), **half), LayerTensor(shape=(1, 32, 1, 1), **half)),
        outputs=(LayerTensor(shape=(1, 32, 20, 20), **half),),
    )
    assert conv.macs == 32 * 400 * 16 * 9
    assert conv.bytes == 2 * (16 * 400 + 32 * 16 * 9 + 32 + 32 * 400)
    weights = LayerTensor(shape=(1, 24, 48), **half)
    product = Layer(name="p", constants=(weights,), outputs=(LayerTensor(shape=(1, 100, 48), **half),))
    assert product.macs == 100 * 24 * 48
    assert Layer(name="k", kernel="__myl_Add", constants=(weights,), outputs=product.outputs).macs == 0
    assert Layer(name="a", inputs=product.outputs, outputs=product.outputs).macs == 0
    open_rows = LayerTensor(shape=(-1, 48), **half)
    assert Layer(name="o", constants=(weights,), outputs=(open_rows,)).macs == 0
    assert LayerTensor(shape=(-1, 3), **half).bytes is None
    assert Layer(name="o", outputs=(LayerTensor(shape=(-1, 3), **half),)).bytes == 0


@builds
@pytest.mark.parametrize(("gpus", "old"), [(("8.6",), "8.6"), (("12.0", "7.5"), "7.5")])
def test_fp8_is_refused_for_gpus_without_it(gpus, old):
    with pytest.raises(InputError, match=f"^fp8 needs compute capability 8.9 or more, not {old}; use --int8"):
        get_target(RTX).check(BuildOptions("fp8", gpus))
    get_target(RTX).check(BuildOptions("fp8", ("8.9",)))
    get_target(RTX).check(BuildOptions("int8", gpus))


@builds
def test_fp8_is_built_for_the_gpus_that_have_it():
    built = get_target(RTX).build(in_8_bits("fp8").SerializeToString(), profiles(), BuildOptions("fp8"))
    assert built.engine.compute_capabilities
    assert all(float(gpu) >= 8.9 for gpu in built.engine.compute_capabilities)
    assert {"8.9", "12.0"} <= set(built.engine.compute_capabilities)
