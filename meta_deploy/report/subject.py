"""One thing that is compared, opened: a bundle, an ONNX file or a checkpoint, run as its user would run it.

Knows how each kind is opened; must not know what it is compared with.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from msgspec.structs import replace

from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.bundle.manifest import BatchRange, RawManifest, TensorRTEngine, TensorSpec
from meta_deploy.errors import BackendError, InputError
from meta_deploy.imaging.preprocess import Preprocessor
from meta_deploy.report.schema import PassProfile, Profile
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.targets.model_file import read_model
from meta_deploy.targets.onnxruntime import session_options
from meta_deploy.targets.openvino import read_parts
from meta_deploy.targets.target import MODEL, Backend
from meta_deploy.tasks.raw import Arrays
from meta_deploy.tasks.results import Result, Timings

if TYPE_CHECKING:
    from meta_deploy.export.sources.source import Source
    from meta_deploy.report.gpu import Gauge

Kind = Literal["bundle", "onnx", "checkpoint", "engine"]
PYTORCH, TENSORRT = "pytorch", "tensorrt"
RUNS = 5  # under a profiler, that count
_TURN_MS = 20.0
_MOST_IMAGES = 4096  # a batch, as in a manifest
ENGINES = (".engine", ".plan", ".trt", ".json")
_CHECKPOINTS = (".pth", ".pt", ".safetensors", ".ckpt", ".bin")


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """What a path is taken for.

    Raises:
        InputError: it is none of these, or not there.
    """
    suffix = Path(path).suffix.lower()
    if not os.path.exists(path):
        raise InputError(f"there is no '{path}'; name a bundle, an .onnx file or a checkpoint")
    if os.path.isdir(path):
        return "bundle"
    if suffix == ".onnx":
        return "onnx"
    if suffix in _CHECKPOINTS:
        return "checkpoint"
    if suffix in ENGINES:
        return "engine"
    raise InputError(
        f"'{path}' is no bundle, .onnx file, checkpoint ({', '.join(_CHECKPOINTS)}) or engine "
        f"({', '.join(ENGINES)}); name one"
    )


class Subject:
    """An opened model with the inputs that it is run on.

    Attributes:
        bundle: the bundle; of a file, one as it would be exported without any pass.
        runs_on: library, version, device and precision in words.
    """

    def __init__(
        self, path: str, backend: str, threads: int, images: Sequence[str], scratch: str | os.PathLike[str]
    ) -> None:
        """Open `path` on `backend`; `scratch` is a folder for files on the way.

        Raises:
            InputError: it cannot be opened, or not on this back end.
        """
        import cv2

        cv2.setNumThreads(threads)
        self._threads, self._scratch = threads, Path(scratch)
        self.kind = kind_of(path)
        self._gauge = _gauge(path) if self.kind == "bundle" and backend == TENSORRT else None
        if self._gauge is not None:
            self.predictor = Predictor(path, self._gauge.backend)
        else:
            self.predictor = _OPEN[self.kind](path, backend, threads, self._scratch)
        self.bundle = self.predictor.bundle
        self.runs_on = self.predictor.runs_on
        self._path, self._file = path, {os.path.basename(path): os.path.getsize(path)}
        self._images = images
        self._latest: tuple[int, Result] | None = None
        self._feed = random_feed(self.bundle) if not self.bundle.takes_images else {}

    def facts(self) -> dict[str, Any]:
        """Fields of `schema.Entry`, after the timed rounds."""
        return {
            "backend": self.predictor.backend,
            "runs_on": self.runs_on,
            **about_bundle(self.bundle),
            **({} if self.kind == "bundle" else {"files": self._file}),
            **({"precision": None} if self.kind == "onnx" else {}),
            "peak_memory_mb": peak_memory_mb(),
            "gpu": None if self._gauge is None else self._gauge.told(),
        }

    def result(self, index: int) -> Result:
        """What comes out for image `index`, counted around; for arrays, where the model takes those.

        After `timings` of the same image it is what that run made.
        """
        if self._latest is not None and self._latest[0] == index % len(self._images):
            return self._latest[1]
        return self._run(index)

    def _run(self, index: int) -> Result:
        if not self.bundle.takes_images:
            began = perf_counter()
            outputs = self.predictor.run(self._feed)
            return Arrays(outputs, timings=Timings(model=1000 * (perf_counter() - began)))
        picture = self.predictor.read(self._images[index % len(self._images)])
        (result,) = self.predictor.batch([picture])
        return result

    def logits(self, index: int) -> np.ndarray | None:
        """The logits (1, classes, h, w) of image `index` as a whole; None where the model has none."""
        outputs = self.predictor.run(self._input(index))
        return outputs["logits"][:1] if "logits" in outputs else None

    def timings(self, index: int) -> Timings:
        """The times of a run; reading the image is not among them.

        A model that is done in less than 20 ms is run again until these are over, and the run in the middle
        counts: of the first, much is the time in which caches fill.
        """
        runs = [self._timed(index)]
        while sum(run.total for run, _ in runs) < _TURN_MS:
            runs.append(self._timed(index))
        took, on_gpu = sorted(runs, key=lambda run: run[0].total)[len(runs) // 2]
        if self._gauge is not None and on_gpu is not None and index >= 0:  # those before are to warm up
            self._gauge.keep(on_gpu)
        return took

    def _timed(self, index: int) -> tuple[Timings, tuple[float, float, float] | None]:
        """The times of one run, and those on the GPU where they are known."""
        if self._gauge is None:
            return self._ran(index).timings, None
        self._gauge.take()
        return self._ran(index).timings, self._gauge.take()

    def _ran(self, index: int) -> Result:
        """A run whose result is kept, for who asks for it next."""
        result = self._run(index)
        self._latest = index % len(self._images), result
        return result

    def batch(self, index: int, size: int) -> Timings:
        """The times of a batch of so many images together, the next ones from `index` x `size` on.

        Raises:
            BackendError: the model does not take such a batch.
        """
        if not self.bundle.takes_images:
            raise BackendError("it takes arrays, which are no images to count")
        least, most = self.bundle.input.batch.min, self.bundle.input.batch.max
        if self.bundle.task == "raw":
            least = most = 1
        if not least <= size <= most:
            taken = str(least) if least == most else f"{least} to {most}"
            raise BackendError(f"it takes batches of {taken}")
        chosen = (self._images[i % len(self._images)] for i in range(index * size, (index + 1) * size))
        results = self.predictor.batch([self.predictor.read(image) for image in chosen])
        return sum((result.timings for result in results), Timings())

    def profile(self) -> Profile:
        """Where the model's time goes on the first image. It comes last: the model is closed.

        Raises:
            BackendError: its back end has no profiler here.
        """
        if self.predictor.backend not in ("onnxruntime", "openvino", PYTORCH, TENSORRT):
            raise BackendError(f"nodes are not profiled on {self.predictor.backend}")
        feed = self._feed or self._input(0)
        if self._gauge is not None:
            from meta_deploy.report import engines

            backend = self._gauge.backend
            return engines.profile(self.bundle, backend.layers(), backend.layer_times(feed, RUNS))
        if self.predictor.backend == PYTORCH:
            from meta_deploy.report import pytorch_profile

            return pytorch_profile.profile(lambda: self.predictor.run(feed), RUNS)
        self.predictor.close()
        if self.predictor.backend == "openvino":
            from meta_deploy.report import openvino_profile

            return openvino_profile.profile(*read_parts(self.bundle), feed, self._threads, RUNS)
        from meta_deploy.report.profile import profile

        return profile(read_model(self.bundle), feed, session_options(self._threads), self._scratch, RUNS)

    def pass_profiles(self) -> tuple[PassProfile, ...]:
        """Where the time goes before and after each graph pass, on the first image, on ONNX Runtime.

        Raises:
            BackendError: it is a bundle, which holds the graph after the last one alone.
        """
        if self.kind == "bundle":
            raise BackendError("a bundle holds its last graph alone; name its checkpoint or .onnx file")
        from meta_deploy.report.pass_profile import by_pass

        feed = self._feed or self._input(0)
        graph = _source(self._path).graph
        return by_pass(graph, feed, lambda: session_options(self._threads), self._scratch)

    def _input(self, index: int) -> dict[str, np.ndarray]:
        """Image `index`, counted around, as often as the model takes at least."""
        spec = self.bundle.input
        picture, count = self.predictor.read(self._images[index % len(self._images)]), spec.batch.min
        preprocess = Preprocessor(spec, self.bundle.preprocess)
        batch, _ = preprocess([picture.pixels] * count, [picture.size] * count)
        return {spec.name: batch}


def about_bundle(bundle: Bundle) -> dict[str, Any]:
    """Fields of `schema.Entry` that a bundle tells without being run."""
    manifest = bundle.manifest
    return {
        "model": bundle.model_name,
        "task": bundle.task,
        "precision": bundle.precision,
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
        "passes": manifest.passes,
    }


def peak_memory_mb() -> float | None:
    """The most memory that this process has held so far, in MB; None where the system does not tell.

    On Linux not by getrusage, which after fork and exec begins with what the parent held.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    )


