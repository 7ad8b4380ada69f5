"""ONNX Runtime is asked for the provider that the back end's name says, and nothing less is taken for it."""

import onnxruntime
import pytest

from meta_deploy.errors import BackendError, InputError
from meta_deploy.targets import open_backend

CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """An ONNX Runtime for GPUs, on a machine where what `works` lists does; `asked` is the last wish."""
    real = onnxruntime.InferenceSession

    class Session:
        works = (TENSORRT, CUDA, CPU)
        asked = None

        def __init__(self, model, options, providers):
            Session.asked = providers
            self._session = real(model, options, providers=[CPU])

        def get_providers(self):
            names = [name if isinstance(name, str) else name[0] for name in Session.asked]
            return [name for name in names if name in Session.works]

        def __getattr__(self, name):
            return getattr(self._session, name)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return Session


def test_tensorrt_comes_before_cuda_before_the_cpu_and_keeps_what_it_builds(gpu, detector_bundle, tmp_path):
    with open_backend(detector_bundle, "tensorrt") as backend:
        assert backend.name == "tensorrt"
        assert backend.runs_on == f"ONNX Runtime {onnxruntime.__version__} with TensorRT"
    (first, options), (second, _), third = gpu.asked
    assert (first, second, third) == (TENSORRT, CUDA, CPU)
    folder = tmp_path / "cache" / "meta-deploy" / "engines" / "onnxruntime"
    assert options == {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_fp16_enable": False,
    }
    assert folder.is_dir()


def test_without_a_safe_place_tensorrt_is_not_started(gpu, detector_bundle, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot make the cache folder"):
        open_backend(detector_bundle, "tensorrt")


@pytest.mark.parametrize(
    ("name", "title", "lacks"), [("tensorrt", "TensorRT", TENSORRT), ("cuda", "CUDA", CUDA)]
)
def test_a_provider_that_falls_away_is_an_error_and_no_warning(gpu, detector_bundle, name, title, lacks):
    gpu.works = [provider for provider in gpu.works if provider != lacks]
    with pytest.raises(BackendError, match=f"ONNX Runtime cannot use {title} on this machine") as caught:
        open_backend(detector_bundle, name)
    assert "\n" not in str(caught.value)


def test_auto_takes_cuda_where_it_works_else_the_cpu_and_says_why(gpu, detector_bundle):
    with open_backend(detector_bundle) as backend:
        assert (backend.name, backend.note) == ("cuda", "")
        assert backend.runs_on.endswith("with CUDA")
    gpu.works = [CPU]
    with open_backend(detector_bundle) as backend:
        assert (backend.name, backend.note) == (
            "onnxruntime",
            "ONNX Runtime cannot use CUDA on this machine",
        )
        assert backend.runs_on.endswith(" on the CPU")
