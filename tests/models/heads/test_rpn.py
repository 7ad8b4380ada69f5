"""Anchors and proposals: against MMDetection 2.x's values and its `RPNHead.get_bboxes` in numpy."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from meta_deploy.models.heads.rpn import RPNHead
from meta_deploy.models.ops.boxes import INVALID
from tests.models import references as ref

SIZES = [(32, 32), (96, 160), (64, 224)]


def levels(H, W, channels, B=1, seed=0):
    """Random maps at strides 4 to 64, as the pyramid gives them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, channels, -(-H // s), -(-W // s)) for s in RPNHead.strides]
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def predictions(H, W, B=1, seed=0, spread=1.0):
    """Random logits and deltas per level."""
    deltas = [0.4 * spread * d for d in levels(H, W, 12, B, seed + 100)]
    return levels(H, W, 3, B, seed), deltas


def mmdetection_anchors(H, W, stride, scale=8):
    """AnchorGenerator(scales=[scale], ratios=[0.5, 1, 2], center_offset=0): rows, columns, ratios."""
    out = []
    for y in range(-(-H // stride)):
        for x in range(-(-W // stride)):
            for ratio in (0.5, 1.0, 2.0):
                w, h = stride * scale / np.sqrt(ratio), stride * scale * np.sqrt(ratio)
                out.append([x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2])
    return np.array(out)


def mmdetection_proposals(logits, deltas, image_size, pre_nms, iou_threshold, max_per_img):
    """`RPNHead._get_bboxes_single` and `batched_nms` by level, for one image: boxes (n, 4), scores (n,)."""
    boxes, scores, ids = [], [], []
    for level, stride in enumerate(RPNHead.strides):
        score = ref.sigmoid(logits[level].transpose(1, 2, 0).reshape(-1))
        delta = deltas[level].transpose(1, 2, 0).reshape(-1, 4)
        anchors = mmdetection_anchors(*image_size, stride)
        for i in np.argsort(-score, kind="stable")[:pre_nms]:
            boxes.append(ref.decode(anchors[i], delta[i], (1, 1, 1, 1), image_size))
            scores.append(score[i])
            ids.append(level)
    boxes, scores, ids = np.array(boxes), np.array(scores), np.array(ids)
    valid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])  # min_bbox_size 0
    boxes, scores, ids = boxes[valid], scores[valid], ids[valid]
    kept = []
    for level in np.unique(ids):
        mine = np.flatnonzero(ids == level)
        kept.extend(mine[ref.greedy_nms(boxes[mine], scores[mine], iou_threshold)])
    kept = np.array(sorted(kept, key=lambda i: -scores[i]), dtype=int)[:max_per_img]
    return boxes[kept], scores[kept]


def test_anchors_are_mmdetections_at_stride_4():
    first = RPNHead(4, 10, 0.7, 10).anchors([x.float() for x in levels(32, 32, 4)])[0]
    expected = [
        [-22.627417, -11.3137085, 22.627417, 11.3137085],
        [-16, -16, 16, 16],
        [-11.3137085, -22.627417, 11.3137085, 22.627417],
    ]
    np.testing.assert_allclose(first[:3].numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(first[3:6].numpy(), np.add(expected, [4, 0, 4, 0]), rtol=1e-6)
    np.testing.assert_allclose(first[8 * 3 : 8 * 3 + 3].numpy(), np.add(expected, [0, 4, 0, 4]), rtol=1e-6)


@pytest.mark.parametrize("scale", [8, 2.5])
@pytest.mark.parametrize("size", SIZES)
def test_anchors_of_all_levels_run_over_rows_columns_ratios(size, scale):
    got = RPNHead(4, 10, 0.7, 10, anchor_scale=scale).anchors(levels(*size, 4))
    for anchors, stride in zip(got, RPNHead.strides, strict=True):
        np.testing.assert_allclose(anchors.numpy(), mmdetection_anchors(*size, stride, scale), atol=1e-5)


def test_head_is_a_shared_convolution_and_two_predictions():
    torch.manual_seed(0)
    head = RPNHead(4, 10, 0.7, 10).double()
    features = levels(64, 96, 4, B=2)
    state = head.state_dict()
    for x, logits, deltas in zip(features, *head(features), strict=True):
        hidden = F.conv2d(x, state["rpn_conv.weight"], state["rpn_conv.bias"], padding=1).clamp(min=0)
        torch.testing.assert_close(logits, F.conv2d(hidden, state["rpn_cls.weight"], state["rpn_cls.bias"]))
        torch.testing.assert_close(deltas, F.conv2d(hidden, state["rpn_reg.weight"], state["rpn_reg.bias"]))
    assert {n.split(".")[0] for n in state} == {"rpn_conv", "rpn_cls", "rpn_reg"}


def test_several_convolutions_have_a_relu_each_and_mmdetections_names():
    torch.manual_seed(0)
    head = RPNHead(4, 10, 0.7, 10, convs=2).double()
    state = head.state_dict()
    x = levels(64, 96, 4)[0]
    hidden = x
    for i in (0, 1):
        weight, bias = state[f"rpn_conv.{i}.conv.weight"], state[f"rpn_conv.{i}.conv.bias"]
        hidden = F.conv2d(hidden, weight, bias, padding=1).clamp(min=0)
    (logits,), _ = head([x])
    torch.testing.assert_close(logits, F.conv2d(hidden, state["rpn_cls.weight"], state["rpn_cls.bias"]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("pre_nms", "max_proposals"), [(1000, 1000), (60, 1000), (200, 25)])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_proposals_are_mmdetections(size, pre_nms, max_proposals, spread):
    logits, deltas = predictions(*size, spread=spread)
    boxes, scores = RPNHead(4, pre_nms, 0.7, max_proposals).proposals(logits, deltas, size)
    numpy_levels = ([x[0].numpy() for x in part] for part in (logits, deltas))
    want_boxes, want_scores = mmdetection_proposals(*numpy_levels, size, pre_nms, 0.7, max_proposals)
    assert boxes.shape == (1, max_proposals, 4)
    count = int((scores > INVALID).sum())
    assert count == len(want_scores)
    np.testing.assert_allclose(scores[0, :count].sigmoid().numpy(), want_scores, atol=1e-12)
    np.testing.assert_allclose(boxes[0, :count].numpy(), want_boxes, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_missing_proposals_are_invalid_and_come_last(size):
    logits, deltas = predictions(*size)
    boxes, scores = RPNHead(4, 1000, 0.7, 3000).proposals(logits, deltas, size)
    count = int((scores > INVALID).sum())
    assert 0 < count < 3000
    assert (scores[0, :count] > INVALID).all()
    assert (scores[0, count:] == INVALID).all()
    assert (scores[0, 1:] <= scores[0, :-1]).all()
    assert boxes.isfinite().all()


def test_proposals_lie_inside_the_image_and_have_area():
    logits, deltas = predictions(96, 160, spread=8.0)
    boxes, scores = RPNHead(4, 1000, 0.7, 300).proposals(logits, deltas, (96, 160))
    boxes = boxes[scores > INVALID]
    assert (boxes >= 0).all()
    assert (boxes[:, [1, 3]] <= 96).all()
    assert (boxes[:, [0, 2]] <= 160).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_levels_do_not_suppress_each_other():
    """The same box, from the anchors of two levels: both are kept."""
    logits = [torch.full((1, 3, -(-64 // s), -(-64 // s)), -50.0) for s in RPNHead.strides]
    deltas = [torch.zeros(1, 12, *x.shape[2:]) for x in logits]
    logits[0][0, 1, 8, 8] = 3.0  # 32 x 32 around (32, 32)
    logits[1][0, 1, 4, 4] = 2.0  # 64 x 64 around (32, 32), halved
    deltas[1][0, 4 + 2 : 4 + 4, 4, 4] = np.log(0.5)
    boxes, scores = RPNHead(4, 1000, 0.7, 2).proposals(logits, deltas, (64, 64))
    torch.testing.assert_close(boxes[0], torch.tensor([[16.0, 16, 48, 48]] * 2))
    torch.testing.assert_close(scores[0], torch.tensor([3.0, 2.0]))


def test_a_batch_of_two_is_two_batches_of_one():
    logits, deltas = predictions(96, 160, B=2)
    head = RPNHead(4, 200, 0.7, 150)
    boxes, scores = head.proposals(logits, deltas, (96, 160))
    for b in range(2):
        alone = head.proposals([x[b : b + 1] for x in logits], [x[b : b + 1] for x in deltas], (96, 160))
        real = scores[b] > INVALID
        assert torch.equal(scores[b], alone[1][0])
        assert torch.equal(boxes[b][real], alone[0][0][real])


def test_training_can_ask_for_fewer_and_gets_no_gradient():
    logits, deltas = predictions(64, 96)
    logits = [x.requires_grad_() for x in logits]
    head = RPNHead(4, 1000, 0.7, 1000)
    boxes, scores = head.proposals(logits, deltas, (64, 96), pre_nms=50, max_proposals=20)
    expected = RPNHead(4, 50, 0.7, 20).proposals(logits, deltas, (64, 96))
    assert torch.equal(boxes, expected[0])
    assert torch.equal(scores, expected[1])
    assert not boxes.requires_grad
    assert not scores.requires_grad
