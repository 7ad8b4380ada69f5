"""A bundle is whole and as exported, or it is refused in one sentence; writing one is all or nothing."""

import json
import math
import os

import pytest
from msgspec.structs import replace

from meta_deploy.bundle import bundle as module
from meta_deploy.bundle.bundle import Bundle, reserve_bundle, write_bundle
from meta_deploy.bundle.manifest import Thresholds
from meta_deploy.bundle.shipped import SHIPPED, locate
from meta_deploy.errors import BundleError, InputError
from tests.bundles_by_hand import CLASSES, input_spec, manifest, raw_manifest

MANIFEST = manifest("instance-segmentation", (64, 64))
TASKS = ("instance-segmentation", "semantic-segmentation")
BOXES = {"name": "boxes", "dtype": "float32", "shape": [1, 5, 4]}


@pytest.fixture
def written(tmp_path):
    return write_bundle(tmp_path / "b", MANIFEST, {"model.onnx": b"weights", "notes.txt": b""})


def reserve(path, sources=()):
    with reserve_bundle(path, sources):
        pass


def edit(bundle, **changes):
    """Change the manifest on disk; a value of None removes the field."""
    path = bundle.path / "manifest.json"
    content = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        part = content
        for key in parents:
            part = part[key]
        if value is None:
            del part[last]
        else:
            part[last] = value
    path.write_text(json.dumps(content))


def test_a_written_bundle_opens_and_gives_back_what_was_put_in(written):
    bundle = Bundle.open(written.path)
    assert bundle.manifest == written.manifest
    assert bundle.read("model.onnx") == b"weights"
    assert bundle.classes == CLASSES
    assert (bundle.task, bundle.model_name, bundle.target) == (
        "instance-segmentation",
        "by-hand",
        "onnxruntime",
    )
    assert bundle.input.size.max == (64, 64)
    assert bundle.input.static_size
    assert bundle.manifest.thresholds == Thresholds(score=0.05, mask=0.5)
    assert (bundle.score_threshold, bundle.shown_score) == (0.05, 0.3)


def test_files_are_copied_from_paths_with_their_sha256(tmp_path):
    source = tmp_path / "any-name"
    source.write_bytes(b"x" * 3_000_000)
    bundle = write_bundle(tmp_path / "b", MANIFEST, {"model.onnx": source})
    assert bundle.manifest.files["model.onnx"].bytes == 3_000_000
    assert bundle.read("model.onnx") == source.read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: (p / "model.onnx").unlink(), "lacks model.onnx"),
        (lambda p: (p / "model.onnx").write_bytes(b"Weights"), "sha256 differs"),
        (lambda p: (p / "model.onnx").write_bytes(b"weig"), "4 bytes, not 7"),
        (lambda p: (p / "manifest.json").unlink(), "not a bundle"),
        (lambda p: (p / "manifest.json").write_bytes(b""), "manifest.json"),
        (lambda p: (p / "manifest.json").write_bytes(b"{" * 100_000), "manifest.json"),
        (lambda p: (p / "manifest.json").write_bytes(b"[1]"), "not a JSON object"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json"),
    ],
)
def test_a_missing_or_altered_file_is_named(written, change, said):
    change(written.path)
    with pytest.raises(BundleError, match=said) as caught:
        Bundle.open(written.path)
    assert "\n" not in str(caught.value)


