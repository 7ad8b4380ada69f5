"""Check every installed back end on this machine's GPU: agreement with PyTorch, speed, memory.

    python benchmarks/gpu_check.py [--case CASE ...] [--batch N ...] [--precision P ...] [--backend NAME ...]

CASE is a Mask R-CNN and a size, MODEL@SIDE or MODEL@HxW, or a Mask R-CNN's .pth file. Bundles are exported
first. Detections on photos are compared with PyTorch's in float32 on the CPU; then the models are timed from
array to array, interleaved. Without a GPU, the CPU back ends are checked. A back end that cannot run gets a
row with the reason. Exit code 1 if a back end's results are wrong.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import Case, checkpoint, machine, parser, photo_folder, photos, ratio, save, table
from benchmarks.gpu_backends import KINDS
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.heads.mask_rcnn import MaskRCNNConfig
from meta_deploy.targets import TARGETS
from meta_deploy.targets.tensorrt.build import available

CASES = ("meta-t-mask-rcnn@512", "meta-s-mask-rcnn@512", "meta-b-mask-rcnn@512")
PRECISION_NAMES = tuple(PRECISIONS)
BASE = "pytorch fp32"  # what others are so many times faster than
_LONGEST_CELL = 120
_SHORT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryAllocation|bad_alloc|failed to allocate", re.I
)

Record = dict[str, Any]  # of one back end at one batch size; `reason` where there is none


@dataclass(frozen=True)
class Contender:
    """A back end in a precision."""

    kind: str
    precision: str

    def __str__(self) -> str:
        return f"{self.kind} {self.precision}"


def main(argv: Sequence[str] | None = None) -> int:
    gpu = find_gpu()
    torch_gpu = torch.cuda.is_available()
    args = _parser(gpu).parse_args(argv)
    if wrong := [case for case in args.case if not is_mask_rcnn(case)]:
        sys.exit(f"'{wrong[0]}' is not MODEL@SIZE of a Mask R-CNN; this script compares boxes and masks")
    contenders, notes = choose(args.backend, args.precision, gpu is not None, torch_gpu)
    for note in notes:
        print(note, file=sys.stderr)
    here = {**machine(), **({"gpu": gpu} if gpu else {})}
    cases: dict[str, Any] = {}
    for case in args.case:
        settings = {name: getattr(args, name) for name in ("batch", "runs", "count")}
        for records in check(case, contenders, args):  # what was found stays if time runs out
            cases[str(case)] = records
            save(args.json, machine=here, settings=settings, notes=notes, cases=cases)
        print(f"{case}\n\n{table(rows(records, args.batch))}\n", flush=True)
    return exit_code(cases)


def _parser(gpu: dict[str, Any] | None) -> Any:
    p = parser(__doc__, f"gpu_check-{slug(gpu['name'] if gpu else 'no gpu')}")
    p.add_argument(
        "--case", nargs="+", type=Case.parse, default=[*map(Case.parse, CASES)], help=f"default: {CASES}"
    )
    p.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="N", help="default: 1 8")
    p.add_argument(
        "--precision", nargs="+", choices=PRECISION_NAMES, default=PRECISION_NAMES, help="default: all"
    )
    p.add_argument("--backend", nargs="+", choices=[*KINDS], default=[*KINDS], help="default: all")
    p.add_argument("--count", type=int, default=16, help="photos (default: %(default)s)")
    p.add_argument("--runs", type=int, default=50, help="timed runs of each (default: %(default)s)")
    p.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="that timing takes at one batch size; slow ones have fewer runs (default: %(default)s)",
    )
    p.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 1) // 4),
        help="exports at a time (default: %(default)s)",
    )
    p.add_argument("--reuse", action="store_true", help="take the bundles of an earlier run that are there")
    return p


def is_mask_rcnn(case: Case) -> bool:
    """Whether a case is one that can be checked: a Mask R-CNN at one size."""
    if case.size is None:
        return isinstance(load_model(checkpoint(case)).config, MaskRCNNConfig)
    return not case.dynamic and case.model.endswith("-mask-rcnn")


def find_gpu() -> dict[str, Any] | None:
    """The GPU from nvidia-smi, or from PyTorch if only that sees it."""
    found = common.gpu()
    if found is None and torch.cuda.is_available():
        return {"name": torch.cuda.get_device_name(0)}
    return found


def slug(name: str) -> str:
    """A name for use in a file name: lower case, with dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def choose(
    kinds: Iterable[str], precisions: Iterable[str], gpu: bool, torch_gpu: bool
) -> tuple[list[Contender], list[str]]:
    """The contenders to check here, and a line for each that is left out and why."""
    notes = []
    written = {name for name, precision in PRECISIONS.items() if not precision.calibrates}
    for precision in precisions:
        if precision not in written:
            notes.append(f"{precision} is left out: nothing is calibrated here")
    absent = [KINDS[kind].title for kind in kinds if KINDS[kind].on == "gpu" and not gpu]
    if absent:
        notes.append(f"left out, as there is no NVIDIA GPU here: {', '.join(absent)}")
    if not torch_gpu:
        notes.append(f"PyTorch runs on the CPU, in fp32 alone: {'it has no CUDA' if gpu else 'no GPU'}")
    chosen = [
        Contender(kind, precision)
        for kind in kinds
        for precision in precisions
        if (gpu or KINDS[kind].on != "gpu")
        and precision in written
        and precision in KINDS[kind].precisions(torch_gpu)
    ]
    return chosen, notes


