"""RoIAlign on ONNX Runtime's CPU: its operator against the same in plain arithmetic.

    python benchmarks/roi_align_forms.py [--rois N] [--threads N] [--rounds N]

RoIAlign is separable: a bin is a weighted sum of pixels, and its weights are products of one for the row
and one for the column. "Products" sorts the RoIs by size, gathers for a few at a time the pixels that they
touch, and multiplies these by both. It gives what the operator gives, within rounding. Bins are 7x7 and
14x14 on a map of 256x128x128; small RoIs have the size of nuclei (12 to 32 pixels of the image), mixed ones
all sizes that belong to this map (16 to 112).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx
from onnx import parser as onnx_parser

from benchmarks.common import interleave, machine, open_session, parser, ratio, save, table
from meta_deploy.ort import onnxruntime

CHANNELS, SIDE, STRIDE, FEW = 256, 128, 4, 8
SIZES = {"small": (12, 32), "mixed": (16, 112)}

# On one axis: where each RoI begins, its bins' size, and the pixels that it touches, (R, 1) each; and what
# each of its pixels weighs in each bin (R, pixels, bins), by the operator's specification.
_FUNCTIONS = """
<domain: "own", opset_import: ["": 18]>
weights (start, bin, pixel, last, bins) => (y) {
    zero = Constant<value_float = 0.0>()
    one = Constant<value_float = 1.0>()
    half = Constant<value_float = 0.5>()
    axis1 = Constant<value_ints = [1]>()
    axis12 = Constant<value_ints = [1, 2]>()
    axis2 = Constant<value_ints = [2]>()
    axis3 = Constant<value_ints = [3]>()
    axis23 = Constant<value_ints = [2, 3]>()
    ceiled = Ceil(bin)
    count = Max(ceiled, one)
    most = ReduceMax<keepdims = 0>(count)
    number = Range(zero, most, one)
    middle = Add(number, half)
    share = Div(middle, count)
    shares = Unsqueeze(share, axis1)
    places = Add(bins, shares)
    sizes = Unsqueeze(bin, axis2)
    starts = Unsqueeze(start, axis2)
    away = Mul(places, sizes)
    anywhere = Add(starts, away)
    positive = Max(anywhere, zero)
    at = Min(positive, last)
    ats = Unsqueeze(at, axis1)
    pixels = Unsqueeze(pixel, axis23)
    distance = Sub(ats, pixels)
    far = Abs(distance)
    near = Sub(one, far)
    hat = Relu(near)
    is_used = Less(number, count)
    used = Cast<to = 1>(is_used)
    mean = Div(used, count)
    means = Unsqueeze(mean, axis12)
    parts = Mul(hat, means)
    y = ReduceSum<keepdims = 0>(parts, axis3)
}
<domain: "own", opset_import: ["": 18]>
run (low, high, bins, last) => (start, bin, first, pixels) {
    zero = Constant<value_float = 0.0>()
    one = Constant<value_float = 1.0>()
    half = Constant<value_float = 0.5>()
    start = Identity(low)
    length = Sub(high, low)
    bin = Div(length, bins)
    ceiled = Ceil(bin)
    count = Max(ceiled, one)
    step = Div(bin, count)
    edge = Mul(step, half)
    from = Add(low, edge)
    from_positive = Max(from, zero)
    from_inside = Min(from_positive, last)
    first = Floor(from_inside)
    to = Sub(high, edge)
    to_positive = Max(to, zero)
    to_inside = Min(to_positive, last)
    end = Ceil(to_inside)
    reach = Sub(end, first)
    pixels = Add(reach, one)
}
"""


def products(bins: int) -> onnx.ModelProto:
    """RoIAlign of one map by products, of `FEW` RoIs at a time."""
    text = f"""
<ir_version: 9, opset_import: ["": 18, "own": 1]>
products (float[1, {CHANNELS}, {SIDE}, {SIDE}] map, float[R, 4] rois)
    => (float[R, {CHANNELS}, {bins}, {bins}] y)
