"""The dozen of CUDA's calls that running an engine takes, each error as one line with a remedy.

Knows NVIDIA's cuda-python bindings; must not know TensorRT nor what the memory holds.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from meta_deploy.errors import BackendError

_NO_GPU = "check the driver with nvidia-smi, or use --backend onnxruntime"
_NEW_PROCESS = "start the program again, and report it if it comes back"
# CUDA's own words for these mislead.
_ABSENT = {
    "cudaErrorInsufficientDriver": "there is no NVIDIA driver here, or one too old for these CUDA "
    "bindings; install or update it, or use --backend onnxruntime",
    "cudaErrorNoDevice": f"there is no NVIDIA GPU here that CUDA may use; {_NO_GPU}",
}
_REMEDIES = {
    "cudaErrorMemoryAllocation": "close what else uses the GPU, or export with a smaller batch or input size",
    "cudaErrorSystemDriverMismatch": "restart the machine, as after every update of the driver",
    "cudaErrorInvalidDevice": _NO_GPU,
    "cudaErrorStubLibrary": _NO_GPU,
    "cudaErrorInitializationError": _NO_GPU,
    "cudaErrorDevicesUnavailable": "end the program that holds the GPU for itself",
    "cudaErrorNoKernelImageForDevice": "the GPU is not one that this engine or library is made for",
    "cudaErrorUnsupportedPtxVersion": "update the NVIDIA driver",
    "cudaErrorIllegalAddress": _NEW_PROCESS,
    "cudaErrorLaunchFailure": _NEW_PROCESS,
    "cudaErrorLaunchTimeout": _NEW_PROCESS,
    "cudaErrorAssert": _NEW_PROCESS,
    "cudaErrorECCUncorrectable": "the GPU's memory is faulty: restart the machine or use another GPU",
}


def _bindings() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(
            f"CUDA's bindings cannot be imported ({error}); pip install cuda-bindings"
        ) from error
    return runtime


class Cuda:
    """The first GPU that CUDA shows (CUDA_VISIBLE_DEVICES chooses another). Every method raises BackendError.

    Attributes:
        name: the GPU's, such as NVIDIA GeForce RTX 4090.
        compute_capability: such as 8.9.
    """

    def __init__(self) -> None:
        self._api = _bindings()
        self.activate()
        properties = self._call("cudaGetDeviceProperties", 0)
        self.name: str = properties.name.decode(errors="replace").rstrip("\0")
        self.compute_capability = f"{properties.major}.{properties.minor}"

    def activate(self) -> None:
        """Make the GPU the calling thread's; before anything else in a thread."""
        self._call("cudaSetDevice", 0)

    def malloc(self, size: int) -> int:
        """The address of `size` bytes on the GPU."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def host_alloc(self, size: int) -> np.ndarray:
        """`size` bytes of pinned memory as uint8 (size,), not to be touched after `host_free`."""
        address = int(self._call("cudaHostAlloc", size, 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def host_free(self, array: np.ndarray) -> None:
        self._call("cudaFreeHost", array.ctypes.data)

    def stream_create(self) -> Any:
        """A stream that does not wait for the default one; `int()` of it is its handle."""
        return self._call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking)

    def stream_destroy(self, stream: Any) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: Any) -> None:
        """Wait for all that was put on the stream; errors of it arrive here."""
        self._call("cudaStreamSynchronize", stream)

    def to_device(self, address: int, array: np.ndarray, size: int, stream: Any) -> None:
        """Start to copy the first `size` bytes of a pinned array to the GPU."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, size, kind, stream)

    def to_host(self, array: np.ndarray, address: int, size: int, stream: Any) -> None:
        """Start to copy `size` bytes of the GPU's to the start of a pinned array."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, size, kind, stream)

    def capture_begin(self, stream: Any) -> None:
        """From here on, what this thread puts on the stream is recorded and not run."""
        # Thread-local: other threads may allocate memory meanwhile.
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def capture_end(self, stream: Any) -> Any:
        """End the recording; returns a graph that can be launched. An error ends the recording too."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def graph_launch(self, graph: Any, stream: Any) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def graph_destroy(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def event_create(self) -> Any:
        return self._call("cudaEventCreate")

    def event_destroy(self, event: Any) -> None:
        self._call("cudaEventDestroy", event)

    def event_record(self, event: Any, stream: Any) -> None:
        """Put the event on the stream: it happens when all before it is done."""
        self._call("cudaEventRecord", event, stream)

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Milliseconds on the GPU between two events that have happened."""
        return float(self._call("cudaEventElapsedTime", first, second))

    def free_memory(self) -> int:
        """Bytes of the GPU's memory that nobody holds."""
        return int(self._call("cudaMemGetInfo"))

    def _call(self, function: str, *arguments: Any) -> Any:
        try:
            code, *values = getattr(self._api, function)(*arguments)
        except RuntimeError as error:  # how the bindings say that the driver's library is absent
            raise BackendError(f"CUDA cannot be used here ({_line(error)}); {_NO_GPU}") from error
        if int(code) != 0:
            raise self._error(function, code)
        return values[0] if values else None

    def _error(self, function: str, code: Any) -> BackendError:
        name = getattr(code, "name", str(code))
        if name in _ABSENT:
            return BackendError(_ABSENT[name])
        _, text = self._api.cudaGetErrorString(code)
        self._api.cudaGetLastError()  # or the next call that looks would find this one
        said = text.decode(errors="replace") if isinstance(text, bytes) else name
        return BackendError(f"CUDA reports '{said}' ({name} in {function}); {_REMEDIES.get(name, _NO_GPU)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
