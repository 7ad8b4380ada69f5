"""Every file of examples/ runs as its docstring says."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from PIL import Image

from meta_deploy import Bundle

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "meta_deploy" / "assets" / "images"


@pytest.fixture
def example(tmp_path):
    """Run an example in an empty folder; gives its standard output and standard error."""

    def call(name, *arguments):
        command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return call


def test_every_example_is_tested():
    here = Path(__file__).read_text()
    assert [path.name for path in (ROOT / "examples").glob("*.py") if f'"{path.name}"' not in here] == []


@pytest.mark.slow
def test_export_checkpoint(example, tiny_checkpoint, tmp_path):
    out, _ = example("export_checkpoint.py", tiny_checkpoint, "bundle")
    assert out.startswith("tiny-mask-rcnn: ")
    assert "\ndetections: " in out
    assert Bundle.open(tmp_path / "bundle").target == "onnxruntime"


def test_predict_image(example, tmp_path):
    out, _ = example("predict_image.py", IMAGES / "fluorescence-1.png")
    *objects, last = out.splitlines()
    assert len(objects) >= 1
    assert all(line.endswith(" pixels") for line in objects)
    assert last.startswith("overlay.jpg; ")
    with Image.open(tmp_path / "overlay.jpg") as overlay, Image.open(IMAGES / "fluorescence-1.png") as image:
        assert overlay.size == image.size


def test_predict_folder_threads(example, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "c.jpg"):
        (folder / name).write_bytes((IMAGES / "fluorescence-4.png").read_bytes())
    (folder / "b.jpg").write_bytes(b"no image")
    out, err = example("predict_folder_threads.py", folder, 2)
    a, c = out.splitlines()
    assert a.startswith("a.jpg: {'")
    assert c == a.replace("a.jpg", "c.jpg")  # the same picture, the same objects, whichever thread it was
    assert err.startswith("b.jpg: ")
    assert len(err.splitlines()) == 1


def test_coco_results(example, tmp_path):
    truth = json.loads((IMAGES / "instances.json").read_text())
    truth["images"] = truth["images"][2:4]
    (tmp_path / "annotations.json").write_text(json.dumps(truth))
    out, _ = example("coco_results.py", "annotations.json", IMAGES)
    ap = {line.split(":")[0]: float(line.split()[2][:-1]) for line in out.splitlines() if ": AP" in line}
    assert set(ap) == {"box", "mask"}
    assert all(0.1 < value <= 1 for value in ap.values())
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["image_id"] for result in results} == {image["id"] for image in truth["images"]}


def test_predict_video(example, tmp_path):
    clip = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"mp4v"), 10, (320, 320))
    frame = cv2.resize(cv2.imread(str(IMAGES / "fluorescence-4.png")), (320, 320))
    for _ in range(3):
        writer.write(frame)
    writer.release()
    out, _ = example("predict_video.py", clip)
    assert [line.split(" s: ")[0].strip() for line in out.splitlines()] == ["0.00", "0.10", "0.20"]
