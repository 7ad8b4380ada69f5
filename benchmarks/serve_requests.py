"""Requests that nobody should send: damaged pictures, forms and tensors, wrong headers, cut bodies.

Knows bytes and sockets, and nothing of the server's code.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import socket

import numpy as np
from PIL import Image

FORMS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000")
KINDS = ("picture", "noise", "form", "json", "binary", "parameters", "paths", "headers", "cut", "lines")
NOT_WHOLE = ("cut", "lines")  # which a server would wait for the rest of
_TIMEOUT = 60.0


class Requests:
    """Requests by number: the same ones for a seed, of each kind in turn."""

    def __init__(self, seed: int, model: str):
        self._rng, self._model = random.Random(seed), model
        pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8)
        self._pictures = [_encoded(pixels, form) for form in FORMS]
        self._pictures.append(_encoded(pixels[..., 0].astype(np.uint16) * 200, "TIFF"))
        self._pictures.append(_encoded(pixels[..., 0].astype(np.uint16) * 200, "PNG"))

    def make(self, kind: str) -> bytes:
        """A whole request of a kind, head and body, as it goes over the wire."""
        return getattr(self, f"_{kind}")()

    def _picture(self) -> bytes:
        return _post("/predict", self._damaged(self._rng.choice(self._pictures)))

    def _noise(self) -> bytes:
        return _post("/predict", self._rng.randbytes(self._rng.choice((0, 1, 10, 1000, 100_000))))

    def _form(self) -> bytes:
        part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        body = self._damaged(part + self._rng.choice(self._pictures) + b"\r\n--b--\r\n")
        odd = (
            "multipart/form-data; boundary=b",
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "text/x",
        )
        return _post("/predict", body, {"Content-Type": self._rng.choice(odd)})

    def _json(self) -> bytes:
        tensor = {"name": "images", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.5] * 192}
        request = {"inputs": [tensor], "outputs": [{"name": "boxes"}]}
        odd = (None, -1, 2**70, "x", [], {}, [[]], 1e400, True, "é" * 100)
        where = self._rng.choice((request, tensor, request["outputs"][0]))
        where[self._rng.choice(list(where))] = self._rng.choice(odd)
        body = json.dumps(request).encode()
        return _post(self._infer, self._damaged(body) if self._rng.random() < 0.5 else body)

    def _binary(self) -> bytes:
        size = self._rng.choice((0, 768, 769, -1, 2**62))
        tensor = {
            "name": "images",
            "datatype": "FP32",
            "shape": [1, 3, 8, 8],
            "parameters": {"binary_data_size": size},
        }
        text = json.dumps({"inputs": [tensor]}).encode()
        length = self._rng.choice((len(text), 0, len(text) + 1, 10**9, -5, "x"))
        body = text + bytes(self._rng.choice((0, 768, 5)))
        return _post(self._infer, body, {"Inference-Header-Content-Length": str(length)})

    def _parameters(self) -> bytes:
        name = self._rng.choice(("score_threshold", "tile", "tile_overlap", "slide", "depth", "other"))
        value = self._rng.choice(
            ("", "nan", "-1", "1e999", "99999999999999999999", "%00", "%ff", "16", "a" * 2000)
        )
        return _post(f"/predict?{name}={value}", self._rng.choice(self._pictures))

    def _paths(self) -> bytes:
        odd = (
            "/predict/%00",
            "/predict/../../etc/passwd",
            "/v2/models/%ff/infer",
            "/predict/" + "a" * 3000,
            "//",
            "/%",
        )
        method = self._rng.choice(("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))
        return _request(method, self._rng.choice((*odd, "/predict", "/metrics", "/v2")), b"x", {})

    def _headers(self) -> bytes:
        odd = {
            "Accept": self._rng.choice(
                ("", ";;;,", "image/png;q=x", "text/html", "image/" + "a" * 500, "\xff")
            ),
            "Content-Encoding": self._rng.choice(("gzip", "br", "identity", "")),
            "Expect": "200-ok",
            "X-Long": "x" * self._rng.choice((1, 40_000)),
        }
        name = self._rng.choice(list(odd))
        return _post("/predict", self._rng.choice(self._pictures), {name: odd[name]})

    def _cut(self) -> bytes:
        whole = _post("/predict", self._rng.choice(self._pictures))
        return whole[: self._rng.randrange(len(whole))]

    def _lines(self) -> bytes:
        odd = (
            b"\r\n\r\n",
            b"GET\r\n\r\n",
            b"\x16\x03\x01\x02\x00",
            b"POST /predict HTTP/9.9\r\n\r\n",
            b"\0" * 100,
        )
        return self._rng.choice(
            (*odd, self._rng.randbytes(200), b"POST /predict HTTP/1.1\r\nContent-Length: x\r\n\r\n")
        )

    @property
    def _infer(self) -> str:
        return f"/v2/models/{self._model}/infer"

    def _damaged(self, body: bytes) -> bytes:
        body_ = bytearray(body)
        for _ in range(self._rng.randrange(1, 8)):
            place = self._rng.randrange(len(body_))
            body_[place : place + self._rng.choice((0, 1, 4))] = self._rng.randbytes(
                self._rng.choice((0, 1, 3))
            )
        return bytes(body_[: self._rng.randrange(len(body_))] if self._rng.random() < 0.3 else body_)


def send(host: str, port: int, kind: str, request: bytes) -> str:
    """The answer's status; "closed" where there is none."""
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection((host, port), timeout=_TIMEOUT) as wire,
    ):
        with contextlib.suppress(ConnectionError):  # it may answer before all is there
            wire.sendall(request)
            if kind in NOT_WHOLE:
                wire.shutdown(socket.SHUT_WR)
        answer = b""
        while b"\r\n" not in answer:
            if not (more := wire.recv(4096)):
                break
            answer += more
        words = answer.split(b"\r\n", 1)[0].split(b" ")
        if len(words) > 1 and words[1].isdigit():
            return words[1].decode()
    return "closed"


def _post(path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    return _request("POST", path, body, headers or {})


def _request(method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _encoded(pixels: np.ndarray, form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()