def check(case: Case, contenders: Sequence[Contender], args: Any) -> Iterator[dict[str, dict[int, Record]]]:
    """Check one model: after each group the records so far, for each contender and batch size."""
    pictures = photos(args.photos, args.count)
    records: dict[str, dict[int, Record]] = {str(contender): {} for contender in contenders}
    bundles = export_all(case, contenders, args)
    with tempfile.TemporaryDirectory() as folder:
        for batch in args.batch:
            job = {
                "checkpoint": str(checkpoint(case)),
                "size": case.size,
                "photos": [str(path) for path in pictures],
                "reference": f"{folder}/reference.npz",
                "batch": batch,
                "runs": args.runs,
                "seconds": args.seconds,
            }
            base: list[float] | None = None
            for group in groups(contenders, torch.cuda.is_available()):
                found = run_group(job, group, {one: bundles[batch][one] for one in group}, Path(folder))
                base = compare_times(found, base)
                for name, record in found.items():
                    records[name][batch] = record
                yield records


def groups(contenders: Sequence[Contender], torch_gpu: bool) -> list[list[Contender]]:
    """Contenders to time together: CPU and GPU apart, since slow CPU runs would keep a GPU waiting.

    PyTorch's group comes first, since the others' times are compared with it.
    """
    on_gpu = [one for one in contenders if KINDS[one.kind].on_gpu(torch_gpu)]
    on_cpu = [one for one in contenders if one not in on_gpu]
    order = [on_gpu, on_cpu] if torch_gpu else [on_cpu, on_gpu]
    return [group for group in order if group]


# --- bundles ------------------------------------------------------------------------------------------------

Bundles = dict[Contender, Path | str | None]  # a reason where there is none; None: needs none


def export_all(case: Case, contenders: Sequence[Contender], args: Any) -> dict[int, Bundles]:
    """The bundles for every batch size: paths, or the reason why there is none."""
    wanted = {
        (target, contender.precision, batch)
        for contender in contenders
        for batch in args.batch
        if (target := KINDS[contender.kind].target)
    }
    made: dict[tuple[str, str, int], Path | str] = {}
    # TensorRT times kernels while it builds, which others would disturb.
    for jobs, group in (
        (args.jobs, sorted(key for key in wanted if key[0] != "tensorrt")),
        (1, sorted(key for key in wanted if key[0] == "tensorrt")),
    ):
        with ThreadPoolExecutor(jobs) as pool:
            made |= zip(group, pool.map(lambda key: export(case, *key, args), group), strict=True)

    def bundle(contender: Contender, batch: int) -> Path | str | None:
        target = KINDS[contender.kind].target
        return made[target, contender.precision, batch] if target else None

    return {batch: {one: bundle(one, batch) for one in contenders} for batch in args.batch}


