"""What each target is: its passes, operators and precisions; and whether this machine can write for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meta_deploy.errors import BackendError, InputError
from meta_deploy.targets.tensorrt.library import MODULES, TITLES, Here, load

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


@dataclass(frozen=True)
class Target:
    """What runs a bundle.

    Attributes:
        pipeline: of graph passes, a key of `passes.PIPELINES`.
        operators: the forms of NMS and RoIAlign that it runs (keys of `operators.TRANSLATIONS`), the one that
            is taken unless asked otherwise first.
        precisions: that are written for it.
        float32_operators: precision -> operators that it has no kernels for in that precision.
    """

    pipeline: str
    operators: tuple[str, ...]
    precisions: tuple[str, ...]
    float32_operators: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# TensorRT samples a map and takes the coordinates in one type, and float16 is too coarse for coordinates.
_TENSORRT = {
    "precisions": ("fp32", "fp16", "bf16"),
    "float32_operators": {"fp16": ("GridSample",), "bf16": ("GridSample", "ConvTranspose")},
}
TARGETS = {
    # ONNX Runtime has no bfloat16 kernels on a CPU.
    "onnxruntime": Target("onnxruntime", ("native", "lowered"), ("fp32", "fp16")),
    # The lowered form has static shapes, which a CUDA graph needs.
    "tensorrt": Target("tensorrt", ("lowered", "native"), **_TENSORRT),  # type: ignore[arg-type]
    # It has no NonMaxSuppression, and its RoiAlign does not build without a GPU.
    "tensorrt-rtx": Target("tensorrt", ("lowered",), **_TENSORRT),  # type: ignore[arg-type]
}


def choose_target(target: str, precision: str) -> tuple[str, str]:
    """The target to write for, and why.

    Raises:
        InputError: the target or precision is unknown, or this version or machine does not write it.
    """
    if target not in ("auto", *TARGETS):
        raise InputError(f"'{target}' is not a target; choose auto, {', '.join(TARGETS)}")
    if precision not in PRECISIONS:
        raise InputError(f"'{precision}' is not a precision; choose {', '.join(PRECISIONS)}")
    chosen, reason = _automatic() if target == "auto" else (target, "asked for")
    written = TARGETS[chosen].precisions
    if precision not in written:
        others = [name for name in TARGETS if precision in TARGETS[name].precisions]
        instead = f"--target {others[-1]}" if others else f"--{written[-1]}"
        raise InputError(f"precision {precision} is not written for {chosen}; use {instead}")
    if chosen in MODULES:
        try:
            load(chosen)
        except BackendError as error:
            elsewhere = "" if chosen == "tensorrt-rtx" else "; --target tensorrt-rtx needs no GPU"
            raise BackendError(f"{error}{elsewhere}") from error
    return chosen, reason


def _automatic() -> tuple[str, str]:
    """TensorRT where it is installed and a GPU is there, else ONNX Runtime."""
    reason = "TensorRT is not installed"
    for name in MODULES:
        try:
            load(name)
        except BackendError:
            continue
        try:
            return name, f"installed, for {Here.find(name).machine.gpu}"
        except BackendError:
            reason = f"{TITLES[name]} is installed, and no GPU can be used"
    return "onnxruntime", reason


def choose_operators(target: str, operators: str | None) -> str:
    """How NMS and RoIAlign are written for a target.

    Raises:
        InputError: the target does not run that form.
    """
    runs = TARGETS[target].operators
    if operators is None:
        return runs[0]
    if operators not in runs:
        raise InputError(f"{target} does not run {operators} operators; use --operators {' or '.join(runs)}")
    return operators
