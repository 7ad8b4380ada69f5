"""meta-infer keeps its contract: what it prints, what it writes, its exit codes, one line for bad input."""

import contextlib
import csv
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import ModuleType

import cv2
import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from meta_deploy.bundle.bundle import write_bundle
from meta_deploy.bundle.claims import Claims
from meta_deploy.cli.infer import main
from meta_deploy.cli.outputs import overlay_names
from meta_deploy.imaging.sources import Source
from meta_deploy.imaging.video import Video, VideoWriter
from meta_deploy.runtime.predictor import Predictor
from tests.bundles_by_hand import detector, manifest
from tests.videos_by_hand import turned, write_clip


@pytest.fixture
def here(tmp_path, monkeypatch, photo):
    """An empty working folder with photos a.jpg, b.png and more/a.jpg in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    for name in ("a.jpg", "b.png", "more/a.jpg"):
        Image.fromarray(photo).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def infer(bundles, capsys):
    """Run meta-infer on the detector (or another bundle); gives exit code, stdout, stderr."""

    def call(*arguments, model="detector"):
        try:
            code = main([*map(str, arguments), "--model", str(bundles / model)])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def clip(path, frames=5):
    write_clip(path, frames, size=(128, 96))


def test_an_image_gives_a_line_an_overlay_and_the_times(here, infer):
    code, out, err = infer("a.jpg", "--backend", "onnxruntime")
    assert (code, err) == (0, "")
    first, last = out.splitlines()
    assert first.startswith("a.jpg 96x128: 2 objects: 1 disc, 1 star; ")
    assert last.startswith("overlays in meta-infer-out/; median ms: pre ")
    assert os.listdir("meta-infer-out") == ["a-overlay.jpg"]


def test_json_is_one_document_and_nothing_else_on_stdout(here, infer, bundles):
    code, out, _ = infer("a.jpg", "b.png", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["bundle"] == str(bundles / "detector")
    assert (document["model"], document["backend"], document["errors"]) == ("by-hand", "onnxruntime", [])
    assert [entry["path"] for entry in document["images"]] == ["a.jpg", "b.png"]
    entry = document["images"][1]
    assert entry["size"] == [128, 96]
    assert set(entry["timings"]) == {"pre_ms", "model_ms", "post_ms"}
    disc, star = entry["detections"]
    assert (disc["label"], disc["name"], disc["box"]) == (0, "disc", [16, 16, 80, 80])
    assert (star["name"], round(star["score"], 6)) == ("star", 0.6)
    mask = coco.decode(disc["mask"])
    assert mask.shape == (128, 96)
    assert mask[16:80, 16:48].all()
    assert mask.sum() == 64 * 32
    assert not os.path.exists("meta-infer-out")  # no pictures unless asked for


def test_the_threshold_is_for_what_is_shown_and_coco_holds_everything(here, infer):
    _, out, _ = infer("a.jpg", "--json", "--coco-json", "coco.json", "--score-threshold", "0.9")
    assert [d["name"] for d in json.loads(out)["images"][0]["detections"]] == ["disc"]
    with open("coco.json") as stream:
        assert len(json.load(stream)) == 3
    _, out, _ = infer("a.jpg", "--json", "--score-threshold", "0")
    assert len(json.loads(out)["images"][0]["detections"]) == 3


def test_coco_results_load_in_pycocotools(here, infer, photo):
    for name in ("0007.png", "12.png"):
        Image.fromarray(photo).save(name)
    code, _, _ = infer("12.png", "0007.png", "--coco-json", "coco.json")
    assert code == 0
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": 128, "width": 96} for i in (7, 12)],
        "categories": [{"id": i} for i in (1, 2, 3)],
        "annotations": [],
    }
    truth.createIndex()
    results = truth.loadRes("coco.json")
    assert sorted(results.getImgIds()) == [7, 12]
    first = results.loadAnns(results.getAnnIds(imgIds=[12]))[0]
    assert (first["category_id"], first["bbox"], first["file_name"]) == (1, [16, 16, 64, 64], "12.png")


def test_without_numbers_in_the_names_image_ids_are_places(here, infer):
    infer("b.png", "a.jpg", "--coco-json", "coco.json")
    with open("coco.json") as stream:
        assert {(r["image_id"], r["file_name"]) for r in json.load(stream)} == {(1, "b.png"), (2, "a.jpg")}


def test_nothing_found_is_an_empty_list(here, infer):
    Image.new("RGB", (8, 8)).save("black.png")
    code, out, _ = infer("black.png", "--score-threshold", "1")
    assert (code, "0 objects;" in out) == (0, True)


def test_no_two_inputs_share_an_overlay_and_none_is_overwritten(here, infer):
    Image.open("a.jpg").save("a-overlay.jpg")
    before = (here / "a-overlay.jpg").read_bytes()
    code, _, _ = infer("a.jpg", "more/a.jpg", "a-overlay.jpg", "b.png", "--out", ".")
    assert code == 0
    written = {"a-overlay-2.jpg", "a-overlay-3.jpg", "a-overlay-overlay.jpg", "b-overlay.png"}
    assert set(os.listdir(".")) == written | {"a.jpg", "b.png", "more", "a-overlay.jpg"}
    assert (here / "a-overlay.jpg").read_bytes() == before


def test_overlay_names_differ_where_case_does_not_count(tmp_path):
    sources = [Source(tmp_path / name, False) for name in ("A.JPG", "a.jpg", "a.png", "a.tif")]
    names = [path.name for path in overlay_names(tmp_path / "out", sources, Claims()).values()]
    assert names == ["A-overlay.jpg", "a-overlay-2.jpg", "a-overlay.png", "a-overlay-2.png"]


def test_overlay_names_fit_a_file_system_and_stay_apart(tmp_path):
    sources = [Source(tmp_path / f"{'é' * 124}{end}.jpg", False) for end in "abc"]
    names = [path.name for path in overlay_names(tmp_path, sources, Claims()).values()]
    assert len(set(names)) == 3
    assert all(len(os.fsencode(name)) <= 255 and "-overlay" in name for name in names)


@pytest.mark.parametrize("options", [("",), ("a.jpg", ""), ("a.jpg", "--out", ""), ("a.jpg", "--coco-json=")])
def test_an_empty_path_is_not_the_current_folder(here, infer, options):
    one_line(*infer(*options), "the path is empty")
    assert sorted(os.listdir(".")) == ["a.jpg", "b.png", "more"]


def test_an_empty_model_is_not_the_demo(infer):
    one_line(*infer("a.jpg", "--model", ""), "--model", "the path is empty")


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that can close standard output")
def test_a_closed_standard_output_does_not_undo_the_work(here, bundles):
    line = shlex.join(command("a.jpg", "--model", bundles / "detector", "--backend", "onnxruntime"))
    process = subprocess.run(["sh", "-c", f"{line} >&-"], stderr=subprocess.PIPE, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert os.listdir("meta-infer-out") == ["a-overlay.jpg"]


def test_a_video_gives_a_video_and_an_entry_a_frame(here, infer):
    clip("clip.mp4")
    code, out, _ = infer("clip.mp4", "a.jpg", "--json", "--out", "out", "--coco-json", "coco.json")
    assert code == 0
    images = json.loads(out)["images"]
    assert [entry.get("frame") for entry in images] == [0, 1, 2, 3, 4, None]
    assert {entry["overlay"] for entry in images[:5]} == {os.path.join("out", "clip-overlay.mp4")}
    capture = cv2.VideoCapture("out/clip-overlay.mp4")
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    capture.release()
    with open("coco.json") as stream:
        assert {r["image_id"] for r in json.load(stream)} == {1, 2, 3, 4, 5, 6}
    assert sorted(os.listdir("out")) == ["a-overlay.jpg", "clip-overlay.mp4"]
    _, out, _ = infer("clip.mp4", "--out", "out")
    assert out.startswith("clip.mp4 96x128: 5 frames, ")


def test_a_class_map_is_summed_up_by_area(here, infer):
    Image.new("RGB", (64, 64), (255, 0, 0)).save("red.png")
    code, out, _ = infer("red.png", "--json", model="segmenter")
    assert code == 0
    (segment,) = json.loads(out)["images"][0]["segments"]
    assert (segment["name"], segment["pixels"]) == ("disc", 4096)
    _, out, _ = infer("red.png", model="segmenter")
    assert "red.png 64x64: disc 100%" in out


def test_unreadable_images_are_reported_and_the_others_done(here, infer):
    (here / "more" / "broken.jpg").write_bytes(b"no image")
    code, out, err = infer("more", "b.png", "none.jpg", "--json")
    assert code == 2
    document = json.loads(out)
    assert [entry["path"] for entry in document["images"]] == ["more/a.jpg", "b.png"]
    assert [error["path"] for error in document["errors"]] == ["more/broken.jpg", "none.jpg"]
    assert "meta-infer: 'more/broken.jpg' is not an image" in err
    assert "meta-infer: 2 could not be read, 2 done" in err


def one_line(code, out, err, *said):
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("meta-infer: ")
    for words in said:
        assert words in err


def test_bad_input_is_one_line_and_leaves_nothing(here, infer):
    (here / "empty.jpg").write_bytes(b"")
    (here / "none").mkdir()
    before = sorted(os.listdir("."))
    one_line(*infer("missing.jpg"), "missing.jpg", "check the path")
    one_line(*infer("empty.jpg", "--out", "x/y"), "empty.jpg", "0 bytes")
    one_line(*infer("none"), "no image in the folder 'none'")
    one_line(*infer("*.gif"), "*.gif")
    one_line(*infer("a.jpg", model="nowhere"), "no bundle at", "meta-export")
    one_line(*infer("a.jpg", "--backend", "tpu"), "--backend", "tpu")
    one_line(*infer("a.jpg", "--backend", "tensorrt"), "--backend onnxruntime")
    one_line(*infer("a.jpg", "--score-threshold", "2"), "'2'")
    one_line(*infer("a.jpg", "--score-threshold", "nan"), "'nan'")
    one_line(*infer("a.jpg", "--batch", "0"), "'0'")
    one_line(*infer("a.jpg", "--batch", "8"), "--batch 8 or --dynamic-batch")
    one_line(*infer("a.jpg", "--batch", "8", model="detector-dynamic"), "the 4 ", "--dynamic-batch up to 8")
    one_line(*infer("a.jpg", "--threads", "many"), "'many'")
    one_line(*infer("a.jpg", "--threads", "1025"), "1 to 1024")
    one_line(*infer("a.jpg", "--out", "x" * 300), "too long")
    one_line(*infer("a.jpg", "--coco-json", "x" * 300), "too long")
    one_line(*infer("a.jpg", model="x" * 300), "too long")
    one_line(*infer("x" * 300 + ".jpg"), "too long")
    one_line(*infer("x" * 300 + ".mp4"), "no file")
    one_line(*infer("a.jpg", "--no-such-option"), "--no-such-option")
    one_line(*infer("a.jpg", "--out", "b.png"), "b.png", "name a folder")
    one_line(*infer("a.jpg", "--coco-json", "none"), "none", "a folder")
    one_line(*infer("a.jpg", "--coco-json", "no/where.json"), "no/where.json")
    assert sorted(os.listdir(".")) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write to")
def test_an_unwritable_output_is_found_before_anything_is_computed(here, infer, monkeypatch):
    monkeypatch.setattr("meta_deploy.runtime.stream.predict", None)
    one_line(*infer("a.jpg", "--out", "/proc/x"), "/proc/x")
    one_line(*infer("a.jpg", "--coco-json", "/proc/x"), "/proc/x")


def test_a_disk_that_fills_up_is_one_line_and_leaves_no_half_file(here, infer, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = infer("a.jpg", "--out", "out", "--coco-json", "coco.json")
    assert code == 2
    assert "No space left on device" in err
    assert sorted(os.listdir(".")) == ["a.jpg", "b.png", "more"]


@pytest.mark.parametrize("options", [("--out", "out"), ("--coco-json", "coco.json")])
def test_a_disk_without_room_is_one_line_and_no_file(here, infer, full_disk, options):
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    for i in range(150 if "--coco-json" in options else 1):
        Image.fromarray(noise).save(f"more/{i}.jpg", quality=95)
    code, _, err = infer("more", *options)
    assert code == 2
    assert "cannot write" in err.splitlines()[-1]
    assert not os.path.exists("out")
    assert not os.path.exists("coco.json")


def test_one_image_in_a_fixed_batch_of_eight_gives_one_result(here, infer, tmp_path):
    content = manifest("instance-segmentation", (64, 64), batch=8)
    write_bundle(tmp_path / "eight", content, {"model.onnx": detector((64, 64), batch=8)})
    code, out, _ = infer("a.jpg", "--json", "--out", "o", "--coco-json", "c.json", model=tmp_path / "eight")
    assert code == 0
    assert [len(image["detections"]) for image in json.loads(out)["images"]] == [2]
    assert os.listdir("o") == ["a-overlay.jpg"]
    assert {record["image_id"] for record in json.loads((here / "c.json").read_text())} == {1}
    with Predictor(tmp_path / "eight") as predictor:
        assert len(predictor.batch(["a.jpg"])) == 1
        assert len(predictor.batch(["a.jpg"] * 9)) == 9


@pytest.mark.parametrize("name", ["detector", "segmenter-dynamic", "raw-image"])
def test_a_wrong_value_anywhere_in_a_manifest_is_one_line_or_no_matter(here, infer, bundles, name):
    shutil.copytree(bundles / name, "bundle")
    path = here / "bundle" / "manifest.json"
    content = json.loads(path.read_text())
    values = (
        None,
        [],
        {"a": [1]},
        -1,
        10**30,
        math.nan,
        "x",
        "\ud800",
        True,
        json.loads("[" * 99 + "]" * 99),
    )
    for number, (part, key) in enumerate(entries(content)):
        right = part[key]
        for value in values[number % 2 :: 2]:
            part[key] = value
            path.write_text(json.dumps(content))
            code, _, err = infer("a.jpg", "--json", model=here / "bundle")
            assert code in (0, 2), (key, value, err)
            assert code == 0 or len(err.splitlines()) == 1, (key, value, err)
        part[key] = right


def entries(part):
    """Every place in nested lists and dictionaries: what holds it, and its key there."""
    for key in list(part) if isinstance(part, dict) else range(len(part)):
        yield part, key
        if isinstance(part[key], (dict, list)):
            yield from entries(part[key])


# --- nothing is written over ---


def state(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("coco", "said"),
    [
        ("a.jpg", "an input"),
        ("./more/../a.jpg", "an input"),
        ("link.jpg", "an input"),
        ("hard.jpg", "an input"),
        ("A.JPG", "an input"),
        ("linked/a.jpg", "an input"),
        ("bundle/manifest.json", "the bundle"),
        ("bundle/results.json", "the bundle"),
        ("-", "names no file"),
        ("more", "a folder"),
        ("fifo", "not a regular file"),
        ("/dev/null", "not a regular file"),
    ],
)
def test_coco_results_are_written_over_nothing_that_is_read(here, infer, bundles, coco, said):
    os.symlink("a.jpg", "link.jpg")
    os.link("a.jpg", "hard.jpg")
    os.symlink(".", "linked")
    os.mkfifo("fifo")
    shutil.copytree(bundles / "detector", "bundle")
    before = state(here)
    one_line(*infer("a.jpg", "--coco-json", coco, model=here / "bundle"), coco, said)
    assert state(here) == before


def test_coco_results_and_overlays_keep_apart(here, infer):
    os.symlink("o", "also")  # to what is not there yet
    for _ in range(2):
        assert infer("a.jpg", "--out", "o", "--coco-json", "also/A-overlay.jpg")[0] == 0
        assert sorted(os.listdir("o")) == ["A-overlay.jpg", "a-overlay-2.jpg"]
        json.loads((here / "o" / "A-overlay.jpg").read_text())


@pytest.mark.parametrize("out", ["linked", "more/..", "other"])
def test_overlays_are_written_over_no_input_whatever_its_name(here, infer, out):
    os.symlink(".", "linked")
    os.mkdir("other")
    Image.open("a.jpg").save("a-overlay.jpg")
    os.symlink("../a-overlay.jpg", "other/a-overlay.jpg")
    before = state(here)
    assert infer("a.jpg", "a-overlay.jpg", "--out", out)[0] == 0
    after = state(here)
    assert {path: after[path] for path in before} == before
    assert len({path.resolve() for path in after}) == len({path.resolve() for path in before}) + 2


def test_overlays_do_not_go_into_the_bundle(here, infer, bundles):
    shutil.copytree(bundles / "detector", "bundle")
    for out in ("bundle", "bundle/overlays"):
        one_line(*infer("a.jpg", "--out", out, model=here / "bundle"), "--out", "the bundle")
    assert sorted(os.listdir("bundle")) == ["manifest.json", "model.onnx"]


@pytest.mark.parametrize("options", [("--coco-json", "/dev/stdout"), ("--coco-json", "out.txt")])
def test_standard_output_is_not_written_over(here, bundles, options):
    with open("out.txt", "w") as stream:
        line = command("a.jpg", *options, "--model", bundles / "detector")
        process = subprocess.run(line, stdout=stream, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 2
    assert "over standard output" in process.stderr
    process = subprocess.run(
        command("a.jpg", "--coco-json", "/dev/stdout", "--model", bundles / "detector"),
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert "not a regular file" in process.stderr


def test_a_disk_that_fills_up_under_a_video_is_one_line(here, infer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    clip("clip.mp4")
    monkeypatch.setattr(VideoWriter, "close", full)
    code, _, err = infer("clip.mp4", "--backend", "onnxruntime")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "cannot write the video 'meta-infer-out/clip-overlay.mp4': No space left on device" in err
    assert not os.path.exists("meta-infer-out")


def test_a_cut_video_is_done_as_far_as_it_goes_and_the_next_input_too(here, infer):
    clip("clip.avi", 40)
    content = (here / "clip.avi").read_bytes()
    (here / "clip.avi").write_bytes(content[: len(content) * 8 // 10])
    code, out, err = infer("clip.avi", "a.jpg", "--json", "--out", "out", "--backend", "onnxruntime")
    assert code == 2
    line, last = err.splitlines()[0], json.loads(out)["images"]
    done = len(last) - 1
    assert line.startswith(f"meta-infer: {done} of 40 frames of 'clip.avi' could be read: it is cut short (")
    assert "skipped" not in line
    assert 0 < done < 40
    assert [(entry["frame"], entry["time"]) for entry in last[:3]] == [(0, 0), (1, 0.1), (2, 0.2)]
    with Video("out/clip-overlay.mp4") as video:
        assert (len(list(video)), video.fps) == (done, 10)


def test_a_videos_rate_and_times_are_the_overlays(here, infer):
    times = [0, 10, 20, 300, 310, 900, 1000, 1500]
    write_clip(here / "a:%04d.mp4", 8, codec="libx264", times=times)
    turned(write_clip(here / "b.mp4", 3, codec="libx264", rate=66.667), 90)
    code, out, _ = infer("a:%04d.mp4", "b.mp4", "--json", "--out", "out")
    assert code == 0
    entries = json.loads(out)["images"]
    assert [entry["time"] for entry in entries[:8]] == [time / 1000 for time in times]
    assert entries[8]["size"] == [64, 48]
    with Video("out/a:%04d-overlay.mp4") as video:
        assert [float(frame.time) for frame in video] == [time / 1000 for time in times]
    with Video("out/b-overlay.mp4") as video:
        assert video.fps == pytest.approx(66.667)
        assert next(iter(video)).image.shape == (384, 288, 3)


def test_a_depth_is_said_once_and_differing_ones_are_a_warning(here, infer):
    for i, most in enumerate((4095, 4000, 1023)):
        ramp = np.linspace(0, most, 64 * 64).reshape(64, 64).astype(np.uint16)
        Image.fromarray(ramp).save(f"{i}.png")
    code, out, err = infer("0.png", "1.png", "2.png", "--json", "--backend", "onnxruntime")
    assert code == 0
    scores = [entry["detections"][0]["score"] for entry in json.loads(out)["images"]]
    assert min(scores) > 0.97  # the brightest pixel's share of white
    said, other, warning = [line for line in err.splitlines() if "bits" in line]
    assert said.startswith("meta-infer: '0.png' holds 16-bit data taken as 12 bits, by its values up to 4095")
    assert other.startswith(
        "meta-infer: '2.png' holds 16-bit data taken as 10 bits, by its values up to 1023"
    )
    assert warning.startswith("meta-infer: warning: ")
    assert "12 bits (2), 10 bits (1); --depth" in warning
    code, out, err = infer("0.png", "2.png", "--json", "--depth", "12", "--backend", "onnxruntime")
    assert (code, "bits" in err) == (0, False)
    first, second = json.loads(out)["images"]
    assert first["detections"][0]["score"] > 0.97
    assert second["detections"][0]["name"] == "star"  # of 0.6; the disc's is a quarter of white
    for depth in ("0", "33", "x"):
        one_line(*infer("0.png", "--depth", depth), f"'{depth}' is not a whole number from 1 to 32")


def test_numbers_that_are_not_finite_are_no_depth(here, infer):
    ramp = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    Image.fromarray(ramp).save("0.tif")
    ramp[0, 0] = np.nan
    Image.fromarray(ramp).save("1.tif")
    code, _, err = infer("0.tif", "1.tif", "--json")
    assert code == 0
    assert "'0.tif' holds 32-bit float values, taken as 0 to 1" in err
    assert "'1.tif' holds numbers that are not finite" in err
    assert "different bit depths" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_under_standard_output_is_one_line(here, bundles):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            command("a.jpg", "--json", "--model", bundles / "detector"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith(
        "meta-infer: cannot write standard output: No space left on device; free space"
    )


def test_an_interrupt_is_one_line_and_leaves_no_half_file(here, infer, monkeypatch):
    from meta_deploy.tasks.detection import Detections

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Detections, "to_coco", interrupt)
    code, out, err = infer("a.jpg", "--coco-json", "coco.json")
    assert (code, out, err) == (130, "", "meta-infer: interrupted\n")
    assert sorted(os.listdir(".")) == ["a.jpg", "b.png", "more"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_that_a_library_caught_still_ends_the_run(here, infer, monkeypatch, number, code):
    read = Predictor.batch

    def careless(self, images):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), number)
        return read(self, images)

    monkeypatch.setattr(Predictor, "batch", careless)
    assert infer("a.jpg", "b.png", "--out", "o", "--batch", "1")[0] == code
    assert not os.path.exists("o/b-overlay.png")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_in_a_destructor_is_one_line(here, infer, monkeypatch):
    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    read = Predictor.batch

    def careless(self, images):
        Dropped()
        return read(self, images)

    monkeypatch.setattr(Predictor, "batch", careless)
    assert infer("a.jpg", "b.png") == (130, "", "meta-infer: interrupted\n")


def test_an_interrupted_video_leaves_no_half_video(here, infer, monkeypatch):
    from meta_deploy.cli.outputs import Report

    clip("clip.mp4", 10)
    seen = []

    def stop_at_the_fifth(self, *_):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Report, "add", stop_at_the_fifth)
    code, _, _ = infer("clip.mp4")
    assert code == 130
    assert sorted(os.listdir(".")) == ["a.jpg", "b.png", "clip.mp4", "more"]


def test_our_own_fault_says_how_to_report_it(here, infer, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("meta_deploy.runtime.stream.predict", broken)
    code, _, err = infer("a.jpg")
    assert code == 1
    assert err.startswith("meta-infer: internal error: ZeroDivisionError: oops; ")
    assert "META_DEPLOY_DEBUG=1" in err
    assert len(err.splitlines()) == 1
    monkeypatch.setenv("META_DEPLOY_DEBUG", "1")
    assert "Traceback" in infer("a.jpg")[2]


def command(*arguments):
    return [sys.executable, "-m", "meta_deploy.cli.infer", *map(str, arguments)]


def test_a_closed_pipe_is_no_traceback(here, bundles):
    process = subprocess.Popen(
        command("a.jpg", "--model", bundles / "detector", "--backend", "onnxruntime"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
    process.stderr.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_or_sigterm_ends_a_long_run_cleanly(here, bundles, number, code):
    clip("clip.mp4", 2000)
    process = subprocess.Popen(
        command("clip.mp4", "--model", bundles / "detector", "--backend", "onnxruntime"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(here.glob("meta-infer-out/*/new.mp4")):
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    said = "interrupted" if number == signal.SIGINT else "terminated"
    assert (process.returncode, out, err) == (code, "", f"meta-infer: {said}\n")
    assert not os.path.exists("meta-infer-out")


def test_a_folder_of_real_photos_is_done(infer, coco_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = infer(coco_tiny / "val", "--json", "--coco-json", "c.json", model="detector-dynamic")
    assert (code, len(json.loads(out)["images"])) == (0, 80)
    with open("c.json") as stream:
        assert len({record["image_id"] for record in json.load(stream)}) == 80


# --- what runs the model ------------------------------------------------------------------------------------


def test_auto_says_what_it_took_and_a_back_end_that_was_asked_for_does_not(here, infer):
    code, _, err = infer("a.jpg", "b.png", "--json")
    line, *_ = err.splitlines()
    assert code == 0
    assert line.startswith("meta-infer: runs on ONNX Runtime ")
    assert err.count("runs on") == 1
    assert "runs on" not in infer("a.jpg", "--backend", "onnxruntime")[2]
    one_line(*infer("none.jpg"), "none.jpg")


@pytest.fixture
def engine(tmp_path, monkeypatch, photo):
    """A TensorRT-RTX bundle, its engine for an older version, on a machine with a GPU; `rebuild` counts."""
    from meta_deploy.bundle.bundle import write_bundle
    from meta_deploy.targets.tensorrt import cache as engine_cache
    from meta_deploy.targets.tensorrt.library import Here
    from tests.bundles_by_hand import ENGINE, detector, manifest
    from tests.targets.gpu_stand_in import engine_bytes, install

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(monkeypatch, version="1.8.0")
    content = manifest("instance-segmentation", (64, 64), target="tensorrt-rtx", engine=ENGINE)
    files = {"model.onnx": detector((64, 64)), "model.engine": b"old"}
    write_bundle(tmp_path / "bundle", content, files)
    built = []

    def rebuild(bundle, progress):
        progress("built in 1 s")
        built.append(bundle.path)
        plan = engine_bytes(bundle.read("model.onnx"), bundle.input)
        engine_cache.store(bundle, Here.find(bundle.target).machine, plan, replace(ENGINE, version="1.8.0"))

    builder = ModuleType("meta_deploy.targets.tensorrt.build")
    builder.rebuild = rebuild
    monkeypatch.setitem(sys.modules, builder.__name__, builder)
    return tmp_path / "bundle", built


def test_an_engine_that_does_not_fit_is_rebuilt_once(here, infer, engine):
    bundle, built = engine
    why = "it was built with TensorRT-RTX 1.7.1, and here is TensorRT-RTX 1.8.0"
    one_line(*infer("a.jpg", "--backend", "tensorrt", model=bundle), why, "--rebuild")
    assert why in infer("a.jpg", model=bundle)[2]  # auto runs model.onnx
    code, out, err = infer("a.jpg", "--json", "--rebuild", model=bundle)
    assert code == 0
    assert json.loads(out)["backend"] == "tensorrt"
    assert err.splitlines()[:3] == [
        f"meta-infer: building an engine for this machine, since {why}",
        "meta-infer: built in 1 s",
        "meta-infer: runs on TensorRT-RTX 1.8.0 on NVIDIA GeForce RTX 4090",
    ]
    code, _, err = infer("a.jpg", "--rebuild", model=bundle)
    assert (code, built) == (0, [bundle])
    assert err.startswith("meta-infer: there is nothing to rebuild: the engine fits this machine\n")
    assert "runs on TensorRT-RTX" in infer("a.jpg", model=bundle)[2]


def test_rebuild_without_an_engine_to_rebuild_is_one_line(here, infer, engine):
    one_line(*infer("a.jpg", "--rebuild"), "nothing to rebuild", "made for onnxruntime")
    for backend in ("onnxruntime", "cuda"):
        one_line(*infer("a.jpg", "--rebuild", "--backend", backend, model=engine[0]), f"--backend {backend}")
    one_line(*infer("a.jpg", "--rebuild", model="none"), "no bundle")


def test_rebuild_without_a_gpu_builds_nothing(here, infer, engine, monkeypatch):
    bundle, built = engine
    sys.modules["cuda.bindings.runtime"].fail("cudaSetDevice", "cudaErrorNoDevice")
    one_line(*infer("a.jpg", "--rebuild", model=bundle), "no NVIDIA GPU")
    assert not built


# --- raw bundles ---


@pytest.fixture
def npz(here):
    """Files of arrays that the raw bundle takes: one.npz and two.npz."""
    for name, count in (("one.npz", 1), ("two.npz", 2)):
        np.savez(here / name, x=np.full((count, 3), 1.5, np.float32), k=np.array([5, 6]))
    return here


def test_arrays_give_a_line_and_a_file_each(npz, infer):
    code, out, _ = infer("one.npz", "two.npz", model="raw")
    first, second, last = out.splitlines()
    assert code == 0
    assert first.startswith("one.npz: a/y float32 (1, 3), more bool (2,); ")
    assert second.startswith("two.npz: a/y float32 (2, 3), more bool (2,); ")
    assert last.startswith(f"arrays in meta-infer-out{os.sep}; median ms: ")
    with np.load("meta-infer-out/two-outputs.npz") as stored:
        np.testing.assert_array_equal(stored["a/y"], np.full((2, 3), 3.0, np.float32))
        np.testing.assert_array_equal(stored["more"], [False, True])


def test_json_of_arrays_has_types_shapes_and_small_values(npz, infer):
    code, out, _ = infer("*.npz", "--json", "--out", "out", model="raw")
    document = json.loads(out)
    assert (code, document["task"]) == (0, "raw")
    assert [entry["path"] for entry in document["images"]] == ["one.npz", "two.npz"]
    first = document["images"][0]
    assert first["outputs"]["a/y"] == {"dtype": "float32", "shape": [1, 3], "values": [[3.0, 3.0, 3.0]]}
    assert first["file"] == os.path.join("out", "one-outputs.npz")
    assert os.path.exists(first["file"])


def test_an_image_for_a_raw_bundle_gives_arrays(here, infer):
    code, out, _ = infer("a.jpg", model="raw-image")
    assert (code, out.startswith("a.jpg: mean float32 (1, 3); ")) == (0, True)
    assert os.listdir("meta-infer-out") == ["a-outputs.npz"]


def test_bad_arrays_are_a_line_each_and_the_others_are_done(npz, infer):
    (npz / "broken.npz").write_bytes((npz / "one.npz").read_bytes()[:100])
    np.savez("less.npz", x=np.zeros((1, 3), np.float32))
    np.savez("other.npz", x=np.zeros((1, 4), np.float32), k=np.array([5, 6]))
    bad = ("broken.npz", "less.npz", "other.npz", "none.npz")
    code, out, err = infer(*bad, "one.npz", "--backend", "onnxruntime", model="raw")
    assert code == 2
    assert out.startswith("one.npz: ")
    *lines, last = err.splitlines()
    for name, line in zip(bad, lines, strict=True):
        assert line.startswith("meta-infer: ")
        assert f"'{name}'" in line
    assert last == "meta-infer: 4 could not be read, 1 done"


@pytest.mark.parametrize(
    ("arguments", "model", "said"),
    [
        (["one.npz"], "detector", "'one.npz' holds arrays"),
        (["a.jpg"], "raw", "takes arrays and not images"),
        (["one.npz", "--coco-json", "c.json"], "raw", "--coco-json is for objects"),
        (["one.npz", "--batch", "2"], "raw", "--batch is for images"),
        (["clip.mp4"], "raw-image", "'clip.mp4' is a video"),
    ],
)
def test_what_does_not_go_with_the_bundle_is_one_line(npz, infer, arguments, model, said):
    one_line(*infer(*arguments, model=model), said)
    assert not os.path.exists("c.json")
    assert not os.path.exists("meta-infer-out")


@pytest.mark.parametrize("name", ["-dash.png", "-hello.png", "--out.png"])
def test_a_name_that_begins_with_a_dash_is_taken_for_no_option(here, infer, bundles, name):
    shutil.copy("b.png", name)
    one_line(*infer(name), f"write './{name}'")
    one_line(*infer("a.jpg", "--csv", "-t.csv"), "write './-t.csv'")
    assert infer(f"./{name}", "--csv", "./-t.csv")[0] == 0
    assert main(["--model", str(bundles / "detector"), "--", name]) == 0


def test_what_an_earlier_run_wrote_is_no_input(here, infer):
    assert infer(".", "--out", ".", "--label-image")[0] == 0
    assert sorted(p.name for p in here.glob("*-*")) == sorted(
        ["a-labels.png", "a-overlay.jpg", "b-labels.png", "b-overlay.png"]
    )
    code, out, err = infer(".", "--out", "again", "--label-image", "--label-format", "tif")
    assert (code, [line.split()[0] for line in out.splitlines()[:-1]]) == (0, ["a.jpg", "b.png"])
    assert "left out of '.' what meta-infer wrote: 'a-labels.png' and 3 more" in err
    one_line(*infer("again"), "holds only what meta-infer wrote, such as 'a-labels.tif'")
    assert [line.split()[0] for line in infer("*.jpg")[1].splitlines()[:-1]] == ["a.jpg"]
    assert infer("again/*-overlay.png", "--json")[1].count('"path"') == 1  # a pattern that names them alone
    assert infer("b-overlay.png", "a-labels.png", "--json")[1].count('"path"') == 2


def test_what_was_written_for_a_name_of_two_lines_is_no_input(here, infer):
    (here / "lines").mkdir()
    shutil.copy("b.png", "lines/two\nlines.png")
    assert infer("lines", "--out", "lines", "--label-image")[0] == 0
    assert infer("lines", "--json")[1].count('"path"') == 1


def test_tiles_far_smaller_than_the_models_input_are_a_warning(here, infer):
    large = manifest("instance-segmentation", (128, 128))
    write_bundle(here / "large", large, {"model.onnx": detector((128, 128))})
    said = "warning: tiles of 16 pixels are enlarged 8 times to the model's 128x128"
    assert said in infer("a.jpg", "--tile", "16", model=here / "large")[2]
    for options in (("--tile", "32"), ("--tile", "0"), ()):
        assert "warning" not in infer("a.jpg", *options, model=here / "large")[2]


def test_places_without_room_for_a_file_are_said_to_be(here, infer):
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs a folder that takes no files")
    for option, place in (("--csv", "/proc/x.csv"), ("--coco-json", "/proc/x.json"), ("--out", "/proc/x")):
        one_line(*infer("a.jpg", option, place), f"'{place}': no file can be made in '/proc'; choose another")


def test_a_bundle_that_is_not_there_tells_those_that_ship(here, infer):
    one_line(*infer("a.jpg", model=here / "nuclei-x"), "nuclei-x", "(nuclei, nuclei-semantic)")


def test_a_folder_that_is_no_bundle_is_told_to_be_none_also_around_the_outputs(here, infer):
    one_line(*infer("a.jpg", "--csv", "t.csv", model=here), "is not a bundle: it has no manifest.json")
    assert sorted(path.name for path in here.iterdir()) == ["a.jpg", "b.png", "more"]


# --- tables, label images, tiles ---


def rows_of(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_table_and_label_images_number_the_same_objects(here, infer):
    code, out, _ = infer("a.jpg", "b.png", "--csv", "t.csv", "--label-image", "--out", "o", "--json")
    assert code == 0
    rows = rows_of("t.csv")
    found = [(i["path"], d) for i in json.loads(out)["images"] for d in i["detections"]]
    assert [(row["file"], row["class"]) for row in rows] == [(path, d["name"]) for path, d in found]
    assert sorted(os.listdir("o")) == ["a-labels.png", "a-overlay.jpg", "b-labels.png", "b-overlay.png"]
    for name in ("a.jpg", "b.png"):
        with Image.open(f"o/{name[0]}-labels.png") as picture:
            assert picture.mode == "I;16"
            labels = np.asarray(picture)
        assert labels.shape == (128, 96)
        for row in (row for row in rows if row["file"] == name):
            assert row["label_image"] == f"o/{name[0]}-labels.png"
            assert np.count_nonzero(labels == int(row["object"])) == int(row["area"])
        assert set(np.unique(labels)) - {0} == {int(row["object"]) for row in rows if row["file"] == name}


def test_a_detection_without_a_pixel_is_in_no_output_beside_a_table(here, infer):
    """In a picture of 3x3 pixels the ring's mask has none."""
    Image.fromarray(np.full((3, 3, 3), 255, np.uint8)).save("tiny.png")
    options = ("--score-threshold", "0", "--backend", "onnxruntime")
    assert " 3 objects: " in infer("tiny.png", *options)[1]
    _, out, err = infer("tiny.png", "--csv", "t.csv", "--label-image", "--coco-json", "c.json", *options)
    assert " 2 objects: 1 disc, 1 star; " in out
    assert "left out 1 detection that better ones cover" in err
    assert [row["object"] for row in rows_of("t.csv")] == ["1", "2"]
    assert set(np.unique(np.asarray(Image.open("meta-infer-out/tiny-labels.png")))) == {0, 1, 2}
    assert len(json.loads((here / "c.json").read_text())) == 3


