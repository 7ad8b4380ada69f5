"""Weights outside model.onnx are the bundle's own, checked files, or they are refused, whatever runs it."""

import hashlib
import json
import os

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import TensorProto as T
from onnx import helper as h

from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.bundle.manifest import RawInput, TensorSpec
from meta_deploy.cli.infer import main
from meta_deploy.errors import BackendError, BundleError
from meta_deploy.targets import open_backend
from meta_deploy.targets.model_file import _field, read_model
from tests.bundles_by_hand import raw_manifest

WEIGHTS = np.array([5, 6, 7], np.float32)
X = np.array([1, 2, 3], np.float32)
MANIFEST = replace(
    raw_manifest(),
    inputs=(RawInput(name="x", dtype="float32", shape=(3,), min=(3,), opt=(3,), max=(3,)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=(3,)),),
)
FILE = b"head" + WEIGHTS.tobytes() + b"tail"


def tensor(location, name="w", dims=(3,), **where):
    found = T(name=name, data_type=T.FLOAT, dims=dims, data_location=T.EXTERNAL)
    for key, value in {"location": location, "offset": "4", "length": "12", **where}.items():
        if value is not None:
            found.external_data.add(key=key, value=value)
    return found


def model(nodes, tensors=(), functions=()):
    values = [h.make_tensor_value_info(name, T.FLOAT, [3]) for name in ("x", "y")]
    graph = h.make_graph(nodes, "g", values[:1], values[1:], list(tensors))
    opsets = [h.make_opsetid("", 17), h.make_opsetid("own", 1)]
    return h.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(functions))


def inner(name, location):
    nodes = [
        h.make_node("Constant", [], ["c"], value=tensor(location)),
        h.make_node("Add", ["x", "c"], [name]),
    ]
    return h.make_graph(nodes, "inner", [], [h.make_tensor_value_info(name, T.FLOAT, [3])])


ADD = h.make_node("Add", ["x", "w"], ["y"])
TRUE = h.make_node("Constant", [], ["yes"], value=h.make_tensor("", T.BOOL, [], [1]))
PLACES = {
    "initializer": lambda location: model([ADD], [tensor(location)]),
    "constant": lambda location: model([h.make_node("Constant", [], ["w"], value=tensor(location)), ADD]),
    "branch": lambda location: model(
        [
            TRUE,
            h.make_node(
                "If", ["yes"], ["y"], then_branch=inner("a", location), else_branch=inner("b", location)
            ),
        ]
    ),
    "function": lambda location: model(
        [h.make_node("AddOwn", ["x"], ["y"], domain="own")],
        functions=[
            h.make_function(
                "own",
                "AddOwn",
                ["x"],
                ["y"],
                [h.make_node("Constant", [], ["w"], value=tensor(location)), ADD],
                [h.make_opsetid("", 17)],
            )
        ],
    ),
}


@pytest.fixture
def make(tmp_path):
    def call(made, **files):
        content = {"model.onnx": made if isinstance(made, bytes) else made.SerializeToString(), **files}
        return write_bundle(tmp_path / "b", MANIFEST, content)

    return call


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("place", PLACES)
def test_listed_files_are_read_from_the_bundle_alone(make, tmp_path, monkeypatch, place, name):
    if name == "openvino" and place == "function":
        pytest.skip("OpenVINO has no functions of a domain of one's own")
    if name == "openvino":
        pytest.importorskip("openvino")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.bin").write_bytes(b"\xff" * len(FILE))  # what a library would find by itself
    monkeypatch.chdir(tmp_path / "elsewhere")
    bundle = make(PLACES[place]("w.bin"), **{"w.bin": FILE})
    with open_backend(bundle, name) as backend:
        assert backend.run({"x": X})["y"].tolist() == [6, 8, 10]
    (bundle.path / "w.bin").write_bytes(FILE[::-1])
    with pytest.raises(BundleError, match=r"w\.bin' is not the file that was exported"):
        open_backend(bundle, name)


