"""Judging 8 bits by annotations: the drop is what average precision or the mean IoU loses."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.errors import InputError
from meta_deploy.export.options import Options
from meta_deploy.export.pipeline import planned_manifest
from meta_deploy.export.sources import open_source
from meta_deploy.export.trial import AnnotatedTrial
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.targets import TARGETS
from meta_deploy.targets.target import BuildOptions
from meta_deploy.tasks.annotations import open_annotations
from tests import bundles_by_hand

SIZE = (64, 64)
BOXES = [[8, 8, 40, 40], [32, 16, 64, 48]]  # of the hand-made detector, in xyxy


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trial(model, truth, **options):
    """What judges an ONNX file on two pictures, and its graph."""
    Path("net.onnx").write_bytes(model)
    source = open_source("net.onnx", Options(**options), lambda line: None)
    samples = source.samples([Path("one.png"), Path("two.png")])
    bundle = Bundle(Path("b"), planned_manifest(source))
    tolerances = PRECISIONS["int8"].tolerances
    target = TARGETS["onnxruntime"]
    made = AnnotatedTrial(
        source, target, samples, tolerances, BuildOptions(), bundle, open_annotations(truth)
    )
    made.begin(source.graph("native"))
    made.expect(source.graph("native"))
    return made, source.graph("native")


def changed(proto, name, change):
    """A graph with other numbers in a constant."""
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    for tensor in copy.graph.initializer:
        if tensor.name == name:
            numbers = numpy_helper.to_array(tensor).copy()
            change(numbers)
            tensor.CopyFrom(numpy_helper.from_array(numbers, name))
    return copy


def coco(boxes=BOXES, names=("one.png", "two.png")):
    for name in ("one.png", "two.png"):
        Image.new("RGB", SIZE, (200, 200, 200)).save(name)
    annotations = [
        {
            "id": 10 * image + label + 1,
            "image_id": image,
            "category_id": label + 1,
            "iscrowd": 0,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
        }
        for image in range(len(names))
        for label, (x0, y0, x1, y1) in enumerate(boxes)
    ]
    images = [{"id": i, "file_name": name, "height": 64, "width": 64} for i, name in enumerate(names)]
    categories = [{"id": i + 1, "name": f"class {i}"} for i in range(3)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    Path("truth.json").write_text(json.dumps(content))
    return "truth.json"


def test_the_drop_of_a_detector_is_in_points_of_average_precision(here):
    """Of two classes, one that is lost is 50 points; what float32 itself misses does not count."""
    judged, graph = trial(bundles_by_hand.detector(SIZE), coco())
    assert judged.judge(graph).drop == pytest.approx(0)
    lost = changed(graph, "boxes1", lambda boxes: boxes[0, 1].fill(3))
    assert judged.judge(lost).drop == pytest.approx(50, abs=0.1)
    missed, graph = trial(bundles_by_hand.detector(SIZE), coco([BOXES[0], [0, 50, 10, 60]]))
    assert missed.judge(lost).drop == pytest.approx(0, abs=0.1)


def test_the_drop_of_class_maps_is_in_points_of_mean_iou(here):
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:, :32, 0] = pixels[:, 32:, 1] = 255
    labels = np.repeat([0, 1], 32)[None].repeat(64, 0).astype(np.uint8)
    labels[:16] = 255  # does not count
    Path("labels").mkdir()
    for name in ("one", "two"):
        Image.fromarray(pixels).save(f"{name}.png")
        Image.fromarray(labels).save(f"labels/{name}.png")
    judged, graph = trial(bundles_by_hand.segmenter(SIZE), "labels")
    assert judged.judge(graph).drop == pytest.approx(0)
    blind = onnx.ModelProto.FromString(graph.SerializeToString())
    blind.graph.node.insert(0, onnx.helper.make_node("Mul", ["images", "mask"], ["seen"]))
    blind.graph.node[1].input[0] = "seen"
    mask = np.array([1, -1, 1], np.float32).reshape(1, 3, 1, 1)  # green is the least of all colours now
    blind.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    found = judged.judge(blind)
    assert found.drop == pytest.approx(100 - 100 / 3, abs=3)  # of three classes that occur, red stays
    Image.fromarray(labels[:32]).save("labels/two.png")
    with pytest.raises(InputError, match=r"^the labels of 'two.png' are \(32, 64\), and the image"):
        judged.judge(graph)


def test_annotations_that_do_not_fit_are_refused(here):
    labels = here / "labels"
    labels.mkdir()
    detector = bundles_by_hand.detector(SIZE)
    truth = coco()
    refused = [
        ((detector, "labels", {}), r"^'labels' does not fit 'net', which needs a COCO file"),
        (
            (bundles_by_hand.segmenter(SIZE), truth, {}),
            r"^'truth.json' does not fit 'net', which needs a folder",
        ),
        (
            (bundles_by_hand.raw_model(of_images=True), truth, {"scale": 1 / 255}),
            r"^--annotations are for detections and class maps; 'net' has neither",
        ),
        ((detector, coco([]), {}), r"^'truth.json' has nothing of the model's classes on these images"),
    ]
    for (model, annotations, options), message in refused:
        with pytest.raises(InputError, match=message):
            trial(model, annotations, **options)
