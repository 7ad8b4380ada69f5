"""The HTTP application over models in this process: answers, limits, errors; no request makes a 500."""

import asyncio
import io
import json
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="FastAPI is not installed (pip install 'meta-deploy[serve]')")
httpx = pytest.importorskip("httpx2")

from starlette.testclient import TestClient  # noqa: E402

from benchmarks.serve_requests import KINDS, Requests, send  # noqa: E402
from meta_deploy import Predictor  # noqa: E402
from meta_deploy.cli.infer import main as infer  # noqa: E402
from meta_deploy.serve.app import Served, Service, application  # noqa: E402
from meta_deploy.serve.limits import Limits  # noqa: E402
from meta_deploy.serve.messages import Answer  # noqa: E402
from meta_deploy.serve.models import cards_of  # noqa: E402
from meta_deploy.serve.worker import Worker  # noqa: E402

LIMITS = Limits(body=200_000, pixels=100_000, queue=3, seconds=60)
MODELS = ("detector", "segmenter", "raw", "raw-image", "many=detector-dynamic", "many:2=detector")


@pytest.fixture(scope="module")
def service(bundles):
    """Workers of small bundles, each the model behind a name."""
    cards = cards_of([re.sub("(^|=)(?=[^=]*$)", rf"\1{bundles}/", name) for name in MODELS])
    workers = [
        Worker(card.path, card.name, card.version, threads=1, pixels=LIMITS.pixels, shown=card.shown)
        for card in cards
    ]
    yield Service(
        [Served(card, worker, LIMITS.queue) for card, worker in zip(cards, workers, strict=True)], LIMITS
    )
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def client(service):
    with TestClient(application(service)) as client:
        yield client


def encoded(pixels, form="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def without_times(document):
    for entry in document["images"]:
        entry["timings"] = dict.fromkeys(entry["timings"])
    return document


def one_line(response):
    """An error's line."""
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert list(document) == ["error"]
    assert "\n" not in document["error"]
    return document["error"]


# --- images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["detector", "segmenter", "raw-image"])
@pytest.mark.parametrize("sent", ["body", "form"])
def test_an_image_gets_the_document_of_meta_infer(client, bundles, picture, model, sent, tmp_path, capfd):
    (tmp_path / "a.png").write_bytes(picture)
    infer([str(tmp_path / "a.png"), "--model", str(bundles / model), "--json"])
    expected = without_times(json.loads(capfd.readouterr().out))
    if sent == "form":
        found = client.post(f"/predict/{model}", files={"image": ("a.png", picture, "image/png")})
        expected["images"][0]["path"] = "a.png"
    else:
        found = client.post(f"/predict/{model}", content=picture)
        expected["images"][0]["path"] = None
    assert found.status_code == 200
    assert without_times(found.json()) == expected
    assert list(found.json()) == list(expected)


@pytest.mark.parametrize("model", ["detector", "segmenter"])
def test_an_overlay_is_what_the_result_draws(client, bundles, picture, model):
    found = client.post(f"/predict/{model}", content=picture, headers={"Accept": "image/png"})
    assert found.headers["content-type"] == "image/png"
    with Predictor(bundles / model) as predictor:
        result = predictor(picture)
        drawn = result.draw(picture)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found.content))), drawn)
    assert unquote(found.headers["meta-summary"]) == repr(result)
    assert re.fullmatch(r"pre;dur=[\d.]+, model;dur=[\d.]+, post;dur=[\d.]+", found.headers["server-timing"])


def test_parameters_are_those_of_meta_infer(client, bundles, picture):
    def scores(**parameters):
        found = client.post("/predict/detector", params=parameters, content=picture).json()
        return len(found["images"][0]["detections"]), found["score_threshold"]

    assert scores() == (2, 0.3)
    assert scores(score_threshold=0.7) == (1, 0.7)
    with Predictor(bundles / "detector", tile=48, tile_overlap=8) as predictor:
        assert scores(tile=48, tile_overlap=8)[0] == len(predictor(picture))
    slid = client.post("/predict/segmenter", params={"slide": True}, content=picture)
    with Predictor(bundles / "segmenter", slide=True) as predictor:
        assert slid.json()["images"][0]["segments"] == predictor(picture).to_dict()["segments"]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("image/avif,image/webp,*/*;q=0.8", "application/json"),
        ("image/*,*/*;q=0.8", "image/png"),
        ("application/json;q=0.5, image/png", "image/png"),
        ("image/png;q=0.4, application/json", "application/json"),
    ],
)
def test_the_form_of_the_answer_is_negotiated(client, picture, accept, kind):
    assert (
        client.post("/predict", content=picture, headers={"Accept": accept}).headers["content-type"] == kind
    )


