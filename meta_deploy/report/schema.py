"""What a report holds, and so the schema of its JSON, stated here and nowhere else.

Knows names and units, and neither how a number is measured nor how it is shown. Times are in milliseconds of
one image (of one run, where the input is arrays), memory in MB of 10^6 bytes, sizes of files in bytes.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct

SCHEMA = 1
Verdict: TypeAlias = Literal["faster", "slower", "no difference"]
PARTS = ("pre", "model", "post", "total")


class Spread(Struct, frozen=True, kw_only=True):
    """How a time is spread over the rounds."""

    median: float
    p5: float
    p90: float
    p99: float


class Ratio(Struct, frozen=True, kw_only=True):
    """A time relative to the first entry's: the median over the rounds of both times of one round.

    `low` and `high` are its confidence interval, 99 %, by a bootstrap over blocks of rounds.
    """

    value: float
    low: float
    high: float
    verdict: Verdict


class Latency(Struct, frozen=True, kw_only=True):
    """Preprocessing (decoding apart), the model and postprocessing of one image, and their sum.

    Attributes:
        rounds: timed runs; each round runs every entry once.
        total_ratio, model_ratio: to the first entry that ran; None for that one.
        drift: the model's median time in the last third of the rounds over that in the first third.
    """

    rounds: int
    pre: Spread
    model: Spread
    post: Spread
    total: Spread
    total_ratio: Ratio | None
    model_ratio: Ratio | None
    drift: float


class Entry(Struct, frozen=True, kw_only=True):
    """One thing that was compared, on one back end.

    Attributes:
        name: the shortest that tells it from the others.
        kind: what `path` is; None where it is no model.
        backend: as asked for.
        error: why there is nothing more to tell of it; None where all went well.
        runs_on: library, version, device and precision in words.
        files: name -> bytes.
        peak_memory_mb: the most memory that its own process held, from its start to the end of the timed
            rounds; None where the system does not tell.
    """

    name: str
    path: str
    kind: Literal["bundle", "onnx", "checkpoint"] | None
    backend: str
    error: str | None = None
    runs_on: str | None = None
    model: str | None = None
    task: str | None = None
    precision: str | None = None
    files: dict[str, int] = {}
    latency: Latency | None = None
    peak_memory_mb: float | None = None


class Machine(Struct, frozen=True, kw_only=True):
    """What the numbers were measured on and with. `load` is the load average before the first run."""

    cpu: str
    instruction_sets: tuple[str, ...]
    cpus: int
    memory_gb: float | None
    governor: str | None
    system: str
    versions: dict[str, str]
    load: float | None


class Settings(Struct, frozen=True, kw_only=True):
    """How it was measured. `images` is what was run on; none: random arrays, the same for all entries."""

    images: tuple[str, ...]
    warm_up: int
    runs: int
    threads: int


class Report(Struct, frozen=True, kw_only=True):
    """All that `meta-report` found.

    `disturbances` say in a sentence each why the times are not to be trusted; none: nothing was noticed.
    """

    schema: int = SCHEMA
    date: str
    command: str
    machine: Machine
    settings: Settings
    disturbances: tuple[str, ...] = ()
    entries: tuple[Entry, ...]

    def to_json(self) -> str:
        """The JSON document. What is not a finite number is null."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"