def export(case: Case, target: str, precision: str, batch: int, args: Any) -> Path | str:
    """Export one bundle; its path, or the reason why there is none. It is compared later, not here."""
    if target.startswith("tensorrt") and not available(target):
        return f"{TARGETS[target].title} is not installed; pip install -e '.[{target}]'"
    out = common.WORK / "gpu_check" / f"{slug(str(case))}-{target}-{precision}-batch-{batch}"
    if args.reuse and (out / "manifest.json").exists():
        return out
    print(f"exporting {out.name}", file=sys.stderr)
    command = [sys.executable, "-m", "meta_deploy.cli.export", "--ckpt", checkpoint(case), *case.options]
    command += ["--target", target, f"--{precision}", "--batch", str(batch), "--no-verify", "--no-tune"]
    command += ["--calib-images", args.photos or photo_folder(), "--out", out]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    return out if done.returncode == 0 else f"not exported: {last_line(done.stderr, done.returncode)}"


def last_line(output: str, code: int) -> str:
    """The last line of a failed command's output."""
    lines = [line.strip() for line in re.split(r"[\r\n]", output) if line.strip()]
    return lines[-1] if lines and code > 0 else ended(code)


def ended(code: int) -> str:
    return f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"


# --- running ------------------------------------------------------------------------------------------------


def run_group(
    job: dict[str, Any], group: Sequence[Contender], bundles: Bundles, folder: Path
) -> dict[str, Record]:
    """Check contenders together. One that crashes the process is left out, and the others start again.

    One that does not fit into the GPU's memory next to the others is checked alone.
    """
    records = {str(one): {"reason": bundle} for one, bundle in bundles.items() if isinstance(bundle, str)}
    todo = [one for one in group if str(one) not in records]
    while todo:
        code, found, culprit = run_process(job, todo, bundles, folder)
        records |= found
        if code == 0:
            break
        if culprit is not None:
            records[culprit] = {"reason": ended(code)}
        left = [one for one in todo if "reason" not in records.get(str(one), {})]
        if len(left) == len(todo):  # nobody's fault that could be told
            records |= {str(one): {**records.get(str(one), {}), "reason": ended(code)} for one in todo}
            break
        todo = left
    for one in group:
        short = _SHORT_OF_MEMORY.search(records[str(one)].get("reason", ""))
        if short and len(group) > 1 and not isinstance(bundles[one], str):
            alone = run_group(job, [one], {one: bundles[one]}, folder)[str(one)]
            records[str(one)] = {**alone, "alone": True}
    return records


def run_process(
    job: dict[str, Any], todo: Sequence[Contender], bundles: Bundles, folder: Path
) -> tuple[int, dict[str, Record], str | None]:
    """Run gpu_backends.py: its exit code, its records, and the contender it was checking when it ended."""
    entries = [
        {
            "id": str(one),
            "kind": one.kind,
            "precision": one.precision,
            "bundle": str(bundles[one]) if bundles[one] else None,
        }
        for one in todo
    ]
    job_file, rows_file = folder / "job.json", folder / "rows.jsonl"
    job_file.write_text(json.dumps({**job, "contenders": entries}))
    rows_file.write_text("")
    script = Path(__file__).with_name("gpu_backends.py")
    command = [sys.executable, script, job_file, rows_file]
    print(f"checking {', '.join(map(str, todo))}, batch {job['batch']}", file=sys.stderr)
    code = subprocess.run(command, cwd=common.ROOT, stdout=subprocess.DEVNULL).returncode
    return code, *read_rows(rows_file.read_text().splitlines())


