"""The bundles that come with the package, by name."""

from __future__ import annotations

import os
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = ("nuclei", "nuclei-semantic")
DEFAULT = SHIPPED[0]


def locate(bundle: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    """A bundle's folder: the path itself, or that of a shipped bundle by its name (None: the default one).

    A path that exists is taken before a name.
    """
    name = DEFAULT if bundle is None else bundle
    if bundle is None or (name in SHIPPED and not os.path.lexists(name)):
        return ASSETS / name
    return name
