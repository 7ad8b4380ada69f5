"""OpenVINO gives what ONNX Runtime gives, in float32, from files that were checked; failures are one line."""

import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from meta_deploy import Predictor
from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.errors import BackendError, BundleError, EngineError, InputError
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.graph.precision.int8 import Quantization
from meta_deploy.targets import get_target, open_backend
from meta_deploy.targets import openvino as module
from meta_deploy.targets.target import BuildOptions
from tests.bundles_by_hand import detector, manifest, segmenter
from tests.small_graphs import model, run, value

pytest.importorskip("openvino")
SIZE = (64, 64)
INSTANCES, SEMANTIC = "instance-segmentation", "semantic-segmentation"
TARGET = get_target("openvino")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "meta-deploy" / "openvino"


@pytest.fixture
def make(tmp_path):
    """Write a bundle for OpenVINO out of an ONNX model: of a detector, unless another is given."""

    def call(task=INSTANCES, dynamic=False, batch=1, onnx=None, precision="fp32", **files):
        onnx = onnx or detector(SIZE, dynamic, batch)
        plain = write_bundle(tmp_path / "onnx", manifest(task, SIZE, dynamic, batch), {"model.onnx": onnx})
        built = TARGET.build(onnx, [plain.input.profile], BuildOptions(precision))
        content = manifest(
            task, SIZE, dynamic, batch, target="openvino", precision=precision, engine=built.engine
        )
        return plain, write_bundle(tmp_path / "ir", content, {**built.files, **files})

    return call


def images(batch=1, size=SIZE, seed=0):
    return {"images": np.random.default_rng(seed).random((batch, 3, *size), np.float32)}


def same(plain, backend, given):
    with open_backend(plain, "onnxruntime", 1) as reference:
        wanted = reference.run(given)
    outputs = backend.run(given)
    assert list(outputs) == list(wanted)
    for name, array in outputs.items():
        assert array.dtype == wanted[name].dtype
        np.testing.assert_allclose(array, wanted[name], rtol=1e-6)


def one_line(error, *said):
    assert "\n" not in str(error)
    for words in said:
        assert words in str(error)


# --- what it gives ---


def test_a_bundle_gives_what_its_graph_gives_and_says_on_what_it_runs(make):
    plain, bundle = make()
    with open_backend(bundle) as backend:
        assert (backend.name, backend.note) == ("openvino", "")
        assert backend.runs_on == f"OpenVINO {bundle.engine.version} on the CPU in float32"
        for seed in range(3):
            same(plain, backend, images(seed=seed))


def test_batches_and_sizes_within_the_range(make):
    plain, bundle = make(dynamic=True, batch=4)
    with open_backend(bundle) as backend:
        for batch, size in ((1, (32, 64)), (4, (256, 256)), (2, (64, 32)), (1, (32, 64))):
            same(plain, backend, images(batch, size))
        with pytest.raises(BackendError, match=r"takes 'images' of \(1, 3, 32, 32\) to \(4, 3, 256, 256\)"):
            backend.run(images(5))


def test_a_segmenter_of_any_size_through_the_predictor(make, photo):
    plain, bundle = make(SEMANTIC, dynamic=True, onnx=segmenter(SIZE, dynamic=True))
    with Predictor(bundle, threads=1) as predictor, Predictor(plain, "onnxruntime") as reference:
        assert predictor.backend == "openvino"
        np.testing.assert_array_equal(predictor(photo).classes, reference(photo).classes)


def test_a_bundle_of_another_target_opens_by_its_graph(make):
    plain, _ = make()
    with open_backend(plain, "openvino") as backend:
        assert backend.runs_on.startswith("OpenVINO ")
        same(plain, backend, images())


def test_outputs_stay_as_they_were_when_the_next_image_comes(make):
    _, bundle = make()
    with open_backend(bundle) as backend:
        first = backend.run(images(seed=1))
        scores = first["scores"].copy()
        backend.run({"images": np.zeros((1, 3, *SIZE), np.float32)})
    np.testing.assert_array_equal(first["scores"], scores)


def test_many_threads_get_their_own_answers(make):
    _, bundle = make()
    values = np.linspace(0, 1, 40, dtype=np.float32)
    with open_backend(bundle, threads=1) as backend, ThreadPoolExecutor(4) as pool:
        given = ({"images": np.full((1, 3, *SIZE), value, np.float32)} for value in values)
        first = [float(outputs["scores"][0, 0]) for outputs in pool.map(backend.run, given)]
    np.testing.assert_array_equal(np.float32(first), values)


def test_images_that_are_not_contiguous_are_read_right(make):
    plain, bundle = make()
    with open_backend(bundle) as backend:
        same(plain, backend, {"images": images()["images"].transpose(0, 1, 3, 2)})


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_asked_for_in_one_stream(make, threads):
    _, bundle = make()
    with open_backend(bundle, threads=threads) as backend:
        compiled = backend._model._compiled
        assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
        assert compiled.get_property("NUM_STREAMS") == 1


