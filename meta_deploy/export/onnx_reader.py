"""An ONNX file read without trust: whole, of a known opset, external data from its own folder alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, external_data_helper

from meta_deploy.errors import InputError

MOST_BYTES = 2**31 - 2**16  # what one protocol buffer holds


def read_onnx(path: Path) -> onnx.ModelProto:
    """A model with its external data loaded.

    External data must be in files of the model's own folder (or below); a path that leads out of it, by
    ".." or by a link, is refused.

    Raises:
        InputError: no such file, not ONNX, damaged, over 2 GB, of an unknown opset, or with external data
            that is missing or elsewhere.
    """
    try:
        if path.is_dir():
            raise InputError(f"'{path}' is a folder; name the .onnx file in it")
        if not path.exists():
            raise InputError(f"there is no file '{path}'; check the path")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise InputError(
                f"'{path}' is over 2 GB, more than an ONNX file can hold; "
                "save it again with onnx.save(..., save_as_external_data=True)"
            )
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}; check its permissions") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise InputError(f"'{path}' is not an ONNX file, or is damaged; fetch or save it again") from error
    if not proto.ir_version or not proto.graph.output:
        raise InputError(f"'{path}' is not an ONNX file, or is damaged: it has no outputs; save it again")
    if proto.graph.sparse_initializer:
        raise InputError(f"'{path}' has sparse initializers, which are not supported; save them dense")
    _check_opset(proto, path)
    _load_external(proto, path)
    return proto


def _check_opset(proto: onnx.ModelProto, path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions and not proto.opset_import:
        raise InputError(f"'{path}' names no opset; it is damaged: save it again")
    if versions and not 1 <= versions[0] <= newest:
        raise InputError(
            f"'{path}' is of opset {versions[0]}, and the installed onnx knows up to {newest}; "
            "export it with an older opset, or upgrade onnx"
        )


def _load_external(proto: onnx.ModelProto, path: Path) -> None:
    tensors = [tensor for tensor in tensors_of(proto) if tensor.data_location == TensorProto.EXTERNAL]
    folder = path.resolve().parent
    total = proto.ByteSize()
    for tensor in tensors:
        info = _external_info(tensor, path)
        place = _inside(folder, info.location, path)
        if not place.is_file():
            raise InputError(f"'{path}' keeps weights in '{info.location}', which is not there; put it there")
        size = place.stat().st_size
        start = info.offset or 0
        length = size - start if info.length is None else info.length
        if start < 0 or length < 0 or start + length > size:
            raise InputError(
                f"'{path}' expects more in '{info.location}' than its {size} bytes; copy it again"
            )
        total += length
        if total > MOST_BYTES:
            raise InputError(
                f"'{path}' holds over 2 GB of weights, and this version writes graphs up to 2 GB; "
                "convert its weights to float16 first"
            )
        try:
            with place.open("rb") as stream:
                stream.seek(start)
                tensor.raw_data = stream.read(length)
        except OSError as error:
            raise InputError(f"cannot read '{place}': {error.strerror}; check its permissions") from error
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def _external_info(tensor: TensorProto, path: Path) -> external_data_helper.ExternalDataInfo:
    try:
        info = external_data_helper.ExternalDataInfo(tensor)
    except ValueError as error:
        raise InputError(f"'{path}' does not say where the weights '{tensor.name}' are: {error}") from error
    if "\0" in info.location:
        raise InputError(f"'{path}' keeps weights in a file whose name is none; save it again")
    return info


def _inside(folder: Path, location: str, path: Path) -> Path:
    place = (folder / location).resolve() if location else folder
    if not location or not place.is_relative_to(folder) or place == folder or Path(location).is_absolute():
        raise InputError(
            f"'{path}' reads weights from '{location}', outside of its own folder, which is not done; "
            "put that file beside it"
        )
    return place


def tensors_of(message: Message) -> Iterator[onnx.TensorProto]:
    """Every constant in a model or graph, wherever it is: in attributes, inner graphs, functions."""
    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in (value,) if isinstance(value, Message) else value:
                yield from tensors_of(inner)


def numpy_name(kind: int) -> str:
    """numpy's name of an ONNX type, "string" and "unknown" for what it has none for."""
    if kind == TensorProto.STRING:
        return "string"
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(kind).name
    except (KeyError, TypeError):
        return "unknown"
