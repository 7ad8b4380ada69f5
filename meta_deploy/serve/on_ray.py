"""The application on Ray Serve: HTTP in one deployment, each model in one of its own with its replicas.

Knows Ray Serve; must not know HTTP's paths or what a model does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meta_deploy.batch.cluster import connected, gpus_of
from meta_deploy.bundle.bundle import Bundle, digest_of
from meta_deploy.errors import BackendError, BundleError, InputError
from meta_deploy.serve.limits import Limits
from meta_deploy.serve.messages import Answer, Query, TensorQuery, refusal
from meta_deploy.serve.models import Card

if TYPE_CHECKING:
    from ray.serve import Application

APP = "meta-serve"
_RAY = {  # settings of a Ray that is started here, which it reads from the environment
    "RAY_worker_niceness": "0",  # its own is the lowest priority; somebody waits for what these do
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "meta_deploy.serve.gate.middlewares",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # a proxy that died is missed after three of them
}
_PATIENCE = 60.0  # seconds for a model to say what runs it
_PAUSE = 0.1
_LAST = 0.5  # seconds for the last answers to leave the proxy
_GRACE = 2.0  # seconds at least for the application to say how many requests there are
_FRESH = 1.0  # seconds that a state that was asked for is taken for the present one


@dataclass(frozen=True)
class Options:
    """How models are run.

    Attributes:
        host, port: where HTTP is listened to.
        replicas: processes of each model.
        threads: CPU threads of each of them.
        backend: as in a `Predictor`.
        batch: images of a batch at most; None: what the bundle takes.
        wait: seconds that an image may wait for others to share its batch.
        limits: of requests; the queue is that of each model, over all its replicas.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    threads: int = 1
    backend: str = "auto"
    batch: int | None = None
    wait: float = 0.005
    limits: Limits = field(default_factory=Limits)


class Replica:
    """A process with a model."""

    def __init__(self, card: Card, options: Options):
        from meta_deploy.serve.worker import Worker

        bundle = Bundle.open(card.path)
        if digest_of(card.path) != card.digest:
            raise BundleError(
                f"bundle '{card.path}' is not the one that the server was started with; start it again, and "
                "have that bundle on every machine"
            )
        self._worker = Worker(
            bundle,
            card.name,
            card.version,
            options.backend,
            options.threads,
            options.batch,
            options.wait,
            options.limits.pixels,
            card.shown,
        )

    async def predict(self, query: Query) -> Answer:
        return await self._worker.predict(query)

    async def infer(self, query: TensorQuery) -> Answer:
        return await self._worker.infer(query)

    async def runs_on(self) -> str:
        return self._worker.runs_on


class Remote:
    """A model whose replicas are elsewhere. What one was at when it died is done again once, by another."""

    def __init__(self, deployment: str):
        self._deployment = deployment
        self._handle: Any = None

    async def predict(self, query: Query) -> Answer:
        return await self._ask("predict", query)

    async def infer(self, query: TensorQuery) -> Answer:
        return await self._ask("infer", query)

    async def _ask(self, method: str, query: Query | TensorQuery) -> Answer:
        from ray.exceptions import RayActorError
        from ray.serve import get_deployment_handle
        from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

        if self._handle is None:
            self._handle = get_deployment_handle(self._deployment, APP)
        for _ in range(2):
            response = getattr(self._handle, method).remote(query)
            try:
                return await response
            except asyncio.CancelledError:  # its time is over, or the client has gone
                response.cancel()
                raise
            except (RayActorError, ReplicaUnavailableError):
                continue
            except DeploymentUnavailableError:
                return refusal(503, "the model cannot be started; the server's log says why")
        return refusal(503, "the model's process died twice over this request; do not send it again")


class Ingress:
    """The process that the application is in."""

    app: Any  # of Ray Serve's own class

    def __init__(self, *models: Any):
        """`models` are those that have to be there; their handles are got when they are needed."""

    async def close(self) -> int:
        """Take no more requests; how many there still are."""
        self.app.state.service.closing = True
        return self.app.state.service.open


class _States:
    """Which models have a replica that runs, asked no more than once a second."""

    def __init__(self, deployments: dict[tuple[str, str], str]):
        self._deployments, self._known, self._asked = deployments, dict[tuple[str, str], bool](), -_FRESH

    async def __call__(self) -> dict[tuple[str, str], bool]:
        if time.monotonic() - self._asked >= _FRESH:
            self._known = await asyncio.get_running_loop().run_in_executor(None, self._ask)
            self._asked = time.monotonic()
        return self._known

    def _ask(self) -> dict[tuple[str, str], bool]:
        from ray import serve

        app = serve.status().applications.get(APP)
        there = {} if app is None else app.deployments
        return {
            model: name in there
            and any(count for state, count in there[name].replica_states.items() if state == "RUNNING")
            for model, name in self._deployments.items()
        }


