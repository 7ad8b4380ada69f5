"""An engine on a stand-in for the GPU gives what its model gives; what fails is one line and no leak."""

import gc
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from msgspec import to_builtins
from msgspec.structs import replace

from meta_deploy import Predictor
from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.bundle.manifest import TensorRTEngine
from meta_deploy.errors import BackendError, BundleError
from meta_deploy.targets import open_backend
from meta_deploy.targets.tensorrt import cache as engine_cache
from meta_deploy.targets.tensorrt.backend import TensorRTBackend, gpu_name, inspect, misfit
from meta_deploy.targets.tensorrt.library import Here
from tests.bundles_by_hand import ENGINE, detector, manifest, segmenter
from tests.targets.gpu_stand_in import engine_bytes, install

SIZE = (64, 64)
INSTANCES, SEMANTIC = "instance-segmentation", "semantic-segmentation"
FOR_4090 = TensorRTEngine(version="11.4", gpu="NVIDIA GeForce RTX 4090", compute_capabilities=())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "meta-deploy" / "engines"


@pytest.fixture(scope="module", autouse=True)
def _collect_only_our_own():
    """What other tests left behind, gigabytes at times, is not looked through for garbage in each test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def gpu(request, monkeypatch):
    """A machine with a GPU and one of the TensorRTs; afterwards nothing may be left on the GPU."""
    rtx = request.param == "tensorrt-rtx"
    bindings, library = install(monkeypatch, rtx, ENGINE.version if rtx else FOR_4090.version)
    yield library
    gc.collect()
    assert bindings.held() == {}


@pytest.fixture
def rtx(monkeypatch):
    bindings, library = install(monkeypatch)
    yield library
    gc.collect()
    assert bindings.held() == {}


@pytest.fixture
def make(tmp_path):
    """Write a bundle with an engine; of a detector, unless another model is given."""

    def call(library, task=INSTANCES, dynamic=False, batch=1, model=None, plan=None, section=None):
        section = section or (ENGINE if library.rtx else FOR_4090)
        content = manifest(task, SIZE, dynamic, batch, target=section.library, engine=section)
        model = model or detector(SIZE, dynamic, batch)
        plan = plan or engine_bytes(model, Bundle(tmp_path, content).input)
        return write_bundle(tmp_path / "b", content, {"model.onnx": model, "model.engine": plan})

    return call


def images(batch=1, size=SIZE, seed=0):
    return np.random.default_rng(seed).random((batch, 3, *size), np.float32)


def run(backend, given):
    return backend.run({"images": given})


def same(bundle, backend, given):
    with open_backend(bundle, "onnxruntime", 1) as reference:
        wanted = run(reference, given)
    outputs = run(backend, given)
    assert list(outputs) == list(bundle.output_names)
    for name, array in outputs.items():
        assert array.dtype == wanted[name].dtype
        np.testing.assert_array_equal(array, wanted[name])


def test_an_engine_gives_what_its_model_gives(gpu, make):
    bundle = make(gpu)
    with open_backend(bundle, "tensorrt") as backend:
        assert (backend.name, backend.note) == ("tensorrt", "")
        assert backend.runs_on.endswith(" on NVIDIA GeForce RTX 4090")
        for seed in range(3):
            same(bundle, backend, images(seed=seed))


def test_batches_and_sizes_within_the_range_share_the_buffers(gpu, make):
    bundle = make(gpu, dynamic=True, batch=4)
    with open_backend(bundle, "tensorrt") as backend:
        allocated = gpu.bindings.calls.count("cudaMalloc")
        assert allocated == 6  # images and five outputs
        for batch, size in ((1, (32, 64)), (4, (256, 256)), (2, (64, 32)), (1, (32, 64))):
            same(bundle, backend, images(batch, size))
        assert gpu.bindings.calls.count("cudaMalloc") == allocated


def test_runs_are_timed_on_the_gpu_between_their_copies(gpu, make):
    with TensorRTBackend(make(gpu), timed=True) as backend:
        backend.take_gpu_ms()  # of the run that it was opened with
        run(backend, images())
        assert backend.take_gpu_ms() == (1, 10, 5)  # an image, the computation, five outputs
        run(backend, images())
        run(backend, images())
        assert backend.take_gpu_ms() == (2, 20, 10)
        assert backend.take_gpu_ms() == (0, 0, 0)


def test_runs_that_nobody_times_have_no_events(gpu, make):
    with open_backend(make(gpu), "tensorrt") as backend:
        run(backend, images())
    assert not [call for call in gpu.bindings.calls if "Event" in call]


def test_the_profiler_tells_each_layers_time_in_each_run_but_the_first(gpu, make):
    gpu.layers = {"conv": 2.0, "mha": 3.0}
    bundle = make(gpu)
    with open_backend(bundle, "tensorrt") as backend:
        assert [layer.name for layer in backend.layers()] == ["conv", "mha"]
        assert backend.layer_times({"images": images()}, 3) == [{"conv": 2.0, "mha": 3.0}] * 3
        same(bundle, backend, images(seed=1))  # and runs on as before
        gpu.layers = {}
        with pytest.raises(BackendError, match="tells no times of layers"):
            backend.layer_times({"images": images()}, 1)


def test_an_engine_alone_tells_its_library_and_layers(gpu, make):
    gpu.layers = {"conv": 2.0}
    bundle = make(gpu)
    library, version, layers = inspect(bundle.read("model.engine"), "it")
    assert (library, version) == (bundle.target, gpu.__version__)
    assert [layer.name for layer in layers] == ["conv"]
    with pytest.raises(BackendError, match="it"):
        inspect(b"no engine", "it")


def test_a_segmenter_of_any_size(gpu, make):
    bundle = make(gpu, task=SEMANTIC, dynamic=True, model=segmenter(SIZE, dynamic=True))
    with open_backend(bundle, "tensorrt") as backend:
        same(bundle, backend, images(1, (96, 128)))
        same(bundle, backend, images(1, (32, 32)))


def test_outputs_stay_as_they_were_when_the_next_image_comes(gpu, make):
    with open_backend(make(gpu), "tensorrt") as backend:
        first = run(backend, images(seed=1))
        scores = first["scores"].copy()
        run(backend, np.zeros((1, 3, *SIZE), np.float32))
    np.testing.assert_array_equal(first["scores"], scores)


def test_images_that_are_not_contiguous_are_copied_right(gpu, make):
    bundle = make(gpu)
    with open_backend(bundle, "tensorrt") as backend:
        same(bundle, backend, images().transpose(0, 1, 3, 2))


@pytest.mark.parametrize(
    "shape", [(2, 3, 64, 64), (1, 3, 64, 32), (1, 1, 64, 64), (3, 64, 64), (0, 3, 64, 64)]
)
def test_inputs_outside_the_range_are_one_sentence(gpu, make, shape):
    with open_backend(make(gpu), "tensorrt") as backend:
        with pytest.raises(BackendError, match=r"takes 'images' of \(1, 3, 64, 64\), not \(") as caught:
            run(backend, np.zeros(shape, np.float32))
        assert "\n" not in str(caught.value)
        assert run(backend, images())["scores"].shape == (1, 5)


def test_through_the_predictor(gpu, make, photo):
    bundle = make(gpu, dynamic=True, batch=4)
    with Predictor(bundle) as predictor, Predictor(bundle, "onnxruntime") as reference:
        assert predictor.backend == "tensorrt"
        assert predictor.runs_on.endswith("on NVIDIA GeForce RTX 4090")
        for one, other in zip(predictor.batch([photo] * 6), reference.batch([photo] * 6), strict=True):
            np.testing.assert_array_equal(one.boxes, other.boxes)
            np.testing.assert_array_equal(one.masks, other.masks)


# --- CUDA graphs --------------------------------------------------------------------------------------------


def test_a_static_engine_of_tensorrt_runs_as_a_graph(monkeypatch, make):
    bindings, library = install(monkeypatch, rtx=False, version="11.4")
    bundle = make(library)
    with open_backend(bundle, "tensorrt") as backend:
        assert bindings.calls.count("cudaStreamBeginCapture") == 1
        same(bundle, backend, images())
        same(bundle, backend, images(seed=5))
        assert bindings.calls.count("cudaGraphLaunch") == 2
    assert bindings.held() == {}


def test_a_dynamic_engine_and_tensorrt_rtx_record_no_graph(gpu, make):
    with open_backend(make(gpu, dynamic=gpu.rtx is False, batch=2), "tensorrt") as backend:
        run(backend, images(2))
        assert "cudaStreamBeginCapture" not in gpu.bindings.calls
        assert gpu.graph_strategy == (1 if gpu.rtx else None)


@pytest.mark.parametrize(
    "function",
    ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "TensorRT"],
)
def test_what_cannot_be_a_graph_runs_without_one(monkeypatch, make, function):
    bindings, library = install(monkeypatch, rtx=False, version="11.4")
    bundle = make(library)
    if function == "TensorRT":
        library.refuse = "capture"
    else:
        bindings.fail(function, "cudaErrorStreamCaptureUnsupported")
    with open_backend(bundle, "tensorrt") as backend:
        same(bundle, backend, images())
        assert "cudaGraphLaunch" not in bindings.calls
    assert bindings.held() == {}


# --- threads, sharing, closing ------------------------------------------------------------------------------


def test_many_threads_get_their_own_answers(gpu, make):
    values = np.linspace(0, 1, 40, dtype=np.float32)
    with open_backend(make(gpu), "tensorrt") as backend, ThreadPoolExecutor(4) as pool:
        given = (np.full((1, 3, *SIZE), value, np.float32) for value in values)
        first = [float(outputs["scores"][0, 0]) for outputs in pool.map(partial(run, backend), given)]
    np.testing.assert_array_equal(np.float32(first), values)


def test_two_predictors_share_one_engine_and_nothing_else(gpu, make):
    bundle = make(gpu)
    with open_backend(bundle, "tensorrt") as one:
        with open_backend(bundle, "tensorrt") as other:
            assert gpu.loads == 1
            assert gpu.bindings.held() == {
                "engines": 1,
                "contexts": 2,
                "streams": 2,
                "device": 12,
                "host": 12,
                **({} if gpu.rtx else {"graphs": 2}),
            }
            same(bundle, other, images(seed=1))
        same(bundle, one, images(seed=2))
    assert gpu.bindings.held() == {}
    with open_backend(bundle, "tensorrt"):
        assert gpu.loads == 2


def test_threads_that_open_together_load_the_engine_once(gpu, make):
    bundle = make(gpu)
    with ThreadPoolExecutor(4) as pool:
        backends = list(pool.map(lambda _: open_backend(bundle, "tensorrt"), range(4)))
    assert gpu.loads == 1
    for backend in backends:
        backend.close()


def test_closed_is_closed_and_twice_is_fine(gpu, make):
    backend = open_backend(make(gpu), "tensorrt")
    backend.close()
    backend.close()
    assert gpu.bindings.held() == {}
    with pytest.raises(BackendError, match="closed"):
        run(backend, images())


def test_a_back_end_that_is_forgotten_gives_all_back(gpu, make):
    backend = open_backend(make(gpu), "tensorrt")
    assert gpu.bindings.held()
    del backend
    gc.collect()
    assert gpu.bindings.held() == {}


# --- failures -----------------------------------------------------------------------------------------------


def one_line(error, *said):
    assert "\n" not in str(error)
    for words in said:
        assert words in str(error)


@pytest.mark.parametrize("function", ["cudaMalloc", "cudaHostAlloc"])
@pytest.mark.parametrize("nth", range(1, 7))
def test_memory_that_runs_out_anywhere_is_one_line_and_everything_is_freed(gpu, make, function, nth):
    bundle = make(gpu)
    gpu.bindings.fail(function, "cudaErrorMemoryAllocation", nth)
    with pytest.raises(BackendError) as caught:
        open_backend(bundle, "tensorrt")
    one_line(
        caught.value, "out of memory", f"cudaErrorMemoryAllocation in {function}", "close what else uses"
    )
    del caught
    gc.collect()
    assert gpu.bindings.held() == {}


@pytest.mark.parametrize(
    "function", ["cudaStreamCreateWithFlags", "cudaMemcpyAsync", "cudaStreamSynchronize"]
)
def test_an_error_while_opening_frees_everything(gpu, make, function):
    bundle = make(gpu)
    gpu.bindings.fail(function)
    with pytest.raises(BackendError, match=f"cudaErrorIllegalAddress in {function}"):
        open_backend(bundle, "tensorrt")
    gc.collect()
    assert gpu.bindings.held() == {}


@pytest.mark.parametrize(
    ("function", "nth"), [("cudaMemcpyAsync", 1), ("cudaMemcpyAsync", 3), ("cudaStreamSynchronize", 1)]
)
def test_an_error_in_the_middle_of_a_run_leaves_a_back_end_that_can_be_used_or_closed(
    gpu, make, function, nth
):
    bundle = make(gpu)
    with open_backend(bundle, "tensorrt") as backend:
        gpu.bindings.fail(function, nth=nth)
        with pytest.raises(BackendError) as caught:
            run(backend, images())
        one_line(caught.value, "illegal memory access", function, "start the program again")
        assert not any(gpu.bindings.streams.values())  # nothing is left that could still write
        same(bundle, backend, images(seed=3))


def test_after_an_error_that_stays_closing_still_gives_back_what_it_can(gpu, make):
    backend = open_backend(make(gpu), "tensorrt")
    for function in ("cudaStreamSynchronize", "cudaFree", "cudaSetDevice"):
        gpu.bindings.fail(function)
    backend.close()
    assert gpu.bindings.held() == {"device": 1}  # the one that CUDA did not take back
    gpu.bindings.device.clear()


@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        (
            "load",
            "cannot load model.engine of bundle '{}': Serialization assertion failed: magic tag; export",
        ),
        ("context", "cannot prepare model.engine of bundle '{}': out of memory for activations; close"),
        ("address", "cannot run model.engine of bundle '{}': cannot address; check"),
        ("shape", "cannot take the shape of model.engine of bundle '{}': cannot shape; check"),
        ("run", "cannot run model.engine of bundle '{}': cannot run; check"),
    ],
)
def test_what_tensorrt_refuses_is_said_in_its_words_and_printed_nowhere(gpu, make, capfd, refuse, said):
    bundle = make(gpu)
    gpu.refuse = refuse
    with pytest.raises(BackendError) as caught:
        open_backend(bundle, "tensorrt")
    one_line(caught.value, said.format(bundle.path))
    assert capfd.readouterr() == ("", "")
    del caught
    gc.collect()
    assert gpu.bindings.held() == {}


def test_a_run_that_tensorrt_refuses_is_one_line(monkeypatch, make):
    _, library = install(monkeypatch)
    with open_backend(make(library), "tensorrt") as backend:
        library.refuse = "run"
        with pytest.raises(BackendError, match=r"TensorRT-RTX 1\.7\.1 cannot run .*: cannot run; "):
            run(backend, images())


# --- which engine -------------------------------------------------------------------------------------------


def test_an_altered_engine_is_never_opened(gpu, make):
    bundle = make(gpu)
    (bundle.path / "model.engine").write_bytes(b"x" * bundle.manifest.files["model.engine"].bytes)
    with pytest.raises(BundleError, match="is not the file that was exported"):
        open_backend(bundle, "tensorrt")
    with pytest.raises(BundleError, match="is not the file that was exported"):
        open_backend(bundle)
    assert gpu.loads == 0


def test_an_engine_that_is_no_engine_is_one_line(gpu, make):
    with pytest.raises(BackendError, match="cannot load") as caught:
        open_backend(make(gpu, plan=b"garbage"), "tensorrt")
    one_line(caught.value)


@pytest.mark.parametrize(
    ("here", "section", "said"),
    [
        ({"version": "1.8.0"}, ENGINE, "built with TensorRT-RTX 1.7.1, and here is TensorRT-RTX 1.8.0"),
        ({}, replace(ENGINE, compute_capabilities=("12.0",)), "for compute capability 12.0, and NVIDIA"),
        (
            {},
            replace(ENGINE, compute_capabilities=("8.0", "8.6")),
            "8.0 and 8.6, and NVIDIA GeForce RTX 4090 has",
        ),
        (
            {"rtx": False, "version": "11.4", "name": "NVIDIA H200"},
            FOR_4090,
            "built on NVIDIA GeForce RTX 4090, and here is NVIDIA H200",
        ),
        ({"rtx": False, "version": "10.9"}, FOR_4090, "built with TensorRT 11.4, and here is TensorRT 10.9"),
    ],
)
def test_an_engine_for_another_library_or_gpu_is_not_opened(monkeypatch, make, here, section, said):
    bindings, library = install(monkeypatch, **here)
    bundle = make(library, plan=b"never read", section=section)
    with pytest.raises(BackendError) as caught:
        open_backend(bundle, "tensorrt")
    one_line(caught.value, f"the engine of bundle '{bundle.path}' does not fit this machine: it was ", said)
    one_line(caught.value, "meta-infer --rebuild")
    assert library.loads == 0
    assert said in misfit(bundle)
    with open_backend(bundle) as backend:
        assert backend.name == "onnxruntime"
        assert said in backend.note
        assert ";" not in backend.note
    assert bindings.held() == {}


def test_a_rebuilt_engine_is_taken_where_the_bundles_own_does_not_fit(monkeypatch, make):
    bindings, library = install(monkeypatch, version="1.8.0")
    bundle = make(library, plan=b"for the old version")
    machine = Here.find(bundle.target).machine
    plan = engine_bytes(detector(SIZE), bundle.input)
    engine_cache.store(bundle, machine, plan, replace(ENGINE, version="1.8.0"))
    assert misfit(bundle) is None
    with open_backend(bundle) as backend:
        assert (backend.name, backend.note) == ("tensorrt", "")
        same(bundle, backend, images())
    assert bindings.held() == {}


def test_compiled_kernels_are_kept_for_the_next_time(rtx, make, cache):
    bundle = make(rtx)
    with open_backend(bundle, "tensorrt"):
        assert rtx.kernels_found is None
    (kept,) = cache.glob("kernels-*")
    written = kept.stat().st_mtime_ns
    with open_backend(bundle, "tensorrt"):
        assert rtx.kernels_found == b"compiled"
    assert kept.stat().st_mtime_ns == written  # nothing new to keep
    rtx.refuse = "kernels"  # of another driver
    rtx.kernels = b"compiled anew"
    open_backend(bundle, "tensorrt").close()
    assert kept.read_bytes().endswith(b"\ncompiled anew")


def test_without_a_place_for_kernels_everything_works(rtx, make, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    bundle = make(rtx)
    with open_backend(bundle, "tensorrt") as backend:
        same(bundle, backend, images())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": segmenter(SIZE)}, "not what its manifest says"),
        ({"model": detector((32, 32))}, r"'images' as float32 \[1, 3, 32, 32\]"),
        ({"model": detector(SIZE), "dynamic": True}, r"'images' as float32 \[1, 3, 64, 64\]"),
    ],
)
def test_an_engine_that_is_not_the_manifests_is_refused(rtx, make, changes, said):
    with pytest.raises(BackendError, match=said):
        open_backend(make(rtx, **changes), "tensorrt")


def test_an_engine_for_less_than_the_manifest_promises_is_refused(rtx, make):
    small = Bundle(None, manifest(INSTANCES, SIZE, dynamic=True, batch=2)).input
    plan = engine_bytes(detector(SIZE, dynamic=True), small)
    with pytest.raises(BackendError, match=r"takes \(1, 3, 32, 32\) to \(2, 3, 256, 256\), and its manifest"):
        open_backend(make(rtx, dynamic=True, batch=4, plan=plan), "tensorrt")


# --- what is here -------------------------------------------------------------------------------------------


def test_auto_takes_the_engine_then_the_cpu_and_says_why(monkeypatch, make):
    bindings, library = install(monkeypatch)
    bundle = make(library)
    bindings.fail("cudaMalloc", "cudaErrorMemoryAllocation")
    with open_backend(bundle) as backend:
        assert backend.name in ("cuda", "onnxruntime")
        reason = "CUDA reports 'out of memory' (cudaErrorMemoryAllocation in cudaMalloc)"
        assert backend.note == f"{reason}, and on a CPU a bundle made for onnxruntime is several times faster"
        run(backend, images())
    with open_backend(bundle) as backend:
        assert (backend.name, backend.note) == ("tensorrt", "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("cudaErrorInsufficientDriver", "there is no NVIDIA driver here, or one too old"),
        ("cudaErrorNoDevice", "there is no NVIDIA GPU here"),
        ("no library", "CUDA cannot be used here (Failed to dlopen libcuda.so.1)"),
    ],
)
def test_a_machine_without_a_gpu_is_told_so(monkeypatch, make, error, said):
    bindings, library = install(monkeypatch)
    bundle = make(library)
    for attempt in range(1, 5):
        bindings.fail("cudaSetDevice", error, attempt)
    with pytest.raises(BackendError) as caught:
        open_backend(bundle, "tensorrt")
    one_line(caught.value, said, "--backend onnxruntime")
    assert gpu_name() is None
    with pytest.raises(BackendError):
        misfit(bundle)
    with open_backend(bundle) as backend:
        assert backend.name == "onnxruntime"
        assert said in backend.note


@pytest.mark.parametrize(
    ("module", "said"),
    [("tensorrt_rtx", "pip install tensorrt-rtx"), ("cuda.bindings", "pip install cuda-bindings")],
)
def test_what_is_not_installed_is_named(monkeypatch, make, module, said):
    _, library = install(monkeypatch)
    bundle = make(library)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError) as caught:
        open_backend(bundle, "tensorrt")
    one_line(caught.value, said)


def test_the_name_of_the_gpu(gpu):
    assert gpu_name() == "NVIDIA GeForce RTX 4090"


def test_only_a_bundle_with_an_engine_can_misfit(rtx, detector_bundle):
    with pytest.raises(BackendError, match="made for onnxruntime and holds no engine"):
        misfit(detector_bundle)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("library", "tensorrt"),
        ("version", None),
        ("version", "1\n2"),
        ("gpu", 4090),
        ("compute_capabilities", None),
        ("compute_capabilities", ["sm_89"]),
        ("compute_capabilities", [8.9]),
    ],
)
def test_a_manifest_that_does_not_say_what_the_engine_is_for_is_refused(rtx, make, field, value):
    bundle = make(rtx)
    content = to_builtins(bundle.manifest)
    content["engine"][field] = value
    (bundle.path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=rf"for 'engine\.{field}(\[0\])?'"):
        Bundle.open(bundle.path)
    (bundle.path / "manifest.json").write_text(json.dumps({**content, "engine": None}))
    with pytest.raises(BundleError, match=r"lacks 'engine'"):
        Bundle.open(bundle.path)


# --- the real libraries, as far as they go without a GPU ----------------------------------------------------


def test_the_real_library_without_a_gpu_is_one_line_and_auto_falls_back(make, capfd):
    trt = pytest.importorskip("tensorrt_rtx")
    if gpu_name() is not None:
        pytest.skip("this machine has a GPU")
    section = replace(ENGINE, version=trt.__version__)
    bundle = make(None, plan=b"x", section=section)
    with pytest.raises(
        BackendError, match=r"cuda-bindings|no NVIDIA (driver|GPU)|cannot be used here"
    ) as caught:
        open_backend(bundle, "tensorrt")
    one_line(caught.value)
    with open_backend(bundle) as backend:
        assert backend.name == "onnxruntime"
        assert backend.note
        run(backend, images())
    assert capfd.readouterr() == ("", "")


def test_the_real_bindings_have_what_is_called():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    from tests.targets.gpu_stand_in import ERRORS, Bindings

    for name in dir(Bindings):
        if name.startswith("cuda"):
            assert hasattr(runtime, name)
    for name, number in ERRORS.items():
        assert getattr(runtime.cudaError_t, name) == number
    code, text = runtime.cudaGetErrorString(runtime.cudaError_t.cudaErrorMemoryAllocation)
    assert (int(code), text) == (0, b"out of memory")
