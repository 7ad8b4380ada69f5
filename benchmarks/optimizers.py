"""A graph by one optimizer, in a process of its own: its seconds and peak memory, as JSON.

    python benchmarks/optimizers.py NAME IN.onnx OUT.onnx

Imports what the optimizer needs and nothing else, so that memory is the optimizer's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import onnx

Route = Callable[[onnx.ModelProto], onnx.ModelProto]
STOCK = "as exported"
# Targets; TensorRT-RTX has TensorRT's passes.
OURS = {"ours: ONNX Runtime": "onnxruntime", "ours: OpenVINO": "openvino", "ours: TensorRT": "tensorrt-rtx"}


def onnxslim() -> Route:
    import onnxslim

    return onnxslim.slim


def onnxscript() -> Route:
    from onnxscript import optimizer

    return optimizer.optimize


def ort_basic(proto: onnx.ModelProto) -> onnx.ModelProto:
    """By ONNX Runtime's optimizer, as far as it writes standard ONNX."""
    from onnxruntime import GraphOptimizationLevel

    return ort_optimized(proto, GraphOptimizationLevel.ORT_ENABLE_BASIC)


def ort_optimized(proto: onnx.ModelProto, level: Any = None) -> onnx.ModelProto:
    """What ONNX Runtime makes of a graph; without a level, all that it does before it runs it."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if level is not None:
            options.graph_optimization_level = level
        options.optimized_model_filepath = f"{folder}/model.onnx"
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def ours(target: str) -> Route:
    from meta_deploy.graph.pipeline import run_passes
    from meta_deploy.targets import TARGETS

    passes, prices = list(TARGETS[target].passes), TARGETS[target].prices
    return lambda proto: run_passes(proto, passes, prices)[0]


def route(name: str) -> Route:
    """What makes a graph of a graph, by its name; imports the library."""
    if name in OURS:
        return ours(OURS[name])
    return {"onnxslim": onnxslim, "onnxscript": onnxscript, "ONNX Runtime, offline": lambda: ort_basic}[
        name
    ]()


def names() -> list[str]:
    """The optimizers that are installed."""
    others = ["onnxscript", "ONNX Runtime, offline"]
    return [*(["onnxslim"] if find_spec("onnxslim") else []), *others, *OURS]


def optimized(name: str, source: Path, made: Path) -> dict[str, float]:
    """Run an optimizer on a file in a process of its own: `seconds` and `peak MB`.

    Raises:
        RuntimeError: it fails; with its last words.
    """
    command = [sys.executable, __file__, name, str(source), str(made)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError((process.stderr.strip().splitlines() or ["it does not say why"])[-1][:150])
    return json.loads(process.stdout.splitlines()[-1])


def main(name: str, source: str, made: str) -> None:
    from meta_deploy.report.subject import peak_memory_mb

    optimize, proto = route(name), onnx.load(source)
    began = time.perf_counter()
    result = optimize(proto)
    seconds = time.perf_counter() - began
    peak = peak_memory_mb()
    onnx.save(result, made)
    print("\n" + json.dumps({"seconds": seconds, "peak MB": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
