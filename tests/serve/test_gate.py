"""What stands before Ray's proxy: headers that it can read, and an answer where it has none."""

import asyncio

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed (pip install 'meta-deploy[serve]')")

from starlette.responses import JSONResponse, PlainTextResponse
from starlette.testclient import TestClient

from meta_deploy.serve.app import CLOSING
from meta_deploy.serve.gate import Gate


def behind(response):
    """A client of what answers with that, and the headers that came to it."""
    seen = []

    async def proxy(scope, receive, send):
        seen.append(dict(scope["headers"]))
        await response(scope, receive, send)

    return TestClient(Gate(proxy)), seen


def test_headers_are_those_that_ray_can_decode_and_none_that_it_obeys():
    given = {
        b"x": b"\xff",
        b"y": "é".encode(),
        b"X-Session-Id": b"1",
        b"serve-multiplexed-model-id": b"\xff",
        b"x-request-timeout-seconds": b"1",
    }
    seen = []

    async def proxy(scope, receive, send):
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        pass

    scope = {"type": "http", "headers": list(given.items()), "query_string": b""}
    asyncio.run(Gate(proxy)(scope, None, send))
    assert seen == [(b"x", "ÿ".encode()), (b"y", "é".encode())]


def test_once_the_application_has_said_that_it_closes_it_is_not_asked_again():
    answer = JSONResponse({"error": "not ready"}, 503)

    async def application(scope, receive, send):
        seen.append(scope["method"])
        await answer(scope, receive, send)

    seen = []
    client = TestClient(Gate(application))
    assert [client.post("/predict").status_code for _ in range(2)] == [503, 503]
    answer = JSONResponse({"error": "closing"}, 503, {"Connection": "close"})
    client.post("/predict")
    assert seen == ["POST"] * 3
    found = client.post("/predict")
    assert (found.status_code, found.json()) == (503, {"error": CLOSING})
    assert seen == ["POST"] * 3
    client.get("/healthz")
    assert seen[3:] == ["GET"]


def test_headers_over_the_limit_come_to_nobody():
    client, seen = behind(PlainTextResponse("ok"))
    assert client.get("/", headers={"X": "x" * 40_000}).status_code == 431
    assert seen == []


@pytest.mark.parametrize(
    ("response", "status", "body"),
    [
        (JSONResponse({"error": "a fault"}, 500), 500, "a fault"),
        (JSONResponse({"error": "full"}, 429), 429, "full"),
        (lambda scope, receive, send: asyncio.sleep(0), 503, "the process that answers died; try again"),
    ],
)
def test_no_answer_is_told_as_an_error_and_an_answer_kept(response, status, body):
    client, _ = behind(response)
    found = client.get("/")
    assert (found.status_code, found.json()) == (status, {"error": body})
