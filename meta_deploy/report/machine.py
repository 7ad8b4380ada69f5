"""The machine that numbers were measured on, and the packages: what a reader needs to trust and repeat them.

Knows the system's files, and nothing of models.
"""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from meta_deploy.cpus import cpu_count
from meta_deploy.report.schema import Machine

_PACKAGES = (
    *("meta-deploy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "torch"),
    *("onnx", "numpy", "opencv-python-headless"),
)
# Which of these a CPU has changes int8 and bfloat16 by several times.
_TELLING = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "sve", "bf16", "i8mm"),
)
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_GPUS = Path("/proc/driver/nvidia/gpus")
_MUCH_LOAD = 0.25  # of the CPUs, busy before anything was measured
_MUCH_DRIFT = 1.1


def describe() -> Machine:
    """This machine, now."""
    fields = _cpu_fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    features = (fields.get("flags") or fields.get("Features") or "").split()
    return Machine(
        cpu=" ".join(name.split()),
        instruction_sets=tuple(name for name in _TELLING if name in features),
        cpus=cpu_count(),
        memory_gb=_memory_gb(),
        governor=_read(_GOVERNOR) or None,
        system=f"{platform.system()} {platform.release()}",
        versions={"python": platform.python_version(), **_versions()},
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        gpus=_gpus(),
    )


def disturbances(machine: Machine, drifts: dict[str, float]) -> tuple[str, ...]:
    """Why the times are not to be trusted, a sentence each; `drifts` is each entry's (`Latency.drift`)."""
    found = []
    if machine.load is not None and machine.load > _MUCH_LOAD * machine.cpus:
        found.append(
            f"Other work was running: the load was {machine.load:.1f} on {_count(machine.cpus, 'CPU')} "
            "before the first run."
        )
    if machine.governor is not None and machine.governor not in ("performance", "schedutil"):
        found.append(f"The CPU's frequency is governed by '{machine.governor}', not by 'performance'.")
    for name, drift in drifts.items():
        if not 1 / _MUCH_DRIFT <= drift <= _MUCH_DRIFT:
            way = "slower" if drift > 1 else "faster"
            percent = 100 * (max(drift, 1 / drift) - 1)
            found.append(
                f"{name} became {percent:.0f} % {way} from the first third of the rounds to the last."
            )
    return tuple(found)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> tuple[str, ...]:
    """The models of the GPUs by NVIDIA's driver, where there is one."""
    files = sorted(_GPUS.glob("*/information"))
    lines = (line.partition(":") for file in files for line in _read(file).splitlines())
    return tuple(value.strip() for key, _, value in lines if key == "Model")


def _cpu_fields() -> dict[str, str]:
    """What Linux tells of the first CPU; empty elsewhere."""
    lines = _read(Path("/proc/cpuinfo")).partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
