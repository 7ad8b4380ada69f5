"""NMS, RoIAlign over a pyramid and sampling in simpler operators, for runtimes that lack or mistake them.

All shapes are known in advance: nothing waits for a count, so a GPU runs the whole model without a stop.
Knows the operators' signatures in `models/`, and no model.
"""

import math

import numpy as np
import onnx
from onnx import numpy_helper
from onnxscript import opset18 as op

# Boxes that one NMS looks at: the best of those given. TensorRT's TopK goes up to 3840.
MOST_BOXES = 2048
# Suppression goes along chains (A suppresses B, so C, which B overlaps, stays); each round settles the next
# link. An odd number, after which boxes behind longer chains are left out; after an even one they are kept.
# In a random order chains are O(log n) long (Fischer and Noever, "Tight analysis of parallel randomized
# greedy MIS", 2018).
ROUNDS = 21
# A RoI's area is at most this squared, in pixels of its own level (FPN, eq. 1), unless it is larger than what
# the last level is for.
_LARGEST_SIDE = 28


def nms(boxes, scores, iou_threshold, score_threshold, max_output):
    """`meta_deploy::nms` as a fixed point: keep = not any better box that overlaps is kept, round by round.

    Greedy suppression is the one solution of that equation, and repeating it from "all are kept" settles at
    least the best box that is not settled yet, and usually nearly all at once.

    The answer is the greedy one, unless a chain of suppressions is longer than `ROUNDS`, or finding
    `max_output` boxes takes more than the `MOST_BOXES` best. Then boxes are missing; none is too many.
    """
    count = scores.shape[1]
    if not isinstance(count, int):
        raise ValueError("the lowered NMS needs a number of boxes that is known in advance")
    most = min(count, MOST_BOXES)
    best, order = op.TopK(scores, _ints(most), axis=1)
    corners = op.GatherElements(boxes, op.Expand(op.Unsqueeze(order, _ints(2)), _ints(1, 1, 4)), axis=1)
    columns = op.Split(corners, num_outputs=4, axis=2)  # each (B, most, 1)
    rows = [op.Transpose(column, perm=[0, 2, 1]) for column in columns]
    zero = op.Constant(value_float=0.0)

    def overlap(low, high):
        from_ = op.Max(columns[low], rows[low])
        return op.Max(op.Sub(op.Min(columns[high], rows[high]), from_), zero)

    def area(sides):
        return op.Mul(op.Sub(sides[2], sides[0]), op.Sub(sides[3], sides[1]))

    both = op.Mul(overlap(0, 2), overlap(1, 3))
    either = op.Sub(op.Add(area(columns), area(rows)), both)
    iou = op.Div(both, op.Max(either, op.Constant(value_float=1e-6)))
    overlaps = _float(op.Greater(iou, op.Constant(value_float=float(iou_threshold))))
    suppresses = op.Trilu(overlaps, op.Constant(value_int=-1), upper=0)  # row i by the better column j < i
    wanted = _float(op.Greater(best, op.Constant(value_float=float(score_threshold))))
    wanted = op.Unsqueeze(wanted, _ints(2))
    kept = wanted
    for _ in range(min(most - 1, ROUNDS)):
        # How many kept boxes suppress each; float16 holds any such count well enough to tell it from none.
        hits = op.MatMul(suppresses, kept)
        kept = op.Mul(wanted, op.Relu(op.Sub(op.Constant(value_float=1.0), hits)))
    kept = op.Squeeze(kept, _ints(2))
    if most > max_output:
        rank = op.CumSum(kept, op.Constant(value_int=1))
        within = op.LessOrEqual(rank, op.Constant(value_float=float(max_output)))
        kept = op.Mul(kept, _float(within))
    # Back to the places that the boxes came from.
    none = op.Expand(zero, op.Shape(scores))
    return op.Cast(op.ScatterElements(none, order, kept, axis=1), to=onnx.TensorProto.BOOL)


