"""ONNX Runtime on the CPU (`onnxruntime`) or an NVIDIA GPU, by its CUDA (`cuda`) or TensorRT (`tensorrt`).

Knows sessions and providers; must not know tasks beyond the names that the manifest promises.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.cpus import Share
from meta_deploy.errors import BackendError
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.graph.prices import CPU
from meta_deploy.targets.cache import make_folder
from meta_deploy.targets.contract import Contract, Value
from meta_deploy.targets.model_file import read_model
from meta_deploy.targets.target import MODEL, Arrays, Backend, Target, TritonBackend, open_model_file

_FATAL = 4
# What has to be there for each name.
_PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_TITLES = {"onnxruntime": "the CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}
# Its names of types, where numpy's differ.
_TYPES = {"float": "float32", "double": "float64"}


class OnnxRuntime(Target):
    """The graph itself, which ONNX Runtime optimizes further whenever it opens it."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    passes = (
        *("clean-up", "plain-attention", "plain-einsum", "fuse-layer-norm", "share-norms"),
        *("fold-batch-norm", "merge-siblings", "gather-rows"),
        *("fuse-attention", "fuse-rotary", "slices-to-split", "collapse-chains"),
        *("move-linears", "collapse-chains"),
        *("fold-branches", "distribute-sums", "fold-scales", "discarded-rows", "pack-attention"),
    )
    doubtful = (
        *("fuse-attention", "pack-attention", "move-linears", "gather-rows"),
        *("merge-siblings", "distribute-sums", "fold-branches"),
    )
    hiding = ("pack-attention",)
    prices = CPU
    operators = ("native", "lowered")
    compacts = True
    precisions = ("fp32", "fp16", "int8")  # it has no bfloat16 kernels on a CPU
    # Measured by benchmarks/int8_products.py. A bias in float32 would keep Gemm, and a MatMul with an Add,
    # out of its 8-bit kernels.
    eight_bits = {  # noqa: RUF012
        "int8": EightBitRules(
            signed=False,
            results=True,
            biases=True,
            speedup=4,
            value=20,
            node=1e6,
            carries=("MaxPool", "Resize", "Concat", "Add", "Transpose", "Reshape", "Squeeze", "Unsqueeze"),
        )
    }
    backends = ("onnxruntime", "openvino", "cuda", "tensorrt")
    automatic = ("cuda", "onnxruntime")
    triton = TritonBackend("onnxruntime", MODEL, "KIND_AUTO")

    def open(self, bundle: Bundle, backend: str, threads: int | None) -> Backend:
        return open_model_file(bundle, backend, threads)


TARGETS = (OnnxRuntime(),)


def _library() -> Any:
    try:
        from meta_deploy.ort import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime cannot be imported ({error}); pip install onnxruntime") from error
    return onnxruntime


def _check_offered(name: str) -> None:
    if _PROVIDERS[name] not in _library().get_available_providers():
        raise BackendError(
            f"the installed ONNX Runtime has no {_TITLES[name]}; pip install onnxruntime-gpu in its place, "
            "or use --backend onnxruntime"
        )


def _providers(name: str) -> list[Any]:
    """Providers in the order in which they get the graph's nodes, with their options."""
    cpu = _PROVIDERS["onnxruntime"]
    cuda = (_PROVIDERS["cuda"], {"use_tf32": "0"})  # TF32 off: a float32 bundle is verified as float32
    if name == "onnxruntime":
        return [cpu]
    if name == "cuda":
        return [cuda, cpu]
    options = {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(make_folder("engines", "onnxruntime")),
        "trt_fp16_enable": False,  # the graph itself says what is in half precision
    }
    return [(_PROVIDERS["tensorrt"], options), cuda, cpu]


def _reason(error: Exception) -> str | None:
    """The first line of an error of ONNX Runtime's (they share no base class); None for any other."""
    if isinstance(error, UnicodeDecodeError):
        return f"it has names that are no text ({_words(error.object.decode(errors='backslashreplace'))})"
    if not type(error).__module__.startswith("onnxruntime"):
        return None
    return _words(str(error)) or type(error).__name__


def _words(text: str) -> str:
    return (text.splitlines() or [""])[0]


def session_options(threads: int) -> Any:
    """How a bundle's graph is opened; 0 threads: ONNX Runtime's choice."""
    ort = _library()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _FATAL  # errors arrive as exceptions, warnings are not the user's
    # Idle workers that spin take the cores from the postprocessing, and from whatever else runs here.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = threads
    return options


class OnnxRuntimeBackend(Backend):
    """A bundle's model.onnx in an ONNX Runtime session."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None = None):
        """`name` is onnxruntime, cuda or tensorrt; `threads` for the CPU, None for this process' share.

        Raises:
            BackendError: no such provider here, or the model cannot be loaded or is not the manifest's.
            BundleError: the model's file is missing or altered.
            InputError: there is no place to keep what TensorRT builds.
        """
        ort = _library()
        _check_offered(name)
        self.name = name
        by = "on" if name == "onnxruntime" else "with"
        self.runs_on = f"ONNX Runtime {ort.__version__} {by} {_TITLES[name]}"
        self._contract = Contract(bundle, MODEL)
        self._share = Share(threads)
        options = session_options(self._share.threads)
        try:
            session = ort.InferenceSession(read_model(bundle), options, providers=_providers(name))
            taken, given = _values(session.get_inputs()), _values(session.get_outputs())
        except Exception as error:
            if reason := _reason(error):
                raise BackendError(
                    f"ONNX Runtime cannot load {MODEL} of bundle '{bundle.path}': {reason}; export it again"
                ) from error
            raise
        if _PROVIDERS[name] not in session.get_providers():  # it goes on without, and says so in its log
            raise BackendError(
                f"ONNX Runtime cannot use {_TITLES[name]} on this machine; check the driver and the "
                f"libraries of {_TITLES[name]}, or use --backend onnxruntime"
            )
        self._contract.check(taken, given)
        self._session: Any = session

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        session = self._session
        if session is None:
            raise BackendError("the back end is closed; open the predictor again")
        self._contract.check_inputs(inputs)
        try:
            from meta_deploy.ort import run

            values = run(session, list(self._contract.outputs), inputs)
        except Exception as error:
            if reason := _reason(error):
                raise BackendError(f"ONNX Runtime cannot run {self._contract.what}: {reason}") from error
            raise
        outputs = dict(zip(self._contract.outputs, values, strict=True))
        self._contract.check_outputs(inputs, outputs)
        return outputs

    def close(self) -> None:
        self._session = None
        self._share.close()


def _values(given: Any) -> dict[str, Value]:
    kinds = [value.type.removeprefix("tensor(").removesuffix(")") for value in given]
    return {v.name: Value(_TYPES.get(kind, kind), v.shape) for v, kind in zip(given, kinds, strict=True)}
