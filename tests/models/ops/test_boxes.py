"""Box arithmetic: against hand values, MMDetection's documented ones, O(n^2) loops and ONNX Runtime."""

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from meta_deploy.models.ops import boxes as box_ops
from meta_deploy.models.ops.boxes import (
    INVALID,
    box_iou,
    decode_boxes,
    encode_boxes,
    has_area,
    nms,
    nms_in_parallel,
    select_top,
    separate,
    take,
)
from tests.models import references as ref

ONES = (1.0, 1.0, 1.0, 1.0)
STDS = (0.1, 0.1, 0.2, 0.2)


def boxes_of(kind, count, rng):
    """Box sets with what trips an NMS: overlaps, exact ties, copies, shared edges, no area."""
    if kind == "spread":
        corner, size = rng.uniform(0, 100, (count, 2)), rng.uniform(1, 60, (count, 2))
    elif kind == "clustered":
        corner, size = rng.normal(50, 4, (count, 2)), rng.normal(30, 3, (count, 2))
    elif kind == "lattice":  # integer corners: many equal boxes, many that touch, IoUs of exactly 1/2
        corner, size = rng.integers(0, 4, (count, 2)) * 10.0, rng.integers(1, 3, (count, 2)) * 10.0
    elif kind == "degenerate":  # lines and points among the boxes
        corner, size = rng.integers(0, 5, (count, 2)) * 1.0, rng.integers(0, 3, (count, 2)) * 1.0
    else:
        corner, size = np.full((count, 2), 7.0), np.full((count, 2), 5.0)  # "identical"
    return np.concatenate([corner, corner + size], axis=1).astype(np.float32)


def scores_of(count, rng, tied):
    return (rng.integers(0, 6, count) / 5 if tied else rng.uniform(0, 1, count)).astype(np.float32)


KINDS = ["spread", "clustered", "lattice", "degenerate", "identical"]


# --- overlap ---


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 2, 8]])
    b = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [20, 20, 30, 30], [0, 0, 8, 2]])
    expected = torch.tensor([1, 1 / 3, 0, 0, 4 / 28])
    torch.testing.assert_close(box_iou(a, b).diagonal(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_iou_of_every_pair_is_the_loops(kind):
    rng = np.random.default_rng(0)
    a, b = boxes_of(kind, 12, rng).astype(np.float64), boxes_of(kind, 9, rng).astype(np.float64)
    expected = [[ref.iou(p, q) for q in b] for p in a]
    got = box_iou(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


def test_iou_keeps_leading_dimensions():
    a, b = torch.rand(2, 5, 4), torch.rand(2, 3, 4)
    a[..., 2:] += a[..., :2]
    b[..., 2:] += b[..., :2]
    got = box_iou(a, b)
    assert got.shape == (2, 5, 3)
    torch.testing.assert_close(got[1], box_iou(a[1], b[1]))
    assert box_iou(a[0], b[0, :0]).shape == (5, 0)


# --- coding ---


def test_decoding_gives_mmdetections_documented_values():
    """The example of mmdet.core.bbox.coder.delta_xywh_bbox_coder.delta2bbox, printed to four digits."""
    rois = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [5, 5, 5, 5]])
    deltas = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 2, -1], [0.7, -1.9, -0.5, 0.3]])
    expected = [[0.0, 0, 1, 1], [0.1409, 0.1409, 2.8591, 2.8591], [0, 0.3161, 4.1945, 0.6839], [5, 5, 5, 5]]
    got = decode_boxes(rois, deltas, ONES, (32, 32))
    np.testing.assert_allclose(got.numpy(), expected, atol=5e-5)


@pytest.mark.parametrize("stds", [ONES, STDS])
def test_decoding_is_the_equations(stds):
    rng = np.random.default_rng(0)
    boxes = boxes_of("spread", 40, rng).astype(np.float64)
    deltas = rng.normal(0, 3, (40, 4))
    expected = [ref.decode(b, d, stds, (90, 120)) for b, d in zip(boxes, deltas, strict=True)]
    got = decode_boxes(torch.from_numpy(boxes), torch.from_numpy(deltas), stds, (90, 120))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_zero_deltas_leave_a_box_where_it_is():
    box = torch.tensor([[3.0, 4, 10, 20]])
    assert torch.equal(decode_boxes(box, torch.zeros(1, 4), STDS, (64, 64)), box)


def test_a_side_grows_by_a_thousand_sixteenths_at_most():
    box = torch.tensor([[500.0, 500, 508, 508]])
    x1, y1, x2, y2 = decode_boxes(box, torch.tensor([[0.0, 0, 50, -50]]), ONES, (2000, 2000))[0].tolist()
    assert x2 - x1 == pytest.approx(8 * 1000 / 16, rel=1e-4)
    assert y2 - y1 == pytest.approx(8 * 16 / 1000, rel=1e-2)