def test_a_file_altered_after_opening_is_not_used(written):
    bundle = Bundle.open(written.path)
    (written.path / "model.onnx").write_bytes(b"another")
    with pytest.raises(BundleError, match="not the file that was exported"):
        bundle.read("model.onnx")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 2}, "schema 2.*reads up to 1.*upgrade"),
        ({"schema": None}, "no schema"),
        ({"schema": True}, "no schema"),
        ({"task": "pose"}, "'pose' for 'task'"),
        ({"task": ["detection"]}, "for 'task'"),
        ({"classes": []}, "for 'classes'"),
        ({"input": None}, "lacks 'input"),
        ({"input": 3}, "3 for 'input' .*object"),
        ({"input__dtype": "float16"}, "'float16' for 'input.dtype'"),
        ({"input__batch__opt": 0}, "0 for 'input.batch.opt' .*>= 1"),
        ({"input__batch__opt": 2}, "out of order in 'input.batch'"),
        ({"input__size__opt": [32, 64]}, "out of order in 'input.size'"),
        ({"input__batch__opt": True}, "True for 'input.batch.opt'"),
        ({"input__batch__opt": 1.5}, "1.5 for 'input.batch.opt'"),
        ({"input__size__min": [64]}, r"\[64\] for 'input.size.min' .*length 2"),
        ({"input__divisor": 48}, "48 does not divide"),
        ({"preprocess__mean": [0, 0, float("nan")]}, r"nan for 'preprocess.mean\[2\]'"),
        ({"preprocess__std": [0, 1, 1]}, r"for 'preprocess.std\[0\]'"),
        ({"preprocess__std": [1, 1e-7, 1]}, r"for 'preprocess.std\[1\]'"),
        ({"preprocess__mean": [0, 0, 10**400]}, r"for 'preprocess.mean\[2\]' .*range"),
        ({"preprocess__pad_value": -1e7}, "for 'preprocess.pad_value'"),
        ({"thresholds__score": 10**400}, "for 'thresholds.score'"),
        ({"input__size__max": [65568, 64]}, r"for 'input.size.max\[0\]'"),
        ({"input__divisor": 10**400}, "for 'input.divisor'"),
        ({"input__batch__max": 4097}, "for 'input.batch.max'"),
        ({"classes": ["x" * 201]}, r"for 'classes\[0\]'"),
        ({"classes": ["disc", "  "]}, r"for 'classes\[1\]' .*a line of printable text"),
        ({"classes": ["red\x1b[31m"]}, r"for 'classes\[0\]'"),
        ({"classes": ["red\n"]}, r"for 'classes\[0\]'"),
        ({"classes": ["\ud800"]}, r"for 'classes\[0\]'"),
        ({"classes": 3}, "3 for 'classes'"),
        ({"classes": [3]}, r"3 for 'classes\[0\]'"),
        ({"files": {"x" * 300: {"sha256": "0", "bytes": 1}}}, "cannot read"),
        ({"preprocess__resize__mode": "crop"}, "'crop' for 'preprocess.resize.mode'"),
        ({"preprocess__channels": "grb"}, "'grb' for 'preprocess.channels'"),
        ({"preprocess__resize__mode": "edges"}, "lacks 'preprocess.resize.long'"),
        ({"preprocess__resize__size": [96, 64]}, "resizes to more"),
        ({"thresholds__score": 5}, "5 for 'thresholds.score'"),
        ({"thresholds__shown": -1}, "-1 for 'thresholds.shown'"),
        ({"thresholds": None}, "lacks 'thresholds'"),
        ({"thresholds": [0.5]}, r"\[0.5\] for 'thresholds'"),
        ({"thresholds": 0.5}, "0.5 for 'thresholds'"),
        ({"thresholds": {"score": 0.5, "mask": None}}, "None for 'thresholds.mask'"),
        ({"thresholds__mask": 1}, "1 for 'thresholds.mask'"),
        ({"outputs": [BOXES]}, "lacks the output 'num_detections'"),
        ({"outputs": [{"name": "boxes"}]}, r"lacks 'outputs\[0\].dtype'"),
        ({"outputs": {"boxes": 1}}, "for 'outputs'"),
        ({"model": "net"}, "'net' for 'model'"),
        ({"passes": [3]}, r"3 for 'passes\[0\]'"),
        ({"engine": "best"}, "'best' for 'engine'"),
        ({"files": {}}, "no entry for 'files'"),
        ({"files": None}, "no entry for 'files'"),
        ({"files__model.onnx": {"bytes": 7}}, "lacks .*sha256"),
        ({"files__model.onnx": {"sha256": 7, "bytes": 7}}, "wrong value for .*sha256"),
        ({"files__model.onnx": 7}, "wrong value for .*files"),
    ],
)
def test_a_manifest_that_cannot_be_run_is_refused(written, changes, said):
    edit(written, **changes)
    with pytest.raises(BundleError, match=said) as caught:
        Bundle.open(written.path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(str(written.path)) == 1


def test_a_wrong_value_anywhere_is_at_most_a_bundle_error(written):
    path = written.path / "manifest.json"
    content = json.loads(path.read_text())
    for steps in paths(content):
        for value in (None, [], {}, 0.5, "", "\0", "\ud800", True, [[]], -1, 2**64, math.nan, math.inf):
            changed = json.loads(json.dumps(content))
            part = changed
            for step in steps[:-1]:
                part = part[step]
            part[steps[-1]] = value
            path.write_text(json.dumps(changed))
            try:
                Bundle.open(written.path)
            except BundleError as error:
                assert "\n" not in str(error)  # noqa: PT017


def paths(part, before=()):
    """The steps to every value in nested lists and dictionaries."""
    entries = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for step, value in entries:
        yield (*before, step)
        yield from paths(value, (*before, step))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preprocess": None}, "one of 'image' and 'preprocess' without the other"),
        ({"image": None}, "one of 'image' and 'preprocess' without the other"),
        ({"image": input_spec((64, 64), name="y")}, "an 'image' that its one input does not take"),
        ({"image": input_spec((32, 32), name="pixels")}, "an 'image' that its one input does not take"),
        ({"inputs": raw_manifest().inputs[:1]}, "an 'image' that its one input does not take"),
        ({"inputs": raw_manifest().inputs}, "an 'image' that its one input does not take"),
        ({"inputs": ()}, "for 'inputs'"),
        (
            {"outputs": ({"name": "y", "dtype": "bool", "shape": [None]},)},
            r"None for 'outputs\[0\].shape\[0\]'",
        ),
    ],
)
def test_a_raw_manifest_whose_image_is_not_its_input_is_refused(tmp_path, changes, said):
    assert write_bundle(tmp_path / "b", raw_manifest(of_images=True), {"model.onnx": b""}).task == "raw"
    with pytest.raises(BundleError, match=said):
        write_bundle(tmp_path / "b", raw_manifest(of_images=True, **changes), {"model.onnx": b""})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min": [3, 3]}, "min, opt and max out of order"),
        ({"min": [1]}, "of other lengths"),
        ({"max": [4, 4]}, "min and max that are not its shape"),
        ({"opt": [2, -3]}, r"-3 for 'inputs\[0\].opt\[1\]'"),
    ],
)
def test_an_input_of_a_raw_manifest_whose_range_is_none_is_refused(tmp_path, changes, said):
    bundle = write_bundle(tmp_path / "b", raw_manifest(), {"model.onnx": b""})
    content = json.loads((bundle.path / "manifest.json").read_text())
    content["inputs"][0] |= changes
    (bundle.path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=said):
        Bundle.open(bundle.path)