def test_closed_is_closed_and_twice_is_fine(make):
    _, bundle = make()
    backend = open_backend(bundle)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.run(images())


# --- precision ---


def product(values):
    """y = x * w, where w is `values`."""
    from onnx import helper, numpy_helper

    return model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", [4, len(values)])],
        [value("y", [4, values.shape[1]])],
        [numpy_helper.from_array(values, "w")],
    ).SerializeToString()


@pytest.mark.parametrize("precision", ["fp32", *TARGET.lowered_by_build])
def test_weights_and_arithmetic_are_those_of_the_precision(precision):
    """float32 to a rounding or two; float16 rounds the weights alone; bfloat16 rounds everything."""
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=(64, 32)).astype(np.float32), rng.normal(size=(4, 64)).astype(np.float32)
    options = BuildOptions(precision)
    try:
        TARGET.check(options)
    except InputError as error:
        pytest.skip(str(error))
    built = TARGET.build(product(weights), [], options)
    assert built.engine.precision_hint == ("bf16" if precision == "bf16" else "f32")
    assert len(built.files["model.bin"]) == weights.size * (2 if precision == "fp16" else 4)
    y = TARGET.runner(built, [], precision)({"x": x})["y"]
    rounded = weights.astype(np.float16) if precision == "fp16" else weights
    exact = x.astype(np.float64) @ rounded.astype(np.float64)
    error = np.abs(y - exact).max() / np.abs(exact).max()
    assert (error > 1e-4) if precision == "bf16" else (error < 1e-6)


def test_products_run_in_8_bits_from_weights_of_8_bits():
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(0, 0.1, (128, 128)).astype(np.float32), name) for name in "vw"
    ]
    nodes = [
        *(helper.make_node("MatMul", ["x", "v"], ["a"]), helper.make_node("Gelu", ["a"], ["b"])),
        *(helper.make_node("MatMul", ["b", "w"], ["c"]), helper.make_node("Tanh", ["c"], ["s"])),
        helper.make_node("MatMul", ["s", "w"], ["y"]),
    ]
    opset = [helper.make_opsetid("", 20)]
    proto = model(nodes, [value("x", [1, 900, 128])], ["y"], weights, opset_imports=opset)
    ends = {"x": (-4.0, 4.0), "b": (-0.2, 3.0)}
    quantization = Quantization(TARGET.eight_bits["int8"], lambda graph, placement: (ends, {}))
    converted, done = PRECISIONS["int8"].convert(proto, quantization=quantization)
    assert done.quantized == 2
    built = TARGET.build(converted.SerializeToString(), [], BuildOptions("int8"))
    assert len(built.files["model.bin"]) < 7 * 128 * 128  # "v" in 8 bits alone, "w" in both
    compiled = module.compile_model(
        built.files["model.xml"], built.files["model.bin"], built.engine.precision_hint
    )
    facts = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kinds = [
        str(fact["runtimePrecision"].astype(str))
        for fact in facts
        if fact["layerType"].astype(str) in ("FullyConnected", "MatMul")
    ]
    assert sum(kind in ("u8", "i8") for kind in kinds) == 2
    x = rng.normal(size=(1, 900, 128)).astype(np.float32)
    actual, expected = TARGET.runner(built, [], "int8")({"x": x})["y"], run(proto, x=x)["y"]
    assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)


def test_bfloat16_is_refused_where_the_processor_does_not_compute_in_it(make, monkeypatch):
    class Core:
        def get_property(self, device, name):
            return ["FP32", "FP16", "INT8"]

    _, bundle = make(precision="fp32")
    engine = replace(bundle.engine, precision_hint="bf16")
    bundle = Bundle(bundle.path, replace(bundle.manifest, engine=engine))
    monkeypatch.setattr(module, "_core", Core)
    for refuse in (lambda: TARGET.check(BuildOptions("bf16")), lambda: open_backend(bundle)):
        with pytest.raises(InputError, match="does not compute in bfloat16; use --fp16 or --fp32"):
            refuse()
    TARGET.check(BuildOptions("fp16"))


# --- the cache ---


def test_a_compiled_model_is_kept_for_the_next_time(make, cache, monkeypatch):
    plain, bundle = make()
    open_backend(bundle, threads=1).close()
    assert len(list(cache.iterdir())) == 1
    core = module._core()
    monkeypatch.setattr(module, "_core", lambda: Core())

    class Core:
        """Has forgotten how to compile."""

        compiled = 0

        def __getattr__(self, name):
            return getattr(core, name)

        def compile_model(self, *arguments):
            Core.compiled += 1
            return core.compile_model(*arguments)

    with open_backend(bundle, threads=1) as backend:
        same(plain, backend, images())
        assert Core.compiled == 0
    open_backend(bundle, threads=2).close()  # compiled for as many
    assert Core.compiled == 1
    (kept, *_) = cache.glob("*.bin")
    for content in (b"", b"x" * kept.stat().st_size):
        for path in cache.glob("*.bin"):
            path.write_bytes(content)
        with open_backend(bundle, threads=1) as backend:
            same(plain, backend, images())
    assert Core.compiled == 3


