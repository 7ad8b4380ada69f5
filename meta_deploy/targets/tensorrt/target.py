"""TensorRT and TensorRT-RTX as targets: an engine beside the graph it was built from.

Says what is done; building and running are the other modules'. Imports no library before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import Engine, Profile, TensorRTEngine
from meta_deploy.errors import BackendError, InputError
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.graph.prices import GPU
from meta_deploy.targets.target import (
    MODEL,
    Backend,
    BuildOptions,
    Built,
    Estimate,
    Runner,
    Target,
    TritonBackend,
    open_model_file,
)
from meta_deploy.targets.tensorrt.library import Here, load

ENGINE = "model.engine"
LAYERS = "layers.json"  # what the engine consists of, for people and meta-report
_MAX_WORKSPACE_MB = 2**43 - 1  # bytes are 63 bits and a sign
_SPEEDUP = 2  # of an 8-bit product over one in float16
_BYTES = 2  # of a number that GPU's prices are for
_MACS_A_MS = 15e9  # that GPU's prices are in
_INT8 = EightBitRules(
    signed=True,
    results=False,
    biases=False,
    speedup=_SPEEDUP,
    value=GPU.value / 2,
    node=GPU.node,
    rest="fp16",
    factors=True,
)


class TensorRT(Target):
    """Either library. Engines of `tensorrt` are bound to a GPU model; `tensorrt-rtx` builds without one."""

    passes = (
        *("clean-up", "plain-attention", "plain-einsum", "fuse-layer-norm", "share-norms"),
        *("fold-batch-norm", "merge-siblings", "gather-rows"),
        *("slices-to-split", "collapse-chains", "convolve-linears", "move-linears", "collapse-chains"),
        *("fold-scales", "order-tokens", "stack-attention"),
        *("fold-branches", "distribute-sums", "join-kernels", "flatten-concats", "collapse-chains"),
    )
    required_passes = ("clean-up",)  # the parser does not take all that PyTorch exports
    prices = GPU
    precisions = ("fp32", "fp16", "bf16", "int8", "fp8")
    # A map is sampled at coordinates of its own type, and float16 is too coarse for coordinates.
    float32_operators = {"fp16": ("GridSample",), "bf16": ("GridSample", "ConvTranspose")}  # noqa: RUF012
    eight_bits = {"int8": _INT8, "fp8": replace(_INT8, number="fp8")}  # noqa: RUF012
    rounds_each_operator = True
    backends = ("tensorrt", "cuda", "onnxruntime", "openvino")
    automatic = ("tensorrt", "cuda", "onnxruntime")
    builds = bounded = estimates = True
    gpu_only = ("bf16",)
    last_resort = "on a CPU a bundle made for onnxruntime is several times faster"

    def __init__(
        self,
        name: str,
        title: str,
        operators: tuple[str, ...],
        doubtful: tuple[str, ...] = (),
        triton: TritonBackend | None = None,
    ):
        self.name, self.title, self.operators, self.doubtful = name, title, operators, doubtful
        self.triton = triton

    def offer(self) -> tuple[bool, str]:
        try:
            load(self.name)
        except BackendError:
            return False, ""
        try:
            return True, f"installed, for {Here.find(self.name).machine.gpu}"
        except BackendError:
            return False, f"{self.title} is installed, and no GPU can be used"

    def check(self, options: BuildOptions) -> None:
        from meta_deploy.targets.tensorrt.build import check_gpus, has_fp8

        try:
            load(self.name)
        except BackendError as error:
            elsewhere = "" if self.name == "tensorrt-rtx" else "; --target tensorrt-rtx needs no GPU"
            raise BackendError(f"{error}{elsewhere}") from error
        check_gpus(self.name, options.gpus)
        if options.precision == "fp8":
            here = () if self.name == "tensorrt-rtx" else (Here.find(self.name).machine.compute_capability,)
            if old := [gpu for gpu in options.gpus or here if not has_fp8(gpu)]:
                raise InputError(
                    f"fp8 needs compute capability 8.9 or more, not {old[0]}; use --int8 or --fp16"
                )
        if options.workspace_mb is not None and not 1 <= options.workspace_mb <= _MAX_WORKSPACE_MB:
            raise InputError(
                f"--workspace must be from 1 to {_MAX_WORKSPACE_MB} MB, not {options.workspace_mb}; "
                "leave it out for TensorRT's own limit"
            )

    def build(
        self,
        model: bytes,
        profiles: Sequence[Profile],
        options: BuildOptions,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Built:
        from meta_deploy.targets.tensorrt.build import build_engine
        from meta_deploy.targets.tensorrt.layers import to_json

        engine = build_engine(
            model,
            self.name,
            profiles,
            compute_capabilities=self._gpus(options),
            workspace_mb=options.workspace_mb,
            progress=progress,
        )
        section = msgspec.structs.replace(engine.section(), attention=options.attention)
        files = {MODEL: model, ENGINE: engine.plan}
        if engine.layers:
            files[LAYERS] = to_json(engine.layers)
        return Built(files, section)

    def runner(self, built: Built, profiles: Sequence[Profile], precision: str) -> Runner | None:
        from meta_deploy.targets.tensorrt.backend import EngineRun

        assert isinstance(built.engine, TensorRTEngine)
        try:
            if Here.find(self.name).machine.misfit(built.engine) is not None:
                return None
            return EngineRun(built.files[ENGINE], self.name)
        except BackendError:  # no GPU, or one that this library does not know or whose memory is taken
            return None

    def figures(self, section: Engine | None) -> dict[str, Any]:
        assert isinstance(section, TensorRTEngine)
        names = ("layers", "activation_mb", "plan_mb")
        return {name: getattr(section, name) for name in names} if section.layers else {}

    def _gpus(self, options: BuildOptions) -> Sequence[str]:
        """The compute capabilities to build for; TensorRT-RTX would refuse fp8 for all that it knows."""
        from meta_deploy.targets.tensorrt.build import gpu_targets, has_fp8

        if options.gpus or options.precision != "fp8" or self.name != "tensorrt-rtx":
            return options.gpus
        return sorted(filter(has_fp8, gpu_targets(load(self.name))))

    def estimate(self, built: Built) -> Estimate:
        from meta_deploy.targets.tensorrt.layers import read_json

        section = built.engine
        assert isinstance(section, TensorRTEngine)
        if LAYERS not in built.files:
            raise InputError(f"{self.title}'s log does not tell what it builds; use --no-search")
        layers = read_json(built.files[LAYERS], "the engine that it built")
        launched = [layer for layer in layers if not layer.synchronizes]
        macs = sum(layer.macs / (_SPEEDUP if layer.eight_bits else 1) for layer in launched)
        moved = GPU.value * sum(layer.bytes for layer in launched) / _BYTES
        return Estimate(
            ms=(GPU.node * len(launched) + moved + macs) / _MACS_A_MS,
            layers=len(launched),
            fused_attention=section.fused_attention or 0,
            eight_bits=sum(section.eight_bits.values()),
            activation_mb=section.activation_mb,
            weights_mb=section.weights_mb,
        )

    def describe(self, section: Engine) -> str:
        assert isinstance(section, TensorRTEngine)
        gpus = section.gpu or ", ".join(section.compute_capabilities) or "all its GPUs"
        line = f"engine of {section.library} {section.version} for {gpus}: "
        if section.layers is None:
            return f"{line}{section.plan_mb:.1f} MB (its log does not tell what is inside)"
        low = "".join(f"{n} products in {name}, " for name, n in section.eight_bits.items())
        return (
            f"{line}{section.layers} layers, {section.fused_attention} of {section.attention} attentions "
            f"fused, {low}{section.activation_mb:.0f} MB activations, {section.weights_mb:.0f} MB weights"
        )

    def open(self, bundle: Bundle, backend: str, threads: int | None) -> Backend:
        if backend == "tensorrt":
            from meta_deploy.targets.tensorrt.backend import TensorRTBackend

            return TensorRTBackend(bundle)
        if backend in ("onnxruntime", "openvino") and bundle.precision in self.gpu_only:
            raise BackendError(
                f"bundle '{bundle.path}' is {bundle.precision}, and on a CPU its graph does not run in that; "
                "use --backend tensorrt on a GPU, or export with --fp16 or --fp32 for a CPU"
            )
        return open_model_file(bundle, backend, threads)

    def rebuild(self, bundle: Bundle, log: Callable[[str], None] = lambda line: None) -> None:
        from meta_deploy.targets.tensorrt.backend import misfit
        from meta_deploy.targets.tensorrt.build import rebuild

        reason = misfit(bundle)
        if reason is None:
            log("there is nothing to rebuild: the engine fits this machine")
        else:
            log(f"building an engine for this machine, since {reason}")
            rebuild(bundle, log)


TARGETS = (
    # The lowered form has static shapes, which a CUDA graph needs. Building takes minutes: none in doubt.
    TensorRT(
        *("tensorrt", "TensorRT", ("lowered", "native")),
        triton=TritonBackend("tensorrt", ENGINE, "KIND_GPU"),
    ),
    # It has no NonMaxSuppression, and its RoiAlign does not build without a GPU.
    TensorRT(
        *("tensorrt-rtx", "TensorRT-RTX", ("lowered",)),
        doubtful=(
            *("move-linears", "gather-rows", "merge-siblings", "fold-branches", "distribute-sums"),
            *("convolve-linears", "join-kernels"),
        ),
    ),
)