@pytest.mark.parametrize(
    ("path", "status", "why"),
    [
        ("/predict/nothing", 404, "there are detector, segmenter"),
        ("/predict/many/versions/3", 404, "there are 1, 2"),
        ("/predict?score_threshold=2", 422, "score_threshold: Input should be less than or equal to 1"),
        ("/predict?score_threshold=nan", 422, "score_threshold"),
        ("/predict?tile=7", 422, "from 16 to"),
        ("/predict?tile_overlap=7", 422, "needs a tile size"),
        ("/predict?slide=true", 422, "sliding windows are for class maps"),
        ("/predict?depth=99", 422, "depth"),
        ("/predict/raw", 422, "use /v2/models/raw/infer"),
        ("/predict?score=1", 422, "there is no parameter 'score'; there are score_threshold, tile"),
        ("/predict/segmenter?score_threshold=0.5", 422, "is for detections"),
        ("/predict?depth=8&tile=0&depth=9", 422, "'depth' is there twice"),
        ("/elsewhere", 404, "see /docs"),
        ("/predict/", 404, "see /docs"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_one_line(client, picture, path, status, why):
    found = client.post(path, content=picture)
    assert found.status_code == status
    assert why in one_line(found)


def bomb():
    """A PNG that says it is 60000x60000, in 100 bytes."""
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"no picture", "not an image"),
        (b"%PDF-1.7", "PDF"),
        (bomb(), "limit"),
        (encoded(np.zeros((300, 400, 3), np.uint8)), "400x300 pixels, more than the limit of 100000"),
        (
            encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), "JPEG")[:900],
            "cut short",
        ),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(client, content, why):
    for parameters in ({"content": content}, {"files": {"image": content}}):
        found = client.post("/predict", **parameters)
        assert found.status_code == 422
        assert why in one_line(found)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=", b"--\r\n"),
        ("multipart/form-data; boundary=a", b"no parts"),
        ("multipart/form-data; boundary=a", b"--a\r\n\r\nno name\r\n--a--"),
        (
            "multipart/form-data; boundary=a",
            b'--a\r\nContent-Disposition: form-data; name="t"\r\n\r\ntext\r\n--a--\r\n',
        ),
        ("multipart/form-data; boundary=a", b"--a\r\nContent-Disposition: form-data; name=\xff\r\n\r\n\xff"),
        (
            "multipart/form-data; boundary=a; charset=nothing",
            b'--a\r\nContent-Disposition: form-data; name="t"\r\n\r\nt',
        ),
    ],
)
def test_a_broken_form_is_refused_in_one_line(client, kind, content):
    found = client.post("/predict", content=content, headers={"Content-Type": kind})
    assert found.status_code == 422
    one_line(found)


def test_a_body_over_the_limit_is_refused_unread_and_read(client):
    assert client.post("/predict", content=b"x" * 200_001).status_code == 413
    read = 0

    def endless():
        nonlocal read
        while read < 100:
            read += 1
            yield b"x" * 10_000

    found = client.post("/predict", content=endless())
    assert found.status_code == 413
    assert "200000 bytes" in one_line(found)


def test_head_is_get_without_the_body(client):
    for path in ("/", "/healthz", "/readyz", "/metrics", "/models", "/docs", "/v2/models/detector"):
        assert client.head(path).status_code == client.get(path).status_code == 200
    found = client.head("/predict")
    assert (found.status_code, found.headers["Allow"]) == (405, "POST")
    found = client.delete("/healthz")
    assert (found.status_code, found.headers["Allow"]) == (405, "GET, HEAD")


