"""Overlays: nothing outside the picture, labels apart where there is room, colours apart, any size."""

import itertools

import cv2
import numpy as np
import pytest
from PIL import ImageFont

from meta_deploy.tasks.detection import Detections
from meta_deploy.tasks.draw import _common_area, _cut, _free_place, _places, _shortened, class_color
from meta_deploy.tasks.masks import Mask
from meta_deploy.tasks.semantic_segmentation import Segmentation


def one(size, box, mask=None, name="disc", label=0):
    segments = None if mask is None else (Mask.from_full(mask),)
    boxes, scores = np.array([box], np.float32), np.array([0.87], np.float32)
    return Detections(size, boxes, scores, np.array([label], np.int32), (name,) * (label + 1), segments)


@pytest.mark.parametrize(
    "size", [(1, 1), (32, 32), (1, 3000), (3000, 1), (24, 400), (480, 640), (2000, 3000)]
)
def test_any_size_is_drawn_and_small_ones_come_enlarged_by_a_whole_factor(size):
    mask = np.ones(size, bool)
    drawn = one(size, [0, 0, size[1], size[0]], mask, "a name\nof two lines " * 5).draw(
        np.full((*size, 3), 255, np.uint8)
    )
    factor = drawn.shape[0] // size[0]
    assert drawn.shape == (size[0] * factor, size[1] * factor, 3)
    assert drawn.dtype == np.uint8
    assert factor == 1 or max(size) < 384
    assert max(drawn.shape) >= 384


def test_nothing_found_leaves_the_image_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8)
    empty = Detections(
        (400, 500), np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), ("a",), ()
    )
    np.testing.assert_array_equal(empty.draw(image), image)


def test_the_image_given_is_not_drawn_on():
    image = np.zeros((400, 500, 3), np.uint8)
    one((400, 500), [10, 10, 300, 300], np.ones((400, 500), bool)).draw(image)
    assert not image.any()


def test_a_mask_tints_its_pixels_and_no_others():
    mask = np.zeros((400, 500), bool)
    mask[100:200, 100:300] = True
    image = np.full((400, 500, 3), 128, np.uint8)
    drawn = one((400, 500), [100, 100, 300, 200], mask).draw(image)
    expected = 128 * 0.55 + np.array(class_color(0)) * 0.45
    np.testing.assert_allclose(drawn[150, 200], expected, atol=1)
    np.testing.assert_array_equal(drawn[300, 400], [128, 128, 128])


def test_where_masks_overlap_the_smaller_shows():
    masks = np.zeros((2, 400, 500), bool)
    masks[0], masks[1, 100:200, 100:200] = True, True
    boxes = np.array([[0, 0, 500, 400], [100, 100, 200, 200]], np.float32)
    scores, labels = np.array([0.9, 0.5], np.float32), np.array([0, 1], np.int32)
    both = Detections((400, 500), boxes, scores, labels, ("a", "b"), tuple(map(Mask.from_full, masks)))
    drawn = both.draw(np.full((400, 500, 3), 128, np.uint8))
    np.testing.assert_allclose(drawn[160, 160], 128 * 0.55 + np.array(class_color(1)) * 0.45, atol=1)


@pytest.mark.parametrize("background", [0, 255])
def test_a_box_shows_on_black_and_on_white(background):
    image = np.full((400, 500, 3), background, np.uint8)
    drawn = one((400, 500), [50, 50, 450, 350], label=2).draw(image).astype(int)
    assert np.abs(drawn[350, 250] - background).max() > 100