def test_decoded_boxes_are_clipped_to_height_and_width():
    box = torch.tensor([[10.0, 10, 30, 30]])
    far = decode_boxes(box, torch.tensor([[0.0, 0, 3, 3]]), ONES, (50, 70))
    assert far.tolist() == [[0, 0, 70, 50]]
    outside = decode_boxes(box, torch.tensor([[9.0, -9, 0, 0]]), ONES, (50, 70))
    assert outside.tolist() == [[70, 0, 70, 0]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 80)] * 2, *[st.floats(1, 40)] * 2), min_size=2, max_size=2))
@pytest.mark.parametrize("stds", [ONES, STDS])
def test_decoding_undoes_encoding(stds, sizes):
    corners = torch.tensor(sizes, dtype=torch.float64)
    box, target = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], dim=1)[:, None]
    back = decode_boxes(box, encode_boxes(box, target, stds), stds, (128, 128))
    torch.testing.assert_close(back, target)


def test_encoding_by_hand():
    box, target = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 10, 25, 20]])
    expected = torch.tensor([[1.0, 0.25, np.log(2), np.log(0.5)]], dtype=torch.float32)
    torch.testing.assert_close(encode_boxes(box, target, ONES), expected)
    torch.testing.assert_close(encode_boxes(box, target, STDS), expected / torch.tensor(STDS))


def test_boxes_of_many_classes_are_decoded_from_one_proposal():
    boxes, deltas = torch.tensor(boxes_of("spread", 6, np.random.default_rng(0))), torch.randn(6, 3, 4)
    together = decode_boxes(boxes[:, None], deltas, STDS, (128, 128))
    for c in range(3):
        torch.testing.assert_close(together[:, c], decode_boxes(boxes, deltas[:, c], STDS, (128, 128)))


def test_lines_points_and_inside_out_boxes_have_no_area():
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0, 5], [0, 0, 5, 0], [2, 2, 2, 2], [5, 5, 1, 9]])
    assert has_area(boxes).tolist() == [True, False, False, False, False]


# --- selection ---


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda b: st.integers(1, 12).flatmap(
            lambda n: st.lists(
                st.lists(st.floats(-1, 1, width=32), min_size=n, max_size=n), min_size=b, max_size=b
            )
        )
    ),
    st.integers(1, 15),
)
def test_select_top_is_a_sort_padded_with_invalid(rows, k):
    scores = torch.tensor(rows)
    values, index = select_top(scores, k)
    assert values.shape == index.shape == (len(rows), k)
    assert index.dtype == torch.int64
    assert ((index >= 0) & (index < scores.shape[1])).all()
    for row, value, place in zip(rows, values.tolist(), index.tolist(), strict=True):
        expected = sorted(np.float32(row).tolist(), reverse=True)[:k]
        assert value == expected + [INVALID] * (k - len(expected))
        real = [i for v, i in zip(value, place, strict=True) if v > INVALID]
        assert len(set(real)) == len(real)
        assert [row[i] for i in real] == [v for v in value if v > INVALID]


def test_select_top_points_at_zero_where_there_is_nothing():
    values, index = select_top(torch.tensor([[0.5, 0.9]]), 4)
    torch.testing.assert_close(values, torch.tensor([[0.9, 0.5, INVALID, INVALID]]))
    assert index.tolist() == [[1, 0, 0, 0]]


def test_take_gathers_rows_of_each_image():
    x, index = torch.rand(2, 5, 4), torch.tensor([[4, 0, 0], [1, 3, 2]])
    assert torch.equal(take(x, index), torch.stack([x[0][index[0]], x[1][index[1]]]))


def test_separated_groups_do_not_overlap_and_keep_their_inner_overlaps():
    boxes = torch.tensor([[[0.0, 0, 64, 48], [0, 0, 64, 48], [0, 0, 64, 48], [1, 1, 64, 48]]])
    groups = torch.tensor([0.0, 1.0, 2.0, 2.0])
    apart = separate(boxes, groups, (48, 64))[0]
    overlap = box_iou(apart, apart) > 0
    assert torch.equal(overlap, groups[:, None] == groups[None])
    torch.testing.assert_close(box_iou(apart, apart)[2, 3], box_iou(boxes[0], boxes[0])[2, 3])


# --- suppression ---


