"""Writing a bundle into a Triton model repository: new models, or a new version of those that are there.

Knows folders; nothing in them that another has written is changed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meta_deploy.bundle.bundle import Bundle, store_file
from meta_deploy.bundle.files import reason, scratch_folder, sync_folder
from meta_deploy.bundle.manifest import MANIFEST, from_dict, read_manifest
from meta_deploy.errors import BundleError, InputError
from meta_deploy.triton.config import LABELS, Model, backend_of, models_of

CONFIG, MODEL_PY = "config.pbtxt", "model.py"
_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_PYTHON = b'''\
"""The Python model of Triton's that meta-deploy has: pip install meta-deploy in the server's Python."""

from meta_deploy.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class Written:
    """What was written: the names of the models, the one that clients call last, and their version."""

    repository: Path
    models: tuple[str, ...]
    version: int


def write_models(bundle: Bundle, repository: str | os.PathLike[str], name: str | None = None) -> Written:
    """Add a bundle to a repository, as models that it does not have or as their next version.

    A bundle that takes images becomes `NAME`, a Python model from encoded images to results, and
    `NAME-network`, the graph; one that takes arrays becomes the graph alone, as `NAME`. A version's folder is
    there whole or not at all, and so is a new model's; the graph's is there first.

    Args:
        bundle: opened, so that its files are known to be whole.
        repository: a folder of models; made if it is not there.
        name: None: that of the bundle's folder.

    Raises:
        BundleError: a file of the bundle is altered meanwhile.
        InputError: a name that Triton does not take, a bundle that it cannot run, a model of that name that
            is another's or has other inputs or outputs, or a folder that cannot be written.
    """
    name = name or bundle.path.resolve().name
    check_place(repository, name, bundle.target)
    models = models_of(bundle, name)
    root = Path(os.path.realpath(repository))
    with _told(repository), _made(root), scratch_folder(_beside(root), owner=f"{root}.triton") as scratch:
        version = _next_version(root, models, name)
        for model in models:
            _write(root / model.name, model, version, bundle, scratch / model.name)
    return Written(Path(repository), tuple(model.name for model in models), version)


def check_place(repository: str | os.PathLike[str], name: str | None, target: str | None) -> None:
    """Refuse what can be refused before there is a bundle.

    Args:
        repository: a folder of models.
        name: of the model; None: not known yet, as the target may be.
        target: of the bundle.

    Raises:
        InputError: as `write_models`.
    """
    shown = os.fspath(repository)
    if not shown:
        raise InputError("the path of the Triton repository is empty; name a folder")
    if "://" in shown:
        raise InputError(f"'{shown}' is not a folder; write the repository to one, and copy that there")
    for file, what in ((MANIFEST, "a bundle"), (CONFIG, "one model of Triton's")):
        if os.path.exists(os.path.join(shown, file)):
            raise InputError(f"'{shown}' is {what}, and not a repository; name a folder of models")
    if name is not None:
        check_name(name)
    if target is not None:
        backend_of(target)
    with _told(repository):
        root = Path(os.path.realpath(repository))
        there = next(folder for folder in (root, *root.parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"'{there}' is not a folder that can be written to; choose another for --triton")
        if name is not None:
            _newest(root / name)


def check_name(name: str) -> None:
    """Raise InputError where a model of Triton's cannot be called so: it is a folder and a part of URLs."""
    if not re.fullmatch(_NAME, name):
        raise InputError(
            f"'{name}' is no name for a model of Triton's; give another by --triton-name, of at most 100 "
            "letters, digits, dots, dashes and underscores"
        )


def _newest(folder: Path) -> int:
    """The newest version of a model, 0 without any. Raises InputError: it is there and not ours."""
    if not os.path.lexists(folder):
        return 0
    if folder.is_dir():
        if not any(folder.iterdir()):
            return 0
        newest = max(_versions(folder), default=0)
        if (folder / str(newest) / MANIFEST).is_file():
            return newest
    raise _anothers(folder)


def _anothers(folder: Path) -> InputError:
    return InputError(
        f"'{folder}' is there already, and meta-export did not write it; choose another --triton-name"
    )


def _next_version(root: Path, models: Sequence[Model], name: str) -> int:
    """One more than the newest version of any of them. Raises InputError: one is not such a model."""
    newest = {model.name: _newest(root / model.name) for model in models}
    for model in models:
        if newest[model.name]:
            _check_same(root / model.name, newest[model.name], model, name)
    return 1 + max(newest.values())


def _check_same(folder: Path, version: int, model: Model, name: str) -> None:
    """Raise InputError unless a version is of the same kind as a model is to be."""
    place = folder / str(version)
    try:
        content, _ = read_manifest(place)
        known = {other.name: other for other in models_of(Bundle(place, from_dict(content, place)), name)}
        there = known[model.name]
    except (InputError, KeyError):
        raise _anothers(folder) from None
    if (place / MODEL_PY).exists() != (there.runs is not None):  # as 'cells-network', which 'cells' runs
        raise InputError(
            f"'{folder}' is there already, as another kind of model; choose another --triton-name"
        )
    if (there.config, there.labels) != (model.config, model.labels):
        what = "other inputs, outputs or batches" if there.config != model.config else "other classes"
        raise InputError(
            f"model '{model.name}' in '{folder.parent}' has {what} than this bundle, which is no version of "
            "it then; choose another --triton-name"
        )


def _versions(folder: Path) -> Iterator[int]:
    for entry in folder.iterdir():
        if re.fullmatch("[1-9][0-9]{0,17}", entry.name) and entry.is_dir():
            yield int(entry.name)


def _write(folder: Path, model: Model, version: int, bundle: Bundle, scratch: Path) -> None:
    """A version, with the model around it where that is new. Made at `scratch`."""
    new = not folder.is_dir() or not any(folder.iterdir())
    scratch.mkdir()
    place = scratch
    if new:
        store_file(model.config.encode(), scratch, CONFIG)
        if model.labels is not None:
            store_file(model.labels.encode(), scratch, LABELS)
        place = scratch / str(version)
        place.mkdir()
    _fill(place, model, bundle)
    sync_folder(place)
    sync_folder(scratch)
    target = folder if new else folder / str(version)
    scratch.rename(target)  # which fails where something came to be there
    sync_folder(target.parent)


def _fill(place: Path, model: Model, bundle: Bundle) -> None:
    """A version's files: the bundle, or its manifest and the Python model."""
    store_file(bundle.path / MANIFEST, place, MANIFEST)
    if model.runs is not None:
        store_file(_PYTHON, place, MODEL_PY)
        return
    for name, entry in bundle.manifest.files.items():
        if store_file(bundle.path / name, place, name) != entry:
            raise BundleError(f"'{bundle.path / name}' was altered while it was copied; do this again")


def _beside(root: Path) -> Path:
    """Where to make what is renamed into the repository: not in it, as Triton takes every folder for a model.

    In it all the same where it is a disk of its own, or nothing else can be written.
    """
    parent = root.parent
    same = parent.stat().st_dev == root.stat().st_dev
    return parent if same and os.access(parent, os.W_OK | os.X_OK) else root


@contextlib.contextmanager
def _made(root: Path) -> Iterator[None]:
    """The folder and its parents; those that were not there are removed again if nothing came into them."""
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def _told(repository: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system as one sentence."""
    try:
        yield
    except BlockingIOError as error:
        raise InputError(
            f"another process is writing to the Triton repository '{repository}'; wait for it"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot write to the Triton repository '{repository}': {reason(error, Path(repository))}"
        ) from error
