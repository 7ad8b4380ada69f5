"""What stands before Ray's proxy: it refuses what would break it, and tells its errors in our form.

Knows HTTP and what Ray Serve reads of a request; must not know the application's paths.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meta_deploy.serve.app import CLOSING, too_long

# By which clients would choose a replica, or how long Ray waits for it. It takes - for _.
_RAYS = {b"serve_multiplexed_model_id", b"x_session_id", b"x_request_timeout_seconds"}
_RAYS |= {b"x_request_disconnect_disabled"}


def middlewares() -> list[Middleware]:
    """What Ray Serve is told to put around its proxy."""
    return [Middleware(Gate)]


class Gate:
    """Refuses what is too long before it is handed on, keeps headers to what Ray can decode, and says 503
    where Ray says nothing, of which its HTTP server would make a 500: the application's process died.

    Once the application has said that it is closing, it says so in its place: Ray would let requests wait for
    an application that has ended already.
    """

    def __init__(self, app: ASGIApp):
        self._app = app
        self._closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (refused := too_long(scope)) is not None:
            await refused(scope, receive, send)
            return
        if self._closing and scope["method"] == "POST":  # health and numbers are still the application's
            await JSONResponse({"error": CLOSING}, 503, {"Connection": "close"})(scope, receive, send)
            return
        headers = [(name, _in_utf8(value)) for name, value in scope["headers"] if not _is_rays(name)]
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start" and _is_closing(message):
                self._closing = True
            await send(message)

        await self._app({**scope, "headers": headers}, receive, sent)
        if not begun:
            why = "the process that answers died; try again"
            await JSONResponse({"error": why}, 503)(scope, receive, send)


def _is_closing(message: Message) -> bool:
    """Whether an answer begins that only an application which is closing gives."""
    headers = [(name.lower(), value.lower()) for name, value in message.get("headers", ())]
    return message["status"] == 503 and (b"connection", b"close") in headers


def _is_rays(name: bytes) -> bool:
    return name.lower().replace(b"-", b"_") in _RAYS


def _in_utf8(value: bytes) -> bytes:
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value
