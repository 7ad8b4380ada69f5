"""Model to ONNX: the literal program, the two operators that PyTorch lacks, and the inputs' dimensions.

Knows the models' interface and ONNX; no graph pass runs here. PyTorch's own graph optimizer is switched off:
it takes most of an export's time and grows faster than the graph (benchmarks/README.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from onnxscript import opset18 as op
from torch import nn

from meta_deploy.errors import InputError
from meta_deploy.models import box_ops, roi_align  # noqa: F401  (they register the two operators)
from meta_deploy.models.zoo import MaskRCNNConfig, ModelConfig

OPSET = 18
DIVISOR = 32


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """The dimensions of `images` (B, 3, H, W): each the same thrice (static), or a range.

    Attributes:
        batch: (min, opt, max) images.
        height, width: (min, opt, max) pixels, multiples of 32.
    """

    batch: tuple[int, int, int] = (1, 1, 1)
    height: tuple[int, int, int] = (512, 512, 512)
    width: tuple[int, int, int] = (512, 512, 512)

    def __post_init__(self) -> None:
        for name in ("batch", "height", "width"):
            low, opt, high = getattr(self, name)
            if not 1 <= low <= opt <= high:
                raise InputError(f"The {name} range {low} {opt} {high} does not rise from at least 1.")
        for name in ("height", "width"):
            for size in getattr(self, name):
                if size % DIVISOR:
                    raise InputError(
                        f"Input {name} {size} is not a multiple of {DIVISOR}; "
                        f"the nearest is {max(DIVISOR, round(size / DIVISOR) * DIVISOR)}."
                    )

    @property
    def dynamic_batch(self) -> bool:
        return self.batch[0] != self.batch[2]

    @property
    def dynamic_size(self) -> bool:
        return self.height[0] != self.height[2] or self.width[0] != self.width[2]


def output_names(config: ModelConfig) -> list[str]:
    """The outputs of the shipped graph, in order."""
    if isinstance(config, MaskRCNNConfig):
        return ["num_detections", "boxes", "scores", "labels", "masks"]
    return ["logits"]


def export_onnx(model: nn.Module, spec: InputSpec) -> onnx.ModelProto:
    """Trace the model and translate it, operator by operator.

    Args:
        model: a zoo model in evaluation mode.
        spec: the input's dimensions.

    Returns:
        The literal graph. After the outputs named by `output_names` come the intermediate stages that
        `model(images, stages=True)` adds, for verification; `drop_outputs` removes them.
    """
    # A batch or size of 1 would be taken for a constant, so trace dynamic ones with at least two.
    batch = max(spec.batch[1], 2) if spec.dynamic_batch else spec.batch[1]
    height, width = max(spec.height[1], 2 * DIVISOR), max(spec.width[1], 2 * DIVISOR)
    images = torch.zeros(
        batch, 3, *((height, width) if spec.dynamic_size else (spec.height[1], spec.width[1]))
    )
    with torch.no_grad(), quiet():
        program = torch.export.export(
            model, (images,), {"stages": True}, dynamic_shapes=_dynamic_shapes(spec), strict=False
        )
        outputs = program.call_spec.out_spec
        assert outputs is not None
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(outputs.unflatten([None] * outputs.num_leaves)),
            custom_translation_table=_TRANSLATIONS,
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    for node in proto.graph.node:
        # Where each node came from in the Python source is of no use in a bundle, and it leaks paths.
        del node.metadata_props[:]
        node.ClearField("doc_string")
    del proto.graph.metadata_props[:], proto.metadata_props[:]
    return proto


def _dynamic_shapes(spec: InputSpec):
    dims: dict[int, object] = {}
    if spec.dynamic_batch:
        dims[0] = torch.export.Dim("batch", min=1, max=spec.batch[2])
    if spec.dynamic_size:
        for axis, name, sizes in ((2, "height", spec.height), (3, "width", spec.width)):
            # Traced from one unit up: a range that starts above is the manifest's to state.
            unit = torch.export.Dim(f"{name}_units", min=1, max=max(sizes[2] // DIVISOR, 2))
            dims[axis] = DIVISOR * unit
    return {"images": dims, "stages": None} if dims else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep PyTorch's notes about itself away from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def drop_outputs(proto: onnx.ModelProto, keep: list[str]) -> onnx.ModelProto:
    """A copy that returns only `keep`; the tensors of the other outputs stay in the graph, by their names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    outputs = [output for output in copy.graph.output if output.name in keep]
    dropped = [output for output in copy.graph.output if output.name not in keep]
    del copy.graph.output[:]
    copy.graph.output.extend(outputs)
    copy.graph.value_info.extend(dropped)
    return copy