def read_rows(lines: Iterable[str]) -> tuple[dict[str, Record], str | None]:
    """A record per contender, and the contender being checked at the end if it has no record."""
    records: dict[str, Record] = {}
    at, finds = None, None
    for line in map(json.loads, lines):
        at = line.get("at", at)
        finds = line.get("reference_finds", finds)
        if name := line.pop("id", None):
            records.setdefault(name, {"reference_finds": finds}).update(line)
    return records, None if at in records else at


def compare_times(records: dict[str, Record], base: list[float] | None) -> list[float] | None:
    """Replace the single times by medians and speedups over PyTorch eager in float32.

    `base` are PyTorch eager's times from an earlier group, if it was in one; returned for the next group.
    """
    times = {name: record.pop("times") for name, record in records.items() if record.get("times")}
    beside = times.get(BASE)
    base = beside or base
    for name, values in times.items():
        records[name] |= {
            "ms": float(np.median(values)),
            "p90_ms": float(np.quantile(values, 0.9)),
            "runs": len(values),
        }
        if beside and not records[name].get("alone") and not records[BASE].get("alone"):
            records[name]["faster"] = ratio(beside, values)
        elif base:
            records[name]["faster"] = float(np.median(base) / np.median(values))
    return base


# --- telling ------------------------------------------------------------------------------------------------


def rows(records: dict[str, dict[int, Record]], batches: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of the table: memory at the largest batch, agreement and AP at the worst."""
    made = []
    for name, of_batch in records.items():
        kind, precision = name.split(" ")
        made.append(
            {
                "back end": KINDS[kind].title,
                "precision": precision,
                **{f"batch {n}, ms": of_batch[n].get("ms") for n in batches},
                **{f"batch {n}, times faster": of_batch[n].get("faster") for n in batches},
                "memory, MB": of_batch[max(batches)].get("memory_mb"),
                "agreement": _least(
                    record.get("figures", {}).get("agreement") for record in of_batch.values()
                ),
                "box AP": _least(record.get("ap", {}).get("box") for record in of_batch.values()),
                "mask AP": _least(record.get("ap", {}).get("mask") for record in of_batch.values()),
                "result": result(of_batch),
            }
        )
    return made


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def result(of_batch: dict[int, Record]) -> str:
    """ok, or what is wrong at which batch size."""
    told: dict[str, list[int]] = {}
    for batch, record in of_batch.items():
        told.setdefault(verdict(record), []).append(batch)
    if len(told) == 1:
        return next(iter(told))
    return "; ".join(f"batch {', '.join(map(str, sizes))}: {text}" for text, sizes in told.items())


def verdict(record: Record) -> str:
    """The result at one batch size, cut to fit a table cell; the JSON file has all of it."""
    if is_wrong(record):
        figures = record["figures"]
        off = [
            f"{name} {figures[name]:.3g} (wanted {limit:g})"
            for name, limit in record["tolerance"].items()
            if name in figures and not _holds(name, figures[name], limit)
        ]
        return f"WRONG: {', '.join(off)}"
    if "reason" in record:
        reason = " ".join(record["reason"].split()).replace("|", "/")
        return reason if len(reason) <= _LONGEST_CELL else f"{reason[: _LONGEST_CELL - 1]}…"
    if record.get("reference_finds") == 0:
        return "nothing is found in these photos, so nothing was compared"
    return "ok"


def _holds(name: str, figure: float, limit: float) -> bool:
    return figure <= limit if "difference" in name else figure >= limit


def is_wrong(record: Record) -> bool:
    """Whether it ran and its results do not agree with PyTorch."""
    return record.get("passed") is False


def exit_code(cases: dict[str, dict[str, dict[int, Record]]]) -> int:
    """1 if a back end's results were wrong; a back end that could not run does not count."""
    records = (
        r for contenders in cases.values() for batches in contenders.values() for r in batches.values()
    )
    return int(any(map(is_wrong, records)))


if __name__ == "__main__":
    sys.exit(main())
