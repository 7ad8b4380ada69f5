"""An ONNX file as the source of an export: its graph, and the file itself on ONNX Runtime to compare with."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from meta_deploy.bundle.manifest import (
    MAX_CLASSES,
    BatchRange,
    Fit,
    InputSpec,
    ModelInfo,
    Preprocess,
    RawInput,
    SizeRange,
    Stretch,
)
from meta_deploy.errors import InputError, VerificationError
from meta_deploy.export.onnx_reader import numpy_name, read_onnx, tensors_of
from meta_deploy.export.options import Options, check_size
from meta_deploy.export.samples import ArraySamples, ImageSamples, Samples
from meta_deploy.export.shapes import ANY, OpenInput, choose_shapes, open_inputs
from meta_deploy.export.sources.source import CLASS_NAMES, Source
from meta_deploy.export.verify import OnnxRun
from meta_deploy.graph.modules import name_by_module
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.ort import onnxruntime
from meta_deploy.tasks import TASKS, get_task
from meta_deploy.tasks.comparison import Comparison
from meta_deploy.tasks.raw import read_arrays
from meta_deploy.text import escaped

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
UNNAMED_CLASSES = 1000
RANDOM = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    *("Multinomial", "Bernoulli"),
}
MAX_NAME = 200  # characters of a model's name
BATCH_OF_ANY = 8  # the most images per call where the file takes any number


class OnnxSource(Source):
    """An ONNX file. A detector or segmenter with our outputs' names stays one; anything else is raw."""

    def __init__(self, path: Path, options: Options, note: Callable[[str], None]) -> None:
        self.path, self.options = path, options
        self.original = "the original"
        self.reference = f"{escaped(path.name)} on ONNX Runtime {onnxruntime.__version__}, as it is"
        self.name = escaped(path.stem)[:MAX_NAME]
        self.proto = read_onnx(path)
        name_by_module(self.proto.graph.node)
        self._note = note
        if options.check:
            self._original  # noqa: B018  (what ONNX Runtime cannot load is told before anything else)
        inputs = open_inputs(self.proto, path)
        self.task = get_task(_task_of(self.proto, inputs))
        self.inputs = choose_shapes(self.proto, inputs, options, path)
        self.profiles = [given.profile for given in self.inputs]
        self.static = all(given.static_but_batch for given in self.inputs)
        self.outputs = [output.name for output in self.proto.graph.output]
        floats = (t for t in tensors_of(self.proto.graph) if t.data_type in FLOATS)
        self.parameters = sum(int(np.prod(tensor.dims)) for tensor in floats)
        self.image = self._image_input()
        self.preprocess = self._preprocess()
        self.classes = self._class_names() if self.task.name != "raw" else None
        if self.classes is None and options.class_names is not None:
            raise InputError(f"'{path}' is no detector or segmenter; leave out --class-names")
        if self.classes is not None and not options.takes_images:
            note(
                f"its outputs' names make it a model for {self.task.name}, and images are normalized with "
                "ImageNet's mean and standard deviation; for others give --mean, --std and --scale"
            )

    @functools.cached_property
    def _original(self) -> OnnxRun:
        return _open_original(self.proto, self.path)

    def describe(self) -> str:
        shapes = ", ".join(f"{given.name} {given.dtype} {given.shown}" for given in self.inputs)
        return f"{self.name}, {self.parameters:,} parameters, {self.task.name}, input {shapes}"

    def graph(self, operators: str) -> onnx.ModelProto:
        return self.proto

    def samples(self, paths: Sequence[Path]) -> Samples:
        random = {node.op_type for node in self.proto.graph.node} & RANDOM
        if random and self.options.check:
            raise InputError(
                f"'{self.path}' has random operators ({', '.join(sorted(random))}), so that no two runs "
                "agree; use --no-verify"
            )
        arrays = [path for path in paths if path.suffix == ".npz"]
        if arrays:
            samples = ArraySamples(arrays, lambda path: self._checked(read_arrays(path), path))
            for _ in samples:  # what does not fit is told before the long work
                pass
            return samples
        if self.image is not None and self.preprocess is not None:
            return ImageSamples(paths, self.image, self.preprocess)
        if self.options.calib_images is not None:
            raise InputError(
                f"'{self.path}' does not say how an image becomes its input; "
                "give --mean, --std and --scale as it was trained with, or .npz files"
            )
        return Samples(self._random())

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return self._original(feed)
        except VerificationError as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise InputError(
                f"the original '{self.path}' does not run on {shapes}: {_reason(error)}; give shapes "
                "that it takes with --shape, --batch or --input-size, or inputs as .npz with --calib-images"
            ) from error

    def check_sound(self) -> None:
        try:
            OnnxRun(self.proto, literally=True)
        except VerificationError as error:
            raise InputError(f"'{self.path}' is not a sound model: {_reason(error)}; correct it") from error

    def facts(self) -> dict[str, Any]:
        known = {"model": ModelInfo(name=self.name), "preprocess": self.preprocess}
        if self.task.name != "raw":
            return {**known, "input": self.image}
        return {**known, "inputs": tuple(map(_raw_input, self.inputs)), "image": self.image}

    def comparison(self, tolerance: Mapping[str, float]) -> Comparison:
        """A low-precision file rounds in other places after the passes: that precision's tolerance holds."""
        kinds = {tensor.data_type for tensor in tensors_of(self.proto.graph)}
        for name, kind in (("bf16", TensorProto.BFLOAT16), ("fp16", TensorProto.FLOAT16)):
            if kind in kinds and "maps" in tolerance:
                return super().comparison(PRECISIONS[name].tolerances)
        return super().comparison(tolerance)

    # --- inputs ---------------------------------------------------------------------------------------------

    def _checked(self, arrays: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
        """The inputs among an .npz file's arrays, of the types that the graph takes."""
        feed = {}
        for given in self.inputs:
            if given.name not in arrays:
                raise InputError(
                    f"'{path}' has no array '{given.name}', which '{self.path.name}' takes; "
                    f"it has {', '.join(arrays) or 'none'}"
                )
            array = arrays[given.name]
            if array.dtype != given.dtype or not given.takes(array.shape):
                raise InputError(
                    f"'{path}' has {given.name} as {array.dtype} {list(array.shape)}, and '{self.path.name}' "
                    f"takes {given.dtype} {given.shown}"
                )
            feed[given.name] = array
        return feed

    def _random(self) -> list[dict[str, np.ndarray]]:
        """Seeded inputs, two sets; of open sizes a small and a larger, but for what the original refuses."""
        feeds, refusal = [], None
        for which in (0, 1):
            generator = np.random.default_rng(which)
            feed = {given.name: given.random(generator, which) for given in self.inputs}
            try:
                self.run(feed)
            except InputError as error:
                refusal = refusal or error
            else:
                feeds.append(feed)
        if not feeds and refusal is not None:
            raise refusal
        if refusal is not None:
            self._note("the original runs on one of the two trial sizes only; the other is not compared")
        return feeds

    def _image_input(self) -> InputSpec | None:
        """The input that an image goes to; None where the graph takes no images."""
        if self.task.name == "raw" and not self.options.takes_images:
            return None
        images = [given for given in self.inputs if given.is_image]
        if len(images) != 1 or len(self.inputs) != 1:
            raise InputError(
                f"'{self.path}' cannot take images: it has to have one input of float32 (N, 3, H, W), and it "
                f"has {', '.join(f'{i.name} {i.dtype} {i.shown}' for i in self.inputs)}; "
                "leave out --mean, --std, --scale and --bgr"
            )
        (given,) = images
        low, opt, high = given.profile.min, given.profile.opt, given.profile.max
        if ANY in high[2:]:
            raise InputError(f"'{self.path}' takes images of any size; give --input-size H W")
        divisor = 32 if low[2:] != high[2:] else 1
        most = high[0] if high[0] != ANY else BATCH_OF_ANY
        check_size(opt[2:], divisor, most, self.options.dynamic_size)
        return InputSpec(
            name=given.name,
            batch=BatchRange(min=low[0], opt=opt[0], max=most),
            size=SizeRange(min=(low[2], low[3]), opt=(opt[2], opt[3]), max=(high[2], high[3])),
            divisor=divisor,
        )

    def _preprocess(self) -> Preprocess | None:
        if self.image is None:
            return None
        options, size = self.options, self.image.size.opt
        scale = options.scale if options.scale is not None else 1.0
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if options.takes_images:  # in units of pixel * scale; the manifest has them in units of pixels
            red, green, blue = options.mean or (0.0, 0.0, 0.0)
            mean = (red / scale, green / scale, blue / scale)
            red, green, blue = options.std or (1.0, 1.0, 1.0)
            std = (red / scale, green / scale, blue / scale)
        return Preprocess(
            resize=Stretch(size=size) if self.task.name == "raw" else Fit(size=size),
            mean=mean,
            std=std,
            channels="bgr" if options.bgr else "rgb",
        )

    def _class_names(self) -> tuple[str, ...]:
        """What was given, else what the file's metadata holds, else numbers."""
        logits = next((o for o in self.proto.graph.output if o.name == "logits"), None)
        count = logits.type.tensor_type.shape.dim[1].dim_value if logits is not None else 0
        if count > MAX_CLASSES:
            raise InputError(f"'{self.path}' has {count} classes, more than the {MAX_CLASSES} of any bundle")
        if self.options.class_names is not None:
            given = tuple(self.options.class_names)
            if count and len(given) != count:
                raise InputError(
                    f"--class-names has {len(given)} names, and '{self.path}' has {count} classes"
                )
            return given
        metadata = {entry.key: entry.value for entry in self.proto.metadata_props}
        try:
            names = json.loads(metadata.get(CLASS_NAMES, "null"))
        except (ValueError, RecursionError):
            names = None
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
        self._note(
            "the file holds no class names, so classes are numbered; give --class-names FILE, one per line"
        )
        return tuple(f"class {i}" for i in range(count or UNNAMED_CLASSES))


def _raw_input(given: OpenInput) -> RawInput:
    ends = given.profile
    return RawInput(
        name=given.name, dtype=given.dtype, shape=given.shape, min=ends.min, opt=ends.opt, max=ends.max
    )


def _task_of(proto: onnx.ModelProto, inputs: Sequence[OpenInput]) -> str:
    """The task whose outputs, by name, type and rank, the graph has; "raw" where it is none."""
    if len(inputs) != 1 or not inputs[0].is_image:
        return "raw"
    given = {}
    for output in proto.graph.output:
        tensor = output.type.tensor_type
        given[output.name] = numpy_name(tensor.elem_type), len(tensor.shape.dim)
    for task in TASKS.values():
        wanted = {key: (value.dtype, len(value.dims)) for key, value in task.outputs.items()}
        # "logits" alone is a name that many models have, so the input has to be ours as well.
        ours = len(wanted) > 1 or inputs[0].name == "images"
        if wanted and ours and all(given.get(key) == value for key, value in wanted.items()):
            return task.name
    return "raw"


def _open_original(proto: onnx.ModelProto, path: Path) -> OnnxRun:
    try:
        return OnnxRun(proto, literally=True)
    except VerificationError as error:
        raise InputError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load '{path}': {_reason(error)}; "
            "only what it runs can be compared; --no-verify exports it all the same"
        ) from error


def _reason(error: VerificationError) -> str:
    """ONNX Runtime's words, without its own code and the place in its sources."""
    text = " ".join(str(error.__cause__ or error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+ .*?\(.*?\) ", "", text)
    return text[:200].rstrip(". ")
