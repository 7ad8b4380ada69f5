"""One call from an image to its result, whatever the bundle's sizes, from one thread or many."""

import io
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from meta_deploy import Arrays, Detections, Predictor, Segmentation
from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.errors import BackendError, BundleError, ImageError, InputError
from meta_deploy.targets import open_backend
from meta_deploy.tasks import get_task
from meta_deploy.tasks.semantic_segmentation import averaged_class_map
from meta_deploy.tasks.tiles import Tile, tiles_of
from tests.bundles_by_hand import detector, manifest, segmenter


def grey(value, size=(128, 96)):
    return np.full((*size, 3), value, np.uint8)


@pytest.mark.parametrize("name", ["detector", "detector-batch", "detector-dynamic"])
def test_boxes_masks_and_scores_come_back_in_the_images_own_pixels(bundles, photo, name):
    with Predictor(bundles / name, score_threshold=0.0) as predictor:
        result = predictor(photo)
    assert isinstance(result, Detections)
    assert result.size == (128, 96)
    assert result.names == ["disc", "star", "ring"]
    np.testing.assert_allclose(result.scores, [1.0, 0.6, 0.1], atol=1e-6)
    # The picture lies in 64x64 at half its size; the star's box reaches into the padding.
    np.testing.assert_allclose(result.boxes, [[16, 16, 80, 80], [64, 32, 96, 96], [0, 0, 32, 32]])
    left_half = np.zeros((128, 96), bool)
    left_half[16:80, 16:48] = True
    np.testing.assert_array_equal(result.masks[0], left_half)


def test_the_threshold_is_the_bundles_unless_given(bundles, photo):
    assert len(Predictor(bundles / "detector")(photo)) == 2  # without the ring, of 0.1
    for shown, count in ((0.05, 3), (0.5, 2), (0.7, 1)):
        own = Bundle.open(bundles / "detector")
        thresholds = replace(own.manifest.thresholds, shown=shown)
        own = Bundle(own.path, replace(own.manifest, thresholds=thresholds))
        assert len(Predictor(own)(photo)) == count
        assert len(Predictor(own, score_threshold=0.0)(photo)) == 3
    assert len(Predictor(bundles / "detector", score_threshold=0.5)(photo)) == 2
    assert len(Predictor(bundles / "detector", score_threshold=1.0)(grey(200))) == 0


@pytest.mark.parametrize("name", ["segmenter", "segmenter-dynamic"])
def test_a_class_map_comes_back_at_the_images_size(bundles, name):
    image = np.zeros((128, 96, 3), np.uint8)
    image[:, :48, 0] = 255
    image[:, 48:, 2] = 255
    result = Predictor(bundles / name)(image)
    assert isinstance(result, Segmentation)
    assert result.labels.shape == (128, 96)
    # Red is class 0, blue class 2; what mixes at the border is within the 8 pixels of one logit.
    assert (result.labels[:, :40] == 0).all()
    assert (result.labels[:, 56:] == 2).all()


@pytest.mark.parametrize("name", ["detector", "detector-batch", "detector-dynamic"])
def test_a_batch_gives_what_one_by_one_gives_in_order(bundles, name):
    images = [grey(value) for value in (51, 102, 153, 204, 255, 76)]
    with Predictor(bundles / name, score_threshold=0.0) as predictor:
        together = predictor.batch(images)
        alone = [predictor(image) for image in images]
    assert [round(float(result.scores[0]) * 255) for result in together] == [51, 102, 153, 204, 255, 76]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.scores, other.scores)


def test_a_batch_of_different_sizes_keeps_each_images_own_geometry(bundles):
    images = [grey(255, (128, 96)), grey(255, (64, 64)), grey(255, (20, 200))]
    with Predictor(bundles / "detector-dynamic") as predictor:
        results = predictor.batch(images)
    np.testing.assert_allclose(results[0].boxes[0], [16, 16, 80, 80])
    np.testing.assert_allclose(results[1].boxes[0], [8, 8, 40, 40])
    assert [result.size for result in results] == [(128, 96), (64, 64), (20, 200)]


def test_no_images_give_no_results(bundles):
    assert Predictor(bundles / "detector").batch([]) == []


