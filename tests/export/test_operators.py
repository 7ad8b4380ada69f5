"""The two own operators in both ONNX forms answer as PyTorch does, on thousands of random box sets.

Where the lowered form is documented as inexact, what it promises is tested.
"""

import functools

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from meta_deploy.export import lowered_operators
from meta_deploy.export.lowered_operators import MOST_BOXES, ROUNDS
from meta_deploy.export.operators import TRANSLATIONS
from meta_deploy.export.trace import OPSET, quiet
from meta_deploy.models.ops.boxes import nms
from meta_deploy.models.ops.roi_align import pyramid_level, pyramid_roi_align
from meta_deploy.targets.tensorrt.build import available, build_engine

SETS, BOXES = 400, 40
STRIDES = [4, 8, 16, 32]
LEVEL_SIDES = (40, 150, 300, 460)  # a square RoI of each level
SIZES = [
    (544, 800),
    (96, 160),
    (512, 512),
]  # the first has maps of odd sides, all but the last are not square
FORMS = ("native", "lowered")
# What waits for a count, or is not everywhere; the lowered form is to have none of it.
UNWANTED = {"NonMaxSuppression", "RoiAlign", "NonZero", "Compress", "Unique", "Loop", "If", "Scan"}


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


def translated(form, module, arguments, names, dynamic=None):
    """The module through the translation table, no pass of ours in between."""
    with torch.no_grad(), quiet():
        program = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
        proto = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=names,
            custom_translation_table=TRANSLATIONS[form],
            verbose=False,
        ).model_proto
    assert {entry.version for entry in proto.opset_import if entry.domain == ""} == {OPSET}
    assert {node.domain for node in proto.graph.node} <= {"", "pkg.onnxscript.torch_lib", "pkg.torch"}
    operators = {node.op_type for graph in (proto.graph, *proto.functions) for node in graph.node}
    assert form == "native" or not operators & UNWANTED
    return proto


def session(*arguments):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        translated(*arguments).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@functools.cache
def nms_session(form, count, *settings):
    """For any batch; the native form for any number of boxes too."""
    count = count if form == "lowered" else 3
    box_sets, box_scores = torch.zeros(2, count, 4), torch.zeros(2, count)
    sizes = {0: torch.export.Dim("batch")}
    if form == "native":
        sizes[1] = torch.export.Dim("count")
    return session(
        form,
        Nms(*settings),
        (box_sets, box_scores),
        ["boxes", "scores"],
        {"boxes": dict(sizes), "scores": dict(sizes)},
    )


