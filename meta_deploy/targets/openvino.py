"""OpenVINO on the CPU: an IR (model.xml, model.bin) in place of the ONNX file, compiled where it is opened.

Knows OpenVINO's models and properties; must not know tasks beyond what the manifest promises.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import Engine, OpenVINOModel, Profile
from meta_deploy.cpus import Share, limited_threads
from meta_deploy.errors import BackendError, EngineError, InputError
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.graph.prices import CPU
from meta_deploy.interrupts import interruptible
from meta_deploy.targets import cache
from meta_deploy.targets.contract import Contract, Value
from meta_deploy.targets.model_file import read_model
from meta_deploy.targets.target import (
    MODEL,
    Arrays,
    Backend,
    BuildOptions,
    Built,
    Runner,
    Target,
    TritonBackend,
)

XML, WEIGHTS = "model.xml", "model.bin"
DEVICE = "CPU"
_HINTS: dict[str, Any] = {"fp32": "f32", "fp16": "f32", "bf16": "bf16"}  # what a precision computes in
_WORDS = {"f32": "float32", "bf16": "bfloat16"}
_NO_NODES = ("Constant", "Parameter", "Result")
_CACHE, _CAPABILITIES = "openvino", "OPTIMIZATION_CAPABILITIES"
_LONGEST_REASON = 300


class OpenVINO(Target):
    """An IR. Computes in float32, which is what is verified; --fp16 halves the weights alone, --bf16 computes
    in bfloat16 where the processor does, and so does what --int8 leaves."""

    name = "openvino"
    title = "OpenVINO"
    passes = (
        *("clean-up", "plain-einsum", "fuse-layer-norm", "share-norms", "fold-batch-norm", "merge-siblings"),
        *("gather-rows", "slices-to-split", "collapse-chains", "move-linears", "collapse-chains"),
        *("fold-branches", "distribute-sums", "fold-scales", "discarded-rows"),
    )
    doubtful = ("move-linears", "gather-rows", "merge-siblings", "distribute-sums", "fold-branches")
    prices = CPU
    operators = ("native", "lowered")
    precisions = ("fp32", "fp16", "bf16", "int8")
    lowered_by_build = ("fp16", "bf16")
    eight_bits = {  # noqa: RUF012
        "int8": EightBitRules(signed=False, results=False, biases=False, speedup=4, value=20, node=1e6)
    }
    backends = ("openvino",)
    automatic = ("openvino",)
    # In batches it would pad each to the largest.
    triton = TritonBackend("openvino", XML, "KIND_CPU", batches=False)
    builds = True

    def check(self, options: BuildOptions) -> None:
        super().check(options)
        _check_hint(_core(), self._hint(options.precision))

    def build(
        self,
        model: bytes,
        profiles: Sequence[Profile],
        options: BuildOptions,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Built:
        core = _core()
        with (
            _told("convert the graph", "use --target onnxruntime", EngineError),
            tempfile.TemporaryDirectory() as folder,
        ):
            graph = core.read_model(model, b"")
            path = Path(folder) / XML
            _library().save_model(graph, path, compress_to_fp16=options.precision == "fp16")
            files = {name: (path.parent / name).read_bytes() for name in (XML, WEIGHTS)}
        section = OpenVINOModel(
            version=_version(),
            precision_hint=self._hint(options.precision),
            nodes=sum(op.get_type_name() not in _NO_NODES for op in graph.get_ops()),
        )
        return Built(files, section)

    def rest(self, precision: str) -> str:
        return "bf16" if precision == "int8" and _has_bfloat16(_core()) else super().rest(precision)

    def _hint(self, precision: str) -> Any:
        """What a precision computes in on this processor; int8, what is not in 8 bits."""
        return _HINTS[self.rest(precision)]

    def runner(self, built: Built, profiles: Sequence[Profile], precision: str) -> Runner:
        hint = self._hint(precision)
        with _told("load the model that it made", "use --target onnxruntime", EngineError):
            compiled = compile_model(built.files[XML], built.files[WEIGHTS], hint, limited_threads())
        return _Model(compiled, hint, "the model that it made")

    def describe(self, section: Engine) -> str:
        assert isinstance(section, OpenVINOModel)
        computes = _WORDS[section.precision_hint]
        return f"model of OpenVINO {section.version}: {section.nodes:,} nodes, computes in {computes}"

    def open(self, bundle: Bundle, backend: str, threads: int | None) -> Backend:
        return OpenVINOBackend(bundle, threads)


TARGETS = (OpenVINO(),)


def read_parts(bundle: Bundle) -> tuple[bytes, bytes, str]:
    """A bundle's model, its weights where they are apart, and the precision to compute in.

    Raises:
        BundleError: a file is missing or altered.
    """
    if isinstance(bundle.engine, OpenVINOModel):
        return bundle.read(XML), bundle.read(WEIGHTS), bundle.engine.precision_hint
    return read_model(bundle), b"", "f32"


class OpenVINOBackend(Backend):
    """A bundle's IR, or model.onnx of a bundle that was made for another target."""

    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int | None = None):
        """`threads` is the CPU's; None for this process' share of them.

        Raises:
            BackendError: OpenVINO is not installed, cannot load the model or compute in its precision here,
                or the model is not the manifest's.
            BundleError: a file is missing or altered.
        """
        own = isinstance(bundle.engine, OpenVINOModel)
        self._contract = Contract(bundle, XML if own else MODEL)
        model, weights, hint = read_parts(bundle)
        with _told(f"load {self._contract.what}", "export it again"):
            self._share = Share(threads)
            compiled = compile_model(model, weights, hint, self._share.threads, kept=True)
            inputs = {port.node.get_friendly_name(): _value(port) for port in compiled.inputs}
            # Outputs that were found to be the same as another tensor have the names of both.
            outputs = {name: _value(port) for port in compiled.outputs for name in port.get_names()}
        self._contract.check(inputs, outputs)
        self._model: _Model | None = _Model(compiled, hint, self._contract.what)
        self.runs_on = self._model.runs_on

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        model = self._model
        if model is None:
            raise BackendError("the back end is closed; open the predictor again")
        self._contract.check_inputs(inputs)
        found = model(inputs)
        outputs = {name: found[name] for name in self._contract.outputs}
        self._contract.check_outputs(inputs, outputs)
        return outputs

    def close(self) -> None:
        self._model = None
        self._share.close()


