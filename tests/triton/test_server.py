"""A real tritonserver, where there is one, answers over HTTP and gRPC what meta-infer says.

Needs a server (NVIDIA's container, or nvidia-pytriton) and tritonclient. Where the server has no ONNX Runtime
backend, as that of nvidia-pytriton, one in Python of the same name stands in for it.
"""

import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.shipped import ASSETS, SHIPPED
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.triton.repository import write_models
from tests.triton.real_server import find, running

FOUND = find()
if FOUND is None:
    pytest.skip("there is no tritonserver here", allow_module_level=True)
http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")
pytestmark = pytest.mark.slow

PICTURES = sorted((ASSETS / "images").glob("*.png"))[:2]


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    """Its clients, by protocol, and the repository that it polls."""
    folder = tmp_path_factory.mktemp("server")
    for name in SHIPPED:
        write_models(Bundle.open(ASSETS / name), folder / "models")
    for path in made.iterdir():
        write_models(Bundle.open(path), folder / "models")
    polling = ("--model-control-mode=poll", "--repository-poll-secs=1")
    with running(FOUND, folder / "models", folder, *polling) as (of_http, of_grpc):
        clients = {
            "http": (http, http.InferenceServerClient(of_http)),
            "grpc": (grpc, grpc.InferenceServerClient(of_grpc)),
        }
        yield clients, folder / "models"


def infer(clients, protocol, model, data, *outputs):
    library, client = clients[protocol]
    given = library.InferInput("image", [1], "BYTES")
    given.set_data_from_numpy(np.array([data], object))
    answer = client.infer(model, [given])
    return {name: answer.as_numpy(name) for name in outputs}


def encoded(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_detections_are_those_of_the_predictor(server, protocol):
    clients, _ = server
    with Predictor("nuclei") as predictor:
        for picture in PICTURES:
            names = ("boxes", "scores", "labels", "names", "masks")
            found = infer(clients, protocol, "nuclei", picture.read_bytes(), *names)
            expected = predictor(picture)
            assert len(expected) > 20
            np.testing.assert_allclose(found["boxes"], expected.boxes, atol=1e-2)
            np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-5)
            np.testing.assert_array_equal(found["labels"], expected.labels)
            assert [name.decode() for name in found["names"]] == expected.names
            assert [json.loads(mask) for mask in found["masks"]] == [m.rle() for m in expected.segments]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_class_maps_are_those_of_the_predictor(server, protocol):
    clients, _ = server
    with Predictor("nuclei-semantic") as predictor:
        found = infer(clients, protocol, "nuclei-semantic", PICTURES[0].read_bytes(), "labels")
        np.testing.assert_array_equal(found["labels"], predictor(PICTURES[0]).labels)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tiles_and_plain_outputs_too(server, made, photo, protocol):
    clients, _ = server
    with Predictor(made / "tiles") as tiles, Predictor(made / "raw-image") as raw:
        found = infer(clients, protocol, "tiles", encoded(photo), "boxes", "scores")
        np.testing.assert_array_equal(found["boxes"], tiles(photo).boxes)
        np.testing.assert_array_equal(found["scores"], tiles(photo).scores)
        found = infer(clients, protocol, "raw-image", encoded(photo), "mean")
        np.testing.assert_array_equal(found["mean"], raw(photo).outputs["mean"])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_nothing_found_is_tensors_without_elements(server, protocol):
    clients, _ = server
    names = ("boxes", "scores", "labels", "names", "masks")
    found = infer(clients, protocol, "nuclei", encoded(np.zeros((64, 64, 3), np.uint8)), *names)
    assert [array.size for array in found.values()] == [0] * 5


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_malformed_image_is_that_requests_error(server, photo, protocol):
    from tritonclient.utils import InferenceServerException

    clients, _ = server
    whole = encoded(photo)
    for data in (b"", b"nonsense", whole[:200], b"\x89PNG\r\n\x1a\n" + bytes(100)):
        with pytest.raises(InferenceServerException, match="the given data") as raised:
            infer(clients, protocol, "detector", data)
        assert raised.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert infer(clients, protocol, "detector", whole, "scores")["scores"].shape == (2,)


def test_requests_at_the_same_time_share_a_batch(server):
    clients, _ = server
    library, client = clients["grpc"]  # whose client several threads may share
    images = np.random.default_rng(0).random((24, 1, 3, 64, 64), np.float32)

    def score(image):
        given = library.InferInput("images", image.shape, "FP32")
        given.set_data_from_numpy(image)
        wanted = [library.InferRequestedOutput(name) for name in ("scores", "num_detections")]
        answer = client.infer("tiles-network", [given], outputs=wanted)
        assert answer.as_numpy("num_detections").tolist() == [[3]]
        return answer.as_numpy("scores")[0, 0]

    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(score, images))
    np.testing.assert_array_equal(scores, images.max(axis=(1, 2, 3, 4)))
    (statistics,) = client.get_inference_statistics("tiles-network", "1").model_stats
    assert statistics.execution_count < statistics.inference_count


def test_a_version_is_replaced_without_a_failed_request(server, made, photo):
    clients, repository = server
    _, client = clients["grpc"]
    data, failed, answers, stop = encoded(photo), [], [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                answers.append(infer(clients, "grpc", "detector", data, "scores"))
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert write_models(Bundle.open(made / "detector"), repository).version == 2
        end = time.monotonic() + 30
        while not client.is_model_ready("detector", "2") and time.monotonic() < end:
            time.sleep(0.2)
        before = len(answers)
        while len(answers) < before + 20 and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        stop.set()
        thread.join()
    assert not failed
    assert len(answers) > before
    assert not client.is_model_ready("detector", "1")
