"""The Python model, run as Triton runs it, gives what meta-infer gives; an image that fails, fails alone."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.errors import BackendError, InputError
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.triton import model as triton_model
from meta_deploy.triton.model import Network, TritonPythonModel
from meta_deploy.triton.repository import write_models
from tests.triton.stand_in import Server


@pytest.fixture
def server(made, tmp_path, monkeypatch):
    """A server whose repository has all bundles."""
    for folder in made.iterdir():
        write_models(Bundle.open(folder), tmp_path / "models")
    server = Server(tmp_path / "models")
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server.module())
    return server


def loaded(server, name, **parameters):
    model = TritonPythonModel()
    model.initialize(server.arguments(name, **parameters))
    return model


def encoded(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def answer(server, model, name, image, wanted=None):
    (response,) = model.execute([server.request(name, image, wanted)])
    return response.arrays()


def test_detections_are_those_of_the_predictor(server, made, photo):
    found = answer(server, loaded(server, "detector"), "detector", encoded(photo))
    with Predictor(made / "detector") as predictor:
        expected = predictor(encoded(photo))
    assert len(expected) == 2  # or this compares nothing
    assert list(found) == ["boxes", "scores", "labels", "names", "masks"]
    np.testing.assert_array_equal(found["boxes"], expected.boxes)
    np.testing.assert_array_equal(found["scores"], expected.scores)
    np.testing.assert_array_equal(found["labels"], expected.labels)
    assert [found[name].dtype for name in ("boxes", "labels")] == [np.float32, np.int32]
    assert [name.decode() for name in found["names"]] == expected.names == ["disc", "star"]
    masks = coco.decode([json.loads(mask) for mask in found["masks"]])
    np.testing.assert_array_equal(masks.transpose(2, 0, 1), expected.masks)


def test_class_maps_and_plain_outputs_too(server, made, photo):
    found = answer(server, loaded(server, "segmenter"), "segmenter", encoded(photo))
    with Predictor(made / "segmenter") as predictor:
        expected = predictor(encoded(photo))
    assert list(found) == ["labels"]
    assert found["labels"].dtype == np.int16
    np.testing.assert_array_equal(found["labels"], expected.labels)
    found = answer(server, loaded(server, "raw-image"), "raw-image", encoded(photo))
    with Predictor(made / "raw-image") as predictor:
        expected = predictor(encoded(photo))
    np.testing.assert_array_equal(found["mean"], expected.outputs["mean"])


def test_tiles_go_to_the_network_in_batches_and_are_joined(server, made, photo):
    found = answer(server, loaded(server, "tiles"), "tiles", encoded(photo))
    with Predictor(made / "tiles") as predictor:
        expected = predictor(encoded(photo))
    np.testing.assert_array_equal(found["boxes"], expected.boxes)
    assert server.calls == [("tiles-network", (4, 3, 64, 64)), ("tiles-network", (2, 3, 64, 64))]


def test_a_batch_that_is_fixed_is_filled_up(server, photo):
    answer(server, loaded(server, "four"), "four", encoded(photo))
    assert server.calls == [("four-network", (4, 3, 64, 64))]


def test_only_what_is_asked_for_is_made(server, photo):
    found = answer(server, loaded(server, "detector"), "detector", encoded(photo), ["scores"])
    assert list(found) == ["scores"]


def test_options_of_the_predictor_are_parameters(server, photo):
    model = loaded(server, "detector", score_threshold="0.05", EXECUTION_ENV_PATH="/env.tar.gz")
    assert len(answer(server, model, "detector", encoded(photo))["scores"]) == 3
    model = loaded(server, "detector", score_threshold="1")
    found = answer(server, model, "detector", encoded(np.zeros((8, 8, 3), np.uint8)))
    assert [array.shape for array in found.values()] == [(0, 4), (0,), (0,), (0,), (0,)]


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"colour": "1"}, "unknown parameter 'colour'; choose score_threshold"),
        ({"tile": "big"}, "'big' for 'tile'"),
        ({"score_threshold": "2"}, "score_threshold must be a number from 0 to 1, not 2"),
    ],
)
def test_a_parameter_that_is_none_keeps_the_model_from_loading(server, parameters, reason):
    with pytest.raises(InputError, match=reason):
        loaded(server, "detector", **parameters)


def test_an_image_that_cannot_be_read_fails_alone(server, photo):
    model = loaded(server, "detector")
    images = [encoded(photo), b"", b"nonsense", encoded(photo)[:-200], encoded(photo)]
    first, *bad, last = model.execute([server.request("detector", image) for image in images])
    assert first.arrays()["scores"].tolist() == last.arrays()["scores"].tolist()
    for response in bad:
        assert response.error().code() == "INVALID_ARG"
        assert "given data" in response.error().message()
        assert "\n" not in response.error().message()


def test_a_fault_of_ours_is_one_requests_error(server, photo, monkeypatch):
    model = loaded(server, "detector")
    monkeypatch.setattr(Predictor, "__call__", lambda self, image: 1 // 0)
    (response,) = model.execute([server.request("detector", encoded(photo))])
    assert response.error().message().startswith("internal error: ZeroDivisionError")
    monkeypatch.undo()


def test_the_network_is_waited_for_until_it_has_answered_once(server, photo, monkeypatch):
    monkeypatch.setattr(triton_model, "_PAUSE", 0.001)
    model = loaded(server, "detector")
    server.fails = ["Model 'detector-network' is not ready."] * 3
    assert len(answer(server, model, "detector", encoded(photo))["scores"]) == 2
    server.fails = ["out of\nmemory"]
    (response,) = model.execute([server.request("detector", encoded(photo))])
    assert response.error().code() == "INTERNAL"
    assert response.error().message() == (
        "version 1 of model 'detector-network' in Triton failed: out of memory"
    )


def test_the_network_is_not_waited_for_for_ever(server, made):
    network = Network("detector-network", 1, Bundle.open(made / "detector"), patience=0)
    server.fails = ["Model 'detector-network' is not ready."]
    with pytest.raises(BackendError, match="not ready"):
        network.run({"images": np.zeros((1, 3, 64, 64), np.float32)})
