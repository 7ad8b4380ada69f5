"""Fixtures for the server: an application that listens, for clients that need a port."""

import contextlib
import threading
import time

import pytest


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
