"""The training losses, against slow and plain computations of the same thing."""

import math

import numpy as np
import pytest
import torch

from meta_deploy.models.ops.boxes import box_iou, decode_boxes
from meta_deploy.models.registry import build_model, get_config
from tools.detection_losses import (
    IGNORED,
    NEGATIVE,
    ROI_STDS,
    LossSettings,
    Truth,
    assign,
    crop_masks,
    detection_losses,
    pool_by_image,
    rpn_losses,
    sample,
    sample_rois,
)
from tools.scenes import CLASSES, generate


def random_boxes(count, size=128.0):
    corner = torch.rand(count, 2) * size * 0.6
    return torch.cat([corner, corner + 8 + torch.rand(count, 2) * size * 0.3], dim=1)


def truth_of(seed, size=128):
    scene = generate(seed, (size, size))
    return scene.image, Truth(
        torch.from_numpy(scene.boxes),
        torch.from_numpy(scene.labels),
        torch.from_numpy(scene.masks.view(np.uint8)),
    )


def assign_slowly(overlaps, positive, negative, low_quality):
    """MaxIoUAssigner's rules, one candidate and one object at a time."""
    objects, candidates = overlaps.shape
    result = []
    for n in range(candidates):
        best = max(range(objects), key=lambda g: overlaps[g, n])
        value = overlaps[best, n]
        result.append(best if value >= positive else NEGATIVE if value < negative else IGNORED)
    if low_quality is not None:
        for g in range(objects):
            top = max(overlaps[g])
            for n in range(candidates):
                if top >= low_quality and overlaps[g, n] == top:
                    result[n] = g
    return result


@pytest.mark.parametrize("rule", [(0.7, 0.3, 0.3), (0.5, 0.5, None)])
def test_assignment_follows_the_rules_one_by_one(rule):
    for seed in range(5):
        torch.manual_seed(seed)
        overlaps = box_iou(random_boxes(6), random_boxes(200))
        overlaps[:, 17] = overlaps[:, 16]  # a tie
        assert assign(overlaps, *rule).tolist() == assign_slowly(overlaps.numpy(), *rule)


def test_without_objects_everything_is_background():
    assert assign(torch.zeros(0, 9), 0.7, 0.3, 0.3).tolist() == [NEGATIVE] * 9


def test_sampling_keeps_to_its_numbers_and_kinds():
    assigned = torch.tensor([3] * 50 + [NEGATIVE] * 500 + [IGNORED] * 30)
    positive, negative = sample(assigned, 64, 0.25)
    assert len(positive) == 16
    assert len(negative) == 48
    assert len(positive.unique()) == 16
    assert (assigned[positive] == 3).all()
    assert (assigned[negative] == NEGATIVE).all()
    positive, negative = sample(assigned[45:], 64, 0.5)
    assert (len(positive), len(negative)) == (5, 59)


def test_true_boxes_are_among_the_rois_and_their_objects_match():
    torch.manual_seed(0)
    _, truth = truth_of(3)
    rois = sample_rois(random_boxes(50), truth, LossSettings())
    positive = rois.boxes[: len(rois.objects)]
    overlaps = box_iou(truth.boxes, positive)
    assert torch.equal(overlaps.argmax(dim=0), rois.objects)
    assert overlaps.max(dim=0).values.min() >= 0.5
    assert overlaps.max(dim=1).values.min() == 1
    assert box_iou(truth.boxes, rois.boxes[len(rois.objects) :]).max() < 0.5


def test_rpn_losses_equal_a_sum_over_anchors():
    torch.manual_seed(1)
    _, truth = truth_of(5)
    shapes, channels = [(8, 8), (4, 4)], 3
    logits = [torch.randn(1, channels, h, w) for h, w in shapes]
    deltas = [torch.randn(1, 4 * channels, h, w) for h, w in shapes]
    anchors = [random_boxes(h * w * channels) for h, w in shapes]
    settings = LossSettings(anchors=10_000, anchor_positives=1.0)  # all of them: nothing random
    losses = rpn_losses(logits, deltas, anchors, [truth], settings)

    score, box, count = 0.0, 0.0, 0
    for level, (h, w) in enumerate(shapes):
        for y in range(h):
            for x in range(w):
                for a in range(channels):
                    n = (y * w + x) * channels + a
                    everywhere = assign(box_iou(truth.boxes, torch.cat(anchors)), 0.7, 0.3, 0.3)
                    match = int(everywhere[n + (0 if level == 0 else len(anchors[0]))])
                    if match == IGNORED:
                        continue
                    count += 1
                    p = 1 / (1 + math.exp(-logits[level][0, a, y, x]))
                    score -= math.log(p if match >= 0 else 1 - p)
                    if match >= 0:
                        x1, y1, x2, y2 = anchors[level][n].tolist()
                        u1, v1, u2, v2 = truth.boxes[match].tolist()
                        target = [
                            ((u1 + u2) - (x1 + x2)) / 2 / (x2 - x1),
                            ((v1 + v2) - (y1 + y2)) / 2 / (y2 - y1),
                            math.log((u2 - u1) / (x2 - x1)),
                            math.log((v2 - v1) / (y2 - y1)),
                        ]
                        guess = deltas[level][0, 4 * a : 4 * a + 4, y, x].tolist()
                        box += sum(abs(t - g) for t, g in zip(target, guess, strict=True))
    assert losses["rpn_score"].item() == pytest.approx(score / count, rel=1e-4)
    assert losses["rpn_box"].item() == pytest.approx(box / count, rel=1e-4)


