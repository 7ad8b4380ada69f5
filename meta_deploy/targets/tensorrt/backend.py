"""TensorRT and TensorRT-RTX: a bundle's engine on an NVIDIA GPU.

Knows engines, buffers and streams; must not know how engines are built, nor tasks beyond the contract.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import Profile, TensorRTEngine
from meta_deploy.errors import BackendError
from meta_deploy.targets.contract import Contract, Value
from meta_deploy.targets.target import Backend
from meta_deploy.targets.tensorrt import cache as engine_cache
from meta_deploy.targets.tensorrt.cuda import Cuda
from meta_deploy.targets.tensorrt.layers import Layer, read_json
from meta_deploy.targets.tensorrt.library import Here, Machine, errors, logger
from meta_deploy.targets.tensorrt.target import ENGINE

# TensorRT's names of types, where numpy has the same.
_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
_CLOSED = "the back end is closed; open the predictor again"


class TensorRTBackend(Backend):
    """A bundle's engine, or the one rebuilt from it for this machine, with buffers for its largest input."""

    name = "tensorrt"

    def __init__(self, bundle: Bundle, timed: bool = False):
        """Load the engine onto the GPU and run it once, so that what can fail fails here.

        Args:
            bundle: with an engine.
            timed: have `take_gpu_ms` tell the times of runs.

        Raises:
            BackendError: the bundle has no engine, none that fits this machine, no library, GPU or memory.
            BundleError: the engine's file is missing or altered.
        """
        here = _find_here(bundle)
        self.runs_on = f"{here.machine.title} on {here.machine.gpu}"
        sha256, read = _source(bundle, here.machine)
        contract = Contract(bundle, ENGINE)
        with contextlib.ExitStack() as stack:
            load = partial(_deserialize, read, here, contract.what)
            engine = stack.enter_context(_ENGINES.borrow((sha256, here.machine.title), load))
            contract.check(*_values(engine, here.trt))
            contract.check_range(_profiles(engine, here.trt))
            self._contract = contract
            self._runner = _Runner(engine, here, sha256, contract.what, contract.outputs, stack, timed)
            # Also runs when the last reference goes, and before the interpreter ends.
            self._free = weakref.finalize(self, stack.pop_all().close)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._contract.check_inputs(inputs)
        outputs = self._runner.run(inputs)
        self._contract.check_outputs(inputs, outputs)
        return outputs

    def take_gpu_ms(self) -> tuple[float, float, float]:
        """What the runs since the last call took on the GPU, by CUDA's events: copying in, computing, copying
        out; zeros without `timed`."""
        with self._runner.lock:
            took, self._runner.gpu_ms = self._runner.gpu_ms, (0.0, 0.0, 0.0)
        return took

    def layers(self) -> tuple[Layer, ...]:
        """The engine's layers, by its inspector. Raises InputError: it does not tell them."""
        return self._runner.layers()

    def layer_times(self, inputs: Mapping[str, np.ndarray], runs: int) -> list[dict[str, float]]:
        """Milliseconds of each layer in each run, by name as they ran, by TensorRT's profiler.

        Layers wait for each other here, which they need not do else.

        Raises:
            BackendError: TensorRT does not tell.
        """
        self._contract.check_inputs(inputs)
        return self._runner.layer_times(inputs, runs)

    def close(self) -> None:
        with self._runner.lock:
            self._free()


class EngineRun:
    """An engine that was just built, on the GPU: inputs by name to outputs by name.

    Attributes:
        runs_on: library, version and GPU, for people.
    """

    def __init__(self, plan: bytes, library: str):
        """Load the engine and run it once.

        Raises:
            BackendError: no library or GPU, or the engine does not load there or run.
        """
        here, what = Here.find(library), "the engine that it built"
        self.runs_on = f"{here.machine.title} on {here.machine.gpu}"
        sha256 = hashlib.sha256(plan).hexdigest()
        with contextlib.ExitStack() as stack:
            load = partial(_deserialize, lambda: plan, here, what)
            engine = stack.enter_context(_ENGINES.borrow((sha256, here.machine.title), load))
            inputs, outputs = _values(engine, here.trt)
            self._inputs = list(inputs)
            self._runner = _Runner(engine, here, sha256, what, list(outputs), stack)
            weakref.finalize(self, stack.pop_all().close)

    def __call__(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises BackendError: the inputs' shapes are out of its range, or CUDA fails."""
        return self._runner.run({name: feed[name] for name in self._inputs})


def gpu_name() -> str | None:
    """The GPU that engines run on; None where there is none, or no driver or bindings for it."""
    try:
        return Cuda().name
    except BackendError:
        return None


def misfit(bundle: Bundle) -> str | None:
    """Why no engine for this machine is there, the bundle's or a rebuilt one; None where there is one.

    Raises:
        BackendError: the bundle has no engine, or the library or the GPU is not here.
    """
    machine = _find_here(bundle).machine
    reason = _misfit(bundle, machine)
    return reason if reason is not None and engine_cache.find(bundle, machine) is None else None


def inspect(plan: bytes, what: str) -> tuple[str, str, tuple[Layer, ...]]:
    """What an engine's file alone tells on a GPU: its library, that one's version, and its layers.

    Raises:
        BackendError: neither library can open it here; the message is the last one's.
        InputError: it does not tell its layers.
    """
    failure = BackendError(f"no TensorRT can open {what}")
    for library in ("tensorrt", "tensorrt-rtx"):
        try:
            here = Here.find(library)
            loaded = _deserialize(lambda: plan, here, what)
        except BackendError as error:
            failure = error
            continue
        return library, here.machine.version, _layers(loaded.engine, here.trt, what)
    raise failure


def _layers(engine: Any, trt: Any, what: str) -> tuple[Layer, ...]:
    inspector = engine.create_engine_inspector()
    return read_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON).encode(), what)


