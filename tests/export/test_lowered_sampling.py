"""Sampling in plain arithmetic against PyTorch's grid_sample in float64: any sizes, any coordinates."""

import functools

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from meta_deploy.export.lowered_operators import grid_sample
from meta_deploy.export.operators import TRANSLATIONS
from meta_deploy.export.trace import OPSET, quiet
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.graph.precision.emulate import emulated
from tests.graph.rewriting import RANDOM

FAR = 1e9


class Sample(nn.Module):
    def __init__(self, padding, align):
        super().__init__()
        self.padding, self.align = padding, align

    def forward(self, x, grid):
        return F.grid_sample(x, grid, "bilinear", self.padding, self.align)


@functools.cache
def translated(padding="zeros", align=False, size=None):
    """For maps of any number and size, or of one size."""
    x, grid = torch.zeros(2, 5, *(size or (3, 4))), torch.zeros(2, 6, 7, 2)
    axes = {axis: torch.export.Dim(f"d{axis}") for axis in (0, 2, 3)}
    points = {axis: torch.export.Dim(f"p{axis}") for axis in (1, 2)} | {0: axes[0]}
    with torch.no_grad(), quiet():
        program = torch.export.export(
            Sample(padding, align),
            (x, grid),
            dynamic_shapes=None if size else {"x": axes, "grid": points},
            strict=False,
        )
        return torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=["x", "grid"],
            custom_translation_table=TRANSLATIONS["lowered"],
            verbose=False,
        ).model_proto


@functools.cache
def session(padding, align):
    proto = translated(padding, align)
    operators = {node.op_type for graph in (proto.graph, *proto.functions) for node in graph.node}
    assert "GridSample" not in operators
    assert "Gather" in operators
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def reference(x, grid, padding, align):
    x, grid = (torch.from_numpy(array.astype(np.float64)) for array in (x, grid))
    return F.grid_sample(x, grid, "bilinear", padding, align).numpy()


def coordinates(side, align):
    """Inside, outside, far outside; the map's edges, pixels' centres, and both a pixel further out."""
    pixels = st.integers(-1, side).map(
        lambda p: 2 * p / max(side - 1, 1) - 1 if align else (2 * p + 1) / side - 1
    )
    return st.floats(-1.7, 1.7, allow_subnormal=False) | st.sampled_from((-1.0, 0.0, 1.0, -FAR, FAR)) | pixels


@st.composite
def samples(draw):
    padding, align = draw(st.sampled_from(("zeros", "border"))), draw(st.booleans())
    maps, height, width = (draw(st.integers(1, most)) for most in (3, 6, 6))
    points = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    count = maps * points[0] * points[1]
    sides = (
        draw(st.lists(coordinates(side, align), min_size=count, max_size=count)) for side in (width, height)
    )
    grid = np.stack([np.array(side, np.float32).reshape(maps, *points) for side in sides], axis=-1)
    x = np.random.default_rng(draw(st.integers(0, 9))).standard_normal((maps, 5, height, width))
    return x.astype(np.float32), grid, padding, align


@settings(RANDOM, max_examples=100)
@given(samples())
def test_sampling_is_pytorchs(sample):
    x, grid, padding, align = sample
    (actual,) = session(padding, align).run(None, {"x": x, "grid": grid})
    assert actual.dtype == np.float32
    # A pixel is 2 / side wide, so a coordinate near 1 is known to side * 6e-8 pixels.
    np.testing.assert_allclose(actual, reference(x, grid, padding, align), rtol=0, atol=1e-5)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_many_points_of_a_large_map(padding, align):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 96, 130)).astype(np.float32)
    grid = rng.uniform(-1.2, 1.2, (2, 50, 60, 2)).astype(np.float32)
    (actual,) = session(padding, align).run(None, {"x": x, "grid": grid})
    np.testing.assert_allclose(actual, reference(x, grid, padding, align), rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_coordinates_stay_float32_in_a_lower_precision(precision):
    """float16 would be half a pixel off at 1,000 pixels, and bfloat16 eight."""
    size = (4, 1500)
    lowered, _ = PRECISIONS[precision].convert(translated(size=size))
    run = onnxruntime.InferenceSession(emulated(lowered).SerializeToString())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, *size)).astype(np.float32)
    grid = rng.uniform(-1.1, 1.1, (2, 6, 7, 2)).astype(np.float32)
    (actual,) = run.run(None, {"x": x, "grid": grid})
    step = {"fp16": 2**-11, "bf16": 2**-8}[precision]
    expected = reference(x, grid, "zeros", False)
    assert 0 < np.abs(actual - expected).max() < 4 * step * np.abs(x).max()


@pytest.mark.parametrize(("interpolation", "padding"), [(1, 0), (2, 0), (0, 2)])
def test_another_kind_of_sampling_is_refused(interpolation, padding):
    with pytest.raises(ValueError, match="bilinear"):
        grid_sample(None, None, interpolation, padding, False)