def test_the_table_and_the_lines_tell_the_files_of_pictures_of_one_stem(here, infer, photo):
    Image.fromarray(photo).save("b.tif")
    code, out, _ = infer("b.png", "b.tif", "--csv", "t.csv", "--label-image", "--out", "o")
    first, second, *_ = out.splitlines()
    assert (code, first.startswith("b.png 96x128: 2 objects"), first.endswith(" ms")) == (0, True, True)
    assert second.startswith("b.tif ")
    assert second.endswith(" ms; b-overlay-2.png; b-labels-2.png")
    told = {(row["file"], row["label_image"]) for row in rows_of("t.csv")}
    assert told == {("b.png", "o/b-labels.png"), ("b.tif", "o/b-labels-2.png")}


def test_label_images_can_be_tiff(here, infer):
    assert infer("a.jpg", "--label-image", "--label-format", "tif")[0] == 0
    with Image.open("meta-infer-out/a-labels.tif") as picture:
        assert (picture.format, picture.mode) == ("TIFF", "I;16")
        labels = np.asarray(picture)
    assert infer("a.jpg", "--label-image")[0] == 0
    np.testing.assert_array_equal(labels, np.asarray(Image.open("meta-infer-out/a-labels.png")))
    one_line(*infer("a.jpg", "--label-format", "tif"), "--label-format", "--label-image")


