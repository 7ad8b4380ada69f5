"""Where an export begins: a checkpoint or an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from meta_deploy.errors import InputError
from meta_deploy.export.options import Options
from meta_deploy.export.sources.source import Source

_ONNX_ONLY = ("shapes", "mean", "std", "scale", "bgr", "class_names")
_CHECKPOINT_ONLY = ("model", "allow_partial", "operators", "backbone_ckpt")


def is_onnx(path: str | Path) -> bool:
    """Whether a path is taken for an ONNX file, by its suffix."""
    return Path(path).suffix.lower() == ".onnx"


def check_options(path: str | Path, options: Options) -> None:
    """Refuse options that are for the other kind of source.

    Raises:
        InputError: one was given.
    """
    fresh = Options()
    others, what = (_CHECKPOINT_ONLY, "a checkpoint") if is_onnx(path) else (_ONNX_ONLY, "an ONNX file")
    for name in others:
        if getattr(options, name) != getattr(fresh, name):
            option = {"shapes": "shape"}.get(name, name).replace("_", "-")
            raise InputError(f"--{option} is for {what}, which '{path}' is not; leave it out")


def open_source(path: str | Path, options: Options, note: Callable[[str], None]) -> Source:
    """Read a checkpoint or an ONNX file.

    Raises:
        InputError: it cannot be read, is not supported, or does not fit the options.
    """
    if is_onnx(path):
        from meta_deploy.export.sources.onnx_file import OnnxSource

        return OnnxSource(Path(path), options, note)
    from meta_deploy.export.sources.checkpoint import CheckpointSource

    return CheckpointSource(path, options, note)