def _find_here(bundle: Bundle) -> Here:
    if not isinstance(bundle.engine, TensorRTEngine):
        raise BackendError(
            f"bundle '{bundle.path}' is made for {bundle.target} and holds no engine; "
            "export it with --target tensorrt or tensorrt-rtx"
        )
    return Here.find(bundle.target)


def _misfit(bundle: Bundle, machine: Machine) -> str | None:
    assert isinstance(bundle.engine, TensorRTEngine)  # the manifest was validated
    return machine.misfit(bundle.engine)


def _source(bundle: Bundle, machine: Machine) -> tuple[str, Callable[[], bytes]]:
    """The sha256 of the engine to use, and what reads it."""
    reason = _misfit(bundle, machine)
    if reason is None:
        if ENGINE not in bundle.manifest.files:
            raise BackendError(f"bundle '{bundle.path}' holds no {ENGINE}; export it again")
        return bundle.manifest.files[ENGINE].sha256, lambda: bundle.read(ENGINE)
    found = engine_cache.find(bundle, machine)
    if found is None:
        raise BackendError(
            f"the engine of bundle '{bundle.path}' does not fit this machine: {reason}; "
            "build one for it with meta-infer --rebuild"
        )
    data, sha256 = found
    return sha256, lambda: data


@dataclass(frozen=True)
class _Loaded:
    """An engine, and the runtime object that has to outlive it."""

    runtime: Any
    engine: Any


class _Engines:
    """The engines on the GPU, each once however many back ends run it, freed with the last of them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the garbage collector may free one back end while another loads
        self._held: dict[tuple[str, str], _Loaded] = {}
        self._users: dict[tuple[str, str], int] = {}

    @contextlib.contextmanager
    def borrow(self, key: tuple[str, str], load: Callable[[], _Loaded]) -> Iterator[Any]:
        """The engine called `key`, loaded if nobody has it. Raises what `load` raises."""
        with self._lock:
            self._users[key] = self._users.get(key, 0) + 1
        try:
            with self._lock:
                if key not in self._held:
                    self._held[key] = load()
                loaded = self._held[key]
            yield loaded.engine
        finally:
            with self._lock:
                self._users[key] -= 1
                if not self._users[key]:
                    del self._users[key]
                    self._held.pop(key, None)


_ENGINES = _Engines()


def _deserialize(read: Callable[[], bytes], here: Here, what: str) -> _Loaded:
    with errors(here.trt) as reason:
        runtime = here.trt.Runtime(logger(here.trt))
        engine = runtime.deserialize_cuda_engine(read())
        if engine is None:
            raise BackendError(
                f"{here.machine.title} cannot load {what}: {reason()}; export it again, "
                "or use --backend onnxruntime"
            )
    return _Loaded(runtime, engine)


def _names(engine: Any) -> list[str]:
    return [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]


def _values(engine: Any, trt: Any) -> tuple[dict[str, Value], dict[str, Value]]:
    """The engine's inputs and outputs."""
    inputs: dict[str, Value] = {}
    outputs: dict[str, Value] = {}
    for name in _names(engine):
        kind = engine.get_tensor_dtype(name).name
        shape = [None if size == -1 else int(size) for size in engine.get_tensor_shape(name)]
        side = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
        side[name] = Value(_TYPES.get(kind, kind), shape)
    return inputs, outputs


def _profiles(engine: Any, trt: Any) -> dict[str, Profile]:
    """The shapes that each input takes; an engine of ours has one optimization profile."""
    found = {}
    for name in _names(engine):
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            shape = engine.get_tensor_shape(name)
            shapes = [shape] * 3 if min(shape, default=0) >= 0 else engine.get_tensor_profile_shape(name, 0)
            found[name] = Profile(name, *(tuple(map(int, shape)) for shape in shapes))
    return found


