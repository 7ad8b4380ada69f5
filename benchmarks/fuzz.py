"""Malformed inputs for the commands, by the thousand: which end in anything but an answer or one line?

    python benchmarks/fuzz.py --minutes 5 --seed 0 --only images,onnx
    python benchmarks/fuzz.py --seed 0 --only onnx --input 1234        this input alone, with its traceback

Each input is made from (seed, kind, number) alone. It goes to the main function of meta-infer or meta-export
in a process that does many, has a deadline, and may leave nothing behind. Checkpoints that load are not
traced: that takes seconds, and has its tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.fuzz_inputs import KINDS, Seeds  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DEADLINE = 20.0  # seconds an input may take
MOST_LINES = 12  # on standard error; an export tells its stages
GOOD = (0, 2, 3)


class Late(BaseException):
    """An input has taken too long."""


@dataclass
class Tally:
    """What became of the inputs of a kind."""

    codes: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        return sum(self.codes.values())


# --- in the process that does many --------------------------------------------------------------------------


def work(kind: str, seed: int, first: int, only: bool) -> None:
    """Do inputs from `first` on, telling each at its start and its end, until the process is ended."""
    tell = os.fdopen(os.dup(1), "w", buffering=1)
    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.environ.update(HOME=str(home / "home"), XDG_CACHE_HOME=str(home / "cache"), TMPDIR=str(home / "tmp"))
    for name in ("home", "cache", "tmp"):
        (home / name).mkdir()

    def end(*_: Any) -> None:
        shutil.rmtree(home, ignore_errors=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)  # the watching process has had enough; a command would go on
    try:
        if kind in ("checkpoints", "commands"):
            _leave_out_tracing()
        seeds = Seeds(home / "seeds")
        signal.signal(signal.SIGALRM, _late)
        number = first
        while True:
            tell.write(json.dumps({"start": number}) + "\n")
            outcome = try_one(kind, seed, number, seeds, home, show=only)
            tell.write(json.dumps({"end": number, **outcome}) + "\n")
            if only:
                return
            number += 1
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _late(*_: Any) -> None:
    raise Late


def _leave_out_tracing() -> None:
    from meta_deploy.errors import InputError
    from meta_deploy.export.sources.checkpoint import CheckpointSource

    def graph(self: Any, operators: str) -> Any:
        raise InputError("loaded; the rest is left out here")

    CheckpointSource.graph = graph  # type: ignore[method-assign]


def try_one(kind: str, seed: int, number: int, seeds: Seeds, home: Path, show: bool) -> dict[str, Any]:
    """The exit code of one input, as text, and what is wrong with how it ended."""
    folder = home / "input"
    folder.mkdir()
    os.chdir(folder)
    rng = random.Random(f"{seed}-{kind}-{number}")
    command, argv = KINDS[kind](rng, folder, seeds)
    before = set(os.listdir(folder))
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        code, said = called(command, argv, home / "said", show)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    wrong = [*judged(code, said), *left_behind(code, [command, *argv], folder, before, home)]
    os.chdir(home)
    shutil.rmtree(folder, ignore_errors=True)
    found = {"wrong": wrong, "argv": [command, *argv], "said": said[-2000:]} if wrong else {}
    return {"code": str(code), **found}


def called(command: str, argv: list[str], said: Path, show: bool) -> tuple[int | str, str]:
    """A command's exit code, or what it raised, and all that went to standard error, of C libraries too."""
    from meta_deploy.cli import export, infer

    main: Callable[[list[str]], int] = {"meta-infer": infer.main, "meta-export": export.main}[command]
    code: int | str
    with _redirected(said, show):
        try:
            code = main(argv)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 2 if error.code else 0
        except Late:
            traceback.print_exc()
            code = "late"
        except BaseException as error:
            traceback.print_exc()
            code = f"raised {type(error).__name__}"
    return code, said.read_text(errors="replace") if not show else ""


@contextlib.contextmanager
def _redirected(said: Path, show: bool) -> Iterator[None]:
    if show:
        yield
        return
    kept = os.dup(1), os.dup(2)
    with said.open("w") as errors, open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def judged(code: int | str, said: str) -> Iterator[str]:
    """What is wrong with a code and the words beside it."""
    if code not in GOOD:
        yield f"ended with {code}"
    if "Traceback (most recent" in said and code != "late":
        yield "a traceback"
    if "internal error" in said:
        yield "an internal error"
    if len(said.splitlines()) > MOST_LINES:
        yield f"{len(said.splitlines())} lines on standard error"
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", said):
        yield "control characters on standard error"


