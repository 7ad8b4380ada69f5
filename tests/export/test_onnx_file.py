"""ONNX files as sources: what is read, what is refused in one line, and what the bundle answers."""

import os

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from meta_deploy import Predictor
from meta_deploy.errors import InputError, VerificationError
from meta_deploy.export import export
from meta_deploy.export.onnx_reader import read_onnx
from meta_deploy.export.sources.source import CLASS_NAMES
from tests.bundles_by_hand import CLASSES, detector, segmenter
from tests.small_graphs import model, value

node = helper.make_node


def weights(*shape, seed=0, name="w", kind=np.float32):
    numbers = np.random.default_rng(seed).normal(0, 0.3, shape).astype(kind)
    return numpy_helper.from_array(numbers, name)


def network(batch="batch", size=8):
    """A convolution, a norm written out, and a product: (batch, 3, size, size) to (batch, 5)."""
    nodes = [
        node("Conv", ["image", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("GlobalAveragePool", ["r"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("MatMul", ["f", "m"], ["scores"]),
    ]
    constants = [weights(4, 3, 3, 3), weights(4, 5, name="m")]
    return model(nodes, [value("image", [batch, 3, size, size])], ["scores"], constants)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(proto, name="net.onnx"):
    onnx.save(proto, name)
    return name


def answer(proto, feed):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))


def random(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_raw_bundle_answers_as_the_file(here):
    proto = network()
    bundle = export(saved(proto), out="b")
    assert bundle.task == "raw"
    assert bundle.manifest.verification["passed"]
    with Predictor(bundle) as predictor:
        for batch in (1, 3):
            feed = {"image": random(batch, 3, 8, 8)}
            expected = answer(proto, feed)["scores"]
            np.testing.assert_allclose(predictor.run(feed)["scores"], expected, rtol=1e-5, atol=1e-6)


def test_nodes_are_named_by_the_modules_that_the_files_metadata_tells(here):
    proto = network()
    for each, module in zip(
        proto.graph.node, ("stem", "stem", "head.pool", "head.pool", "head.fc"), strict=True
    ):
        each.name = each.op_type
        scopes = f"['', '{module.split('.')[0]}', '{module}', 'an operator']"
        each.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    bundle = export(saved(proto), out="b", check=False)
    names = [each.name for each in onnx.load(bundle.path / "model.onnx").graph.node]
    assert names[0] == "stem/Conv"
    assert names[-1] == "head.fc/MatMul"


def test_open_sizes_are_compared_at_two(here):
    found = export(saved(network(size="side")), out="b").manifest
    assert found.verification["images"] == 2
    assert [list(given.shape) for given in found.inputs] == [["batch", 3, "side", "side"]]


def test_options_fix_open_sizes(here):
    fixed = export(saved(network(size="side")), input_size=(32, 32), batch=2, out="b").manifest
    assert list(fixed.inputs[0].shape) == [2, 3, 32, 32]
    shaped = export("net.onnx", shapes={"image": (1, 3, 16, 16)}, out="c").manifest
    assert list(shaped.inputs[0].shape) == [1, 3, 16, 16]
    ranged = export("net.onnx", dynamic_batch=(1, 2, 4), shapes={"image": (0, 3, 9, 9)}, out="d")
    assert ranged.manifest.inputs[0].max == (4, 3, 9, 9)
    with pytest.raises(InputError, match="both fixed and a range"):
        export("net.onnx", dynamic_batch=(1, 2, 4), shapes={"image": (1, 3, 9, 9)}, out="e")
    with pytest.raises(InputError, match="both as 2 and as 4"):
        export("net.onnx", batch=4, shapes={"image": (2, 3, 9, 9)}, out="e")


def test_a_fixed_size_that_only_the_graph_shows_is_compared(here):
    """A Reshape to a written-down batch: the file claims any, and runs one."""
    nodes = [node("Reshape", ["x", "to"], ["y"])]
    to = numpy_helper.from_array(np.array([1, 6]), "to")
    proto = model(nodes, [value("x", ["batch", 2, 3])], [value("y", [1, 6])], [to])
    assert export(saved(proto), out="b").manifest.verification["images"] == 1


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"shapes": {"nope": (1,)}}, "no input 'nope'; it takes image"),
        ({"shapes": {"image": (1, 4, 8, 8)}}, r"takes image as \[batch, 3, 8, 8\], and --shape"),
        ({"input_size": (64, 64)}, "only; leave out --input-size"),
        ({"dynamic_size": True}, "needs --input-size"),
        ({"model": "meta-t-upernet"}, "--model is for a checkpoint"),
        ({"allow_partial": True}, "--allow-partial is for a checkpoint"),
        ({"backbone_ckpt": "vit.pth"}, "--backbone-ckpt is for a checkpoint"),
        ({"precision": "fp4"}, "fp4"),
        ({"passes": "tidy"}, "'tidy' is not a graph pass"),
        ({"batch": 0, "dynamic_batch": (3, 2, 1)}, "does not rise"),
    ],
)
def test_options_that_do_not_fit_are_refused(here, options, pattern):
    with pytest.raises(InputError, match=pattern):
        export(saved(network()), out="b", **options)
    assert not os.path.exists("b")


