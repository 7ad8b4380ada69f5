"""Large images: reduced as they are read, drawn in strips, one at a time; results are in their own pixels."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from meta_deploy import Predictor
from meta_deploy.imaging import images
from meta_deploy.imaging.images import load
from meta_deploy.imaging.preprocess import Placement
from meta_deploy.tasks import draw, masks
from meta_deploy.tasks.detection import Detections
from meta_deploy.tasks.masks import Mask, paste_mask
from meta_deploy.tasks.semantic_segmentation import Segmentation, class_map

RNG = np.random.default_rng(0)


@pytest.fixture
def all_large(monkeypatch):
    """Every image of more than 1000 pixels is a large one."""
    monkeypatch.setattr(images, "LARGE", 1000)


def smooth(height, width):
    """Colours that change slowly, as a photo's do."""
    y, x = np.mgrid[:height, :width] / 40
    return (np.stack([np.sin(x), np.cos(y), np.sin(x + y)], 2) * 100 + 128).astype(np.uint8)


def encoded(image, form, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("form", "options", "most"),
    [("PNG", {}, 1), ("TIFF", {"compression": "tiff_lzw"}, 1), ("WEBP", {"lossless": True}, 1),
     ("JPEG", {"quality": 95}, 6)],
)  # fmt: skip
def test_a_large_image_is_reduced_to_means_with_twice_the_wanted_size_left(all_large, form, options, most):
    image = smooth(480, 640)
    picture = load(encoded(image, form, **options), wanted=lambda height, width: (height // 9, width // 9))
    assert (picture.size, picture.pixels.shape) == ((480, 640), (120, 160, 3))
    means = image.reshape(120, 4, 160, 4, 3).mean((1, 3))
    np.testing.assert_allclose(picture.pixels, means, atol=most)


def test_a_usual_image_is_never_reduced():
    data = encoded(smooth(480, 640), "JPEG")
    picture = load(data, wanted=lambda height, width: (10, 10))
    np.testing.assert_array_equal(picture.pixels, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_image_is_upright(all_large, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(480, 640), "JPEG", exif=exif)
    whole = load(data).pixels
    picture = load(data, wanted=lambda height, width: (height // 9, width // 9))
    assert picture.size == whole.shape[:2]
    np.testing.assert_allclose(picture.pixels, whole[2::4, 2::4], atol=25)


def test_boxes_and_masks_are_in_the_pixels_of_the_file(bundles, tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(encoded(smooth(960, 640), "JPEG"))
    with Predictor(bundles / "detector") as predictor:
        usual = predictor(tmp_path / "a.jpg")
        monkeypatch.setattr(images, "LARGE", 1000)
        assert predictor.read(tmp_path / "a.jpg").reduced
        found = predictor(tmp_path / "a.jpg")
    assert found.size == (960, 640)
    np.testing.assert_array_equal(found.boxes, usual.boxes)
    assert [mask.area for mask in found.segments] == [mask.area for mask in usual.segments]
    assert found.draw().shape == (960, 640, 3)


def detections(size):
    """A ring, and a disc on it."""
    y, x = np.mgrid[: size[0], : size[1]]
    radius = np.hypot(y - size[0] / 2, x - size[1] / 2)
    segments = tuple(map(Mask.from_full, ((radius < 200) & (radius > 120), radius < 60)))
    boxes = np.array([[50, 10, 550, 450], [200, 200, 400, 300]], np.float32)
    return Detections(
        size, boxes, np.array([0.9, 0.8], np.float32), np.array([0, 1], np.int32), ("a", "b"), segments
    )


def test_strips_are_drawn_as_the_whole_is(monkeypatch):
    image = smooth(480, 640)
    labels = (image[..., 0] > 128).astype(np.int16) + (image[..., 1] > 128)
    for result in (detections((480, 640)), Segmentation(labels, ("a", "b", "c"))):
        monkeypatch.setattr(draw, "STRIP", 1 << 20)
        whole = result.draw(image).astype(int)
        monkeypatch.setattr(draw, "STRIP", 640 * 50)
        differs = np.abs(result.draw(image) - whole).max(2) > 2
        assert differs.mean() < 1e-3  # antialiased lines, cut at a strip's edge


def test_a_large_overlay_looks_as_the_exact_one(monkeypatch):
    image = smooth(600, 800)
    result = detections((600, 800))
    monkeypatch.setattr(draw, "_line_width", lambda picture: 8)  # steps of 2
    exact = result.draw(image).astype(int)
    monkeypatch.setattr(images, "LARGE", 1000)
    differs = np.abs(result.draw(image) - exact).max(2) > 40
    assert differs.mean() < 0.02  # along the contours alone


def test_a_mask_is_pasted_and_run_in_bands_as_in_one(monkeypatch):
    probabilities, box = RNG.random((28, 28), np.float32), np.array([-5.5, 3, 300, 211.3])
    whole = paste_mask(probabilities, box, (200, 310), 0.5)
    monkeypatch.setattr(masks, "_BAND", 1000)
    banded = paste_mask(probabilities, box, (200, 310), 0.5)
    np.testing.assert_array_equal(whole.runs, banded.runs)


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (9, 1), (0, 0)])
def test_the_rle_is_that_of_pycocotools(shape):
    from pycocotools import mask as coco

    for size, top, left in (((9, 9), 0, 0), ((12, 20), 2, 3), (shape, 0, 0)):
        for density in (0, 0.3, 0.9, 1):
            if 0 in size or top + shape[0] > size[0] or left + shape[1] > size[1]:
                continue
            mask = Mask.from_crop(RNG.random(shape) < density, top, left, size)
            expected = coco.encode(np.asfortranarray(mask.full().astype(np.uint8)))
            assert mask.rle() == {"size": list(size), "counts": expected["counts"].decode()}


def test_a_class_map_in_bands_is_that_of_the_whole(monkeypatch):
    logits = RNG.standard_normal((4, 16, 24)).astype(np.float32)
    placement = Placement((700, 1000), (45, 64))
    whole = class_map(logits, placement, (64, 96))
    monkeypatch.setattr(images, "LARGE", 1000)
    banded = class_map(logits, placement, (64, 96))
    assert (whole != banded).mean() < 1e-4  # where two classes are as good as equal
    assert Segmentation(banded, ("a", "b", "c", "d")).areas == dict(
        sorted(enumerate(np.bincount(banded.ravel()).tolist()), key=lambda item: -item[1])
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_several_large_images_take_little_more_memory_than_one_decoded(bundles, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (7000, 5000), (90, 120, 40)).save(tmp_path / name)
    Image.new("RGB", (64, 64)).save(tmp_path / "small.jpg")
    code = (
        "import os, re, sys\nfrom meta_deploy.cli.infer import main\nos.chdir(sys.argv[1])\n"
        "for names in (['small.jpg'], ['a.jpg', 'b.jpg']):\n"
        "    assert main([*names, '--model', sys.argv[2]]) == 0\n"
        "    print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    command = [sys.executable, "-c", code, tmp_path, bundles / "detector"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    small, large = (int(line) * 1024 for line in lines if line.isdigit())
    # 1.5 times for itself; what strips and two threads' heaps take weighs more here than with larger ones.
    assert large - small < 2.2 * 7000 * 5000 * 3