@functools.cache
def pool_session(form, levels, output_size, batch, size):
    arguments = (features(levels, batch, size), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    count = torch.export.Dim("count")
    dynamic = {"features": [None] * levels, "rois": {0: count}, "batch_index": {0: count}}
    names = [*(f"feature_{i}" for i in range(levels)), "rois", "batch_index"]
    return session(form, Pool(levels, output_size), arguments, names, dynamic)


def features(levels=4, batch=2, size=(512, 512), channels=3):
    g = torch.Generator().manual_seed(levels)
    return [torch.randn(batch, channels, size[0] // s, size[1] // s, generator=g) for s in STRIDES[:levels]]


def run_nms(form, boxes, scores, *settings):
    """What a form keeps, and the reference."""
    boxes, scores = np.asarray(boxes, np.float32), np.asarray(scores, np.float32)
    run = nms_session(form, 3 if form == "native" else boxes.shape[1], *settings)
    (actual,) = run.run(None, {"boxes": boxes, "scores": scores})
    return actual, nms(torch.from_numpy(boxes), torch.from_numpy(scores), *settings).numpy()


def agree_on_nms(boxes, scores, iou_threshold=0.5, score_threshold=0.05, max_output=10):
    """All sides' answer, after asserting that it is one answer."""
    for form in FORMS:
        actual, expected = run_nms(form, boxes, scores, iou_threshold, score_threshold, max_output)
        np.testing.assert_array_equal(actual, expected, err_msg=form)
    return actual


def run_pool(form, maps, rois, index, output_size, size):
    """What a form makes of the RoIs, and the reference."""
    rois = torch.as_tensor(rois, dtype=torch.float32).reshape(-1, 4)
    index = torch.zeros(len(rois), dtype=torch.int64) if index is None else torch.as_tensor(index)
    expected = pyramid_roi_align(maps, rois, index, STRIDES[: len(maps)], output_size).numpy()
    run = pool_session(form, len(maps), output_size, len(maps[0]), size)
    feeds = zip([i.name for i in run.get_inputs()], [x.numpy() for x in (*maps, rois, index)], strict=True)
    (actual,) = run.run(None, dict(feeds))
    return actual, expected


def agree_on_pool(rois, index=None, levels=4, output_size=7, batch=2, size=(512, 512), forms=FORMS):
    maps = features(levels, batch, size)
    for form in forms:
        actual, expected = run_pool(form, maps, rois, index, output_size, size)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4, err_msg=form)
    return actual


def has_samples_enough(rois, levels, output_size):
    """Where the lowered RoIAlign is exact: as many samples on an axis as its pixels have pairs."""
    rois = torch.as_tensor(rois, dtype=torch.float32)
    stride = torch.tensor(STRIDES, dtype=torch.float32)[pyramid_level(rois, levels)]
    pixels = torch.ceil((rois[:, 2:] - rois[:, :2]) / stride[:, None] / output_size)  # of a bin
    pairs = torch.ceil((pixels + 1) / 2)
    most = lowered_operators._taps(output_size)
    return ((pairs.prod(dim=1) <= most) & (pairs.max(dim=1)[0] <= 2 * most // 3)).numpy()


def rois_inside(rng, count, size, aspects=(0.5, 2.0)):
    """Of all sizes, (count, 4), inside an image of (H, W); a quarter of them touch its border."""
    H, W = size
    area = np.exp(rng.uniform(np.log(4), np.log(H * W), count))
    area[::2] = rng.uniform(0, H * W, count)[::2]
    aspect = np.exp(rng.uniform(*np.log(aspects), count))
    width, height = np.sqrt(area * aspect).clip(max=W), np.sqrt(area / aspect).clip(max=H)
    x, y = rng.uniform(0, 1, (2, count))
    x[::8], y[1::8], x[2::16], y[3::16] = 0, 1, 1, 0
    x, y = x * (W - width), y * (H - height)
    corners = np.stack([x, y, x + width, y + height], axis=1)
    return corners.clip(0, [W, H, W, H]).astype(np.float32)


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


def chain(count):
    """Boxes in the order of their scores; each suppresses the next one, and no other, at an IoU of 0.5."""
    left = 3.0 * np.arange(count)
    boxes = np.stack([left, 0 * left, left + 10, 0 * left + 10], axis=1)
    return boxes[None], np.linspace(1, 0.1, count)[None]


@pytest.mark.parametrize("order", ["best first", "shuffled"])
def test_nms_settles_chains_of_as_many_boxes_as_there_are_rounds_and_one(order):
    boxes, scores = chain(ROUNDS + 1)
    if order == "shuffled":
        place = np.random.default_rng(0).permutation(ROUNDS + 1)
        boxes, scores = boxes[:, place], scores[:, place]
    assert agree_on_nms(boxes, scores, max_output=1000).sum() == (ROUNDS + 2) // 2


@pytest.mark.parametrize("count", [ROUNDS + 2, ROUNDS + 3, 100])
def test_the_lowered_nms_leaves_out_what_is_behind_a_longer_chain(count):
    actual, greedy = run_nms("lowered", *chain(count), 0.5, 0.05, 1000)
    assert greedy[0].nonzero()[0].tolist() == list(range(0, count, 2))
    assert actual[0].nonzero()[0].tolist() == list(range(0, ROUNDS + 1, 2))
    # Other boxes are not touched by it.
    boxes, scores = chain(count)
    boxes, scores = np.concatenate([boxes, boxes[:, :3] + 1000], axis=1), np.r_[scores[0], 0.9, 0.8, 0.7]
    actual, _ = run_nms("lowered", boxes, scores[None], 0.5, 0.05, 1000)
    assert actual[0, count:].tolist() == [True, False, True]


def test_the_lowered_nms_keeps_none_that_the_greedy_does_not():
    rng = np.random.default_rng(1)
    # As in `chain`, with gaps here and there: chains of all lengths.
    left = np.cumsum(rng.choice([3.0, 20.0], (SETS, 80), p=[0.9, 0.1]), axis=1)
    boxes = np.stack([left, 0 * left, left + 10, 0 * left + 10], axis=2)
    actual, greedy = run_nms("lowered", boxes, np.tile(np.linspace(1, 0.1, 80), (SETS, 1)), 0.5, 0.05, 1000)
    assert not (actual & ~greedy).any()
    assert 0 < (actual != greedy).any(axis=1).sum() < SETS  # some of the chains are too long, not all


def test_the_lowered_nms_looks_at_the_best_of_too_many_boxes():
    count = MOST_BOXES + 152
    rng = np.random.default_rng(2)
    corners = rng.uniform(0, 1000, (1, count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 60, (1, count, 2))], axis=2)
    scores = rng.permutation(np.linspace(0.1, 1, count))[None]
    # Enough among the best of them: the greedy answer.
    actual, greedy = run_nms("lowered", boxes, scores, 0.5, 0.05, 100)
    assert actual.sum() == 100
    np.testing.assert_array_equal(actual, greedy)
    # Not enough: the rest is left out.
    actual, greedy = run_nms("lowered", boxes, scores, 0.5, 0.05, count)
    best = scores >= np.sort(scores)[0, -MOST_BOXES]
    np.testing.assert_array_equal(actual, greedy & best)
    assert (greedy & ~best).any()


def test_nms_of_ties_beyond_the_best_keeps_the_first():
    count = MOST_BOXES + 100
    place = np.arange(count) * 20.0
    boxes = np.stack([place, 0 * place, place + 10, 0 * place + 10], axis=1)[None]
    actual, greedy = run_nms("lowered", boxes, np.full((1, count), 0.5), 0.5, 0.05, count)
    assert actual[0].nonzero()[0].tolist() == list(range(MOST_BOXES))
    assert greedy.all()


def test_nms_of_boxes_that_touch_and_of_those_at_the_border():
    side, nothing = [0, 0, 10, 10], [10, 0, 20, 10]
    assert agree_on_nms([[side, nothing, [0, 10, 10, 20]]], [[0.9, 0.8, 0.7]], iou_threshold=0.0).all()
    whole = [[[0, 0, 800, 544], [0, 0, 800, 543], [799, 543, 800, 544], [0, 0, 0, 544]]]
    assert agree_on_nms(whole, [[0.9, 0.8, 0.7, 0.6]]).tolist() == [[True, False, True, True]]


def test_the_lowered_nms_wants_a_number_of_boxes_that_is_known():
    count = torch.export.Dim("count")
    with pytest.raises(Exception, match="known in advance") as error:
        translated(
            "lowered",
            Nms(0.5, 0.05, 10),
            (torch.zeros(2, 3, 4), torch.zeros(2, 3)),
            ["boxes", "scores"],
            {"boxes": {1: count}, "scores": {1: count}},
        )
    chain_of = [error.value]
    while chain_of[-1].__cause__ is not None:
        chain_of.append(chain_of[-1].__cause__)
    assert any(isinstance(e, ValueError) for e in chain_of)


@pytest.mark.parametrize("output_size", [7, 14])
def test_the_native_roi_align_agrees_on_random_rois_of_every_level(output_size):
    rng = np.random.default_rng(output_size)
    centre, half = rng.uniform(0, 512, (600, 2)), np.exp(rng.uniform(1, np.log(400), (600, 1)))
    rois = np.concatenate([centre - half, centre + half], axis=1)
    rois[::2] = rois[::2].clip(0, 512)
    levels = pyramid_level(torch.tensor(rois), 4)
    assert torch.bincount(levels, minlength=4).min() > 10
    agree_on_pool(rois, rng.integers(0, 2, 600), output_size=output_size, forms=["native"])


@pytest.mark.parametrize(
    ("output_size", "size", "batch"), [*((p, size, 2) for p in (7, 14) for size in SIZES), (7, SIZES[0], 1)]
)
def test_roi_align_agrees_on_random_rois_inside_the_image(output_size, size, batch):
    rng = np.random.default_rng(output_size + batch)
    rois = rois_inside(rng, 400, size, aspects=(1 / 3, 3))
    rois = rois[has_samples_enough(rois, 4, output_size)]
    assert len(rois) > 300
    levels = pyramid_level(torch.tensor(rois), 4)
    assert torch.bincount(levels, minlength=4)[: 4 if size[0] > 96 else 2].min() > 5
    agree_on_pool(rois, rng.integers(0, batch, len(rois)), batch=batch, output_size=output_size, size=size)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_roi_align_agrees_on_fewer_levels(levels):
    rng = np.random.default_rng(levels)
    rois = rois_inside(rng, 300, (544, 800))
    rois = rois[has_samples_enough(rois, levels, 7)]
    assert set(pyramid_level(torch.tensor(rois), levels).tolist()) == set(range(levels))
    forms = FORMS if levels > 1 else ["lowered"]
    agree_on_pool(rois, rng.integers(0, 2, len(rois)), levels=levels, size=(544, 800), forms=forms)


@pytest.mark.parametrize("output_size", [7, 14])
def test_square_rois_and_those_of_1_to_2_always_have_samples_enough(output_size):
    rng = np.random.default_rng(0)
    rois = rois_inside(rng, 2000, (896, 896), aspects=(0.5, 2))  # 896 is the last level's limit
    sides = rois[:, 2:] - rois[:, :2]
    assert has_samples_enough(rois[sides.max(axis=1) <= 2 * sides.min(axis=1)], 4, output_size).all()


@pytest.mark.parametrize("aspect", [32, 1 / 32])
@pytest.mark.parametrize("output_size", [7, 14])
def test_the_lowered_roi_align_agrees_on_elongated_rois_of_the_finest_levels(aspect, output_size):
    rng = np.random.default_rng(7)
    rois = rois_inside(rng, 400, (544, 800), aspects=(aspect, aspect))
    exact = has_samples_enough(rois, 4, output_size)
    assert exact.sum() > 50
    agree_on_pool(rois[exact], size=(544, 800), output_size=output_size)


@pytest.mark.parametrize("aspects", [(1 / 64, 64), (32, 32), (1 / 32, 1 / 32)])
@pytest.mark.parametrize("output_size", [7, 14])
def test_the_lowered_roi_align_stays_a_mean_where_its_samples_are_too_few(aspects, output_size):
    size = (544, 800)
    rng = np.random.default_rng(11)
    rois = rois_inside(rng, 600, size, aspects)
    # A level fewer leaves large RoIs on a map that is too fine for them.
    rois = rois[~has_samples_enough(rois, 3, output_size)]
    assert len(rois) > 20
    noise, constant = features(3, 2, size), [torch.full_like(x, 3.0) for x in features(3, 2, size)]
    actual, expected = run_pool("lowered", noise, rois, None, output_size, size)
    assert np.isfinite(actual).all()
    for channel in range(3):  # no mean leaves the range of its numbers
        values = torch.cat([x[0, channel].flatten() for x in noise])
        assert values.min() <= actual[:, channel].min() <= actual[:, channel].max() <= values.max()
    assert np.abs(actual - expected).mean() < 0.5 * np.abs(expected).mean() + 0.1  # of white noise
    actual, expected = run_pool("lowered", constant, rois, None, output_size, size)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    # Of what changes slowly, as features do, a few samples are as good as all.
    actual, expected = run_pool("lowered", waves(3, size), rois, None, output_size, size)
    assert np.abs(actual - expected).max() < 0.05


def waves(levels, size):
    """Maps whose values change over hundreds of pixels of the image, between -1 and 1."""
    maps = []
    for stride in STRIDES[:levels]:
        y, x = (torch.arange(0, side, stride) + stride / 2 for side in size)
        grid = [torch.sin(x / 100)[None] * torch.ones_like(y)[:, None], torch.cos(y / 80)[:, None] + 0 * x]
        maps.append(torch.stack([*grid, grid[0] * grid[1]])[None].expand(2, -1, -1, -1).contiguous())
    return maps


def test_roi_align_agrees_on_special_rois_inside_maps_of_odd_sides():
    H, W = 544, 800
    empty = [[0, 0, 0, 0], [W, H, W, H], [W / 2, 0, W / 2, H], [0, 9, W, 9], [W, 0, W, 40]]
    rois = [
        *([0, 0, W, H], [0, 0, 1, 1], [W - 1, H - 1, W, H], [W - 0.01, 0, W, 0.01]),
        *([300, 200, 300.5, 200.25], [0, 0, 128, 4], [W - 4, H - 128, W, H]),
        *([W - 40, 0, W, 40], [0, H - 200, 200, H], [W - 300, H - 300, W, H], [W - 460, 0, W, 460]),
    ]
    assert has_samples_enough(rois, 4, 7).all()
    pooled = agree_on_pool(empty + rois, size=(H, W))
    assert not pooled[: len(empty)].any()


def test_roi_align_of_one_level_does_not_read_its_neighbours():
    size = (96, 160)
    rng = np.random.default_rng(3)
    rois = rois_inside(rng, 200, size)
    rois = rois[has_samples_enough(rois, 4, 7)]
    level, index = pyramid_level(torch.tensor(rois), 4).numpy(), rng.integers(0, 2, len(rois))
    maps = features(4, 2, size)
    for i in range(4):  # all but one map of one image are infinitely far from their neighbours
        for b in range(2):
            loud = [torch.full_like(x, 1e6) for x in maps]
            loud[i][b] = maps[i][b]
            mine = (level == i) & (index == b)
            actual, expected = run_pool("lowered", loud, rois, index, 7, size)
            # The least step of float32 between two maps, times a million.
            np.testing.assert_allclose(actual[mine], expected[mine], atol=40)


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
        [[0, 0, side, side], [0, 0, side - 0.01, side], [0, 0, side + 0.01, side], wide, [1, 1, side, side]],
        size=(1024, 1024),
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
    inside = [i for i, roi in enumerate(rois) if min(roi) >= 0 and max(roi) <= 512]
    pooled = agree_on_pool(rois, forms=["native"])
    assert not pooled[[0, 1, 4]].any()
    np.testing.assert_allclose(agree_on_pool(np.array(rois)[inside]), pooled[inside], atol=1e-4)


def test_roi_align_keeps_the_order_of_rois_and_their_images():
    rng = np.random.default_rng(5)
    rois = np.array([[10, 10, 10 + s, 10 + s] for s in LEVEL_SIDES * 3])
    order, index = rng.permutation(12), np.arange(12) % 3
    pooled = agree_on_pool(rois, index, batch=3)
    np.testing.assert_array_equal(agree_on_pool(rois[order], index[order], batch=3), pooled[order])


def test_roi_align_of_no_rois_is_empty():
    assert agree_on_pool(np.zeros((0, 4)), np.zeros(0, np.int64)).shape == (0, 3, 7, 7)


@pytest.mark.skipif(not available("tensorrt-rtx"), reason="tensorrt-rtx is not installed")
def test_tensorrt_builds_the_lowered_forms():
    size, boxes, rois = (96, 160), torch.zeros(2, 50, 4), torch.zeros(20, 4)
    index = torch.zeros(20, dtype=torch.int64)
    proto = translated("lowered", Nms(0.5, 0.05, 10), (boxes, boxes[..., 0]), ["boxes", "scores"])
    assert build_engine(proto.SerializeToString(), "tensorrt-rtx", []).plan
    names = [*(f"feature_{i}" for i in range(4)), "rois", "batch_index"]
    proto = translated("lowered", Pool(4, 7), (features(4, 2, size), rois, index), names)
    layers = build_engine(proto.SerializeToString(), "tensorrt-rtx", []).section().layers
    assert layers is None or layers < 30
