"""What runs a bundle's model: a few verbs that every back end has, and the choice of one.

Each back end's library is imported when it is opened; a back end must not know images or results.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from meta_deploy.errors import BackendError
from meta_deploy.runtime.bundle import Bundle

BACKENDS = ("auto", "onnxruntime", "cuda", "tensorrt")


class Backend(ABC):
    """An opened model. A context manager; `infer` may be called from several threads at once."""

    name: str

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

    `auto` takes the GPU where ONNX Runtime can use one, else the CPU; a named back end is that or an error.

    Raises:
        BackendError: not installed, not able to run here, or not what the bundle was made for.
        BundleError: the model's file is missing or altered.
    """
    if name not in BACKENDS:
        raise BackendError(f"there is no back end '{name}'; choose one of {', '.join(BACKENDS)}")
    if name == "tensorrt":
        raise BackendError(
            f"the tensorrt back end cannot run bundle '{bundle.path}', made for {bundle.target}; "
            "use --backend onnxruntime"
        )
    from meta_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend, cuda_is_offered

    if name == "cuda":
        return OnnxRuntimeBackend(bundle, "cuda", threads)
    if name == "auto" and cuda_is_offered():
        try:
            return OnnxRuntimeBackend(bundle, "cuda", threads)
        except BackendError:
            pass  # the library is built for CUDA, the machine is not
    return OnnxRuntimeBackend(bundle, "onnxruntime", threads)
