"""The HTTP application: paths, limits, errors, counts. An ASGI application over models that are elsewhere.

Knows HTTP; must not know what runs a model, nor Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi import Query as Parameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meta_deploy.imaging.depth import MAX_DEPTH
from meta_deploy.serve.limits import MOST_HEADERS, Limits
from meta_deploy.serve.messages import BYTES, JSON, LENGTH, PNG, Answer, Query, Settings, TensorQuery
from meta_deploy.serve.metrics import Metrics
from meta_deploy.serve.models import Card, Model, version_key

_PAGE = Path(__file__).with_name("page.html")
_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
CLOSING = "the server is closing; try another, or later"
_SPARE = 2.0  # seconds that a model gets beyond its time to say so itself


class Refused(HTTPException):
    """A request that is not answered; the message is one line that says what to do."""


@dataclass(eq=False)
class Served:
    """A version of a model, and how many requests it is at."""

    card: Card
    model: Model
    most: int
    inside: int = 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """A place in its queue. Raises Refused: it is full."""
        if self.inside >= self.most:
            raise Refused(
                429,
                f"model '{self.card.name}' is at {self.most} requests, which is the limit; try again later",
                {"Retry-After": "1"},
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


@dataclass(eq=False)
class Service:
    """All that the application is over.

    Attributes:
        served: the models, the default one first.
        limits: of requests.
        ready: tells which models answer now, by name and version; None: all do.
        metrics: what is counted.
        open: requests of any kind whose answers have not been sent.
        closing: no more requests are taken.
    """

    served: Sequence[Served]
    limits: Limits = field(default_factory=Limits)
    ready: Callable[[], Awaitable[dict[tuple[str, str], bool]]] | None = None
    metrics: Metrics = field(default_factory=Metrics)
    open: int = 0
    closing: bool = False

    def __post_init__(self) -> None:
        for one in self.served:
            inside = functools.partial(getattr, one, "inside")
            self.metrics.watch(one.card.name, one.card.version, inside, one.most)

    def versions(self, name: str) -> list[Served]:
        """All of a model, the latest last."""
        found = (one for one in self.served if one.card.name == name)
        return sorted(found, key=lambda one: version_key(one.card.version))

    def find(self, name: str | None, wanted: str | None) -> Served:
        """A model: the first one without a name, its latest version without that. Raises Refused: 404."""
        name = self.served[0].card.name if name is None else name
        versions = self.versions(name)
        if not versions:
            names = dict.fromkeys(one.card.name for one in self.served)
            raise Refused(404, f"there is no such model; there are {', '.join(names)}")
        if wanted is None:
            return versions[-1]
        for one in versions:
            if one.card.version == wanted:
                return one
        known = ", ".join(one.card.version for one in versions)
        raise Refused(404, f"model '{name}' has no such version; there are {known}")

    async def missing(self, one: Served | None = None) -> str | None:
        """Why requests (for this model) would not be answered now; None: they would."""
        if self.closing:
            return "the server is closing"
        if self.ready is None:
            return None
        there = await self.ready()
        for other in self.served if one is None else (one,):
            if not there.get((other.card.name, other.card.version), False):
                return f"model {other.card} is not ready"
        return None


def application(service: Service) -> FastAPI:
    """The ASGI application over a service, which is its `state.service`."""
    app = FastAPIOffline(  # whose /docs loads nothing from elsewhere
        title="meta-serve",
        version=_version(),
        description="Models over HTTP: images to what is in them, and tensors by KServe's v2 protocol.",
        redoc_url=None,
        redirect_slashes=False,  # an answer without a line that says why
    )
    app.state.service = service
    for kind, handler in ((HTTPException, _refuse), (RequestValidationError, _refuse_parameter)):
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]
    app.add_middleware(_Guard, service=service)
    _add_pages(app, service)
    _add_predict(app, service)
    _add_v2(app, service)
    return app


# --- pages and health -------------------------------------------------------------------------------------


def _add_pages(app: FastAPI, service: Service) -> None:
    page = _PAGE.read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def start() -> Response:
        return HTMLResponse(page, headers=_SECURITY)

    @app.get("/models", summary="The models that are served, and the limits")
    async def models() -> dict[str, Any]:
        limits = service.limits
        return {
            "models": [
                {**one.card.public(), "versions": len(service.versions(one.card.name))}
                for one in service.served
            ],
            "limits": {"body": limits.body, "pixels": limits.pixels, "seconds": limits.seconds},
        }

    @app.get("/healthz", summary="Whether the server lives", response_class=PlainTextResponse)
    async def alive() -> str:
        return "ok\n"

    @app.get("/readyz", summary="Whether all models answer", response_class=PlainTextResponse)
    async def ready() -> str:
        if why := await service.missing():
            raise Refused(503, why)
        return "ok\n"

    @app.get("/metrics", summary="Counts, in Prometheus' format", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


# --- images -----------------------------------------------------------------------------------------------


def _settings(
    score_threshold: Annotated[
        float | None, Parameter(ge=0, le=1, description="the least score of a detection")
    ] = None,
    tile: Annotated[
        int | None,
        Parameter(ge=0, le=2**31, description="the side of the tiles that larger images are run in; 0: none"),
    ] = None,
    tile_overlap: Annotated[
        int | None, Parameter(ge=0, le=2**31, description="pixels that neighbouring tiles share")
    ] = None,
    slide: Annotated[bool, Parameter(description="class maps by sliding windows")] = False,
    depth: Annotated[
        int | None,
        Parameter(ge=1, le=MAX_DEPTH, description="bits that samples of deeper images really have"),
    ] = None,
) -> Settings:
    return Settings(score_threshold, tile, tile_overlap, slide, depth)


_Chosen = Annotated[Settings, Depends(_settings)]
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_UPLOAD = {"type": "object", "required": ["image"], "properties": {"image": _BINARY["schema"]}}
_PREDICT: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "description": "the image's file, as it is or as a form's",
            "content": {"image/*": _BINARY, "multipart/form-data": {"schema": _UPLOAD}},
        }
    },
    "responses": {
        200: {
            "description": "the document of meta-infer --json, or the overlay",
            "content": {PNG: _BINARY, JSON: {}},
        },
        **{
            code: {"description": why}
            for code, why in (
                (404, "no such model"),
                (406, f"neither {JSON} nor {PNG} is accepted"),
                (408, "the body took too long to come"),
                (413, "the body is too large"),
                (422, "not an image, too many pixels, or parameters that do not fit"),
                (429, "the queue is full"),
                (503, "the server is closing, or a model's process died"),
                (504, "it took too long"),
            )
        },
    },
}


def _add_predict(app: FastAPI, service: Service) -> None:
    async def predict(request: Request, settings: Settings, one: Served) -> Response:
        overlay = _prefers_png(request.headers.get("accept", "*/*"))

        async def ask(seconds: float, body: bytes) -> Answer:
            image, name = await _image(request, body)
            return await one.model.predict(Query(image, name, settings, overlay, seconds))

        _check_parameters(request, settings, one.card)
        if not one.card.takes_images:
            path = f"/v2/models/{one.card.name}/infer"
            raise Refused(422, f"model '{one.card.name}' takes arrays and not images; use {path}")
        return await _asked(request, service, one, ask)

    @app.post("/predict", summary="An image to what is in it, by the first model", **_PREDICT)
    async def by_first(request: Request, settings: _Chosen) -> Response:
        return await predict(request, settings, service.find(None, None))

    @app.post("/predict/{model}", summary="The same by a model's latest version", **_PREDICT)
    async def by_model(request: Request, settings: _Chosen, model: str) -> Response:
        return await predict(request, settings, service.find(model, None))

    @app.post("/predict/{model}/versions/{version}", summary="The same by a version of a model", **_PREDICT)
    async def by_version(
        request: Request,
        settings: _Chosen,
        model: str,
        version: str,
    ) -> Response:
        return await predict(request, settings, service.find(model, version))


def _check_parameters(request: Request, settings: Settings, card: Card) -> None:
    """Refuse what would be ignored. Raises Refused."""
    known = [field.name for field in fields(Settings)]
    if odd := [name for name in request.query_params if name not in known]:
        raise Refused(422, f"there is no parameter '{odd[0][:100]}'; there are {', '.join(known)}")
    if twice := [name for name in known if len(request.query_params.getlist(name)) > 1]:
        raise Refused(422, f"the parameter '{twice[0]}' is there twice; give it once")
    if settings.score_threshold is not None and card.score_threshold is None:
        raise Refused(
            422, f"score_threshold is for detections, and model '{card.name}' gives none; leave it out"
        )


async def _image(request: Request, body: bytes) -> tuple[bytes, str | None]:
    """The image's bytes and its name, where it has one. Raises Refused."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        return body, None

    async def stream() -> Any:
        yield body

    parser = MultiPartParser(request.headers, stream(), max_files=1, max_fields=16)
    # In memory, as it is already, and not in a file.
    parser.spool_max_size = len(body) + 1
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, LookupError) as error:
        why = (getattr(error, "message", None) or "its parts cannot be told").rstrip(".")
        raise Refused(
            422, f"the form is broken: {why}; send one file in it, or the image as the body"
        ) from error
    for _, value in form.multi_items():
        if not isinstance(value, str):
            return await value.read(), value.filename or None
    raise Refused(422, "there is no file in the form; send one, or the image as the body")