def test_a_fixed_batch_stays(here):
    assert next(iter(export(saved(network(batch=2)), out="b").manifest.inputs[0].shape)) == 2
    with pytest.raises(InputError, match="batch fixed at 2; leave out --batch 3"):
        export("net.onnx", batch=3, out="c")


# --- images -------------------------------------------------------------------------------------------------


def test_given_preprocessing_makes_it_take_images(here, photo):
    """numpy does what --scale, --mean, --std and --bgr say, in float64."""
    proto = network()
    bundle = export(saved(proto), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), scale=1 / 255, bgr=True, out="b")
    assert bundle.manifest.verification["samples"] == "images"
    pixels = photo[:8, :8]
    normal = (pixels[..., ::-1] / 255.0 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    expected = answer(proto, {"image": normal.transpose(2, 0, 1)[None].astype(np.float32)})
    with Predictor(bundle) as predictor:
        result = predictor(np.ascontiguousarray(pixels))
    np.testing.assert_allclose(result.outputs["scores"], expected["scores"], rtol=1e-4, atol=1e-5)


def test_what_cannot_take_images_says_so(here):
    proto = model([node("Relu", ["x"], ["y"])], [value("x", [1, 8])])
    with pytest.raises(InputError, match=r"cannot take images.*x float32 \[1, 8\]"):
        export(saved(proto), mean=(0, 0, 0), out="b")
    with pytest.raises(InputError, match="--input-size"):
        export(saved(network(size="side"), "any.onnx"), scale=1.0, out="b")


@pytest.mark.parametrize(
    ("graph", "task"), [(detector, "instance-segmentation"), (segmenter, "semantic-segmentation")]
)
def test_a_model_with_our_outputs_keeps_its_task(here, graph, task, photo):
    size = (64, 64)
    proto = onnx.load_from_string(graph(size))
    names = CLASSES if task == "instance-segmentation" else None
    bundle = export(saved(proto), class_names=names, out="b")
    assert bundle.task == task
    with Predictor(bundle) as predictor:
        result = predictor(photo)
    assert result.size == photo.shape[:2]


def test_class_names_travel_in_the_file(here, bundles):
    proto = onnx.load_from_string(detector((64, 64)))
    onnx.helper.set_model_props(proto, {CLASS_NAMES: '["a", "b"]'})
    assert export(saved(proto), out="b").classes == ("a", "b")
    assert export("b/model.onnx", out="c").classes == ("a", "b")


# --- types --------------------------------------------------------------------------------------------------


def test_whole_numbers_index_a_table_within_it(here):
    table = numpy_helper.from_array(np.arange(14, dtype=np.float32).reshape(7, 2), "table")
    nodes = [node("Gather", ["table", "ids"], ["g"]), node("Where", ["mask", "g", "zero"], ["y"])]
    inputs = [value("ids", ["n"], TensorProto.INT64), value("mask", ["n", 1], TensorProto.BOOL)]
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    bundle = export(saved(model(nodes, inputs, initializers=[table, zero])), out="b")
    with Predictor(bundle) as predictor:
        found = predictor.run({"ids": np.array([6, 0]), "mask": np.array([[True], [False]])})
    np.testing.assert_array_equal(found["y"], [[12, 13], [0, 0]])


def test_given_arrays_are_what_is_compared_on(here):
    os.mkdir("inputs")
    np.savez("inputs/one.npz", image=random(2, 3, 8, 8))
    bundle = export(saved(network()), calib_images="inputs", out="b")
    assert bundle.manifest.verification["images"] == 1
    np.savez("inputs/one.npz", image=random(2, 3, 9, 8))
    with pytest.raises(InputError, match=r"image as float32 \[2, 3, 9, 8\], and 'net.onnx' takes"):
        export("net.onnx", calib_images="inputs", out="c")
    np.savez("inputs/one.npz", picture=random(2, 3, 8, 8))
    with pytest.raises(InputError, match=r"has no array 'image'.*it has picture"):
        export("net.onnx", calib_images="inputs", out="c")
    (here / "inputs" / "one.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(InputError, match=r"cannot read .*one\.npz"):
        export("net.onnx", calib_images="inputs", out="c")


def test_images_without_preprocessing_are_refused(here, bundles, coco_tiny):
    with pytest.raises(InputError, match="give --mean, --std and --scale"):
        export(saved(network()), calib_images=coco_tiny / "val", out="b")


def test_an_engine_needs_a_largest_shape(here):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(InputError, match=r"input 'image' of 'net' has none; give --batch"):
        export(saved(network()), target="tensorrt-rtx", out="b")


def test_float16_outputs_stay_float16(here):
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    half = TensorProto.FLOAT16
    proto = model(
        nodes, [value("x", [2, 4], half)], [value("y", [2, 3], half)], [weights(4, 3, kind=np.float16)]
    )
    for precision in ("fp32", "fp16"):
        bundle = export(saved(proto), precision=precision, out=precision)
        assert [output.dtype for output in bundle.manifest.outputs] == ["float16"]
        feed = {"x": random(2, 4).astype(np.float16)}
        with Predictor(bundle) as predictor:
            np.testing.assert_array_equal(predictor.run(feed)["y"], answer(proto, feed)["y"])


def test_a_mask_of_minus_infinity_is_no_trouble_in_float16(here):
    mask = numpy_helper.from_array(np.array([0, -np.inf, 0], np.float32), "mask")
    nodes = [node("Add", ["x", "mask"], ["m"]), node("Softmax", ["m"], ["y"], axis=-1)]
    proto = model(nodes, [value("x", [2, 3])], [value("y", [2, 3])], [mask])
    assert export(saved(proto), precision="fp16", out="b").manifest.verification["passed"]


def test_sizes_that_the_file_gets_wrong_are_open_in_the_manifest(here):
    proto = model([node("Relu", ["x"], ["y"])], [value("x", ["b", 4])], [value("y", ["b", 4])], infer=False)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    for size in (1, 4):
        proto.graph.output[0].type.tensor_type.shape.dim.add().dim_value = size
    bundle = export(saved(proto), out="b")
    with Predictor(bundle) as predictor:
        assert predictor.run({"x": random(3, 4)})["y"].shape == (3, 4)


def test_float16_inside_and_float32_outside(here):
    bundle = export(saved(network()), precision="fp16", out="b")
    assert bundle.manifest.conversion["nodes"] > 0
    shipped = onnx.load("b/model.onnx")
    kinds = {tensor.type.tensor_type.elem_type for tensor in (*shipped.graph.input, *shipped.graph.output)}
    assert kinds == {TensorProto.FLOAT}
    assert any(t.data_type == TensorProto.FLOAT16 for t in shipped.graph.initializer)


# --- what is refused ----------------------------------------------------------------------------------------


def test_what_is_no_onnx_file(here):
    for content, pattern in (
        (b"", "not an ONNX file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an ONNX file"),
        (network().SerializeToString()[:-20], "not an ONNX file"),
    ):
        (here / "x.onnx").write_bytes(content)
        with pytest.raises(InputError, match=pattern):
            export("x.onnx", out="b")
    with pytest.raises(InputError, match=r"no file 'y\.onnx'"):
        export("y.onnx", out="b")
    os.mkdir("z.onnx")
    with pytest.raises(InputError, match="is a folder"):
        export("z.onnx", out="b")


def test_an_operator_that_onnx_runtime_lacks_is_named(here):
    nodes = [node("Whirl", ["x"], ["y"], domain="com.acme")]
    graph = helper.make_graph(nodes, "g", [value("x", [1])], [value("y", [1])])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.acme", 1)]
    with pytest.raises(InputError, match=r"cannot load 'net\.onnx'.*com\.acme.*Whirl.*--no-verify"):
        export(saved(helper.make_model(graph, opset_imports=opsets, ir_version=10)), out="b")


@pytest.mark.parametrize("version", [0, 999])
def test_an_unknown_opset(here, version):
    proto = network()
    proto.opset_import[0].version = version
    with pytest.raises(InputError, match=f"opset {version}"):
        export(saved(proto), out="b")


def test_a_file_over_two_gigabytes(here):
    with open("big.onnx", "wb") as stream:
        stream.truncate(2**31)
    with pytest.raises(InputError, match=r"over 2 GB.*save_as_external_data"):
        export("big.onnx", out="b")


def test_random_operators_cannot_be_compared(here):
    nodes = [node("RandomNormalLike", ["x"], ["r"]), node("Add", ["x", "r"], ["y"])]
    proto = model(nodes, [value("x", [2])], [value("y", [2])])
    with pytest.raises(InputError, match=r"RandomNormalLike.*--no-verify"):
        export(saved(proto), out="b")
    export("net.onnx", check=False, out="b")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"scale": 0.0}, "--scale 0 is not from"),
        ({"std": (1.0, float("nan"), 1.0)}, "--std nan"),
        ({"class_names": ["a"]}, "no detector or segmenter; leave out --class-names"),
        ({"fp16": True}, "export has no option 'fp16'"),
        ({"shapes": {"image": (100000, 3, 8, 8), "x": (-1,)}}, "--shape of 'x'"),
        ({"batch": 10**8}, "over 2.*31 numbers"),
    ],
)
def test_options_that_make_no_sense_are_refused(here, options, pattern):
    with pytest.raises(InputError, match=pattern):
        export(saved(network()), out="b", **options)


