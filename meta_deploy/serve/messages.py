"""What goes between the HTTP application and the models. Knows bytes; imports nothing heavy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

PNG, JSON, BYTES = "image/png", "application/json", "application/octet-stream"
LENGTH = "inference-header-content-length"  # of a v2 request's or answer's JSON, where bytes follow it


@dataclass(frozen=True)
class Settings:
    """What a request may choose; None is the bundle's own. As in a `Predictor`."""

    score_threshold: float | None = None
    tile: int | None = None
    tile_overlap: int | None = None
    slide: bool = False
    depth: int | None = None


@dataclass(frozen=True)
class Query:
    """An image as it was sent, and how it is to be answered within `seconds`."""

    image: bytes
    name: str | None
    settings: Settings
    overlay: bool
    seconds: float


@dataclass(frozen=True)
class TensorQuery:
    """A request of the v2 protocol: its body, and the length of its JSON where bytes follow."""

    body: bytes
    json_bytes: int | None
    seconds: float


@dataclass(frozen=True)
class Answer:
    """What is to be sent.

    Attributes:
        seconds: of its steps, by name.
        batches: the sizes of those that it was the first in.
    """

    status: int
    body: bytes
    kind: str = JSON
    headers: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    batches: tuple[int, ...] = ()


def refusal(status: int, why: str) -> Answer:
    """An error, as one line, in the v2 protocol's form."""
    return Answer(status, json.dumps({"error": " ".join(why.split())}).encode() + b"\n")
