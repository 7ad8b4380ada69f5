"""Fixtures that every test may use: bundles made by hand, a picture, the real photos."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meta_deploy.bundle.bundle import Bundle, write_bundle
from tests.bundles_by_hand import detector, manifest, raw_manifest, raw_model, segmenter

COCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco-tiny"

# In a background job Ctrl-C is ignored, and so it would be by the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals():
    """Commands take Ctrl-C and SIGTERM for themselves until their process ends; here it goes on.

    A fixture of a whole module may have run one before this.
    """
    _as_in_a_fresh_process()
    yield
    _as_in_a_fresh_process()


def _as_in_a_fresh_process() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that no worker is left alone with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def made_once(tmp_path_factory) -> None:
    """A folder that all workers share, for what takes long to make (tests/tiny_models.py)."""
    own = tmp_path_factory.getbasetemp()
    os.environ["MADE_ONCE"] = str(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    """The folder of real photos; the test is skipped where it is absent."""
    if not COCO.is_dir():
        pytest.skip(f"the photos of {COCO} are not here")
    return COCO


@pytest.fixture(scope="session")
def bundles(tmp_path_factory) -> Path:
    """Bundles of 64x64: detector, detector-batch (4), segmenter, *-dynamic, raw-image; and raw."""
    folder = tmp_path_factory.mktemp("bundles")
    size = (64, 64)
    instances, semantic = "instance-segmentation", "semantic-segmentation"
    made = {
        "detector": (manifest(instances, size), detector(size)),
        "detector-batch": (manifest(instances, size, batch=4), detector(size, batch=4)),
        "detector-dynamic": (manifest(instances, size, True, 4), detector(size, True)),
        "segmenter": (manifest(semantic, size), segmenter(size)),
        "segmenter-dynamic": (manifest(semantic, size, True), segmenter(size, True)),
        "raw": (raw_manifest(), raw_model()),
        "raw-image": (raw_manifest(of_images=True), raw_model(of_images=True)),
    }
    for name, (content, model) in made.items():
        write_bundle(folder / name, content, {"model.onnx": model})
    return folder


@pytest.fixture
def detector_bundle(bundles) -> Bundle:
    return Bundle.open(bundles / "detector")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """The checkpoint of a tiny detector, which exports in seconds."""
    from meta_deploy.models.checkpoint.save import save_checkpoint  # imports PyTorch
    from tests import tiny_models

    path, config = tmp_path_factory.mktemp("tiny") / "tiny.pth", tiny_models.detector()
    save_checkpoint(path, tiny_models.lively(config), config, list("abcde"))
    return path


@pytest.fixture
def photo() -> np.ndarray:
    """RGB, 96 wide and 128 high, a gradient and a white corner; it lies in 64x64 at half its size."""
    image = np.zeros((128, 96, 3), np.uint8)
    image[..., 0] = np.linspace(0, 200, 96, dtype=np.uint8)
    image[:32, :32] = 255
    return image


@pytest.fixture(scope="session")
def small_images(tmp_path_factory) -> Path:
    """A folder of two images, 64x48, which are decoded in no time."""
    folder = tmp_path_factory.mktemp("images")
    for level in (60, 220):
        Image.new("RGB", (64, 48), (level, 128, 255 - level)).save(folder / f"{level}.png")
    return folder


@pytest.fixture
def full_disk():
    """Files cannot grow beyond 8 KB: a write then does less than it should, or fails, as on a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