def test_an_interrupted_run_leaves_no_older_table_beside_new_label_images(here, infer, monkeypatch):
    from meta_deploy.cli.outputs import LabelImages

    write = LabelImages.add

    def stop_after_the_first(self, frame, shown):
        if frame.source.path.name != "a.jpg":
            raise KeyboardInterrupt
        return write(self, frame, shown)

    for name in ("t.csv", "c.json"):
        (here / name).write_text("older")
    monkeypatch.setattr(LabelImages, "add", stop_after_the_first)
    files = ("--csv", "t.csv", "--coco-json", "c.json")
    assert infer("a.jpg", "b.png", *files, "--label-image", "--batch", "1")[0] == 130
    assert "a-labels.png" in os.listdir("meta-infer-out")
    assert not os.path.exists("t.csv")
    assert not os.path.exists("c.json")


def test_without_files_beside_it_an_older_table_outlives_an_interrupt(here, infer, monkeypatch):
    from meta_deploy.cli.outputs import Report

    def interrupt(*_):
        raise KeyboardInterrupt

    (here / "t.csv").write_text("older")
    monkeypatch.setattr(Report, "add", interrupt)
    assert infer("a.jpg", "--csv", "t.csv")[0] == 130
    assert (here / "t.csv").read_text() == "older"


