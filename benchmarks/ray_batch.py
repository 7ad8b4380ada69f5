"""Batch runs on Ray: every image once and as a predictor has it, whatever is killed; speed, overhead, memory.

    python benchmarks/ray_batch.py [--count N] [--model BUNDLE|free] [--timed N] [--workers N] [--threads N]

Two Ray nodes on this machine (two raylets) run meta-infer on copies of the nuclei pictures in the package:
once with a model's worker killed in the middle, and once killed itself in the middle and started again. Then
one predictor alone, and both on a model that costs nothing, for what Ray costs an image. Needs [ray].
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common import ASSETS, ROOT, machine, parser, save, table
from meta_deploy.batch.cluster import connected
from meta_deploy.batch.dataset import checked, options_of
from meta_deploy.batch.inputs import gather
from meta_deploy.batch.parts import MANIFEST
from meta_deploy.batch.run import open_parts, run
from meta_deploy.bundle.bundle import write_bundle
from meta_deploy.imaging.sources import Source
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.runtime.stream import predict
from tests.bundles_by_hand import detector, manifest

SMALL = 384  # the bundle's tile: pictures up to it are one run of the model


def main() -> None:
    p = parser(__doc__ or "", "ray_batch")
    p.add_argument("--count", type=int, default=2000, help="images (default: 2000)")
    p.add_argument("--model", default="nuclei", help="of the disturbed runs; free: one that costs nothing")
    p.add_argument("--timed", type=int, default=500, help="images of the runs for speed (default: 500)")
    p.add_argument("--workers", type=int, default=2, help="models (default: 2)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads of each (default: 1)")
    p.add_argument("--part-size", type=int, default=100, help="images of a part (default: 100)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray-batch-") as scratch:
        work = Path(scratch)
        photos, pictures = copies(work / "photos", args.count)
        free = work / "free"
        write_bundle(free, manifest("instance-segmentation", (64, 64)), {"model.onnx": detector((64, 64))})
        args.model = str(free) if args.model == "free" else args.model
        expected = alone(pictures, args.model)
        with cluster() as address:
            command = Command(photos, address, args)
            killed_worker = command.with_a_worker_killed(work / "one")
            killed_run = command.killed_and_resumed(work / "two")
            for result, out in ((killed_worker, work / "one"), (killed_run, work / "two")):
                result["wrong"] = wrong(out, photos, expected)
            speed = rates(photos, work, args, address, str(free))
    print(
        table(
            [
                {"run": "a worker killed", **told(killed_worker)},
                {"run": "killed, resumed", **told(killed_run)},
            ]
        )
    )
    print()
    print(table([speed]))
    save(args.json, machine=machine(), worker_killed=killed_worker, run_killed=killed_run, speed=speed)
    if killed_worker["killed_at"] is None:
        sys.exit("no worker was killed: the run was over too soon; take a larger --count")
    if killed_worker["wrong"] or killed_run["wrong"]:
        sys.exit("an image is missing, there twice, or has another result")


# --- what is run, and what is right -----------------------------------------------------------------------


def copies(folder: Path, count: int) -> tuple[Path, list[Path]]:
    """A folder of `count` pictures, copies of those in the package that are one run of the model."""
    pictures = [p for p in sorted((ASSETS / "images").glob("*.png")) if max(Image.open(p).size) <= SMALL]
    folder.mkdir()
    for i in range(count):
        shutil.copy(pictures[i % len(pictures)], folder / f"{i:06d}.png")
    return folder, pictures


def alone(pictures: Sequence[Path], model: str) -> list[dict[str, Any]]:
    """What meta-infer --json says of each picture."""
    command = [sys.executable, "-m", "meta_deploy.cli.infer", *map(str, pictures), "--model", model]
    command += ["--json", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return [content(entry) for entry in json.loads(done.stdout)["images"]]


def content(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("size", "detections")}


def wrong(out: Path, photos: Path, expected: Sequence[dict[str, Any]]) -> int:
    """Images that are not there exactly once with the result that they should have."""
    found = [
        (row["path"], content(row["result"]))
        for part in sorted(out.glob("part-*.parquet"))
        for row in pq.read_table(part).to_pylist()
    ]
    right = [(str(path), expected[i % len(expected)]) for i, path in enumerate(sorted(photos.iterdir()))]
    return sum(a != b for a, b in zip(found, right, strict=False)) + abs(len(found) - len(right))


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """Two Ray nodes on this machine; their address."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    node = {"num_cpus": 2, "object_store_memory": 1 << 30, "include_dashboard": False}
    two = Cluster(initialize_head=True, head_node_args=node)
    try:
        two.add_node(num_cpus=2, object_store_memory=1 << 30)
        two.wait_for_nodes()
        yield two.address
    finally:
        two.shutdown()


# --- runs that are disturbed ------------------------------------------------------------------------------


