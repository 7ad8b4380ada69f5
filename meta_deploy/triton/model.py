"""The Python model that Triton's Python backend runs: an encoded image in, what is found in it out.

A `Predictor` whose back end is another model of the same server. Runs in that server only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import from_dict, read_manifest
from meta_deploy.errors import BackendError, InputError
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.targets.target import Arrays, Backend
from meta_deploy.triton.config import OPTIONS
from meta_deploy.triton.outputs import IMAGE, answers_of

_PAUSE = 0.1  # seconds


class TritonPythonModel:
    """What Triton makes of a version's model.py. Its methods are those that Triton calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the version of `args`, by the manifest in its folder.

        Raises:
            InputError: the manifest, or a parameter of config.pbtxt. Triton then does not load the model.
        """
        cv2.setNumThreads(1)  # there are several such processes
        version = args["model_version"]
        folder = Path(args["model_repository"], version)
        content, _ = read_manifest(folder)
        bundle = Bundle(folder, from_dict(content, folder))  # whose files are the other model's
        network, options = _parameters(json.loads(args["model_config"]).get("parameters", {}))
        backend = Network(network, int(version), bundle)
        self._answers = answers_of(bundle.manifest)
        self._predictor = Predictor(bundle, backend, **options)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response to each request, in order; one that fails has its error alone."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Triton unloads the model."""
        self._predictor.close()

    def _respond(self, request: Any) -> Any:
        import triton_python_backend_utils as triton

        try:
            wanted = set(request.requested_output_names())
            image = triton.get_input_tensor_by_name(request, IMAGE).as_numpy()
            result = self._predictor(image.item())
            return triton.InferenceResponse(
                [
                    triton.Tensor(answer.tensor.name, np.ascontiguousarray(answer.take(result)))
                    for answer in self._answers
                    if answer.tensor.name in wanted
                ]
            )
        except BackendError as error:
            return _failed(str(error), "INTERNAL")
        except InputError as error:
            return _failed(str(error), "INVALID_ARG")
        except MemoryError:
            return _failed("there is not enough memory for this image; make it smaller", "UNAVAILABLE")
        except Exception as error:  # an internal error is that of one request, too
            return _failed(f"internal error: {type(error).__name__}: {error}", "INTERNAL")


def _failed(message: str, code: str) -> Any:
    """A response that is an error; over HTTP its status is 400, 500 or 503."""
    import triton_python_backend_utils as triton

    return triton.InferenceResponse(error=triton.TritonError(message, getattr(triton.TritonError, code)))


def _parameters(given: Mapping[str, Mapping[str, str]]) -> tuple[str, dict[str, Any]]:
    """The name of the model to run, and options of a `Predictor`, from the parameters of config.pbtxt.

    Raises:
        InputError: one is absent, unknown or no value.
    """
    # Those of Triton's own are in capitals, as EXECUTION_ENV_PATH.
    values = {key: value["string_value"] for key, value in given.items() if not key.isupper()}
    try:
        network = values.pop("network")
    except KeyError:
        raise InputError("config.pbtxt lacks the parameter 'network', the name of the model to run") from None
    options: dict[str, Any] = {}
    for key, value in values.items():
        if key not in OPTIONS:
            raise InputError(f"config.pbtxt has an unknown parameter '{key}'; choose {', '.join(OPTIONS)}")
        try:
            options[key] = json.loads(value)
        except ValueError as error:
            raise InputError(
                f"config.pbtxt has '{value}' for '{key}', which is no number; correct it"
            ) from error
    return network, options


class Network(Backend):
    """A version of another model on the same server, called through the Python backend."""

    name = "triton"

    def __init__(self, model: str, version: int, bundle: Bundle, patience: float = 60.0):
        """`bundle` is what the model was made of.

        Triton may load this model before the other. For `patience` seconds from now, a call waits for that.
        """
        self._model, self._version = model, version
        self._ranks = {output.name: len(output.shape) for output in bundle.manifest.outputs}
        self._outputs = list(bundle.output_names)
        self._waits_until = time.monotonic() + patience
        self.runs_on = f"version {version} of model '{model}' in Triton"

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        while (response := self._call(inputs)).has_error():
            if time.monotonic() > self._waits_until:
                reason = " ".join(response.error().message().split())
                raise BackendError(f"{self.runs_on} failed: {reason}")
            time.sleep(_PAUSE)
        self._waits_until = -math.inf  # it is there
        found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        # Triton makes (B,) to (B, 1).
        return {name: array.reshape(array.shape[: self._ranks[name]]) for name, array in found.items()}

    def _call(self, inputs: Arrays) -> Any:
        import triton_python_backend_utils as triton

        return triton.InferenceRequest(
            model_name=self._model,
            model_version=self._version,
            requested_output_names=self._outputs,
            inputs=[triton.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()],
            preferred_memory=triton.PreferredMemory(triton.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()

    def close(self) -> None:
        """Nothing: the server keeps the model."""