def random_feed(bundle: Bundle) -> dict[str, np.ndarray]:
    """Seeded inputs of the usual shapes for a bundle that takes arrays: normal numbers, integers 0 and 1."""
    assert isinstance(bundle.manifest, RawManifest)
    generator = np.random.default_rng(0)
    feed = {}
    for given in bundle.manifest.inputs:
        dtype = np.dtype(given.dtype)
        whole = dtype.kind in "iub"
        values = generator.integers(0, 2, given.opt) if whole else generator.standard_normal(given.opt)
        feed[given.name] = np.asarray(values).astype(dtype)
    return feed


# --- opening ------------------------------------------------------------------------------------------------


def _gauge(path: str) -> Gauge | None:
    """The engine of a bundle for TensorRT, timed on the GPU; None for other bundles."""
    bundle = Bundle.open(path)
    if not isinstance(bundle.engine, TensorRTEngine):
        return None
    from meta_deploy.report.gpu import Gauge

    return Gauge(bundle)


def _open_bundle(path: str, backend: str, threads: int, scratch: Path) -> Predictor:
    return Predictor(path, backend, 0.0, threads)


def _source(path: str) -> Source:
    """A checkpoint or an .onnx file, as an export opens it."""
    from meta_deploy.export.options import Options
    from meta_deploy.export.sources import open_source

    return open_source(path, Options(check=False), lambda note: None)