@functools.cache
def onnx_nms_session():
    names = ["boxes", "scores", "max_output", "iou", "score"]
    graph = helper.make_graph(
        [helper.make_node("NonMaxSuppression", names, ["selected"])],
        "nms",
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [None, None, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, 1, None]),
            helper.make_tensor_value_info("max_output", TensorProto.INT64, [1]),
            helper.make_tensor_value_info("iou", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("selected", TensorProto.INT64, [None, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def onnx_nms(boxes, scores, iou_threshold, score_threshold, max_output):
    """ONNX Runtime's NonMaxSuppression: (B, N, 4), (B, N) -> (B, N) bool."""
    feed = {
        "boxes": boxes,
        "scores": scores[:, None],
        "max_output": np.array([max_output], np.int64),
        "iou": np.array([iou_threshold], np.float32),
        "score": np.array([score_threshold], np.float32),
    }
    (selected,) = onnx_nms_session().run(None, feed)
    kept = np.zeros(scores.shape, bool)
    kept[selected[:, 0], selected[:, 2]] = True
    return kept


def run_nms(boxes, scores, *args):
    return nms(torch.from_numpy(boxes), torch.from_numpy(scores), *args).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_nms_is_the_greedy_loop_and_onnx_runtimes(kind, tied, seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 150))
    boxes, scores = boxes_of(kind, count, rng), scores_of(count, rng, tied)
    for iou_threshold in (0.3, 0.5, 0.7):
        for score_threshold in (0.0, 0.4):
            for max_output in (1, 7, 33, 1000):
                args = (iou_threshold, score_threshold, max_output)
                expected = np.zeros(count, bool)
                expected[ref.greedy_nms(boxes.astype(np.float64), scores, *args)] = True
                np.testing.assert_array_equal(run_nms(boxes[None], scores[None], *args)[0], expected)
                np.testing.assert_array_equal(onnx_nms(boxes[None], scores[None], *args)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_gpus_nms_is_the_cpus(kind, tied):
    rng = np.random.default_rng(5)
    boxes = torch.from_numpy(np.stack([boxes_of(kind, 90, rng) for _ in range(3)]))
    scores = torch.from_numpy(np.stack([scores_of(90, rng, tied) for _ in range(3)]))
    scores[2] = 0
    for args in ((0.3, 0.0, 1000), (0.5, 0.4, 7), (0.7, 0.0, 33), (0.5, 2.0, 9)):
        assert torch.equal(nms_in_parallel(boxes, scores, *args), nms(boxes, scores, *args))
    none = torch.zeros(2, 0)
    assert nms_in_parallel(torch.zeros(2, 0, 4), none, 0.5, 0.0, 9).shape == none.shape


@pytest.mark.parametrize("head", [1, 2, 5, 1000])
def test_nms_does_not_depend_on_how_many_candidates_a_step_looks_at(head, monkeypatch):
    rng = np.random.default_rng(0)
    boxes, scores = boxes_of("clustered", 120, rng), scores_of(120, rng, True)
    expected = run_nms(boxes[None], scores[None], 0.6, 0.1, 25)
    monkeypatch.setattr(box_ops, "_NMS_HEAD", head)
    np.testing.assert_array_equal(run_nms(boxes[None], scores[None], 0.6, 0.1, 25), expected)


def test_of_equal_scores_the_first_box_is_kept():
    boxes = np.array([[[0, 0, 10, 10], [1, 0, 11, 10], [2, 0, 12, 10]]], np.float32)
    assert run_nms(boxes, np.full((1, 3), 0.5, np.float32), 0.5, 0.0, 10).tolist() == [[True, False, False]]


def test_an_overlap_of_exactly_the_threshold_is_kept():
    boxes = np.array([[[0, 0, 2, 1], [1, 0, 2, 1]]], np.float32)  # IoU 1/2
    scores = np.array([[0.9, 0.8]], np.float32)
    assert run_nms(boxes, scores, 0.5, 0.0, 10).all()
    assert run_nms(boxes, scores, 0.49, 0.0, 10).tolist() == [[True, False]]


def test_a_suppressed_box_suppresses_nothing():
    boxes = np.array([[[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]]], np.float32)
    scores = np.array([[0.9, 0.8, 0.7]], np.float32)
    assert run_nms(boxes, scores, 0.3, 0.0, 10).tolist() == [[True, False, True]]


def test_touching_boxes_are_both_kept():
    boxes = np.array([[[0, 0, 10, 10], [10, 0, 20, 10], [0, 10, 10, 20]]], np.float32)
    assert run_nms(boxes, np.array([[0.3, 0.2, 0.1]], np.float32), 0.0, 0.0, 10).all()


def test_nothing_above_the_score_threshold_keeps_nothing():
    boxes = boxes_of("spread", 5, np.random.default_rng(0))[None]
    assert not run_nms(boxes, np.full((1, 5), 0.5, np.float32), 0.5, 0.5, 10).any()
    assert run_nms(boxes[:, :0], np.zeros((1, 0), np.float32), 0.5, 0.0, 10).shape == (1, 0)
    assert not run_nms(boxes, np.full((1, 5), 0.9, np.float32), 0.5, 0.5, 0).any()


def test_images_are_suppressed_apart():
    rng = np.random.default_rng(0)
    boxes = np.stack([boxes_of(kind, 40, rng) for kind in KINDS])
    scores = np.stack([scores_of(40, rng, True) for _ in KINDS])
    together = run_nms(boxes, scores, 0.5, 0.1, 9)
    alone = [run_nms(b[None], s[None], 0.5, 0.1, 9)[0] for b, s in zip(boxes, scores, strict=True)]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, onnx_nms(boxes, scores, 0.5, 0.1, 9))
    assert (together.sum(axis=1) <= 9).all()


def test_nms_is_an_operator_that_export_can_trace():
    torch.library.opcheck(nms, (torch.rand(2, 6, 4), torch.rand(2, 6), 0.5, 0.1, 3))