def test_a_field_of_a_newer_version_is_ignored(written):
    edit(written, future={"x": 1}, input__colour="red")
    assert Bundle.open(written.path).manifest == written.manifest


@pytest.mark.parametrize(("name", "task"), list(zip(SHIPPED, TASKS, strict=True)))
def test_the_shipped_bundles_open(name, task):
    manifest = Bundle.open(locate(name)).manifest
    assert manifest.task == task
    assert manifest.input == input_spec((512, 512), divisor=32)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", "c:\\x", "", "manifest.json", "\ud800"]
)
def test_a_manifest_cannot_name_files_outside_its_folder(written, name):
    edit(written, files={name: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(BundleError, match="plain file name"):
        Bundle.open(written.path)


def test_an_absent_or_foreign_folder_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.open(tmp_path)


def test_an_older_bundle_is_replaced_and_nothing_else_is_left(written, tmp_path):
    write_bundle(written.path, MANIFEST, {"model.onnx": b"newer"})
    assert Bundle.open(written.path).read("model.onnx") == b"newer"
    assert sorted(os.listdir(tmp_path)) == ["b"]
    assert sorted(os.listdir(written.path)) == ["manifest.json", "model.onnx"]


def test_an_empty_folder_is_used_and_missing_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    write_bundle(tmp_path / "empty", MANIFEST, {"model.onnx": b""})
    write_bundle(tmp_path / "a" / "b" / "c", MANIFEST, {"model.onnx": b""})
    assert Bundle.open(tmp_path / "empty")
    assert Bundle.open(tmp_path / "a" / "b" / "c")


def test_a_link_to_a_bundle_stays_a_link(written, tmp_path):
    (tmp_path / "link").symlink_to(written.path)
    write_bundle(tmp_path / "link", MANIFEST, {"model.onnx": b"newer"})
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(written.path).read("model.onnx") == b"newer"


def test_what_is_not_a_bundle_is_not_replaced(written, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"dear")
    (tmp_path / "file").write_bytes(b"dear")
    web = tmp_path / "web"
    web.mkdir()
    (web / "manifest.json").write_text('{"name": "some web page"}')
    (written.path / "my-notes.txt").write_bytes(b"dear")
    for path in (photos, tmp_path / "file", web, written.path):
        with pytest.raises(InputError, match="choose another folder"):
            write_bundle(path, MANIFEST, {"model.onnx": b""})
    assert (photos / "a.jpg").read_bytes() == (written.path / "my-notes.txt").read_bytes() == b"dear"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write to")
def test_a_place_that_cannot_be_written_is_one_sentence():
    with pytest.raises(InputError, match="cannot write the bundle '/proc/b'"):
        write_bundle("/proc/b", MANIFEST, {"model.onnx": b""})
    with pytest.raises(InputError, match="cannot write the bundle '/proc/b'"):
        reserve("/proc/b")


def test_a_name_that_is_too_long_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot write the bundle"):
        reserve(tmp_path / ("x" * 256))
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / ("x" * 256))
    assert os.listdir(tmp_path) == []
    assert write_bundle(tmp_path / ("x" * 255), MANIFEST, {"model.onnx": b""})


def test_a_place_below_a_file_is_refused_early(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="not a folder you can write to"):
        reserve(tmp_path / "file" / "b")


def test_a_full_disk_leaves_the_old_bundle_and_nothing_else(written, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device.*free space"):
        write_bundle(written.path, MANIFEST, {"model.onnx": b"newer"})
    with pytest.raises(InputError):
        write_bundle(tmp_path / "deep" / "new", MANIFEST, {"model.onnx": b"newer"})
    assert sorted(os.listdir(tmp_path)) == ["b"]
    assert Bundle.open(written.path).read("model.onnx") == b"weights"


def test_a_disk_without_room_for_all_of_it_leaves_the_old_bundle(written, tmp_path, full_disk):
    with pytest.raises(InputError, match="cannot write the bundle"):
        write_bundle(written.path, MANIFEST, {"model.onnx": bytes(9000)})
    assert os.listdir(tmp_path) == ["b"]
    assert Bundle.open(written.path).read("model.onnx") == b"weights"


def test_an_invalid_manifest_is_not_written(tmp_path):
    with pytest.raises(BundleError, match="'' for 'target'"):
        write_bundle(tmp_path / "x" / "b", replace(MANIFEST, target=""), {"model.onnx": b""})
    assert os.listdir(tmp_path) == []


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (reserve, lambda path: write_bundle(path, MANIFEST, {"model.onnx": b""})):
        with pytest.raises(InputError, match="is empty"):
            write("")
    assert os.listdir(tmp_path) == []


def test_the_current_folder_is_not_replaced_under_the_shell_that_is_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is the current folder"):
        write_bundle(".", MANIFEST, {"model.onnx": b""})
    assert os.listdir(tmp_path) == []


def test_what_is_read_for_a_bundle_is_not_replaced_by_it(written, tmp_path):
    (tmp_path / "link").symlink_to(written.path)
    for out, source in (("b", "link/model.onnx"), ("link", "b"), ("link", "b/notes.txt")):
        with pytest.raises(InputError, match="which is replaced"):
            reserve(tmp_path / out, [tmp_path / source])
    reserve(tmp_path / "b", [tmp_path / "c" / "model.onnx"])
    assert sorted(os.listdir(tmp_path)) == ["b", "link"]


def test_an_error_of_the_work_in_between_is_its_own(tmp_path):
    with pytest.raises(BrokenPipeError), reserve_bundle(tmp_path / "a" / "b"):
        raise BrokenPipeError
    assert os.listdir(tmp_path) == []


def test_what_comes_to_be_in_its_place_meanwhile_is_kept(written):
    with reserve_bundle(written.path) as reserved:
        (written.path / "my-notes.txt").write_bytes(b"dear")
        with pytest.raises(InputError, match=r"holds 'my-notes\.txt'"):
            reserved.write(MANIFEST, {"model.onnx": b"newer"})
    assert (written.path / "my-notes.txt").read_bytes() == b"dear"