@pytest.mark.parametrize(("key", "text"), [("offset", "zz"), ("offset", "-4"), ("length", "999999")])
def test_external_data_with_odd_numbers(here, key, text):
    (here / "in").mkdir()
    path = external(here / "in")
    proto = onnx.load(path, load_external_data=False)
    entries = proto.graph.initializer[0].external_data
    entry = next((e for e in entries if e.key == key), None) or entries.add(key=key)
    entry.value = text
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"net\.onnx"):
        read_onnx(path)


def test_a_sequence_is_no_input(here):
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    inputs = [helper.make_value_info("x", kind)]
    nodes = [node("ConcatFromSequence", ["x"], ["y"], axis=0)]
    with pytest.raises(InputError, match="'x', which is not a tensor"):
        export(saved(model(nodes, inputs)), out="b")


# --- external data ------------------------------------------------------------------------------------------


def external(folder, location="weights.bin"):
    """The network with its weights in a file of their own."""
    proto = network()
    onnx.save(
        proto, folder / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    if location != "weights.bin":
        proto = onnx.load(folder / "net.onnx", load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        (folder / "net.onnx").write_bytes(proto.SerializeToString())
    return folder / "net.onnx"


def test_external_data_beside_the_file_is_read(here):
    (here / "in").mkdir()
    path = external(here / "in")
    read = read_onnx(path)
    for a, b in zip(read.graph.initializer, network().graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))
    export(path, out="b")
    assert set(os.listdir("b")) == {"model.onnx", "manifest.json"}


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "", "link.bin", "sub/../../x"])
def test_external_data_elsewhere_is_not(here, location):
    (here / "in").mkdir()
    path = external(here / "in", location)
    (here / "weights.bin").write_bytes(bytes(4096))
    os.symlink(here / "weights.bin", here / "in" / "link.bin")
    with pytest.raises(InputError, match="outside of its own folder"):
        read_onnx(path)


