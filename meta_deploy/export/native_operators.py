"""NMS and RoIAlign over a pyramid as ONNX's own operators, NonMaxSuppression and RoiAlign.

Knows the operators' signatures in `models/`, and no model.
"""

import itertools

import onnx
from onnxscript import opset18 as op


def nms(boxes, scores, iou_threshold, score_threshold, max_output):
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


def pyramid_roi_align(features, rois, batch_index, strides, output_size):
    """`meta_deploy::pyramid_roi_align`: a RoiAlign per level over its RoIs, then their order back.

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
    on_level += [op.And(low, op.Not(high)) for low, high in itertools.pairwise(above)]
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
