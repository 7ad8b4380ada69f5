"""What every command shares: exit codes, one-line errors, option types.

Imports only the standard library, so that `--help` stays instant; knows nothing of models or images.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from meta_deploy.cli.terminal import output_error, streams, tell
from meta_deploy.errors import InputError, VerificationError
from meta_deploy.interrupts import end_process, second_signal_ends
from meta_deploy.text import escaped

EXIT_FAULT, EXIT_INPUT, EXIT_VERIFICATION = 1, 2, 3
EXIT_INTERRUPT, EXIT_PIPE, EXIT_TERMINATED = 130, 141, 143  # 128 and the signal
MAX_THREADS = 1024
MAX_INT = 2**31 - 1
_NUMBER = r"[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]{1,4})?"
MAX_DEPTH = 32


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with 2."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        """As argparse's. Raises InputError in a folder that was deleted, where libraries crash."""
        self._refuse_dashes(sys.argv[1:] if args is None else args)
        parsed = super().parse_args(args, namespace)
        try:
            os.getcwd()
        except OSError as error:
            raise InputError("the current folder is gone; change to another") from error
        return parsed

    def _refuse_dashes(self, texts: Sequence[str]) -> None:
        """Say how a file is written whose name begins with a dash, of which an option would be made."""
        for text in itertools.takewhile(lambda text: text != "--", texts):
            named = os.path.lexists(text) or (not text.startswith("--") and os.path.splitext(text)[1])
            if len(text) > 1 and text.startswith("-") and named and not re.fullmatch(_NUMBER, text):
                self.error(f"'{text}' begins with a dash, as options do; for a file write './{text}'")

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INPUT, f"{self.prog}: {escaped(message)} (see {self.prog} --help)\n")


class Terminated(KeyboardInterrupt):
    """SIGTERM, as containers and job schedulers send it: cleaned up after like Ctrl-C."""


_done = False
_heard: type[KeyboardInterrupt] | None = None


def check_signals() -> None:
    """Raise again what Ctrl-C or SIGTERM raised, where a library caught it and went on."""
    if _heard is not None and not _done:
        raise _heard


def done() -> None:
    """From here on Ctrl-C and SIGTERM come too late: what was asked for is there, as the exit code says."""
    global _done
    _done = True


def _terminate(signum: int, frame: object) -> None:
    global _heard
    _heard = Terminated
    if not _done:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one waits for nothing
        raise Terminated


def _interrupt(signum: int, frame: object) -> None:
    global _heard
    _heard = KeyboardInterrupt
    check_signals()


def run(main_fn: Callable[[], int | None], prog: str | None = None) -> int:
    """Run a command's body and turn what it raises into one line on stderr and an exit code.

    InputError gives 2, VerificationError 3, Ctrl-C 130, SIGTERM 143, anything else 1. With
    META_DEPLOY_DEBUG=1 the traceback is printed too. A second Ctrl-C ends at once. Standard output that
    cannot be written does not end the work: that is told after it, for a closed pipe by 141 alone.
    """
    global _done, _heard
    _done, _heard = False, None
    prog = prog or Path(sys.argv[0]).name
    with contextlib.suppress(ValueError):  # not the main thread: signals are not its business
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
    with streams(), second_signal_ends(unless=lambda: _done), _heard_in_destructors():
        code = _guarded(main_fn, prog)
        end_process(code)
        return code


@contextlib.contextmanager
def _heard_in_destructors() -> Iterator[None]:
    """Print nothing of a signal that came in a destructor, where Python drops it: `check_signals` has it."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _guarded(main_fn: Callable[[], int | None], prog: str) -> int:
    try:
        code = main_fn() or 0
        if error := output_error():
            raise error
        return code
    except InputError as error:
        return _fail(prog, str(error), EXIT_INPUT)
    except VerificationError as error:
        return _fail(prog, str(error), EXIT_VERIFICATION)
    except Terminated:
        return _fail(prog, "terminated", EXIT_TERMINATED)
    except KeyboardInterrupt:
        return _fail(prog, "interrupted", EXIT_INTERRUPT)
    except MemoryError:
        return _fail(prog, "there is not enough memory for this; take a smaller batch or size", EXIT_INPUT)
    except BrokenPipeError:
        return EXIT_PIPE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            where = "cannot write standard output: " if error is output_error() else ""
            return _fail(prog, f"{where}{error.strerror}; free space or write elsewhere", EXIT_INPUT)
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        hint = "please report it with the output of META_DEPLOY_DEBUG=1"
        return _fail(prog, f"internal error: {what}; {hint}", EXIT_FAULT)
    finally:
        if output_error():
            _silence_stdout()


def _silence_stdout() -> None:
    """Nothing more can be written there: give the interpreter's last flush somewhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(prog: str, message: str, code: int) -> int:
    if os.environ.get("META_DEPLOY_DEBUG", "") not in ("", "0"):
        traceback.print_exc()
    tell(f"{prog}: {message}")
    return code


def path(text: str) -> str:
    """An option's value as a path. An empty one, as of an unset variable, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def whole_number(text: str) -> int:
    """An option's value as any whole number, whose range is checked where it is used."""
    # int() also takes other scripts' digits, spaces and 1_0.
    if not re.fullmatch("[+-]?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return int(text)


def positive_int(text: str) -> int:
    """An option's value as a whole number from 1 to 2147483647."""
    return _at_most(MAX_INT, text, f"of at least 1, up to {MAX_INT}")


def thread_count(text: str) -> int:
    """An option's value as a whole number from 1 to 1024."""
    return _at_most(MAX_THREADS, text)


def bit_depth(text: str) -> int:
    """An option's value as a whole number from 1 to 32."""
    return _at_most(MAX_DEPTH, text)


def _at_most(most: int, text: str, range_: str = "") -> int:
    value = int(text) if re.fullmatch("[0-9]{1,10}", text) else 0
    if not 1 <= value <= most:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number {range_ or f'from 1 to {most}'}")
    return value


def number(text: str) -> float:
    """An option's value as a finite number."""
    value = float(text) if re.fullmatch(_NUMBER, text) else math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return value


def fraction(text: str) -> float:
    """An option's value as a number from 0 to 1."""
    value = float(text) if re.fullmatch(_NUMBER, text) else -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")
    return value
