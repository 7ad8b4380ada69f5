"""What the server counts, as Prometheus reads it. Knows names and numbers."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from meta_deploy.serve.messages import Answer

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_MODEL = ("model", "version")


class Metrics:
    """The counters of one application."""

    def __init__(self) -> None:
        self._all = CollectorRegistry()
        self._requests = Counter(
            "meta_serve_requests", "Requests answered.", ("path", *_MODEL, "code"), registry=self._all
        )
        self._latency = Histogram(
            "meta_serve_request_seconds",
            "From a request's arrival to the end of its answer.",
            ("path", *_MODEL),
            buckets=_SECONDS,
            registry=self._all,
        )
        self._steps = Histogram(
            "meta_serve_step_seconds",
            "Of an answered request: pre (decode, resize), queue (wait for the model), model (its share of "
            "the batch), post (results, overlay).",
            ("step", *_MODEL),
            buckets=_SECONDS,
            registry=self._all,
        )
        self._batches = Histogram(
            "meta_serve_batch_size",
            "Images, tiles and windows of each run of the model.",
            _MODEL,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self._all,
        )
        self._inside = Gauge(
            "meta_serve_in_progress", "Requests that wait or are worked on.", _MODEL, registry=self._all
        )
        self._limit = Gauge(
            "meta_serve_queue_limit", "The most of these; more are refused (429).", _MODEL, registry=self._all
        )

    def watch(self, model: str, version: str, inside: Callable[[], float], limit: int) -> None:
        """Show how full a model's queue is."""
        self._inside.labels(model, version).set_function(inside)
        self._limit.labels(model, version).set(limit)

    def answered(self, path: str, model: str, version: str, code: int, seconds: float) -> None:
        """Count a request. `path` is the route's, so that nobody can make new ones; "" is of none."""
        self._requests.labels(path, model, version, code).inc()
        self._latency.labels(path, model, version).observe(seconds)

    def worked(self, model: str, version: str, answer: Answer) -> None:
        """Count what a model did for an answer."""
        for step, seconds in answer.seconds.items():
            self._steps.labels(step, model, version).observe(seconds)
        for size in answer.batches:
            self._batches.labels(model, version).observe(size)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._all)
