"""Boxes and masks come back to the original image as MMDetection brings them back."""

from pathlib import Path

import numpy as np
import pytest

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import Thresholds
from meta_deploy.errors import BackendError, BundleError
from meta_deploy.imaging.preprocess import Placement
from meta_deploy.tasks import get_task
from tests.bundles_by_hand import manifest


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


def detections(outputs, index, placement, score, mask_threshold):
    task = "instance-segmentation" if "masks" in outputs else "detection"
    thresholds = Thresholds(score=0.0, mask=mask_threshold)
    bundle = Bundle(Path("b"), manifest(task, (64, 64), thresholds=thresholds))
    return get_task(task).decode(bundle, outputs, index, placement, (64, 64), score)


HALF = Placement((100, 200), (50, 100))


def test_boxes_go_back_through_the_scale_of_each_axis():
    placed = Placement((427, 640), (64, 96))
    found = detections(outputs([[9.6, 6.4, 48, 32]], [0.9]), 0, placed, 0.5, 0.5)
    np.testing.assert_allclose(found.boxes, [[64, 42.7, 320, 213.5]], rtol=1e-6)
    assert found.boxes.dtype == np.float32
    assert found.masks is None


def test_boxes_are_clipped_to_the_image_and_empty_ones_dropped():
    boxes = [[-5, -5, 300, 300], [10, 10, 10, 20], [120, 10, 140, 20], [30, 30, 20, 40]]
    found = detections(outputs(boxes, [0.9] * 4), 0, HALF, 0.5, 0.5)
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
    assert found.segments == ()
    assert found.masks.shape == (0, 100, 200)


def test_a_clipped_box_does_not_squeeze_its_mask():
    # The left half of the box lies outside the image, and so does the set half of the mask.
    mask = np.zeros((1, 28, 28))
    mask[:, :, :14] = 1
    found = detections(outputs([[-20, 0, 20, 40]], [0.9], masks=mask), 0, HALF, 0.5, 0.5)
    np.testing.assert_array_equal(found.boxes, [[0, 0, 40, 80]])
    assert found.segments[0].area <= 80  # at most the column at the edge


@pytest.mark.parametrize("name", ["boxes", "scores", "masks"])
def test_values_that_are_not_finite_are_an_error_within_the_count_only(name):
    given = outputs([[0, 0, 9, 9], [0, 0, 9, 9]], [0.9, 0.8], count=1, masks=np.ones((2, 28, 28)))
    given[name][0, 1] = np.nan
    assert len(detections(given, 0, HALF, 0.5, 0.5)) == 1
    given[name][0, 0] = np.inf
    with pytest.raises(BackendError, match="not finite"):
        detections(given, 0, HALF, 0.5, 0.5)


def test_more_classes_than_names_are_an_error():
    with pytest.raises(BundleError, match="gives 4 classes, and its manifest names 3"):
        detections(outputs([[0, 0, 9, 9]], [0.9], [3]), 0, HALF, 0.5, 0.5)