@pytest.mark.skipif(os.name != "posix", reason="closes a pipe")
@pytest.mark.parametrize("out", ["pipe", "full"])
def test_standard_output_that_cannot_be_written_costs_no_file(here, bundles, out):
    """As in `meta-infer … | head -1`, and on a full disk."""
    options = ("--csv", "t.csv", "--coco-json", "c.json", "--label-image", "--backend", "onnxruntime")
    line = shlex.join(command("a.jpg", "b.png", "--model", bundles / "detector", "--batch", "1", *options))
    if out == "full" and not os.path.exists("/dev/full"):
        pytest.skip("needs a device that is always full")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, open("/dev/full" if out == "full" else os.devnull, "w") as full:
        stdout = pipe if out == "pipe" else full
        process = subprocess.run(shlex.split(line), stdout=stdout, stderr=subprocess.PIPE, text=True)
    why = "cannot write standard output: No space left on device; free space or write elsewhere"
    said = "" if out == "pipe" else f"meta-infer: {why}\n"
    assert (process.returncode, process.stderr) == (141 if out == "pipe" else 2, said)
    assert len({row["file"] for row in rows_of("t.csv")}) == 2
    assert json.loads((here / "c.json").read_text())
    assert len(os.listdir("meta-infer-out")) == 4


def test_a_table_of_class_maps_has_a_row_a_class(here, infer):
    assert infer("a.jpg", "--csv", "t.csv", "--label-image", model="segmenter")[0] == 0
    rows = rows_of("t.csv")
    labels = np.asarray(Image.open("meta-infer-out/a-labels.png"))
    values, counts = np.unique(labels, return_counts=True)
    areas = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert {int(row["label"]): int(row["area"]) for row in rows} == areas
    assert sum(float(row["fraction"]) for row in rows) == pytest.approx(1)


