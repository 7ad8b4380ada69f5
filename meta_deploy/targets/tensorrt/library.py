"""The two TensorRTs as one: which is installed, on which GPU, its log, and whether an engine fits them.

Knows the libraries' names and versions; must not know bundles' files nor how an engine is run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from meta_deploy.bundle.manifest import TensorRTEngine
from meta_deploy.errors import BackendError
from meta_deploy.targets.tensorrt.cuda import Cuda

_LONGEST_REASON = 300


def module_name(library: str) -> str:
    """What Python calls a library: tensorrt or tensorrt-rtx."""
    return library.replace("-", "_")


def title(library: str) -> str:
    """What people call it."""
    return "TensorRT-RTX" if library == "tensorrt-rtx" else "TensorRT"


@dataclass(frozen=True)
class Machine:
    """What an engine is built for: the library (tensorrt or tensorrt-rtx), its version, and the GPU."""

    library: str
    version: str
    gpu: str
    compute_capability: str

    @property
    def title(self) -> str:
        return f"{title(self.library)} {self.version}"

    def misfit(self, engine: TensorRTEngine) -> str | None:
        """Why an engine with this section of a manifest cannot run here, in a few words; None: it can."""
        if engine.library != self.library or engine.version != self.version:
            built = f"{title(engine.library)} {engine.version}"
            return f"it was built with {built}, and here is {self.title}"
        # TensorRT's engines are for one GPU model; of TensorRT-RTX's the compute capability decides.
        if self.library == "tensorrt" and engine.gpu not in (None, self.gpu):
            return f"it was built on {engine.gpu}, and here is {self.gpu}"
        built_for = engine.compute_capabilities
        if built_for and self.compute_capability not in built_for:
            wanted = " and ".join(built_for)
            return (
                f"it was built for compute capability {wanted}, and {self.gpu} has {self.compute_capability}"
            )
        return None


@dataclass(frozen=True)
class Here:
    """An installed library with the GPU beneath it."""

    trt: Any
    cuda: Cuda
    machine: Machine

    @classmethod
    def find(cls, target: str) -> Here:
        """The library of a target and the GPU of this machine.

        Raises:
            BackendError: the library or CUDA's bindings are not installed, or there is no GPU or driver.
        """
        trt = load(target)
        cuda = Cuda()
        return cls(trt, cuda, Machine(target, trt.__version__, cuda.name, cuda.compute_capability))


def load(target: str) -> Any:
    """Import the library of a target, tensorrt or tensorrt-rtx. Raises BackendError where it is not."""
    try:
        return importlib.import_module(module_name(target))
    except Exception as error:  # a broken installation raises anything; OSError: a native library is missing
        reason = " ".join(str(error).split())
        raise BackendError(
            f"{title(target)} cannot be imported ({reason}); pip install {target}, or use onnxruntime"
        ) from error


@functools.cache
def logger(trt: Any) -> Any:
    """The library's one logger (it takes one in a process and ignores others). It prints nothing.

    `heard(listener)` is a context manager in which `listener(severity, message)` gets every message.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.listeners: list[Callable[[Any, str], None]] = []

        def log(self, severity: Any, message: str) -> None:
            for listener in list(self.listeners):
                listener(severity, message)

        @contextlib.contextmanager
        def heard(self, listener: Callable[[Any, str], None]) -> Iterator[None]:
            self.listeners.append(listener)
            try:
                yield
            finally:
                self.listeners.remove(listener)

    return Log()


@contextlib.contextmanager
def errors(trt: Any) -> Iterator[Callable[[], str]]:
    """Within it, a function that gives the first error that the library logged since, on one line."""
    found: list[str] = []
    severe = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

    def listen(severity: Any, message: str) -> None:
        if severity in severe:
            found.append(" ".join(message.split())[:_LONGEST_REASON])

    with logger(trt).heard(listen):
        yield lambda: found[0] if found else "it gives no reason"