class _Model:
    """A compiled model as a function of arrays by name. Each thread that runs it has a request of its own."""

    def __init__(self, compiled: Any, hint: str, what: str):
        self._compiled, self._what = compiled, what
        self._idle: list[Any] = []  # requests that nobody uses; taking and giving back are atomic
        device = compiled.get_property("EXECUTION_DEVICES")
        self.runs_on = f"OpenVINO {_version()} on the {device[0]} in {_WORDS[hint]}"

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        # A request that failed is not used again.
        with _told(f"run {self._what}", "export it again, or for onnxruntime"):
            # By port: OpenVINO knows no input that nothing reads. In C's order, which keeps a scalar one.
            ports = {port: port.node.get_friendly_name() for port in self._compiled.inputs}
            feed = {port: np.asarray(inputs[name], order="C") for port, name in ports.items()}
            found = interruptible(lambda: request.infer(feed), request.cancel)
        outputs = {name: found[port] for port in self._compiled.outputs for name in port.get_names()}
        self._idle.append(request)
        return outputs


@functools.cache
def _library() -> Any:
    """OpenVINO, without its telemetry: importing it sends a report and writes to the home folder.

    Raises:
        BackendError: it is not installed.
    """
    # Without that package it takes a stub of its own. One that the program has loaded already stays.
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    except Exception as error:  # a broken installation raises anything
        reason = " ".join(str(error).split())
        raise BackendError(f"OpenVINO cannot be imported ({reason}); pip install openvino") from error
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]
    return openvino


@functools.cache
def _core() -> Any:
    """The one Core of this process."""
    return _library().Core()


def _version() -> str:
    """As the package's: 2026.4.1 of 2026.4.1-22982-…"""
    return _library().__version__.split("-")[0]


@contextlib.contextmanager
def _told(what: str, remedy: str, error_type: type[InputError] = BackendError) -> Iterator[None]:
    """OpenVINO's errors, which are RuntimeErrors of several lines, as one line of ours."""
    try:
        yield
    except (RuntimeError, UnicodeDecodeError) as error:  # the latter of names that are no text
        lines = (line.strip() for line in str(error).splitlines())
        # Some say where in OpenVINO's sources, and not what.
        reason = " ".join(line for line in lines if not line.startswith(("Exception from", "Check '")))
        raise error_type(f"OpenVINO cannot {what}: {reason[:_LONGEST_REASON]}; {remedy}") from error


def _has_bfloat16(core: Any) -> bool:
    return "BF16" in core.get_property(DEVICE, _CAPABILITIES)


def _check_hint(core: Any, hint: str) -> None:
    """Raises BackendError where the processor does not compute in this: OpenVINO would take float32."""
    if hint == "bf16" and not _has_bfloat16(core):
        raise BackendError("this processor does not compute in bfloat16; use --fp16 or --fp32")


def compile_model(
    model: bytes, weights: bytes, hint: str, threads: int = 0, kept: bool = False, profiled: bool = False
) -> Any:
    """A model compiled for this processor; `kept`: taken from the user's cache folder, and put there.

    `threads` of 0 is OpenVINO's choice, all cores. A `profiled` one takes the time of each of its nodes.

    Raises:
        BackendError: OpenVINO is not installed or cannot compute in this precision here.
        RuntimeError: what OpenVINO raises for a model that it cannot load.
    """
    core = _core()
    _check_hint(core, hint)
    # One stream: all threads work on one image, for the shortest time of each. Not pinned to cores, where
    # they would wait for whatever else runs there.
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": hint,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    if profiled:
        settings["PERF_COUNT"] = True
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    processor = core.get_property(DEVICE, "FULL_DEVICE_NAME"), *core.get_property(DEVICE, _CAPABILITIES)
    digests = [hashlib.sha256(data).hexdigest() for data in (model, weights)]
    key = cache.key(digests, _library().__version__, processor, settings)
    compiled = _import(core, key, settings) if kept else None
    if compiled is None:
        compiled = core.compile_model(core.read_model(model, weights), DEVICE, settings)
        if kept:
            with contextlib.suppress(InputError):  # it only saves time
                stream = io.BytesIO()
                compiled.export_model(stream)
                cache.write(_CACHE, key, stream.getvalue(), {"settings": settings})
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if taken != hint:
        raise BackendError(f"OpenVINO computes in {taken} here, and {hint} was verified; export it again")
    return compiled


def _import(core: Any, key: str, settings: dict[str, Any]) -> Any:
    """The compiled model that is kept under this key; None without a sound one."""
    found = cache.read(_CACHE, key)
    if found is None:
        return None
    try:
        return core.import_model(found[0], DEVICE, settings)
    except RuntimeError:
        return None


def _value(port: Any) -> Value:
    """A model's input or output."""
    shape = [dim.get_length() if dim.is_static else None for dim in port.get_partial_shape()]
    return Value(np.dtype(port.get_element_type().to_dtype()).name, shape)