def _open_onnx(path: str, backend: str, threads: int, scratch: Path) -> Predictor:
    """An ONNX file as the bundle that an export without passes would make of it."""
    from meta_deploy.export.sources.source import output_specs

    source = _source(path)
    graph = source.graph("native")
    manifest = source.manifest(target="onnxruntime", precision="fp32", outputs=output_specs(graph, {}))
    bundle = write_bundle(scratch / "bundle", manifest, {MODEL: graph.SerializeToString()})
    return Predictor(bundle, backend, 0.0, threads)


def _open_checkpoint(path: str, backend: str, threads: int, scratch: Path) -> Predictor:
    if backend not in ("auto", PYTORCH):
        raise BackendError(f"'{path}' is a checkpoint, which only PyTorch runs, not {backend}")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"PyTorch cannot be imported ({error}); pip install meta-deploy[export]"
        ) from error
    from meta_deploy.export.sources.checkpoint import CheckpointSource

    source = _source(path)
    assert isinstance(source, CheckpointSource)
    outputs = tuple(TensorSpec(name=name, dtype="float32", shape=()) for name in source.outputs)
    manifest = source.manifest(target=PYTORCH, precision="fp32", outputs=outputs)
    assert not isinstance(manifest, RawManifest)
    any_batch = replace(manifest.input, batch=BatchRange(min=1, opt=1, max=_MOST_IMAGES))
    manifest = replace(manifest, input=any_batch)
    return Predictor(Bundle(Path(path), manifest), PyTorchBackend(source.loaded.model, threads), 0.0)


_OPEN: Mapping[str, Callable[[str, str, int, Path], Predictor]] = {
    "bundle": _open_bundle,
    "onnx": _open_onnx,
    "checkpoint": _open_checkpoint,
}


class PyTorchBackend(Backend):
    """A model of ours as PyTorch runs it, eagerly and in float32."""

    name = PYTORCH

    def __init__(self, model: Any, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._model = model.eval()
        self.runs_on = f"PyTorch {torch.__version__} on the CPU, eager, in float32"

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        (images,) = inputs.values()
        with torch.inference_mode():
            outputs = self._model(torch.from_numpy(images))
        return {name: value.numpy() for name, value in outputs.items()}

    def close(self) -> None:
        self._model = None
