"""meta-serve under load: latency and throughput, twice what it can take, malformed requests, kills, hours.

    python benchmarks/serve_load.py [load overload malformed killed soak] [--model BUNDLE|free] [--waits MS …]
        [--clients N …] [--seconds N] [--malformed N] [--soak MINUTES] [--rate N] [--replicas N]
        [--threads N]

Server and clients share this machine. The load is locust's; needs [serve] and locust. No name: all parts.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from benchmarks.common import ROOT, machine, parser, save, table
from benchmarks.serve_client import PICTURES
from benchmarks.serve_requests import KINDS, Requests, send
from meta_deploy.bundle.bundle import write_bundle
from tests.bundles_by_hand import detector, manifest

PARTS = ("load", "overload", "malformed", "killed", "soak")
HOST = "127.0.0.1"
_ROLES = {
    "model": r"ray::ServeReplica:meta-serve:0-",
    "http": r"ray::ServeReplica:meta-serve:http",
    "proxy": "ray::ProxyActor",
}


def main() -> None:
    p = parser(__doc__ or "", "serve_load")
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    p.add_argument(
        "--model", default="nuclei", help="a bundle; free: one that costs nothing (default: nuclei)"
    )
    p.add_argument(
        "--waits", type=float, nargs="+", default=[5.0], help="bounds of batching in ms (default: 5)"
    )
    p.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="default: 1 8 64")
    p.add_argument("--seconds", type=int, default=30, help="of each load (default: 30)")
    p.add_argument("--malformed", type=int, default=10_000, metavar="N", help="requests (default: 10000)")
    p.add_argument("--soak", type=float, default=30.0, metavar="MINUTES", help="default: 30")
    p.add_argument(
        "--rate", type=float, default=0.0, help="requests a second of the soak (default: all that it takes)"
    )
    p.add_argument("--replicas", type=int, default=1)
    p.add_argument("--threads", type=int, default=1, help="CPU threads of each replica (default: 1)")
    args = p.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        p.error(f"no such part: {', '.join(unknown)}")
    parts = args.parts or PARTS
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="serve-load-") as scratch:
        if args.model == "free":
            args.model = str(Path(scratch) / "free")
            content = manifest("instance-segmentation", (64, 64), True, 8)
            write_bundle(args.model, content, {"model.onnx": detector((64, 64), True)})
        for wait in args.waits if "load" in parts else ():
            with Server(args, wait) as server:
                found.setdefault("load", []).extend(loads(server, args, wait))
        rest = [part for part in PARTS if part in parts and part != "load"]
        if rest:
            with Server(args, args.waits[0]) as server:
                for part in rest:
                    found[part] = globals()[part](server, args)
    for part, result in found.items():
        print(f"\n{part}\n" + table(result if isinstance(result, list) else [result]))
    save(args.json, machine=machine(), options={k: str(v) for k, v in vars(args).items()}, **found)
    if faults := [part for part, result in found.items() if part != "killed" and "x 500" in str(result)]:
        sys.exit(f"the server answered 500: {', '.join(faults)}")


class Server:
    """meta-serve in processes of its own; a context manager."""

    def __init__(self, args: Any, wait: float):
        self._model, self._wait = args.model, wait
        self._size = ["--replicas", args.replicas, "--threads", args.threads]

    def __enter__(self) -> Server:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = probe.getsockname()[1]
        options = [*self._size, "--port", self.port, "--batch-wait", self._wait]
        command = [sys.executable, "-m", "meta_deploy.cli.serve", f"model={self._model}", *map(str, options)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        lines = []
        for line in self._process.stderr:
            lines.append(line)
            print(line, end="", file=sys.stderr)
            if "ready at" in line:
                break
        else:
            sys.exit("meta-serve did not start: " + "".join(lines[-1:]))
        threading.Thread(target=self._process.stderr.read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(120)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of an answer."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def processes(self, role: str) -> list[psutil.Process]:
        """Those of a role: model, http or proxy."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if re.match(_ROLES[role], " ".join(process.cmdline())):
                    found.append(process)
        return found

    def memory(self) -> dict[str, float]:
        """MB of each role's processes."""
        return {
            f"{role}_mb": round(sum(process.memory_info().rss for process in self.processes(role)) / 1e6, 1)
            for role in _ROLES
        }

    def batches(self) -> tuple[float, float]:
        """Images and runs of the model so far."""
        text = self.ask("GET", "/metrics")[1].decode()
        numbers = [
            re.search(rf"meta_serve_batch_size_{what}\{{.*\}} (\S+)", text) for what in ("sum", "count")
        ]
        return tuple(float(number[1]) if number else 0.0 for number in numbers)  # type: ignore[return-value]


# --- load -------------------------------------------------------------------------------------------------


