"""The order of an export, from arguments to a bundle that answers as the checkpoint does."""

import json
import platform

import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace
from PIL import Image

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import Edges, SizeRange, TensorSpec, Thresholds
from meta_deploy.calib import calibrate
from meta_deploy.errors import (
    BundleError,
    CheckpointError,
    EngineError,
    ImageError,
    InputError,
    VerificationError,
)
from meta_deploy.export import Progress, export, pipeline
from meta_deploy.export.options import Options
from meta_deploy.export.plan import choose_passes
from meta_deploy.export.samples import find_files
from meta_deploy.export.sources import checkpoint as checkpoint_source
from meta_deploy.export.sources.checkpoint import CheckpointSource, describe, input_spec, preprocess_rules
from meta_deploy.graph.modules import module_of
from meta_deploy.graph.pipeline import PASSES
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.graph.precision import fp16 as fp16_module
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.registry import build_model, config_from_dict
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.targets import TARGETS
from meta_deploy.targets.tensorrt.layers import read_json
from tests.tiny_models import SIZE, dense, detector, exported, lively, segmenter

CONFIG = detector()
builds = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="elsewhere the dev extra does not bring tensorrt-rtx",
)


# --- arguments ---


ONNX_RUNTIME = TARGETS["onnxruntime"]


def spec(size=None, **options):
    return input_spec(size or CONFIG.input_size, Options(**options))


def test_without_options_the_input_is_static_and_the_models_own():
    s = spec()
    assert s.size == SizeRange(min=SIZE, opt=SIZE, max=SIZE)
    assert (s.batch.min, s.batch.opt, s.batch.max) == (1, 1, 1)
    assert s.static_size
    assert s.static_batch
    assert describe(s) == "input 96x128, batch 1"


def test_a_dynamic_size_goes_from_one_step_to_the_longer_side():
    s = spec((64, 160), dynamic_size=True)
    assert s.size == SizeRange(min=(32, 32), opt=(64, 160), max=(160, 160))
    assert describe(s) == "input up to 160x160 in steps of 32, batch 1"
    assert preprocess_rules(CONFIG, s).resize == Edges(long=160, short=64)


