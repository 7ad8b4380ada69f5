"""An ONNX file built into a TensorRT engine.

One module for both TensorRTs (`tensorrt` 10 and 11, `tensorrt_rtx`); precision is what the graph says. Knows
TensorRT's builder and no model; needs neither onnx nor torch, so that a serving machine can rebuild.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.files import atomic_write
from meta_deploy.bundle.manifest import Profile, TensorRTEngine, TensorRTRTXEngine
from meta_deploy.errors import BackendError, EngineError, InputError
from meta_deploy.interrupts import interruptible
from meta_deploy.targets import cache
from meta_deploy.targets.model_file import read_model
from meta_deploy.targets.target import profiles
from meta_deploy.targets.tensorrt import cache as engine_cache
from meta_deploy.targets.tensorrt.build_log import parse_log
from meta_deploy.targets.tensorrt.layers import Layer
from meta_deploy.targets.tensorrt.library import Here, load, logger, module_name, title


@dataclass(frozen=True)
class Engine:
    """What was built.

    Attributes:
        plan: the serialized engine.
        library: tensorrt or tensorrt-rtx.
        version: of that library, which alone can run the plan.
        compute_capabilities: that it was built for, such as "8.9"; empty for all that the library has.
        gpu: the one GPU model that can run it, None where there is no such bond.
        seconds: the build took.
        layers: in their order; empty where the log does not tell.
        memory_mb: Activation and Weights, where the log tells.
    """

    plan: bytes
    library: str
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    seconds: float
    layers: tuple[Layer, ...]
    memory_mb: dict[str, float]

    def section(self) -> TensorRTEngine:
        """The manifest's `engine`: what the runtime checks before it opens the plan, and what is inside."""
        launched = [layer for layer in self.layers if not layer.synchronizes]
        made = TensorRTRTXEngine if self.library == "tensorrt-rtx" else TensorRTEngine
        return made(
            version=self.version,
            gpu=self.gpu,
            compute_capabilities=self.compute_capabilities,
            layers=len(launched) or None,
            generated_kernels=sum(layer.generated for layer in launched) if launched else None,
            fused_attention=sum(layer.attention for layer in launched) if launched else None,
            kernels=_by_kind(launched),
            eight_bits=dict(Counter(layer.eight_bits for layer in launched if layer.eight_bits)),
            activation_mb=self.memory_mb.get("Activation"),
            weights_mb=self.memory_mb.get("Weights"),
            plan_mb=len(self.plan) / 1e6,
            seconds=round(self.seconds, 2),
        )


def _by_kind(layers: Sequence[Layer]) -> dict[str, dict[str, int]]:
    """How many layers of each kind, by the type of what they make."""
    kinds: dict[str, Counter[str]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, Counter())[layer.type] += 1
    return {kind: dict(sorted(kinds[kind].items())) for kind in sorted(kinds)}


def rebuild(bundle: Bundle, progress: Callable[[str], None] = lambda line: None) -> TensorRTEngine:
    """Build a bundle's engine again, from its model.onnx, for this machine; it goes to the engine cache.

    Returns:
        The new engine's section, as in a manifest.

    Raises:
        InputError: there is no such library or GPU here, or no place to keep the engine.
        EngineError: TensorRT refuses the graph.
    """
    here = Here.find(bundle.target)
    progress(f"building an engine for {here.machine.title} on {here.machine.gpu}")
    engine = build_engine(read_model(bundle), bundle.target, profiles(bundle))
    section = engine.section()
    engine_cache.store(bundle, here.machine, engine.plan, section)
    progress(f"built in {engine.seconds:.0f} s")
    return section


def available(library: str) -> bool:
    """Whether a TensorRT can be imported, without importing it."""
    return importlib.util.find_spec(module_name(library)) is not None


