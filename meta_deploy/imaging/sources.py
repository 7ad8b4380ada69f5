"""Finding images, videos and arrays by what is named on a command line. Knows paths, and no formats."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from meta_deploy.errors import InputError

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif",
))
VIDEO_SUFFIXES = frozenset((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"))
# fmt: on
ARRAY_SUFFIXES = frozenset((".npz",))
# What meta-infer writes for an input.
_WRITTEN = r"(?s:.*)-(overlay(-\d+)?\.(jpg|png|mp4)|labels(-\d+)?\.(png|tif)|outputs(-\d+)?\.npz)"


@dataclass(frozen=True)
class Source:
    """One thing named on the command line: an image file, a video, or an .npz file of arrays."""

    path: Path
    video: bool = False

    @property
    def arrays(self) -> bool:
        return self.path.suffix.lower() in ARRAY_SUFFIXES


def expand(arguments: Iterable[str], note: Callable[[str], None] = lambda line: None) -> list[Source]:
    """Arguments (image, video, .npz, folder, or glob pattern) to the files they name, each once, in order.

    A folder gives the images directly in it, sorted, by suffix; without images, the .npz files. What
    meta-infer has written there, by its name, is left out beside others, and `note` told. A file that does
    not exist is kept, for reading it to say so.

    Raises:
        InputError: a folder without either, or with what meta-infer has written alone, a pattern without
            matches, or an empty name.
    """
    found: dict[str, Source] = {}
    for argument in arguments:
        paths = _matches(argument)
        others = [path for path in paths if not re.fullmatch(_WRITTEN, path.name)]
        if os.path.isdir(argument) and not others:
            raise InputError(
                f"the folder '{argument}' holds only what meta-infer wrote, such as '{paths[0].name}'; "
                "name the folder of the pictures, or single files"
            )
        if others and len(others) < len(paths):
            first, *more = (path.name for path in paths if path not in others)
            told = f"'{first}'" + (f" and {len(more)} more" if more else "")
            note(f"left out of '{argument}' what meta-infer wrote: {told}")
        for path in others or paths:
            found.setdefault(os.path.abspath(path), Source(path, path.suffix.lower() in VIDEO_SUFFIXES))
    return list(found.values())


def _matches(argument: str) -> list[Path]:
    if not argument:
        raise InputError("an input's name is empty; name an image, a folder or a pattern")
    path = Path(argument)
    if os.path.isdir(path):  # unlike Path's own, false where it cannot be known: a name too long
        try:
            files = sorted(path.iterdir())
            paths = [p for p in files if _known(p, IMAGE_SUFFIXES)]
            paths = paths or [p for p in files if _known(p, ARRAY_SUFFIXES)]
        except OSError as error:
            raise InputError(f"cannot read the folder '{argument}': {error.strerror}") from error
        if not paths:
            raise InputError(f"there is no image in the folder '{argument}'; name a folder that has some")
        return paths
    if not os.path.exists(path) and glob.has_magic(argument):
        paths = sorted(
            p
            for p in map(Path, glob.glob(argument, recursive=True))
            if _known(p, IMAGE_SUFFIXES | VIDEO_SUFFIXES | ARRAY_SUFFIXES)
        )
        if not paths:
            raise InputError(f"no image or video matches '{argument}'; check the pattern")
        return paths
    return [path]


def _known(path: Path, suffixes: frozenset[str]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and os.path.isfile(path)
