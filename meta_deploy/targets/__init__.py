"""What runs a bundle: one file or folder a target. `TARGETS` holds them, each imported when it is asked for.

Imports the standard library alone, so that `--help` stays instant: a target's own library, and numpy, are
imported when a bundle is built or opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from meta_deploy.errors import BackendError, InputError

if TYPE_CHECKING:
    from meta_deploy.bundle.bundle import Bundle
    from meta_deploy.targets.target import Backend, Target

# Each name, and the module whose TARGETS has the object.
_MODULES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt.target",
    "tensorrt-rtx": "tensorrt.target",
}
TARGET_NAMES = ("auto", *_MODULES)
BACKEND_NAMES = ("auto", "onnxruntime", "openvino", "cuda", "tensorrt")


class _Targets(Mapping[str, "Target"]):
    """The targets by name, in the order of `TARGET_NAMES`."""

    def __getitem__(self, name: str) -> Target:
        module = import_module(f"{__name__}.{_MODULES[name]}")
        return next(target for target in module.TARGETS if target.name == name)

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


TARGETS: Mapping[str, Target] = _Targets()


def get_target(name: str) -> Target:
    """The target of this name. Raises InputError: there is none."""
    if name not in _MODULES:
        raise InputError(f"'{name}' is not a target; choose {', '.join(TARGET_NAMES)}")
    return TARGETS[name]


def choose_target(name: str, precision: str) -> tuple[Target, str]:
    """The target to write for, and why.

    Raises:
        InputError: the target or the precision is unknown, or the one is not written for the other.
    """
    target, reason = _automatic() if name == "auto" else (get_target(name), "asked for")
    if precision in target.precisions:
        return target, reason
    others = [other.name for other in TARGETS.values() if precision in other.precisions]
    if not others:
        known = dict.fromkeys(known for other in TARGETS.values() for known in other.precisions)
        raise InputError(f"'{precision}' is not a precision; choose {', '.join(known)}")
    raise InputError(
        f"precision {precision} is not written for {target.name}; use --target {_either(others)}, "
        f"or {_either([f'--{name}' for name in target.precisions])}"
    )


def _automatic() -> tuple[Target, str]:
    """The first target that offers itself on this machine, else ONNX Runtime; and why."""
    reason = "TensorRT is not installed"
    for target in TARGETS.values():
        taken, why = target.offer()
        if taken:
            return target, why
        reason = why or reason
    return TARGETS["onnxruntime"], reason


def open_backend(bundle: Bundle, name: str = "auto", threads: int | None = None) -> Backend:
    """Load a bundle's model. `threads` is for the CPU; None leaves it to the back end.

    `auto` takes the first that works of those that the bundle's target prefers; a named back end is that or
    an error.

    Raises:
        BackendError: not installed, not able to run here, or not what the bundle was made for.
        BundleError: the model's file is missing or altered.
    """
    if name not in BACKEND_NAMES:
        raise BackendError(f"there is no back end '{name}'; choose one of {', '.join(BACKEND_NAMES)}")
    # A target of a newer version is known by its model.onnx, if it has one.
    target = TARGETS[bundle.target if bundle.target in _MODULES else "onnxruntime"]
    if name != "auto":
        if name not in target.backends:
            raise BackendError(
                f"bundle '{bundle.path}' is made for {target.name}, which {name} does not run; "
                f"use --backend {_either(target.backends)}"
            )
        return target.open(bundle, name, threads)
    *better, last = target.automatic
    note = ""
    for choice in better:
        try:
            backend = target.open(bundle, choice, threads)
        except BackendError as error:
            note = note or str(error).split(";")[0]  # what is wrong, without what to do about it
        else:
            backend.note = note
            return backend
    try:
        backend = target.open(bundle, last, threads)
    except BackendError as error:
        raise BackendError(f"{error} ({note})" if note else str(error)) from error
    backend.note = ", and ".join(filter(None, (note, target.last_resort)))
    return backend


def _either(names: tuple[str, ...] | list[str]) -> str:
    """Names as a choice: "a", "a or b", "a, b or c"."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