<float scale = {{{1 / STRIDE}}}, float half = {{0.5}}, float bins = {{{bins}}}, float last = {{{SIDE - 1}}},
 float width = {{{SIDE}}}, int64[2] pixels_of = {{-1, {CHANNELS}}}, int64[3] parts_of = {{-1, {FEW}, 8}},
 int64[3] lines_of = {{{FEW}, -1, {CHANNELS * bins}}},
 int64[4] few_of = {{{FEW}, {CHANNELS}, {bins}, {bins}}},
 int64[4] all_of = {{-1, {CHANNELS}, {bins}, {bins}}},
 int64[1] few = {{{FEW}}}, int64[1] before = {{{FEW - 1}}},
 int64[1] none = {{0}}, int64[1] axis1 = {{1}}, int64[1] axis2 = {{2}}, int64 zero = {{0}}, int64 one = {{1}},
 bool true = {{1}}>
{{
    last_first = Transpose<perm = [0, 2, 3, 1]>(map)
    table = Reshape(last_first, pixels_of)
    scaled = Mul(rois, scale)
    centred = Sub(scaled, half)
    x1, y1, x2, y2 = Split<axis = 1, num_outputs = 4>(centred)
    x_start, x_bin, x_first, x_pixels = own.run(x1, x2, bins, last)
    y_start, y_bin, y_first, y_pixels = own.run(y1, y2, bins, last)
    longer = Max(x_pixels, y_pixels)
    is_wide = Greater(x_pixels, y_pixels)
    shorter_first = Neg(longer)
    column = Where(is_wide, longer, shorter_first)
    key = Squeeze(column, axis1)
    count = Shape(key)
    sorted, order = TopK(key, count)
    facts = Concat<axis = 1>(x_start, x_bin, x_first, x_pixels, y_start, y_bin, y_first, y_pixels)
    more = Add(count, before)
    turns = Div(more, few)
    filled = Mul(turns, few)
    missing = Sub(filled, count)
    ends = Concat<axis = 0>(none, missing)
    padded = Pad(order, ends)
    in_order = Gather(facts, padded)
    parts = Reshape(in_order, parts_of)
    trips = Squeeze(turns, none)
    pooled = Loop(trips, true) <body = body (int64 i, bool go)
            => (bool on, float[{FEW}, {CHANNELS}, {bins}, {bins}] out) {{
        on = Identity(go)
        part = Gather(parts, i)
        xs, xb, xf, xn, ys, yb, yf, yn = Split<axis = 1, num_outputs = 8>(part)
        wide = ReduceMax<keepdims = 0>(xn)
        tall = ReduceMax<keepdims = 0>(yn)
        wide_int = Cast<to = 7>(wide)
        tall_int = Cast<to = 7>(tall)
        x_number = Range(zero, wide_int, one)
        y_number = Range(zero, tall_int, one)
        x_float = Cast<to = 1>(x_number)
        y_float = Cast<to = 1>(y_number)
        x_pixel = Add(xf, x_float)
        y_pixel = Add(yf, y_float)
        x_inside = Min(x_pixel, last)
        y_inside = Min(y_pixel, last)
        line = Mul(y_inside, width)
        x_place = Unsqueeze(x_inside, axis2)
        y_place = Unsqueeze(line, axis1)
        place = Add(x_place, y_place)
        index = Cast<to = 7>(place)
        crops = Gather(table, index)
        x_weights = own.weights(xs, xb, x_pixel, last, places)
        y_weights = own.weights(ys, yb, y_pixel, last, places)
        channels_first = Transpose<perm = [0, 1, 3, 2]>(crops)
        y_weights_each = Unsqueeze(y_weights, axis1)
        by_row = MatMul(channels_first, y_weights_each)
        lines = Reshape(by_row, lines_of)
        lines_last = Transpose<perm = [0, 2, 1]>(lines)
        by_column = MatMul(lines_last, x_weights)
        out = Reshape(by_column, few_of)
    }}>
    all = Reshape(pooled, all_of)
    size = Squeeze(count, none)
    numbers = Range(zero, size, one)
    inverse = ScatterElements(order, order, numbers)
    y = Gather(all, inverse)
}}
"""
    model = onnx_parser.parse_model(text + _FUNCTIONS)
    places = np.arange(bins, dtype=np.float32).reshape(1, bins, 1)
    model.graph.initializer.append(onnx.numpy_helper.from_array(places, "places"))
    onnx.checker.check_model(model)
    return model


def operator(bins: int) -> onnx.ModelProto:
    """RoIAlign of one map by ONNX's operator."""
    return onnx_parser.parse_model(f"""
<ir_version: 9, opset_import: ["": 18]>
operator (float[1, {CHANNELS}, {SIDE}, {SIDE}] map, float[R, 4] rois)
    => (float[R, {CHANNELS}, {bins}, {bins}] y) {{
    count = Shape<start = 0, end = 1>(rois)
    image = ConstantOfShape<value = int64[1] {{0}}>(count)
    y = RoiAlign<output_height = {bins}, output_width = {bins}, spatial_scale = {1 / STRIDE}>
        (map, rois, image)
}}
""")