def test_many_threads_get_their_own_answers(bundles):
    values = [50 + 5 * i for i in range(40)]
    with (
        Predictor(bundles / "detector", threads=1, score_threshold=0.0) as predictor,
        ThreadPoolExecutor(8) as pool,
    ):
        results = list(pool.map(lambda value: predictor(grey(value)), values))
    assert [round(float(result.scores[0]) * 255) for result in results] == values


def test_timings_are_milliseconds_of_each_part(bundles, photo):
    timings = Predictor(bundles / "detector")(photo).timings
    assert min(timings.pre, timings.model, timings.post) > 0


def test_a_path_is_remembered_and_drawn_from(bundles, photo, tmp_path):
    from PIL import Image

    Image.fromarray(photo).save(tmp_path / "a.png")
    result = Predictor(bundles / "detector")(tmp_path / "a.png")
    assert result.path == str(tmp_path / "a.png")
    assert result.draw().shape == (384, 288, 3)
    assert Predictor(bundles / "detector")(photo).path is None


def test_bad_input_is_refused(bundles, photo):
    with pytest.raises(ImageError):
        Predictor(bundles / "detector")("none.jpg")
    with pytest.raises(InputError, match="score_threshold"):
        Predictor(bundles / "detector", score_threshold=1.5)
    with pytest.raises(InputError, match="threads"):
        Predictor(bundles / "detector", threads=0)
    with pytest.raises(BundleError, match="no bundle"):
        Predictor(bundles / "none")


def test_a_closed_predictor_says_so(bundles, photo):
    with Predictor(bundles / "detector") as predictor:
        pass
    predictor.close()
    with pytest.raises(BackendError, match="closed"):
        predictor(photo)


def test_a_model_with_more_classes_than_names_is_refused(tmp_path, photo):
    few = manifest("instance-segmentation", (64, 64), classes=["disc", "star"])
    write_bundle(tmp_path / "d", few, {"model.onnx": detector((64, 64))})
    with pytest.raises(BundleError, match="gives 3 classes, and its manifest names 2"):
        Predictor(tmp_path / "d", score_threshold=0.0)(photo)
    few = manifest("semantic-segmentation", (64, 64), classes=["sky"])
    write_bundle(tmp_path / "s", few, {"model.onnx": segmenter((64, 64))})
    with pytest.raises(BackendError, match="'logits'"):
        Predictor(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "said"),
    [("tensorrt", "TensorRT"), ("tpu", "no back end 'tpu'"), ("cuda", "CUDA")],
)
def test_a_back_end_that_is_not_there_is_an_error_and_never_another_one(detector_bundle, name, said):
    if name != "tpu":
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime is for GPUs")
    with pytest.raises(BackendError, match=said):
        open_backend(detector_bundle, name)


def test_auto_is_the_cpu_where_there_is_no_gpu(detector_bundle):
    with open_backend(detector_bundle) as backend:
        assert backend.name in ("onnxruntime", "cuda")
        outputs = backend.run({"images": np.ones((1, 3, 64, 64), np.float32)})
    assert set(outputs) == {"num_detections", "boxes", "scores", "labels", "masks"}


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(100)])
def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path, content):
    bundle = write_bundle(
        tmp_path / "b", manifest("instance-segmentation", (64, 64)), {"model.onnx": content}
    )
    with pytest.raises((BundleError, BackendError), match=r"model\.onnx") as caught:
        open_backend(bundle)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_the_manifests_is_refused(tmp_path):
    bundle = write_bundle(
        tmp_path / "b", manifest("instance-segmentation", (64, 64)), {"model.onnx": segmenter((64, 64))}
    )
    with pytest.raises(BackendError, match="not what its manifest says"):
        open_backend(bundle)


def test_a_bundle_without_an_onnx_model_says_so(tmp_path):
    bundle = write_bundle(tmp_path / "b", manifest("detection", (64, 64)), {"model.engine": b"x"})
    with pytest.raises(BundleError, match=r"holds no model\.onnx"):
        open_backend(bundle)


