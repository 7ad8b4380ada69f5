"""--int8: calibrated on what was given, verified, told in the manifest; and refused in one line."""

from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from meta_deploy import Predictor
from meta_deploy.bundle.manifest import BatchRange, Fit, InputSpec, Preprocess, SizeRange
from meta_deploy.calib import timed, timing
from meta_deploy.calib.calibrate import Calibrator
from meta_deploy.calib.search import Search
from meta_deploy.cli.export import summary
from meta_deploy.errors import InputError
from meta_deploy.export import Progress, export, samples, speed, trial
from meta_deploy.export.options import Options
from meta_deploy.export.pipeline import measured_natively
from meta_deploy.export.plan import planned
from meta_deploy.export.verify import OnnxRun
from meta_deploy.graph.precision.int8 import Quantization
from meta_deploy.targets import TARGETS, choose_target
from tests.small_graphs import model, run, value, without_size

node = helper.make_node
SIDE = 24


def constant(name, *shape, scale=0.1):
    numbers = np.random.default_rng(sum(map(ord, name))).normal(0, scale, shape)
    return numpy_helper.from_array(numbers.astype(np.float32), name)


def network():
    """Two convolutions that gain from 8 bits between two that stay: image (1, 3, 24, 24) to y (1, 4)."""
    pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", ["image", "w0"], ["a"], **pads),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w1"], ["c"], **pads),
        node("Relu", ["c"], ["d"]),
        node("Conv", ["d", "w2"], ["e"], **pads),
        node("GlobalAveragePool", ["e"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Tanh", ["f"], ["t"]),
        node("MatMul", ["t", "w3"], ["y"]),
    ]
    constants = [constant("w0", 32, 3, 3, 3), constant("w1", 32, 32, 3, 3), constant("w2", 64, 32, 3, 3)]
    constants.append(constant("w3", 64, 4))
    opset = [helper.make_opsetid("", 17)]
    return model(nodes, [value("image", [1, 3, SIDE, SIDE])], ["y"], constants, opset_imports=opset)


def inputs(folder, count, change=lambda array: None):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        array = np.random.default_rng(i).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
        if i == 1:
            change(array)
        np.savez(folder / f"{i:03}.npz", image=array)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    onnx.save(network(), "net.onnx")
    return tmp_path


def quantize(name="net.onnx", **options):
    """An export to 8 bits, by the rules alone unless `search` says otherwise."""
    fixed = {"precision": "int8", "target": "onnxruntime", "search": False, "out": "b"}
    return export(name, **{**fixed, **options})


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_bundle_in_8_bits_is_smaller_and_answers_nearly_as_the_file(here, target):
    pytest.importorskip(target)
    lines = []
    progress = Progress(note=lines.append)
    bundle = quantize(target=target, calib_images=inputs(here / "in", 40), progress=progress)
    assert not any("warning: calibrated" in line for line in lines)
    manifest = bundle.manifest
    assert manifest.precision == "int8"
    assert manifest.verification["passed"]
    assert manifest.verification["images"] == 8
    ratio = manifest.verification["speed"]["ratio"]
    assert ratio > 0
    rest = choose_target(target, "int8")[0].rest("int8")
    assert f"int8 takes {ratio:.2f} of {rest}'s time on this machine" in lines[-1]
    done = manifest.conversion
    assert (done["products"], done["quantized"]) == (4, 2)
    assert done["calibration"]["samples"] == 40
    assert (
        sum(done["calibration"]["methods"].values())
        == done["tensors"]
        == (3 if target == "onnxruntime" else 2)
    )
    weights = manifest.files["model.onnx" if target == "onnxruntime" else "model.bin"]
    assert weights.bytes < 0.4 * (here / "net.onnx").stat().st_size
    feed = {"image": np.random.default_rng(99).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)}
    with Predictor(bundle) as predictor:
        expected, actual = run(network(), **feed)["y"], predictor.run(feed)["y"]
    assert 0 < np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)


