"""Files of every file system that pyarrow knows, by their URI. Knows names and bytes, and no image."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from meta_deploy.errors import ImageError, InputError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_URI = re.compile(r"([a-z][a-z0-9+.-]+)://([^/?]*)(.*?)(\?\w+=.*)?", re.DOTALL | re.IGNORECASE)


def is_uri(name: str) -> bool:
    """Whether it is a URI, such as s3://bucket/key, and not a path."""
    return _URI.fullmatch(name) is not None


def split(uri: str) -> tuple[str, str]:
    """A URI without its query, and that."""
    match = _URI.fullmatch(uri)
    assert match is not None, uri
    query = match[4] or ""
    return uri[: len(uri) - len(query)], query


def located(uri: str) -> tuple[FileSystem, str]:
    """The file system of a URI, and the path in it.

    A query, such as `?endpoint_override=…&scheme=http` of s3://, is for the file system. Else the characters
    stand for themselves, as in the stores' own tools; only those of file:// are percent-encoded.

    Raises:
        InputError: no such file system, or it cannot be opened.
    """
    match = _URI.fullmatch(uri)
    assert match is not None, uri
    scheme, place, path, query = match.groups()
    system, root = _opened(scheme.lower(), place, query or "")
    return system, root.rstrip("/") + (unquote(path) if scheme.lower() == "file" else path)


@functools.cache
def _opened(scheme: str, place: str, query: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem

    uri = f"{scheme}://{place}{'' if place else '/'}{query}"
    try:
        return FileSystem.from_uri(uri)
    except (ValueError, OSError, NotImplementedError) as error:
        raise InputError(f"cannot open '{uri}': {_reason(error)}; check its name and your access") from error


def content(uri: str) -> bytes:
    """The bytes of a file. Raises ImageError: it cannot be read."""
    try:
        system, path = located(uri)
        with system.open_input_stream(path) as stream:
            return stream.read()
    except InputError as error:
        raise ImageError(str(error)) from error
    except FileNotFoundError as error:
        raise ImageError(f"there is no file '{uri}'; check the path") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read '{uri}': {_reason(error)}; check the path and your access") from error


def listed(uri: str) -> list[str] | None:
    """The URIs of the files directly in a folder, sorted; None: it is no folder.

    Raises:
        InputError: it cannot be listed.
    """
    from pyarrow.fs import FileSelector, FileType

    base, query = split(uri)
    base = base.rstrip("/")
    try:
        system, path = located(uri)
        if system.get_file_info(path.rstrip("/") or "/").type != FileType.Directory:
            return None
        infos = system.get_file_info(FileSelector(path.rstrip("/") or "/"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot list '{uri}': {_reason(error)}; check the path and your access") from error
    names = sorted(info.base_name for info in infos if info.type == FileType.File)
    return [f"{base}/{quote(name) if base.lower().startswith('file:') else name}{query}" for name in names]


def _reason(error: Exception) -> str:
    """The first line of what a file system says."""
    text = getattr(error, "strerror", None) or str(error)
    return text.strip().partition("\n")[0].rstrip(".")