def test_without_a_place_for_compiled_models_everything_works(make, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    plain, bundle = make()
    with open_backend(bundle) as backend:
        same(plain, backend, images())


# --- what is refused ---


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_an_altered_file_is_never_opened(make, name):
    _, bundle = make()
    path = bundle.path / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=f"{name}' is not the file that was exported"):
        open_backend(bundle)


@pytest.mark.parametrize("content", [b"", b"no xml", b"<net>", bytes(100)])
def test_a_model_that_is_none_is_one_line(make, content):
    _, bundle = make(**{"model.xml": content})
    with pytest.raises(BackendError) as caught:
        open_backend(bundle)
    one_line(caught.value, f"OpenVINO cannot load model.xml of bundle '{bundle.path}': ", "; export it again")


@pytest.mark.parametrize("length", [0, 16])
def test_weights_that_are_too_short_are_one_line(make, length):
    _, bundle = make(**{"model.bin": bytes(length)})
    with pytest.raises(BackendError, match=r"OpenVINO cannot load model\.xml") as caught:
        open_backend(bundle)
    one_line(caught.value)


def test_a_model_that_is_not_the_manifests_is_refused(make):
    with pytest.raises(BackendError, match="not what its manifest says"):
        open_backend(make(onnx=segmenter(SIZE))[1])
    with pytest.raises(BackendError, match=r"'images' as float32 \[1, 3, 64, 64\]"):
        open_backend(make(onnx=detector(SIZE), dynamic=True)[1])


def test_what_openvino_does_not_take_is_one_line():
    from onnx import helper

    strange = model(
        [helper.make_node("Strange", ["x"], ["y"], domain="somebody")],
        [value("x", [2])],
        [value("y", [2])],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("somebody", 1)],
    )
    with pytest.raises(EngineError, match=r"OpenVINO cannot convert the graph: .*Strange") as caught:
        TARGET.build(strange.SerializeToString(), [], BuildOptions())
    one_line(caught.value)


def test_what_was_built_and_does_not_load_is_one_line():
    built = TARGET.build(segmenter(SIZE), [], BuildOptions())
    with pytest.raises(EngineError, match="OpenVINO cannot load the model that it made") as caught:
        TARGET.runner(dataclasses.replace(built, files={**built.files, "model.xml": b"<net>"}), [], "fp32")
    one_line(caught.value)


def test_a_run_that_fails_is_one_line_and_the_next_one_works(make):
    from onnx import helper, numpy_helper

    one_size = model(
        [
            helper.make_node("AveragePool", ["images"], ["p"], kernel_shape=[4, 4], strides=[4, 4]),
            helper.make_node("Reshape", ["p", "shape"], ["logits"]),
        ],
        [value("images", ["b", 3, "h", "w"])],
        [value("logits", ["b", 3, "qh", "qw"])],
        [numpy_helper.from_array(np.array([1, 3, 16, 16]), "shape")],
        infer=False,
    )
    _, bundle = make(SEMANTIC, dynamic=True, onnx=one_size.SerializeToString())
    with open_backend(bundle, threads=2) as backend:  # on one thread OpenVINO does not look
        with pytest.raises(BackendError, match=r"OpenVINO cannot run model\.xml") as caught:
            backend.run(images(1, (32, 32)))
        one_line(caught.value)
        assert backend.run(images())["logits"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("backend", ["onnxruntime", "cuda", "tensorrt"])
def test_other_back_ends_have_no_file_to_run(make, backend):
    _, bundle = make()
    with pytest.raises(BackendError, match=f"for openvino, which {backend} does not run; use --backend open"):
        open_backend(bundle, backend)


def test_without_the_library_the_remedy_is_named(make, monkeypatch):
    plain, bundle = make()
    monkeypatch.setitem(sys.modules, "openvino", None)
    module._library.cache_clear()
    module._core.cache_clear()
    for open_it in (
        lambda: open_backend(bundle),
        lambda: open_backend(plain, "openvino"),
        lambda: TARGET.check(BuildOptions()),
    ):
        with pytest.raises(BackendError, match=r"OpenVINO cannot be imported .*; pip install openvino"):
            open_it()
    monkeypatch.undo()
    module._library.cache_clear()


# --- the home folder ---


def test_nothing_is_reported_and_nothing_written_to_the_home_folder(make, tmp_path):
    """Importing OpenVINO alone starts its telemetry, which leaves a folder there."""
    _, bundle = make()
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import sys
from meta_deploy import Predictor
with Predictor({str(bundle.path)!r}) as predictor:
    print(predictor.backend, *(name for name in sys.modules if name.startswith("openvino_telemetry")))
"""
    # A second home folder, and no other place for the cache.
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(tmp_path / "elsewhere")}
    root = str(Path(module.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root, check=True
    )
    assert done.stdout == "openvino\n"
    assert done.stderr == ""
    assert list(home.rglob("*")) == []