def test_both_are_timed_in_turns_and_no_gain_is_told():
    calls = []
    runs = [lambda feed: calls.append("low"), lambda feed: calls.append("full")]
    assert np.shape(timing.interleaved(runs, {}, rounds=6)) == (6, 2)
    assert calls == ["low", "full"] * 7
    slower, faster = ({"ratio": ratio, "ms": 12.0, "rest_ms": 10.0} for ratio in (1.2, 0.5))
    assert speed.verdict(slower, "int8", "fp32").startswith(
        "warning: int8 takes 1.20 of fp32's time on this machine"
    )
    assert speed.verdict(faster, "int8", "bf16") == "int8 takes 0.50 of bf16's time on this machine (12.0 ms)"


def test_the_method_is_the_one_asked_for(here):
    bundle = quantize(calib_images=inputs(here / "in", 2), calib_method="mse", check=False)
    assert bundle.manifest.conversion["calibration"]["methods"] == {"mse": 3}


def test_images_calibrate_where_the_graph_takes_them(here):
    lines = []
    bundle = quantize(scale=1 / 255, check=False, progress=Progress(note=lines.append))
    assert bundle.manifest.conversion["calibration"]["noun"] == "images"
    assert "warning: calibrated on the package's own pictures; give your own by --calib-images" in lines
    assert any("8 images, fewer than 32" in line for line in lines)


def times(monkeypatch, low, full=2.0):
    """Every run in 8 bits takes `low` seconds, every one in float32 `full`."""

    def interleaved(runs, *_):
        return [[low if isinstance(r, OnnxRun) and is_low(r) else full for r in runs]] * 5

    def is_low(one):
        return any("QuantizeLinear" in name for name in one.operators)

    class Told(OnnxRun):
        def __init__(self, graph, *args, **settings):
            super().__init__(graph, *args, **settings)
            self.operators = {node.op_type for node in graph.graph.node}

    monkeypatch.setattr(speed, "OnnxRun", Told)
    monkeypatch.setattr(timed, "interleaved", interleaved)


def test_what_gains_time_and_loses_little_is_in_8_bits_and_told_with_its_table(here, monkeypatch):
    times(monkeypatch, 1.0)
    lines = []
    progress = Progress(note=lines.append)
    bundle = quantize(search=True, max_drop=5, calib_images=inputs(here / "in", 2), progress=progress)
    done = bundle.manifest.conversion
    assert (bundle.precision, done["quantized"], done["declined"]) == ("int8", 2, "")
    (group,) = done["search"]["groups"]  # the second reads what the first makes
    assert (group["products"], group["chosen"], group["rest_ms"], group["low_ms"]) == (2, True, 2000, 1000)
    assert 0 < done["search"]["drop"] < 5
    assert bundle.manifest.verification["speed"] == {"ratio": 0.5, "ms": 1000, "rest_ms": 2000}
    assert "ms   8 bits" in summary(bundle, 1)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_groups_are_timed_in_the_library_that_runs_the_bundle(here, target):
    pytest.importorskip(target)
    bundle = quantize(target=target, search=True, calib_images=inputs(here / "in", 2), check=False)
    done = bundle.manifest.conversion
    assert all(min(group["rest_ms"], group["low_ms"]) > 0 for group in done["search"]["groups"])
    assert sum(group["products"] for group in done["search"]["groups"]) == 2
    assert (bundle.precision == "int8") == (done["quantized"] > 0) == (not done["declined"])


def test_where_openvino_gains_nothing_what_8_bits_left_is_what_ships(here, monkeypatch):
    openvino = pytest.importorskip("openvino")
    monkeypatch.setattr(timed, "interleaved", lambda runs, *_: [[1.0, 3.0]] * 5)
    bundle = quantize(target="openvino", search=True, calib_images=inputs(here / "in", 2), out=None)
    has = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision, hint, title = ("bf16", "bf16", "bfloat16") if has else ("fp32", "f32", "float32")
    assert (bundle.precision, bundle.manifest.engine.precision_hint) == (precision, hint)
    assert bundle.path.name == f"net-openvino-{precision}"
    assert f"in {title}, as no group" in summary(bundle, 1)


