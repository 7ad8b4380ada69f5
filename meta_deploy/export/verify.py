"""Does what ships answer as the original does? Both run on the same inputs, and the task compares them.

Knows neither tasks nor targets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx

from meta_deploy import ort
from meta_deploy.cpus import limited_threads
from meta_deploy.errors import VerificationError
from meta_deploy.export.samples import Samples
from meta_deploy.export.sources.source import Source
from meta_deploy.ort import onnxruntime

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def verify(
    source: Source,
    run: Run,
    samples: Samples,
    tolerance: Mapping[str, float],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run the original and the exported model and compare what both say.

    Args:
        source: the original.
        run: the exported model: inputs by name to outputs by name, stages included that it still has.
        samples: the inputs.
        tolerance: a precision's.
        progress: called with (samples done, samples in all).

    Returns:
        Per stage the figures, the tolerance, and whether it holds.

    Raises:
        VerificationError: a stage is off (its `figures` holds the whole result), or the model does not run.
        InputError: a sample cannot be read, or the original gives no finite results.
    """
    comparison = source.comparison(tolerance)
    for runs, feed in enumerate(samples, 1):
        comparison.add(source.run(feed), run(feed))
        progress(samples.done(runs), len(samples))
    stages = comparison.stages()
    result = {
        "images": len(samples),
        "samples": samples.noun,
        "original": source.original,
        "reference": source.reference,
        "backend": getattr(run, "runs_on", "unknown"),
        "stages": stages,
        "passed": bool(stages) and all(stage["passed"] for stage in stages.values()),
    }
    if not result["passed"]:
        raise _failure(result)
    return result


def _failure(result: dict[str, Any]) -> VerificationError:
    name, stage = next((n, s) for n, s in result["stages"].items() if not s["passed"])
    figures = ", ".join(f"{k} {_short(v)}" for k, v in stage.items() if k not in ("passed", "tolerance"))
    limits = ", ".join(f"{k} {_short(v)}" for k, v in stage["tolerance"].items())
    what = f"the exported model does not match {result['original']} on {counted(result)}"
    return VerificationError(what, f"{name} are off ({figures}; wanted: {limits})", result)


def counted(result: Mapping[str, Any]) -> str:
    """What was compared on: "8 images", "1 input"."""
    count, noun = result["images"], result.get("samples", "images")
    return f"{count} {noun.removesuffix('s') if count == 1 else noun}"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class OnnxRun:
    """A graph on ONNX Runtime's CPU: inputs by name to outputs by name.

    `literally` runs the graph node by node, without ONNX Runtime's own rewriting: for an original. `arena`
    keeps memory between runs, as the runtime does: for timing.
    """

    def __init__(self, graph: onnx.ModelProto, literally: bool = False, arena: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # Memory goes back after each run: side by side with the original a large model needs gigabytes.
        options.enable_cpu_mem_arena = arena
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "0"
        )  # the original's turn is next
        options.intra_op_num_threads = limited_threads()
        if literally:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.runs_on = f"ONNX Runtime {onnxruntime.__version__} CPU"
        with told("load"):
            self.session = onnxruntime.InferenceSession(
                graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        self.names = [output.name for output in self.session.get_outputs()]
        self.takes = [given.name for given in self.session.get_inputs()]

    def __call__(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with told("run"):
            values = ort.run(self.session, None, {name: feed[name] for name in self.takes if name in feed})
        return dict(zip(self.names, values, strict=True))


class Recorded:
    """A model that keeps the shapes of what it gave: `shapes` has them by output."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.runs_on = getattr(run, "runs_on", "the target")
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def __call__(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._run(feed)
        for name, array in outputs.items():
            self.shapes.setdefault(name, []).append(np.shape(array))
        return outputs


class WithStages:
    """What ships, and beside its outputs the stages that only the graph still has.

    Final outputs of a detector alone would hide a fault: boxes that are off are few among many.
    """

    def __init__(self, shipped: Run, graph: Run) -> None:
        self.shipped, self.graph = shipped, graph
        self.runs_on = (
            f"{getattr(shipped, 'runs_on', 'the target')}; stages on {getattr(graph, 'runs_on', '')}"
        )

    def __call__(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**self.graph(feed), **self.shipped(feed)}


@contextlib.contextmanager
def told(verb: str) -> Iterator[None]:
    """ONNX Runtime's own errors, which have no common class, as ours."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VerificationError(f"ONNX Runtime cannot {verb} the exported graph", reason) from error
