"""ONNX Runtime on the CPU (`onnxruntime`) or an NVIDIA GPU (`cuda`).

Knows sessions and providers; must not know tasks beyond the names that the manifest promises.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meta_deploy.errors import BackendError
from meta_deploy.runtime.backends import Backend
from meta_deploy.runtime.bundle import Bundle

MODEL = "model.onnx"
_FATAL = 4
_PROVIDERS: dict[str, list[Any]] = {
    "onnxruntime": ["CPUExecutionProvider"],
    # TF32 off: a float32 bundle is verified as float32.
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
}


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime cannot be imported ({error}); pip install onnxruntime") from error
    return onnxruntime


def cuda_is_offered() -> bool:
    """Whether the installed ONNX Runtime is built for CUDA; the machine may still lack a GPU."""
    return "CUDAExecutionProvider" in _library().get_available_providers()


class OnnxRuntimeBackend(Backend):
    """A bundle's model.onnx in an ONNX Runtime session."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None = None):
        """`name` is onnxruntime or cuda; `threads` for the CPU, None for ONNX Runtime's choice."""
        ort = _library()
        if name == "cuda" and not cuda_is_offered():
            raise BackendError(
                "the installed ONNX Runtime has no CUDA; pip install onnxruntime-gpu in its place, "
                "or use --backend onnxruntime"
            )
        self.name = name
        self._outputs = list(bundle.output_names)
        self._input = bundle.input.name
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = _FATAL  # errors arrive as exceptions, warnings are not the user's
        # Idle workers that spin take the cores from the postprocessing, and from whatever else runs here.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            session = ort.InferenceSession(bundle.read(MODEL), options, providers=_PROVIDERS[name])
        except Exception as error:  # ONNX Runtime's errors share no base class
            if type(error).__module__.startswith("onnxruntime"):
                reason = str(error).splitlines()[0]
                raise BackendError(
                    f"ONNX Runtime cannot load {MODEL} of bundle '{bundle.path}': {reason}; export it again"
                ) from error
            raise
        wanted = _PROVIDERS[name][0]
        provider = wanted if isinstance(wanted, str) else wanted[0]
        if provider not in session.get_providers():
            raise BackendError(
                "ONNX Runtime cannot use a CUDA GPU on this machine; check the driver and CUDA's libraries, "
                "or use --backend onnxruntime"
            )
        self._check_names(session, bundle)
        self._session: Any = session

    def _check_names(self, session: Any, bundle: Bundle) -> None:
        inputs = {value.name for value in session.get_inputs()}
        outputs = {value.name for value in session.get_outputs()}
        if inputs != {self._input} or not outputs.issuperset(self._outputs):
            raise BackendError(
                f"{MODEL} of bundle '{bundle.path}' takes {sorted(inputs)} and gives {sorted(outputs)}, not "
                "what its manifest says; export it again"
            )

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        session = self._session
        if session is None:
            raise BackendError("the back end is closed; open the predictor again")
        return dict(zip(self._outputs, session.run(self._outputs, {self._input: images}), strict=True))

    def close(self) -> None:
        self._session = None
