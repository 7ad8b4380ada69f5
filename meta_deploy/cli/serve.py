"""meta-serve: bundles over HTTP on Ray Serve.

Parses, starts the server, says where it is, and waits for its end.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import TYPE_CHECKING

from meta_deploy.cli.common import (
    Parser,
    Terminated,
    check_signals,
    number,
    path,
    positive_int,
    run,
    thread_count,
)
from meta_deploy.cli.terminal import say, tell
from meta_deploy.errors import InputError
from meta_deploy.targets import BACKEND_NAMES

if TYPE_CHECKING:
    from argparse import Namespace

    from meta_deploy.serve.models import Card
    from meta_deploy.serve.on_ray import Options, Running

NEEDED = ("ray", "fastapi", "fastapi_offline", "python_multipart", "prometheus_client")
_PATIENCE = 60.0  # seconds for the proxy to answer, once everything else is there
_HURRY = 2.0  # seconds that requests in progress get after Ctrl-C

_EPILOG = """\
examples:
  meta-serve                                            the nuclei model, at http://127.0.0.1:8000
  meta-serve my-bundle --port 9000 --replicas 2
  meta-serve cells:1=old cells:2=new roads=road-bundle  versions and several models

  curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
  curl --data-binary @photo.jpg -H 'Accept: image/png' http://127.0.0.1:8000/predict/cells > overlay.png

Exit code 0: stopped by SIGTERM, all that was in progress answered; 2: bad input; 1: internal error.
"""


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="meta-serve",
        description="Serve exported bundles over HTTP: JSON and overlays of images, a page, tensors.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "bundles",
        nargs="*",
        type=path,
        metavar="[NAME[:VERSION]=]BUNDLE",
        help="bundles to serve: folders, or names of those in the package (default: nuclei); the first "
        "answers /predict, each /predict/NAME (default: the folder's name)",
    )
    p.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen at (default: 127.0.0.1, this machine alone)",
    )
    p.add_argument("--port", type=_port, default=8000, metavar="N", help="the port (default: 8000)")
    p.add_argument(
        "--replicas", type=positive_int, default=1, metavar="N", help="processes of each model (default: 1)"
    )
    p.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="CPU threads of each replica (default: the CPUs that this process may use, divided)",
    )
    p.add_argument(
        "--backend", choices=BACKEND_NAMES, default="auto", help="what runs the models (default: auto)"
    )
    p.add_argument(
        "--batch",
        type=positive_int,
        metavar="N",
        help="images of a batch at most (default: as many as a bundle takes)",
    )
    p.add_argument(
        "--batch-wait",
        type=_milliseconds,
        default=5.0,
        metavar="MS",
        help="how long an image may wait for others to fill its batch, if the model is idle (default: 5)",
    )
    p.add_argument(
        "--queue",
        type=positive_int,
        default=128,
        metavar="N",
        help="requests of a model that wait or are worked on; more are refused with 429 (default: 128)",
    )
    p.add_argument(
        "--timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds that a request may take, else 504, and that its body may, else 408 (default: 30)",
    )
    p.add_argument(
        "--max-body", type=_positive, default=32.0, metavar="MB", help="largest body, else 413 (default: 32)"
    )
    p.add_argument(
        "--max-pixels",
        type=_positive,
        default=50.0,
        metavar="MILLIONS",
        help="largest image, else 422 (default: 50; never more than meta-infer reads)",
    )
    p.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run on the Ray cluster at ADDRESS (default: Ray on this machine alone)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run(lambda: _serve(parser().parse_args(argv)), "meta-serve")


def _serve(args: Namespace) -> int:
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    for module in NEEDED:
        if not _is_there(module):
            raise InputError(f"this needs {module}, which is not installed; pip install 'meta-deploy[serve]'")
    from meta_deploy.bundle.shipped import DEFAULT
    from meta_deploy.serve.models import cards_of

    cards = cards_of(args.bundles or [DEFAULT])
    options = _options(args, cards)
    if args.ray is None:
        _check_address(args.host, args.port)
    tell(
        "meta-serve: starting Ray and the models …"
        if args.ray is None
        else "meta-serve: starting the models …"
    )
    from meta_deploy.serve.on_ray import running

    # Ray prints on standard output what befalls its processes.
    with redirect_stdout(sys.stderr), running(cards, options, args.ray) as server:
        if args.ray is None:
            _reach(args.host, args.port)
        _introduce(cards, options, server, args.ray)
        return _wait(server, options.limits.seconds)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # None in its place, which says that it is not to be imported
        return False


def _options(args: Namespace, cards: Sequence[Card]) -> Options:
    """Raises InputError: they do not fit the bundles."""
    from meta_deploy.cpus import cpu_count
    from meta_deploy.serve.limits import Limits
    from meta_deploy.serve.on_ray import Options

    for card in cards:
        if args.batch and card.takes_images and args.batch > card.batch:
            raise InputError(
                f"--batch {args.batch} is more than the {card.batch} that bundle '{card.shown}' takes; "
                f"export it with a --dynamic-batch up to {args.batch}"
            )
    return Options(
        host=args.host,
        port=args.port,
        replicas=args.replicas,
        threads=args.threads or max(1, cpu_count() // (args.replicas * len(cards))),
        backend=args.backend,
        batch=args.batch,
        wait=args.batch_wait / 1000,
        limits=Limits(int(args.max_body * 2**20), int(args.max_pixels * 1e6), args.queue, args.timeout),
    )


def _check_address(host: str, port: int) -> None:
    """Raise InputError where it cannot be listened to: Ray would say so long after, in a log."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just been left is free
            probe.bind(address)
            probe.listen()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot listen at {host} port {port}: {reason}; choose another --host or --port"
        ) from error


