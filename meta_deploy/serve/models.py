"""The models that are served, by name and version: what people call them, and what is known of each.

Knows bundles; must not know HTTP or what runs a model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from meta_deploy.bundle.bundle import Bundle, digest_of
from meta_deploy.bundle.shipped import locate
from meta_deploy.errors import InputError
from meta_deploy.serve.limits import batch_of
from meta_deploy.serve.messages import Answer, Query, TensorQuery
from meta_deploy.serve.tensors import described

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_VERSION = r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}"
FIRST = "1"  # the version of a model of which there is one


@dataclass(frozen=True)
class Card:
    """What is known of a model without opening it.

    Attributes:
        name, version: as in paths.
        path: of its bundle, absolute.
        shown: the same as it was given.
        digest: of the bundle, which tells it from others.
        model, task, target, precision, classes: as in its manifest.
        takes_images: whether /predict is for it.
        batch: images that can share a run of it.
        score_threshold: of detections; None where there are none.
        tile: the side of the tiles that larger images are run in.
        tensors: its `platform`, `inputs` and `outputs` in the v2 protocol.
    """

    name: str
    version: str
    path: str
    shown: str
    digest: str
    model: str
    task: str
    target: str
    precision: str
    classes: tuple[str, ...]
    takes_images: bool
    batch: int
    score_threshold: float | None
    tile: int | None
    tensors: dict[str, Any]

    def public(self) -> dict[str, Any]:
        """For clients: without places on this machine."""
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in ("path", "shown", "digest", "tensors")
        }

    def __str__(self) -> str:
        return f"{self.name} (version {self.version})"


class Model(Protocol):
    """What answers for a model: a worker, or many of them elsewhere."""

    async def predict(self, query: Query) -> Answer:
        """Answer an image."""

    async def infer(self, query: TensorQuery) -> Answer:
        """Answer tensors."""


def cards_of(bundles: Sequence[str]) -> list[Card]:
    """Of BUNDLE, NAME=BUNDLE and NAME:VERSION=BUNDLE; a bundle is a folder or the name of one in the package.

    Raises:
        InputError: one is no bundle, has a name that no URL can hold, or another's name and version.
    """
    cards: list[Card] = []
    for given in bundles:
        name, version, place = _parsed(given)
        bundle = Bundle.open(locate(place))
        card = _card(bundle, name, version)
        if any((other.name, other.version) == (name, version) for other in cards):
            raise InputError(
                f"there are two models '{name}' of version {version}; name them, as in {name}:2={place}"
            )
        cards.append(card)
    return cards


def _parsed(given: str) -> tuple[str, str, str]:
    """Name, version and place."""
    match = re.fullmatch(f"({_NAME})(?::({_VERSION}))?=(.+)", given, re.DOTALL)
    if match and not os.path.lexists(given):
        return match[1], match[2] or FIRST, match[3]
    told, equals, _ = given.partition("=")
    if equals and os.sep not in told and not os.path.lexists(given):
        raise InputError(
            f"'{given}' is not NAME=BUNDLE or NAME:VERSION=BUNDLE; names and versions are of letters, "
            "digits, '.', '_' and '-', and begin with a letter or a digit"
        )
    name = Path(os.path.abspath(given)).name
    if not re.fullmatch(_NAME, name):
        raise InputError(
            f"'{name}' cannot be a model's name in a URL; give one of letters, digits, '.', '_' and '-', "
            f"as in my-model={given}"
        )
    return name, FIRST, given


def _card(bundle: Bundle, name: str, version: str) -> Card:
    detects = bundle.task in ("detection", "instance-segmentation")
    return Card(
        name=name,
        version=version,
        path=os.path.abspath(bundle.path),
        shown=str(bundle.path),
        digest=digest_of(bundle.path),
        model=bundle.model_name,
        task=bundle.task,
        target=bundle.target,
        precision=bundle.precision,
        classes=tuple(bundle.classes or ()),
        takes_images=bundle.takes_images,
        batch=batch_of(bundle),
        score_threshold=bundle.shown_score if detects else None,
        tile=bundle.tile,
        tensors=described(bundle),
    )


def version_key(version: str) -> list[tuple[int, int, str]]:
    """By which versions are in order: 9 before 10, 1.2 before 1.10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", version)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]
