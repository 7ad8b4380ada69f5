"""A tritonserver of this machine, on free ports of the loopback: NVIDIA's, or that of nvidia-pytriton."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STAND_INS = Path(__file__).parent / "backends"
INSTALLED = Path("/opt/tritonserver")


@dataclass(frozen=True)
class Found:
    """Where a server is: its program, its backends, the Python backend's stub, and its libraries."""

    program: Path
    backends: Path
    stub: Path | None = None
    libraries: Path | None = None


def find() -> Found | None:
    """The server; None without one."""
    if (INSTALLED / "bin/tritonserver").exists():
        return Found(INSTALLED / "bin/tritonserver", INSTALLED / "backends")
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Found(
        package / "tritonserver/bin/tritonserver",
        package / "tritonserver/backends",
        package / "tritonserver/python_backend_stubs" / version / "triton_python_backend_stub",
        package.parent / "nvidia_pytriton.libs",
    )


@contextlib.contextmanager
def running(found: Found, repository: Path, scratch: Path, *options: str) -> Iterator[tuple[str, str]]:
    """The server with these models, once it is ready: its addresses for HTTP and gRPC."""
    backends = scratch / "backends"
    shutil.copytree(found.backends, backends, ignore=shutil.ignore_patterns("__pycache__"))
    if found.stub is not None:
        shutil.copy2(found.stub, backends / "python")
    if not (backends / "onnxruntime").exists():
        shutil.copytree(STAND_INS / "onnxruntime", backends / "onnxruntime")
    http, grpc, metrics = _free_ports(3)
    command = [found.program, f"--model-repository={repository}", f"--backend-directory={backends}", *options]
    command.append("--exit-timeout-secs=5")  # it waits for clients that are still connected
    for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics)):
        command += [f"--{name}-port={port}", f"--{name}-address=127.0.0.1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    if found.libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(found.libraries)
    with (scratch / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(process, f"http://127.0.0.1:{http}/v2/health/ready", scratch / "server.log")
            yield f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        finally:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"the server is not ready:\n{log.read_text()[-3000:]}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