def test_a_table_alone_makes_no_overlays_and_has_a_row_an_object(here, infer):
    code, out, _ = infer("a.jpg", "--csv", "t.csv", "--score-threshold", "0")
    assert (code, (here / "meta-infer-out").exists()) == (0, False)
    assert f"{len(rows_of('t.csv'))} objects" in out
    assert out.splitlines()[-1].startswith(f"{len(rows_of('t.csv'))} rows in t.csv; median ms: ")
    assert (here / "t.csv").read_text().startswith("file,frame,object,class,score,area,")


@pytest.mark.parametrize("model", ["detector", "segmenter"])
def test_a_table_has_its_header_where_nothing_could_be_read(here, infer, model):
    (here / "empty.png").touch()
    for options in ((), ("--label-image",)):
        assert infer("empty.png", "--csv", "empty.csv", *options, model=model)[0] == 2
        assert infer("a.jpg", "--csv", "t.csv", *options, model=model)[0] == 0
        assert (here / "empty.csv").read_text().splitlines() == (here / "t.csv").read_text().splitlines()[:1]


def test_frames_of_a_video_are_numbered_in_the_table(here, infer):
    clip("clip.mp4", 3)
    assert infer("clip.mp4", "--csv", "t.csv")[0] == 0
    assert {row["frame"] for row in rows_of("t.csv")} <= {"0", "1", "2"}


