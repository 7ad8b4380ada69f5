"""What is exported: it gives the graph, the original to compare with, and facts for the manifest."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from meta_deploy.bundle.manifest import MANIFESTS, Manifest, Profile, TensorSpec, Thresholds
from meta_deploy.errors import InputError
from meta_deploy.export.onnx_reader import numpy_name
from meta_deploy.export.samples import Samples
from meta_deploy.tasks.comparison import Comparison
from meta_deploy.tasks.task import Task

CLASS_NAMES = "meta_deploy.classes"  # of the metadata that a graph ships with, in JSON


class Source(ABC):
    """A model to export.

    Attributes:
        name: the model's.
        task: what it is for.
        original: what is compared with, in a word or two, such as "PyTorch".
        reference: the same with its version.
        parameters: how many numbers the model has learned.
        outputs: of the graph that ships, in order.
        profiles: the least, usual and largest shape of each input.
        static: whether all sizes but the batch are fixed.
        classes: their names; None for a raw graph.
        score_threshold: where a detector cuts its list of detections off.
        shown_score: the least score of its detections that are shown; None: as in all bundles.
        traced: whether `graph` takes time, being traced from PyTorch.
    """

    name: str
    task: Task
    original: str
    reference: str
    parameters: int
    outputs: list[str]
    profiles: Sequence[Profile]
    static: bool
    classes: tuple[str, ...] | None = None
    score_threshold: float = 0.0
    shown_score: float | None = None
    traced: bool = False

    @abstractmethod
    def describe(self) -> str:
        """Name and input in one line."""

    @abstractmethod
    def graph(self, operators: str) -> onnx.ModelProto:
        """The literal graph: the outputs that ship, then stages on the way to them where there are any.

        Args:
            operators: "native" or "lowered", how NMS, RoIAlign and sampling are written where that is open.
        """

    @abstractmethod
    def samples(self, paths: Sequence[Path]) -> Samples:
        """Inputs to measure and compare on, from images or .npz files."""

    @abstractmethod
    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The original's outputs, stages included, by name.

        Raises:
            InputError: it does not run, or its own results are not finite.
        """

    def comparison(self, tolerance: Mapping[str, float]) -> Comparison:
        """What compares both sides' outputs."""
        return self.task.comparison(tolerance, self.score_threshold)

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Fields of the manifest that only this source knows: model, inputs, preprocessing."""

    def check_sound(self) -> None:
        """Look again at an original that nobody has run yet, after its graph could not be dealt with.

        Raises:
            InputError: it is itself at fault.
        """
        return

    def manifest(self, **common: Any) -> Manifest:
        """The manifest: `common` fields, and this source's."""
        fields = {"parameters": self.parameters, **self.facts(), **common}
        if self.classes is not None:
            fields["classes"] = self.classes
        if "thresholds" in MANIFESTS[self.task.name].__struct_fields__:
            shown = {} if self.shown_score is None else {"shown": self.shown_score}
            fields["thresholds"] = Thresholds(score=self.score_threshold, **shown)
        return MANIFESTS[self.task.name](**fields)

    def metadata(self) -> dict[str, str]:
        """What the graph that ships says of itself, so that it can be exported again."""
        return {} if self.classes is None else {CLASS_NAMES: json.dumps(list(self.classes))}


def output_specs(
    proto: onnx.ModelProto, seen: Mapping[str, Sequence[tuple[int, ...]]]
) -> tuple[TensorSpec, ...]:
    """A graph's outputs as a manifest lists them.

    What the graph says of a size and what came out is not always the same: then the size is "?".

    Args:
        proto: the graph that ships.
        seen: output -> the shapes that it had on the samples.

    Raises:
        InputError: an output's rank changes.
    """
    specs = []
    for output in proto.graph.output:
        tensor = output.type.tensor_type
        shapes = seen.get(output.name, [])
        if len({len(shape) for shape in shapes}) > 1:
            raise InputError(f"output '{output.name}' has shapes {shapes}: a changing rank is not supported")
        sizes: list[int | str] = [_size(dim) for dim in tensor.shape.dim]
        for shape in shapes:
            if len(shape) != len(sizes):
                sizes = ["?"] * len(shape)
            pairs = zip(sizes, shape, strict=True)
            sizes = ["?" if isinstance(size, int) and size != found else size for size, found in pairs]
        dtype = numpy_name(tensor.elem_type)
        specs.append(TensorSpec(name=output.name, dtype=dtype, shape=tuple(sizes)))
    return tuple(specs)


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    if dim.WhichOneof("value") == "dim_value" and dim.dim_value >= 0:
        return dim.dim_value
    return dim.dim_param or "?"
