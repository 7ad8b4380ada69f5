"""Tensors over HTTP by the Open Inference Protocol (KServe's v2): what a request holds, what an answer says.

Source: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol, and for tensors as
bytes beside the JSON Triton's extension binary_tensor_data. Knows bytes and arrays; must not know HTTP, nor
what runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import RawManifest
from meta_deploy.errors import InputError
from meta_deploy.serve.messages import LENGTH

PLATFORMS = {"onnxruntime": "onnx_onnxv1", "openvino": "openvino_ir", "tensorrt": "tensorrt_plan"}
_TYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    **{
        f"{sign}INT{bits}": np.dtype(f"{sign.lower()}int{bits}")
        for bits in (8, 16, 32, 64)
        for sign in ("", "U")
    },
    **{f"FP{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
}
_NAMES = {np.dtype(dtype).name: name for name, dtype in _TYPES.items()}

_Dim = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Shape = Annotated[tuple[_Dim, ...], Meta(max_length=32)]


class _Input(Struct):
    name: str
    shape: _Shape
    datatype: str
    data: Any = None
    parameters: dict[str, Any] = {}


class _Wanted(Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Request(Struct):
    inputs: Annotated[list[_Input], Meta(min_length=1, max_length=1024)]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: Annotated[list[_Wanted], Meta(max_length=1024)] | None = None


class Request:
    """A request's arrays by name, and which outputs it wants in which form.

    Attributes:
        arrays: by name.
        id: to be said in the answer; None: it has none.
    """

    def __init__(self, body: bytes, json_bytes: int | None = None):
        """The body, and the length of its JSON where bytes of tensors follow.

        Raises:
            InputError: it is not a request, or its tensors are not what it says of them.
        """
        if json_bytes is None:
            json_bytes = len(body)
        elif not 0 <= json_bytes <= len(body):
            raise InputError(
                f"{LENGTH} is {json_bytes}, and the body has {len(body)} bytes; send the JSON's length"
            )
        try:
            request = msgspec.json.decode(body[:json_bytes], type=_Request)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"the body is not an inference request: {error}; see the v2 protocol") from error
        for parameters in [
            request.parameters,
            *(one.parameters for one in request.inputs + (request.outputs or [])),
        ]:
            _check_parameters(parameters)
        self.id = request.id
        self.arrays = _arrays(request.inputs, memoryview(body)[json_bytes:])
        self._binary = request.parameters.get("binary_data_output") is True
        self._wanted = request.outputs or None

    def answer(self, model: str, version: str, outputs: Mapping[str, np.ndarray]) -> tuple[bytes, int | None]:
        """The answer's body, and the length of its JSON where bytes follow.

        Raises:
            InputError: an output that there is not, or one that cannot be said in JSON.
        """
        wanted = self._wanted if self._wanted is not None else [_Wanted(name) for name in outputs]
        told, blobs = [], []
        for want in wanted:
            if want.name not in outputs:
                raise InputError(f"there is no output '{want.name}'; there are {', '.join(outputs)}")
            array = outputs[want.name]
            entry: dict[str, Any] = {"name": want.name, "datatype": datatype(array.dtype.name)}
            entry["shape"] = list(array.shape)
            if want.parameters.get("binary_data", self._binary) is True:
                blobs.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
                entry["parameters"] = {"binary_data_size": len(blobs[-1])}
            elif array.dtype.kind == "f" and not np.isfinite(array).all():
                raise InputError(
                    f"output '{want.name}' holds numbers that are not finite, which JSON has not; ask for "
                    "binary data"
                )
            else:
                entry["data"] = array.ravel().tolist()
            told.append(entry)
        document = {"model_name": model, "model_version": version, "outputs": told}
        if self.id is not None:
            document["id"] = self.id
        text = msgspec.json.encode(document)
        return (b"".join([text, *blobs]), len(text)) if blobs else (text, None)


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuse extensions that change what is asked for; hints, which others send too, are not needed."""
    for name in parameters:
        if name.startswith(("shared_memory", "sequence_", "classification")):
            raise InputError(
                f"the parameter '{name[:100]}' is of an extension that is not here; leave it out"
            )


