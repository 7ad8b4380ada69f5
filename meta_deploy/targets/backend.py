"""What runs a bundle's model: a few verbs that every back end has, and the choice of one.

Each back end's library is imported when it is opened; a back end must not know images or results.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import ENGINE_TARGETS
from meta_deploy.errors import BackendError

BACKENDS = ("auto", "onnxruntime", "cuda", "tensorrt")
ENGINE_PRECISIONS = ("bf16",)  # that ONNX Runtime's CPU cannot run


class Backend(ABC):
    """An opened model. A context manager; `infer` may be called from several threads at once.

    Attributes:
        name: of BACKENDS, what it was opened as.
        runs_on: library, version and device, for people.
        note: why `auto` did not take a better one; empty if it is the best or was asked for.
    """

    name: str
    runs_on: str
    note: str = ""

    @abstractmethod
    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run the network on float32 (B, 3, H, W); its outputs by name."""

    @abstractmethod
    def close(self) -> None:
        """Free the model; after that `infer` raises BackendError. Closing twice is fine."""

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_backend(bundle: Bundle, name: str = "auto", threads: int | None = None) -> Backend:
    """Load a bundle's model. `threads` is for the CPU; None leaves it to the back end.

    `auto` takes the first that works of the bundle's engine, ONNX Runtime on a GPU, and the CPU; a named back
    end is that or an error. `tensorrt` is the bundle's engine, or for a bundle that is made for ONNX Runtime
    its TensorRT provider.

    Raises:
        BackendError: not installed, not able to run here, or not what the bundle was made for.
        BundleError: the model's file is missing or altered.
    """
    if name not in BACKENDS:
        raise BackendError(f"there is no back end '{name}'; choose one of {', '.join(BACKENDS)}")
    if name != "auto":
        return _open(bundle, name, threads)
    best = ("tensorrt",) if bundle.target in ENGINE_TARGETS else ()
    note = ""
    for choice in (*best, "cuda"):
        try:
            backend = _open(bundle, choice, threads)
        except BackendError as error:
            note = note or str(error).split(";")[0]  # what is wrong, without what to do about it
        else:
            backend.note = note
            return backend
    if bundle.precision in ENGINE_PRECISIONS:
        raise BackendError(_engine_alone(bundle, f"which cannot be opened here: {note}"))
    backend = _open(bundle, "onnxruntime", threads)
    slow = ", and on a CPU a bundle made for onnxruntime is several times faster" if best else ""
    backend.note = note + slow
    return backend


def _engine_alone(bundle: Bundle, why: str) -> str:
    return (
        f"bundle '{bundle.path}' is {bundle.precision}, for which ONNX Runtime has no kernels on a CPU: it "
        f"runs on its engine alone, {why}; export with --fp16 or --fp32 for a CPU"
    )


def _open(bundle: Bundle, name: str, threads: int | None) -> Backend:
    if name == "tensorrt" and bundle.target in ENGINE_TARGETS:
        from meta_deploy.targets.tensorrt.backend import TensorRTBackend

        return TensorRTBackend(bundle)
    if name == "onnxruntime" and bundle.precision in ENGINE_PRECISIONS:
        raise BackendError(_engine_alone(bundle, "on a GPU with --backend tensorrt"))
    from meta_deploy.targets.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, name, threads)