def rois(shortest: float, longest: float, count: int) -> np.ndarray:
    """Boxes (count, 4) inside the image, of sides from one to the other, in pixels of it."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(shortest), np.log(longest), (count, 2)))
    start = rng.uniform(0, 1, (count, 2)) * (SIDE * STRIDE - sides)
    return np.concatenate([start, start + sides], axis=1).astype(np.float32)


def main(argv: Sequence[str] | None = None) -> None:
    p = parser(__doc__ or "", "roi_align_forms")
    p.add_argument("--rois", type=int, default=500)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, default=10)
    args = p.parse_args(argv)
    feature = np.random.default_rng(1).normal(size=(1, CHANNELS, SIDE, SIDE)).astype(np.float32)
    rows: list[dict[str, Any]] = []
    for bins in (7, 14):
        sessions = {make.__name__: open_session(make(bins), args.threads) for make in (operator, products)}
        for name, sides in SIZES.items():
            feed = {"map": feature, "rois": rois(*sides, args.rois)}
            expected, actual = (session.run(None, feed)[0] for session in sessions.values())
            runs = {form: partial(session.run, None, feed) for form, session in sessions.items()}
            times = interleave({form: lambda turn, run=run: run() for form, run in runs.items()}, args.rounds)
            rows.append(
                {"bins": f"{bins}x{bins}", "RoIs": name}
                | {f"{form}, ms": float(np.median(values)) for form, values in times.items()}
                | {"products / operator": ratio(times["products"], times["operator"])}
                | {"difference": float(np.abs(actual - expected).max() / np.abs(expected).max())}
                | shares(bins, feed, args.threads)
            )
    print(table(rows))
    save(args.json, machine=machine(), rois=args.rois, threads=args.threads, rows=rows)


def shares(bins: int, feed: dict[str, np.ndarray], threads: int) -> dict[str, float]:
    """Milliseconds of the products' form by what it does, by ONNX Runtime's profiler."""
    kinds = {
        "FusedMatMul": "two products",
        "MatMul": "two products",
        "Gather": "gathering",
        "Transpose": "moving",
    }
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(products(bins).SerializeToString(), options)
        session.run(None, feed)
        session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    found: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = event["args"]["op_name"]
            if kind != "Loop":
                found[kinds.get(kind, "the rest")] += event["dur"] / 2000
    return {f"{kind}, ms": found[kind] for kind in ("two products", "gathering", "moving", "the rest")}


if __name__ == "__main__":
    main()
