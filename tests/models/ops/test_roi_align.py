"""RoIAlign: against ONNX Runtime's operator, a loop over single samples, and finite differences."""

import functools

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from meta_deploy.models.ops import roi_align as module
from meta_deploy.models.ops.roi_align import gathered_roi_align, pyramid_level, pyramid_roi_align, roi_align
from tests.models import references as ref

STRIDES = [4, 8, 16, 32]


def rois_of(kind, H, W, rng, count=12):
    """RoIs in input pixels on an H x W image."""
    if kind == "ordinary":
        corner, size = rng.uniform(0, 0.7, (count, 2)), rng.uniform(0.05, 0.3, (count, 2))
    elif kind == "tiny":
        corner, size = rng.uniform(0, 1, (count, 2)), rng.uniform(0, 1e-3, (count, 2))
    elif kind == "zero-size":
        corner, size = rng.uniform(0, 1, (count, 2)), np.zeros((count, 2))
        size[::3, 0] = 0.2  # lines among the points
        size[1::3, 1] = 0.2
    elif kind == "elongated":
        corner, size = rng.uniform(0, 0.1, (count, 2)), np.tile([[0.9, 0.01], [0.02, 0.85]], (count // 2, 1))
    elif kind == "outside":
        corner, size = rng.uniform(-1, 1.5, (count, 2)), rng.uniform(0.1, 0.6, (count, 2))
    else:
        corner, size = np.zeros((count, 2)), np.ones((count, 2))  # "whole"
    boxes = np.concatenate([corner, corner + size], axis=1) * np.array([W, H, W, H])
    return boxes.astype(np.float32)


KINDS = ["ordinary", "tiny", "zero-size", "elongated", "outside", "whole"]


@functools.cache
def onnx_roi_align_session(bins, stride):
    node = helper.make_node(
        "RoiAlign",
        ["x", "rois", "index"],
        ["y"],
        coordinate_transformation_mode="half_pixel",
        mode="avg",
        output_height=bins,
        output_width=bins,
        sampling_ratio=0,
        spatial_scale=1.0 / stride,
    )
    graph = helper.make_graph(
        [node],
        "roi_align",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * 4),
            helper.make_tensor_value_info("rois", TensorProto.FLOAT, [None, 4]),
            helper.make_tensor_value_info("index", TensorProto.INT64, [None]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def onnx_roi_align(feature, rois, batch_index, bins, stride):
    """ONNX Runtime's RoiAlign: (B, C, H, W), (R, 4), (R,) -> (R, C, bins, bins)."""
    feed = {"x": feature, "rois": rois, "index": batch_index}
    return onnx_roi_align_session(bins, stride).run(None, feed)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(9, 13), (16, 8), (1, 1)])
def test_roi_align_is_onnx_runtimes(kind, size):
    rng = np.random.default_rng(0)
    feature = rng.normal(size=(1, 5, *size)).astype(np.float32)
    for bins, stride in ((7, 4), (14, 8), (2, 32)):
        rois = rois_of(kind, size[0] * stride, size[1] * stride, rng)
        expected = onnx_roi_align(feature, rois, np.zeros(len(rois), np.int64), bins, stride)
        got = roi_align(torch.from_numpy(feature[0]), torch.from_numpy(rois), bins, stride)
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_roi_align_is_the_loop_over_samples(kind):
    rng = np.random.default_rng(1)
    feature = rng.normal(size=(2, 6, 9))
    for bins, stride in ((7, 4), (3, 8)):
        rois = rois_of(kind, 6 * stride, 9 * stride, rng, count=6).astype(np.float64)
        expected = [ref.roi_align(feature, roi, bins, stride) for roi in rois]
        got = roi_align(torch.from_numpy(feature), torch.from_numpy(rois), bins, stride)
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


def test_a_roi_over_one_pixel_of_a_ramp_is_read_at_bin_centres():
    """On f(x, y) = x every bin's mean is its own centre; pixel i's centre lies at (i + 1/2) * stride."""
    feature = torch.arange(16.0).expand(1, 16, 16)
    rois = torch.tensor([[16.0, 16.0, 48.0, 48.0]])
    got = roi_align(feature, rois, 4, 4)[0, 0]
    expected = torch.tensor([5.0, 7.0, 9.0, 11.0]) - 0.5
    torch.testing.assert_close(got, expected.expand(4, 4))


def test_an_empty_roi_pools_to_zero():
    rois = torch.tensor([[8.0, 8, 8, 8], [8, 8, 8, 30], [0, 0, 0, 0]])
    assert roi_align(torch.ones(3, 16, 16), rois, 7, 4).abs().max() == 0


def test_no_rois_give_an_empty_result():
    features = [torch.ones(2, 3, 64 // s, 64 // s) for s in STRIDES]
    none = torch.zeros(0, dtype=torch.int64)
    assert roi_align(features[0][0], torch.zeros(0, 4), 7, 4).shape == (0, 3, 7, 7)
    assert pyramid_roi_align(features, torch.zeros(0, 4), none, STRIDES, 7).shape == (0, 3, 7, 7)


def test_pieces_do_not_change_the_result():
    torch.manual_seed(0)
    rois = torch.from_numpy(rois_of("ordinary", 64, 64, np.random.default_rng(0), count=30))
    small, large = torch.randn(2, 64, 64), torch.randn(2**9, 64, 64)  # the large one is cut into pieces
    large[:2] = small
    together, one_by_one = roi_align(large, rois.repeat(3, 1), 7, 1)[:30, :2], []
    for roi in rois:
        one_by_one.append(roi_align(small, roi[None], 7, 1))
    torch.testing.assert_close(together, torch.cat(one_by_one))


# --- levels ---


def test_levels_change_where_mmdetections_do():
    """floor(log2(sqrt(area) / 56 + 1e-6)), clamped: a side of 112, 224, 448 begins the next level."""
    sides = [0.0, 1.0, 56.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0]
    rois = torch.tensor([[3.0, 5.0, 3.0 + s, 5.0 + s] for s in sides])
    assert pyramid_level(rois, 4).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    flat = torch.tensor([[0.0, 0.0, 12544.0, 1.0]])  # as large as 112 x 112
    assert pyramid_level(flat, 4).tolist() == [1]


@pytest.mark.parametrize("bins", [7, 14])
def test_each_roi_is_pooled_from_the_level_of_its_size_and_its_own_image(bins):
    rng = np.random.default_rng(0)
    side = 512
    features = [rng.normal(size=(2, 3, side // s, side // s)).astype(np.float32) for s in STRIDES]
    size = np.array([20, 50, 100, 111, 113, 160, 220, 225, 300, 440, 449, 512] * 2, np.float32)
    corner = rng.uniform(0, 1, (24, 2)).astype(np.float32) * (side - size[:, None])
    rois = np.concatenate([corner, corner + size[:, None]], axis=1)
    batch_index = rng.integers(0, 2, 24)
    level = np.clip(np.floor(np.log2(size / 56 + 1e-6)), 0, 3).astype(int)
    assert set(level) == {0, 1, 2, 3}
    got = pyramid_roi_align(
        [torch.from_numpy(f) for f in features],
        torch.from_numpy(rois),
        torch.from_numpy(batch_index),
        STRIDES,
        bins,
    )
    for i in range(24):
        feature, stride = features[level[i]], STRIDES[level[i]]
        expected = onnx_roi_align(feature, rois[i : i + 1], batch_index[i : i + 1], bins, stride)[0]
        np.testing.assert_allclose(got[i].numpy(), expected, atol=5e-5)


def test_the_exported_operator_computes_the_same():
    torch.manual_seed(0)
    features = [torch.randn(2, 3, 64 // s, 64 // s) for s in STRIDES]
    rois, index = torch.rand(9, 4) * 30, torch.randint(0, 2, (9,))
    rois[:, 2:] += rois[:, :2]
    got = module._exported(features, rois, index, STRIDES, 7)
    assert torch.equal(got, pyramid_roi_align(features, rois, index, STRIDES, 7))
    torch.library.opcheck(module._exported, (features, rois, index, STRIDES, 7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins", [7, 14])
@pytest.mark.parametrize("piece", [1, 2**26])
def test_the_gpus_form_computes_the_same_and_so_do_its_gradients(kind, bins, piece, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", piece)
    rng = np.random.default_rng(2)
    rois = torch.from_numpy(
        np.concatenate([rois_of(kind, 200, 260, rng), rois_of(kind, 40, 50, rng)])
    ).double()
    index = torch.arange(len(rois)) % 2
    features = [
        torch.randn(2, 3, 192 // s, 256 // s, dtype=torch.float64, requires_grad=True) for s in STRIDES
    ]
    want = pyramid_roi_align(features, rois, index, STRIDES, bins)
    got = gathered_roi_align(features, rois, index, STRIDES, bins)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    direction = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, features, direction),
        torch.autograd.grad(want, features, direction, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_gpus_form_of_no_rois_is_empty():
    features = [torch.ones(2, 3, 64 // s, 64 // s) for s in STRIDES]
    none = torch.zeros(0, dtype=torch.int64)
    assert gathered_roi_align(features, torch.zeros(0, 4), none, STRIDES, 7).shape == (0, 3, 7, 7)


# --- gradients ---


@pytest.mark.parametrize("kind", ["ordinary", "outside", "elongated"])
def test_gradients_with_respect_to_the_map_are_the_finite_differences(kind):
    rois = torch.from_numpy(rois_of(kind, 24, 20, np.random.default_rng(0), count=4)).double()
    feature = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, 3, 4), feature)


def test_gradients_reach_every_level_that_a_roi_uses_and_no_other():
    features = [torch.randn(1, 2, 256 // s, 256 // s, requires_grad=True) for s in STRIDES]
    rois = torch.tensor([[0.0, 0, 40, 40], [0, 0, 240, 230]])  # levels 0 and 2
    pyramid_roi_align(features, rois, torch.zeros(2, dtype=torch.int64), STRIDES, 7).sum().backward()
    reached = [f.grad is not None and bool((f.grad != 0).any()) for f in features]
    assert reached == [True, False, True, False]
    # The weights of a bin sum to one, so the gradient of the sum is the number of bins.
    torch.testing.assert_close(features[0].grad.sum(), torch.tensor(2 * 49.0))