def test_a_class_keeps_its_colour_and_classes_differ_visibly():
    colors = [class_color(i) for i in range(80)]
    assert colors == [class_color(i) for i in range(80)]
    assert class_color(1000) in [class_color(i) for i in range(96)]
    lab = cv2.cvtColor(np.array([colors], np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    apart = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(lab, 2)]
    assert min(apart) > 10  # CIELAB: about 2.3 can just be told apart


def test_labels_stay_in_the_picture_and_apart_where_there_is_room():
    taken = []
    for i in range(12):
        box = (300 + i, 200 + i, 360 + i, 260 + i)
        place = _free_place(_places(box, (100, 18), (640, 480)), taken)
        assert 0 <= place[0] < place[2] <= 640
        assert 0 <= place[1] < place[3] <= 480
        assert not any(_common_area(place, other) for other in taken)
        taken.append(place)


@pytest.mark.parametrize(
    "box", [(-5, -5, 10, 10), (630, 470, 640, 480), (0, 0, 640, 480), (0, 470, 640, 480)]
)
def test_labels_of_boxes_at_the_edge_are_moved_in(box):
    for left, top, right, bottom in _places(box, (100, 18), (640, 480)):
        assert left >= 0
        assert top >= 0
        assert right <= 640
        assert bottom <= 480


@pytest.mark.parametrize("size", [(1, 1), (32, 40), (600, 800)])
def test_a_class_map_is_tinted_with_a_legend(size):
    labels = np.zeros(size, np.int16)
    labels[size[0] // 2 :] = 1
    image = np.full((*size, 3), 100, np.uint8)
    drawn = Segmentation(labels, ("sky", "a road of a very long name " * 9)).draw(image)
    factor = drawn.shape[0] // size[0]
    assert drawn.shape == (size[0] * factor, size[1] * factor, 3)
    expected = 100 * 0.55 + np.array(class_color(int(labels[-1, -1]))) * 0.45
    np.testing.assert_allclose(drawn[-1, -1], expected, atol=1)


def test_a_very_long_name_is_cut_at_once_to_what_fits(monkeypatch):
    plain, measured = ImageFont.FreeTypeFont.getlength, []
    monkeypatch.setattr(
        ImageFont.FreeTypeFont,
        "getlength",
        lambda font, text, *args, **kwargs: measured.append(len(text)) or plain(font, text, *args, **kwargs),
    )
    for name in ("word " * 20_000, "w" * 100_000):
        measured.clear()
        one((400, 400), [0, 0, 300, 300], name=name).draw(np.zeros((400, 400, 3), np.uint8))
        assert len(name) <= sum(measured) < 1.2 * len(name)  # whole but once, not a letter less each time
    font = ImageFont.load_default(12)
    cut = _cut("w" * 100, font, 200)
    assert font.getlength(cut) <= 200 < font.getlength("w" + cut)
    short = _shortened("w" * 100 + " 0.87", font, 200)
    assert short.endswith("w… 0.87")
    assert font.getlength(short) <= 200 < font.getlength("w" + short)


def many(count, labels, masks=True):
    """Squares of 12 pixels in rows on a picture of 400x500."""
    size, boxes, segments = (400, 500), [], []
    for k in range(count):
        x, y = 16 * (k % 30), 60 + 16 * (k // 30)
        mask = np.zeros(size, bool)
        mask[y : y + 12, x : x + 12] = True
        boxes.append([x, y, x + 12, y + 12])
        segments.append(Mask.from_full(mask))
    return Detections(
        size,
        np.array(boxes, np.float32),
        np.full(count, 0.9, np.float32),
        np.array(labels, np.int32),
        ("nucleus", "cell"),
        tuple(segments) if masks else None,
    )


def test_a_crowd_of_one_class_has_a_colour_each_and_no_labels_over_it():
    image = np.full((400, 500, 3), 128, np.uint8)
    drawn = many(300, [0] * 300).draw(image)
    centres = [drawn[66 + 16 * (k // 30), 6 + 16 * (k % 30)].tolist() for k in range(300)]
    expected = [np.rint(128 * 0.55 + np.array(class_color(k)) * 0.45) for k in range(300)]
    np.testing.assert_allclose(sorted(centres), sorted(color.tolist() for color in expected), atol=1)
    # Between the objects the picture is to be seen: no boxes and no names.
    np.testing.assert_array_equal(drawn[60:220, 13:480:16], 128)
    assert (drawn[:20, :60] < 100).any()  # how many there are


def test_a_crowd_of_several_classes_keeps_their_colours():
    image = np.full((400, 500, 3), 128, np.uint8)
    drawn = many(300, [k % 2 for k in range(300)]).draw(image)
    for k in (0, 1, 298, 299):
        expected = 128 * 0.55 + np.array(class_color(k % 2)) * 0.45
        np.testing.assert_allclose(drawn[66 + 16 * (k // 30), 6 + 16 * (k % 30)], expected, atol=1)


def test_a_crowd_without_masks_keeps_its_boxes():
    image = np.full((400, 500, 3), 128, np.uint8)
    drawn = many(300, [0] * 300, masks=False).draw(image)
    np.testing.assert_array_equal(drawn[66 + 16, 16], class_color(0))
