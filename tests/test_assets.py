"""What ships with the package: checkpoints, the bundles exported from them, and annotated pictures."""

import json

import numpy as np
import pytest
import torch

from benchmarks.demo_accuracy import ALL, detection_rows, results_of, segmentation_rows
from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.shipped import ASSETS, SHIPPED, locate
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.imaging.images import read_image
from meta_deploy.imaging.preprocess import Preprocessor
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.registry import config_from_dict
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.targets import open_backend

CHECKPOINTS = dict(zip(SHIPPED, ("meta-nano-mask-rcnn.pth", "meta-nano-upernet.pth"), strict=True))
IMAGES = ASSETS / "images"
PICTURES = sorted(IMAGES.glob("*.png"))
TRUTH = json.loads((IMAGES / "instances.json").read_text())


@pytest.fixture(scope="module", params=SHIPPED)
def name(request):
    return request.param


def test_checkpoints_and_bundles_stay_under_40_mb():
    files = [path for path in ASSETS.rglob("*") if path.is_file() and path.parent != IMAGES]
    assert {path.parent.name for path in files} == {"assets", *SHIPPED}
    assert sum(path.stat().st_size for path in files) < 40e6


def test_there_are_eight_annotated_pictures_to_verify_on():
    assert [path.name for path in PICTURES] == sorted(image["file_name"] for image in TRUTH["images"])
    assert len(PICTURES) == 8
    for image in TRUTH["images"]:
        assert read_image(IMAGES / image["file_name"]).shape == (image["height"], image["width"], 3)


def test_the_bundle_is_of_the_checkpoints_model(name):
    loaded, bundle = load_model(ASSETS / CHECKPOINTS[name]), Bundle.open(locate(name))
    assert config_from_dict(bundle.manifest.model.config) == loaded.config
    assert list(bundle.classes) == list(loaded.class_names)
    assert "nucleus" in bundle.classes
    assert bundle.shown_score == getattr(loaded.config, "shown_score", 0.0)


def test_the_bundle_passed_todays_verification(name):
    verification = Bundle.open(locate(name)).manifest.verification
    assert verification["passed"]
    measured = verification["stages"]["maps"]["tolerance"]["max_relative_error"]
    assert measured <= PRECISIONS["fp32"].tolerances["maps"]


def test_the_bundle_answers_as_the_checkpoint(name):
    bundle = Bundle.open(locate(name))
    model = load_model(ASSETS / CHECKPOINTS[name]).model
    batch, _ = Preprocessor(bundle.input, bundle.preprocess)([read_image(PICTURES[3])])
    with torch.inference_mode():
        expected = {key: value.numpy() for key, value in model(torch.from_numpy(batch)).items()}
    with open_backend(bundle) as backend:
        actual = backend.run({"images": batch})
    if name == "nuclei":
        count = int(expected["num_detections"][0])
        assert actual["num_detections"][0] == count > 0
        np.testing.assert_allclose(actual["boxes"][0, :count], expected["boxes"][0, :count], atol=0.05)
        np.testing.assert_allclose(actual["scores"][0, :count], expected["scores"][0, :count], atol=1e-3)
    else:
        largest = np.abs(expected["logits"]).max()
        np.testing.assert_allclose(actual["logits"], expected["logits"], atol=2e-4 * largest)


@pytest.mark.slow
def test_the_shipped_models_find_nuclei():
    with Predictor(score_threshold=0.0) as predictor:
        found, _ = results_of(predictor, TRUTH, IMAGES)
    row = next(row for row in detection_rows(TRUTH, found, 0.5) if row["pictures"] == ALL)
    assert row["TP/(TP+FP+FN)"] > 0.6
    with Predictor("nuclei-semantic") as predictor:
        found, _ = results_of(predictor, TRUTH, IMAGES)
    row = next(row for row in segmentation_rows(TRUTH, found) if row["pictures"] == ALL)
    assert row["IoU nucleus"] > 0.7


def test_nuclei_are_counted_from_a_score_of_a_half():
    assert Bundle.open(locate("nuclei")).shown_score == 0.5


def test_a_folder_of_a_shipped_name_is_taken_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("nuclei") == locate(None) == ASSETS / "nuclei"
    (tmp_path / "nuclei").mkdir()
    assert locate("nuclei") == "nuclei"
    assert locate(None) == ASSETS / "nuclei"
    assert locate("elsewhere") == "elsewhere"
