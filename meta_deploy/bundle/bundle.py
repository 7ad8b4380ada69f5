"""The bundle: a folder with a model, and a manifest that says how to feed it and what comes out.

Reads, checks and writes such folders; must not know what runs the model, nor how it was exported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import msgspec

from meta_deploy.bundle.claims import Claims
from meta_deploy.bundle.folders import Replacement, moved_aside, replacing
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
    identity,
    read_manifest,
    to_json,
)
from meta_deploy.errors import BundleError, BundleReplaced, InputError

_CHUNK = 1 << 20
_PATIENCE = 10.0  # seconds in which a bundle may be replaced again and again while it is read
_T = TypeVar("_T")


@dataclass(frozen=True, repr=False)
class Bundle:
    """An opened bundle: its manifest is valid and every file it lists had the sha256 it should have.

    `path` is the folder; `manifest` what manifest.json says. Open one with `Bundle.open`.
    """

    path: Path
    manifest: Manifest
    _as_read: Any = field(default=None, compare=False)  # what tells this manifest.json from a later one

    def __repr__(self) -> str:
        size = sum(entry.bytes for entry in self.manifest.files.values()) / 1e6
        what = f"{self.task} for {self.target} in {self.precision}"
        return f"Bundle '{self.path}': {self.model_name}, {what}, {size:.1f} MB"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open a folder and check it whole. One that is replaced meanwhile is opened as old or as new.

        Raises:
            BundleError: not a bundle, a newer schema, a field missing or wrong, a file missing or altered.
        """
        return cls.use(path, lambda bundle: bundle)

    @classmethod
    def use(cls, path: str | os.PathLike[str], read: Callable[[Bundle], _T]) -> _T:
        """What `read` makes of an opened bundle; once more from the start where it was replaced meanwhile.

        Raises:
            BundleError: as `open`, or from `read`.
        """
        if not os.fspath(path):
            raise BundleError("the bundle's path is empty; name a folder that meta-export wrote")
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                return read(cls._opened(Path(path)))
            except BundleReplaced:
                if time.monotonic() > end:
                    raise
                time.sleep(0.001)

    @classmethod
    def _opened(cls, path: Path) -> Bundle:
        before = identity(path)
        try:
            content, as_read = read_manifest(path)
        except BundleError as error:
            if identity(path) != before or moved_aside(path):
                raise _replaced(path) from error
            raise
        bundle = cls(path, from_dict(content, path), as_read)
        for name in bundle.manifest.files:
            with bundle._open_file(name) as stream:
                bundle._compare(name, *_digest(stream))
        return bundle

    def read(self, name: str) -> bytes:
        """The bytes of one file, checked against the manifest as read: what is checked is what is used.

        Raises:
            BundleReplaced: by another bundle, since this one was opened.
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
        """The least score of a detection that the graph gives; 0 where results have none."""
        return self.manifest.thresholds.score if isinstance(self.manifest, DetectionManifest) else 0.0

    @property
    def shown_score(self) -> float:
        """The least score of a detection that is shown unless asked otherwise; 0 where results have none."""
        return self.manifest.thresholds.shown if isinstance(self.manifest, DetectionManifest) else 0.0

    @property
    def tile(self) -> int | None:
        """The side in pixels of the tiles that larger images are run in; None: as a whole."""
        return None if isinstance(self.manifest, RawManifest) else self.manifest.tile

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
                self._refuse(f"bundle '{self.path}' lacks {name}, which its manifest lists; export it again")
            return path.open("rb")
        except OSError as error:
            self._refuse(f"cannot read '{path}': {error.strerror}; check its permissions", error)

    def _compare(self, name: str, sha256: str, size: int) -> None:
        entry = self.manifest.files[name]
        if sha256 == entry.sha256:
            return
        how = f"{size} bytes, not {entry.bytes}" if size != entry.bytes else "its sha256 differs"
        self._refuse(
            f"'{self.path / name}' is not the file that was exported ({how}); copy or export it again"
        )

    def _refuse(self, message: str, cause: Exception | None = None) -> NoReturn:
        if self._as_read is not None and self._as_read != identity(self.path / MANIFEST):
            raise _replaced(self.path) from cause
        raise BundleError(message) from cause


def _replaced(path: Path) -> BundleReplaced:
    return BundleReplaced(f"bundle '{path}' is replaced by another while it is read; open it again")


def digest_of(path: str | os.PathLike[str]) -> str:
    """What tells a bundle from others: the sha256 of its manifest, which has those of its files."""
    return hashlib.sha256((Path(path) / MANIFEST).read_bytes()).hexdigest()


def write_bundle(
    out_dir: str | os.PathLike[str],
    manifest: Manifest,
    files: Mapping[str, str | os.PathLike[str] | bytes],
) -> Bundle:
    """Write a bundle at once. See `reserve_bundle` and `Reserved.write`, whose errors it raises."""
    with reserve_bundle(out_dir) as reserved:
        return reserved.write(manifest, files)


@contextlib.contextmanager
def reserve_bundle(out_dir: str | os.PathLike[str], sources: Iterable[Path] = ()) -> Iterator[Reserved]:
    """The right to write a bundle to `out_dir`, for one process or thread at a time; ask before long work.

    `out_dir` holds what it held before, or nothing, until the whole new bundle is written; then an older
    bundle is gone. What killed processes have left beside it is cleared away.

    Args:
        out_dir: absent, an empty folder, or a bundle alone.
        sources: files and folders that are read on the way; none may be in `out_dir`.

    Raises:
        InputError: `out_dir` is something else or cannot be written, another is writing it, or a source is
            in it.
    """
    if not os.fspath(out_dir):
        raise InputError("the path of the bundle is empty; name a folder")
    with contextlib.ExitStack() as stack:
        with _told(out_dir):
            out = Path(os.path.realpath(out_dir))
            _check_place(out, out_dir)
            claims = Claims()
            claims.add(out, "replaced")
            for source in sources:
                if claims.holder(source):
                    raise InputError(f"'{source}' is in '{out_dir}', which is replaced; use another folder")
            replacement = stack.enter_context(replacing(out))
        yield Reserved(out_dir, replacement)


@contextlib.contextmanager
def _told(out_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system as one sentence."""
    try:
        yield
    except OSError as error:
        remedy = "free space or choose another folder"
        if isinstance(error, BlockingIOError):
            remedy = "wait for it, or choose another folder"
        where = f" ({error.filename})" if error.filename else ""
        raise InputError(
            f"cannot write the bundle '{out_dir}': {error.strerror or error}{where}; {remedy}"
        ) from error


