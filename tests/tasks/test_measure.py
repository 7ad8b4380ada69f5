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


def random_masks(rng, count):
    """Rectangles, nested and overlapping, some without a pixel."""
    masks = np.zeros((count, *SIZE), bool)
    for mask in masks:
        (y0, y1), (x0, x1) = (np.sort(rng.integers(0, edge + 1, 2)) for edge in SIZE)
        mask[y0:y1, x0:x1] = True
    return masks


def pixels_of(masks):
    """What each mask has for itself, pixel by pixel, by its number; without those that have under a half."""
    taken, own = set(), {}
    for k, mask in enumerate(masks):
        pixels = set(zip(*np.nonzero(mask), strict=True))
        if pixels - taken and 2 * len(pixels - taken) >= len(pixels):
            own[k] = pixels - taken
            taken |= pixels
    return own


@given(seed=st.integers(0, 10**6), count=st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_objects_rows_and_numbers_are_the_same_set(seed, count):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*SIZE, 3), np.uint8)
    masks = random_masks(rng, count)
    found, expected = detections(masks), pixels_of(masks)
    labels, rows, apart = found.label_image(), found.table(image), found.apart()
    assert labels.dtype == np.uint16
    assert [row["object"] for row in rows] == list(range(1, len(expected) + 1))
    assert set(np.unique(labels)) - {0} == {row["object"] for row in rows}
    assert len(apart) == len(rows)
    for row, mask, (k, own) in zip(rows, apart.masks, expected.items(), strict=True):
        assert set(zip(*np.nonzero(labels == row["object"]), strict=True)) == own
        assert set(zip(*np.nonzero(mask), strict=True)) == own
        y, x = np.array(sorted(own)).T
        assert (row["class"], row["area"]) == ("nucleus", len(own))
        assert row["score"] == pytest.approx(float(found.scores[k]), abs=1e-6)
        assert row["centroid_x"] == pytest.approx(x.mean() + 0.5, abs=1e-3)
        assert row["centroid_y"] == pytest.approx(y.mean() + 0.5, abs=1e-3)
        assert row["mean_intensity"] == pytest.approx(image[y, x].mean(), abs=1e-3)
        box = [row[c] for c in ("x_min", "y_min", "x_max", "y_max")]
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    again = apart.apart()
    np.testing.assert_array_equal(again.masks, apart.masks)


def test_objects_are_numbered_by_falling_score_whatever_their_order():
    masks = np.zeros((3, *SIZE), bool)
    masks[0, 2:4, 2:4], masks[1, 1:9, 1:9], masks[2, 1:9, 8:14] = True, True, True
    found = detections(masks)[[2, 0, 1]]
    assert found.scores.tolist() != sorted(found.scores.tolist(), reverse=True)
    np.testing.assert_array_equal(found.label_image(), detections(masks).label_image())
    # The small one is the surest: the large one has a hole there.
    assert [row["area"] for row in found.table(np.zeros((*SIZE, 3), np.uint8))] == [4, 60, 40]


def test_without_masks_an_object_is_its_box_and_has_no_label_image():
    boxes = np.array([[2, 3, 6, 5]], np.float32)
    found = Detections(SIZE, boxes, np.ones(1, np.float32), np.zeros(1, np.int32), ("a",))
    image = np.zeros((*SIZE, 3), np.uint8)
    image[3:5, 2:6] = 90
    (row,) = found.table(image)
    assert (row["area"], row["centroid_x"], row["centroid_y"], row["mean_intensity"]) == (8, 4, 4, 90)
    with pytest.raises(InputError, match="needs masks"):
        found.label_image()


def test_more_objects_than_16_bits_number_are_refused():
    mask = Mask.from_full(np.ones((1, 1), bool))
    with pytest.raises(InputError, match="65536 objects do not fit"):
        label_image([mask] * (MOST_LABELS + 1), (1, 1))