def test_tables_and_label_images_that_cannot_be_are_one_line(here, infer):
    clip("clip.mp4", 1)
    one_line(*infer("clip.mp4", "--label-image"), "clip.mp4", "for images")
    one_line(*infer("a.jpg", "--csv", "a.jpg"), "--csv", "an input")
    one_line(*infer("a.jpg", "--csv", "t", "--coco-json", "t"), "--csv", "--coco-json")
    for option, said in (
        ("--csv=t.csv", "--csv"),
        ("--label-image", "--label-image"),
        ("--tile=64", "tiles"),
    ):
        one_line(*infer("a.jpg", option, model="raw-image"), said, "plain arrays")
    one_line(*infer("a.jpg", "--tile-overlap", "9"), "needs a tile size")
    for model in ("segmenter", "raw-image"):
        one_line(*infer("a.jpg", "--score-threshold", "0.5", model=model), "threshold is for detections")
    for side in ("-1", "8", "2000000", "99999999999"):
        one_line(*infer("a.jpg", "--tile", side), "from 16 to 1048576, or 0 for none", side)
    for overlap in ("-1", "64", "99999999999"):
        options = ("--tile", "64", "--tile-overlap", overlap)
        one_line(*infer("a.jpg", *options), "from 0 to 63", overlap)
    one_line(*infer("a.jpg", "--tile", "x"), "--tile", "'x' is not a whole number")
    assert not (here / "t.csv").exists()


