"""Graphs in 8 bits against the same in float32, for the search: run as they ship, compared by the task."""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec import to_builtins

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.calib.costs import Trial, Verdict
from meta_deploy.cpus import cpu_count
from meta_deploy.errors import InputError
from meta_deploy.export.samples import ImageSamples, Samples
from meta_deploy.export.sources.source import Source
from meta_deploy.export.speed import opened
from meta_deploy.export.trace import drop_outputs
from meta_deploy.export.verify import OnnxRun, Run, WithStages
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.targets.target import BuildOptions, Built, Target
from meta_deploy.tasks.accuracy import Pixels, coco_ap
from meta_deploy.tasks.annotations import Annotations, CocoAnnotations, LabelImages

JUDGED, QUICK = 4, 2  # runs that a whole graph is judged on, and that the error of a group is measured on
ANNOTATED = 64  # images that a whole graph is judged on where they are annotated
_TRUTHS = {
    "detection": (CocoAnnotations, "a COCO file"),
    "instance-segmentation": (CocoAnnotations, "a COCO file"),
    "semantic-segmentation": (LabelImages, "a folder of label images"),
}
_RESULTS = ("detections", "pixels")  # stages that users see; of other graphs all stages are


class OutputsTrial(Trial):
    """Judges by outputs: the drop is 100 points less what agrees of the results.

    Of detections and pixels the share that both have counts, and of arrays what the norm of the difference
    leaves.
    """

    def __init__(
        self,
        source: Source,
        target: Target,
        samples: Samples,
        tolerance: Mapping[str, float],
        options: BuildOptions,
    ) -> None:
        self.source, self.target, self.tolerance, self.options = source, target, tolerance, options
        self.rest = target.rest(options.precision)
        self.feeds = [feed for _, feed in zip(range(JUDGED), samples, strict=False)]
        self.feed = self.feeds[0]
        what = target.name, str(options), self.rest, str(sorted(tolerance.items()))
        self.facts = [*samples.digests()[:JUDGED], *what, *_machine()]

    def begin(self, proto: onnx.ModelProto) -> None:
        self.full = proto

    def expect(self, proto: onnx.ModelProto) -> None:
        run = OnnxRun(proto)
        self._expected = [run(feed) for feed in self.feeds]

    def baseline(self) -> Run:
        return self._opened(self.full, self.rest)

    def price(self, proto: onnx.ModelProto) -> dict[str, Any]:
        return to_builtins(self.target.estimate(self._built(proto)))

    def engine(self, proto: onnx.ModelProto) -> tuple[dict[str, Any], Run | None]:
        built = self._built(of_shapes(self._ships(proto), self.feed))
        run = self.target.runner(built, self.source.profiles, self.options.precision)
        return to_builtins(self.target.estimate(built)), run

    def open(self, proto: onnx.ModelProto) -> Run:
        return self._opened(proto, "int8")

    def quick(self, proto: onnx.ModelProto) -> float:
        return self._verdict(self._simulated(proto), QUICK).error

    def judge(self, proto: onnx.ModelProto) -> Verdict:
        return self._verdict(self._with_stages(proto), JUDGED)

    def _with_stages(self, proto: onnx.ModelProto) -> Run:
        """A whole graph as it runs, its stages beside it."""
        whole = self._simulated(proto)
        shipped = whole if self.target.estimates else self.open(proto)
        return whole if isinstance(shipped, OnnxRun) else WithStages(shipped, whole)

    def _opened(self, proto: onnx.ModelProto, precision: str) -> Run:
        return opened(self.target, self._ships(proto), self.source.profiles, precision)

    def _built(self, proto: onnx.ModelProto) -> Built:
        """Of a graph of known shapes, with the rest in its precision."""
        float32_operators = self.target.float32_operators.get(self.rest, ())
        lowered, _ = PRECISIONS[self.rest].convert(proto, (), float32_operators)
        return self.target.build(lowered.SerializeToString(), (), self.options)

    def _simulated(self, proto: onnx.ModelProto) -> OnnxRun:
        """A graph for its numbers; for a library that is not ONNX Runtime, as it is written."""
        return OnnxRun(proto, literally=self.target.estimates)

    def _ships(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        """A graph without the stages, where it is a whole one."""
        return drop_outputs(proto, self.source.outputs) if self._is_whole(proto) else proto

    def _is_whole(self, proto: onnx.ModelProto) -> bool:
        return {output.name for output in proto.graph.output} >= set(self.source.outputs)

    def _verdict(self, run: Run, count: int) -> Verdict:
        comparison = self.source.comparison(self.tolerance)
        for feed, expected in zip(self.feeds[:count], self._expected, strict=False):
            comparison.add(expected, run(feed))
        stages = comparison.stages()
        return Verdict(100 * lost(stages), max((used(stage) for stage in stages.values()), default=0.0))


class AnnotatedTrial(OutputsTrial):
    """Judges by annotations: the drop is what average precision, or the mean IoU, loses, in points.

    Of boxes and masks the larger loss counts. Each image is run as a whole, in float32 and in 8 bits alike.
    """

    def __init__(
        self,
        source: Source,
        target: Target,
        samples: ImageSamples,
        tolerance: Mapping[str, float],
        options: BuildOptions,
        bundle: Bundle,
        truth: Annotations,
    ) -> None:
        """`samples` are the annotated images; `bundle` says how outputs become results.

        Raises:
            InputError: the annotations are not of this kind of model.
        """
        super().__init__(source, target, samples, tolerance, options)
        wanted, what = _TRUTHS.get(source.task.name, (None, ""))
        if wanted is None:
            raise InputError(f"--annotations are for detections and class maps; '{source.name}' has neither")
        if not isinstance(truth, wanted):
            raise InputError(f"'{truth.path}' does not fit '{source.name}', which needs {what}")
        self.samples, self.bundle, self.truth = samples, bundle, truth
        self.facts = [*self.facts, *samples.digests(), truth.digest(samples.names())]

    def expect(self, proto: onnx.ModelProto) -> None:
        super().expect(proto)
        self._best = self._points(self._opened(proto, "fp32"))

    def judge(self, proto: onnx.ModelProto) -> Verdict:
        run = self._with_stages(proto)
        points = self._points(run)
        drop = max(best - points[name] for name, best in self._best.items())
        return Verdict(drop, self._verdict(run, JUDGED).error)

    def _points(self, run: Run) -> dict[str, float]:
        """What a graph scores, of 100."""
        found: dict[Path, Any] = {}
        for feed, images in self.samples.placed():
            outputs, (batch,) = run(feed), feed.values()
            for index, (path, placement) in enumerate(images):
                found[path] = self.source.task.decode(
                    self.bundle, outputs, index, placement, batch.shape[2:4], 0.0
                )
        return _points(found, self.truth)


def _points(found: Mapping[Path, Any], truth: Annotations) -> dict[str, float]:
    """What results of images, by their files, score.

    Raises:
        InputError: nothing of these images is annotated, or not in their size.
    """
    if isinstance(truth, CocoAnnotations):
        records = [
            record
            for path, result in found.items()
            for record in result.to_coco(truth.ids[path.name], truth.category_ids(result.classes))
        ]
        figures = coco_ap(truth.part([str(path) for path in found]), records)
        if not any("segmentation" in record for record in records):
            figures.pop("mask", None)
        scores = {kind: float(figure["AP"]) for kind, figure in figures.items()}
    else:
        assert isinstance(truth, LabelImages)
        pixels = Pixels()
        for path, result in found.items():
            labels = truth.labels(str(path))
            if labels.shape != result.size:
                raise InputError(f"the labels of '{path}' are {labels.shape}, and the image is {result.size}")
            pixels.add_labels(labels, result.labels)
        scores = {"mean IoU": pixels.mean_iou}
    if any(math.isnan(score) for score in scores.values()):
        raise InputError(f"'{truth.path}' has nothing of the model's classes on these images")
    return {name: 100 * score for name, score in scores.items()}


def of_shapes(proto: onnx.ModelProto, feed: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A copy of a graph for inputs of the shapes that these have, as bytes of an open one are not known."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.value_info[:]
    for output in copy.graph.output:
        output.type.tensor_type.ClearField("shape")
    for given in copy.graph.input:
        sizes = zip(given.type.tensor_type.shape.dim, feed[given.name].shape, strict=True)
        for dim, size in sizes:
            dim.dim_value = size
    return copy


def lost(stages: Mapping[str, Mapping[str, Any]]) -> float:
    """The share of results that does not agree."""
    results = [stages[name] for name in _RESULTS if name in stages] or list(stages.values())
    shares = [1 - s["agreement"] if "agreement" in s else s["rms_relative_error"] for s in results]
    return max(shares, default=0.0)


def used(stage: Mapping[str, Any]) -> float:
    """Of a stage's figures, the largest share that one takes of its tolerance."""
    shares = []
    for name, limit in stage["tolerance"].items():
        largest_is_best = name == "agreement" or name.endswith("_iou")
        off, room = (1 - stage[name], 1 - limit) if largest_is_best else (stage[name], limit)
        shares.append(off / max(room, 1e-12))
    return float(max(shares))


def _machine() -> list[str]:
    """What times depend on."""
    found = [platform.node(), platform.machine(), str(cpu_count())]
    for package in ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return found