def _prefers_png(accept: str) -> bool:
    """Whether the overlay is wanted more than JSON. Raises Refused: neither."""
    weights = {PNG: 0.0, JSON: 0.0}
    exactness = dict.fromkeys(weights, -1)
    for part in accept.lower().split(","):
        kind, *parameters = (text.strip() for text in part.split(";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                with contextlib.suppress(ValueError):
                    weight = float(parameter[2:])
        for known in weights:
            ranges = ("*/*", known.partition("/")[0] + "/*", known)
            if kind in ranges and ranges.index(kind) > exactness[known]:
                exactness[known], weights[known] = ranges.index(kind), weight
    if not any(weight > 0 for weight in weights.values()):
        raise Refused(406, f"what is accepted is neither {JSON} nor {PNG}; accept one of them")
    return (weights[PNG], exactness[PNG]) > (weights[JSON], exactness[JSON])


# --- tensors ----------------------------------------------------------------------------------------------


def _add_v2(app: FastAPI, service: Service) -> None:
    one, version_of_it = "/v2/models/{model}", "/versions/{version}"

    @app.get("/v2", summary="The server's metadata")
    async def server() -> dict[str, Any]:
        return {"name": "meta-serve", "version": _version(), "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live", summary="Whether the server lives")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="Whether all models answer")
    async def ready() -> dict[str, bool]:
        if why := await service.missing():
            raise Refused(503, why)
        return {"ready": True}

    @app.get(one + "/ready", summary="Whether a model answers")
    @app.get(one + version_of_it + "/ready", summary="Whether a version of a model answers")
    async def model_ready(model: str, version: str | None = None) -> dict[str, Any]:
        found = service.find(model, version)
        if why := await service.missing(found):
            raise Refused(503, why)
        return {"name": model, "ready": True}

    @app.get(one, summary="A model's metadata")
    @app.get(one + version_of_it, summary="A version's metadata")
    async def metadata(model: str, version: str | None = None) -> dict[str, Any]:
        card = service.find(model, version).card
        known = [one.card.version for one in service.versions(model)]
        return {"name": model, "versions": known, **card.tensors}

    @app.post(one + "/infer", summary="Tensors through a model", **_INFER)
    @app.post(one + version_of_it + "/infer", summary="Tensors through a version of a model", **_INFER)
    async def infer(request: Request, model: str, version: str | None = None) -> Response:
        found = service.find(model, version)
        json_bytes = _whole_number(request.headers.get(LENGTH), LENGTH)

        async def ask(seconds: float, body: bytes) -> Answer:
            return await found.model.infer(TensorQuery(body, json_bytes, seconds))

        return await _asked(request, service, found, ask)


_INFER: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": {"type": "object"}}, BYTES: _BINARY},
        }
    }
}


