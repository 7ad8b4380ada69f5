"""What a target is, and what runs its bundles: each is one object that says everything about itself.

Knows the questions that the export and the runtime ask; must not know any library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import Struct

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import Engine, Profile, RawManifest
from meta_deploy.errors import BackendError, InputError
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.graph.prices import Cost

MODEL = "model.onnx"
Arrays = Mapping[str, np.ndarray]
Runner = Callable[[Arrays], dict[str, np.ndarray]]


@dataclass(frozen=True)
class BuildOptions:
    """What a build may be told. A target's `check` refuses what it does not take.

    Attributes:
        precision: of the target's `precisions`.
        gpus: compute capabilities, such as ("8.6",); none: all that the library knows.
        workspace_mb: scratch memory that a layer may use, in MB; None: the library's own limit.
        attention: how many attentions the graph has, for the engine's section.
    """

    precision: str = "fp32"
    gpus: tuple[str, ...] = ()
    workspace_mb: int | None = None
    attention: int = 0


@dataclass(frozen=True)
class Built:
    """The files of a bundle, by name, and its manifest's `engine` section (None without one)."""

    files: dict[str, bytes]
    engine: Engine | None = None


@dataclass(frozen=True)
class TritonBackend:
    """How NVIDIA Triton runs the bundles of a target.

    Attributes:
        name: of Triton's backend.
        file: of the bundle, that it loads.
        kind: of its instances, as in config.pbtxt.
        batches: it takes several requests as one batch, of any size up to the model's.
    """

    name: str
    file: str
    kind: str
    batches: bool = True


class Estimate(Struct, frozen=True, kw_only=True):
    """What a graph costs as an engine that was built and not run.

    Attributes:
        ms: by the target's prices for layers, bytes and multiply-adds.
        layers: kernels that are started.
        fused_attention: of them, those that are a whole attention.
        eight_bits: products in int8 or fp8.
        activation_mb, weights_mb: memory.
    """

    ms: float
    layers: int
    fused_attention: int
    eight_bits: int
    activation_mb: float | None
    weights_mb: float | None


