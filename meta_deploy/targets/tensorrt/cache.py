"""Engines rebuilt from a bundle's model.onnx for this machine, and compiled kernels, kept for next time.

Knows which engine is whose; must not know how an engine is built or run.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path

import msgspec

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import TensorRTEngine, read_engine
from meta_deploy.errors import BundleError, InputError
from meta_deploy.targets import cache
from meta_deploy.targets.target import MODEL, profiles
from meta_deploy.targets.tensorrt.library import Machine

FOLDER = "engines"


def find(bundle: Bundle, machine: Machine) -> tuple[bytes, str] | None:
    """The engine stored for this bundle and machine, with its sha256; None without a sound one."""
    found = cache.read(FOLDER, _engine_key(bundle, machine))
    if found is None:
        return None
    data, record = found
    try:
        engine = read_engine(record.get("engine"), bundle.path)
    except BundleError:
        return None
    if not isinstance(engine, TensorRTEngine) or machine.misfit(engine) is not None:
        return None
    return data, record["sha256"]


def store(bundle: Bundle, machine: Machine, engine: bytes, section: TensorRTEngine) -> Path:
    """Keep an engine built from this bundle's model.onnx on this machine; returns its file.

    `section` is what a manifest would hold as `engine`.

    Raises:
        InputError: it cannot be written, or the folder is not safe.
    """
    record = {"engine": msgspec.to_builtins(section), "bundle": str(bundle.path)}
    return cache.write(FOLDER, _engine_key(bundle, machine), engine, record)


def find_kernels(sha256: str, machine: Machine) -> bytes | None:
    """TensorRT-RTX's runtime cache for the engine of this sha256; None without a sound one."""
    found = cache.read(FOLDER, _kernels_key(sha256, machine))
    return found[0] if found else None


def store_kernels(sha256: str, machine: Machine, kernels: bytes) -> None:
    """Keep a runtime cache. It only saves time: where it cannot be written, nothing happens."""
    with contextlib.suppress(InputError):
        cache.write(FOLDER, _kernels_key(sha256, machine), kernels, {})


def _engine_key(bundle: Bundle, machine: Machine) -> str:
    files = bundle.manifest.files
    # A bundle without model.onnx has nothing that an engine could have been rebuilt from.
    model = files[MODEL].sha256 if MODEL in files else None
    return "engine-" + cache.key(model, asdict(machine), msgspec.to_builtins(profiles(bundle)))


def _kernels_key(sha256: str, machine: Machine) -> str:
    return "kernels-" + cache.key(sha256, asdict(machine))