@pytest.mark.parametrize("place", PLACES)
def test_any_other_file_is_refused_in_one_line(make, tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.bin").write_bytes(FILE)
    np.savez("x.npz", x=X)
    for location in ("w.bin", str(tmp_path / "w.bin"), "../w.bin", "b/w.bin", "./w.bin", "manifest.json", ""):
        bundle = make(PLACES[place](location))
        os.link("w.bin", bundle.path / "w.bin")  # there, and not listed
        assert main(["x.npz", "--model", str(bundle.path)]) == 2
        error = capsys.readouterr().err
        assert f"keeps weights in '{location}', which is not a file of the bundle" in error
        assert len(error.splitlines()) == 1
        (bundle.path / "w.bin").unlink()


def test_a_listed_file_may_not_be_altered_by_the_manifest(make):
    bundle = make(PLACES["initializer"]("w.bin"), **{"w.bin": FILE})
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    manifest["files"]["../w.bin"] = {"sha256": hashlib.sha256(FILE).hexdigest(), "bytes": len(FILE)}
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="not a plain file name"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    "where",
    [
        {"offset": "-1"},
        {"offset": "9"},
        {"length": "-3"},
        {"length": "99"},
        {"offset": "1" * 30},
        {"offset": "0x4"},
        {"length": "a"},
    ],
)
def test_a_part_that_is_not_in_the_file_is_refused(make, where):
    bundle = make(model([ADD], [tensor("w.bin", **where)]), **{"w.bin": FILE})
    with pytest.raises(BackendError, match="damaged"):
        read_model(bundle)


def test_external_data_by_half_is_refused(make):
    half = tensor("w.bin")
    half.ClearField("data_location")  # the parser joins what is written in two parts
    other = T(data_location=T.EXTERNAL)
    for made in (half, other):
        bundle = make(model([ADD], [made]))
        with pytest.raises(BundleError, match="which is not a file of the bundle"):
            read_model(bundle)


def test_places_that_no_library_reads_are_looked_at_too(make):
    graph = model([ADD], [tensor("w.bin")]).graph
    training = model([ADD], [h.make_tensor("w", T.FLOAT, [3], WEIGHTS)])
    training.training_info.add(algorithm=graph)
    sparse = model([ADD])
    sparse.graph.sparse_initializer.add(values=tensor("w.bin"))
    listed = model([ADD])
    listed.graph.node[0].attribute.append(h.make_attribute("more", [tensor("w.bin"), tensor("w.bin")]))
    for made in (training, sparse, listed):
        with pytest.raises(BundleError, match=r"keeps weights in 'w\.bin'"):
            read_model(make(made))


def test_a_model_without_external_data_is_given_as_it_is(make):
    made = model([ADD], [h.make_tensor("w", T.FLOAT, [3], WEIGHTS)])
    bundle = make(made)
    assert read_model(bundle) == made.SerializeToString()


def test_what_was_filled_in_is_what_onnx_fills_in(make, tmp_path):
    made = PLACES["branch"]("w.bin")
    filled = onnx.load_from_string(read_model(make(made, **{"w.bin": FILE})))
    (tmp_path / "w.bin").write_bytes(FILE)
    onnx.save(made, tmp_path / "m.onnx")
    for found, expected in zip(filled.graph.node, onnx.load(tmp_path / "m.onnx").graph.node, strict=True):
        for branch, other in zip(found.attribute, expected.attribute, strict=True):
            values = [
                onnx.numpy_helper.to_array(graph.g.node[0].attribute[0].t)
                for graph in (branch, other)
                if graph.HasField("g")
            ]
            assert all(value.tolist() == WEIGHTS.tolist() for value in values)


@pytest.mark.parametrize(
    "content", [b"", b"no model", b"\xff" * 50, b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05ab"]
)
def test_what_is_no_model_is_refused_in_one_sentence(make, content):
    bundle = make(content)
    with pytest.raises(BackendError, match="export it again"):
        open_backend(bundle, "onnxruntime")


def test_graphs_nested_without_end_are_refused(make):
    data = memoryview(b"")
    for number in [6, 5, 1] * 400 + [7]:  # a graph of a node of an attribute of a graph of ...
        data = _field(number, data)
    with pytest.raises(BackendError, match="damaged"):
        read_model(make(bytes(data)))
