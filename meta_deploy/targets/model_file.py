"""A bundle's model.onnx, with the weights that it keeps in other files of the bundle put into it.

Knows as much of ONNX's protocol buffers as that takes, without the onnx package; must not know what runs it.
Libraries look for such files in the current folder, whatever is there, so they are given none to look for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.errors import BackendError, BundleError
from meta_deploy.targets.target import MODEL

# Of onnx.proto: message -> the fields through which tensors are reached, and what is in them.
_INNER = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
}
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14
_VARINT, _BYTES, _WIDTHS = 0, 2, {1: 8, 5: 4}  # wire types, and the sizes of the fixed ones
_DEEPEST = 100  # as the libraries' parsers allow
Read = Callable[[str], bytes]


def read_model(bundle: Bundle) -> bytes:
    """The bytes of model.onnx, complete in themselves.

    Raises:
        BackendError: it is no ONNX file.
        BundleError: it is missing or altered, or has weights in a file that the manifest does not list.
    """
    what = f"{MODEL} of bundle '{bundle.path}'"

    def read(name: str) -> bytes:
        if name not in bundle.manifest.files:
            raise BundleError(
                f"{what} keeps weights in '{name}', which is not a file of the bundle; export it again"
            )
        return bundle.read(name)

    data = bundle.read(MODEL)
    whole = memoryview(data)
    try:
        complete = _complete("model", whole, read)
    except (ValueError, IndexError) as error:
        raise BackendError(f"{what} is not an ONNX file, or is damaged; export it again") from error
    return data if complete is whole else bytes(complete)


def _complete(kind: str, data: memoryview, read: Read, depth: int = 0) -> memoryview:
    """A message with its external tensors filled in; the very same `data` if it has none."""
    if kind == "tensor":
        return _filled(data, read)
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    parts: list[memoryview] = []
    changed = False
    for number, wire, field, value in _fields(data):
        if wire == _BYTES and (inner := _INNER[kind].get(number)):
            new = _complete(inner, value, read, depth + 1)
            if new is not value:
                field, changed = _field(number, new), True
        parts.append(field)
    return memoryview(b"".join(parts)) if changed else data


def _filled(data: memoryview, read: Read) -> memoryview:
    """A tensor with its external data as its own; the very same `data` if it has none."""
    parts: list[memoryview] = []
    where: dict[str, str] = {}
    external = False
    for number, wire, field, value in _fields(data):
        if number == _EXTERNAL_DATA and wire == _BYTES:
            entry = {at: str(text, "utf-8") for at, kind, _, text in _fields(value) if kind == _BYTES}
            where[entry.get(1, "")] = entry.get(2, "")
            external = True
        elif number == _DATA_LOCATION and wire == _VARINT:
            external |= bool(value[0])
        else:
            parts.append(field)
    if not external:
        return data
    content = memoryview(read(where.get("location", "")))
    start = int(where.get("offset") or 0)
    end = start + int(where["length"]) if where.get("length") else len(content)
    if not 0 <= start <= end <= len(content):
        raise ValueError("more than the file holds")
    return memoryview(b"".join([*parts, _field(_RAW_DATA, content[start:end])]))


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview, memoryview]]:
    """The fields of a message: number, wire type, the whole field, and its value alone."""
    position = 0
    while position < len(data):
        start = position
        tag, position = _varint(data, position)
        if tag >> 32:
            raise ValueError("a field of a number that cannot be")
        wire = tag & 7
        if wire == _VARINT:
            value, (_, position) = position, _varint(data, position)
        elif wire == _BYTES:
            length, value = _varint(data, position)
            position = value + length
        else:
            value, position = position, position + _WIDTHS.get(wire, len(data) + 1)
        if position > len(data):
            raise ValueError("a field of a kind or length that cannot be")
        yield tag >> 3, wire, data[start:position], data[value:position]


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A number, and where it ends. Raises IndexError at the end of the data."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("a number that is too long")


def _field(number: int, value: memoryview) -> memoryview:
    """A field of bytes."""
    head = bytearray()
    for rest in (number << 3 | _BYTES, len(value)):
        while rest > 127:
            head.append(rest & 127 | 128)
            rest >>= 7
        head.append(rest)
    return memoryview(bytes(head) + value)