def test_real_photos_go_through(bundles, coco_tiny):
    paths = sorted((coco_tiny / "val").glob("*.jpg"))[:8]
    with Predictor(Bundle.open(bundles / "detector-dynamic")) as predictor:
        for path, result in zip(paths, predictor.batch(paths), strict=True):
            assert result.path == str(path)
            assert (result.boxes[:, [0, 2]] <= result.size[1]).all()
            assert (result.boxes[:, [1, 3]] <= result.size[0]).all()


def changed(model, change):
    import onnx

    proto = onnx.load_from_string(model)
    change({value.name: value for value in (*proto.graph.input, *proto.graph.output)}, proto.graph)
    return proto.SerializeToString()


def set_dim(name, axis, size):
    return lambda values, _: setattr(values[name].type.tensor_type.shape.dim[axis], "dim_value", size)


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("instance-segmentation", detector((32, 32))),
        ("instance-segmentation", detector((64, 64), batch=2)),
        ("semantic-segmentation", segmenter((32, 64))),
        ("instance-segmentation", changed(detector((64, 64), True), set_dim("images", 1, 1))),
    ],
)
def test_a_model_of_other_dimensions_than_the_manifests_is_refused_at_open(tmp_path, task, model):
    bundle = write_bundle(tmp_path / "b", manifest(task, (64, 64)), {"model.onnx": model})
    with pytest.raises(BackendError, match=r"what its manifest says|cannot load"):
        open_backend(bundle)


def test_a_model_of_fixed_size_under_a_dynamic_manifest_is_refused(tmp_path):
    content = manifest("instance-segmentation", (64, 64), dynamic=True)
    bundle = write_bundle(tmp_path / "b", content, {"model.onnx": detector((64, 64))})
    with pytest.raises(BackendError, match=r"'images' as float32 \[1, 3, 64, 64\]"):
        open_backend(bundle)


def test_a_model_with_other_types_is_refused(tmp_path):
    def double(values, graph):
        from onnx import TensorProto, helper

        graph.node[0].output[0] = "single"
        graph.node.append(helper.make_node("Cast", ["single"], ["logits"], to=TensorProto.DOUBLE))
        values["logits"].type.tensor_type.elem_type = TensorProto.DOUBLE

    model = changed(segmenter((64, 64)), double)
    bundle = write_bundle(tmp_path / "b", manifest("semantic-segmentation", (64, 64)), {"model.onnx": model})
    with pytest.raises(BackendError, match="'logits' as float64"):
        open_backend(bundle)


def test_outputs_of_other_shapes_than_promised_are_an_error(bundles):
    class Session:
        def run(self, names, *_):
            sizes = {"num_detections": (1,), "boxes": (1, 5, 4), "labels": (1, 6), "masks": (1, 5, 28, 28)}
            return [np.zeros(sizes.get(name, (1, 5)), np.float32) for name in names]

    with open_backend(Bundle.open(bundles / "detector"), "onnxruntime") as backend:
        backend._session = Session()
        with pytest.raises(BackendError, match=r"gave labels of shape \(1, 6\)"):
            backend.run({"images": np.ones((1, 3, 64, 64), np.float32)})


def test_what_the_library_cannot_run_is_one_sentence(tmp_path):
    def one_size_alone(_, graph):
        from onnx import helper, numpy_helper

        graph.node[0].output[0] = "pooled"
        graph.node.append(helper.make_node("Reshape", ["pooled", "shape"], ["logits"]))
        graph.initializer.append(numpy_helper.from_array(np.array([1, 3, 16, 16]), "shape"))

    model = changed(segmenter((64, 64), dynamic=True), one_size_alone)
    content = manifest("semantic-segmentation", (64, 64), dynamic=True)
    bundle = write_bundle(tmp_path / "b", content, {"model.onnx": model})
    with (
        open_backend(bundle, "onnxruntime") as backend,
        pytest.raises(BackendError, match="cannot run model") as caught,
    ):
        backend.run({"images": np.ones((1, 3, 32, 32), np.float32)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"image": np.ones((1, 3, 64, 64), np.float32)}, r"takes \['images'\], not \['image'\]"),
        ({}, r"takes \['images'\], not \[\]"),
        ({"images": np.ones((1, 3, 64, 64))}, "takes 'images' as float32, not float64"),
        ({"images": np.ones((3, 64, 64), np.float32)}, r"'images' of \(1, 3, 64, 64\), not \(3, 64, 64\)"),
        ({"images": np.ones((2, 3, 64, 64), np.float32)}, r"'images' of \(1, 3, 64, 64\), not \(2, 3, 64, "),
    ],
)
def test_inputs_that_are_not_the_manifests_are_one_sentence(detector_bundle, inputs, said):
    with open_backend(detector_bundle) as backend, pytest.raises(BackendError, match=said) as caught:
        backend.run(inputs)
    assert "\n" not in str(caught.value)