@dataclass(frozen=True)
class _Buffer:
    """Room for a tensor at its largest, on the GPU and in pinned memory."""

    dtype: np.dtype
    device: int
    host: np.ndarray

    def view(self, shape: tuple[int, ...]) -> np.ndarray:
        """The pinned memory as an array of this shape."""
        return self.host[: self.size(shape)].view(self.dtype).reshape(shape)

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape."""
        return math.prod(shape) * self.dtype.itemsize


def _watch(trt: Any) -> Any:
    class Watch(trt.IProfiler):
        """Gathers the times of a run's layers."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name] = self.times.get(layer_name, 0.0) + ms

    return Watch()


class _Kernels:
    """The kernels that TensorRT-RTX compiles for this GPU while it runs an engine, kept between processes."""

    def __init__(self, config: Any, sha256: str, machine: Machine):
        """Let contexts made with `config` start with what is kept for the engine of this sha256."""
        self._where = sha256, machine
        self._kept = engine_cache.find_kernels(*self._where)
        self._cache = config.create_runtime_cache()
        if self._kept is not None and not self._cache.deserialize(self._kept):
            self._kept = None  # of another driver, say: begin anew
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Store them, unless there are none but those that were found."""
        compiled = self._cache.serialize()
        if compiled is not None and bytes(compiled) != self._kept:
            engine_cache.store_kernels(*self._where, bytes(compiled))


class _Runner:
    """An execution context with its stream, buffers and CUDA graph; one run at a time.

    All that must be given back goes onto the `stack`, which the caller closes, under `lock` if others run.
    """

    def __init__(
        self,
        engine: Any,
        here: Here,
        sha256: str,
        what: str,
        promised: Iterable[str],
        stack: contextlib.ExitStack,
        timed: bool = False,
    ):
        """`what` is the engine in messages; `promised` are the outputs that runs give."""
        self.lock = threading.Lock()
        self._trt, self._cuda, self._machine, self._what = here.trt, here.cuda, here.machine, what
        self._profiles = _profiles(engine, here.trt)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._graph: Any = None
        self._stream = self._cuda.stream_create()
        stack.callback(_quietly, self._cuda.stream_destroy, self._stream)
        self.gpu_ms = 0.0, 0.0, 0.0
        self._events = [self._event(stack) for _ in range(4)] if timed else []
        config = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        self._own_graphs = hasattr(config, "cuda_graph_strategy")  # TensorRT-RTX, and for every shape
        kernels = _Kernels(config, sha256, here.machine) if hasattr(config, "create_runtime_cache") else None
        self._context: Any = self._make_context(engine, config)
        stack.callback(self._drop)
        if kernels is not None:
            stack.callback(kernels.keep)
        self._outputs = [name for name in _names(engine) if name not in self._profiles]
        largest = {name: profile.max for name, profile in self._profiles.items()}
        self._set_shapes(largest)
        self._buffers = {name: self._allocate(engine, name, stack) for name in _names(engine)}
        # Whatever went wrong before: nothing on the stream may use memory that is freed next.
        stack.callback(self._destroy_graph)
        stack.callback(_quietly, self._cuda.synchronize, self._stream)
        stack.callback(_quietly, self._cuda.activate)
        self._run({name: np.zeros(shape, self._buffers[name].dtype) for name, shape in largest.items()})
        static = all(profile.min == profile.max for profile in self._profiles.values())
        if static and not self._own_graphs:
            self._capture()
        self._promised = promised

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, for inputs of shapes that the engine takes. Raises BackendError: closed, CUDA."""
        with self.lock:
            if self._context is None:
                raise BackendError(_CLOSED)
            self._cuda.activate()
            try:
                self._run(inputs)
            except BaseException:
                # What was begun may still write to the buffers that the next run uses.
                _quietly(self._cuda.synchronize, self._stream)
                raise
            return {name: self._buffers[name].view(self._shape_of(name)).copy() for name in self._promised}

    def layers(self) -> tuple[Layer, ...]:
        """As the back end's."""
        with self.lock:
            if self._context is None:
                raise BackendError(_CLOSED)
            return _layers(self._context.engine, self._trt, self._what)

    def layer_times(self, inputs: Mapping[str, np.ndarray], runs: int) -> list[dict[str, float]]:
        """As the back end's, in an execution context of its own: under a profiler no graph is launched."""
        with self.lock:
            if self._context is None:
                raise BackendError(_CLOSED)
            self._cuda.activate()
            self._run(inputs)  # leaves them on the GPU
            engine = self._context.engine
            config = (engine.create_runtime_config(),) if self._own_graphs else ()
            context = engine.create_execution_context(*config)
            if context is None:
                raise BackendError(f"{self._machine.title} has no memory left to profile {self._what}")
            watch = _watch(self._trt)
            context.profiler = watch
            for name, array in inputs.items():
                self._require(partial(context.set_input_shape, name, array.shape), "take the shape of")
            for name, buffer in self._buffers.items():
                self._require(partial(context.set_tensor_address, name, buffer.device), "run")
            found = []
            for _ in range(1 + runs):  # what is slow the first time does not count
                watch.times = {}
                self._require(lambda: context.execute_async_v3(int(self._stream)), "run")
                self._cuda.synchronize(self._stream)
                found.append(watch.times)
            if not found[-1]:
                raise BackendError(f"{self._machine.title} tells no times of layers")
            return found[1:]

    def _make_context(self, engine: Any, config: Any) -> Any:
        if self._own_graphs:
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        with errors(self._trt) as reason:
            given = () if config is None else (config,)
            context = engine.create_execution_context(*given)
            if context is None:
                raise BackendError(
                    f"{self._machine.title} cannot prepare {self._what}: {reason()}; close what else uses "
                    "the GPU, or use --backend onnxruntime"
                )
        return context

    def _allocate(self, engine: Any, name: str, stack: contextlib.ExitStack) -> _Buffer:
        kind = engine.get_tensor_dtype(name).name
        if kind not in _TYPES:
            raise BackendError(f"{self._what} has '{name}' as {kind}, which numpy lacks; export it again")
        dtype = np.dtype(_TYPES[kind])
        size = max(math.prod(self._shape_of(name)) * dtype.itemsize, 1)
        device = self._cuda.malloc(size)
        stack.callback(_quietly, self._cuda.free, device)
        host = self._cuda.host_alloc(size)
        stack.callback(_quietly, self._cuda.host_free, host)
        self._require(lambda: self._context.set_tensor_address(name, device), "run")
        return _Buffer(dtype, device, host)

    def _set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if shapes != self._shapes:
            self._shapes = {}  # should the next lines fail, what the context holds is not known
            for name, shape in shapes.items():
                self._require(partial(self._context.set_input_shape, name, shape), "take the shape of")
            self._shapes = dict(shapes)

    def _shape_of(self, name: str) -> tuple[int, ...]:
        shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise BackendError(
                f"{self._what} gives '{name}' of a shape that its input does not settle; export it again"
            )
        return shape

    def _event(self, stack: contextlib.ExitStack) -> Any:
        event = self._cuda.event_create()
        stack.callback(_quietly, self._cuda.event_destroy, event)
        return event

    def _mark(self, index: int) -> None:
        """Note on the stream how far the run is, where it is timed."""
        if self._events:
            self._cuda.event_record(self._events[index], self._stream)

    def _run(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Copy in, compute, copy out, wait."""
        self._set_shapes({name: array.shape for name, array in inputs.items()})
        for name, array in inputs.items():
            np.copyto(self._buffers[name].view(array.shape), array)
        self._mark(0)
        for name, array in inputs.items():
            given = self._buffers[name]
            self._cuda.to_device(given.device, given.host, given.size(array.shape), self._stream)
        self._mark(1)
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.graph_launch(self._graph, self._stream)
        self._mark(2)
        for name in self._outputs:
            buffer = self._buffers[name]
            self._cuda.to_host(buffer.host, buffer.device, buffer.size(self._shape_of(name)), self._stream)
        self._mark(3)
        self._cuda.synchronize(self._stream)
        if self._events:
            a, b, c = (self._cuda.elapsed_ms(*pair) for pair in itertools.pairwise(self._events))
            self.gpu_ms = self.gpu_ms[0] + a, self.gpu_ms[1] + b, self.gpu_ms[2] + c

    def _enqueue(self) -> None:
        self._require(lambda: self._context.execute_async_v3(int(self._stream)), "run")

    def _capture(self) -> None:
        """Record the computation as a CUDA graph. Where it cannot be one, each run is enqueued: slower."""
        try:
            self._cuda.capture_begin(self._stream)
            try:
                self._enqueue()
            finally:
                self._graph = self._cuda.capture_end(self._stream)
        except BackendError:
            self._destroy_graph()

    def _destroy_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            _quietly(self._cuda.graph_destroy, graph)

    def _require(self, call: Callable[[], bool], verb: str) -> None:
        with errors(self._trt) as reason:
            if not call():
                raise BackendError(
                    f"{self._machine.title} cannot {verb} {self._what}: {reason()}; check the GPU with "
                    "nvidia-smi, or use --backend onnxruntime"
                )

    def _drop(self) -> None:
        self._context = None


def _quietly(free: Callable[..., None], *arguments: Any) -> None:
    """Give something back. After an error of CUDA's this fails too, and that error has been told."""
    with contextlib.suppress(BackendError):
        free(*arguments)
