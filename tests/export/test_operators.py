"""The two own operators in standard ONNX answer as PyTorch does, on thousands of random box sets."""

import functools

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from meta_deploy.export.onnx_export import OPSET
from meta_deploy.export.operators import TRANSLATIONS
from meta_deploy.models.box_ops import nms
from meta_deploy.models.roi_align import pyramid_level, pyramid_roi_align

SETS, BOXES = 400, 40
STRIDES = [4, 8, 16, 32]
LEVEL_SIDES = (40, 150, 300, 460)  # a square RoI of each level


class Nms(nn.Module):
    def __init__(self, iou_threshold, score_threshold, max_output):
        super().__init__()
        self.settings = iou_threshold, score_threshold, max_output

    def forward(self, boxes, scores):
        return nms(boxes, scores, *self.settings)


class Pool(nn.Module):
    def __init__(self, levels, output_size):
        super().__init__()
        self.strides, self.output_size = STRIDES[:levels], output_size

    def forward(self, features, rois, batch_index):
        return pyramid_roi_align(features, rois, batch_index, self.strides, self.output_size)


def session(module, arguments, names, dynamic=None):
    """The module through the translation table, in ONNX Runtime, no pass of ours in between."""
    with torch.no_grad():
        program = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
    proto = torch.onnx.export(
        program,
        dynamo=True,
        optimize=False,
        opset_version=OPSET,
        input_names=names,
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    ).model_proto
    assert {entry.version for entry in proto.opset_import if entry.domain == ""} == {OPSET}
    assert {node.domain for node in proto.graph.node} <= {"", "pkg.onnxscript.torch_lib", "pkg.torch"}
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


@functools.cache
def nms_session(*settings):
    box_sets, box_scores = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    batch, count = torch.export.Dim("batch"), torch.export.Dim("count")
    sizes = {"boxes": {0: batch, 1: count}, "scores": {0: batch, 1: count}}
    return session(Nms(*settings), (box_sets, box_scores), ["boxes", "scores"], sizes)


