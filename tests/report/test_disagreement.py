"""Which images are shown, what their disagreement is, and that the overlays are pictures of them."""

import io

import numpy as np
import pytest
from PIL import Image

from meta_deploy.report.disagreement import Disagreements, disagreement
from meta_deploy.tasks.detection import Detections
from meta_deploy.tasks.masks import Mask
from meta_deploy.tasks.raw import Arrays
from meta_deploy.tasks.semantic_segmentation import Segmentation

CLASSES = ("disc", "star")
BOXES = [(2, 3, 22, 15), (30, 8, 45, 48)]
SIZE = (64, 64)


def boxes(found, scores=None, labels=None, segments=None):
    count = len(found)
    return Detections(
        SIZE,
        np.array(found, np.float32).reshape(-1, 4),
        np.array(scores or [0.9] * count, np.float32),
        np.array(labels or [0] * count, np.int32),
        CLASSES,
        segments=segments,
    )


def maps(share):
    """Class maps of which a share of the pixels is of class 1."""
    labels = np.zeros(SIZE, np.int16)
    labels.flat[: int(share * labels.size)] = 1
    return Segmentation(labels, CLASSES)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (boxes(BOXES), 0),
        (boxes([*BOXES, (0, 0, 9, 9)], [0.9, 0.9, 0.2]), 0),  # what is not sure is not compared
        (boxes(BOXES[:1]), 1 / 2),
        (boxes([*BOXES, (0, 0, 9, 9)]), 1 / 3),
        (boxes(BOXES, labels=[0, 1]), 1 - 1 / 3),
        (boxes([(x + 3, y, x1 + 3, y1) for x, y, x1, y1 in BOXES]), 0),  # IoU 17/23 and 12/18
        (boxes([]), 1),
    ],
)
def test_detections_without_a_partner_are_counted(other, expected):
    assert disagreement(boxes(BOXES), other) == pytest.approx(expected)
    assert disagreement(other, boxes(BOXES)) == pytest.approx(expected)


def test_nothing_and_nothing_agree():
    assert disagreement(boxes([]), boxes([])) == 0


def test_masks_count_where_both_have_them():
    whole = Mask.from_crop(np.ones((20, 20), bool), 0, 0, SIZE)
    part = Mask.from_crop(np.tri(20, 20, -2, dtype=bool), 0, 0, SIZE)  # under half of the box
    box = [(0, 0, 20, 20)]
    full, half = (boxes(box, segments=(mask,)) for mask in (whole, part))
    assert disagreement(full, full) == 0
    assert disagreement(full, half) == 1
    assert disagreement(boxes(box), half) == 0


def test_maps_by_pixels_and_others_not_at_all():
    assert disagreement(maps(0), maps(0.25)) == 0.25
    assert disagreement(maps(0), boxes(BOXES)) is None
    assert disagreement(Arrays({}), Arrays({})) is None


def test_the_worst_images_are_shown_and_equal_ones_are_not(tmp_path):
    shares = {"a.png": 0.5, "b.png": 0.0, "c.png": 0.1, "d.png": 0.9, "e.png": 0.2}
    seen = Disagreements()
    for at, (name, share) in enumerate(shares.items()):
        path = str(tmp_path / name)
        Image.new("RGB", SIZE, (0, 50 * at, 0)).save(path)
        results = {"first": maps(0), "same": maps(0), "other": maps(share)}
        seen.see(path, results)
    found = seen.drawn()
    assert [one.image.rpartition("/")[2] for one in found] == ["d.png", "a.png", "e.png"]
    assert found[0].values == {"same": 0, "other": pytest.approx(0.9, abs=1e-3)}
    pictures = [Image.open(io.BytesIO(jpeg)) for jpeg in found[0].overlays.values()]
    first, same, other = (np.array(picture).astype(int) for picture in pictures)
    np.testing.assert_array_equal(first, same)
    assert abs(first - other).mean() > 10
    assert max(first.shape) <= 480


def test_an_image_that_is_gone_is_told_of_without_pictures(tmp_path):
    seen = Disagreements()
    path = str(tmp_path / "gone.png")
    seen.see(path, {"first": maps(0), "other": maps(1)})
    (found,) = seen.drawn()
    assert (found.values, found.overlays) == ({"other": 1.0}, {})


def test_one_entry_alone_agrees():
    seen = Disagreements()
    seen.see("a.png", {"first": maps(0)})
    assert seen.drawn() == ()