def pyramid_roi_align(features, rois, batch_index, strides, output_size):
    """`meta_deploy::pyramid_roi_align` as one GridSample on a canvas that holds every level of every image.

    The coarser levels stand beside the finest, one above the other; the images below one another. Sample
    points are held inside their own level's map, which changes nothing for boxes inside the image: half a
    pixel beyond the border the bilinear sample is the border's pixel.

    A bin averages as many bilinear samples as it has pixels, on each axis. These weigh a run of pixels, and
    one sample between two pixels gives any two weights: about half as many samples on an axis, well placed
    and weighted, are the same mean. A RoI's level bounds its area, so `_taps` samples a bin, on a grid that
    is as long and narrow as the RoI, suffice for all but extreme ones; there, fewer evenly spaced samples
    stand for the mean.
    """
    P = int(output_size)
    K = _taps(P)
    heights = [op.Shape(feature, start=2, end=3) for feature in features]
    widths = [op.Shape(feature, start=3, end=4) for feature in features]
    canvas, tops, left = _canvas(features, heights, widths)
    images = op.Shape(canvas, start=0, end=1)
    rows, columns = op.Shape(canvas, start=2, end=3), op.Shape(canvas, start=3, end=4)
    channels = op.Shape(features[0], start=1, end=2)
    canvas = op.Transpose(canvas, perm=[1, 0, 2, 3])  # (C, B, rows, columns)
    canvas = op.Reshape(canvas, op.Concat(_ints(1), channels, _ints(-1), columns, axis=0))

    tables = {
        "scale": op.Constant(value_floats=[1.0 / stride for stride in strides]),
        "last_x": _float(op.Sub(op.Concat(*widths, axis=0), _ints(1))),
        "last_y": _float(op.Sub(op.Concat(*heights, axis=0), _ints(1))),
        "left": _float(op.Concat(_ints(0), *[left] * (len(features) - 1), axis=0)),
        "top": _float(op.Concat(*tops, axis=0)),
    }
    level = _level(rois, len(features))
    own = {name: op.Unsqueeze(op.Gather(table, level), _ints(1)) for name, table in tables.items()}  # (R, 1)
    half = op.Constant(value_float=0.5)
    x1, y1, x2, y2 = (
        op.Sub(op.Mul(side, own["scale"]), half) for side in op.Split(rois, num_outputs=4, axis=1)
    )
    x_size, y_size = (
        op.Div(op.Sub(b, a), op.Constant(value_float=float(P))) for a, b in ((x1, x2), (y1, y2))
    )
    x_number, y_number = _numbers(x_size, y_size, K)
    x, x_weights = _samples(x1, x_size, own["last_x"], x_number, P, K)  # (R, P, taps on the axis)
    y, y_weights = _samples(y1, y_size, own["last_y"], y_number, P, K)
    image_top = _float(op.Mul(batch_index, op.Squeeze(rows, _ints(0))))
    x = _normalized(op.Add(x, op.Unsqueeze(own["left"], _ints(2))), columns)
    top = op.Add(op.Unsqueeze(own["top"], _ints(2)), op.Unsqueeze(image_top, _ints(1, 2)))
    y = _normalized(op.Add(y, top), op.Mul(rows, images))

    # A bin's samples by number: along x first. Those beyond the RoI's grid weigh nothing.
    at_y = op.Floor(op.Div(op.Add(_row(np.arange(K)), half), x_number))  # (R, K)
    at_x = op.Sub(_row(np.arange(K)), op.Mul(at_y, x_number))
    used = _float(op.Less(at_y, y_number))
    x, x_weights = (op.Unsqueeze(_pick(values, at_x, P), _ints(1)) for values in (x, x_weights))
    y, y_weights = (op.Unsqueeze(_pick(values, at_y, P), _ints(2)) for values in (y, y_weights))
    weights = op.Mul(op.Mul(x_weights, y_weights), op.Unsqueeze(used, _ints(1, 2)))  # (R, P, P, K)
    x, y = op.Expand(x, _ints(1, P, 1, 1)), op.Expand(y, _ints(1, 1, P, 1))
    grid = op.Concat(op.Unsqueeze(x, _ints(4)), op.Unsqueeze(y, _ints(4)), axis=4)
    grid = op.Reshape(grid, _ints(1, -1, P, K, 2))
    weights = op.Reshape(weights, _ints(1, 1, -1, P, K))
    # One by one, not K in a row and a sum over these: TensorRT makes one kernel of it all, which keeps no
    # sample in memory.
    pooled = None
    for k in range(K):
        points = op.Gather(grid, op.Constant(value_int=k), axis=3)
        sampled = op.GridSample(canvas, points, align_corners=1, mode="bilinear", padding_mode="border")
        weighted = op.Mul(sampled, op.Gather(weights, op.Constant(value_int=k), axis=4))  # (1, C, R * P, P)
        pooled = weighted if pooled is None else op.Add(pooled, weighted)
    pooled = op.Reshape(pooled, op.Concat(channels, _ints(-1, P, P), axis=0))
    return op.Transpose(pooled, perm=[1, 0, 2, 3])