def test_tiles_find_what_each_part_holds(here, infer, bundles):
    code, out, _ = infer("a.jpg", "--tile", "64", "--tile-overlap", "16", "--json")
    assert code == 0
    with Predictor(bundles / "detector", tile=64, tile_overlap=16, score_threshold=0.3) as predictor:
        expected = predictor("a.jpg").to_dict()["detections"]
    assert json.loads(out)["images"][0]["detections"] == expected


def test_a_linked_file_of_the_bundle_is_not_written_over(here, infer, bundles):
    shutil.copytree(bundles / "detector", "bundle")
    os.rename("bundle/model.onnx", "real.onnx")
    os.symlink("../real.onnx", "bundle/model.onnx")
    before = (here / "real.onnx").read_bytes()
    one_line(*infer("a.jpg", "--csv", "real.onnx", model=here / "bundle"), "--csv", "the bundle")
    assert (here / "real.onnx").read_bytes() == before


def test_a_file_that_is_replaced_keeps_its_permissions(here, infer):
    (here / "t.csv").write_text("old")
    os.chmod("t.csv", 0o600)
    assert infer("a.jpg", "--csv", "t.csv")[0] == 0
    assert os.stat("t.csv").st_mode & 0o777 == 0o600
    assert rows_of("t.csv")


def test_a_thousand_files_of_one_name_are_named_at_once(tmp_path):
    claims, asked = Claims(), []
    user = claims.user
    claims.user = lambda path: asked.append(path) or user(path)
    sources = [Source(tmp_path / str(k) / "a.png") for k in range(1000)]
    assert len(set(overlay_names(tmp_path, sources, claims).values())) == 1000
    assert len(asked) == 1000