def test_a_mask_crop_is_the_coverage_of_each_bin():
    _, truth = truth_of(7)
    objects = torch.tensor([0, len(truth.labels) - 1])
    boxes = truth.boxes[objects] + torch.tensor([-2.5, 1.25, 3.0, -0.5])
    crops = crop_masks(truth.masks, objects, boxes, size=7)
    for crop, k, (x1, y1, x2, y2) in zip(crops, objects, boxes.tolist(), strict=True):
        fine = 40  # points a bin and axis
        xs = x1 + (np.arange(7 * fine) + 0.5) / (7 * fine) * (x2 - x1)
        ys = y1 + (np.arange(7 * fine) + 0.5) / (7 * fine) * (y2 - y1)
        pixels = truth.masks[k].numpy()[np.clip(ys, 0, 127).astype(int)][:, np.clip(xs, 0, 127).astype(int)]
        coverage = pixels.reshape(7, fine, 7, fine).mean(axis=(1, 3))
        assert np.abs(coverage - crop.numpy()).max() < 0.35  # 4 samples a bin against 1600
        assert np.abs(coverage - crop.numpy()).mean() < 0.03


def test_pooling_image_by_image_equals_pooling_the_batch():
    torch.manual_seed(2)
    head = build_model(get_config("meta-nano-mask-rcnn", num_classes=len(CLASSES))).roi_head
    features = [torch.randn(2, 4, 128 // s, 128 // s) for s in (4, 8, 16, 32, 64)]
    boxes = [random_boxes(5), random_boxes(3)]
    index = torch.tensor([0] * 5 + [1] * 3)
    expected = head.box_pool(features[:4], torch.cat(boxes), index)
    assert torch.allclose(pool_by_image(head.box_pool, features, boxes), expected, atol=1e-6)


def test_all_losses_are_finite_reach_every_parameter_and_fall():
    torch.manual_seed(0)
    model = build_model(get_config("meta-nano-mask-rcnn", num_classes=len(CLASSES))).train()
    image, truth = truth_of(11)
    images = (torch.from_numpy(image)[None].float() / 128 - 1).permute(0, 3, 1, 2)
    images, truths = images.expand(2, -1, -1, -1), [truth, truth]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = LossSettings(proposals_pre_nms=50, proposals=30)
    totals = []
    for _ in range(12):
        losses = detection_losses(model, images, truths, settings)
        assert set(losses) == {"rpn_score", "rpn_box", "roi_class", "roi_box", "mask"}
        total = sum(losses.values())
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert np.isfinite(totals).all()
    assert np.mean(totals[-3:]) < 0.7 * totals[0]
    assert all(p.grad is not None for p in model.parameters())


def test_an_image_without_objects_gives_finite_losses():
    model = build_model(get_config("meta-nano-mask-rcnn", num_classes=len(CLASSES))).train()
    empty = Truth(
        torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, 128, 128, dtype=torch.uint8)
    )
    losses = detection_losses(model, torch.randn(2, 3, 128, 128), [empty, empty], LossSettings(proposals=20))
    assert all(torch.isfinite(value) for value in losses.values())
    assert losses["mask"] == 0
    assert losses["roi_box"] == 0


def test_box_targets_decode_to_the_true_boxes():
    from meta_deploy.models.ops.boxes import encode_boxes

    rois, truth = random_boxes(20), random_boxes(20)
    deltas = encode_boxes(rois, truth, ROI_STDS)
    small = deltas[:, 2:].abs().amax(dim=1) * 0.2 < 4  # not beyond the decoder's clamp
    assert torch.allclose(decode_boxes(rois, deltas, ROI_STDS, (128, 128))[small], truth[small], atol=1e-3)