def _arrays(inputs: Sequence[_Input], rest: memoryview) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for given in inputs:
        if given.name in arrays:
            raise InputError(f"input '{given.name}' is there twice; send it once")
        if given.datatype not in _TYPES:
            raise InputError(f"input '{given.name}' is of {given.datatype}; it may be {', '.join(_TYPES)}")
        dtype = np.dtype(_TYPES[given.datatype])
        size = given.parameters.get("binary_data_size")
        if size is None:
            arrays[given.name] = _of_json(given, dtype)
            continue
        needed = math.prod(given.shape) * dtype.itemsize
        if isinstance(size, bool) or size != needed or given.data is not None:
            raise InputError(
                f"input '{given.name}' of shape {list(given.shape)} takes {needed} bytes "
                f"and no data, not {size!r}"
            )
        if needed > len(rest):
            raise InputError(
                f"input '{given.name}' takes {needed} bytes, and there are {len(rest)} left; send all"
            )
        values = np.frombuffer(rest[:needed], dtype.newbyteorder("<")).astype(dtype).reshape(given.shape)
        arrays[given.name], rest = values, rest[needed:]
    if len(rest):
        raise InputError(f"{len(rest)} bytes follow the last input; send what binary_data_size says")
    return arrays


def _of_json(given: _Input, dtype: np.dtype) -> np.ndarray:
    """A tensor of JSON's numbers, flat or nested. Raises InputError: they are others than it says."""
    count = math.prod(given.shape)
    what = f"input '{given.name}' of {given.datatype} {list(given.shape)}"
    if not isinstance(given.data, list):
        raise InputError(f"{what} has no data; send a list of {count} values")
    try:
        values = np.asarray(given.data)
        if values.size == 0:
            values = values.astype(dtype)
        elif values.dtype.kind in "fO" and dtype.kind in "iu":  # beyond 64 bits, or mixed with such
            values = _whole(np.asarray(given.data, object))
        fits = "b" if dtype.kind == "b" else "iu" if dtype.kind in "iu" else "iuf"
        if values.dtype.kind not in fits:
            raise ValueError("values of another type")
        with np.errstate(over="ignore"):  # to infinity, which is seen below
            array = values.astype(dtype)
        if dtype.kind in "iu" and not (array == values).all():
            raise ValueError("values beyond its range")
        if dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError("values beyond its range")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{what} holds {_reason(error)}; send {count} numbers that fit") from error
    if array.size != count or (array.ndim > 1 and array.shape != given.shape):
        raise InputError(f"{what} has {array.size} values in data of shape {list(array.shape)}; send {count}")
    return array.reshape(given.shape)


def _whole(values: np.ndarray) -> np.ndarray:
    """Python's numbers as 64-bit ones, signed where one is negative."""
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values.flat):
        raise ValueError("values of another type")
    return values.astype(np.int64 if any(value < 0 for value in values.flat) else np.uint64)


def _reason(error: Exception) -> str:
    told = str(error)
    return told if told.startswith("values") else "lists of different lengths, or what is no number"


def datatype(name: str) -> str:
    """The protocol's name of a numpy type. Raises InputError: it has none."""
    if name not in _NAMES:
        raise InputError(f"the protocol has no type for {name}; use meta-infer")
    return _NAMES[name]


def described(bundle: Bundle) -> dict[str, Any]:
    """`platform`, `inputs` and `outputs` of a model's metadata; what is open in a shape is -1."""
    manifest = bundle.manifest
    specs = manifest.inputs if isinstance(manifest, RawManifest) else (manifest.input,)
    inputs = [
        _spec(
            spec.name,
            spec.dtype,
            [a if a == b else -1 for a, b in zip(spec.profile.min, spec.profile.max, strict=True)],
        )
        for spec in specs
    ]
    outputs = [
        _spec(spec.name, spec.dtype, [size if isinstance(size, int) else -1 for size in spec.shape])
        for spec in manifest.outputs
    ]
    library = bundle.target.partition("-")[0]
    return {"platform": PLATFORMS.get(library, library), "inputs": inputs, "outputs": outputs}


def _spec(name: str, dtype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": _NAMES.get(dtype, dtype.upper()), "shape": shape}
