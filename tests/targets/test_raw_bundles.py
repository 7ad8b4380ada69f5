"""Any graph runs on every back end: several arrays in, of several types and shapes, and named arrays out."""

import gc

import numpy as np
import pytest
from onnx import TensorProto, helper

from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.bundle.manifest import ModelInfo, RawInput, RawManifest, TensorRTRTXEngine, TensorSpec
from meta_deploy.errors import BackendError, InputError
from meta_deploy.targets import get_target, open_backend
from meta_deploy.targets.target import BuildOptions
from tests.bundles_by_hand import detector, manifest
from tests.small_graphs import model, value
from tests.targets.gpu_stand_in import engine_of, install

ENGINE = TensorRTRTXEngine(version="1.7.1", gpu=None, compute_capabilities=())


def rows(name, dtype, *rest):
    """An input of 1 to 4 rows, 2 being usual."""
    low, opt, high = ((count, *rest) for count in (1, 2, 4))
    return RawInput(name=name, dtype=dtype, shape=("rows", *rest), min=low, opt=opt, max=high)


INPUTS = (rows("x", "float32", 3), rows("steps", "int64"))
OUTPUTS = (
    TensorSpec(name="moved", dtype="float32", shape=("rows", 3)),
    # What a graph calls its dimensions is not always true.
    TensorSpec(name="total", dtype="int64", shape=("rows",)),
)
GRAPH = model(
    [
        helper.make_node("Cast", ["steps"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["axis"], value_ints=[1]),
        helper.make_node("Unsqueeze", ["f", "axis"], ["column"]),
        helper.make_node("Add", ["x", "column"], ["moved"]),
        helper.make_node("ReduceSum", ["steps"], ["sum"], keepdims=1),
        helper.make_node("Identity", ["sum"], ["total"]),
    ],
    [value("x", ["rows", 3]), value("steps", ["rows"], TensorProto.INT64)],
    [value("moved", ["rows", 3]), value("total", ["one"], TensorProto.INT64)],
).SerializeToString()


@pytest.fixture(params=["onnxruntime", "openvino", "tensorrt-rtx"])
def bundle(request, monkeypatch, tmp_path):
    """A raw bundle of each target, on a machine that runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    profiles = [given.profile for given in INPUTS]
    if request.param == "tensorrt-rtx":
        bindings, _ = install(monkeypatch)
        files, engine = {"model.onnx": GRAPH, "model.engine": engine_of(GRAPH, *profiles)}, ENGINE
    else:
        target = get_target(request.param)
        try:
            target.check(BuildOptions())
        except InputError as error:
            pytest.skip(str(error))
        built = target.build(GRAPH, profiles, BuildOptions())
        files, engine = built.files, built.engine
    manifest = RawManifest(
        model=ModelInfo(name="by-hand"),
        inputs=INPUTS,
        outputs=OUTPUTS,
        target=request.param,
        precision="fp32",
        engine=engine,
    )
    yield write_bundle(tmp_path / "b", manifest, files)
    if request.param == "tensorrt-rtx":
        gc.collect()
        assert bindings.held() == {}


def inputs(count):
    rng = np.random.default_rng(count)
    return {"steps": rng.integers(-9, 9, count), "x": rng.random((count, 3), np.float32)}


def test_named_arrays_go_in_and_come_out_for_every_number_of_rows(bundle):
    with open_backend(bundle) as backend:
        for count in (1, 4, 2):
            given = inputs(count)
            outputs = backend.run(given)
            assert list(outputs) == ["moved", "total"]
            assert outputs["moved"].dtype == np.float32
            assert outputs["total"].dtype == np.int64
            np.testing.assert_allclose(outputs["moved"], given["x"] + given["steps"][:, None], rtol=1e-6)
            np.testing.assert_array_equal(outputs["total"], [given["steps"].sum()])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": None}, r"takes \['steps', 'x'\], not \['steps'\]"),
        ({"y": np.zeros(1)}, r"takes \['steps', 'x'\], not \['steps', 'x', 'y'\]"),
        ({"steps": np.zeros(2, np.int32)}, "takes 'steps' as int64, not int32; convert it"),
        ({"steps": np.zeros(5, np.int64)}, r"takes 'steps' of \(1,\) to \(4,\), not \(5,\)"),
        ({"x": np.zeros((2, 4), np.float32)}, r"takes 'x' of \(1, 3\) to \(4, 3\), not \(2, 4\)"),
    ],
)
def test_inputs_that_are_not_the_manifests_are_one_sentence(bundle, change, said):
    given = {name: array for name, array in {**inputs(2), **change}.items() if array is not None}
    with open_backend(bundle) as backend:
        with pytest.raises(BackendError, match=said) as caught:
            backend.run(given)
        assert "\n" not in str(caught.value)
        assert backend.run(inputs(2))["moved"].shape == (2, 3)


def test_a_graph_that_is_not_the_manifests_is_refused(tmp_path):
    for inputs, said in (
        ((INPUTS[0],), r"takes \['steps', 'x'\] and gives \['moved', 'total'\], not what"),
        ((INPUTS[0], rows("steps", "int32")), r"'steps' as int64 \['rows'\]"),
        ((rows("x", "float32", 4), INPUTS[1]), r"'x' as float32 \['rows', 3\]"),
    ):
        manifest = RawManifest(
            model=ModelInfo(name="by-hand"),
            inputs=inputs,
            outputs=OUTPUTS,
            target="onnxruntime",
            precision="fp32",
        )
        bundle = write_bundle(tmp_path / "b", manifest, {"model.onnx": GRAPH})
        with pytest.raises(BackendError, match=said):
            open_backend(bundle)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", [b"images", b"labels"])
def test_a_name_that_is_no_text_is_one_sentence(tmp_path, backend, name):
    model = detector((32, 32)).replace(name, b"\xe1" + name[1:])
    write_bundle(tmp_path / "b", manifest("instance-segmentation", (32, 32)), {"model.onnx": model})
    with pytest.raises(BackendError) as caught:
        open_backend(Bundle.open(tmp_path / "b"), backend)
    assert "\n" not in str(caught.value)
