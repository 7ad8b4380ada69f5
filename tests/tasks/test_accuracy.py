"""COCO average precision: against pycocotools' own summary, and at its extremes."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from meta_deploy.tasks.accuracy import coco_ap, match_counts


def encoded(x, y, w, h):
    mask = np.zeros((64, 64), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    counts = rle.encode(mask)
    return {"size": [64, 64], "counts": counts["counts"].decode()}


@pytest.fixture
def truth():
    boxes = [(2, 3, 20, 12), (30, 8, 15, 40), (5, 5, 30, 30), (40, 40, 20, 20)]
    return {
        "images": [{"id": i, "height": 64, "width": 64, "file_name": str(i)} for i in range(2)],
        "categories": [{"id": 0, "name": "disc"}, {"id": 3, "name": "ring"}],
        "annotations": [
            {
                "id": k + 1,
                "image_id": k // 2,
                "category_id": 3 * (k % 2),
                "bbox": list(map(float, box)),
                "area": box[2] * box[3],
                "segmentation": encoded(*box),
                "iscrowd": 0,
            }
            for k, box in enumerate(boxes)
        ],
    }


@pytest.fixture
def perfect(truth):
    keys = ("image_id", "category_id", "bbox", "segmentation")
    return [{**{key: a[key] for key in keys}, "score": 0.9} for a in truth["annotations"]]


def test_the_ground_truth_itself_scores_one(truth, perfect):
    report = coco_ap(truth, perfect)
    for kind in ("box", "mask"):
        assert report[kind]["AP"] == pytest.approx(1)
        assert report[kind]["per_class"] == pytest.approx({"disc": 1, "ring": 1})


def test_no_results_score_zero(truth):
    report = coco_ap(truth, [])
    assert report["box"]["AP"] == report["mask"]["AP"] == 0


def test_agrees_with_the_summary_of_pycocotools(truth, perfect):
    shifted = copy.deepcopy(perfect)
    for k, result in enumerate(shifted):
        x, y, w, h = (int(v) for v in result["bbox"])
        result.update(bbox=[x + k, y, w, h], segmentation=encoded(x + k, y, w, h), score=0.9 - 0.1 * k)
    report = coco_ap(truth, shifted)
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = {"info": {}, **copy.deepcopy(truth)}
            coco.createIndex()
            found = coco.loadRes(copy.deepcopy(shifted))
            evaluation = COCOeval(coco, found, name)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        mine = [report[kind][key] for key in ("AP", "AP50", "AP75")]
        assert mine == pytest.approx(evaluation.stats[:3].tolist())
        assert 0 < mine[0] < 1


def test_detections_without_masks_count_only_as_boxes(truth, perfect):
    report = coco_ap(truth, [{k: v for k, v in r.items() if k != "segmentation"} for r in perfect])
    assert report["box"]["AP"] == pytest.approx(1)
    assert report["mask"]["AP"] == 0


def test_reads_a_file_prints_nothing_and_leaves_its_arguments_alone(truth, perfect, tmp_path, capsys):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    before = copy.deepcopy((truth, perfect))
    assert coco_ap(path, perfect) == coco_ap(truth, perfect)
    assert (truth, perfect) == before
    assert capsys.readouterr().out == ""


def test_more_detections_than_a_hundred_count_where_they_are_asked_for():
    boxes = [[10.0 * (k % 20), 10.0 * (k // 20), 8.0, 8.0] for k in range(150)]
    truth = {
        "images": [{"id": 1, "width": 200, "height": 80}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [
            {"id": k + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 64, "iscrowd": 0}
            for k, box in enumerate(boxes)
        ],
    }
    results = [
        {"image_id": 1, "category_id": 1, "score": 0.9 - k / 1000, "bbox": b} for k, b in enumerate(boxes)
    ]
    assert coco_ap(truth, results)["box"]["AP"] == pytest.approx(67 / 101, abs=0.01)
    assert coco_ap(truth, results, max_detections=150)["box"]["AP"] == pytest.approx(1.0)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_matches_of_masks_that_do_not_overlap_are_the_best_assignment(seed):
    """Where the masks on each side are disjoint, an IoU above a half names one partner at most."""
    rng = np.random.default_rng(seed)

    def label_map():
        labels = np.zeros((24, 24), int)
        for k in range(1, rng.integers(1, 7)):
            y, x = rng.integers(0, 18, 2)
            labels[y : y + rng.integers(2, 9), x : x + rng.integers(2, 9)] = k
        return labels

    def records(labels, more):
        for k in np.unique(labels[labels > 0]):
            mask = np.asfortranarray((labels == k).astype(np.uint8))
            yield {"image_id": 5, "category_id": 1, "segmentation": rle.encode(mask), **more(k)}

    wanted, found = label_map(), label_map()
    if rng.random() < 0.5:
        found[wanted > 0] = wanted[wanted > 0]
    truth = {
        "images": [{"id": 5}, {"id": 6}],
        "annotations": list(records(wanted, lambda k: {"iscrowd": 0})),
    }
    results = list(records(found, lambda k: {"score": float(rng.random())}))
    counts = match_counts(truth, results, iou=0.501)

    pairs = 0
    for a in np.unique(wanted[wanted > 0]):
        for b in np.unique(found[found > 0]):
            both, either = ((wanted == a) & (found == b)).sum(), ((wanted == a) | (found == b)).sum()
            pairs += both / either >= 0.501
    assert counts == {5: (pairs, len(results) - pairs, len(truth["annotations"]) - pairs), 6: (0, 0, 0)}


def test_a_second_result_on_one_object_and_one_of_another_class_are_false():
    mask = rle.encode(np.asfortranarray(np.ones((6, 6), np.uint8)))
    truth = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "category_id": 1, "segmentation": mask}]}

    def result(category, score):
        return {"image_id": 1, "category_id": category, "score": score, "segmentation": mask}

    assert match_counts(truth, [result(1, 0.9), result(1, 0.8)]) == {1: (1, 1, 0)}
    assert match_counts(truth, [result(2, 0.9)]) == {1: (0, 1, 1)}
    assert match_counts(truth, []) == {1: (0, 0, 1)}