def test_packed_bodies_and_other_forms_of_answers_are_refused(client, picture):
    assert client.post("/predict", content=picture, headers={"Content-Encoding": "gzip"}).status_code == 415
    assert client.post("/predict", content=picture, headers={"Accept": "text/html"}).status_code == 406
    assert client.get("/predict").status_code == 405
    assert client.post("/predict", content=picture, headers={"X": "x" * 40_000}).status_code == 431
    png = client.post("/predict/raw-image", content=picture, headers={"Accept": "image/png"})
    assert png.status_code == 422
    assert "not drawn" in one_line(png)


def test_whatever_is_sent_nothing_is_a_500(bundles, listening, picture):
    """Damaged pictures, forms and tensors, wrong headers, cut bodies, over a wire."""
    (card,) = cards_of([str(bundles / "detector")])
    worker = Worker(card.path, card.name, card.version, threads=1)  # of the event loop that listens
    service = Service([Served(card, worker, LIMITS.queue)], LIMITS)
    requests = Requests(0, "detector")
    made = [(kind, requests.make(kind)) for kind in KINDS * 40]
    with listening(application(service)) as address, ThreadPoolExecutor(2) as pool:
        host, _, port = address.partition(":")
        statuses = set(pool.map(lambda request: send(host, int(port), *request), made))
        assert httpx.post(f"http://{address}/predict", content=picture).status_code == 200
    worker.close()
    assert service.open == 0
    late = {"408", "504"}  # of a machine that is busy
    assert statuses <= {"closed", "200", "400", "404", "405", "406", "413", "415", "422", "429", "431", *late}
    assert {"200", "400", "404", "405", "406", "415", "422", "431"} <= statuses


# --- load -------------------------------------------------------------------------------------------------


class Slow:
    """A model that answers when it is told to."""

    def __init__(self):
        self.go = asyncio.Event()
        self.asked = 0

    async def predict(self, query):
        self.asked += 1
        await self.go.wait()
        return Answer(200, query.image)


def slow_service(service, **limits):
    model = Slow()
    limits = Limits(**{**vars(LIMITS), **limits})
    return Service([Served(service.served[0].card, model, limits.queue)], limits), model


