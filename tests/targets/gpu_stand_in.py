"""Stand-ins for CUDA's bindings and for TensorRT, which compute on the CPU and fail like the real ones.

An engine here is a header and an ONNX model, which ONNX Runtime runs. Streams are lazy: what is put on one
happens when it is synchronized, so that a wait that is missing shows, as does memory used after it was freed.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np

ERRORS = {
    "cudaSuccess": 0,
    "cudaErrorInvalidValue": 1,
    "cudaErrorMemoryAllocation": 2,
    "cudaErrorInsufficientDriver": 35,
    "cudaErrorNoDevice": 100,
    "cudaErrorIllegalAddress": 700,
    "cudaErrorStreamCaptureUnsupported": 900,
}
TEXTS = {"cudaErrorMemoryAllocation": b"out of memory"}


class Code(int):
    """An error code that knows its name, as the bindings' enum does."""

    def __new__(cls, name):
        self = super().__new__(cls, ERRORS[name])
        self.name = name
        return self


def bound(values):
    """A function of the bindings that gives an error code and so many values."""

    def wrap(function):
        @functools.wraps(function)
        def call(self, *arguments):
            with self.lock:
                name = function.__name__
                self.calls.append(name)
                error = self.failures.pop((name, self.calls.count(name)), None)
                if error == "no library":
                    raise RuntimeError("Failed to dlopen libcuda.so.1")
                if error is not None:
                    if name == "cudaStreamEndCapture":
                        self.recording.pop(int(arguments[0]), None)  # the recording ends all the same
                    return (Code(error), *[None] * values)
                try:
                    result = function(self, *arguments)
                except KeyError:  # an address or handle that is not, or is no more
                    return (Code("cudaErrorInvalidValue"), *[None] * values)
                return (Code("cudaSuccess"), result) if values else (Code("cudaSuccess"),)

        return call

    return wrap


