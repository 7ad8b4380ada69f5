"""Label images and measurements, against sums over every pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meta_deploy.errors import InputError
from meta_deploy.tasks.detection import Detections
from meta_deploy.tasks.masks import Mask
from meta_deploy.tasks.measure import MOST_LABELS, label_image

SIZE = (14, 19)


def detections(masks, boxes=None):
    count = len(masks)
    boxes = np.tile(np.array([1.5, 2, 6, 7.25], np.float32), (count, 1)) if boxes is None else boxes
    return Detections(
        SIZE,
        boxes,
        np.linspace(0.9, 0.4, count).astype(np.float32),
        np.zeros(count, np.int32),
        ("nucleus",),
        tuple(Mask.from_full(mask) for mask in masks),
    )


@given(seed=st.integers(0, 10**6), count=st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_a_pixel_has_the_number_of_the_best_object_there(seed, count):
    masks = np.random.default_rng(seed).random((count, *SIZE)) < 0.4
    labels = detections(masks).label_image()
    assert labels.dtype == np.uint16
    for y, x in np.ndindex(SIZE):
        at = [k + 1 for k in range(count) if masks[k, y, x]]
        assert labels[y, x] == (at[0] if at else 0)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_rows_are_what_a_sum_over_the_pixels_gives(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*SIZE, 3), np.uint8)
    masks = rng.random((3, *SIZE)) < rng.uniform(0.05, 0.6)
    masks[:, 0, 0] = True
    found = detections(masks)
    for k, row in enumerate(found.table(image)):
        at = [(y, x) for y, x in np.ndindex(SIZE) if masks[k, y, x]]
        assert (row["object"], row["class"], row["area"]) == (k + 1, "nucleus", len(at))
        assert row["score"] == pytest.approx(float(found.scores[k]), abs=1e-6)
        assert row["centroid_x"] == pytest.approx(sum(x + 0.5 for _, x in at) / len(at), abs=1e-3)
        assert row["centroid_y"] == pytest.approx(sum(y + 0.5 for y, _ in at) / len(at), abs=1e-3)
        mean = sum(float(image[p].sum()) for p in at) / len(at) / 3
        assert row["mean_intensity"] == pytest.approx(mean, abs=1e-3)
        assert [row[c] for c in ("x_min", "y_min", "x_max", "y_max")] == [1.5, 2, 6, 7.25]


def test_without_masks_an_object_is_its_box_and_has_no_label_image():
    boxes = np.array([[2, 3, 6, 5]], np.float32)
    found = Detections(SIZE, boxes, np.ones(1, np.float32), np.zeros(1, np.int32), ("a",))
    image = np.zeros((*SIZE, 3), np.uint8)
    image[3:5, 2:6] = 90
    (row,) = found.table(image)
    assert (row["area"], row["centroid_x"], row["centroid_y"], row["mean_intensity"]) == (8, 4, 4, 90)
    with pytest.raises(InputError, match="needs masks"):
        found.label_image()


def test_a_mask_without_pixels_has_no_intensity():
    (row,) = detections([np.zeros(SIZE, bool)]).table(np.zeros((*SIZE, 3), np.uint8))
    assert row["area"] == 0
    assert np.isnan(row["mean_intensity"])


def test_more_objects_than_16_bits_number_are_refused():
    mask = Mask.from_full(np.ones((1, 1), bool))
    with pytest.raises(InputError, match="65536 objects do not fit"):
        label_image([mask] * (MOST_LABELS + 1), (1, 1))
