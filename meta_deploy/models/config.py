"""What every configuration of a model is: a frozen struct whose fields are checked, however it is made.

Knows no head and no backbone.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec

from meta_deploy.errors import InputError

Count = Annotated[int, msgspec.Meta(gt=0)]
CountOrZero = Annotated[int, msgspec.Meta(ge=0)]
TileSide = Annotated[int, msgspec.Meta(ge=16, le=1 << 20)]  # as in bundles
Positive = Annotated[float, msgspec.Meta(gt=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the configurations of heads and backbones.

    msgspec checks types and constraints only of what it decodes; here they hold for constructor calls too.

    Raises:
        InputError: a field of the wrong type or out of its range.
    """

    part: ClassVar[str] = "model"  # what messages call it

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Config):
                continue
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as error:
                raise InputError(explain(error, value, self.part, field.name)) from error

    def require(self, holds: bool, rule: str) -> None:
        """Refuse fields that do not fit each other; `rule` says which and why, with their values."""
        if not holds:
            raise InputError(f"Bad {self.part} configuration: {rule}.")


def explain(error: msgspec.ValidationError, data: Any, part: str = "model", name: str = "") -> str:
    """One sentence: the path of the bad field, its value, and what is expected there.

    Args:
        error: what msgspec raised for `data`.
        data: what was converted.
        part: "model" or "backbone".
        name: the path of `data` itself.
    """
    text = " ".join(str(error).split())
    what, _, path = text.partition(" - at `$")
    value = data
    try:
        for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
            value = value[key or int(index)]
    except (LookupError, TypeError):  # no path, but a name in the data that reads like one
        what, path = text, ""
    what = re.sub(r"Invalid (enum )?value .*", "not known to this version", what)
    where = [(name + path.rstrip("`")).lstrip("."), "" if isinstance(value, Mapping) else reprlib.repr(value)]
    words = " ".join(filter(None, where)) + ": " if any(where) else ""
    return f"Bad {part} configuration: {words}{what[0].lower() + what[1:]}."


def import_all(package: str) -> None:
    """Import every module of a package, so that each can register what it holds."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