# --- a request's way --------------------------------------------------------------------------------------


async def _asked(
    request: Request, service: Service, one: Served, ask: Callable[[float, bytes], Awaitable[Answer]]
) -> Response:
    """A place in the queue, the body, the model's answer: within the limits. Raises Refused."""
    if service.closing:
        raise Refused(503, CLOSING, {"Connection": "close"})
    limits = service.limits
    with one.entered():
        body = await _body(request, limits)
        try:
            answer = await asyncio.wait_for(ask(limits.seconds, body), limits.seconds + _SPARE)
        except (asyncio.TimeoutError, TimeoutError):
            raise Refused(504, f"it took longer than {limits.seconds:g} s, which is the limit") from None
    service.metrics.worked(one.card.name, one.card.version, answer)
    return Response(answer.body, answer.status, answer.headers, answer.kind)


async def _body(request: Request, limits: Limits) -> bytes:
    """The request's body. Raises Refused: it is too large, packed, or too slow."""
    too_large = Refused(
        413,
        f"the body is larger than {limits.body} bytes, which is the limit; send less",
        {"Connection": "close"},
    )
    if (_whole_number(request.headers.get("content-length"), "content-length") or 0) > limits.body:
        raise too_large
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise Refused(415, "the body is compressed, which is not taken; send it as it is")

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.body:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limits.seconds)
    except (asyncio.TimeoutError, TimeoutError):
        why = f"the body took longer than {limits.seconds:g} s to come, which is the limit"
        raise Refused(408, why, {"Connection": "close"}) from None
    except ClientDisconnect:
        raise Refused(400, "the body is not whole; send it again") from None