class Bindings(ModuleType):
    """`cuda.bindings.runtime`. `fail` lets one of its functions fail, `held` tells what is allocated."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, name="NVIDIA GeForce RTX 4090", capability=(8, 9)):
        super().__init__("cuda.bindings.runtime")
        self.properties = SimpleNamespace(name=name.encode(), major=capability[0], minor=capability[1])
        self.device, self.host, self.streams, self.graphs, self.events = {}, {}, {}, {}, {}
        self.clock = 0.0  # of the GPU, in ms: a copy takes 1, a computation 10
        self.recording = {}  # by stream, what is recorded instead of done
        self.contexts = 0  # of TensorRT's, alive
        self.engines = 0
        self.calls, self.failures = [], {}
        self.lock = threading.RLock()
        self._next = 0x1000000

    def fail(self, function, error="cudaErrorIllegalAddress", nth=1):
        """Let the nth call of a function from now on fail."""
        self.failures[function, self.calls.count(function) + nth] = error

    def held(self):
        """How much of each thing is allocated."""
        counts = {
            name: len(getattr(self, name)) for name in ("device", "host", "streams", "graphs", "events")
        }
        counts |= {"contexts": self.contexts, "engines": self.engines}
        return {name: count for name, count in counts.items() if count}

    def put(self, stream, work):
        """Put work on a stream: recorded, or done when the stream is waited for."""
        stream = int(stream)
        self.recording.get(stream, self.streams[stream]).append(work)

    def _new(self):
        self._next += 0x1000000
        return self._next

    @bound(0)
    def cudaSetDevice(self, index):
        assert index == 0

    @bound(1)
    def cudaGetDeviceProperties(self, index):
        return self.properties

    @bound(1)
    def cudaMalloc(self, size):
        address = self._new()
        self.device[address] = np.full(size, 0xFF, np.uint8)  # float32 NaN, so that stale memory shows
        return address

    @bound(0)
    def cudaFree(self, address):
        del self.device[address]

    @bound(1)
    def cudaHostAlloc(self, size, flags):
        array = np.full(size, 0xFF, np.uint8)
        self.host[array.ctypes.data] = array
        return array.ctypes.data

    @bound(0)
    def cudaFreeHost(self, address):
        del self.host[address]

    @bound(1)
    def cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        handle = self._new()
        self.streams[handle] = []
        return handle

    @bound(0)
    def cudaStreamDestroy(self, stream):
        del self.streams[stream]

    @bound(0)
    def cudaStreamSynchronize(self, stream):
        work, self.streams[stream] = self.streams[stream], []
        for do in work:
            do()

    @bound(0)
    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        on_gpu, pinned = (to, source) if kind == 1 else (source, to)

        def copy():
            device, host = self.device[on_gpu][:size], self.host[pinned][:size]
            assert len(device) == len(host) == size
            self.clock += 1
            np.copyto(*((device, host) if kind == 1 else (host, device)))

        self.put(stream, copy)

    @bound(0)
    def cudaStreamBeginCapture(self, stream, mode):
        assert not self.streams[stream], "work was left on the stream"
        self.recording[stream] = []

    @bound(1)
    def cudaStreamEndCapture(self, stream):
        return self._graph(self.recording.pop(stream))

    @bound(1)
    def cudaGraphInstantiate(self, graph, flags):
        return self._graph(self.graphs[graph])

    def _graph(self, work):
        handle = self._new()
        self.graphs[handle] = work
        return handle

    @bound(0)
    def cudaGraphDestroy(self, graph):
        del self.graphs[graph]

    @bound(0)
    def cudaGraphExecDestroy(self, graph):
        del self.graphs[graph]

    @bound(0)
    def cudaGraphLaunch(self, graph, stream):
        for do in self.graphs[graph]:
            self.put(stream, do)

    @bound(1)
    def cudaEventCreate(self):
        handle = self._new()
        self.events[handle] = None  # has not happened
        return handle

    @bound(0)
    def cudaEventDestroy(self, event):
        del self.events[event]

    @bound(0)
    def cudaEventRecord(self, event, stream):
        assert int(stream) not in self.recording, "an event of another time would be recorded"
        self.events[event] = None

        def happen():
            self.events[event] = self.clock

        self.put(stream, happen)

    @bound(1)
    def cudaEventElapsedTime(self, first, second):
        began, ended = self.events[first], self.events[second]
        assert began is not None, "the event has not happened"
        assert ended is not None, "the event has not happened"
        return ended - began

    def cudaMemGetInfo(self):
        taken = sum(array.size for array in self.device.values())
        return Code("cudaSuccess"), 10**9 - taken, 10**9

    def cudaGetErrorString(self, code):
        return Code("cudaSuccess"), TEXTS.get(code.name, b"an illegal memory access was encountered")

    def cudaGetLastError(self):
        return (Code("cudaSuccess"),)


def engine_bytes(model, spec):
    """An engine for the stand-in: an ONNX model for the inputs of an InputSpec."""
    return engine_of(model, spec.profile)


def engine_of(model, *profiles):
    """An engine for the stand-in: an ONNX model for inputs of these profiles."""
    shapes = {profile.name: [profile.min, profile.opt, profile.max] for profile in profiles}
    return json.dumps({"profiles": shapes}).encode() + b"\n" + model


class Library(ModuleType):
    """`tensorrt`, or with `rtx` `tensorrt_rtx`, on the GPU of the given bindings."""

    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    CudaGraphStrategy = SimpleNamespace(DISABLED=0, WHOLE_GRAPH_CAPTURE=1)

    class IProfiler:
        pass

    class LayerInformationFormat:
        JSON = "json"

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self, bindings, rtx, version="1.7.1"):
        super().__init__("tensorrt_rtx" if rtx else "tensorrt")
        self.bindings, self.rtx, self.__version__ = bindings, rtx, version
        self.loads = 0
        self.layers, self.profiled = {}, 0  # what a profiler is told, and how often it was
        self.refuse = None  # what fails: load, context, address, shape, run, capture
        self.kernels = b"compiled"  # what a runtime cache holds after a run
        self.kernels_found = None
        self.graph_strategy = None
        self.Runtime = lambda logger: Runtime(self, logger)


class Runtime:
    def __init__(self, library, logger):
        self.library, self.logger = library, logger

    def deserialize_cuda_engine(self, data):
        self.logger.log(Library.ILogger.INFO, "Loaded engine size: 1 MiB")
        self.library.loads += 1
        if self.library.refuse == "load" or b"\n" not in data:
            self.logger.log(Library.ILogger.ERROR, "Serialization assertion\nfailed: magic tag")
            self.logger.log(Library.ILogger.ERROR, "a second line")
            return None
        return Engine(self.library, self.logger, data)


class Engine:
    def __init__(self, library, logger, data):
        import onnxruntime

        header, model = data.split(b"\n", 1)
        self.profiles = json.loads(header)["profiles"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.library, self.logger = library, logger
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.values = {**self.inputs, **{value.name: value for value in self.session.get_outputs()}}
        self.num_io_tensors = len(self.values)
        if library.rtx:
            self.create_runtime_config = lambda: RuntimeConfig(library)
        library.bindings.engines += 1

    def __del__(self):
        if hasattr(self, "num_io_tensors"):
            self.library.bindings.engines -= 1

    def get_tensor_name(self, index):
        return list(self.values)[index]

    def get_tensor_mode(self, name):
        return "in" if name in self.inputs else "out"

    def get_tensor_dtype(self, name):
        kinds = {
            "tensor(float)": "FLOAT",
            "tensor(int32)": "INT32",
            "tensor(int64)": "INT64",
            "tensor(double)": "DOUBLE",
        }
        return SimpleNamespace(name=kinds[self.values[name].type])

    def get_tensor_shape(self, name):
        return [size if isinstance(size, int) else -1 for size in self.values[name].shape]

    def get_tensor_profile_shape(self, name, index):
        assert index == 0
        return self.profiles[name]

    def create_engine_inspector(self):
        layers = [{"Name": name, "LayerType": "gemm"} for name in self.library.layers]
        tell = {"json": json.dumps({"Layers": layers})}
        return SimpleNamespace(get_engine_information=tell.get)

    def create_execution_context(self, config=None):
        if self.library.refuse == "context":
            self.logger.log(Library.ILogger.INTERNAL_ERROR, "out of memory for activations")
            return None
        return Context(self, config)


class RuntimeConfig:
    cuda_graph_strategy = 0

    def __init__(self, library):
        self.library = library

    def create_runtime_cache(self):
        return RuntimeCache(self.library)

    def set_runtime_cache(self, cache):
        return True


class RuntimeCache:
    def __init__(self, library):
        self.library = library

    def deserialize(self, blob):
        self.library.kernels_found = bytes(blob)
        return self.library.refuse != "kernels"

    def serialize(self):
        return memoryview(self.library.kernels)


class Context:
    def __init__(self, engine, config):
        self.engine, self.library = engine, engine.library
        self.addresses, self.given, self.shapes = {}, {}, {}
        self.profiler = None
        self.library.graph_strategy = config.cuda_graph_strategy if config else None
        self.library.bindings.contexts += 1

    def __del__(self):
        self.library.bindings.contexts -= 1

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.profiles[name]
        inside = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        if self._refused("shape") or not inside:
            return False
        self.given[name], self.shapes = tuple(shape), {}
        return True

    def _dtype(self, name):
        return {"FLOAT": np.float32, "INT64": np.int64}[self.engine.get_tensor_dtype(name).name]

    def get_tensor_shape(self, name):
        if not self.shapes:  # one input may have been set and another not yet
            arrays = {name: np.zeros(shape, self._dtype(name)) for name, shape in self.given.items()}
            outputs = {name: array.shape for name, array in self._compute(arrays).items()}
            self.shapes = {**self.given, **outputs}
        return self.shapes[name]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return not self._refused("address")

    def execute_async_v3(self, stream):
        bindings = self.library.bindings
        if self._refused("run") or (self._refused("capture") and stream in bindings.recording):
            return False
        assert set(self.addresses) == set(self.engine.values)
        addresses, given = dict(self.addresses), dict(self.given)
        if self.profiler is not None:
            self.library.profiled += 1
            for name, ms in self.library.layers.items():  # slower at first
                self.profiler.report_layer_time(name, ms + 100 * (self.library.profiled == 1))

        def kernels():
            bindings.clock += 10
            memory = bindings.device
            inputs = {}
            for name, shape in given.items():
                dtype = np.dtype(self._dtype(name))
                size = dtype.itemsize * int(np.prod(shape))
                inputs[name] = memory[addresses[name]][:size].view(dtype).reshape(shape)
            for output, array in self._compute(inputs).items():
                flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                memory[addresses[output]][: flat.size] = flat

        bindings.put(stream, kernels)
        return True

    def _compute(self, inputs):
        names = [name for name in self.engine.values if name not in self.engine.inputs]
        return dict(zip(names, self.engine.session.run(names, inputs), strict=True))

    def _refused(self, what):
        if self.library.refuse == what:
            self.engine.logger.log(Library.ILogger.ERROR, f"cannot {what}")
            return True
        return False


def install(monkeypatch, rtx=True, version="1.7.1", **gpu):
    """Put the stand-ins in the place of CUDA's bindings and TensorRT; returns both."""
    bindings = Bindings(**gpu)
    library = Library(bindings, rtx, version)
    package = ModuleType("cuda")
    package.bindings = ModuleType("cuda.bindings")
    package.bindings.runtime = bindings
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", package.bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", bindings)
    monkeypatch.setitem(sys.modules, library.__name__, library)
    return bindings, library
