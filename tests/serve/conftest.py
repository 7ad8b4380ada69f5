"""Fixtures for the server: a picture, and an application that listens, for clients that need a port."""

import contextlib
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def picture():
    """A PNG of 96x64: its file's bytes."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 200, (64, 96, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def listening():
    """`with listening(app) as address`."""
    uvicorn = pytest.importorskip("uvicorn")

    @contextlib.contextmanager
    def listen(app):
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join(10)

    return listen