def left_behind(
    code: int | str, argv: list[str], folder: Path, before: set[str], home: Path
) -> Iterator[str]:
    """What lies where it should not."""
    new = set(os.listdir(folder)) - before
    allowed: set[str] = set()
    if code == 0 or argv[0] == "meta-infer":  # which does what it can; an export leaves all or nothing
        asked_for = {text.partition("=")[2] or text for text in argv}
        made_by_name = {name for name in new if (folder / name / "manifest.json").exists()}
        allowed = {"meta-infer-out", *(text.split("/")[0] for text in asked_for), *made_by_name}
    if wrong := sorted(new - allowed):
        yield f"left {wrong[:3]} in the folder"
    hidden = [path.name for path in folder.rglob(".*") if path.name not in before]
    if hidden:
        yield f"left {hidden[:3]} hidden"
    for place in ("home", "tmp"):
        if names := os.listdir(home / place):
            yield f"left {names[:3]} in {place}"
            shutil.rmtree(home / place)
            (home / place).mkdir()


# --- in the process that watches ----------------------------------------------------------------------------


def fuzz(kind: str, seed: int, seconds: float, least: int = 0) -> Tally:
    """Run inputs of one kind for some seconds, and at least so many of them."""
    tally, number = Tally(), 0
    began = time.monotonic()
    while time.monotonic() - began < seconds or tally.inputs < least:
        remaining = max(1.0, seconds - (time.monotonic() - began))
        number = _watch(kind, seed, number, remaining, least, tally)
    tally.seconds = time.monotonic() - began
    return tally


def _watch(kind: str, seed: int, first: int, seconds: float, least: int, tally: Tally) -> int:
    """One process, until its time is over or it dies; the number of the next input."""
    command = [sys.executable, __file__, "--work", kind, "--seed", str(seed), "--input", str(first)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    events = selectors.DefaultSelector()
    events.register(process.stdout, selectors.EVENT_READ)
    began, running, next_one = time.monotonic(), None, first
    try:
        while time.monotonic() - began < seconds or tally.inputs < least:
            silent = not events.select(DEADLINE + 60)
            line = "" if silent else process.stdout.readline()
            if not line:  # it hangs, or died
                how = "hangs" if silent else f"died with {process.wait()}"
                if running is None:
                    raise RuntimeError(f"the process for {kind} {how} before its first input")
                _count(tally, kind, seed, {"end": running, "code": how, "wrong": [how]})
                return running + 1
            event = json.loads(line)
            running = event.get("start")
            if "end" in event:
                next_one = event["end"] + 1
                _count(tally, kind, seed, event)
        return next_one
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _count(tally: Tally, kind: str, seed: int, event: dict[str, Any]) -> None:
    tally.codes[event["code"]] += 1
    if event.get("wrong"):
        again = f"python benchmarks/fuzz.py --seed {seed} --only {kind} --input {event['end']}"
        finding = {key: event[key] for key in ("wrong", "argv", "said") if key in event}
        tally.findings.append({**finding, "again": again})
        print(f"{kind} {event['end']}: {'; '.join(event['wrong'])}\n    {again}", file=sys.stderr)


def table(tallies: dict[str, Tally]) -> str:
    """A line a kind, and the sum."""
    lines = [
        f"{'kind':<14}{'inputs':>8}{'done':>8}{'refused':>9}{'unlike':>8}{'findings':>10}{'a second':>10}"
    ]
    for kind, tally in tallies.items():
        counts = [tally.codes[str(code)] for code in GOOD]
        rate = tally.inputs / max(tally.seconds, 1e-9)
        row = f"{kind:<14}{tally.inputs:>8}{counts[0]:>8}{counts[1]:>9}{counts[2]:>8}"
        lines.append(f"{row}{len(tally.findings):>10}{rate:>10.1f}")
    total = sum(tally.inputs for tally in tallies.values())
    lines.append(f"{'all':<14}{total:>8}{sum(len(t.findings) for t in tallies.values()):>35}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="for all kinds together (default: 5)")
    parser.add_argument("--least", type=int, default=0, help="inputs of each kind, however long they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS), help=f"of {','.join(KINDS)}")
    parser.add_argument("--input", type=int, help="this input of the one kind alone")
    parser.add_argument("--json", type=Path, default=RESULTS / "fuzz.json")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(args.work, args.seed, args.input, only=False)
        return 0
    kinds = args.only.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"'{unknown[0]}' is no kind of input; choose from {', '.join(KINDS)}")
    if args.input is not None:
        os.environ["META_DEPLOY_DEBUG"] = "1"
        work(kinds[0], args.seed, args.input, only=True)
        return 0
    tallies = {kind: fuzz(kind, args.seed, args.minutes * 60 / len(kinds), args.least) for kind in kinds}
    print(table(tallies))
    content = {
        kind: {
            "inputs": tally.inputs,
            "codes": dict(tally.codes),
            "seconds": round(tally.seconds, 1),
            "findings": tally.findings,
        }
        for kind, tally in tallies.items()
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"seed": args.seed, "kinds": content}, indent=1) + "\n")
    return 1 if any(tally.findings for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