def grid_sample(x, grid, interpolation_mode, padding_mode, align_corners):
    """`aten::grid_sampler` of maps, bilinear, with zeros or the border's pixels outside, as four gathers.

    A rim of one pixel around each map stands for all that is outside: zeros, or the map's edge once more.

    Raises:
        ValueError: another interpolation, or reflections outside.
    """
    if interpolation_mode != 0 or padding_mode not in (0, 1):
        raise ValueError("the lowered grid_sample is bilinear, with zeros or the border's pixels outside")
    one, half = op.Constant(value_float=1.0), op.Constant(value_float=0.5)
    channels, rows, columns = (op.Shape(x, start=axis, end=axis + 1) for axis in (1, 2, 3))
    size = _float(op.Concat(columns, rows, axis=0))
    # From -1 .. 1 to pixels; the rim's corner is at (0, 0).
    scale = op.Mul(op.Sub(size, one) if align_corners else size, half)
    shift = op.Add(scale, one if align_corners else half)
    at = op.Add(op.Mul(op.Reshape(grid, _ints(0, -1, 2)), scale), shift)  # (maps, points, 2)
    low, high = (one, size) if padding_mode else (op.Constant(value_float=0.0), op.Add(size, one))
    at = op.Min(op.Max(at, low), high)
    # The four pixels around each point, and how near they are.
    pixel = op.Min(op.Floor(at), size)
    far = op.Sub(at, pixel)
    (x_far, y_far), (x_near, y_near) = (
        op.Split(part, num_outputs=2, axis=2) for part in (far, op.Sub(one, far))
    )
    left, top = op.Split(_int(pixel), num_outputs=2, axis=2)
    columns, rows = op.Add(columns, _ints(2)), op.Add(rows, _ints(2))
    count = op.Squeeze(op.Shape(x, start=0, end=1))
    maps = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
    first = op.Unsqueeze(op.Mul(maps, op.Mul(columns, rows)), _ints(1, 2))  # of each map in the table
    corner = op.Squeeze(op.Add(op.Add(op.Mul(top, _int(columns)), left), _int(first)), _ints(2))
    rimmed = op.Pad(x, _ints(0, 0, 1, 1, 0, 0, 1, 1), mode="edge" if padding_mode else "constant")
    table = op.Reshape(op.Transpose(rimmed, perm=[0, 2, 3, 1]), op.Concat(_ints(-1), channels, axis=0))
    right, below = _int(_ints(1)), _int(columns)
    sampled = op.Mul(op.Gather(table, corner), op.Mul(x_near, y_near))  # (maps, points, C)
    for step, part in (
        (right, op.Mul(x_far, y_near)),
        (below, op.Mul(x_near, y_far)),
        (op.Add(right, below), op.Mul(x_far, y_far)),
    ):
        sampled = op.Add(sampled, op.Mul(op.Gather(table, op.Add(corner, step)), part))
    sampled = op.Reshape(sampled, op.Concat(_ints(0), op.Shape(grid, start=1, end=3), channels, axis=0))
    return op.Transpose(sampled, perm=[0, 3, 1, 2])


