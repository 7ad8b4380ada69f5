"""The models that a bundle becomes in Triton, and the config.pbtxt of each.

Knows manifests and Triton's settings; must not write anything.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import InputSpec, RawManifest
from meta_deploy.errors import BundleError, InputError
from meta_deploy.targets import TARGETS, get_target
from meta_deploy.targets.target import TritonBackend
from meta_deploy.triton.outputs import IMAGE, Tensor, answers_of, sizes

LABELS = "labels.txt"
_HEADER = """\
# Written by meta-export, once: later versions leave this file as it is, so that it may be edited.
# What a version is made of stands in its manifest.json.
"""
_NETWORK_HEADER = "# The graph. It is a bundle: meta-infer --model runs any version's folder.\n"
_PIPELINE_HEADER = """\
# An encoded image to what is found in it, in its own pixels. Runs {network}, and needs the
# package meta-deploy in the server's Python.
"""
_BATCHING = """\
# Requests that wait are run together. Longer waits for larger batches: max_queue_delay_microseconds.
dynamic_batching { }
"""
_VERSIONS = """\
# A version of {pipeline} runs the same version of this model. Two are served, so that the older one answers
# until the newer one of {pipeline} is loaded.
version_policy { latest { num_versions: 2 } }
"""
_PARAMETERS = """\
# {options} may be set here too, as for meta_deploy.Predictor.
parameters { key: "network" value { string_value: {network} } }
"""
_PROCESSES = """\
# Each instance is a process that decodes and finishes one image at a time.
instance_group [ { count: 2 kind: KIND_CPU } ]
"""
OPTIONS = ("score_threshold", "depth", "tile", "tile_overlap", "slide")  # of `Predictor`, as parameters


@dataclass(frozen=True)
class Model:
    """A model of Triton's: a folder with its `config`, maybe labels, and versions.

    `runs` is the name of the model that it runs; None: it is the graph.
    """

    name: str
    config: str
    labels: str | None = None
    runs: str | None = None


def models_of(bundle: Bundle, name: str) -> tuple[Model, ...]:
    """What a bundle becomes, each after what it runs: the graph, and where it takes images the Python model.

    Raises:
        InputError: Triton has no backend for the bundle's target, or no such tensors.
    """
    backend = backend_of(bundle.target)
    if not bundle.takes_images:
        return (Model(name, _network(bundle, name, backend)),)
    network = f"{name}-network"
    versions = _VERSIONS.replace("{pipeline}", name)
    labels = "".join(f"{line}\n" for line in bundle.classes) or None
    return (
        Model(network, _network(bundle, network, backend) + versions),
        Model(name, _pipeline(bundle, name, network), labels, network),
    )


def backend_of(target: str) -> TritonBackend:
    """What runs a target's bundles in Triton. Raises InputError: nothing does."""
    known = get_target(target)
    if known.triton is None:
        others = " or ".join(other.name for other in TARGETS.values() if other.triton)
        raise InputError(f"Triton has no backend that runs {known.title}'s engines; use --target {others}")
    return known.triton


def _network(bundle: Bundle, name: str, backend: TritonBackend) -> str:
    inputs, outputs = _tensors(bundle)
    most = _largest_batch(bundle, backend, outputs)
    if most:  # the batch is not among the sizes then
        inputs, outputs = ([Tensor(t.name, t.dtype, t.dims[1:]) for t in side] for side in (inputs, outputs))
    platform = 'platform: "tensorrt_plan"\n' if backend.name == "tensorrt" else ""
    return "".join(
        [
            _NETWORK_HEADER,
            _HEADER,
            f"name: {_quoted(name)}\n{platform}backend: {_quoted(backend.name)}\n",
            f"default_model_filename: {_quoted(backend.file)}\nmax_batch_size: {most}\n",
            _listed("input", inputs, batched=bool(most)),
            _listed("output", outputs, batched=bool(most)),
            f"instance_group [ {{ count: 1 kind: {backend.kind} }} ]\n",
            _BATCHING if most else "",
        ]
    )


def _pipeline(bundle: Bundle, name: str, network: str) -> str:
    answers = answers_of(bundle.manifest)
    *most, last = OPTIONS
    parameters = _PARAMETERS.replace("{options}", f"{', '.join(most)} and {last}")
    return "".join(
        [
            _PIPELINE_HEADER.replace("{network}", network),
            _HEADER,
            f'name: {_quoted(name)}\nbackend: "python"\nmax_batch_size: 0\n',
            _listed("input", [Tensor(IMAGE, "bytes", (1,))]),
            _listed(
                "output",
                [answer.tensor for answer in answers],
                labels={answer.tensor.name for answer in answers if answer.labels},
            ),
            _PROCESSES,
            parameters.replace("{network}", _quoted(network)),
        ]
    )


def _tensors(bundle: Bundle) -> tuple[list[Tensor], list[Tensor]]:
    """The graph's inputs and outputs, the batch among their sizes."""
    manifest = bundle.manifest
    if isinstance(manifest, RawManifest):
        inputs = [Tensor(given.name, given.dtype, sizes(given.shape)) for given in manifest.inputs]
    else:
        inputs = [Tensor(manifest.input.name, manifest.input.dtype, _image_sizes(manifest.input))]
    shown = [output for output in manifest.outputs if output.name in manifest.output_names]
    return inputs, [Tensor(output.name, output.dtype, sizes(output.shape)) for output in shown]


def _image_sizes(spec: InputSpec) -> tuple[int, ...]:
    ends = zip(spec.profile.min, spec.profile.max, strict=True)
    return tuple(least if least == most else -1 for least, most in ends)


def _largest_batch(bundle: Bundle, backend: TritonBackend, outputs: Sequence[Tensor]) -> int:
    """Triton's max_batch_size: the most images that it may run together; 0: it is not to.

    Of a raw graph it is not known which outputs have the batch.
    """
    if bundle.task == "raw" or not backend.batches or bundle.input.static_batch:
        return 0
    if fixed := [output.name for output in outputs if output.dims[:1] != (-1,)]:
        raise BundleError(
            f"the manifest of bundle '{bundle.path}' gives '{fixed[0]}' no batch; export it again"
        )
    return bundle.input.batch.max


def _listed(side: str, tensors: Iterable[Tensor], batched: bool = False, labels: Collection[str] = ()) -> str:
    entries = [_entry(tensor, batched, tensor.name in labels) for tensor in tensors]
    return f"{side} [\n" + ",\n".join(entries) + "\n]\n"


def _entry(tensor: Tensor, batched: bool, labels: bool) -> str:
    if (not tensor.dims and not batched) or 0 in tensor.dims:
        shape = "no dimensions" if not tensor.dims else "a dimension of 0"
        raise InputError(f"'{tensor.name}' has {shape}, which Triton's tensors cannot have; change the graph")
    lines = [
        f"    name: {_quoted(tensor.name)}",
        f"    data_type: {tensor.triton_type}",
        # One number an image: (B,) is (B, 1) for Triton's clients.
        f"    dims: [ {', '.join(map(str, tensor.dims or (1,)))} ]",
        *([] if tensor.dims else ["    reshape { shape: [ ] }"]),
        *([f"    label_filename: {_quoted(LABELS)}"] if labels else []),
    ]
    return "  {\n" + "\n".join(lines) + "\n  }"


def _quoted(text: str) -> str:
    """A string of protobuf's text format, which has JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)
