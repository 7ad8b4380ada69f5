"""Results by hand held against annotations by hand, and against the first entry's."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from meta_deploy.errors import InputError
from meta_deploy.report.judge import Judge
from meta_deploy.report.worker import Failed
from meta_deploy.tasks.annotations import CocoAnnotations, LabelImages, open_annotations
from meta_deploy.tasks.detection import Detections
from meta_deploy.tasks.raw import Arrays
from meta_deploy.tasks.semantic_segmentation import Segmentation

CLASSES = ("disc", "star")
BOXES = [(2, 3, 22, 15), (30, 8, 45, 48)]
IMAGES = ["pictures/one.jpg", "pictures/two.jpg"]


class Says:
    """An entry that gives what it was made with."""

    def __init__(self, *results, logits=None):
        self.results, self.logits = results, logits

    def call(self, method, index):
        if method == "logits":
            return self.logits
        assert method == "result"
        if self.results[index] is None:
            raise Failed("no result")
        return self.results[index]


def boxes(found, scores=None, labels=None, classes=CLASSES):
    count = len(found)
    return Detections(
        (64, 64),
        np.array(found, np.float32).reshape(-1, 4),
        np.array(scores or [0.9] * count, np.float32),
        np.array(labels or range(count), np.int32),
        classes,
    )


def maps(*rows):
    return Segmentation(np.array(rows, np.int16), CLASSES)


def judge(workers, images, truth, errors):
    """What entries make of all images, held against the truth."""
    found = Judge(workers, images, truth, errors)
    for index in range(len(images)):
        found.look(index)
    return found.accuracies()


@pytest.fixture
def coco(tmp_path):
    content = {
        "images": [
            {"id": i, "file_name": f"{n}.jpg", "height": 64, "width": 64} for i, n in ((7, "one"), (9, "two"))
        ],
        "categories": [{"id": 40, "name": "star"}, {"id": 30, "name": "disc"}],
        "annotations": [
            {
                "id": 2 * image + label + 1,
                "image_id": (7, 9)[image],
                "category_id": (30, 40)[label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
            for image in (0, 1)
            for label, (x0, y0, x1, y1) in enumerate(BOXES)
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_average_precision_is_against_categories_of_the_same_name(coco):
    workers = {"right": Says(boxes(BOXES), boxes(BOXES)), "swapped": Says(*[boxes(BOXES, labels=[1, 0])] * 2)}
    found = judge(workers, IMAGES, open_annotations(coco), {})
    assert found["right"].against == "annotations"
    assert (found["right"].images, found["right"].box_ap) == (2, pytest.approx(1))
    assert found["swapped"].box_ap == 0
    assert found["right"].mask_ap is None


def test_classes_without_a_category_of_their_name_go_by_number(coco):
    truth = CocoAnnotations(str(coco))
    assert truth.category_ids(("disc", "ring", "star")) == [30, -2, 40]
    assert truth.category_ids(("a", "b")) == [1, 2]


def test_only_the_images_that_were_run_count(coco):
    found = judge({"a": Says(boxes(BOXES))}, IMAGES[:1], open_annotations(coco), {})
    assert (found["a"].images, found["a"].box_ap) == (1, pytest.approx(1))


def test_all_that_the_first_entry_found_is_to_be_found_again():
    corners = [(x, y) for x in range(0, 60, 4) for y in range(0, 60, 4)]
    many = boxes([(x, y, x + 3, y + 3) for x, y in corners], labels=[0] * len(corners))
    assert len(corners) > 100  # as many as COCO counts
    found = judge({"first": Says(many), "same": Says(many)}, IMAGES[:1], None, {})
    assert found["same"].box_ap == pytest.approx(1)


def test_without_annotations_the_first_entry_is_right_where_it_is_sure():
    unsure = boxes([*BOXES, (0, 0, 9, 9)], [0.9, 0.8, 0.1], [0, 1, 0])
    workers = {"first": Says(unsure), "same": Says(boxes(BOXES)), "half": Says(boxes(BOXES[:1]))}
    found = judge(workers, IMAGES[:1], None, {})
    assert "first" not in found
    assert found["same"].against == "the first entry"
    assert found["same"].box_ap == pytest.approx(1)
    assert found["half"].box_ap == pytest.approx(0.5)  # of two classes one


def test_maps_are_compared_pixel_by_pixel():
    workers = {"first": Says(maps([0, 0], [1, 1])), "other": Says(maps([0, 0], [1, 0]))}
    found = judge(workers, IMAGES[:1], None, {})["other"]
    assert found.pixel_accuracy == 0.75
    assert found.mean_iou == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_label_images_leave_out_pixels(tmp_path):
    for name, rows in (("one", [[0, 255], [1, 1]]), ("two", [[0, 0], [1, 255]])):
        Image.fromarray(np.array(rows, np.uint8)).save(tmp_path / f"{name}.png")
    found = judge({"a": Says(*[maps([0, 0], [1, 0])] * 2)}, IMAGES, LabelImages(str(tmp_path)), {})["a"]
    assert (found.against, found.images) == ("annotations", 2)
    assert found.pixel_accuracy == pytest.approx(5 / 6)
    assert found.mean_iou == pytest.approx((3 / 4 + 2 / 3) / 2)


def test_arrays_differ_by_the_largest_value():
    one = Arrays({"y": np.array([1.0, -4.0]), "n": np.array([True])})
    near = Arrays({"y": np.array([1.0, -4.2]), "n": np.array([True])})
    other = Arrays({"y": np.array([1.0]), "n": np.array([True])})
    found = judge({"a": Says(one), "b": Says(near), "c": Says(other)}, IMAGES[:1], None, {})
    assert found["b"].max_relative_error == pytest.approx(0.05)
    assert found["c"].max_relative_error == math.inf


def test_what_cannot_be_compared_has_no_accuracy(coco):
    workers = {"boxes": Says(boxes(BOXES)), "map": Says(maps([0, 0])), "arrays": Says(Arrays({}))}
    assert judge(workers, IMAGES[:1], None, {}) == {}
    assert list(judge(workers, IMAGES[:1], open_annotations(coco), {})) == ["boxes"]


def test_an_entry_that_fails_leaves_the_others_their_truth():
    errors = {}
    workers = {"bad": Says(None), "first": Says(boxes(BOXES)), "second": Says(boxes(BOXES))}
    found = judge(workers, IMAGES[:1], None, errors)
    assert errors == {"bad": "no result"}
    assert list(found) == ["second"]


def test_annotations_of_other_images_and_none_at_all_are_refused(coco, tmp_path):
    truth = open_annotations(coco)
    assert truth.known(["a/three.jpg", *IMAGES]) == IMAGES
    with pytest.raises(InputError, match=r"three\.jpg"):
        truth.known(["a/three.jpg"])
    for name, content in (("broken.json", "{"), ("list.json", "[]"), ("no_boxes.json", '{"images": []}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=name):
            open_annotations(tmp_path / name)
    with pytest.raises(InputError, match=r"none\.json"):
        open_annotations(tmp_path / "none.json")


def test_colours_are_no_labels(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "one.png")
    with pytest.raises(InputError, match="colours"):
        open_annotations(tmp_path).check(IMAGES[:1])


# --- scores and logits ---


def test_scores_differ_by_what_those_of_the_first_entrys_detections_differ():
    far = (40, 40, 60, 60)
    first = boxes(
        [*BOXES, far], scores=[0.9, 0.8, 0.2], labels=[0, 1, 0]
    )  # the last is not sure enough to be looked for
    moved = [(x0 + 1, y0, x1 + 1, y1) for x0, y0, x1, y1 in BOXES]
    other = boxes([*moved, BOXES[0], far], scores=[0.85, 0.65, 0.6, 0.9], labels=[0, 1, 0, 0])
    workers = {"first": Says(first, first), "other": Says(other, first)}
    found = judge(workers, IMAGES, None, {})["other"]
    # Of two that overlap the first's disc, the one of the same place is its partner.
    assert found.mean_score_difference == pytest.approx((0.3 + 0.15 + 0 + 0) / 4)
    assert found.max_score_difference == pytest.approx(0.3)
    assert found.logit_error is None


def test_score_differences_stand_beside_figures_against_annotations(coco):
    workers = {"a": Says(boxes(BOXES), boxes(BOXES)), "b": Says(*[boxes(BOXES, scores=[0.9, 0.7])] * 2)}
    found = judge(workers, IMAGES, open_annotations(coco), {})
    assert found["a"].mean_score_difference is None  # it is the first
    assert found["b"].mean_score_difference == pytest.approx(0.1)


def test_logits_differ_by_the_norm_and_not_where_shapes_do():
    pixels = maps([0, 1], [1, 1])
    logits = np.array([[[[3.0, 0], [0, 0]], [[0, 4.0], [0, 0]]]], np.float32)
    near, other = logits.copy(), np.zeros((1, 2, 1, 1), np.float32)
    near[0, 0, 1, 1] = 0.5
    workers = {
        "first": Says(pixels, pixels, logits=logits),
        "near": Says(pixels, pixels, logits=near),
        "other size": Says(pixels, pixels, logits=other),
        "none": Says(pixels, pixels),
    }
    found = judge(workers, IMAGES, None, {})
    assert found["near"].logit_error == pytest.approx(0.5 / 5)
    assert (found["near"].pixel_accuracy, found["near"].mean_iou) == (1, 1)
    assert found["other size"].logit_error is found["none"].logit_error is None