def locust(server: Server, clients: int, seconds: float, rate: float = 0.0) -> dict[str, Any]:
    """What clients see: answers by status; of those that are 200 the rate, and the latency in ms."""
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(ROOT / "benchmarks" / "serve_client.py"),
        "--headless",
    ]
    command += ["-u", str(clients), "-r", str(clients), "-t", f"{int(seconds)}s", "--json", "--only-summary"]
    command += ["--host", f"http://{HOST}:{server.port}", "--stop-timeout", "60", "--loglevel", "ERROR"]
    env = {**os.environ, "SERVE_RATE": str(rate)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    by_status = {entry["name"]: entry for entry in json.loads(done.stdout)}
    counts = {status: entry["num_requests"] for status, entry in by_status.items()}
    good = by_status.get("200")
    if good is None:
        return {"answers": counts, "per_second": 0.0, "p50_ms": None, "p99_ms": None}
    times = sorted((float(ms), count) for ms, count in good["response_times"].items())
    span = good["last_request_timestamp"] - good["start_time"]
    return {
        "answers": counts,
        "per_second": good["num_requests"] / span,
        "p50_ms": _percentile(times, 0.5),
        "p99_ms": _percentile(times, 0.99),
    }


def _percentile(times: list[tuple[float, int]], share: float) -> float:
    """Of values with counts, in order."""
    wanted, seen = share * sum(count for _, count in times), 0
    for ms, count in times:
        seen += count
        if seen >= wanted:
            return ms
    return times[-1][0]


def loads(server: Server, args: Any, wait: float) -> Iterator[dict[str, Any]]:
    """Clients that each send the next picture when they have their answer."""
    locust(server, 1, 3)  # to warm up
    for clients in args.clients:
        before = server.batches()
        seen = locust(server, clients, args.seconds)
        images, runs = (now - then for now, then in zip(server.batches(), before, strict=True))
        yield {
            "wait_ms": wait,
            "clients": clients,
            "p50_ms": seen["p50_ms"],
            "p99_ms": seen["p99_ms"],
            "per_second": seen["per_second"],
            "batch": images / runs if runs else None,
            "answers": _told(seen["answers"]),
        }


def overload(server: Server, args: Any) -> dict[str, Any]:
    """Twice as many requests a second as it can take, from clients enough."""
    alone = _alone(server)
    most = locust(server, 64, args.seconds)["per_second"]
    clients = 400
    seen = locust(server, clients, args.seconds, 2 * most / clients)
    return {
        "takes_per_second": most,
        "sent_per_second": sum(seen["answers"].values()) / args.seconds,
        "answers": _told(seen["answers"]),
        "answered_per_second": seen["per_second"],
        "p50_ms": seen["p50_ms"],
        "p99_ms": seen["p99_ms"],
        "alone_before_ms": alone,
        "alone_after_ms": _alone(server),
    }


def _alone(server: Server) -> float:
    """The median time of requests one by one."""
    times = []
    for picture in PICTURES * 3:
        began = time.perf_counter()
        assert server.ask("POST", "/predict", picture)[0] == 200
        times.append(1000 * (time.perf_counter() - began))
    return median(times)


def _told(answers: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{count:,} x {status}" for status, count in sorted(answers.items()))


# --- what should not be -----------------------------------------------------------------------------------


def malformed(server: Server, args: Any) -> list[dict[str, Any]]:
    """Requests that nobody should send, counted by kind and answer."""
    requests = Requests(0, "model")
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    made = [(KINDS[i % len(KINDS)], requests.make(KINDS[i % len(KINDS)])) for i in range(args.malformed)]
    with ThreadPoolExecutor(8) as pool:
        for (kind, _), status in zip(
            made, pool.map(lambda m: send(HOST, server.port, *m), made), strict=True
        ):
            counts[kind][status] += 1
    assert server.ask("POST", "/predict", PICTURES[0])[0] == 200
    return [{"kind": kind, "requests": sum(c.values()), "answers": _told(c)} for kind, c in counts.items()]


def killed(server: Server, args: Any) -> dict[str, Any]:
    """A replica killed with SIGKILL under the load of 8 clients."""
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(locust, server, 8, args.seconds)
        time.sleep(args.seconds / 3)
        victim = server.processes("model")[0]
        victim.kill()
        began = time.monotonic()
        while server.ask("POST", "/predict", PICTURES[0])[0] != 200:
            time.sleep(0.1)
        back = time.monotonic() - began
        seen = load.result()
    return {"answers": _told(seen["answers"]), "answers_again_after_s": back, "p99_ms": seen["p99_ms"]}


def soak(server: Server, args: Any) -> dict[str, Any]:
    """4 clients for a long time: memory of the processes on the way, after a minute and at the end."""
    seconds, seen = 60 * args.soak, []
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(locust, server, 4, seconds, args.rate / 4)
        while not load.done():
            seen.append(server.memory())
            time.sleep(min(10.0, seconds / 12))
        done = load.result()
    start, end = seen[len(seen) // 6], seen[-2]
    return {
        "minutes": args.soak,
        "answers": _told(done["answers"]),
        **{f"{role}_at_first": start[role] for role in start},
        **{f"{role}_at_last": end[role] for role in end},
    }


if __name__ == "__main__":
    main()
