"""What the benchmarks share: photos, checkpoints, exports, interleaved timing, tables, JSON files.

Knows the commands and the machine, not what a script measures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from meta_deploy.graph.graph import to_graph
from meta_deploy.graph.traffic import bytes_moved
from meta_deploy.ort import onnxruntime

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "meta_deploy" / "assets"
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "benchmarks"  # checkpoints and bundles; checkpoints are kept for the next run
PHOTOS = ROOT.parent / "shared" / "data" / "coco-tiny" / "val"
DEMO = "demo"
_PACKAGES = (
    "torch",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnx-graphsurgeon",
    "onnxslim",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "numpy",
)


# Which of these a CPU has changes int8 and bfloat16 by several times.
_TELLING = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


# --- what to measure on -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model to export: a named model with random weights at an input size, the demo model, or a checkpoint.

    Written as MODEL@SIDE or MODEL@HxW, followed by `+dynamic` for any size up to that; as `demo`, the nuclei
    detector in the package; or as the path of a .pth file, which may be followed by a size too.
    """

    model: str
    size: tuple[int, int] | None
    dynamic: bool = False

    @classmethod
    def parse(cls, text: str) -> Case:
        """The inverse of str()."""
        if text == DEMO or text.endswith(".pth"):
            return cls(text, None)
        name, at, size = text.removesuffix("+dynamic").rpartition("@")
        sides = [int(side) for side in size.split("x")] if at else []
        if not 1 <= len(sides) <= 2:
            raise argparse.ArgumentTypeError(f"'{text}' is not MODEL@SIDE, MODEL@HxW, {DEMO} or a .pth file")
        return cls(name, (sides[0], sides[-1]), text.endswith("+dynamic"))

    def __str__(self) -> str:
        size = f"@{self.size[0]}x{self.size[1]}" if self.size else ""
        return self.model + size + ("+dynamic" if self.dynamic else "")

    @property
    def options(self) -> list[str]:
        """The options of meta-export for this case."""
        size = ["--input-size", *map(str, self.size)] if self.size else []
        return size + (["--dynamic-size"] if self.dynamic else [])


def checkpoint(case: Case) -> Path:
    """A case's weights. They are made if missing, or if older than the tool that makes them."""
    if case.model == DEMO:
        return ASSETS / "meta-nano-mask-rcnn.pth"
    if case.model.endswith(".pth"):
        return Path(case.model)
    tool = ROOT / "tools" / "random_checkpoint.py"
    path = WORK / f"{case.model}.pth"
    if not path.exists() or path.stat().st_mtime < tool.stat().st_mtime:
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, tool, case.model, path], check=True, stdout=sys.stderr)
    return path


def photos(folder: Path | None = None, count: int | None = None) -> list[Path]:
    """`count` images spread evenly over a folder (None: all); default folder: `photo_folder()`."""
    folder = folder or photo_folder()
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
    step = max(1.0, len(paths) / (count or len(paths)))
    return [paths[int(i * step)] for i in range(min(len(paths), count or len(paths)))]


def photo_folder() -> Path:
    """COCO photos if present, else the images in the package."""
    return PHOTOS if PHOTOS.is_dir() else ASSETS / "images"


# --- running ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished command: exit code, JSON document (None if it failed), seconds, peak memory."""

    code: int
    document: dict[str, Any] | None
    seconds: float
    peak_mb: float


def run_command(name: str, *arguments: object) -> Run:
    """Run `meta-NAME ARGUMENTS --json` in its own process; its standard error is passed through."""
    command = [sys.executable, "-m", f"meta_deploy.cli.{name}", *map(str, arguments), "--json"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.stdout.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return Run(process.returncode, json.loads(output) if output else None, seconds, peak)


def export(case: Case, *options: object) -> tuple[Path, Run]:
    """Export a case; returns the bundle's folder and the finished command."""
    out = WORK / Path(str(case)).name.removesuffix(".pth").replace("+", "-")
    return out, run_command("export", "--ckpt", checkpoint(case), *case.options, *options, "--out", out)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module's function returns in a process of its own, of whose memory nothing is taken before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def open_session(proto: onnx.ModelProto, threads: int = 0) -> onnxruntime.InferenceSession:
    """A CPU session with the settings of the runtime's back end; 0 threads: ONNX Runtime's choice."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # Otherwise one contender's idle workers slow down the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def interleave(
    contenders: dict[str, Callable[[int], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time the contenders in turns: `rounds` calls of each, in milliseconds by a clock of seconds.

    Every round runs each contender once, starting with a different one, so that other load on the machine
    affects all alike. A contender is called with the number of the round.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = clock()
            contenders[name](turn)
            times[name].append(1000 * (clock() - began))
    return times


def counted(proto: onnx.ModelProto) -> dict[str, Any]:
    """Nodes (functions inlined, constants not counted), moves among them, and the bytes that these move."""
    graph = to_graph(proto)
    moved = bytes_moved(graph)
    return {
        "nodes": len(graph.nodes),
        "moves": sum(node.op in ("Transpose", "Reshape") for node in graph.nodes),
        "MB moved": None if moved is None else moved / 1e6,
    }


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """One contender's time relative to another's: the median of the ratios of all rounds."""
    return float(np.median(np.divide(times, base)))


def least_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """One contender's least time relative to another's: what of CPU time other work does not blow up."""
    return min(times) / min(base)


# --- telling ------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The machine and versions that the numbers were measured with."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    card = gpu()
    return {
        "cpu": _cpu(),
        "instruction_sets": [name for name in _TELLING if name in _cpu_fields().get("flags", "").split()],
        "cores": os.cpu_count(),
        **({"gpu": card} if card else {}),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **versions},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def gpu() -> dict[str, Any] | None:
    """The first NVIDIA GPU visible to CUDA, from nvidia-smi: name, driver, memory. None without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return None
    fields = ("name", "driver_version", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    if visible:
        command.append(f"--id={visible.split(',')[0]}")
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        name, driver, memory = (cell.strip() for cell in output.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    return {"name": name, "driver": driver, "memory_mb": int(memory) if memory.isdecimal() else None}


def _cpu() -> str:
    fields = _cpu_fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def _cpu_fields() -> dict[str, str]:
    """What Linux tells of the first CPU; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return {True: "yes", False: "no"}.get(value, str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def parser(doc: str, name: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    p = argparse.ArgumentParser(description=doc.splitlines()[0])
    p.add_argument(
        "--photos", type=Path, metavar="DIR", help="default: COCO photos if present, else the package's"
    )
    p.add_argument(
        "--json",
        type=Path,
        default=RESULTS / f"{name}.json",
        help="where the numbers go (default: %(default)s)",
    )
    return p


def save(path: Path, **parts: Any) -> None:
    """Write a benchmark's numbers as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(parts, indent=1, default=str) + "\n")
    print(f"numbers in {path}", file=sys.stderr)