def test_values_that_are_not_finite_are_an_error(bundles, photo, tmp_path):
    def poison(_, graph):
        import onnx

        (rest,) = (value for value in graph.initializer if value.name == "rest")
        rest.CopyFrom(onnx.numpy_helper.from_array(np.array([[np.nan, 0.1, 0, 0]], np.float32), "rest"))

    content = manifest("instance-segmentation", (64, 64))
    write_bundle(tmp_path / "b", content, {"model.onnx": changed(detector((64, 64)), poison)})
    with Predictor(tmp_path / "b") as predictor, pytest.raises(BackendError, match="not finite"):
        predictor(photo)
    with Predictor(bundles / "segmenter") as predictor:
        logits = np.zeros((1, 3, 16, 16), np.float32)
        logits[0, 1, 2, 3] = np.nan
        predictor._backend.run = lambda _: {"logits": logits}
        with pytest.raises(BackendError, match="not finite"):
            predictor(photo)


def test_only_no_bundle_at_all_is_the_demo():
    with pytest.raises(BundleError, match="path is empty"):
        Predictor("")
    with pytest.raises(InputError, match="threads"):
        Predictor(threads=1025)


# --- any graph ---


def test_a_raw_bundle_runs_arrays_by_name(bundles):
    x, k = np.random.default_rng(0).random((3, 3), np.float32), np.array([4, 6])
    with Predictor(bundles / "raw") as predictor:
        outputs = predictor.run({"k": k, "x": x})
    assert list(outputs) == ["a/y", "more"]
    np.testing.assert_array_equal(outputs["a/y"], 2 * x)
    np.testing.assert_array_equal(outputs["more"], k > 5)


def test_every_bundle_runs_arrays(bundles, photo):
    with Predictor(bundles / "detector") as predictor:
        outputs = predictor.run({"images": np.ones((1, 3, 64, 64), np.float32)})
    assert list(outputs) == list(predictor.bundle.output_names)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": None}, "'k'"),
        ({"z": np.zeros(1)}, "'z'"),
        ({"x": np.zeros((2, 3))}, "float32.*float64"),
        ({"k": np.zeros(2, np.int32)}, "int64.*int32"),
        ({"x": np.zeros((5, 3), np.float32)}, r"\(4, 3\).*\(5, 3\)"),
        ({"x": np.zeros((2, 4), np.float32)}, r"\(2, 4\)"),
        ({"x": np.zeros(3, np.float32)}, r"\(3,\)"),
        ({"x": np.zeros((0, 3), np.float32)}, r"\(0, 3\)"),
        ({"x": "text"}, "<U4|str"),
    ],
)
def test_arrays_that_the_graph_does_not_take_are_one_line(bundles, changes, said):
    given = {"x": np.zeros((2, 3), np.float32), "k": np.zeros(2, np.int64)} | changes
    with Predictor(bundles / "raw") as predictor, pytest.raises(InputError, match=said) as caught:
        predictor.run({name: array for name, array in given.items() if array is not None})
    assert "\n" not in str(caught.value)


def test_a_raw_bundle_with_preprocessing_takes_images(bundles, photo):
    with Predictor(bundles / "raw-image") as predictor:
        first, second = predictor.batch([photo, grey(51)])
    assert isinstance(first, Arrays)
    resized = cv2.resize(photo, (64, 64), interpolation=cv2.INTER_LINEAR).astype(np.float64)
    expected = (resized[:, :, ::-1].mean((0, 1)) - [0, 10, 20]) / 255
    np.testing.assert_allclose(first.outputs["mean"], expected[None], atol=1e-5)
    np.testing.assert_allclose(second.outputs["mean"], [[51 / 255, 41 / 255, 31 / 255]], atol=1e-6)