def test_8_bits_on_openvino_are_held_against_bfloat16_where_the_processor_has_it(here, monkeypatch):
    pytest.importorskip("openvino")
    from meta_deploy.targets import openvino as target

    for has, rest in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(target, "_has_bfloat16", lambda core, has=has: has)
        plan = planned("net.onnx", Options(precision="int8", target="openvino"))
        assert (plan.rest, set(plan.folders)) == (rest, {"int8", rest})
        assert planned("net.onnx", Options(precision="fp32", target="openvino")).rest == "fp32"


@pytest.mark.parametrize(
    ("low", "max_drop", "why"),
    [
        (3.0, None, "no group of products gains time that is more than noise"),
        (1.0, 0, "no set of the groups that gain time stays within the limit"),
    ],
)
def test_where_8_bits_do_not_pay_float32_ships_and_says_why(here, monkeypatch, low, max_drop, why):
    times(monkeypatch, low)
    lines = []
    given = {"search": True, "max_drop": max_drop, "calib_images": inputs(here / "in", 2)}
    bundle = quantize(**given, progress=Progress(note=lines.append))
    assert f"warning: {why}; the bundle is in float32" in lines
    assert (bundle.precision, bundle.manifest.conversion["declined"]) == ("fp32", why)
    assert f"in float32, as {why}" in summary(bundle, 1)
    feed = {"image": np.random.default_rng(9).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)}
    with Predictor(bundle) as predictor:
        np.testing.assert_allclose(
            predictor.run(feed)["y"], run(network(), **feed)["y"], rtol=1e-4, atol=1e-6
        )
    with pytest.raises(InputError, match=f"^{why}; use --fp32, or leave out --strict"):
        quantize(**given, strict=True, out="strict", progress=Progress(note=lines.append))
    assert not (here / "strict").exists()
    assert any("groups of products" in line for line in lines)


@pytest.mark.parametrize(("low", "precision"), [(1.0, "int8"), (3.0, "fp32")])
def test_a_bundle_is_named_by_the_precision_that_it_came_to_be_in(here, monkeypatch, low, precision):
    times(monkeypatch, low)
    before = set(here.iterdir())
    bundle = quantize(search=True, out=None, calib_images=inputs(here / "in", 2), check=False)
    assert bundle.precision == precision
    assert set(here.iterdir()) - before == {
        here / "in",
        here / "cache",
        here / f"net-onnxruntime-{precision}",
    }


def wide():
    """Two wide convolutions, the only products that pay for a kernel more: image (1, 3, 24, 24) to y."""
    pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        *(node("Conv", ["image", "w0"], ["a"], **pads), node("Relu", ["a"], ["b"])),
        *(node("Conv", ["b", "w1"], ["c"], **pads), node("Relu", ["c"], ["d"])),
        *(node("Conv", ["d", "w2"], ["e"], **pads), node("Relu", ["e"], ["f"])),
        *(node("Conv", ["f", "w3"], ["g"], kernel_shape=[1, 1]), node("GlobalAveragePool", ["g"], ["y"])),
    ]
    constants = [constant("w0", 256, 3, 3, 3), constant("w3", 4, 256, 1, 1)]
    constants += [constant(name, 256, 256, 3, 3, scale=0.02) for name in ("w1", "w2")]
    opset = [helper.make_opsetid("", 17)]
    return model(nodes, [value("image", [1, 3, SIDE, SIDE])], ["y"], constants, opset_imports=opset)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("search", [False, True])