@functools.cache
def pool_session(levels=4, output_size=7, batch=2):
    module = Pool(levels, output_size)
    arguments = (features(levels, batch), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    count = torch.export.Dim("count")
    dynamic = {"features": [None] * levels, "rois": {0: count}, "batch_index": {0: count}}
    names = [*(f"feature_{i}" for i in range(levels)), "rois", "batch_index"]
    return session(module, arguments, names, dynamic)


def features(levels=4, batch=2, size=512, channels=3):
    g = torch.Generator().manual_seed(levels)
    return [torch.randn(batch, channels, size // s, size // s, generator=g) for s in STRIDES[:levels]]


def agree_on_nms(boxes, scores, iou_threshold=0.5, score_threshold=0.05, max_output=10):
    """Both sides' answer, after asserting that it is one answer."""
    boxes, scores = np.asarray(boxes, np.float32), np.asarray(scores, np.float32)
    settings = iou_threshold, score_threshold, max_output
    (actual,) = nms_session(*settings).run(None, {"boxes": boxes, "scores": scores})
    expected = nms(torch.from_numpy(boxes), torch.from_numpy(scores), *settings).numpy()
    np.testing.assert_array_equal(actual, expected)
    return actual


def agree_on_pool(rois, batch_index=None, levels=4, output_size=7, batch=2):
    maps = features(levels, batch)
    rois = torch.tensor(rois, dtype=torch.float32).reshape(-1, 4)
    index = torch.zeros(len(rois), dtype=torch.int64) if batch_index is None else torch.tensor(batch_index)
    expected = pyramid_roi_align(maps, rois, index, STRIDES[:levels], output_size).numpy()
    run = pool_session(levels, output_size, batch)
    feeds = dict(
        zip([i.name for i in run.get_inputs()], [x.numpy() for x in (*maps, rois, index)], strict=True)
    )
    (actual,) = run.run(None, feeds)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    return actual


def random_boxes(rng, count, size, whole):
    corners = rng.uniform(0, size, (SETS, count, 2, 2))
    if whole:
        corners = corners.round()
    return np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1)


@pytest.mark.parametrize("settings", [(0.5, 0.05, 10), (0.7, 0.0, 1000), (0.0, 0.5, 3)])
@pytest.mark.parametrize("whole", [False, True])  # whole pixels on a small grid: ties, degenerate, identical
def test_nms_agrees_on_random_sets(settings, whole):
    rng = np.random.default_rng(hash((settings, whole)) % 2**32)
    for size in (8, 100):
        boxes = random_boxes(rng, BOXES, size, whole)
        scores = rng.uniform(-1, 1, (SETS, BOXES))
        scores = scores.round(1) if whole else scores
        kept = agree_on_nms(boxes, scores, *settings)
        assert 0 < kept.sum() < kept.size
        assert kept.sum(axis=1).max() <= settings[2]


def test_nms_of_equal_scores_keeps_the_first():
    boxes = [[[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]]]
    assert agree_on_nms(boxes, [[0.5, 0.5, 0.5]]).tolist() == [[True, False, True]]


def test_nms_of_identical_boxes_keeps_one():
    kept = agree_on_nms(np.tile([3.0, 4.0, 9.0, 8.0], (1, 100, 1)), np.linspace(0.1, 0.9, 100)[None])
    assert kept.nonzero()[1].tolist() == [99]


def test_nms_keeps_degenerate_boxes_which_overlap_nothing():
    boxes = [[[5, 5, 5, 5], [5, 5, 5, 9], [0, 0, 10, 10], [5, 5, 5, 5]]]
    assert agree_on_nms(boxes, [[0.9, 0.8, 0.7, 0.6]]).all()


def test_nms_of_nothing_above_the_threshold_keeps_nothing():
    boxes = random_boxes(np.random.default_rng(0), 5, 50, False)
    assert not agree_on_nms(boxes, np.full((SETS, 5), -1.0)).any()
    assert not agree_on_nms(boxes, np.full((SETS, 5), 0.05)).any()  # at the threshold is not above it


def test_nms_of_no_boxes_is_empty():
    assert agree_on_nms(np.zeros((2, 0, 4)), np.zeros((2, 0))).shape == (2, 0)


def test_nms_stops_at_max_output_image_by_image():
    boxes = np.stack([np.arange(40) * 20, np.zeros(40), np.arange(40) * 20 + 10, np.ones(40)], axis=-1)
    scores = np.stack([np.linspace(0.1, 1, 40), np.r_[np.full(5, 0.9), np.zeros(35)]])
    kept = agree_on_nms(np.stack([boxes, boxes]), scores)
    assert kept.sum(axis=1).tolist() == [10, 5]
    assert kept[0].nonzero()[0].tolist() == list(range(30, 40))


def test_nms_suppresses_above_the_iou_threshold_and_not_at_it():
    boxes = [[[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 5.01]]]  # IoU 0.5, and a little above
    assert agree_on_nms(boxes, [[0.9, 0.8, 0.7]]).tolist() == [[True, True, False]]


@pytest.mark.parametrize("output_size", [7, 14])
def test_roi_align_agrees_on_random_rois_of_every_level(output_size):
    rng = np.random.default_rng(output_size)
    centre, half = rng.uniform(0, 512, (600, 2)), np.exp(rng.uniform(1, np.log(400), (600, 1)))
    rois = np.concatenate([centre - half, centre + half], axis=1)
    rois[::2] = rois[::2].clip(0, 512)
    levels = pyramid_level(torch.tensor(rois), 4)
    assert torch.bincount(levels, minlength=4).min() > 10
    agree_on_pool(rois, rng.integers(0, 2, 600), output_size=output_size)


@pytest.mark.parametrize("side", LEVEL_SIDES)
def test_roi_align_agrees_when_only_one_level_has_rois(side):
    rois = [[i, 2 * i, i + side, 2 * i + side] for i in range(5)]
    assert set(pyramid_level(torch.tensor(rois, dtype=torch.float32), 4).tolist()) == {
        LEVEL_SIDES.index(side)
    }
    agree_on_pool(rois)


@pytest.mark.parametrize("absent", LEVEL_SIDES)
def test_roi_align_agrees_when_a_level_has_none(absent):
    agree_on_pool([[3, 5, 3 + side, 5 + side] for side in LEVEL_SIDES[::-1] if side != absent])


@pytest.mark.parametrize("side", [56, 112, 224, 448])
def test_roi_align_agrees_where_levels_meet(side):
    wide = [0, 0, side * 2, side / 2]
    agree_on_pool(
        [[0, 0, side, side], [0, 0, side - 0.01, side], [0, 0, side + 0.01, side], wide, [1, 1, side, side]]
    )


def test_roi_align_agrees_on_empty_thin_and_outer_rois():
    rois = [
        [0, 0, 0, 0],
        [100, 100, 100, 100],
        [10, 10, 10, 200],
        [10, 10, 200, 10],
        [512, 512, 512, 512],
        [500, 500, 512, 512],
        [0, 0, 512, 512],
        [-40, -40, 30, 30],
        [480, 480, 600, 600],
        [0, 0, 1e-3, 1e-3],
    ]
    pooled = agree_on_pool(rois)
    assert not pooled[[0, 1, 4]].any()


def test_roi_align_keeps_the_order_of_rois_and_their_images():
    rng = np.random.default_rng(5)
    rois = np.array([[10, 10, 10 + s, 10 + s] for s in LEVEL_SIDES * 3])
    order, index = rng.permutation(12), np.arange(12) % 3
    pooled = agree_on_pool(rois, index, batch=3)
    np.testing.assert_array_equal(agree_on_pool(rois[order], index[order], batch=3), pooled[order])


def test_roi_align_of_no_rois_is_empty():
    assert agree_on_pool(np.zeros((0, 4)), np.zeros(0, np.int64)).shape == (0, 3, 7, 7)


def test_roi_align_works_on_two_levels():
    agree_on_pool([[0, 0, s, s] for s in LEVEL_SIDES], levels=2)
