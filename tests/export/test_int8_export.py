"""--int8: calibrated on what was given, verified, told in the manifest; and refused in one line."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from meta_deploy import Predictor
from meta_deploy.errors import InputError
from meta_deploy.export import Progress, export, speed
from tests.small_graphs import model, run, value

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


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_bundle_in_8_bits_is_smaller_and_answers_nearly_as_the_file(here, target):
    pytest.importorskip(target)
    lines = []
    progress = Progress(note=lines.append)
    bundle = export(
        "net.onnx",
        precision="int8",
        target=target,
        calib_images=inputs(here / "in", 40),
        out="b",
        progress=progress,
    )
    assert not any("warning: calibrated" in line for line in lines)
    manifest = bundle.manifest
    assert manifest.precision == "int8"
    assert manifest.verification["passed"]
    assert manifest.verification["images"] == 8
    ratio = manifest.verification["speed"]["ratio"]
    assert ratio > 0
    assert f"int8 takes {ratio:.2f} of fp32's time on this machine" in lines[-1]
    done = manifest.conversion
    assert (done["products"], done["int8_products"]) == (4, 2)
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


def test_both_are_timed_in_turns_and_no_gain_is_told(monkeypatch):
    calls = []
    runs = [lambda feed: calls.append("low"), lambda feed: calls.append("full")]
    monkeypatch.setattr(speed, "ROUNDS", 4)
    assert np.shape(speed.interleaved(runs, {})) == (4, 2)
    assert calls == ["low", "full"] * 5
    slower, faster = ({"ratio": ratio, "ms": 12.0, "fp32_ms": 10.0} for ratio in (1.2, 0.5))
    assert speed.verdict(slower, "int8").startswith("warning: int8 takes 1.20 of fp32's time on this machine")
    assert speed.verdict(faster, "int8") == "int8 takes 0.50 of fp32's time on this machine (12.0 ms)"


def test_the_method_is_the_one_asked_for(here):
    bundle = export(
        "net.onnx",
        precision="int8",
        target="onnxruntime",
        calib_images=inputs(here / "in", 2),
        calib_method="mse",
        out="b",
    )
    assert bundle.manifest.conversion["calibration"]["methods"] == {"mse": 3}


def test_images_calibrate_where_the_graph_takes_them(here):
    lines = []
    bundle = export(
        "net.onnx",
        precision="int8",
        target="onnxruntime",
        scale=1 / 255,
        out="b",
        progress=Progress(note=lines.append),
    )
    assert bundle.manifest.conversion["calibration"]["noun"] == "images"
    assert "warning: calibrated on the package's own pictures; give your own by --calib-images" in lines
    assert any("8 images, fewer than 32" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "8 bits need ranges from real inputs, which 'net' has none of here; give --calib-images"),
        ({"calib_images": "empty"}, "no image in the folder 'empty'"),
        ({"calib_images": "nan"}, "tensor 'b' has values that are not finite"),
        ({"calib_method": "best"}, "'best' is not a calibration method; choose auto, minmax"),
        (
            {"precision": "fp16", "calib_method": "mse"},
            "--calib-method is for --int8, and the precision is fp16",
        ),
        (
            {"target": "tensorrt-rtx"},
            "int8 is not written for tensorrt-rtx; use --target onnxruntime or openvino",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(here, options, message):
    (here / "empty").mkdir()
    inputs(here / "nan", 2, lambda array: array.fill(np.nan))
    with pytest.raises(InputError, match=message):
        export(
            "net.onnx", **{"precision": "int8", "target": "onnxruntime", "check": False, **options}, out="b"
        )
    assert not (here / "b").exists()


def test_what_is_in_8_bits_already_is_refused_before_the_work(here):
    bundle = export(
        "net.onnx",
        precision="int8",
        target="onnxruntime",
        calib_images=inputs(here / "in", 2),
        out="b",
    )
    stages = []
    with pytest.raises(InputError, match="the graph is quantized already"):
        export(
            bundle.path / "model.onnx",
            precision="int8",
            target="onnxruntime",
            calib_images=here / "in",
            progress=Progress(start=stages.append),
            out="c",
        )
    assert "passes" not in stages
