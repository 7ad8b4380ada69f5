"""How much a request may ask for, and how many there may be at once. Knows numbers and bundles."""

from __future__ import annotations

from dataclasses import dataclass

from meta_deploy.bundle.bundle import Bundle

MOST_PIECES = 1024  # tiles or windows of one image
MOST_HEADERS = 32 << 10  # bytes


@dataclass(frozen=True)
class Limits:
    """What is refused, and by which status: too large a body (413), too many pixels (422), a full queue
    (429), too long a time (504).

    Attributes:
        body: bytes of a request's body.
        pixels: of an image.
        queue: requests of a model that wait or are worked on.
        seconds: from a request's arrival to its answer; and for its body to arrive.
    """

    body: int = 32 << 20
    pixels: int = 50_000_000
    queue: int = 128
    seconds: float = 30.0


def batch_of(bundle: Bundle) -> int:
    """How many images can share a run: what the bundle takes; 1 of a raw one."""
    return 1 if bundle.task == "raw" else bundle.input.batch.max


def room(batch: int) -> int:
    """How many requests are best at a model at once: two batches, and some to be decoded and written."""
    return 2 * batch + 4
