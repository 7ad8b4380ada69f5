"""COCO average precision: against pycocotools' own summary, and at its extremes."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from meta_deploy.report.accuracy import coco_ap


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
