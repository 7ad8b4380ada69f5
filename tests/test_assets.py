"""What ships with the package: the demo checkpoint, the bundle exported from it, and pictures."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch

from benchmarks.demo_accuracy import measure
from meta_deploy.bundle.bundle import Bundle
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.imaging.images import read_image
from meta_deploy.imaging.preprocess import Preprocessor
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.registry import config_from_dict, get_config
from meta_deploy.targets import open_backend
from tools.scenes import CLASSES, TEST_SEEDS

ASSETS = Path(str(files("meta_deploy") / "assets"))
CHECKPOINT = ASSETS / "meta-nano-mask-rcnn.pth"
PICTURES = sorted((ASSETS / "images").glob("*.jpg"))


@pytest.fixture(scope="module")
def bundle():
    return Bundle.open(ASSETS / "demo")


def test_checkpoint_and_bundle_stay_under_30_mb(bundle):
    assert CHECKPOINT.stat().st_size + sum(file.stat().st_size for file in bundle.path.iterdir()) < 30e6


def test_there_are_eight_pictures_to_verify_on():
    assert len(PICTURES) == 8


def test_the_bundle_is_of_the_checkpoints_model(bundle):
    loaded = load_model(CHECKPOINT)
    assert loaded.config == get_config("meta-nano-mask-rcnn", num_classes=len(CLASSES))
    assert config_from_dict(bundle.manifest.model.config) == loaded.config
    assert list(bundle.classes) == list(loaded.class_names) == list(CLASSES)


def test_the_bundle_passed_todays_verification(bundle):
    verification = bundle.manifest.verification
    assert verification["passed"]
    assert (
        verification["stages"]["maps"]["tolerance"]["max_relative_error"]
        <= PRECISIONS["fp32"].tolerances["maps"]
    )


def test_the_bundle_answers_as_the_checkpoint(bundle):
    model = load_model(CHECKPOINT).model
    batch, _ = Preprocessor(bundle.input, bundle.preprocess)([read_image(PICTURES[0])])
    with torch.inference_mode():
        expected = model(torch.from_numpy(batch))
    count = int(expected["num_detections"][0])
    with open_backend(bundle) as backend:
        actual = backend.run({"images": batch})
    assert actual["num_detections"][0] == count > 0
    torch.testing.assert_close(
        torch.from_numpy(actual["boxes"])[0, :count], expected["boxes"][0, :count], atol=0.05, rtol=0
    )
    torch.testing.assert_close(
        torch.from_numpy(actual["scores"])[0, :count], expected["scores"][0, :count], atol=1e-3, rtol=0
    )


@pytest.mark.slow
def test_the_demo_model_finds_what_is_in_unseen_scenes(bundle):
    report = measure(bundle.path, TEST_SEEDS[:40])
    assert report["box"]["AP"] >= 0.70
    assert report["mask"]["AP"] >= 0.70