def _taps(bins):
    """Samples of a bin, both axes together: for a square RoI that its level is meant for, and most others."""
    return math.ceil((_LARGEST_SIDE / bins) ** 2 / 2) + 4


def _numbers(x_size, y_size, most):
    """How many samples each RoI's bins have on each axis, (R, 1) float both; the product is at most `most`.

    Args:
        x_size, y_size: (R, 1) of a bin, in pixels.
    """
    one, shorter = op.Constant(value_float=1.0), op.Constant(value_float=float(int(most**0.5)))

    def wanted(size):  # two for each pair of pixels that ONNX's samples touch
        number = op.Ceil(op.Div(op.Add(op.Ceil(size), one), op.Constant(value_float=2.0)))
        return op.Min(op.Max(number, one), op.Constant(value_float=float(_longest(most))))

    def limited(own, other):
        """What the other axis leaves room for, where that is the shorter one."""
        other = op.Min(other, shorter)
        room = op.Floor(op.Div(op.Constant(value_float=float(most)), other))
        return op.Min(own, room)

    x, y = wanted(x_size), wanted(y_size)
    x_longer = op.GreaterOrEqual(x, y)
    return (
        op.Where(x_longer, limited(x, y), op.Min(x, shorter)),
        op.Where(x_longer, op.Min(y, shorter), limited(y, x)),
    )


def _longest(most):
    """The most samples on one axis."""
    return 2 * most // 3


def _samples(first, size, last, number, bins, most):
    """Where to sample one axis, in pixels of the level, and each sample's weight; weights of a bin sum to 1.

    Args:
        first: (R, 1), where the RoI begins.
        size: (R, 1), of a bin.
        last: (R, 1), the level's last pixel.
        number: (R, 1), samples of a bin.
        bins, most: of a RoI; samples of a bin at most, both axes together.

    Returns:
        Two (R, bins, samples at most on one axis).
    """
    taps = _longest(most)
    one, zero, half = (op.Constant(value_float=value) for value in (1.0, 0.0, 0.5))
    samples = op.Ceil(size)  # as ONNX takes them; none of an empty RoI
    fits = op.LessOrEqual(samples, op.Sub(op.Mul(number, op.Constant(value_float=2.0)), one))
    start = op.Add(first, op.Mul(size, _row(np.arange(bins))))  # (R, bins)
    start, size, samples, last, number, fits = (
        op.Unsqueeze(value, _ints(2)) for value in (start, size, samples, last, number, fits)
    )
    count = op.Max(samples, one)

    def inside(at):
        return op.Min(op.Max(at, zero), last)

    # ONNX's samples (R, bins, at most), and the weights of the pixels that they touch.
    place = _row(np.arange(2 * taps - 1))
    at = inside(op.Add(start, op.Mul(op.Div(op.Add(place, half), count), size)))
    used = op.Div(_float(op.Less(place, samples)), count)
    pixel = op.Floor(inside(op.Add(start, op.Div(op.Mul(size, half), count))))
    pixel = op.Add(pixel, _row(np.arange(2 * taps)))  # (R, bins, 2 * taps)
    distance = op.Abs(op.Sub(op.Unsqueeze(at, _ints(2)), op.Unsqueeze(pixel, _ints(3))))
    touch = op.Mul(op.Relu(op.Sub(one, distance)), op.Unsqueeze(used, _ints(2)))
    weight = op.ReduceSum(touch, _ints(3), keepdims=0)
    # Two pixels at a time.
    weight = op.Reshape(weight, _ints(-1, bins, taps, 2))
    left, right = (op.Squeeze(part, _ints(3)) for part in op.Split(weight, num_outputs=2, axis=3))
    both = op.Add(left, right)
    between = op.Div(right, op.Max(both, op.Constant(value_float=1e-12)))
    pixel = op.Slice(pixel, _ints(0), _ints(2 * taps), _ints(2), _ints(2))
    placed = inside(op.Add(pixel, between))

    even = inside(op.Add(start, op.Mul(size, op.Div(op.Add(_row(np.arange(taps)), half), number))))
    return op.Where(fits, placed, even), op.Where(fits, both, op.Div(one, number))