def build_engine(
    model: bytes,
    library: str,
    profiles: Sequence[Profile],
    *,
    compute_capabilities: Sequence[str] = (),
    workspace_mb: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Engine:
    """Build an engine for every shape of its inputs that `profiles` allow.

    Ctrl-C stops the build between two of its steps. What the graph asks for beyond one type (bfloat16, INT8)
    is in the graph: networks are strongly typed.

    Args:
        model: an ONNX file's bytes.
        library: tensorrt or tensorrt-rtx.
        profiles: of each input, its least, usual and largest shape.
        compute_capabilities: GPUs to build for, such as ("8.6", "8.9"), for TensorRT-RTX; none for all that
            it knows. `tensorrt` builds for the GPU that is here.
        workspace_mb: the most scratch memory a layer may use, in MB; None for TensorRT's own limit.
        progress: called with (steps done, steps in all) of the phase that takes longest.

    Raises:
        InputError: the library is not installed, cannot be used here, or knows no such GPU.
        EngineError: TensorRT refuses the graph; says which node and why.
    """
    gpu = check_gpus(library, compute_capabilities)
    trt = load(library)
    lines: list[str] = []
    errors: list[str] = []

    def listen(severity: Any, message: str) -> None:
        lines.append(message)
        if severity <= trt.ILogger.ERROR:
            errors.append(" ".join(message.split()))

    with logger(trt).heard(listen):
        builder = trt.Builder(logger(trt))
        network = builder.create_network(_strongly_typed(trt))
        parser = trt.OnnxParser(network, logger(trt))
        if not parser.parse(model):
            raise EngineError(_parse_errors(parser))
        _check_sampling(trt, builder, network)
        config = builder.create_builder_config()
        _set_gpus(trt, config, compute_capabilities)
        if workspace_mb is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 is what is verified
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the log names no kernels
        if any(profile.min != profile.max for profile in profiles):
            config.add_optimization_profile(_profile(builder, profiles))
        with _timing_cache(trt, config, library):
            began = time.perf_counter()
            plan = _build(trt, builder, network, config, progress)
            seconds = time.perf_counter() - began
        if plan is None:
            reason = "; ".join(dict.fromkeys(errors)) or "it gives no reason"
            raise EngineError(f"{title(library)} cannot build the graph: {reason}")
    layers, memory = parse_log(lines)
    return Engine(
        plan=bytes(plan),
        library=library,
        version=trt.__version__,
        compute_capabilities=tuple(compute_capabilities),
        gpu=gpu,
        seconds=seconds,
        layers=layers,
        memory_mb=memory,
    )


def gpu_targets(trt: Any) -> dict[str, Any]:
    """The compute capabilities that a TensorRT-RTX can be told to build for, such as "8.9"."""
    names = dir(getattr(trt, "ComputeCapability", None))
    return {
        f"{n[2:-1]}.{n[-1]}": getattr(trt.ComputeCapability, n) for n in names if re.fullmatch(r"SM\d+", n)
    }


def has_fp8(compute_capability: str) -> bool:
    """Whether GPUs of a compute capability, such as "8.9", multiply 8-bit floats."""
    return tuple(map(int, compute_capability.split("."))) >= (8, 9)


def check_gpus(library: str, wanted: Sequence[str]) -> str | None:
    """Refuse what cannot be built for, or here, before long work.

    Returns:
        The GPU that an engine will be bound to, None where there is no such bond.

    Raises:
        InputError: an unknown compute capability; any for `tensorrt`, or no GPU, which that needs.
    """
    gpu = _gpu_name(library)
    if not wanted:
        return gpu
    trt = load(library)
    if not hasattr(trt.IBuilderConfig, "set_compute_capability"):
        raise InputError("tensorrt builds for the GPU of this machine alone; --gpu is for tensorrt-rtx")
    known = gpu_targets(trt)
    if unknown := [name for name in wanted if name not in known]:
        names = sorted(known, key=lambda name: tuple(map(int, name.split("."))))
        raise InputError(
            f"'{unknown[0]}' is no compute capability that TensorRT-RTX builds for; "
            f"choose from {', '.join(names)}"
        )
    return gpu


def _set_gpus(trt: Any, config: Any, wanted: Sequence[str]) -> None:
    if not wanted:
        return
    known = gpu_targets(trt)
    config.num_compute_capabilities = len(wanted)
    for i, name in enumerate(wanted):
        config.set_compute_capability(known[name], i)


def _strongly_typed(trt: Any) -> int:
    """The network's flags: TensorRT 10 must be told what is the only way since 11."""
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def _profile(builder: Any, profiles: Sequence[Profile]) -> Any:
    profile = builder.create_optimization_profile()
    for given in profiles:
        profile.set_shape(given.name, given.min, given.opt, given.max)
    return profile


def _build(trt: Any, builder: Any, network: Any, config: Any, progress: Callable[[int, int], None]) -> Any:
    """The plan, None where TensorRT fails."""
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    plan = interruptible(lambda: builder.build_serialized_network(network, config), monitor.cancel)
    if monitor.failure is not None:
        raise monitor.failure
    return plan


def _monitor(trt: Any, progress: Callable[[int, int], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Tells the steps of the phase that has most of them, and stops the build when told to."""

        def __init__(self) -> None:
            super().__init__()
            self.cancelled = False
            self.failure: Exception | None = None  # of `progress`, which TensorRT would make a message of
            self.steps: dict[str, int] = {}
            self.longest = ""

        def cancel(self) -> None:
            self.cancelled = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if num_steps >= self.steps.get(self.longest, 0):
                self.longest = phase_name

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.longest:
                try:
                    progress(step + 1, self.steps[phase_name])
                except Exception as error:
                    self.failure, self.cancelled = error, True
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def _gpu_name(library: str) -> str | None:
    """The GPU that an engine of `tensorrt` is bound to; TensorRT-RTX's are not bound to one.

    Raises:
        InputError: there is no GPU, which `tensorrt` needs to build.
    """
    if library == "tensorrt-rtx":
        return None
    try:
        return Here.find(library).machine.gpu
    except BackendError as error:
        raise InputError(
            f"tensorrt builds engines on the GPU that runs them, and here {error}; "
            "use --target tensorrt-rtx, which builds anywhere, or export on the serving machine"
        ) from error


@contextlib.contextmanager
def _timing_cache(trt: Any, config: Any, library: str) -> Iterator[None]:
    """What `tensorrt` measured in earlier builds, kept in the user's cache folder; RTX measures nothing.

    Without a place to keep it, the next build takes longer, and nothing else.
    """
    if library != "tensorrt":
        yield
        return
    path = None
    known = b""
    with contextlib.suppress(OSError, InputError):
        path = cache.make_folder(engine_cache.FOLDER) / f"timing-{trt.__version__}.cache"
        known = path.read_bytes()
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    yield
    if path is not None:
        with contextlib.suppress(OSError, InputError), atomic_write(path) as stream:
            stream.write(bytes(config.get_timing_cache().serialize()))


# A model of one GridSample, mode "linear", of opset 20.
_LINEAR = base64.b64decode(
    "CAkSADpyCigKAXgKAWcSAXkiCkdyaWRTYW1wbGUqEQoEbW9kZSIGbGluZWFyoAEDEgFnWhsKAXgSFgoUCAESEAoCCAEKAggBCgIIAgoC"
    "CAJaGwoBZxIWChQIARIQCgIIAQoCCAEKAggBCgIIAmIJCgF5EgQKAggBQgQKABAU"
)


def _check_sampling(trt: Any, builder: Any, network: Any) -> None:
    """Refuse a GridSample that a parser has misread: TensorRT 10 to 11.1 know the names of its modes from
    before opset 20 alone, and take any other for "nearest" (github.com/NVIDIA/TensorRT/issues/4646).

    Raises:
        EngineError: it samples by the nearest pixel, and the parser is one of these.
    """
    nearest = trt.InterpolationMode.NEAREST
    if nearest in _sampling_modes(trt, network):
        probe = builder.create_network(_strongly_typed(trt))
        trt.OnnxParser(probe, logger(trt)).parse(_LINEAR)
        if nearest in _sampling_modes(trt, probe):
            raise EngineError(
                f"TensorRT {trt.__version__} reads GridSample's mode 'linear' as 'nearest'; "
                "install 11.2 or newer"
            )


def _sampling_modes(trt: Any, network: Any) -> set[Any]:
    """The interpolations of a network's GridSamples."""
    modes = set()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.GRID_SAMPLE:
            layer.__class__ = trt.IGridSampleLayer  # as the Python API wants it for a layer's own attributes
            modes.add(layer.interpolation_mode)
    return modes


def _parse_errors(parser: Any) -> str:
    """One line: the operators that TensorRT does not take, where, and what to do."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    first = errors[0]
    where = f"node '{first.node_name()}' ({first.node_operator()})" if first.node_operator() else "the graph"
    more = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
    return (
        f"TensorRT's parser does not take {where}: {' '.join(first.desc().split())}{more}; "
        "export with other --passes, or for --target onnxruntime"
    )
