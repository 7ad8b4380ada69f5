"""A checkpoint file's bytes to plain dicts, lists, tensors and numbers, with no trust in the file.

Runs nothing that the file says and raises only `CheckpointError`; must not know what the tensors are for.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import stat
import tempfile
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from meta_deploy.errors import CheckpointError
from meta_deploy.models.checkpoint.pickles import Refused, check_pickle
from meta_deploy.text import escaped

RESAVE = "re-save the weights alone: torch.save(model.state_dict(), ...) or safetensors.torch.save_file"

_UNPICKLING = threading.Lock()  # torch's list of safe globals is one per process
_REJECTED_GLOBAL = re.compile(r"GLOBAL (\S+)")
_ZIP = b"PK\x03\x04"
_SUFFIXES = (".pth", ".pth.tar", ".pt", ".bin", ".safetensors")
_MOST_PACKED = 20  # how much smaller an archive can make weights, and more than that
_FOREIGN_KINDS = (
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself"),
    (b"<", "a web page or XML"),
)


class _Inert:
    """Stands in for a class or function that training checkpoints often name; does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Dictionary:
    """Stands in for a subclass of dict, whose items torch would put into nothing but these."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


# Harmless beside the weights (options, metrics, logs), and no reason to refuse a checkpoint. Whatever else a
# pickle names is refused.
_DICTIONARIES = (
    "collections.defaultdict",
    "addict.addict.Dict",
    "easydict.EasyDict",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
_IGNORED_GLOBALS = (
    "argparse.Namespace",
    "builtins.getattr",  # how a HistoryBuffer's own methods are named
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "types.SimpleNamespace",
    "datetime.datetime",
    "datetime.timedelta",
    "typing.Any",
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Integer", "Float", "String", "Boolean", "Path")),
    "mmengine.logging.history_buffer.HistoryBuffer",
)


def shown(text: object, limit: int = 80) -> str:
    """A name out of a file, fit for one line of a message: control characters escaped, not too long."""
    line = escaped(str(text)[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def one_line(error: BaseException) -> str:
    """What an error says, or its kind, fit for the middle of a sentence."""
    return shown(" ".join(str(error).split()) or type(error).__name__, 160).rstrip(".")


def refuse(path: str | os.PathLike[str], what: str, cause: BaseException | None = None) -> NoReturn:
    """Raise the `CheckpointError` about this file."""
    raise CheckpointError(f"checkpoint '{shown(path, 300)}' {what}") from cause


def read_file(path: str | os.PathLike[str]) -> tuple[Any, dict[str, str]]:
    """Read a file that torch.save or safetensors wrote; which of them is told by its content, not its name.

    Returns:
        What was saved (for safetensors a dict of tensors, on the CPU, mapped from the file where possible),
        and the metadata strings that safetensors may hold.

    Raises:
        CheckpointError: no such file, or not a checkpoint, or damaged, or one that names code.
    """
    path = Path(path)
    packed = _packed(path) if _first_bytes(path)[:4] == _ZIP else None
    return _read(path) if packed is None else _read_packed(path, packed)


def _read(path: Path) -> tuple[Any, dict[str, str]]:
    """`read_file` of a file that is no archive around another."""
    start = _first_bytes(path)
    if start[:4] == _ZIP:
        _check_zip(path)
        _check_pickles(path, _main_pickle)
        return _torch_load(path, mmap=True), {}
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start[:1] == b"\x80":
        _check_pickles(path, _legacy_pickles)
        return _torch_load(path, mmap=False), {}
    refuse(path, f"{_foreign_kind(path, start)}; give a .pth, .pt or .safetensors file")


def _packed(path: Path) -> zipfile.ZipInfo | None:
    """The one checkpoint in an ordinary archive, as releases have it where the sizes of files are limited."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # zipfile raises many kinds on damaged archives, of which `_check_zip` tells
        return None
    if any(entry.filename.endswith(("/data.pkl", "/constants.pkl")) for entry in entries):
        return None  # torch's own
    found = [entry for entry in entries if entry.filename.endswith(_SUFFIXES)]
    return found[0] if len(found) == 1 else None


def _read_packed(path: Path, entry: zipfile.ZipInfo) -> tuple[Any, dict[str, str]]:
    name = shown(entry.filename)
    if entry.file_size > _MOST_PACKED * max(entry.compress_size, 1):
        refuse(path, f"holds '{name}', packed tighter than weights can be; unpack it, if you know what it is")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        whole = Path(folder) / "checkpoint.pth"
        try:
            with zipfile.ZipFile(path) as archive, archive.open(entry) as packed, whole.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
        except Exception as error:
            refuse(path, f"cannot be unpacked ({_reason(error)}); fetch it again, or make room", error)
        try:
            return _read(whole)
        except CheckpointError as error:
            what = str(error).removeprefix(f"checkpoint '{shown(whole, 300)}' ")
            refuse(path, f"holds '{name}', which {what}", error)