class Reserved:
    """A place for a bundle. `write` fills it, once."""

    def __init__(self, out_dir: str | os.PathLike[str], replacement: Replacement):
        self._out_dir, self._replacement = out_dir, replacement

    def write(
        self,
        manifest: Manifest,
        files: Mapping[str, str | os.PathLike[str] | bytes],
        written: Callable[[], None] = lambda: None,
    ) -> Bundle:
        """Write the bundle, whole or not at all.

        Args:
            manifest: needs no `files`, which is computed here.
            files: the name in the bundle -> a path to copy, or the content.
            written: called when the bundle is in its place, before an interrupt can come.

        Raises:
            InputError: it cannot be written (disk full), or something else came to be at its place.
            BundleError: the manifest is not valid.
        """
        path, new = Path(self._out_dir), self._replacement.new
        with _told(path):
            entries = {name: store_file(source, new, name) for name, source in files.items()}
            # Through its JSON, as Structs check types when they are read and not when they are made.
            content = msgspec.to_builtins(msgspec.structs.replace(manifest, files=entries))
            manifest = from_dict(content, path)
            store_file(to_json(manifest).encode(), new, MANIFEST)
            _check_place(self._replacement.out, path)  # again: the work took its time
            self._replacement.commit(written)
        return Bundle(path, manifest)


def _check_place(out: Path, out_dir: str | os.PathLike[str]) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISDIR(os.lstat(out).st_mode):
            raise InputError(f"'{out_dir}' is a file; choose another folder for the bundle")
        if os.path.ismount(out):
            raise InputError(f"'{out_dir}' is a mount point, which cannot be replaced; choose a folder in it")
        _check_replaceable(out, out_dir)
        if out.samefile(os.curdir):
            raise InputError(f"'{out_dir}' is the current folder, which cannot be replaced; choose one in it")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write the bundle '{out_dir}': '{parent}' is not a folder you can write to")


def _check_replaceable(out: Path, shown: object) -> None:
    try:
        present = {entry.name for entry in out.iterdir()}
    except OSError as error:
        raise InputError(f"cannot read '{shown}': {error.strerror}; choose another folder") from error
    if not present:
        return
    try:
        manifest, _ = read_manifest(out)
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


def store_file(source: str | os.PathLike[str] | bytes, folder: Path, name: str) -> FileEntry:
    """Write a path's content or bytes to a new file and make it durable; returns its manifest entry."""
    with open(folder / name, "xb") as out:
        if isinstance(source, bytes):
            sha256, size = hashlib.sha256(source).hexdigest(), out.write(source)
        else:
            with open(source, "rb") as stream:
                sha256, size = _digest(stream, copy_to=out)
        out.flush()
        os.fsync(out.fileno())
    return FileEntry(sha256=sha256, bytes=size)