@pytest.mark.parametrize(
    "place", ["function", "default of a function", "training", "list", "sparse attribute"]
)
def test_external_data_elsewhere_is_found_wherever_it_is(here, place):
    tensor = TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../weights.bin")
    proto = network()
    node = helper.make_node("Constant", [], ["x"], value=tensor)
    if place == "function":
        proto.functions.add(name="f", domain="own").node.append(node)
    elif place == "default of a function":
        proto.functions.add(name="f", domain="own").attribute_proto.append(node.attribute[0])
    elif place == "training":
        proto.training_info.add().initialization.node.append(node)
    elif place == "list":
        proto.graph.node[0].attribute.append(helper.make_attribute("more", [tensor]))
    else:
        proto.graph.node[0].attribute.add(name="more").sparse_tensor.values.CopyFrom(tensor)
    (here / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="outside of its own folder"):
        read_onnx(here / "net.onnx")


def test_external_data_that_is_missing_or_short(here):
    (here / "in").mkdir()
    path = external(here / "in")
    (here / "in" / "weights.bin").write_bytes(bytes(8))
    with pytest.raises(InputError, match=r"expects more in 'weights.bin'"):
        read_onnx(path)
    (here / "in" / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"keeps weights in 'weights.bin', which is not there"):
        read_onnx(path)


# --- verification -------------------------------------------------------------------------------------------


def test_a_graph_that_answers_otherwise_is_not_written(here, monkeypatch):
    from meta_deploy.export import pipeline

    def broken(proto, *_):
        wrong = onnx.ModelProto.FromString(proto.SerializeToString())
        matrix = next(t for t in wrong.graph.initializer if t.name == "m")
        matrix.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(matrix), "m"))
        return wrong, []

    monkeypatch.setattr(pipeline, "run_passes", broken)
    with pytest.raises(VerificationError, match="does not match the original on 2 inputs: scores are off"):
        export(saved(network()), out="b")
    assert not os.path.exists("b")