class Command:
    """meta-infer on the cluster, watched from outside."""

    def __init__(self, photos: Path, address: str, args: Any):
        self._photos, self._count = photos, args.count
        self._options = ["--ray", address, "--model", args.model, "--part-size", args.part_size]
        self._options += ["--workers", args.workers, "--threads", args.threads]

    def with_a_worker_killed(self, out: Path) -> dict[str, Any]:
        """A whole run, of which a model's worker is killed after a third."""
        process, began = self._start(out), time.perf_counter()
        memory: list[tuple[int, int, int]] = []
        killed_at = None
        while process.poll() is None:
            done = images_done(out)
            memory.append((done, *resident(process.pid)))
            if killed_at is None and done >= self._count // 3 and (running := models()):
                killed_at = done
                os.kill(running[0], signal.SIGKILL)
            time.sleep(1)
        return {
            "exit_code": process.returncode,
            "seconds": time.perf_counter() - began,
            "killed_at": killed_at,
            "memory": memory,
        }

    def killed_and_resumed(self, out: Path) -> dict[str, Any]:
        """A run that is killed when half is done, and one that goes on with it."""
        process, began = self._start(out), time.perf_counter()
        while process.poll() is None and images_done(out) < self._count // 2:
            time.sleep(0.2)
        process.kill()
        process.wait()
        before = {part: part.stat().st_mtime_ns for part in out.glob("part-*.parquet")}
        kept = images_done(out)
        process = self._start(out)
        code = process.wait()
        return {
            "exit_code": code,
            "seconds": time.perf_counter() - began,
            "killed_at": kept,
            "parts_done_twice": sum(part.stat().st_mtime_ns != at for part, at in before.items()),
        }

    def _start(self, out: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "meta_deploy.cli.infer", self._photos, "--out", out, *self._options]
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)


def images_done(out: Path) -> int:
    """By the list of finished parts."""
    if not (out / MANIFEST).exists():
        return 0
    lines = (out / MANIFEST).read_text().splitlines()[1:]
    return sum(json.loads(line)["images"] for line in lines)


def models() -> list[int]:
    """The processes that have a model, of this user's Ray nodes."""
    return [pid for pid, name in processes() if re.match(r"ray::\S*Model", name)]


def resident(driver: int) -> tuple[int, int]:
    """MB of the command, and of Ray's workers together, without what they share."""
    workers = [pid for pid, name in processes() if name.startswith("ray::")]
    return private(driver), sum(map(private, workers))


def processes() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield (
                int(folder.name),
                (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"),
            )
        except OSError:
            continue


def private(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) // 1024


# --- speed ------------------------------------------------------------------------------------------------


def rates(photos: Path, work: Path, args: Any, address: str | None, free: str) -> dict[str, float]:
    """Images a second, and CPU milliseconds an image, of one predictor and on Ray, with either model.

    What Ray costs an image is the difference with the model that costs nothing.
    """
    found: dict[str, float] = {}
    with connected(address):
        for name, bundle, count in (("nuclei", "nuclei", args.timed), ("free", free, args.count)):
            alone = one_predictor(photos, bundle, count)
            on_ray = one_run(photos, bundle, work / f"out-{name}", args, count)
            found |= {f"{name}_predictor": alone[0], f"{name}_ray": on_ray[0]}
            found |= {f"{name}_predictor_cpu_ms": alone[1], f"{name}_ray_cpu_ms": on_ray[1]}
    found["nuclei_gain"] = found["nuclei_ray"] / found["nuclei_predictor"]
    found["ray_cpu_ms_an_image"] = found["free_ray_cpu_ms"] - found["free_predictor_cpu_ms"]
    return found


def one_predictor(photos: Path, bundle: str, count: int) -> tuple[float, float]:
    """Images a second and CPU milliseconds an image of one predictor with all cores, as meta-infer has it."""
    with Predictor(bundle) as predictor:
        sources = [Source(path) for path in sorted(photos.iterdir())]
        list(predict(predictor, sources[:4]))
        began, cpu = time.perf_counter(), time.process_time()
        for frame in predict(predictor, sources[:count]):
            assert frame.result is not None
            frame.result.to_dict()
        took = time.perf_counter() - began
        return count / took, 1000 * (time.process_time() - cpu) / count


def one_run(photos: Path, bundle: str, out: Path, args: Any, count: int) -> tuple[float, float]:
    """Images a second, from the first that came to the last, and CPU milliseconds an image, of a run."""
    out.mkdir()
    chosen = [str(path) for path in sorted(photos.iterdir())[:count]]
    inputs, times = gather(chosen), list[tuple[float, int]]()
    options = checked(options_of(bundle, threads=args.threads), None)
    size = min(args.part_size, max(1, count // 20))  # the rate is that of all parts after the first
    cpu = cpu_seconds()
    with open_parts(inputs, out, options, size) as parts:
        run(inputs, parts, options, args.workers, done=lambda n: times.append((time.perf_counter(), n)))
    rate = sum(n for _, n in times[1:]) / max(times[-1][0] - times[0][0], 1e-9)
    return rate, 1000 * (cpu_seconds() - cpu) / count


def cpu_seconds() -> float:
    """Of this process and all of Ray's, those too that have ended."""
    ticks = 0
    for pid, name in processes():
        if pid == os.getpid() or re.search(r"ray::|/ray/|raylet|gcs_server", name):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))  # also of children that were waited for
    return ticks / os.sysconf("SC_CLK_TCK")


def told(result: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    row = {key: result.get(key) for key in ("exit_code", "seconds", "killed_at", "wrong", "parts_done_twice")}
    steady = [sample for sample in result.get("memory", ()) if sample[0]]
    for i, name in ((1, "driver_mb"), (2, "workers_mb")):
        half = len(steady) // 2
        most = (max((s[i] for s in part), default=0) for part in (steady[:half], steady[half:]))
        row[name] = ", then ".join(f"{mb:,.0f}" for mb in most)
    return row


if __name__ == "__main__":
    main()
