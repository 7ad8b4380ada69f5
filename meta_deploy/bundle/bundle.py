"""The bundle: a folder with a model, and a manifest that says how to feed it and what comes out.

Reads, checks and writes such folders; must not know what runs the model, nor how it was exported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from meta_deploy.bundle.manifest import (
    MANIFEST,
    DetectionManifest,
    Engine,
    FileEntry,
    InputSpec,
    Manifest,
    Preprocess,
    RawManifest,
    from_dict,
    read_manifest,
    to_json,
)
from meta_deploy.errors import BundleError, InputError

_CHUNK = 1 << 20
_WRITING = threading.Lock()
_T = TypeVar("_T")


@dataclass(frozen=True, repr=False)
class Bundle:
    """An opened bundle: its manifest is valid and every file it lists had the sha256 it should have.

    `path` is the folder; `manifest` what manifest.json says. Open one with `Bundle.open`.
    """

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        size = sum(entry.bytes for entry in self.manifest.files.values()) / 1e6
        what = f"{self.task} for {self.target} in {self.precision}"
        return f"Bundle '{self.path}': {self.model_name}, {what}, {size:.1f} MB"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open a folder and check it whole.

        Raises:
            BundleError: not a bundle, a newer schema, a field missing or wrong, a file missing or altered.
        """
        if not os.fspath(path):
            raise BundleError("the bundle's path is empty; name a folder that meta-export wrote")
        path = Path(path)
        bundle = cls(path, from_dict(read_manifest(path), path))
        for name in bundle.manifest.files:
            with bundle._open_file(name) as stream:
                bundle._compare(name, *_digest(stream))
        return bundle

    def read(self, name: str) -> bytes:
        """The bytes of one file, checked against the manifest as read: what is checked is what is used.

        Raises:
            BundleError: the manifest lists no such file, or the file is missing or altered.
        """
        if name not in self.manifest.files:
            raise BundleError(f"bundle '{self.path}' holds no {name}; export it again for this back end")
        with self._open_file(name) as stream:
            data = stream.read()
        self._compare(name, hashlib.sha256(data).hexdigest(), len(data))
        return data

    @property
    def task(self) -> str:
        return self.manifest.task

    @property
    def model_name(self) -> str:
        return self.manifest.model.name

    @property
    def classes(self) -> tuple[str, ...]:
        """The names that labels are indices of; none for a raw bundle."""
        return self.manifest.classes or ()

    @property
    def target(self) -> str:
        return self.manifest.target

    @property
    def precision(self) -> str:
        return self.manifest.precision

    @property
    def engine(self) -> Engine | None:
        """What the bundle's engine was built with and for; None without one."""
        return self.manifest.engine

    @property
    def takes_images(self) -> bool:
        """Whether the bundle says how an image becomes its input; a raw one may take arrays only."""
        return self.manifest.preprocess is not None

    @property
    def input(self) -> InputSpec:
        """The input that takes images. Raises InputError where the bundle takes arrays only."""
        manifest = self.manifest
        return self._of_images(manifest.image if isinstance(manifest, RawManifest) else manifest.input)

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes the input. Raises InputError where the bundle takes arrays only."""
        return self._of_images(self.manifest.preprocess)

    @property
    def score_threshold(self) -> float:
        """The least score of a detection; 0 where results have none."""
        return self.manifest.thresholds.score if isinstance(self.manifest, DetectionManifest) else 0.0

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs that this task's results are made of."""
        return self.manifest.output_names

    def _of_images(self, value: _T | None) -> _T:
        if value is None:
            raise InputError(
                f"bundle '{self.path}' takes arrays and says nothing of images; give it arrays by name"
            )
        return value

    def _open_file(self, name: str) -> BinaryIO:
        path = self.path / name
        try:
            if not path.is_file():
                raise BundleError(
                    f"bundle '{self.path}' lacks {name}, which its manifest lists; export it again"
                )
            return path.open("rb")
        except OSError as error:
            raise BundleError(f"cannot read '{path}': {error.strerror}; check its permissions") from error

    def _compare(self, name: str, sha256: str, size: int) -> None:
        entry = self.manifest.files[name]
        if sha256 == entry.sha256:
            return
        how = f"{size} bytes, not {entry.bytes}" if size != entry.bytes else "its sha256 differs"
        raise BundleError(
            f"'{self.path / name}' is not the file that was exported ({how}); copy or export it again"
        )