def _pick(values, index, bins):
    """Of each RoI's samples on an axis, (R, bins, n), those with the numbers (R, K): (R, bins, K)."""
    most = op.Sub(op.Shape(values, start=2, end=3), _ints(1))
    index = op.Min(op.Cast(index, to=onnx.TensorProto.INT64), most)
    index = op.Expand(op.Unsqueeze(index, _ints(1)), _ints(1, bins, 1))
    return op.GatherElements(values, index, axis=2)


def _normalized(at, size):
    """Pixels of the canvas as GridSample counts them with align_corners: -1 to 1."""
    last = _float(op.Sub(size, _ints(1)))
    return op.Sub(op.Mul(at, op.Div(op.Constant(value_float=2.0), last)), op.Constant(value_float=1.0))


def _canvas(features, heights, widths):
    """The levels in one map (B, C, rows, columns), the tops of each there, and where the coarser ones begin.

    Each level has half the side of the one before it, so those after the second fit below it.
    """
    if len(features) == 1:
        return features[0], [_ints(0)], _ints(0)
    right, tops = [], [_ints(0), _ints(0)]
    for feature, width, height in zip(features[1:], widths[1:], heights[1:], strict=True):
        missing = op.Sub(widths[1], width)
        right.append(op.Pad(feature, op.Concat(_ints(0, 0, 0, 0, 0, 0, 0), missing, axis=0)))
        tops.append(op.Add(tops[-1], height))
    stacked = op.Concat(*right, axis=2)
    short = op.Sub(heights[0], op.Shape(stacked, start=2, end=3))
    finest = op.Pad(
        features[0], op.Concat(_ints(0, 0, 0, 0, 0, 0), op.Max(op.Neg(short), _ints(0)), _ints(0), axis=0)
    )
    stacked = op.Pad(stacked, op.Concat(_ints(0, 0, 0, 0, 0, 0), op.Max(short, _ints(0)), _ints(0), axis=0))
    return op.Concat(finest, stacked, axis=3), tops[:-1], widths[0]


def _level(rois, levels):
    """The level of each RoI, (R,) int64: floor(log2(v)) >= i, as `pyramid_level` has it, is v >= 2**i."""
    x1, y1, x2, y2 = op.Split(rois, num_outputs=4, axis=1)
    area = op.Squeeze(op.Mul(op.Sub(x2, x1), op.Sub(y2, y1)), _ints(1))
    scale = op.Sqrt(op.Max(area, op.Constant(value_float=0.0)))
    v = op.Add(op.Div(scale, op.Constant(value_float=56.0)), op.Constant(value_float=1e-6))
    limits = _constant(np.exp2(np.arange(1, levels)).astype(np.float32)[None, :])
    above = op.GreaterOrEqual(op.Unsqueeze(v, _ints(1)), limits)
    return op.ReduceSum(op.Cast(above, to=onnx.TensorProto.INT64), _ints(1), keepdims=0)


def _ints(*values):
    return op.Constant(value_ints=list(values))


def _constant(array):
    return op.Constant(value=numpy_helper.from_array(array))


def _row(numbers):
    """Numbers along the last axis, float32."""
    return _constant(np.asarray(numbers, np.float32))


def _float(value):
    return op.Cast(value, to=onnx.TensorProto.FLOAT)


def _int(value):
    """int32, in which a GPU computes faster than in int64."""
    return op.Cast(value, to=onnx.TensorProto.INT32)
