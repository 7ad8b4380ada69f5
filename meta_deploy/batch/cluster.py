"""Ray itself: a cluster to connect to, or one that is started here and ended again.

Knows Ray's start and end; must not know what is run there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from meta_deploy.cpus import cpu_count
from meta_deploy.errors import InputError, MetaDeployError
from meta_deploy.targets import TARGETS

_ON_GPU = {"cuda", "tensorrt"}


@contextlib.contextmanager
def connected(address: str | None, cpus: int = 0) -> Iterator[None]:
    """Ray: the cluster at an address, or one that is started on this machine and ended again.

    That one has room for tasks and processes of at least `cpus` CPUs, although there may be fewer.

    Raises:
        InputError: there is no cluster at the address, or none can be started here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its own notes go to standard error
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if address is not None:
            _reach(address)
        with _no_stderr():
            if address is None:
                # One more than there are: a model takes all of one, and the other stages need some.
                count = max(cpus, cpu_count() + 1)
                ray.init("local", num_cpus=count, include_dashboard=False, **_SILENT)
            else:
                ray.init(address, **_SILENT)
    except Exception as error:  # Ray raises that itself where a process of its own is late
        reason = " ".join(str(error).split()).rstrip(".")
        if address is None:
            raise InputError(
                f"Ray does not start on this machine: {reason}; try again when it is less busy"
            ) from error
        raise InputError(
            f"there is no Ray at '{address}': {reason}; check the address, that Ray is of the same version "
            "there, and, if that one asks for a token, that RAY_AUTH_MODE=token is set here"
        ) from error
    finally:
        for number, handler in handlers.items():  # Ray takes SIGTERM for itself
            with contextlib.suppress(ValueError, TypeError):
                signal.signal(number, handler)
    try:
        yield
    finally:
        with _no_stderr():  # where it says of all that is ended that it died
            ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError where nothing listens at HOST:PORT, which Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


_SILENT: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Nothing on standard error of what libraries write there past Python."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """An error of ours that a worker raised, as itself."""
    try:
        yield
    except Exception as error:
        cause = getattr(error, "cause", None)  # Ray's own is of both classes, and its text a traceback
        if isinstance(cause, MetaDeployError):
            raise cause from error
        raise


def gpus_of(target: str, backend: str) -> int:
    """GPUs that a model takes: one, where the cluster has some and a bundle of this target can use it."""
    import ray

    backends = TARGETS[target].automatic if backend == "auto" else (backend,)
    return int(bool(_ON_GPU & set(backends)) and ray.cluster_resources().get("GPU", 0) >= 1)