def calls(service, run):
    """`run(client)` with requests side by side on one event loop."""

    async def main():
        transport = httpx.ASGITransport(application(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await run(client)

    return asyncio.run(main())


def test_more_than_the_queue_holds_is_refused_and_the_rest_answered(service):
    service, model = slow_service(service)

    async def run(client):
        tasks = [asyncio.create_task(client.post("/predict", content=bytes([i]))) for i in range(8)]
        while sum(task.done() for task in tasks) < 5:
            await asyncio.sleep(0.01)
        shown = (await client.get("/metrics")).text
        model.go.set()
        return [task.result() for task in tasks if await asyncio.wait([task])], shown

    found, shown = calls(service, run)
    assert sorted(one.status_code for one in found) == [200] * 3 + [429] * 5
    assert {one.headers["retry-after"] for one in found if one.status_code == 429} == {"1"}
    assert 'meta_serve_in_progress{model="detector",version="1"} 3.0' in shown
    assert service.open == 0


def test_what_takes_too_long_is_given_up(service):
    service, _ = slow_service(service, seconds=0.1)
    service.limits  # noqa: B018
    found = calls(service, lambda client: client.post("/predict", content=b"x"))
    assert found.status_code == 504
    assert "0.1 s" in one_line(found)
    assert service.open == 0


def test_a_body_that_does_not_come_is_given_up(service):
    service, _ = slow_service(service, seconds=0.1)

    async def slow():
        yield b"x"
        await asyncio.sleep(3)

    found = calls(service, lambda client: client.post("/predict", content=slow()))
    assert found.status_code == 408


def test_a_server_that_closes_finishes_what_it_has_and_takes_no_more(service):
    service, model = slow_service(service)

    async def run(client):
        first = asyncio.create_task(client.post("/predict", content=b"x"))
        while not model.asked:
            await asyncio.sleep(0.01)
        service.closing = True
        states = [
            (await client.get(path)).status_code for path in ("/healthz", "/readyz", "/v2/health/ready")
        ]
        second = await client.post("/predict", content=b"y")
        model.go.set()
        return (await first).status_code, second.status_code, states

    assert calls(service, run) == (200, 503, [200, 503, 503])


def test_readiness_is_that_of_the_models(service):
    async def ready():
        return {("detector", "1"): True}

    service = Service(service.served, LIMITS, ready)
    client = TestClient(application(service))
    assert client.get("/healthz").text == "ok\n"
    assert client.get("/readyz").status_code == 503
    assert "model segmenter (version 1) is not ready" in one_line(client.get("/readyz"))
    assert client.get("/v2/models/detector/ready").status_code == 200
    assert client.get("/v2/models/segmenter/ready").status_code == 503


def test_images_that_come_together_share_a_batch(bundles, picture):
    (card,) = cards_of([str(bundles / "detector-dynamic")])
    worker = Worker(card.path, card.name, card.version, threads=1, wait=0.2)
    service = Service([Served(card, worker, 64)], Limits())

    async def run(client):
        found = await asyncio.gather(*(client.post("/predict", content=picture) for _ in range(8)))
        return [without_times(one.json()) for one in found], (await client.get("/metrics")).text

    found, counts = calls(service, run)
    worker.close()
    assert found == [found[0]] * 8
    assert 'meta_serve_batch_size_sum{model="detector-dynamic",version="1"} 8.0' in counts
    assert 'meta_serve_batch_size_count{model="detector-dynamic",version="1"} 2.0' in counts
    answered = (
        'meta_serve_requests_total{code="200",model="detector-dynamic",path="/predict",version="1"} 8.0'
    )
    assert answered in counts


# --- tensors ----------------------------------------------------------------------------------------------


def v2(name, array, datatype="FP32", **more):
    return {
        "inputs": [
            {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.tolist()},
            KNOB,
        ],
        **more,
    }


KNOB = {"name": "k", "shape": [2], "datatype": "INT64", "data": [5, 6]}


def test_tensors_in_json_and_in_bytes_give_what_the_graph_gives(client):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = client.post("/v2/models/raw/infer", json=v2("x", x, id="7")).json()
    assert (found["model_name"], found["model_version"], found["id"]) == ("raw", "1", "7")
    first, second = found["outputs"]
    assert first == {"name": "a/y", "datatype": "FP32", "shape": [2, 3], "data": (2 * x).ravel().tolist()}
    assert second == {"name": "more", "datatype": "BOOL", "shape": [2], "data": [False, True]}

    request = v2("x", x, outputs=[{"name": "a/y", "parameters": {"binary_data": True}}])
    del request["inputs"][0]["data"]
    request["inputs"][0]["parameters"] = {"binary_data_size": 24}
    text = json.dumps(request).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    binary = client.post("/v2/models/raw/versions/1/infer", content=text + x.tobytes(), headers=headers)
    length = int(binary.headers["inference-header-content-length"])
    assert json.loads(binary.content[:length])["outputs"][0]["parameters"] == {"binary_data_size": 24}
    assert np.array_equal(np.frombuffer(binary.content[length:], np.float32), (2 * x).ravel())


def test_metadata_says_what_a_model_takes(client):
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    found = client.get("/v2/models/many").json()
    assert found["versions"] == ["1", "2"]
    assert found["platform"] == "onnx_onnxv1"
    assert found["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [1, 3, 64, 64]}]
    open_sizes = client.get("/v2/models/many/versions/1").json()["inputs"][0]["shape"]
    assert open_sizes == [-1, 3, -1, -1]
    assert client.get("/v2/models/none").status_code == 404


X = np.ones((1, 3))


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({}, "inputs"),
        ([], "not an inference request"),
        (v2("y", X), "takes ['k', 'x']"),
        (v2("x", X, "FP64"), "as float32, not float64"),
        (v2("x", X, "BYTES"), "it may be BOOL"),
        (v2("x", np.ones((9, 3))), "(1, 3) to (4, 3)"),
        (v2("x", X, outputs=[{"name": "z"}]), "there is no output 'z'"),
        (v2("x", X, outputs=[{"name": "a/y", "parameters": {"classification": 1}}]), "'classification'"),
        ({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2]}]}, "send 3"),
        (
            {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [[1, 2], [3]]}]},
            "different lengths",
        ),
        (
            {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": ["a", "b", "c"]}]},
            "another type",
        ),
        (
            {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1e300, 0, 0]}]},
            "beyond its range",
        ),
        (
            {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "INT8", "data": [300, 0, 0]}]},
            "beyond its range",
        ),
        (
            {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "INT8", "data": [0.5, 0, 0]}]},
            "another type",
        ),
        ({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "UINT64", "data": [2**64, 0, 0]}]}, "fit"),
        (
            {"inputs": [{"name": "x", "shape": [-1, 3], "datatype": "FP32", "data": []}]},
            "not an inference request",
        ),
        (
            {"inputs": [{"name": "x", "shape": [2**31 - 1] * 32, "datatype": "FP32", "data": [1]}]},
            "has 1 values",
        ),
        (
            {
                "inputs": [
                    {"name": "x", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}}
                ]
            },
            "0 left",
        ),
        ({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32"}] * 2}, "has no data"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(client, request_, why):
    found = client.post("/v2/models/raw/infer", json=request_)
    assert found.status_code == 400
    assert why in one_line(found)


@pytest.mark.parametrize("length", ["x", "-1", "9" * 30, "99999"])
def test_a_wrong_length_of_the_json_is_refused(client, length):
    body = json.dumps(v2("x", X)).encode()
    found = client.post(
        "/v2/models/raw/infer", content=body, headers={"Inference-Header-Content-Length": length}
    )
    assert found.status_code == 400


def test_json_that_is_nested_deep_is_refused(client):
    assert client.post("/v2/models/raw/infer", content=b"[" * 100_000).status_code == 400
    deep = (
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":'
        + b"[" * 500
        + b"1"
        + b"]" * 500
        + b"}]}"
    )
    assert client.post("/v2/models/raw/infer", content=deep).status_code == 400


def test_whole_numbers_of_64_bits_are_kept(client):
    request = v2("x", X)
    request["inputs"][1] = {**KNOB, "data": [2**62 + 1, -(2**63)]}
    assert client.post("/v2/models/raw/infer", json=request).json()["outputs"][1]["data"] == [True, False]


def test_tritons_own_client_gets_what_the_graph_gives(service, listening):
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    x, k = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([5, 6])
    with listening(application(service)) as address, triton.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("many", "2")
        assert client.get_model_metadata("raw")["outputs"][0]["name"] == "a/y"
        for binary in (True, False):
            inputs = [triton.InferInput("x", [2, 3], "FP32"), triton.InferInput("k", [2], "INT64")]
            for given, array in zip(inputs, (x, k), strict=True):
                given.set_data_from_numpy(array, binary_data=binary)
            wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("a/y", "more")]
            found = client.infer("raw", inputs, outputs=wanted, request_id="7")
            assert np.array_equal(found.as_numpy("a/y"), 2 * x)
            assert found.as_numpy("more").tolist() == [False, True]
            assert np.array_equal(client.infer("raw", inputs).as_numpy("a/y"), 2 * x)
        with pytest.raises(triton.InferenceServerException, match="there is no output"):
            client.infer("raw", inputs, outputs=[triton.InferRequestedOutput("z")])


# --- pages ------------------------------------------------------------------------------------------------


def test_pages_load_nothing_from_elsewhere(client):
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.status_code == 200
        assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//""", page.text)
    assert "default-src 'none'" in client.get("/").headers["content-security-policy"]
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/predict", "/v2/models/{model}/infer", "/metrics"} <= set(paths)


def test_models_are_told_without_places_on_this_machine(client, bundles):
    found = client.get("/models")
    assert str(bundles) not in found.text
    assert [one["name"] for one in found.json()["models"]][:2] == ["detector", "segmenter"]


def test_numbers_of_other_paths_are_counted_as_one(client):
    for i in range(3):
        client.get(f"/other/{i}")
    text = client.get("/metrics").text
    assert "/other" not in text
    assert re.search(r'meta_serve_requests_total\{code="404",model="",path="",version=""\} \d', text)
