"""A look at a pickle's opcodes before it is loaded: what would crash, hang or fill the process is refused.

torch.load runs no code of the file, but trusts its sizes: hashing tuples nested 300,000 deep overflows the
stack, tuples that share their parts expand without end, and a few bytes can ask for terabytes. The look takes
about 5 microseconds an opcode, 0.2 s for 300 MB in 1,200 tensors, which is what the file's checksums take.
Knows opcodes, not tensors.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Iterable, Sequence
from typing import IO, Any, NamedTuple

MAX_OPCODES = 5_000_000  # 600,000 are usual for 10,000 tensors
MAX_DEPTH = 64  # of tuples in tuples
MAX_SHARED = 20_000_000  # items and characters that are reached over again, through the memo
MAX_LONG_INTEGERS = 10_000  # of more than 60 bits, which can be made to collide in a dictionary

_ALLOCATES = re.compile(r"builtins\.bytearray|__builtin__\.bytearray|torch\..*(Tensor|Storage)")
_CODECS = ("latin1", "latin-1", "utf-8", "utf8", "ascii")  # some others take quadratic time


class Refused(ValueError):
    """What a pickle would do, for the middle of a sentence."""


class _Whole(NamedTuple):
    """A tuple, or what was made of one, or a long string: how deep and large it is, and its first items."""

    depth: int
    size: int
    items: tuple[Any, ...] = ()


class _Growing:
    """A list, a dictionary or a set: how large it is by now."""

    def __init__(self) -> None:
        self.size = 1


class _Name(str):
    """What GLOBAL names, which a string of the file is not."""


def check_pickle(stream: IO[bytes], nbytes: int, count: int = 1) -> None:
    """Read the opcodes of `count` pickles, one after the other, that a file of `nbytes` holds.

    What is neither a harm nor known is left to the unpickler, which refuses it.

    Raises:
        Refused: it would do harm.
        ValueError, EOFError: it is damaged.
    """
    scan = _Scan(nbytes)
    for _ in range(count):
        if not scan.read(pickletools.genops(stream)):
            return


class _Scan:
    """The unpickler's stack, in which only tuples, names and numbers are told apart."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.opcodes = self.longs = self.shared = 0
        self.storages: dict[str, int] = {}
        self.claimed = 0

    def read(self, opcodes: Iterable[tuple[Any, Any, Any]]) -> bool:
        """Whether the pickle was followed to its end."""
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        for opcode, value, _ in opcodes:
            self.opcodes += 1
            if self.opcodes > MAX_OPCODES:
                raise Refused(f"takes more than {MAX_OPCODES} steps to load")
            if opcode.name == "STOP":
                return True
            try:
                if not self.step(opcode.name, value):
                    return False
            except (IndexError, KeyError):  # a stack or a memo without what is asked for
                return False
        return False

    def step(self, name: str, value: Any) -> bool:
        """Follow one opcode; whether it is one that the unpickler knows."""
        stack = self.stack
        if name in ("BINPUT", "LONG_BINPUT"):
            self.memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.again(self.memo[value]))
        elif name in ("BINUNICODE", "SHORT_BINSTRING", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(self.literal(value))
        elif name == "GLOBAL":
            stack.append(_Name(value.replace(" ", ".", 1)))
        elif name == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            self.stack = self.marks.pop()
            if name == "TUPLE":
                self.stack.append(self.whole(stack))
            else:
                _grow(self.stack[-1], stack)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [self.whole(self.last(count))]
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = self.last(2)
            self.check_call(function, arguments)
            stack[-2:] = [self.whole([arguments])]
        elif name == "BINPERSID":
            self.check_storage(stack.pop())
            stack.append(None)
        elif name in ("APPEND", "BUILD", "SETITEM"):
            items = [stack.pop() for _ in range(2 if name == "SETITEM" else 1)]
            _grow(stack[-1], items)
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append(_Growing())
        elif name in ("NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "EMPTY_TUPLE"):
            stack.append(None)
        else:
            return name == "PROTO"
        return True

    def last(self, count: int) -> list[Any]:
        """The last items of the stack. Raises IndexError if there are fewer."""
        if len(self.stack) < count:
            raise IndexError(count)
        return self.stack[-count:]

    def literal(self, value: Any) -> Any:
        """A number or a short string as it is; of a long one the length is enough."""
        if isinstance(value, str) and len(value) > 100:
            return _Whole(0, len(value))
        if isinstance(value, int) and value.bit_length() > 60:
            self.longs += 1
            if self.longs > MAX_LONG_INTEGERS:
                raise Refused(f"holds more than {MAX_LONG_INTEGERS} integers of over 60 bits")
        return value

    def again(self, value: Any) -> Any:
        """What comes out of the memo, and may be gone through or copied once more."""
        self.shared += _size(value)
        if self.shared > MAX_SHARED:
            raise Refused("refers to the same large parts so often that it expands without end")
        return value

    def whole(self, items: Sequence[Any]) -> _Whole:
        """A tuple of these."""
        depth = 1 + max((item.depth for item in items if isinstance(item, _Whole)), default=0)
        if depth > MAX_DEPTH:
            raise Refused(f"nests tuples more than {MAX_DEPTH} deep")
        return _Whole(depth, 1 + sum(map(_size, items)), tuple(items[:8]))

    def check_call(self, function: Any, arguments: Any) -> None:
        """Refuse calls that take memory which the file does not have, or no end of time."""
        if not isinstance(function, _Name):
            return
        items = arguments.items if isinstance(arguments, _Whole) else ()
        if function == "torch._tensor._rebuild_from_type_v2":  # calls what it is given
            inner = items[0] if items else None
            if not str(inner).startswith("torch._utils._rebuild_"):
                raise Refused(f"makes a tensor by '{inner}'")
        if function == "_codecs.encode" and len(items) > 1 and items[1] not in _CODECS:
            raise Refused(f"encodes text as '{items[1]}'")
        if _ALLOCATES.fullmatch(function) and (wanted := _product(items)) > self.nbytes:
            raise Refused(f"asks for {wanted} bytes or more, and the file has {self.nbytes}")

    def check_storage(self, name: Any) -> None:
        """Refuse storages that are larger than the file which should hold them."""
        items = name.items if isinstance(name, _Whole) else ()
        if len(items) < 5 or not isinstance(items[4], int):
            return
        key = str(items[2])
        self.claimed += max(0, items[4] - self.storages.get(key, 0))
        self.storages[key] = items[4]
        if self.claimed > self.nbytes:
            raise Refused(
                f"claims tensors of {self.claimed} elements or more, and the file has {self.nbytes} bytes"
            )


def _size(item: Any) -> int:
    return item.size if isinstance(item, (_Whole, _Growing)) else 1


def _grow(target: Any, items: Sequence[Any]) -> None:
    if isinstance(target, _Growing):
        target.size += sum(map(_size, items))


def _product(items: Sequence[Any]) -> int:
    """All numbers among the items, and in the tuples among them, multiplied."""
    result = 1
    for item in items:
        number = _product(item.items) if isinstance(item, _Whole) else item
        result *= max(1, abs(number)) if isinstance(number, int) else 1
    return result
