"""A child process that stops before each of its system calls, by Linux' ptrace."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

TRACE_ME, SYSCALL, SET_OPTIONS = 0, 24, 0x4200
GOOD_STOPS, KILL_WITH_PARENT = 1, 0x100000
STOP = signal.SIGTRAP | 0x80

needs_ptrace = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' ptrace")


@functools.cache
def _call() -> Any:
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    return call


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    if _call()(request, pid, None, data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Stepped:
    """A child in which `call` runs; its result is the exit code.

    `code` is None while it lives, and negative if a signal ended it.
    """

    def __init__(self, call: Callable[[], int]):
        self.code: int | None = None
        self._entering = False
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            with contextlib.suppress(BaseException):
                _ptrace(TRACE_ME, 0)
                os.kill(os.getpid(), signal.SIGSTOP)
                code = call()
            os._exit(code)
        os.waitpid(self.pid, 0)
        _ptrace(SET_OPTIONS, self.pid, GOOD_STOPS | KILL_WITH_PARENT)

    def __iter__(self) -> Iterator[None]:
        """Go on to the next system call, until the child ends."""
        while self._go():
            self._entering = not self._entering
            if self._entering:
                yield

    def end(self, number: int = 0) -> int:
        """Go on to the end, first with a signal; the exit code."""
        while self._go(number):
            number = 0
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.end()

    def _go(self, number: int = 0) -> bool:
        """Go on to a call's entry or return. False: the child has ended."""
        while self.code is None:
            with contextlib.suppress(ProcessLookupError):
                _ptrace(SYSCALL, self.pid, number)
            _, status = os.waitpid(self.pid, 0)
            if not os.WIFSTOPPED(status):
                self.code = os.waitstatus_to_exitcode(status)
            elif os.WSTOPSIG(status) == STOP:
                return True
            else:
                number = os.WSTOPSIG(status)
        return False


def each_call(call: Callable[[], int], step: int = 1) -> Iterator[Stepped]:
    """A fresh child for each system call that `call` makes (or each `step`th), stopped before that one."""
    position = 0
    while True:
        child = Stepped(call)
        for at, _ in enumerate(child):
            if at == position:
                break
        if child.code is not None:
            return
        try:
            yield child
        finally:
            child.kill()
        position += step