def test_a_dynamic_batch_is_a_range():
    s = spec(dynamic_batch=(1, 2, 4))
    assert (s.batch.min, s.batch.opt, s.batch.max) == (1, 2, 4)
    assert describe(s) == "input 96x128, batch 1 to 4"
    assert spec(dynamic_batch=(3, 3, 3)).static_batch


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((100, 96), "input height 100 is not a multiple of 32; the nearest is 96"),
        ((96, 120), "input width 120 is not a multiple of 32; the nearest is 128"),
        ((1, 96), "input height 1 is not a multiple of 32; the nearest is 32"),
        ((96, 0), "input width 0 is not a multiple of 32; the nearest is 32"),
        ((-32, 96), "input height -32 is not a multiple of 32; the nearest is 32"),
        ((10**6 * 32, 96), "too large .over 2..31 numbers.; take a smaller batch or size"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_the_nearest(size, message):
    with pytest.raises(InputError, match=message):
        spec(size)


@pytest.mark.parametrize("batches", [(0, 1, 2), (2, 1, 4), (1, 5, 4), (4, 2, 1), (-1, -1, -1)])
def test_a_batch_range_that_does_not_rise_is_refused(batches):
    with pytest.raises(InputError, match=f"batch range {' '.join(map(str, batches))} does not rise"):
        spec(dynamic_batch=batches)


@pytest.mark.parametrize("batch", [-1, 10**9])
def test_a_batch_that_is_none_or_huge_is_refused(batch):
    with pytest.raises(InputError):
        spec(batch=batch)


def test_passes_run_in_the_targets_order_whatever_the_users():
    order = list(ONNX_RUNTIME.passes)
    assert set(order) <= set(PASSES)
    assert choose_passes("all", ONNX_RUNTIME) == order
    assert choose_passes("none", ONNX_RUNTIME) == []
    assert choose_passes(", ".join(reversed(order)), ONNX_RUNTIME) == order
    assert choose_passes(order[-1], ONNX_RUNTIME) == order[-1:]


@pytest.mark.parametrize("passes", ["fuse", "clean-up,fuse", "", "all,none", "clean-up,"])
def test_an_unknown_pass_is_named_with_the_choices(passes):
    with pytest.raises(
        InputError, match="is not a graph pass of onnxruntime; choose all, none, or some of clean"
    ):
        choose_passes(passes, ONNX_RUNTIME)


def picture(path, size=(90, 120)):
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    image.resize(size[::-1], Image.Resampling.BICUBIC).save(path)
    return path


def test_images_to_compare_on_are_spread_over_the_folder(tmp_path):
    for i in range(20):
        picture(tmp_path / f"{i:02}.png", (4, 4))
    chosen = find_files(tmp_path)
    assert [path.stem for path in chosen] == ["00", "02", "05", "07", "10", "12", "15", "17"]
    assert len(find_files(None)) == 8


def test_few_images_are_all_taken(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png", (4, 4))
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.stem for path in find_files(tmp_path)] == ["0", "1", "2"]


def test_a_folder_that_is_missing_empty_a_file_or_holds_a_broken_image_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a folder; give --calib-images a folder of images"):
        find_files(tmp_path / "missing")
    with pytest.raises(InputError, match="is not a folder"):
        find_files(picture(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="there is no image in the folder"):
        find_files(tmp_path / "empty")
    whole = picture(tmp_path / "broken" / "a.jpg").read_bytes()
    (tmp_path / "broken" / "b.jpg").write_bytes(whole[:200])
    with pytest.raises(ImageError, match=r"b\.jpg"):
        find_files(tmp_path / "broken")


# --- the whole of it, with one graph translated once ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "tiny.pth"
    save_checkpoint(path, lively(CONFIG), CONFIG, ["disc", "star", "ring", "bar", "cross"])
    return path


@pytest.fixture
def quick(checkpoint, tmp_path, monkeypatch):
    """`export(...)` of the tiny checkpoint to ./bundle on two pictures, its translation made before."""
    monkeypatch.chdir(tmp_path)
    pictures = [picture(tmp_path / "pictures" / name) for name in ("a.png", "long_b.png")]

    def call(**options):
        kind = {"batch": options.get("batch", 1), "dynamic_batch": options.get("dynamic_batch")}

        def export_onnx(model, spec, operators):
            return exported("detector", operators=operators, **kind).literal_copy()

        monkeypatch.setattr(checkpoint_source, "export_onnx", export_onnx)
        return export(checkpoint, **{"out": "bundle", "calib_images": pictures[0].parent, **options})

    return call


@pytest.mark.slow
def test_a_checkpoint_becomes_a_bundle_that_answers_as_the_model_does(quick, tmp_path):
    bundle = quick()
    assert bundle.manifest == Bundle.open("bundle").manifest
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == ["manifest.json", "model.onnx"]
    graph = onnx.load("bundle/model.onnx")
    assert [o.name for o in graph.graph.output] == ["num_detections", "boxes", "scores", "labels", "masks"]
    image = np.array(Image.open("pictures/a.png"))
    detections = Predictor(bundle, score_threshold=0.0)(image)
    assert len(detections.scores) > 0
    prepared = np.zeros((1, 3, *SIZE), np.float32)
    from meta_deploy.imaging.preprocess import Preprocessor

    prepared, _ = Preprocessor(bundle.input, bundle.preprocess)([image])
    with torch.no_grad():
        expected = exported("detector").model(torch.from_numpy(prepared))
    found = int(expected["num_detections"][0])
    np.testing.assert_allclose(
        np.sort(detections.scores), np.sort(expected["scores"][0, :found].numpy()), atol=1e-4
    )


@pytest.mark.slow
def test_the_manifest_tells_what_was_done(quick):
    manifest = quick().manifest
    assert manifest.task == "instance-segmentation"
    assert manifest.model.name == CONFIG.name
    assert config_from_dict(manifest.model.config) == CONFIG
    assert manifest.classes == ("disc", "star", "ring", "bar", "cross")
    assert manifest.parameters == sum(p.numel() for p in exported("detector").model.parameters())
    assert manifest.input.size == SizeRange(min=SIZE, opt=SIZE, max=SIZE)
    shapes = {output.name: output.shape for output in manifest.outputs}
    assert shapes["masks"] == (1, CONFIG.max_detections, 28, 28)
    assert (manifest.target, manifest.precision, manifest.engine) == ("onnxruntime", "fp32", None)
    assert [row.name for row in manifest.passes] == list(ONNX_RUNTIME.passes)
    assert manifest.nodes.before > manifest.nodes.after == manifest.passes[-1].nodes_after
    assert manifest.verification["passed"]
    assert manifest.verification["images"] == 2
    assert list(manifest.seconds) == ["load", "export", "passes", "verify"]
    assert manifest.peak_rss_mb > 50
    assert {"python", "torch", "onnx", "onnxruntime", "numpy"} <= set(manifest.created_by)
    assert manifest.thresholds == Thresholds(score=0.05, mask=0.5)


@pytest.mark.parametrize("config", [detector(), dense(), segmenter()], ids=["detector", "dense", "segmenter"])
def test_the_score_from_which_a_configuration_shows_detections_is_in_the_manifest(tmp_path, config):
    if scored := config.task != "semantic-segmentation":
        config = replace(config, shown_score=0.7)
    save_checkpoint(tmp_path / "x.pth", build_model(config), config)
    source = CheckpointSource(tmp_path / "x.pth", Options(), print)
    outputs = tuple(TensorSpec(name=name, dtype="float32", shape=()) for name in source.outputs)
    bundle = Bundle(tmp_path, source.manifest(target="onnxruntime", precision="fp32", outputs=outputs))
    assert bundle.shown_score == (0.7 if scored else 0.0)


@pytest.mark.slow
def test_passes_left_out_are_no_harm(quick):
    for passes in ("none", "discarded-rows", "all"):
        bundle = quick(passes=passes)
        chosen = choose_passes(passes, ONNX_RUNTIME)
        assert [row.name for row in bundle.manifest.passes] == chosen
        assert bundle.manifest.verification["passed"]


@pytest.mark.slow
def test_a_dynamic_batch_is_verified_at_its_ends(quick, monkeypatch):
    sizes = []
    run = checkpoint_source.CheckpointSource.run

    def spy(source, feed):
        sizes.append(len(feed["images"]))
        return run(source, feed)

    monkeypatch.setattr(checkpoint_source.CheckpointSource, "run", spy)
    manifest = quick(dynamic_batch=(1, 2, 4)).manifest
    assert {1, 4} <= set(sizes)
    assert (manifest.input.batch.min, manifest.input.batch.opt, manifest.input.batch.max) == (1, 2, 4)
    assert manifest.verification["images"] == 2


@pytest.mark.slow
def test_without_verification_it_is_null(quick):
    assert quick(check=False).manifest.verification is None


def test_a_missing_folder_of_images_is_refused_even_without_verification(quick):
    with pytest.raises(InputError, match="is not a folder"):
        quick(check=False, calib_images="missing")


@pytest.mark.slow
def test_progress_names_every_stage_in_order(quick):
    told = []
    progress = Progress(
        note=lambda line: told.append(("note", line)),
        start=lambda stage: told.append(("start", stage)),
        end=lambda stage, seconds: told.append(("end", stage)),
        count=lambda done, total: told.append(("count", done, total)),
    )
    quick(progress=progress)
    stages = ["load", "export", "passes", "verify", "write"]
    assert [entry for entry in told if entry[0] in ("start", "end")] == [
        (kind, stage) for stage in stages for kind in ("start", "end")
    ]
    assert ("count", 2, 2) in told
    notes = " | ".join(entry[1] for entry in told if entry[0] == "note")
    assert "target onnxruntime" in notes
    assert "tiny-mask-rcnn" in notes
    assert "input 96x128, batch 1" in notes


@pytest.mark.slow
def test_an_export_is_the_same_each_time(quick):
    first, second = quick(out="one"), quick(out="two")
    assert first.manifest.files == second.manifest.files


def corrupt(graph):
    """A pass with a mistake: it halves the largest weight."""
    weights = [t for t in graph.tensors().values() if hasattr(t, "values") and t.values.dtype == np.float32]
    largest = max(weights, key=lambda t: t.values.size)
    largest.values = largest.values * np.float32(0.5)
    return 1


@pytest.mark.slow
def test_a_graph_that_differs_is_caught_and_nothing_is_written(quick, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())
    monkeypatch.setitem(PASSES, "discarded-rows", corrupt)
    monkeypatch.setattr(pipeline, "at_fault", lambda *_: None)  # else it is left out
    with pytest.raises(VerificationError, match=r"does not match PyTorch .* are off"):
        quick()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_harm_that_final_boxes_hide_is_caught_for_openvino_too(quick, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setitem(PASSES, "discarded-rows", corrupt)
    monkeypatch.setattr(pipeline, "at_fault", lambda *_: None)
    with pytest.raises(VerificationError, match=r"does not match PyTorch .* are off"):
        quick(target="openvino")


@pytest.mark.slow
def test_an_older_bundle_is_replaced_by_a_good_export_only(quick, monkeypatch):
    old = quick(check=False).manifest
    with monkeypatch.context() as patch:
        patch.setitem(PASSES, "discarded-rows", corrupt)
        patch.setattr(pipeline, "at_fault", lambda *_: None)
        with pytest.raises(VerificationError):
            quick()
    assert Bundle.open("bundle").manifest == old
    quick()
    assert Bundle.open("bundle").manifest.verification["passed"]


def test_what_cannot_be_written_is_refused_before_any_work(quick, tmp_path):
    told = []
    progress = Progress(start=told.append)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("precious")
    for out in ("file", "folder", "file/bundle"):
        with pytest.raises(InputError):
            quick(out=out, progress=progress)
    assert told == []
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "precious"


def test_the_checkpoints_own_troubles_are_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for path in ("missing.pth", "text.pth", "."):
        with pytest.raises(CheckpointError):
            export(path, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["text.pth"]


def test_a_model_that_does_not_exist_is_refused(quick):
    with pytest.raises(InputError, match="No model is named 'resnet'"):
        quick(model="resnet")


def test_a_graph_that_cannot_be_serialized_is_too_large():
    class Large:
        def SerializeToString(self):
            raise ValueError("exceeds 2 GB")

    with pytest.raises(InputError, match="too large for one ONNX file: exceeds 2 GB"):
        pipeline.serialize(Large())


@pytest.mark.slow
def test_a_folder_that_only_writing_finds_closed_is_bad_input(quick):
    with pytest.raises(InputError, match="cannot write the bundle '/proc/bundle'"):
        quick(out="/proc/bundle", check=False)


@pytest.mark.slow
def test_what_is_written_cannot_be_an_invalid_bundle(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "output_specs", lambda *_: ())
    with pytest.raises(BundleError):
        quick(check=False)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_the_manifest_is_json_and_names_no_path(quick, tmp_path):
    quick()
    text = (tmp_path / "bundle" / "manifest.json").read_text()
    json.loads(text)
    assert str(tmp_path) not in text


# --- lower precisions and engines ---


def test_float16_for_onnx_runtime_is_half_the_size_and_answers_alike(quick, monkeypatch):
    # A float32 file of weights that float16 holds exactly would be as small.
    monkeypatch.setattr(TARGETS["onnxruntime"], "compacts", False)
    full = quick(out="full")
    half = quick(out="half", precision="fp16")
    assert half.manifest.files["model.onnx"].bytes < 0.7 * full.manifest.files["model.onnx"].bytes
    conversion = half.manifest.conversion
    assert conversion["nodes"] > 2 * conversion["float32_nodes"] > 0
    assert full.manifest.conversion is None
    graphs = [onnx.load(bundle.path / "model.onnx").graph for bundle in (full, half)]
    modules = [{module_of(node.name) for node in graph.node} for graph in graphs]
    assert len(modules[0]) > 10
    assert modules[1] <= modules[0]  # the casts' names too
    limits = half.manifest.verification["stages"]["maps"]["tolerance"]
    assert limits == {"rms_relative_error": PRECISIONS["fp16"].tolerances["maps_rms"]}
    found = [len(Predictor(bundle)("pictures/a.png").scores) for bundle in (full, half)]
    assert found[0] > 0
    assert abs(found[0] - found[1]) <= max(2, 0.2 * found[0])


@builds
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_bundle_for_tensorrt_holds_an_engine_and_the_graph_that_was_checked(quick, precision):
    bundle = quick(target="tensorrt-rtx", precision=precision, gpus=("8.6", "8.9"), workspace_mb=512)
    assert set(bundle.manifest.files) == {"model.onnx", "model.engine", "layers.json"}
    engine = bundle.manifest.engine
    assert len(read_json(bundle.read("layers.json"), "layers")) >= engine.layers
    assert (engine.library, engine.compute_capabilities, engine.tf32) == (
        *("tensorrt-rtx", ("8.6", "8.9")),
        False,
    )
    assert engine.layers > 100
    assert bundle.manifest.operators == "lowered"
    assert bundle.manifest.verification["passed"]
    assert Bundle.open(bundle.path).manifest == bundle.manifest
    graph = onnx.load(bundle.path / "model.onnx")
    assert not {node.op_type for node in graph.graph.node} & {"NonMaxSuppression", "RoiAlign", "NonZero"}
    if precision != "bf16":  # for which a CPU has no kernels
        with Predictor(bundle, backend="onnxruntime", score_threshold=0.0) as predictor:
            assert len(predictor("pictures/a.png").scores) > 0


@builds
def test_for_an_engine_ranges_are_measured_on_the_graph_with_native_operators(quick, monkeypatch):
    class Seen(Exception):
        pass

    def collect(model, readers, *_):
        made = {output.name for node in model.graph for output in node.outputs}
        raise Seen({node.op_type for node in model.graph}, readers.keys() - made)

    monkeypatch.setattr(calibrate, "collect", collect)
    with pytest.raises(Seen) as seen:
        quick(target="tensorrt-rtx", precision="int8")
    ops, missing = seen.value.args
    assert {"RoiAlign", "NonMaxSuppression"} <= ops
    assert missing <= {"images"}


@builds
def test_an_engine_that_cannot_be_built_leaves_nothing(quick, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise EngineError("TensorRT cannot build the graph: no")

    monkeypatch.setattr(type(TARGETS["tensorrt-rtx"]), "build", refuse)
    with pytest.raises(EngineError):
        quick(target="tensorrt-rtx", check=False)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_for_openvino_holds_the_model_that_was_checked(quick):
    pytest.importorskip("openvino")
    sizes = {}
    for precision in ("fp32", "fp16"):
        bundle = quick(target="openvino", precision=precision)
        assert set(bundle.manifest.files) == {"model.xml", "model.bin"}
        sizes[precision] = bundle.manifest.files["model.bin"].bytes
        assert (bundle.engine.library, bundle.engine.precision_hint) == ("openvino", "f32")
        assert bundle.manifest.conversion is None  # it is the weights that are in float16
        verification = bundle.manifest.verification
        assert verification["backend"].startswith("OpenVINO ")
        assert verification["stages"]["detections"]["compared"] > 0
        with Predictor(bundle, score_threshold=0.0) as predictor:
            assert predictor.backend == "openvino"
            assert len(predictor("pictures/a.png").scores) > 0
    assert sizes["fp16"] < 0.7 * sizes["fp32"]


def test_what_was_built_wrong_is_caught_and_nothing_is_written(quick, tmp_path, monkeypatch):
    openvino, build = TARGETS["openvino"], type(TARGETS["openvino"]).build
    pytest.importorskip("openvino")

    def wrong(self, model, *arguments):
        proto = onnx.load_from_string(model)
        for weight in proto.graph.initializer:
            if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) == 4:  # convolutions
                weight.CopyFrom(
                    onnx.numpy_helper.from_array(0.5 * onnx.numpy_helper.to_array(weight), weight.name)
                )
        return build(self, proto.SerializeToString(), *arguments)

    monkeypatch.setattr(type(openvino), "build", wrong)
    with pytest.raises(VerificationError, match="does not match"):
        quick(target="openvino")
    assert not (tmp_path / "bundle").exists()


def test_what_comes_near_float16s_range_is_told_and_kept(quick, monkeypatch):
    monkeypatch.setattr(fp16_module, "overflowing", lambda maxima: {sorted(maxima)[0]: 6e4})
    lines = []
    bundle = quick(precision="fp16", progress=Progress(note=lines.append), check=False)
    assert "1 tensors come near float16's range (up to 6e+04) and stay in float32" in lines
    assert list(bundle.manifest.conversion["overflow"].values()) == [6e4]
