"""ONNX Runtime on the CPU (`onnxruntime`) or an NVIDIA GPU (`cuda`).

Knows sessions and providers; must not know tasks beyond the names that the manifest promises.
"""

from __future__ import annotations

from collections.abc import Sequence
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


# Type and dimensions of the input and of every output; what has the same name has the same size.
_VALUES: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "input": ("tensor(float)", ("batch", 3, "height", "width")),
    "num_detections": ("tensor(int32)", ("batch",)),
    "boxes": ("tensor(float)", ("batch", "most", 4)),
    "scores": ("tensor(float)", ("batch", "most")),
    "labels": ("tensor(int32)", ("batch", "most")),
    "masks": ("tensor(float)", ("batch", "most", "cells", "cells")),
    "logits": ("tensor(float)", ("batch", "classes", "rows", "columns")),
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


def _reason(error: Exception) -> str | None:
    """The first line of an error of ONNX Runtime's (they share no base class); None for any other."""
    if not type(error).__module__.startswith("onnxruntime"):
        return None
    return (str(error).splitlines() or [type(error).__name__])[0]


def _agree(shape: Sequence[Any], wanted: Sequence[str | int], sizes: dict[str, int | None]) -> bool:
    """Whether the dimensions that are fixed are as wanted; `sizes` takes up those not known before."""
    if len(shape) != len(wanted):
        return False
    return all(
        given == (name if isinstance(name, int) else sizes.setdefault(name, given))
        for given, name in zip(shape, wanted, strict=True)
        if isinstance(given, int)
    )


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
        except Exception as error:
            if reason := _reason(error):
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
        self._what = f"{MODEL} of bundle '{bundle.path}'"
        self._classes = len(bundle.classes)
        self._check_names(session, bundle)
        self._check_values(session, bundle)
        self._session: Any = session

    def _check_names(self, session: Any, bundle: Bundle) -> None:
        inputs = {value.name for value in session.get_inputs()}
        outputs = {value.name for value in session.get_outputs()}
        if inputs != {self._input} or not outputs.issuperset(self._outputs):
            raise BackendError(
                f"{MODEL} of bundle '{bundle.path}' takes {sorted(inputs)} and gives {sorted(outputs)}, not "
                "what its manifest says; export it again"
            )

    def _check_values(self, session: Any, bundle: Bundle) -> None:
        """Types, and dimensions where the graph fixes them, must be what the manifest promises."""
        spec = bundle.input
        sizes: dict[str, int | None] = {  # None: it must not be fixed
            "batch": spec.batch_max if spec.static_batch else None,
            "height": spec.size_max[0] if spec.size_min[0] == spec.size_max[0] else None,
            "width": spec.size_max[1] if spec.size_min[1] == spec.size_max[1] else None,
            "classes": self._classes,
        }
        given = {value.name: value for value in session.get_outputs()}
        values = {"input": session.get_inputs()[0], **{name: given[name] for name in self._outputs}}
        for name, value in values.items():
            kind, shape = _VALUES[name]
            if value.type != kind or not _agree(value.shape, shape, sizes):
                raise BackendError(
                    f"{self._what} has '{value.name}' as {value.type} {value.shape}, not what its manifest "
                    "says; export it again"
                )

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        session = self._session
        if session is None:
            raise BackendError("the back end is closed; open the predictor again")
        try:
            values = session.run(self._outputs, {self._input: images})
        except Exception as error:
            if reason := _reason(error):
                raise BackendError(f"ONNX Runtime cannot run {self._what}: {reason}") from error
            raise
        outputs = dict(zip(self._outputs, values, strict=True))
        sizes: dict[str, int | None] = {"batch": len(images), "classes": self._classes}
        for name, array in outputs.items():
            if not _agree(array.shape, _VALUES[name][1], sizes):
                raise BackendError(f"{self._what} gave {name} of shape {array.shape}; export it again")
        return outputs

    def close(self) -> None:
        self._session = None
