"""Outputs come back to the original image as MMDetection and MMSegmentation bring them back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_deploy.tasks.postprocess import detections, paste_mask, segmentation

from meta_deploy.imaging.preprocess import Placement


def mmdet_paste(mask, box, height, width):
    """MMDetection's _do_paste_mask (skip_empty=True, as on the CPU), whole image, before the threshold."""
    x0, y0, x1, y1 = (torch.tensor(float(edge)) for edge in box)
    x0_int, y0_int = (torch.clamp(edge.floor() - 1, min=0).int().item() for edge in (x0, y0))
    x1_int = torch.clamp(x1.ceil() + 1, max=width).int().item()
    y1_int = torch.clamp(y1.ceil() + 1, max=height).int().item()
    if x1_int <= x0_int or y1_int <= y0_int:
        return np.zeros((height, width), np.float32)
    img_y = (torch.arange(y0_int, y1_int, dtype=torch.float32) + 0.5 - y0) / (y1 - y0) * 2 - 1
    img_x = (torch.arange(x0_int, x1_int, dtype=torch.float32) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack(torch.meshgrid(img_y, img_x, indexing="ij")[::-1], dim=-1)
    pasted = F.grid_sample(torch.from_numpy(mask)[None, None], grid[None], align_corners=False)[0, 0]
    whole = np.zeros((height, width), np.float32)
    whole[y0_int:y1_int, x0_int:x1_int] = pasted.numpy()
    return whole


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(-20, 80),
    st.floats(-20, 60),
    st.floats(0.5, 120),
    st.floats(0.5, 120),
    st.sampled_from([0.5, 0.3]),
)
def test_masks_are_pasted_as_mmdetection_pastes_them(seed, x0, y0, width, height, threshold):
    mask = np.random.default_rng(seed).random((28, 28), np.float32)
    box = np.array([x0, y0, x0 + width, y0 + height], np.float32)
    reference = mmdet_paste(mask, box, 64, 96)
    ours = paste_mask(mask, box, (64, 96), threshold).full()
    sure = np.abs(reference - threshold) > 1e-4
    np.testing.assert_array_equal(ours[sure], reference[sure] >= threshold)


def test_a_full_mask_fills_its_box():
    ours = paste_mask(np.ones((28, 28), np.float32), np.array([10, 5, 30, 25]), (64, 96), 0.5)
    assert ours.area == 20 * 20
    assert ours.full()[5:25, 10:30].all()


def outputs(boxes, scores, labels=None, count=None, masks=None):
    boxes = np.array([boxes], np.float32).reshape(1, -1, 4)
    labels = labels or [0] * len(scores)
    result = {
        "num_detections": np.array([len(scores) if count is None else count], np.int32),
        "boxes": boxes,
        "scores": np.array([scores], np.float32),
        "labels": np.array([labels], np.int32),
    }
    if masks is not None:
        result["masks"] = np.asarray(masks, np.float32)[None]
    return result


HALF = Placement((100, 200), (50, 100))


def test_boxes_go_back_through_the_scale_of_each_axis():
    placed = Placement((427, 640), (64, 96))
    found = detections(outputs([[9.6, 6.4, 48, 32]], [0.9]), 0, placed, 0.5, 0.5)
    np.testing.assert_allclose(found.boxes, [[64, 42.7, 320, 213.5]], rtol=1e-6)
    assert found.boxes.dtype == np.float32
    assert found.masks is None


def test_boxes_are_clipped_to_the_image_and_empty_ones_dropped():
    boxes = [[-5, -5, 300, 300], [10, 10, 10, 20], [120, 10, 140, 20], [30, 30, 20, 40], [np.nan] * 4]
    found = detections(outputs(boxes, [0.9] * 5), 0, HALF, 0.5, 0.5)
    np.testing.assert_array_equal(found.boxes, [[0, 0, 200, 100]])


def test_what_is_below_the_threshold_or_past_the_count_is_dropped():
    box = [0, 0, 10, 10]
    found = detections(outputs([box] * 4, [0.9, 0.5, 0.49, 0.9], [2, 1, 0, 0], count=3), 0, HALF, 0.5, 0.5)
    np.testing.assert_array_equal(found.labels, [2, 1])
    np.testing.assert_allclose(found.scores, [0.9, 0.5])


@pytest.mark.parametrize("count", [0, -1])
def test_no_detection_is_an_empty_result(count):
    found = detections(
        outputs([[0, 0, 9, 9]], [0.9], count=count, masks=np.ones((1, 28, 28))), 0, HALF, 0, 0.5
    )
    assert found.boxes.shape == (0, 4)
    assert found.masks == ()


def test_a_clipped_box_does_not_squeeze_its_mask():
    # The left half of the box lies outside the image, and so does the set half of the mask.
    mask = np.zeros((1, 28, 28))
    mask[:, :, :14] = 1
    found = detections(outputs([[-20, 0, 20, 40]], [0.9], masks=mask), 0, HALF, 0.5, 0.5)
    np.testing.assert_array_equal(found.boxes, [[0, 0, 40, 80]])
    assert found.masks[0].area <= 80  # at most the column at the edge


@pytest.mark.parametrize(
    ("original", "resized", "padded"),
    [
        ((100, 150), (64, 96), (64, 96)),
        ((37, 21), (64, 36), (64, 64)),
        ((64, 64), (64, 64), (64, 64)),
        ((1, 1), (64, 64), (64, 64)),
    ],
)
def test_class_maps_are_those_of_torch_interpolate(original, resized, padded):
    logits = np.random.default_rng(0).normal(size=(5, padded[0] // 4, padded[1] // 4)).astype(np.float32)
    up = F.interpolate(torch.from_numpy(logits)[None].double(), padded, mode="bilinear", align_corners=False)
    up = up[:, :, : resized[0], : resized[1]]
    scores = F.interpolate(up, original, mode="bilinear", align_corners=False)[0].numpy()
    ours = segmentation(logits, Placement(original, resized), padded)
    assert ours.shape == original
    best = np.sort(scores, axis=0)
    sure = best[-1] - best[-2] > 1e-4
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(ours[sure], scores.argmax(0)[sure])


def test_equal_logits_give_the_first_class():
    assert (segmentation(np.zeros((3, 16, 16), np.float32), HALF, (64, 64)) == 0).all()