def _whole_number(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise Refused(400, f"the header {name} is not a whole number; send one")
    return int(text)


def too_long(scope: Scope) -> Response | None:
    """The refusal of a request whose headers are longer than the limit; None: they are not."""
    length = sum(len(name) + len(value) for name, value in scope["headers"])
    if length + len(scope.get("raw_path") or b"") + len(scope["query_string"]) <= MOST_HEADERS:
        return None
    return JSONResponse({"error": f"the headers are longer than {MOST_HEADERS} bytes; send fewer"}, 431)


async def _refuse(request: Request, error: HTTPException) -> Response:
    told = {404: "there is no such page; see /docs", 405: "this page is not for that method; see /docs"}
    why = error.detail if isinstance(error, Refused) else told.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"
    return JSONResponse({"error": why}, error.status_code, headers)


async def _refuse_parameter(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:]) or "the request"
    return JSONResponse({"error": f"{name}: {first['msg'][:200]}"}, 422)


class _Guard:
    """Around everything: headers that are too long, what nobody expected, and the count of all requests."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # what GET gives; the HTTP server sends no body
            scope = {**scope, "method": "GET"}
        began, code = perf_counter(), 0
        self._service.open += 1

        async def sent(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            if (refused := too_long(scope)) is not None:
                await refused(scope, receive, sent)
            else:
                await self._app(scope, receive, sent)
        except Exception:
            if code:
                raise
            logging.getLogger("meta_deploy.serve").exception("internal error")
            why = "internal error; the server's log says which"
            await JSONResponse({"error": why}, 500)(scope, receive, sent)
        finally:
            self._service.open -= 1
            self._count(scope, code, perf_counter() - began)

    def _count(self, scope: Scope, code: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "")
        model = version = ""
        if "/predict" in path or "{model}" in path:
            given = scope.get("path_params", {})
            with contextlib.suppress(Refused):
                card = self._service.find(given.get("model"), given.get("version")).card
                model, version = card.name, card.version
        self._service.metrics.answered(path, model, version, code, seconds)


def _version() -> str:
    try:
        return version("meta-deploy")
    except PackageNotFoundError:  # run from a clone that is not installed
        return "0"