def test_an_engine_in_8_bits_is_built_read_back_and_compared(here, precision, search):
    pytest.importorskip("tensorrt_rtx")
    onnx.save(wide(), "wide.onnx")
    given = {"target": "tensorrt-rtx", "precision": precision, "search": search}
    bundle = quantize("wide.onnx", **given, calib_images=inputs(here / "in", 2))
    done, engine = bundle.manifest.conversion, bundle.manifest.engine
    assert (bundle.precision, done["quantized"], done["rest"], done["declined"]) == (precision, 2, "fp16", "")
    assert engine.eight_bits == {precision: 2}
    assert bundle.manifest.verification["passed"]
    assert bundle.manifest.verification["emulated"]
    assert "speed" not in bundle.manifest.verification
    assert f"2 products in {precision}" in summary(bundle, 1)
    assert "2 in float16: " not in summary(bundle, 1)
    if search:
        speed = done["search"]["speed"]
        assert speed["ratio"] < 0.97
        assert (speed["engine"]["eight_bits"], speed["rest_engine"]["eight_bits"]) == (2, 0)
        assert "groups of products (estimated)" in summary(bundle, 1)
    feed = {"image": np.random.default_rng(99).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)}
    with Predictor(bundle, backend="onnxruntime") as predictor:
        expected, actual = run(wide(), **feed)["y"], predictor.run(feed)["y"]
    assert 0 < np.linalg.norm(actual - expected) < 0.15 * np.linalg.norm(expected)


def test_an_engine_for_any_batch_is_priced_for_the_usual_one(here):
    pytest.importorskip("tensorrt_rtx")
    onnx.save(without_size(wide(), 0), "wide.onnx")
    bundle = quantize(
        "wide.onnx",
        target="tensorrt-rtx",
        search=True,
        dynamic_batch=(1, 2, 4),
        calib_images=inputs(here / "in", 2),
        check=False,
    )
    speed = bundle.manifest.conversion["search"]["speed"]
    assert 0.5 < speed["ratio"] < 0.97
    assert 0.03 < speed["engine"]["ms"] < speed["rest_engine"]["ms"]
    assert bundle.manifest.inputs[0].max[0] == 4