def _nms(boxes, scores, iou_threshold, score_threshold, max_output):
    """`meta_deploy::nms` as NonMaxSuppression, its list of (image, class, box) turned into a mask."""
    selected = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, op.Constant(value_ints=[1])),
        op.Constant(value_ints=[max_output]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[score_threshold]),
    )
    image_and_box = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
    count = op.Shape(image_and_box, start=0, end=1)
    true = op.Constant(value=onnx.helper.make_tensor("true", onnx.TensorProto.BOOL, [1], [True]))
    false = op.Constant(value=onnx.helper.make_tensor("false", onnx.TensorProto.BOOL, [1], [False]))
    return op.ScatterND(op.Expand(false, op.Shape(scores)), image_and_box, op.Expand(true, count))


def _pyramid_roi_align(features, rois, batch_index, strides, output_size):
    """`meta_deploy::pyramid_roi_align`: a RoiAlign per level over the RoIs of that level, then their order back.

    The levels' limits are those of `pyramid_level`: floor(log2(v)) >= i is v >= 2**i.
    """
    sides = op.Sub(
        op.Slice(rois, op.Constant(value_ints=[2]), op.Constant(value_ints=[4]), op.Constant(value_ints=[1])),
        op.Slice(rois, op.Constant(value_ints=[0]), op.Constant(value_ints=[2]), op.Constant(value_ints=[1])),
    )
    area = op.ReduceProd(sides, op.Constant(value_ints=[1]), keepdims=0)
    scale = op.Sqrt(op.Max(area, op.Constant(value_float=0.0)))
    v = op.Add(op.Div(scale, op.Constant(value_float=56.0)), op.Constant(value_float=1e-6))
    above = [op.GreaterOrEqual(v, op.Constant(value_float=2.0**i)) for i in range(1, len(features))]
    on_level = [op.Not(above[0])]
    on_level += [op.And(low, op.Not(high)) for low, high in zip(above[:-1], above[1:], strict=True)]
    on_level.append(above[-1])

    order, pooled = [], []
    for feature, stride, mask in zip(features, strides, on_level, strict=True):
        index = op.Reshape(op.NonZero(mask), op.Constant(value_ints=[-1]))
        order.append(index)
        pooled.append(
            op.RoiAlign(
                feature,
                op.Gather(rois, index),
                op.Gather(batch_index, index),
                output_height=output_size,
                output_width=output_size,
                sampling_ratio=0,
                spatial_scale=1.0 / stride,
                coordinate_transformation_mode="half_pixel",
            )
        )
    place = op.Concat(*order, axis=0)
    start, step = op.Constant(value_int=0), op.Constant(value_int=1)
    count = op.Squeeze(op.Shape(place), op.Constant(value_ints=[0]))
    inverse = op.ScatterElements(place, place, op.Range(start, count, step))
    return op.Gather(op.Concat(*pooled, axis=0), inverse)


_TRANSLATIONS = {
    torch.ops.meta_deploy.nms.default: _nms,
    torch.ops.meta_deploy.pyramid_roi_align.default: _pyramid_roi_align,
}
