"""Every config.pbtxt says of its model what the model itself says, in protobuf's text format."""

import importlib.util
from pathlib import Path

import msgspec
import onnxruntime
import pytest

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import OpenVINOModel, RawInput, TensorRTEngine, TensorSpec
from meta_deploy.bundle.shipped import SHIPPED, locate
from meta_deploy.errors import InputError
from meta_deploy.targets import TARGETS
from meta_deploy.triton.config import models_of
from meta_deploy.triton.outputs import IMAGE
from tests.bundles_by_hand import ENGINE
from tests.triton.pbtxt import parse

TYPES = {"float": "TYPE_FP32", "int32": "TYPE_INT32", "int64": "TYPE_INT64", "bool": "TYPE_BOOL"}


def configs(bundle, name="net"):
    return {model.name: parse(model.config) for model in models_of(bundle, name)}


def changed(bundle, **fields):
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, **fields))


def tensors(config, side):
    found = {}
    for entry in config[side]:
        dims = entry["reshape"][0]["shape"] if "reshape" in entry else entry["dims"]
        found[entry["name"][0]] = entry["data_type"][0], dims
    return found


def of_session(values, batched):
    """What Triton's ONNX Runtime backend holds a config.pbtxt against: -1 for a size that is open."""
    found = {}
    for value in values:
        kind = TYPES[value.type.removeprefix("tensor(").removesuffix(")")]
        sizes = [size if isinstance(size, int) else -1 for size in value.shape]
        assert not batched or sizes[0] == -1
        found[value.name] = kind, sizes[1:] if batched else sizes
    return found


@pytest.mark.parametrize(
    "name", ["detector", "four", "tiles", "segmenter", "boxes", "raw", "raw-image", *SHIPPED]
)
def test_the_graphs_tensors_are_those_of_the_session(made, name):
    bundle = Bundle.open(made / name if (made / name).exists() else locate(name))
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    config = configs(bundle)["net" if name == "raw" else "net-network"]
    batched = config["max_batch_size"][0] > 0
    assert tensors(config, "input") == of_session(session.get_inputs(), batched)
    promised = [value for value in session.get_outputs() if value.name in bundle.output_names]
    assert tensors(config, "output") == of_session(promised, batched)
    assert config["backend"] == ["onnxruntime"]
    assert (bundle.path / config["default_model_filename"][0]).is_file()


def test_requests_are_batched_only_where_the_graph_takes_any_batch(made):
    batched = {name: configs(Bundle.open(made / name)) for name in ("detector", "four", "tiles", "raw-image")}
    most = {name: found["net-network"]["max_batch_size"] for name, found in batched.items()}
    assert most == {"detector": [0], "four": [0], "tiles": [4], "raw-image": [0]}
    assert [name for name, found in batched.items() if "dynamic_batching" in found["net-network"]] == [
        "tiles"
    ]
    assert not any("dynamic_batching" in found["net"] for found in batched.values())


def test_one_number_an_image_has_a_size_for_clients(made):
    outputs = configs(Bundle.open(made / "tiles"))["net-network"]["output"]
    (count,) = (output for output in outputs if output["name"] == ["num_detections"])
    assert (count["dims"], count["reshape"]) == ([1], [{"shape": []}])
    assert all("reshape" not in output for output in outputs if output is not count)


def test_the_python_model_takes_an_encoded_image_and_names_its_labels(made):
    config = configs(Bundle.open(made / "detector"))["net"]
    assert tensors(config, "input") == {IMAGE: ("TYPE_STRING", [1])}
    assert tensors(config, "output") == {
        "boxes": ("TYPE_FP32", [-1, 4]),
        "scores": ("TYPE_FP32", [-1]),
        "labels": ("TYPE_INT32", [-1]),
        "names": ("TYPE_STRING", [-1]),
        "masks": ("TYPE_STRING", [-1]),
    }
    labelled = [entry["name"] for entry in config["output"] if "label_filename" in entry]
    assert labelled == [["labels"]]
    assert config["parameters"] == [{"key": ["network"], "value": [{"string_value": ["net-network"]}]}]
    assert "masks" not in tensors(configs(Bundle.open(made / "boxes"))["net"], "output")
    assert tensors(configs(Bundle.open(made / "segmenter"))["net"], "output") == {
        "labels": ("TYPE_INT16", [-1, -1])
    }


