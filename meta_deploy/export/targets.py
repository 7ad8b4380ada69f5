"""What each target is, and whether this machine and this version can write for it."""

from __future__ import annotations

from importlib.util import find_spec

from meta_deploy.errors import InputError

TARGETS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


def choose_target(target: str, precision: str) -> tuple[str, str]:
    """The target to write for, and why.

    Raises:
        InputError: the target or precision is unknown, or this version does not write it.
    """
    if target not in ("auto", *TARGETS):
        raise InputError(f"'{target}' is not a target; choose auto, {', '.join(TARGETS)}")
    if precision not in PRECISIONS:
        raise InputError(f"'{precision}' is not a precision; choose {', '.join(PRECISIONS)}")
    if target in ("tensorrt", "tensorrt-rtx"):
        raise InputError(
            f"target {target} is not written by this version yet; use --target onnxruntime, "
            "whose model.onnx TensorRT's own tools can read"
        )
    if precision != "fp32":
        raise InputError(f"precision {precision} is not written by this version yet; use --fp32")
    if target == "auto":
        found = "tensorrt is installed, but this version does not write engines yet"
        return "onnxruntime", found if find_spec("tensorrt") else "TensorRT is not installed"
    return target, "asked for"