def _first_bytes(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            refuse(path, "is a folder; name the .pth, .pt or .safetensors file in it")
        if not stat.S_ISREG(mode):
            refuse(path, "is not a regular file; copy it into one first")
        with path.open("rb") as stream:
            start = stream.read(512)
    except FileNotFoundError as error:
        refuse(path, "does not exist; check the path", error)
    except (OSError, ValueError) as error:
        refuse(path, f"cannot be read: {getattr(error, 'strerror', None) or error}; check the path", error)
    if not start:
        refuse(path, "is empty (0 bytes); fetch or save it again")
    return start


def _foreign_kind(path: Path, start: bytes) -> str:
    for magic, kind in _FOREIGN_KINDS:
        if start.startswith(magic):
            return f"is {kind}"
    if start[257:262] == b"ustar":
        return "is a tar archive"
    if path.suffix == ".safetensors":
        return "is not a safetensors file, or is damaged at its start"
    return "was written neither by torch.save nor by safetensors, or is damaged at its start"


def _check_zip(path: Path) -> None:
    """Refuse archives that torch did not write or that are damaged; torch itself checks no checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
                refuse(path, f"is a TorchScript archive, which holds code; {RESAVE}")
            if not any(name.count("/") == 1 and name.endswith("/data.pkl") for name in names):
                refuse(path, f"is a zip archive without a checkpoint (it holds {first_few(names)}); {RESAVE}")
            claimed = sum(entry.file_size for entry in entries)
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or claimed > path.stat().st_size:
                refuse(path, f"is a compressed archive, which torch.save never writes; {RESAVE}")
            # With torch.serialization.set_crc32_options(False) torch writes zeros for all of them.
            damaged = archive.testzip() if any(entry.CRC for entry in entries) else None
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises many kinds on damaged archives
        refuse(path, f"is truncated or damaged ({_reason(error)}); fetch or save it again", error)
    if damaged is not None:
        refuse(path, f"is damaged: the checksum of '{shown(damaged)}' is wrong; fetch or save it again")


def _check_pickles(path: Path, opened: Callable[[Path], tuple[IO[bytes], int]]) -> None:
    """Refuse pickles that would do harm when they are loaded; `opened` gives a stream and how many."""
    try:
        stream, count = opened(path)
        with stream:
            check_pickle(stream, path.stat().st_size, count)
    except Refused as error:
        refuse(path, f"is not loaded, as it {error}; {RESAVE}", error)
    except Exception as error:  # pickletools raises many kinds on what is no pickle
        _refuse_unpickled(path, error)


def _main_pickle(path: Path) -> tuple[IO[bytes], int]:
    """The one of a zip archive, by torch's own reader: others may take another entry for it."""
    with path.open("rb") as stream:
        return io.BytesIO(torch._C.PyTorchFileReader(stream).get_record("data.pkl")), 1


def _legacy_pickles(path: Path) -> tuple[IO[bytes], int]:
    """Those of the format before zip: a magic number, version, system, objects, keys of storages."""
    return path.open("rb"), 5


def _refuse_unpickled(path: Path, error: Exception) -> NoReturn:
    refuse(path, f"cannot be unpickled ({_reason(error)}): damaged, or not from torch.save; {RESAVE}", error)


def _torch_load(path: Path, mmap: bool) -> Any:
    ignored: list[Any] = [(_Inert, name) for name in _IGNORED_GLOBALS]
    ignored += [(_Dictionary, name) for name in _DICTIONARIES]
    try:
        with (
            _UNPICKLING,
            warnings.catch_warnings(),
            torch.serialization.safe_globals(ignored),
            _name_in_text(path) as name,
        ):
            warnings.simplefilter("ignore")
            return torch.load(name, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what the unpickler raises on bad bytes can be anything
        rejected = _REJECTED_GLOBAL.search(str(error))
        if rejected:
            refuse(path, f"pickles code: it names '{shown(rejected[1])}', which is not run; {RESAVE}", error)
        _refuse_unpickled(path, error)


@contextlib.contextmanager
def _name_in_text(path: Path) -> Iterator[Path]:
    """The path, or where its bytes are no text, which readers need, that of a link to it."""
    if not any("\ud800" <= character <= "\udfff" for character in str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"checkpoint{path.suffix}"
        link.symlink_to(path.absolute())
        yield link


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        refuse(path, "needs the safetensors package: pip install safetensors", error)
    try:
        with _name_in_text(path) as name, safe_open(name, framework="pt", device="cpu") as archive:
            tensors = {key: archive.get_tensor(key) for key in list(archive.keys())}
            return tensors, dict(archive.metadata() or {})
    except Exception as error:
        refuse(path, f"is not a whole safetensors file ({_reason(error)}); fetch or save it again", error)


def _reason(error: BaseException) -> str:
    """The first sentence of an error, in one line."""
    text = " ".join(str(error).split()).removeprefix("Error while deserializing header: ")
    text = text.split("WeightsUnpickler error:")[-1].removeprefix("Weights only load failed.").strip()
    text = text.split(" Check the documentation of torch.load")[0]
    return shown(text or type(error).__name__, 100)


def first_few(names: list[str], count: int = 3) -> str:
    """The first few of many names, in one line."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(shown(name) for name in names[:count]) or "nothing") + more
