"""What a Python model sees of a Triton server: triton_python_backend_utils, and the other models.

A model called is a version's folder of a repository, which ONNX Runtime runs by its config.pbtxt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime

from tests.triton.pbtxt import parse


class Tensor:
    def __init__(self, name: str, array: np.ndarray):
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    INTERNAL, INVALID_ARG, UNAVAILABLE = "INTERNAL", "INVALID_ARG", "UNAVAILABLE"

    def __init__(self, message: str, code: str = INTERNAL):
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: Any = (), error: TritonError | None = None):
        self._tensors, self._error = list(output_tensors), error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def arrays(self) -> dict[str, np.ndarray]:
        assert self._error is None, self._error.message()
        return {tensor.name(): tensor.as_numpy() for tensor in self._tensors}


@dataclass
class Request:
    """A client's."""

    arrays: dict[str, np.ndarray]
    wanted: list[str]

    def requested_output_names(self) -> list[str]:
        return self.wanted


@dataclass
class Server:
    """The models of a repository. `fails`: errors of the next calls; `calls`: models and shapes."""

    repository: Path
    fails: list[str] = field(default_factory=list)
    calls: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def module(self) -> ModuleType:
        """triton_python_backend_utils."""
        server = self

        class InferenceRequest:
            def __init__(self, model_name, model_version, requested_output_names, inputs, preferred_memory):
                self.call = (model_name, model_version, requested_output_names, inputs)
                assert preferred_memory == ("cpu", 0)

            def exec(self) -> InferenceResponse:
                return server.run(*self.call)

        module = ModuleType("triton_python_backend_utils")
        module.__dict__.update(
            Tensor=Tensor,
            TritonError=TritonError,
            InferenceResponse=InferenceResponse,
            InferenceRequest=InferenceRequest,
            PreferredMemory=lambda kind, device: (kind, device),
            TRITONSERVER_MEMORY_CPU="cpu",
            get_input_tensor_by_name=lambda request, name: Tensor(name, request.arrays[name]),
        )
        return module

    def config(self, model: str) -> dict[str, Any]:
        return parse((self.repository / model / "config.pbtxt").read_text())

    def run(self, model: str, version: int, names: list[str], inputs: list[Tensor]) -> InferenceResponse:
        if self.fails:
            return InferenceResponse(error=TritonError(self.fails.pop(0)))
        self.calls.append((model, inputs[0].as_numpy().shape))
        config = self.config(model)
        file = self.repository / model / str(version) / config["default_model_filename"][0]
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        assert {tensor.name() for tensor in inputs} == {given["name"][0] for given in config["input"]}
        values = session.run(names, {tensor.name(): tensor.as_numpy() for tensor in inputs})
        reshaped = {output["name"][0] for output in config["output"] if "reshape" in output}
        values = [
            value[:, None] if name in reshaped else value for name, value in zip(names, values, strict=True)
        ]
        return InferenceResponse(Tensor(*pair) for pair in zip(names, values, strict=True))

    def arguments(self, model: str, version: int = 1, **parameters: str) -> dict[str, str]:
        """What `initialize` gets; `parameters` as if config.pbtxt had them too."""
        given = self.config(model).get("parameters", [])
        found = {entry["key"][0]: entry["value"][0]["string_value"][0] for entry in given} | parameters
        config = {"parameters": {key: {"string_value": value} for key, value in found.items()}}
        return {
            "model_config": json.dumps(config),
            "model_repository": str(self.repository / model),
            "model_version": str(version),
        }

    def request(self, model: str, image: bytes, wanted: list[str] | None = None) -> Request:
        outputs = [output["name"][0] for output in self.config(model)["output"]]
        array = np.empty(1, object)
        array[0] = image
        return Request({"image": array}, outputs if wanted is None else wanted)
