"""A checkpoint as the source of an export: its PyTorch model is traced, and compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from meta_deploy.bundle.manifest import (
    BatchRange,
    Edges,
    Fit,
    InputSpec,
    ModelInfo,
    Preprocess,
    SizeRange,
)
from meta_deploy.cpus import limited_threads
from meta_deploy.errors import CheckpointError, InputError
from meta_deploy.export.options import Options, check_size
from meta_deploy.export.samples import ImageSamples, Samples
from meta_deploy.export.sources.source import Source
from meta_deploy.export.trace import export_onnx
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.registry import backbone_of, config_to_dict
from meta_deploy.tasks import get_task

DIVISOR = 32  # every model here takes sizes that are multiples of this


class CheckpointSource(Source):
    """A checkpoint of one of our models; or the file of a ViT alone, and a random model around it."""

    traced = True

    def __init__(self, path: str | Path, options: Options, note: Callable[[str], None]) -> None:
        self.original, self.reference = "PyTorch", f"PyTorch {torch.__version__} float32"
        if threads := limited_threads():
            torch.set_num_threads(threads)
        # Refused now rather than after loading.
        input_spec(options.input_size or (DIVISOR, DIVISOR), options)
        vit = options.backbone_ckpt
        checkpoint = None if vit is not None and Path(path) == Path(vit) else path
        self.loaded = load_model(checkpoint, options.model, options.allow_partial, note, vit)
        self.config = self.loaded.config
        if options.dynamic_size and backbone_of(self.config).fixed_size:
            raise InputError(f"{self.config.name} is exported for one size; leave out --dynamic-size")
        self.name = self.config.name
        self.spec = input_spec(options.input_size or self.config.input_size, options)
        self.preprocess = preprocess_rules(self.config, self.spec)
        self.profiles = [self.spec.profile]
        self.static = self.spec.static_size
        self.task = get_task(self.config.task)
        self.outputs = list(self.task.outputs)
        self.classes = tuple(self.loaded.class_names)
        self.score_threshold = getattr(self.config, "score_threshold", 0.0)
        self.shown_score = getattr(self.config, "shown_score", None)
        self.parameters = sum(parameter.numel() for parameter in self.loaded.model.parameters())

    def describe(self) -> str:
        return f"{self.name}, {self.parameters:,} parameters, {describe(self.spec)}"

    def graph(self, operators: str) -> onnx.ModelProto:
        return export_onnx(self.loaded.model, self.spec, operators)

    def samples(self, paths: Sequence[Path]) -> Samples:
        if arrays := [path for path in paths if path.suffix == ".npz"]:
            raise InputError(
                f"'{arrays[0]}' is not an image, which a checkpoint is compared on; leave it out"
            )
        return ImageSamples(paths, self.spec, self.preprocess)

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        backbone = self.loaded.model.get_submodule("backbone")
        with backbone.register_forward_hook(_check_finite), torch.inference_mode():
            outputs = self.loaded.model(torch.from_numpy(feed[self.spec.name]), stages=True)
        return {name: value.numpy() for name, value in outputs.items()}

    def facts(self) -> dict[str, Any]:
        return {
            "model": ModelInfo(name=self.name, config=config_to_dict(self.config)),
            "input": self.spec,
            "preprocess": self.preprocess,
            "tile": self.config.tile,
        }


def _check_finite(backbone: object, inputs: object, maps: list[torch.Tensor]) -> None:
    if not all(bool(m.isfinite().all()) for m in maps):
        raise CheckpointError(
            "the checkpoint's own features are not finite on these images; "
            "its weights are damaged or its training diverged: take an earlier one"
        )


def input_spec(input_size: Sequence[int], options: Options) -> InputSpec:
    """The input's dimensions from what the user asked for.

    Raises:
        InputError: a size that is not a multiple of 32, a batch range that does not rise.
    """
    height, width = input_size
    low, opt, high = options.batches()
    check_size(input_size, DIVISOR, high, options.dynamic_size)
    largest = max(height, width)
    fixed = SizeRange(min=(height, width), opt=(height, width), max=(height, width))
    free = SizeRange(min=(DIVISOR, DIVISOR), opt=(height, width), max=(largest, largest))
    return InputSpec(
        name="images",
        batch=BatchRange(min=low, opt=opt, max=high),
        size=free if options.dynamic_size else fixed,
        divisor=DIVISOR,
    )


def preprocess_rules(config: Any, spec: InputSpec) -> Preprocess:
    """Fit a static input; in a dynamic one keep to its edges, either way up."""
    height, width = spec.size.opt
    resize = (
        Fit(size=(height, width))
        if spec.static_size
        else Edges(long=max(height, width), short=min(height, width))
    )
    return Preprocess(resize=resize, mean=tuple(config.mean), std=tuple(config.std))


def describe(spec: InputSpec) -> str:
    """The input's dimensions in words."""
    batch = f"batch {spec.batch.opt}" if spec.static_batch else f"batch {spec.batch.min} to {spec.batch.max}"
    if spec.static_size:
        return f"input {spec.size.opt[0]}x{spec.size.opt[1]}, {batch}"
    return f"input up to {spec.size.max[0]}x{spec.size.max[1]} in steps of {spec.divisor}, {batch}"
