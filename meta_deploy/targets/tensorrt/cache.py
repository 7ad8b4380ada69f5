"""Engines rebuilt from a bundle's model.onnx for this machine, and compiled kernels, kept for next time.

Knows the user's cache folder and the files in it; must not know how an engine is built or run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.files import atomic_path
from meta_deploy.bundle.manifest import TensorRTEngine, read_engine
from meta_deploy.errors import BundleError, InputError
from meta_deploy.targets.tensorrt.library import Machine

MODEL = "model.onnx"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_root() -> Path:
    """Where engines live: meta-deploy/engines in $XDG_CACHE_HOME, or in ~/.cache. It need not exist.

    Raises:
        InputError: neither is known.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError as error:
        raise InputError("there is no home folder to keep engines in; set XDG_CACHE_HOME") from error
    return root / "meta-deploy" / "engines"


def make_folder(name: str = "") -> Path:
    """The folder, or the one called `name` in it, made if need be and writable by nobody else.

    Raises:
        InputError: it cannot be made, or others own it or can write to it.
    """
    for path in dict.fromkeys((cache_root(), cache_root() / name)):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            trusted = _is_ours(path)
        except OSError as error:
            raise InputError(
                f"cannot make the cache folder '{path}': {error.strerror}; set XDG_CACHE_HOME to another"
            ) from error
        if not trusted:
            raise InputError(
                f"the cache folder '{path}' is another user's or others can write to it, and engines are "
                "programs; run chmod go-w on it, or set XDG_CACHE_HOME to another"
            )
    return path


def find(bundle: Bundle, machine: Machine) -> tuple[bytes, str] | None:
    """The engine stored for this bundle and machine, with its sha256; None without a sound one."""
    found = _read(_engine_key(bundle, machine))
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
    return _write(_engine_key(bundle, machine), engine, record)


def find_kernels(sha256: str, machine: Machine) -> bytes | None:
    """TensorRT-RTX's runtime cache for the engine of this sha256; None without a sound one."""
    found = _read(_kernels_key(sha256, machine))
    return found[0] if found else None


def store_kernels(sha256: str, machine: Machine, kernels: bytes) -> None:
    """Keep a runtime cache. It only saves time: where it cannot be written, nothing happens."""
    with contextlib.suppress(InputError):
        _write(_kernels_key(sha256, machine), kernels, {})


def _engine_key(bundle: Bundle, machine: Machine) -> str:
    files, profile = bundle.manifest.files, bundle.input.profile
    # A bundle without model.onnx has nothing that an engine could have been rebuilt from.
    model = files[MODEL].sha256 if MODEL in files else None
    return "engine-" + _hash([model, asdict(machine), *profile.min, *profile.opt, *profile.max])


def _kernels_key(sha256: str, machine: Machine) -> str:
    return "kernels-" + _hash([sha256, asdict(machine)])


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(key: str) -> tuple[bytes, dict[str, Any]] | None:
    """A stored file and the record beside it; None if anything about them is wrong."""
    try:
        path = cache_root()
        if not _is_ours(path):
            return None
        record = json.loads((path / f"{key}.json").read_bytes())
        data = (path / f"{key}.bin").read_bytes()
    except (OSError, ValueError, RecursionError, InputError):
        return None
    if not isinstance(record, dict) or record.get("sha256") != hashlib.sha256(data).hexdigest():
        return None
    return data, record


def _write(key: str, data: bytes, record: dict[str, Any]) -> Path:
    """The data, then the record that makes it valid, each whole or not at all."""
    path = make_folder() / f"{key}.bin"
    record = {**record, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    for target, content in ((path, data), (path.with_suffix(".json"), json.dumps(record, indent=1).encode())):
        with atomic_path(target) as temp, temp.open("xb") as stream:
            stream.write(content)
    return path


def _is_ours(path: Path) -> bool:
    """Whether the folder belongs to this user and no other may write to it (Windows keeps its own guard)."""
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        return False
    return os.name != "posix" or (status.st_uid == os.getuid() and not status.st_mode & _WRITABLE_BY_OTHERS)
