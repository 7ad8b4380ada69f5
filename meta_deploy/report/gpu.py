"""What runs of an engine take on the GPU: times by CUDA's events, and memory. Knows CUDA and no models."""

from __future__ import annotations

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.report.schema import GpuTime
from meta_deploy.report.statistics import spread
from meta_deploy.targets.tensorrt.backend import TensorRTBackend
from meta_deploy.targets.tensorrt.cuda import Cuda


class Gauge:
    """A bundle's engine on the GPU, whose runs are timed there. `backend` is opened."""

    def __init__(self, bundle: Bundle) -> None:
        """Open the engine. Raises BackendError: as `TensorRTBackend`."""
        self._cuda = Cuda()
        self._free = self._cuda.free_memory()
        self.backend = TensorRTBackend(bundle, timed=True)
        self._kept: list[tuple[float, float, float]] = []

    def take(self) -> tuple[float, float, float]:
        """Milliseconds of the runs since the last call: copying in, computing, copying out."""
        return self.backend.take_gpu_ms()

    def keep(self, took: tuple[float, float, float]) -> None:
        """Have a round count."""
        self._kept.append(took)

    def told(self) -> GpuTime | None:
        """The rounds that count; None where there are none."""
        if not self._kept:
            return None
        to_device, compute, to_host = map(spread, np.array(self._kept).T)
        taken = (self._free - self._cuda.free_memory()) / 1e6
        return GpuTime(to_device=to_device, compute=compute, to_host=to_host, memory_mb=taken)