def test_without_preprocessing_an_image_is_refused(bundles, photo):
    with Predictor(bundles / "raw") as predictor, pytest.raises(InputError, match="give it arrays by name"):
        predictor(photo)


def test_bundles_and_predictors_print_as_one_line(bundles):
    with Predictor(bundles / "raw", backend="onnxruntime") as predictor:
        shown = f"Bundle '{bundles / 'raw'}': doubler, raw for onnxruntime in fp32, 0.0 MB"
        assert repr(predictor.bundle) == str(predictor.bundle) == shown
        assert repr(predictor) == f"Predictor of {predictor.bundle!r}, runs on {predictor.runs_on}"


def test_images_come_in_every_kind_of_buffer(detector_bundle, photo):
    stream = io.BytesIO()
    Image.fromarray(photo).save(stream, "PNG")
    data = stream.getvalue()
    with Predictor(detector_bundle) as predictor:
        whole = predictor(photo)
        for given in (data, bytearray(data), memoryview(data), io.BytesIO(data)):
            assert np.array_equal(predictor(given).boxes, whole.boxes)


@pytest.mark.parametrize(
    "given",
    [None, 3, 1.5, [1, 2], object(), io.StringIO("x"), Image.new("RGB", (0, 0)), Image.new("L", (0, 5))],
)
def test_what_is_no_image_is_one_sentence(detector_bundle, given):
    with Predictor(detector_bundle) as predictor, pytest.raises(ImageError) as caught:
        predictor(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 1.5},
        {"threads": "2"},
        {"threads": True},
        {"score_threshold": "0.5"},
        {"score_threshold": True},
    ],
)
def test_arguments_of_the_wrong_type_are_refused(detector_bundle, wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=name):
        Predictor(detector_bundle, **wrong)
    assert (
        Predictor(detector_bundle, threads=np.int64(1), score_threshold=np.float32(0.5)).score_threshold
        == 0.5
    )


# --- tiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["detector", "detector-batch", "segmenter", "segmenter-dynamic"])
def test_an_image_in_tiles_is_the_joined_results_of_its_parts(bundles, photo, name):
    with Predictor(bundles / name, tile=64) as tiled, Predictor(bundles / name) as whole:
        result = tiled(photo)
        tiles = tiles_of(photo.shape[:2], 64, 16)
        parts = [whole(np.ascontiguousarray(tile.of(photo))) for tile in tiles]
        joined = get_task(whole.bundle.task).join(photo.shape[:2], tiles, parts)
    assert len(tiles) == 6
    assert result.size == photo.shape[:2]
    assert result.timings.model > 0
    assert same(result) == same(joined)


def test_one_tile_that_holds_the_image_is_the_image(bundles, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    with Predictor(bundles / "detector", tile=200) as tiled, Predictor(bundles / "detector") as whole:
        a, b = tiled(tmp_path / "photo.png").to_dict(), whole(tmp_path / "photo.png").to_dict()
    assert a["path"] == str(tmp_path / "photo.png")
    assert a["detections"] == b["detections"]


@pytest.mark.parametrize("name", ["detector-batch", "segmenter"])
def test_a_bundle_says_the_tile_that_larger_images_are_run_in(bundles, photo, tmp_path, name):
    bundle = Bundle.open(bundles / name)
    files = {"model.onnx": bundle.read("model.onnx")}
    own = write_bundle(tmp_path / "own", replace(bundle.manifest, tile=100, files={}), files)
    images = [photo[:90], photo[:50], photo, photo[40:]]
    with Predictor(bundle) as whole, Predictor(bundle, tile=100) as told:
        expected = [whole(photo[:90]), whole(photo[:50]), told(photo), whole(photo[40:]), whole(photo)]
    with Predictor(own) as predictor, Predictor(own, tile=0) as untiled:
        assert (predictor.tile, untiled.tile) == (100, None)
        results = [*predictor.batch(images), untiled(photo)]
    assert [same(result) for result in results] == [same(result) for result in expected]


def same(result):
    """All of a result but its times."""
    return {**result.to_dict(), "timings": None}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tile": 8}, "the tile size must be a whole number from 16"),
        ({"tile": 64.5}, "tile size must be"),
        ({"tile": True}, "tile size must be"),
        ({"tile": False}, "tile size must be"),
        ({"tile": 0, "tile_overlap": 8}, "needs a tile size"),
        ({"tile": 64, "tile_overlap": 64}, "the tile overlap must be a whole number from 0 to 63"),
        ({"tile": 64, "tile_overlap": -1}, "tile overlap must be"),
        ({"tile_overlap": 8}, "needs a tile size"),
    ],
)
def test_tiles_that_cannot_be_are_refused(bundles, options, said):
    with pytest.raises(InputError, match=said):
        Predictor(bundles / "detector", **options)