def test_an_engine_is_for_tensorrts_backend_and_a_gpu(made):
    engine = TensorRTEngine(version="10.9", gpu="NVIDIA H100", compute_capabilities=("9.0",))
    bundle = changed(Bundle.open(made / "tiles"), target="tensorrt", engine=engine)
    config = configs(bundle)["net-network"]
    assert (config["platform"], config["backend"]) == (["tensorrt_plan"], ["tensorrt"])
    assert config["default_model_filename"] == ["model.engine"]
    assert config["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"]}]
    assert config["max_batch_size"] == [4]


def test_openvinos_backend_runs_one_request_at_a_time_on_the_cpu(made):
    engine = OpenVINOModel(version="2026.1", precision_hint="f32")
    bundle = changed(Bundle.open(made / "tiles"), target="openvino", engine=engine)
    config = configs(bundle)["net-network"]
    assert (config["backend"], config["default_model_filename"]) == (["openvino"], ["model.xml"])
    assert config["instance_group"] == [{"count": [1], "kind": ["KIND_CPU"]}]
    assert config["max_batch_size"] == [0]
    assert "dynamic_batching" not in config
    assert tensors(config, "input") == {"images": ("TYPE_FP32", [-1, 3, -1, -1])}


def test_every_target_has_a_backend_or_is_refused(made):
    bundle = changed(Bundle.open(made / "detector"), target="tensorrt-rtx", engine=ENGINE)
    with pytest.raises(InputError, match="no backend that runs TensorRT-RTX's engines; use --target onnx"):
        models_of(bundle, "net")
    assert {name for name, target in TARGETS.items() if target.triton is None} == {"tensorrt-rtx"}


def test_names_of_tensors_are_quoted(made):
    odd = 'a "b" \\ é\n#{'
    raw = changed(Bundle.open(made / "raw"), outputs=(TensorSpec(name=odd, dtype="float16", shape=(2, "n")),))
    assert tensors(configs(raw)["net"], "output") == {odd: ("TYPE_FP16", [2, -1])}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": "float32", "shape": (), "min": (), "opt": (), "max": ()}, "no dimensions"),
        ({"dtype": "float32", "shape": (0,), "min": (0,), "opt": (0,), "max": (0,)}, "a dimension of 0"),
        ({"dtype": "bfloat16", "shape": (1,), "min": (1,), "opt": (1,), "max": (1,)}, "tensors of bfloat16"),
    ],
)
def test_tensors_that_triton_does_not_have_are_refused(made, fields, reason):
    bundle = changed(Bundle.open(made / "raw"), inputs=(RawInput(name="x", **fields),))
    with pytest.raises(InputError, match=reason):
        models_of(bundle, "net")


def test_tritons_own_schema_takes_every_config(made):
    spec = importlib.util.find_spec("tritonclient")
    text_format = pytest.importorskip("google.protobuf.text_format")
    if spec is None or spec.origin is None:
        pytest.skip("tritonclient is not installed")
    path = Path(spec.origin).parent / "grpc" / "model_config_pb2.py"  # its package wants grpc
    schema_spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    schema = importlib.util.module_from_spec(schema_spec)
    schema_spec.loader.exec_module(schema)
    for folder in made.iterdir():
        for model in models_of(Bundle.open(folder), "net"):
            read = text_format.Parse(model.config, schema.ModelConfig())
            mine = parse(model.config)
            assert [read.name] == mine["name"]
            assert [output.name for output in read.output] == [o["name"][0] for o in mine["output"]]
            assert [list(output.dims) for output in read.output] == [o["dims"] for o in mine["output"]]
            assert read.HasField("dynamic_batching") == ("dynamic_batching" in mine)