def _names(cards: Sequence[Card]) -> dict[tuple[str, str], str]:
    """The name of each model's deployment."""
    return {(card.name, card.version): f"{i}-{card.name}-{card.version}" for i, card in enumerate(cards)}


def application(cards: Sequence[Card], options: Options) -> Application:
    """The Ray Serve application of these models, for `serve.run`."""
    from ray import serve

    seconds = options.limits.seconds
    names = _names(cards)
    common: dict[str, Any] = {"health_check_period_s": 2, "graceful_shutdown_timeout_s": seconds}

    def build() -> Any:
        """In the replica of the ingress."""
        from meta_deploy.serve.app import Served, Service, application

        served = [
            Served(card, Remote(names[card.name, card.version]), options.limits.queue) for card in cards
        ]
        return application(Service(served, options.limits, _States(names)))

    models = [
        serve.deployment(
            name=names[card.name, card.version],
            num_replicas=options.replicas,
            # Those that wait do so in a replica: before replicas that are full, Ray tries again ever later.
            max_ongoing_requests=options.limits.queue,
            ray_actor_options={
                "num_cpus": options.threads,
                "num_gpus": gpus_of(card.target, options.backend),
            },
            max_constructor_retry_count=2,
            **common,
        )(Replica).bind(card, options)
        for card in cards
    ]
    ingress = serve.deployment(
        name="http",
        max_ongoing_requests=len(cards) * options.limits.queue + 200,  # which are refused there, in words
        ray_actor_options={"num_cpus": 0},
        **common,
    )(serve.ingress(build)(Ingress))
    return ingress.bind(*models)


class Running:
    """An application that runs."""

    def __init__(self, handle: Any, names: Sequence[str]):
        self._handle, self._names = handle, names

    def runs_on(self) -> list[str]:
        """What runs each model."""
        from ray import serve

        handles = (serve.get_deployment_handle(name, APP) for name in self._names)
        return [handle.runs_on.remote().result(timeout_s=_PATIENCE) for handle in handles]

    def drain(self, seconds: float) -> int:
        """Take no more requests, and wait for what is in progress; how many are left after that time.

        Raises:
            InputError: the application cannot be reached.
        """
        from ray.exceptions import RayError

        end = time.monotonic() + seconds
        while True:
            try:
                left = self._handle.close.remote().result(timeout_s=max(_GRACE, end - time.monotonic()))
            except (RayError, TimeoutError) as error:
                raise InputError(
                    "what was in progress is lost: its process died or does not answer"
                ) from error
            if not left or time.monotonic() >= end:
                time.sleep(_LAST)
                return left
            time.sleep(_PAUSE)


@contextlib.contextmanager
def running(cards: Sequence[Card], options: Options, address: str | None = None) -> Iterator[Running]:
    """Serve the models: on the Ray cluster at an address, or (None) on one started here and ended again.

    Raises:
        InputError: there is no such cluster, it is too small or serves already, or a model cannot be opened
            there.
    """
    for name, value in _RAY.items():
        os.environ.setdefault(name, value)
    with connected(address, _cpus(cards, options)):
        from ray import serve

        _check_room(cards, options)
        if address is not None and serve.status().proxies:
            raise InputError(
                f"Ray Serve runs at '{address}' already, with its own port; end it with 'serve shutdown', or "
                "take another cluster"
            )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        where = "HeadOnly" if address is None else "EveryNode"
        serve.start(
            where, {"host": options.host, "port": options.port}, logging_config={"log_level": "ERROR"}
        )
        try:
            handle = _deployed(cards, options)
            yield Running(handle, list(_names(cards).values()))
        finally:
            if address is not None:  # else all of it ends with Ray
                with contextlib.suppress(Exception):  # which may have gone before
                    serve.shutdown()


def _deployed(cards: Sequence[Card], options: Options) -> Any:
    from ray import serve

    try:
        return serve.run(application(cards, options), name=APP)
    except (RuntimeError, ValueError) as error:
        status = serve.status().applications.get(APP)
        told = "\n".join(
            [str(error), *(one.message for one in (status.deployments.values() if status else ()))]
        )
        if found := re.search(r"meta_deploy\.errors\.\w+: (.+)", told):
            raise BackendError(found[1]) from error
        raise


def _cpus(cards: Sequence[Card], options: Options) -> int:
    return len(cards) * options.replicas * options.threads


def _check_room(cards: Sequence[Card], options: Options) -> None:
    import ray

    there = ray.cluster_resources()
    for kind, needed in (
        ("CPU", _cpus(cards, options)),
        ("GPU", sum(options.replicas * gpus_of(card.target, options.backend) for card in cards)),
    ):
        if needed > (most := int(there.get(kind, 0))):
            raise InputError(
                f"the models take {needed} {kind}s, and there are {most}; take fewer replicas, threads or "
                "models"
            )