# --- windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["segmenter", "segmenter-dynamic"])
def test_windows_slide_over_the_image_resized_to_cover_the_input(bundles, photo, tmp_path, name):
    """The photo is 128x96, the input 64x64: resized to 85x64, windows 42 pixels apart, the last moved up."""
    Image.fromarray(photo).save(tmp_path / "photo.png")
    small = cv2.resize(photo, (64, 85), interpolation=cv2.INTER_LINEAR)
    windows = [Tile(0, 0, 64, 64), Tile(21, 0, 85, 64)]
    with Predictor(bundles / name, slide=True) as sliding, Predictor(bundles / name) as whole:
        result = sliding(tmp_path / "photo.png")
        outputs = []
        for window in windows:
            pixels, _ = whole._preprocess([np.ascontiguousarray(window.of(small))])
            outputs.append(whole.run({whole.bundle.input.name: pixels})["logits"][0])
        expected = averaged_class_map(outputs, windows, (85, 64), (128, 96))
        np.testing.assert_array_equal(result.labels, expected)
        assert result.path == str(tmp_path / "photo.png")
        assert min(result.timings.pre, result.timings.model, result.timings.post) > 0
        square = np.ascontiguousarray(photo[:96])
        np.testing.assert_array_equal(sliding(square).labels, whole(square).labels)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("detector", {"slide": True}, "sliding windows are for class maps"),
        ("segmenter", {"slide": 0}, "windows slide by 1 to 64 pixels, not 0"),
        ("segmenter", {"slide": 65}, "windows slide by 1 to 64 pixels, not 65"),
        ("segmenter", {"slide": True, "tile": 64}, "not both"),
    ],
)
def test_windows_that_cannot_be_are_refused(bundles, name, options, said):
    with pytest.raises(InputError, match=said):
        Predictor(bundles / name, **options)


def test_windows_have_no_tile_overlap(bundles, tmp_path):
    bundle = Bundle.open(bundles / "segmenter")
    files = {name: (bundle.path / name).read_bytes() for name in bundle.manifest.files}
    own = write_bundle(tmp_path / "own", replace(bundle.manifest, tile=100, files={}), files)
    with pytest.raises(InputError, match="not both"):
        Predictor(own, slide=True, tile_overlap=8)


def test_what_is_joined_does_not_hang_on_what_is_shown(bundles, photo):
    with Predictor(bundles / "detector", tile=64, score_threshold=0.0) as everything:
        expected = everything(photo).filter(0.5).to_dict()
    with Predictor(bundles / "detector", tile=64, score_threshold=0.5) as shown:
        assert shown(photo).to_dict()["detections"] == expected["detections"]


def test_a_result_is_drawn_and_measured_at_the_depth_it_was_read_by(bundles, tmp_path):
    values = np.tile(np.arange(0, 4096, 32, dtype=np.uint16), (96, 1))
    cv2.imwrite(str(tmp_path / "a.png"), values)
    with Predictor(bundles / "detector", depth=14, score_threshold=0.0) as predictor:
        found = predictor(tmp_path / "a.png")
        pixels = predictor.read(tmp_path / "a.png").pixels
    assert found.table() == found.table(pixels)
    np.testing.assert_array_equal(found.draw(), found.draw(pixels))


def test_arrays_of_a_raw_bundle_are_not_joined(bundles):
    with pytest.raises(InputError, match="gives plain arrays"):
        Predictor(bundles / "raw-image", tile=64)
