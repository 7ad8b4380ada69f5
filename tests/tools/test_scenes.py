"""The scene generator: a pure function of the seed, with honest masks and boxes."""

import numpy as np
import pytest
from pycocotools import mask as rle

from tools.scenes import CLASSES, MAX_SHAPES, coco_dataset, generate


@pytest.fixture(scope="module")
def scenes():
    return {seed: generate(seed) for seed in range(40)}


def same(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("image", "labels", "masks", "boxes"))


def test_a_scene_depends_on_nothing_but_its_seed(scenes):
    np.random.seed(7)  # noqa: NPY002 (global state that must not matter)
    for seed in (39, 3, 17, 3):
        assert same(generate(seed), scenes[seed])
    assert not np.array_equal(scenes[3].image, scenes[4].image)


def test_shapes_and_types(scenes):
    for scene in scenes.values():
        count = len(scene.labels)
        assert 1 <= count <= MAX_SHAPES
        assert (scene.image.shape, scene.image.dtype) == ((320, 320, 3), np.uint8)
        assert (scene.masks.shape, scene.masks.dtype) == ((count, 320, 320), bool)
        assert (scene.boxes.shape, scene.boxes.dtype) == ((count, 4), np.float32)


def test_masks_are_disjoint_and_boxes_tight(scenes):
    for scene in scenes.values():
        assert scene.masks.sum(axis=0).max() == 1
        for mask, box in zip(scene.masks, scene.boxes, strict=True):
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert len(x) > 60


def test_every_class_occurs_about_equally_often(scenes):
    labels = np.concatenate([scene.labels for scene in scenes.values()])
    counts = np.bincount(labels, minlength=len(CLASSES))
    assert len(counts) == len(CLASSES) >= 8
    assert counts.min() > 0.3 * counts.mean()


def test_other_sizes():
    scene = generate(5, (192, 256))
    assert scene.image.shape == (192, 256, 3)
    assert scene.masks.shape[1:] == (192, 256)


def test_colour_does_not_give_the_class_away():
    means = {name: [] for name in CLASSES}
    for seed in range(100, 180):
        scene = generate(seed, (160, 160))
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            means[CLASSES[label]].append(scene.image[mask].mean(axis=0))
    per_class = np.array([np.mean(values, axis=0) for values in means.values()])
    spread = np.std(np.concatenate(list(means.values())), axis=0)
    assert np.all(per_class.std(axis=0) < 0.4 * spread)


def test_coco_ground_truth_holds_the_same_boxes_and_masks(scenes):
    dataset = coco_dataset([3, 9])
    assert [image["id"] for image in dataset["images"]] == [3, 9]
    for seed in (3, 9):
        annotations = [a for a in dataset["annotations"] if a["image_id"] == seed]
        assert [a["category_id"] - 1 for a in annotations] == scenes[seed].labels.tolist()
        for annotation, mask in zip(annotations, scenes[seed].masks, strict=True):
            assert np.array_equal(rle.decode(annotation["segmentation"]).astype(bool), mask)
            assert annotation["bbox"] == rle.toBbox(annotation["segmentation"]).tolist()