@pytest.mark.parametrize("search", [False, True])
def test_an_engine_that_8_bits_would_not_make_faster_is_in_float16(here, search):
    pytest.importorskip("tensorrt_rtx")
    lines = []
    given = {"target": "tensorrt-rtx", "search": search, "out": None, "check": False}
    bundle = quantize(**given, calib_images=inputs(here / "in", 2), progress=Progress(note=lines.append))
    why = bundle.manifest.conversion["declined"]
    assert f"warning: {why}; the bundle is in float16" in lines
    assert (bundle.precision, bundle.path.name) == ("fp16", "net-tensorrt-rtx-fp16")
    assert f"in float16, as {why}" in summary(bundle, 1)
    assert not bundle.manifest.engine.eight_bits
    kinds = {t.data_type for t in onnx.load(bundle.path / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.TensorProto.FLOAT not in kinds


def test_for_an_engine_ranges_and_errors_are_measured_on_one_graph_with_native_operators():
    made = []
    source = SimpleNamespace(graph=lambda form: made.append(form) or network())
    costs = SimpleNamespace(trial=None, rules=None, note=None, progress=None)
    calibrate = Calibrator(["an input"], TARGETS["tensorrt-rtx"].eight_bits["int8"])
    given = Quantization(calibrate.rules, calibrate, None, Search(costs))
    found = {
        target: measured_natively(given, source, SimpleNamespace(target=TARGETS[target]), ["clean-up"])
        for target in ("tensorrt-rtx", "onnxruntime")
    }
    graph = found["tensorrt-rtx"].calibrate.keywords["faster"]()
    assert found["tensorrt-rtx"].search.keywords["faster"]() is graph
    assert made == ["native"]
    assert found["onnxruntime"].search is given.search  # which judges what ships


def test_the_drop_is_what_does_not_agree_and_the_error_a_share_of_the_tolerance():
    maps = {"rms_relative_error": 0.05, "tolerance": {"rms_relative_error": 0.15}}
    found = {"agreement": 0.9, "mean_box_iou": 0.96, "mean_score_difference": 0.03}
    limits = {"agreement": 0.8, "mean_box_iou": 0.95, "mean_score_difference": 0.06}
    detections = {**found, "tolerance": limits}
    assert trial.used(maps) == pytest.approx(1 / 3)
    assert trial.used(detections) == pytest.approx(0.8)  # of the IoU: 0.04 of 0.05
    assert trial.lost({"maps": maps, "detections": detections}) == pytest.approx(0.1)
    assert trial.lost({"y": maps}) == 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "8 bits need ranges from real inputs, which 'net' has none of here; give --calib-images"),
        ({"calib_images": "empty"}, "no image in the folder 'empty'"),
        ({"calib_images": "nan"}, "tensor 'b' has values that are not finite"),
        ({"calib_images": "one"}, "there is one of the inputs, from which nothing is learnt of others; give"),
        ({"calib_images": "alike"}, "all 3 inputs are the same, from which nothing is learnt of others"),
        ({"max_drop": 2.0}, "--max-drop is for the search; leave out --no-search"),
        ({"search": True, "annotations": "x.json"}, "--annotations say what 8 bits lose; give --max-drop"),
        ({"search": True, "max_drop": 1, "annotations": "x.json"}, "cannot read 'x.json'"),
        ({"search": True, "max_drop": 1, "annotations": "net.onnx"}, "'net.onnx' is not a COCO file"),
        ({"search": True, "max_drop": 1, "annotations": "empty"}, "'empty' annotates none of the 8 images"),
        ({"max_drop": -1.0}, "--max-drop -1 is not from 0 to 100 points"),
        (
            {"precision": "fp32", "search": True, "strict": True},
            "--strict is for --int8 and --fp8, and the precision is fp32",
        ),
        ({"calib_method": "best"}, "'best' is not a calibration method; choose auto, minmax"),
        (
            {"precision": "fp16", "search": True, "calib_method": "mse"},
            "--calib-method is for --int8 and --fp8, and the precision is fp16",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(here, options, message):
    (here / "empty").mkdir()
    inputs(here / "nan", 2, lambda array: array.fill(np.nan))
    (one,) = inputs(here / "one", 1).iterdir()
    (here / "alike").mkdir()
    for i in range(3):
        (here / "alike" / f"{i}.npz").write_bytes(one.read_bytes())
    with pytest.raises(InputError, match=message):
        quantize(**{"check": False, **options})
    assert not (here / "b").exists()


def test_what_is_in_8_bits_already_is_refused_before_the_work(here):
    bundle = quantize(calib_images=inputs(here / "in", 2), check=False)
    stages = []
    with pytest.raises(InputError, match="the graph is quantized already"):
        quantize(
            bundle.path / "model.onnx",
            calib_images=here / "in",
            progress=Progress(start=stages.append),
            out="c",
        )
    assert "passes" not in stages


def test_images_are_known_by_their_files_without_being_decoded(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, level in zip(paths, (0, 0, 9), strict=True):
        Image.new("RGB", (8, 8), (level,) * 3).save(path)
    one, size = BatchRange(min=1, opt=1, max=1), SizeRange(min=(8, 8), opt=(8, 8), max=(8, 8))
    spec = InputSpec(name="images", batch=one, size=size, divisor=8)
    rules = Preprocess(resize=Fit(size=(8, 8)), mean=(0.0,) * 3, std=(1.0,) * 3)
    monkeypatch.setattr(samples, "read_image", None)
    one, same, other = samples.ImageSamples(paths, spec, rules).digests()
    assert one == same != other
    brighter = msgspec.structs.replace(rules, mean=(1.0,) * 3)
    settings = {samples.ImageSamples(paths, spec, given).settings() for given in (rules, brighter)}
    assert len(settings) == 2