def _reach(host: str, port: int) -> None:
    """Wait for the server's first answer. Raises InputError: there is none."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(_reachable(host), port, timeout=5)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        check_signals()
        time.sleep(0.1)
    raise InputError(f"nothing answers at {host} port {port}; choose another --host or --port")


def _reachable(host: str) -> str:
    """Where one that listens at `host` is reached from here."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _introduce(cards: Sequence[Card], options: Options, server: Running, cluster: str | None) -> None:
    for card, runs_on in zip(cards, server.runs_on(), strict=True):
        batch = min(options.batch or card.batch, card.batch)
        how = f"batches of up to {batch}" if batch > 1 else "one image a run, as its bundle takes"
        times = f"{options.replicas} x " if options.replicas > 1 else ""
        tell(f"meta-serve: {card}: {times}{runs_on}; {how if card.takes_images else 'tensors only'}")
    if cluster is not None:
        tell(f"meta-serve: ready at port {options.port} of each machine with a model; Ctrl-C stops")
        return
    host = _reachable(options.host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{options.port}"
    say(
        f"meta-serve: ready at {address} (a page for pictures; {address}/docs for programs); Ctrl-C stops",
        sys.stderr,
    )


def _wait(server: Running, seconds: float) -> int:
    """Until a signal comes; then until what is in progress is answered."""
    try:
        while True:
            time.sleep(0.2)
            check_signals()
    except Terminated:
        tell("meta-serve: stopping; what is in progress is answered first")
        if left := server.drain(seconds):
            tell(f"meta-serve: {left} requests were not answered in {seconds:g} s")
        return 0
    except KeyboardInterrupt:
        tell("meta-serve: stopping")
        with contextlib.suppress(Exception):
            server.drain(_HURRY)
        raise


def _port(text: str) -> int:
    value = positive_int(text)
    if value > 65535:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"'{text}' is not a port, 1 to 65535")
    return value


def _positive(text: str) -> float:
    return _in_range(text, 1e-6, 1e6)


def _milliseconds(text: str) -> float:
    return _in_range(text, 0, 60_000)


def _seconds(text: str) -> float:
    return _in_range(text, 0.1, 86_400)


def _in_range(text: str, least: float, most: float) -> float:
    value = number(text)
    if not least <= value <= most:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"'{text}' is not a number from {least:g} to {most:g}")
    return value


if __name__ == "__main__":
    sys.exit(main())