class Backend(ABC):
    """An opened model. A context manager; `run` may be called from several threads at once.

    Attributes:
        name: what it was opened as, such as onnxruntime.
        runs_on: library, version, device and precision, for people.
        note: why `auto` did not take a better one; empty if it is the best or was asked for.
    """

    name: str
    runs_on: str
    note: str = ""

    @abstractmethod
    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run the model on arrays by name; its outputs by name.

        Raises:
            BackendError: an input is absent or does not fit, the model fails, or the back end is closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the model; after that `run` raises BackendError. Closing twice is fine."""

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Target(ABC):
    """What a bundle is made for: how its graph is prepared, what is built of it, and what opens it.

    Attributes:
        name: as in `--target` and the manifest.
        title: as people call it.
        passes: graph passes in the order in which they run (keys of `graph.pipeline.PASSES`).
        required_passes: those of them that run even with `--passes none`.
        doubtful: those of them that do not pay on every model: an export that tunes tries without each.
        hiding: those of them that put products into operators that are not quantized: not run for 8 bits.
        prices: of the machine, by which passes choose between forms.
        operators: forms of NMS, RoIAlign and sampling that it runs (keys of `export.operators.TRANSLATIONS`),
            the one that is taken unless asked otherwise first.
        precisions: that are written for it.
        lowered_by_build: those of them that `build` makes out of a float32 graph. The others are in the graph
            when it comes to `build`.
        float32_operators: precision -> operators that it has no kernels for in that precision.
        eight_bits: of those precisions that are 8 bits, where it wants them.
        rounds_each_operator: its kernels round to the graph's precision where a CPU may carry on in float32;
            such a graph is verified with the rounding written out.
        compacts: it folds constants when it opens the graph, so that the file may hold them in fewer bytes.
        builds: what ships is more than the graph, and making it takes time.
        estimates: what is built need not run on the exporting machine; where it does not (`runner`),
            `estimate` and `figures` say what it costs.
        bounded: what is built reserves memory for the largest input, so that every size needs an upper end.
        backends: what `--backend` can name for its bundles.
        automatic: those of them that `--backend auto` tries, the best first.
        gpu_only: precisions that only a GPU runs.
        triton: what runs its bundles in NVIDIA Triton; None: nothing there does.
        last_resort: what is said where `auto` comes to the last of several.
    """

    name: str
    title: str
    passes: tuple[str, ...]
    required_passes: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()
    hiding: tuple[str, ...] = ()
    prices: Cost
    operators: tuple[str, ...]
    precisions: tuple[str, ...]
    lowered_by_build: tuple[str, ...] = ()
    float32_operators: Mapping[str, tuple[str, ...]] = {}
    eight_bits: Mapping[str, EightBitRules] = {}
    rounds_each_operator: bool = False
    compacts: bool = False
    builds: bool = False
    estimates: bool = False
    bounded: bool = False
    backends: tuple[str, ...]
    automatic: tuple[str, ...]
    gpu_only: tuple[str, ...] = ()
    triton: TritonBackend | None = None
    last_resort: str = ""

    def offer(self) -> tuple[bool, str]:
        """Whether `--target auto` takes it on this machine, and why, or why not (empty: nothing to say)."""
        return False, ""

    def check(self, options: BuildOptions) -> None:
        """Refuse what cannot be built, or cannot be built here, before long work.

        Raises:
            InputError: an option that this target does not take; a library that is not installed.
        """
        if options.gpus or options.workspace_mb is not None:
            raise InputError(f"--gpu and --workspace are for TensorRT's engines; the target is {self.name}")

    def build(
        self,
        model: bytes,
        profiles: Sequence[Profile],
        options: BuildOptions,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Built:
        """Make a bundle's files out of an ONNX file's bytes. By default that file is all there is.

        Args:
            model: the final graph.
            profiles: each input's least, usual and largest shape.
            options: what `check` has let through.
            progress: called with (steps done, steps in all).

        Raises:
            EngineError: the library refuses the graph.
        """
        return Built({MODEL: model})

    def estimate(self, built: Built) -> Estimate:
        """What was built of a graph of known shapes costs; where the target `estimates`.

        Raises:
            InputError: the library does not tell what it built.
        """
        raise NotImplementedError(f"{self.name} estimates nothing")

    def runner(self, built: Built, profiles: Sequence[Profile], precision: str) -> Runner | None:
        """What runs what `build` made, so that verification compares what ships.

        None: what was built does not run on the exporting machine, or is the graph itself; the export then
        compares the graph on ONNX Runtime.
        """
        return None

    def rest(self, precision: str) -> str:
        """The precision of what 8 bits leave, and of the bundle where they are not worth it.

        Others are their own.
        """
        rules = self.eight_bits.get(precision)
        return rules.rest if rules else precision

    def figures(self, section: Engine | None) -> dict[str, Any]:
        """Fields of `TriedPipeline` from the manifest's `engine` section, where the target `estimates`."""
        return {}

    def describe(self, section: Engine) -> str:
        """What was built, in one line, from the manifest's `engine` section."""
        raise NotImplementedError(f"{self.name} builds nothing")

    @abstractmethod
    def open(self, bundle: Bundle, backend: str, threads: int | None) -> Backend:
        """Open a bundle of this target on a back end of `backends`. `threads` is for the CPU.

        Raises:
            BackendError: not installed, not able to run here, or not what the bundle was made for.
            BundleError: a file is missing or altered.
        """

    def rebuild(self, bundle: Bundle, log: Callable[[str], None] = lambda line: None) -> None:
        """Build again, for this machine, what was built for another; it goes to the user's cache folder.

        Args:
            bundle: of this target.
            log: called with what is done and why, or that nothing needs to be.

        Raises:
            InputError: this target builds nothing that is bound to a machine, or cannot build here.
        """
        raise InputError(
            f"there is nothing to rebuild: bundle '{bundle.path}' is made for {self.name}; "
            "leave out --rebuild"
        )

    def choose_operators(self, operators: str | None) -> str:
        """How NMS, RoIAlign and sampling are written for it: as asked for, or its own choice.

        Raises:
            InputError: it does not run that form.
        """
        if operators is None:
            return self.operators[0]
        if operators not in self.operators:
            choices = " or ".join(self.operators)
            raise InputError(f"{self.name} does not run {operators} operators; use --operators {choices}")
        return operators


def profiles(bundle: Bundle) -> list[Profile]:
    """The shapes that each input of a bundle's model takes."""
    manifest = bundle.manifest
    inputs = manifest.inputs if isinstance(manifest, RawManifest) else (manifest.input,)
    return [given.profile for given in inputs]


def open_model_file(bundle: Bundle, backend: str, threads: int | None) -> Backend:
    """Open a bundle's model.onnx, which several targets have, on one of the libraries that take such a file.

    Raises:
        BackendError: as `Target.open`, or there is no such back end for it.
        BundleError: the file is missing or altered.
    """
    if backend == "openvino":
        from meta_deploy.targets.openvino import OpenVINOBackend

        return OpenVINOBackend(bundle, threads)
    if backend in ("onnxruntime", "cuda", "tensorrt"):
        from meta_deploy.targets.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, backend, threads)
    raise BackendError(f"bundle '{bundle.path}' does not run on {backend}")