def write_bundle(
    out_dir: str | os.PathLike[str],
    manifest: Manifest,
    files: Mapping[str, str | os.PathLike[str] | bytes],
) -> Bundle:
    """Write a bundle so that `out_dir` holds either what it held before or the whole new bundle.

    `files` maps the name in the bundle to a path to copy or to the content; `manifest` needs no `files`,
    which is computed here. An older bundle at `out_dir` is replaced. Killed at any point, this leaves at
    most a hidden sibling folder, which the next write to the same place clears away.

    Raises:
        InputError: `out_dir` is something else than a bundle, or cannot be written (permissions, disk full).
        BundleError: the manifest is not valid.
    """
    out = check_out_dir(out_dir)
    temp = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    with _WRITING:
        made: list[Path] = []
        try:
            made = _make_parents(out.parent)
            _clear_leftovers(out)
            temp.mkdir()
            entries = {name: _store(source, temp, name) for name, source in files.items()}
            # Through its JSON, as Structs check types when they are read and not when they are made.
            content = msgspec.to_builtins(msgspec.structs.replace(manifest, files=entries))
            manifest = from_dict(content, out)
            _store(to_json(manifest).encode(), temp, MANIFEST)
            _sync_folder(temp)
            _swap(temp, out)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise InputError(
                f"cannot write the bundle '{out_dir}': {error.strerror or error}{where}; "
                "free space or choose another folder"
            ) from error
        finally:
            shutil.rmtree(temp, ignore_errors=True)
            for folder in made:  # only those still empty go: nothing was put there
                with contextlib.suppress(OSError):
                    folder.rmdir()
    return Bundle(Path(out_dir), manifest)


def check_out_dir(out_dir: str | os.PathLike[str]) -> Path:
    """The real path of a folder that `write_bundle` may create or replace; call it before long work.

    Raises:
        InputError: it exists and is neither empty nor a bundle alone, or cannot be written.
    """
    out = Path(os.path.realpath(out_dir))
    try:
        _check_place(out, out_dir)
    except OSError as error:
        raise InputError(
            f"cannot write the bundle '{out_dir}': {error.strerror}; choose another folder"
        ) from error
    return out


def _check_place(out: Path, out_dir: str | os.PathLike[str]) -> None:
    if out.exists():
        if not out.is_dir():
            raise InputError(f"'{out_dir}' is a file; choose another folder for the bundle")
        if os.path.ismount(out):
            raise InputError(f"'{out_dir}' is a mount point, which cannot be replaced; choose a folder in it")
        _check_replaceable(out, out_dir)
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write the bundle '{out_dir}': '{parent}' is not a folder you can write to")
    # Permissions do not say all (/proc, a name too long): try. As long as any name used while writing.
    Path(tempfile.mkdtemp(prefix=f".{out.name}.probe-", dir=parent)).rmdir()


def _check_replaceable(out: Path, shown: object) -> None:
    try:
        present = {entry.name for entry in out.iterdir()}
    except OSError as error:
        raise InputError(f"cannot read '{shown}': {error.strerror}; choose another folder") from error
    if not present:
        return
    try:
        manifest = read_manifest(out)
        listed = set(manifest["files"])
        _ = manifest["schema"], manifest["task"]
    except (BundleError, KeyError, TypeError):
        raise InputError(
            f"'{shown}' is not empty and not a bundle, so it is not replaced; choose another folder"
        ) from None
    if strangers := sorted(present - listed - {MANIFEST}):
        raise InputError(
            f"'{shown}' holds '{strangers[0]}', which is not part of the bundle there; "
            "move it, or choose another folder"
        )


def _digest(stream: BinaryIO, copy_to: BinaryIO | None = None) -> tuple[str, int]:
    """The sha256 and length of a stream, written on to `copy_to` as it passes."""
    sha, size = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK):
        sha.update(chunk)
        size += len(chunk)
        if copy_to is not None:
            copy_to.write(chunk)
    return sha.hexdigest(), size


def _store(source: str | os.PathLike[str] | bytes, folder: Path, name: str) -> FileEntry:
    """Write one file and make it durable; returns its manifest entry."""
    with open(folder / name, "xb") as out:
        if isinstance(source, bytes):
            sha256, size = hashlib.sha256(source).hexdigest(), out.write(source)
        else:
            with open(source, "rb") as stream:
                sha256, size = _digest(stream, copy_to=out)
        out.flush()
        os.fsync(out.fileno())
    return FileEntry(sha256=sha256, bytes=size)


def _make_parents(folder: Path) -> list[Path]:
    """Create the folders that are missing; returns those created, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _swap(new: Path, out: Path) -> None:
    """Put `new` at `out`. What was there is moved aside first, and back again should that fail."""
    aside = out.with_name(f".{out.name}.old-{os.getpid()}")
    try:
        with contextlib.suppress(FileNotFoundError):
            out.rename(aside)
        try:
            new.rename(out)
        except OSError:
            if aside.exists() and not out.exists():
                aside.rename(out)
            raise
        _sync_folder(out.parent)
    finally:
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make a folder's entries durable, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _clear_leftovers(out: Path) -> None:
    """Remove what killed writes left beside `out`; a bundle that one had moved aside goes back."""
    for path in out.parent.iterdir():
        for kind in ("old", "tmp"):
            prefix = f".{out.name}.{kind}-"
            pid = path.name.removeprefix(prefix)
            if path.name.startswith(prefix) and pid.isdigit() and not _runs(int(pid)):
                if kind == "old" and not out.exists():
                    path.rename(out)
                else:
                    shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    """Whether another process has this id (on Windows it cannot be asked harmlessly: assume so)."""
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
