"""What a user asks of an export, and what can be refused before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meta_deploy.errors import InputError

MOST = 1e6  # of mean, std and scale
MAX_INPUT_VALUES = 2**31  # 8 GB of input alone; no model runs on more


@dataclass(frozen=True)
class Options:
    """The options of `export`.

    Attributes:
        model: a name of `models.registry.MODEL_NAMES`; None: inferred from the checkpoint.
        target: "auto" or one of `targets.TARGETS`.
        precision: one of `graph.precision.PRECISIONS`.
        operators: "native" or "lowered", the form of NMS, RoIAlign and sampling; None: the target's choice.
        gpus: compute capabilities that a TensorRT-RTX engine is for, such as ("8.6",); none: all it knows.
        workspace_mb: scratch memory that a TensorRT layer may use, in MB; None: TensorRT's own limit.
        calib_images: a folder of images (or, for an ONNX file, of .npz inputs) to measure and verify on;
            None: the package's own images, or random inputs.
        calib_method: one of `calib.METHOD_NAMES`, how the range of an 8-bit tensor is found.
        search: measure which products gain from 8 bits on this machine; otherwise the target's rules decide.
        max_drop: how many points 8 bits may lose; None: as much as verification tolerates.
        annotations: a COCO file, or a folder of label images, of `calib_images`, which `max_drop` is about;
            None: it is about the agreement with float32.
        strict: fail where 8 bits gain nothing, instead of taking float32.
        input_size: (height, width) in pixels; None: the model's own.
        batch: images per call; None: 1, or what the ONNX file says.
        dynamic_batch: (min, opt, max) images per call, instead of `batch`.
        dynamic_size: take any size up to the longer side of `input_size`, in steps of 32.
        shapes: input name -> shape, for an ONNX file whose shapes are open; 0 leaves a size open.
        mean, std: of each channel, R G B, in units of pixel * scale; they make an ONNX file take images.
        scale: what pixels (0 to 255) are multiplied by first.
        bgr: the network wants its channels in the order B, G, R.
        class_names: of an ONNX detector or segmenter whose file does not hold them.
        passes: "all", "none", or names of graph passes separated by commas.
        tune: measure whether the target does better without some passes; where `passes` is "all". As times
            differ, two exports may then ship different graphs; meta-export does it, other programs ask.
        explain: record why passes declined places near their pattern.
        out: the bundle's folder; None: named after the file, target and precision, in the current folder.
        check: compare with the original before anything is written.
        allow_partial: accept a checkpoint that lacks tensors.
        backbone_ckpt: a file with a plain ViT, for what of it the checkpoint lacks.
    """

    model: str | None = None
    target: str = "auto"
    precision: str = "fp32"
    operators: str | None = None
    gpus: Sequence[str] = ()
    workspace_mb: int | None = None
    calib_images: str | Path | None = None
    calib_method: str = "auto"
    search: bool = True
    max_drop: float | None = None
    annotations: str | Path | None = None
    strict: bool = False
    input_size: tuple[int, int] | None = None
    batch: int | None = None
    dynamic_batch: tuple[int, int, int] | None = None
    dynamic_size: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    scale: float | None = None
    bgr: bool = False
    class_names: Sequence[str] | None = None
    passes: str = "all"
    tune: bool = False
    explain: bool = False
    out: str | Path | None = None
    check: bool = True
    allow_partial: bool = False
    backbone_ckpt: str | Path | None = None

    def __post_init__(self) -> None:
        for name, value in (("scale", (self.scale,)), ("mean", self.mean), ("std", self.std)):
            for number in value or ():
                if number is None:
                    continue
                least = -MOST if name == "mean" else 1 / MOST
                if not least <= number <= MOST:  # false for NaN too
                    raise InputError(f"--{name} {number:g} is not from {least:g} to {MOST:g}")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise InputError(f"--max-drop {self.max_drop:g} is not from 0 to 100 points")
        for name, shape in self.shapes.items():
            if not all(isinstance(size, int) and size >= 0 for size in shape):
                raise InputError(f"--shape of '{name}' is {shape}, and has to be whole numbers")

    @property
    def takes_images(self) -> bool:
        """Whether preprocessing was given, so that an ONNX file takes images."""
        return self.mean is not None or self.std is not None or self.scale is not None or self.bgr

    def batches(self) -> tuple[int, int, int]:
        """(min, opt, max) images per call, for a model that takes any.

        Raises:
            InputError: they do not rise from 1.
        """
        low, opt, high = self.dynamic_batch or (self.batch or 1,) * 3
        if not 1 <= low <= opt <= high:
            raise InputError(f"the batch range {low} {opt} {high} does not rise; give 1 <= MIN <= OPT <= MAX")
        return low, opt, high


def check_size(input_size: Sequence[int], divisor: int, batch: int, dynamic_size: bool) -> None:
    """Refuse an input that no model takes.

    Raises:
        InputError: a size that `divisor` does not divide, or an input that is too large.
    """
    height, width = input_size
    for name, size in (("height", height), ("width", width)):
        if size < divisor or size % divisor:
            nearest = max(divisor, round(size / divisor) * divisor)
            raise InputError(f"input {name} {size} is not a multiple of {divisor}; the nearest is {nearest}")
    largest = max(height, width)
    if 3 * batch * (largest**2 if dynamic_size else height * width) > MAX_INPUT_VALUES:
        raise InputError(
            f"an input of {batch} x 3 x {height} x {width} is too large (over 2**31 numbers); "
            "take a smaller batch or size"
        )
