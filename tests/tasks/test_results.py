"""Results know their next steps: filter, COCO records that pycocotools accepts, JSON, drawing, saving."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from meta_deploy.errors import InputError
from meta_deploy.tasks.detection import Detections
from meta_deploy.tasks.masks import Mask
from meta_deploy.tasks.raw import Arrays
from meta_deploy.tasks.results import Timings, coco_category_ids, save_image
from meta_deploy.tasks.semantic_segmentation import Segmentation

CLASSES = ("disc", "star")
MASKS = np.zeros((2, 40, 60), bool)
MASKS[0, 5:20, 10:30] = True
MASKS[1, 30:, 50:] = True


def made(**changes):
    content = {
        "size": (40, 60),
        "boxes": np.array([[10, 5, 30, 20], [50.5, 30.25, 60, 40]], np.float32),
        "scores": np.array([0.9, 0.4], np.float32),
        "labels": np.array([1, 0], np.int32),
        "classes": CLASSES,
        "segments": tuple(map(Mask.from_full, MASKS)),
        "timings": Timings(1.23456, 2, 3),
        **changes,
    }
    return Detections(**content)


def test_masks_come_at_full_size():
    np.testing.assert_array_equal(made().masks, MASKS)
    assert made(segments=None).masks is None


def test_filtering_keeps_everything_together():
    kept = made().filter(0.5)
    assert (len(made()), len(kept), kept.names) == (2, 1, ["star"])
    np.testing.assert_array_equal(kept.masks, MASKS[:1])
    assert len(made().filter(0.95)) == 0
    assert made().filter(0.95).masks.shape == (0, 40, 60)


def test_a_result_prints_as_one_line():
    assert repr(made()) == str(made()) == "2 objects: 1 star, 1 disc"
    assert repr(made()[:1]) == "1 object: 1 star"
    assert repr(made()[[]]) == "0 objects"
    many = Detections(
        (9, 9), np.zeros((28, 4)), np.ones(28), np.repeat(np.arange(7), range(1, 8)), tuple("abcdefg")
    )
    assert repr(many) == "28 objects: 7 g, 6 f, 5 e, 4 d, 3 c, …"
    labels = np.repeat([0, 1], [52, 148]).reshape(10, 20).astype(np.int16)
    assert repr(Segmentation(labels, ("sky", "road"))) == "road 74%, sky 26%"


def objects(count, size=(8, 9), classes=CLASSES):
    """`count` objects told apart by every field, with masks of one pixel each, by falling score."""
    boxes = np.arange(4 * count, dtype=np.float32).reshape(count, 4)
    scores = np.linspace(0.9, 0.1, count, dtype=np.float32)
    pixels = np.zeros((count, size[0] * size[1]), bool)
    pixels[np.arange(count), np.arange(count)] = True
    masks = tuple(Mask.from_full(mask.reshape(size)) for mask in pixels)
    return Detections(size, boxes, scores, np.arange(count, dtype=np.int32) % 2, classes, masks)


def fields(result):
    return result.boxes.tolist(), result.scores.tolist(), result.names, result.masks.tolist()


COUNT = 6
INDICES = st.one_of(
    st.slices(COUNT),
    st.lists(st.integers(-COUNT, COUNT - 1)).map(lambda chosen: np.array(chosen, int)),
    st.lists(st.booleans(), min_size=COUNT, max_size=COUNT).map(np.array),
)


@given(INDICES)
def test_an_index_takes_the_same_of_every_field(index):
    whole, numbers = objects(COUNT), np.arange(COUNT)[index]
    chosen = whole[index]
    assert len(chosen) == len(numbers)
    for array, all_of_it in zip(fields(chosen), fields(whole), strict=True):
        assert array == [all_of_it[i] for i in numbers]
    assert (chosen.size, chosen.classes) == (whole.size, whole.classes)


@given(st.lists(st.integers(0, 2), min_size=COUNT, max_size=COUNT))
def test_parts_merge_into_the_whole_again(part):
    whole = objects(COUNT)
    parts = [whole[np.array(part) == i] for i in range(3)]
    assert fields(Detections.merge(parts)) == fields(whole)


def test_iterating_gives_a_result_for_each_object():
    assert [one.names for one in made()] == [["star"], ["disc"]]
    assert all(isinstance(one, Detections) and len(one) == 1 for one in made())
    assert made()[-1].names == ["disc"]
    assert list(made()[:0]) == []


@pytest.mark.parametrize("index", [2, -3, [True], [5], None, (0, 1), [[0, 1]], True])
def test_an_index_that_does_not_fit_is_an_index_error(index):
    with pytest.raises(IndexError):
        made()[index]


def test_merging_keeps_the_path_they_share_and_adds_the_times():
    first, other = made(path="a.jpg"), made(path="b.jpg")
    both = Detections.merge([first, first])
    assert both.path == "a.jpg"
    assert both.scores.tolist() == sorted(both.scores.tolist(), reverse=True)
    assert both.timings.model == 4
    assert Detections.merge([first, other]).path is None
    assert Detections.merge([made(segments=None)]).segments is None


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ([], "nothing to merge"),
        ([made(), made(size=(40, 61))], r"different sizes, \(40, 60\) and \(40, 61\)"),
        ([made(), made(classes=("disc", "ring"))], "different classes"),
        ([made(), made(segments=None)], "with masks and without"),
    ],
)
def test_what_does_not_belong_together_is_not_merged(results, said):
    with pytest.raises(InputError, match=said):
        Detections.merge(results)


def test_supervision_gets_all_or_is_named(monkeypatch):
    stand_in = SimpleNamespace(Detections=lambda **fields: SimpleNamespace(**fields))
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    theirs = made().to_supervision()
    np.testing.assert_array_equal(theirs.xyxy, made().boxes)
    np.testing.assert_array_equal(theirs.mask, MASKS)
    assert (theirs.class_id.tolist(), theirs.data["class_name"].tolist()) == ([1, 0], ["star", "disc"])
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(InputError, match="pip install supervision"):
        made().to_supervision()


def test_the_real_supervision_takes_it():
    supervision = pytest.importorskip("supervision")
    for result in (made(), made()[:0], made(segments=None)):
        theirs = result.to_supervision()
        assert isinstance(theirs, supervision.Detections)
        assert len(theirs) == len(result)


def test_coco_records_are_those_of_pycocotools():
    records = made().to_coco(7)
    assert [r["category_id"] for r in records] == [2, 1]
    assert records[1]["bbox"] == [50.5, 30.25, 9.5, 9.75]
    for record, mask in zip(json.loads(json.dumps(records)), MASKS, strict=True):
        assert record["image_id"] == 7
        np.testing.assert_array_equal(coco.decode(record["segmentation"]), mask)
    assert made().to_coco(7, category_ids=[10, 20])[0]["category_id"] == 20
    assert "segmentation" not in made(segments=None).to_coco(7)[0]


def test_cocos_own_classes_get_cocos_own_ids(coco_tiny):
    categories = json.loads((coco_tiny / "instances_val.json").read_text())["categories"]
    categories.sort(key=lambda category: category["id"])
    assert coco_category_ids([c["name"] for c in categories]) == [c["id"] for c in categories]


def test_the_dictionary_is_json_with_all_the_contract_names():
    content = json.loads(json.dumps(made(path="a.jpg").to_dict()))
    assert content["path"] == "a.jpg"
    assert content["size"] == [40, 60]
    assert content["timings"] == {"pre_ms": 1.235, "model_ms": 2, "post_ms": 3}
    first = content["detections"][0]
    assert (first["label"], first["name"], first["box"]) == (1, "star", [10, 5, 30, 20])
    assert first["score"] == pytest.approx(0.9, abs=1e-6)
    np.testing.assert_array_equal(coco.decode(first["mask"]), MASKS[0])


def test_a_class_map_lists_its_classes_by_area():
    labels = np.zeros((40, 60), np.int16)
    labels[:, :50] = 1
    result = Segmentation(labels, CLASSES)
    assert result.areas == {1: 2000, 0: 400}
    segments = json.loads(json.dumps(result.to_dict()))["segments"]
    assert [(s["name"], s["pixels"]) for s in segments] == [("star", 2000), ("disc", 400)]
    np.testing.assert_array_equal(coco.decode(segments[0]["mask"]), labels == 1)
    np.testing.assert_array_equal(coco.decode(result.to_coco(1)[1]["segmentation"]), labels == 0)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "npz"])
def test_what_a_disk_has_no_room_for_is_an_error_and_the_old_file_stays(tmp_path, full_disk, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    path = tmp_path / f"out.{suffix}"
    path.write_bytes(b"old")
    save = Arrays({"x": noise}).save if suffix == "npz" else lambda path: save_image(path, noise)
    with pytest.raises(InputError, match="cannot write"):
        save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_an_image_that_its_format_cannot_hold_is_one_sentence(tmp_path):
    for name in ("wide.jpg", "wide.webp"):
        with pytest.raises(InputError, match=r"cannot write.*as (JPEG|WEBP).*use \.png"):
            save_image(tmp_path / name, np.zeros((2, 70_000, 3), np.uint8))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".JPEG"])
def test_an_overlay_is_saved_in_the_format_of_its_suffix(tmp_path, suffix):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    made(path=str(tmp_path / "a.png")).save(tmp_path / f"out{suffix}")
    with Image.open(tmp_path / f"out{suffix}") as image:
        image.load()
        assert image.width % 60 == image.height % 40 == 0


def test_saving_without_a_way_to_do_it_is_refused(tmp_path):
    image = np.zeros((40, 60, 3), np.uint8)
    with pytest.raises(InputError, match=r"use .jpg or .png"):
        made().save(tmp_path / "out.xyz", image)
    with pytest.raises(InputError, match="no folder"):
        made().save(tmp_path / "none" / "out.png", image)
    with pytest.raises(InputError, match="pass the image"):
        made().save(tmp_path / "out.png")
    with pytest.raises(InputError, match="is 40x60"):
        made().save(tmp_path / "out.png", image.transpose(1, 0, 2))
    assert os.listdir(tmp_path) == []
