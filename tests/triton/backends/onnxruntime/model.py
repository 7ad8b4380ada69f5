"""Stands in for Triton's ONNX Runtime backend where a server has none: a backend in Python, of that name."""

import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """One instance of a model, by its config.pbtxt."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        file = os.path.join(args["model_repository"], args["model_version"], config["default_model_filename"])
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.inputs = [given["name"] for given in config["input"]]
        self.outputs = [given["name"] for given in config["output"]]
        self.batched = config["max_batch_size"] > 0

    def execute(self, requests):
        arrays = [
            {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            for request in requests
        ]
        if not self.batched:
            return [self._response(self.session.run(self.outputs, feed)) for feed in arrays]
        together = {name: np.concatenate([feed[name] for feed in arrays]) for name in self.inputs}
        ends = np.cumsum([len(feed[self.inputs[0]]) for feed in arrays])[:-1]
        parts = [np.split(value, ends) for value in self.session.run(self.outputs, together)]
        return [self._response(values) for values in zip(*parts, strict=True)]

    def _response(self, values):
        pairs = zip(self.outputs, values, strict=True)
        return triton.InferenceResponse(
            [triton.Tensor(name, np.ascontiguousarray(value)) for name, value in pairs]
        )
