"""Training samples: numbered, augmented, and their masks where the objects are seen."""

import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle

from tools.scenes import CLASSES
from tools.training_data import CocoFolder, Scenes, recolour

BRIGHT = 230


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures with three kinds of annotation, category ids with a gap, a crowd; one without objects."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "train").mkdir()
    (folder / "val").mkdir()
    disc = cv2.circle(np.zeros((90, 120), np.uint8), (40, 45), 18, 1, -1)
    images, annotations = [], []
    for number, name in enumerate(["a.png", "empty.png"], 1):
        picture = np.full((90, 120, 3), 20, np.uint8)
        if number == 1:
            picture[disc > 0] = BRIGHT
            picture[60:80, 85:111] = BRIGHT
        cv2.imwrite(str(folder / "train" / name), picture)
        images.append({"id": number, "file_name": name, "width": 120, "height": 90})
    encoded = rle.encode(np.asfortranarray(disc))
    encoded["counts"] = encoded["counts"].decode()
    square = [85, 60, 111, 60, 111, 80, 85, 80]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 3, "iscrowd": 0, "segmentation": encoded},
        {"id": 2, "image_id": 1, "category_id": 7, "iscrowd": 0, "segmentation": [square]},
        {"id": 3, "image_id": 1, "category_id": 7, "iscrowd": 1, "segmentation": encoded},
    ]
    categories = [{"id": 7, "name": "square"}, {"id": 3, "name": "disc"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances_train.json").write_text(json.dumps(data))
    return folder


def test_categories_are_in_the_order_of_their_ids(folder):
    assert CocoFolder(folder).classes == ("disc", "square")


def test_a_sample_is_a_function_of_its_number(folder):
    source, again = CocoFolder(folder), CocoFolder(folder)
    for k in range(5):
        first, second = source.sample(k, 64), again.sample(k, 64)
        assert np.array_equal(first.image, second.image)
        assert np.array_equal(first.masks, second.masks)
    assert not np.array_equal(source.sample(0, 64).image, CocoFolder(folder, seed=1).sample(0, 64).image)


def test_masks_lie_where_the_objects_are_seen_and_boxes_are_tight(folder, monkeypatch):
    monkeypatch.setattr("tools.training_data.recolour", lambda rng, image: image)
    monkeypatch.setattr("tools.training_data.EMPTY", 0)
    source = CocoFolder(folder, magnify=(0.7, 1.6))
    seen = set()
    for k in range(40):
        sample = source.sample(k, 96)
        assert sample.image.shape == (96, 96, 3)
        bright = sample.image[..., 0] >= (BRIGHT + 20) / 2
        union = sample.masks.any(axis=0) if len(sample.masks) else np.zeros((96, 96), bool)
        # What is cut off at the border and smaller than an object may be stays without a mask.
        assert (bright != union).sum() <= 0.06 * bright.sum() + 12
        for box, label, mask in zip(sample.boxes, sample.labels, sample.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            seen.add(int(label))
    assert seen == {0, 1}


def test_some_samples_show_nothing_in_black_white_and_grey(folder, monkeypatch):
    monkeypatch.setattr("tools.training_data.EMPTY", 1)
    samples = [CocoFolder(folder).sample(k, 32) for k in range(40)]
    assert all(len(s.boxes) == len(s.labels) == len(s.masks) == 0 for s in samples)
    brightness = [s.image.mean() for s in samples]
    assert min(brightness) < 30
    assert max(brightness) > 225
    assert any(60 < level < 200 for level in brightness)
    assert any(s.image.std() == 0 for s in samples)
    assert any(s.image.std() > 10 for s in samples)


def test_a_picture_without_objects_gives_empty_arrays_of_the_right_shape(folder):
    source = CocoFolder(folder)
    empty = [s for s in (source.sample(k, 64) for k in range(30)) if not len(s.labels)]
    assert empty
    assert empty[0].masks.shape == (0, 64, 64)
    assert empty[0].boxes.shape == (0, 4)


def test_rare_kinds_are_drawn_more_often_than_their_share(tmp_path):
    (tmp_path / "train").mkdir()
    images = []
    for k in range(17):
        cv2.imwrite(str(tmp_path / "train" / f"{k}.png"), np.zeros((8, 8, 3), np.uint8))
        images.append({"id": k, "file_name": f"{k}.png", "kind": "rare" if k == 0 else "usual"})
    data = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "instances_train.json").write_text(json.dumps(data))
    chance = CocoFolder(tmp_path).chance
    assert chance[0] == pytest.approx(1 / (1 + 16**0.5))
    assert chance.sum() == pytest.approx(1)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_recolouring_keeps_shape_and_type_of_plain_pictures(value):
    rng = np.random.default_rng(0)
    for _ in range(20):
        image = recolour(rng, np.full((12, 10, 3), value, np.uint8))
        assert image.shape == (12, 10, 3)
        assert image.dtype == np.uint8


def test_scenes_are_a_source_too():
    source = Scenes(seed=0)
    assert source.classes == CLASSES
    sample = source.sample(3, 96)
    assert len(sample.boxes) == len(sample.labels) == len(sample.masks)
