"""Ctrl-C and SIGTERM while a library runs. Knows signals and threads, and no library."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 3.0  # seconds that a library gets to return after a signal
_left_running: list[threading.Thread] = []


def interruptible(call: Callable[[], T], stop: Callable[[], object]) -> T:
    """`call()`, which a signal can end although it runs outside of Python: then `stop()` makes it return.

    Python hears signals in the main thread, between two steps of its own. So there `call` runs in a thread
    beside it, which costs some 0.1 ms. Where `stop` is of no avail, `call` is left running.

    Raises:
        KeyboardInterrupt: a signal came.
        BaseException: what `call` raises.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()  # an interrupted `join` takes its thread for ended, up to Python 3.12

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while not done.wait(0.1):  # without a limit, Windows would not hear Ctrl-C
            pass
    except BaseException:
        _left_running.append(thread)
        stop()
        done.wait(PATIENCE)
        raise
    if errors:
        raise errors.pop()
    return results.pop()


def end_process(code: int) -> None:
    """End the process here if a library still runs: it would keep Python from ending, or crash under it."""
    if any(thread.is_alive() for thread in _left_running):
        os._exit(code)


@contextlib.contextmanager
def second_signal_ends(unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """A second Ctrl-C or SIGTERM ends the process at once, even if Python has not heard the first.

    Not where `unless` says that there is nothing to end any more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        count = 0
        while numbers := heard.recv(16):
            count += sum(number in (signal.SIGINT, signal.SIGTERM) for number in numbers)
            if count > 1 and not unless():
                os._exit(128 + numbers[-1])

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        told.close()  # which ends the thread
