"""The page for people, in a browser where there is one: a picture is dropped, what was found is seen."""

import base64
import queue
import shutil
import subprocess

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed (pip install 'meta-deploy[serve]')")

from starlette.requests import Request
from starlette.responses import HTMLResponse

from meta_deploy import Predictor
from meta_deploy.serve.app import Served, Service, application
from meta_deploy.serve.models import cards_of
from meta_deploy.serve.worker import Worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium"),
]

STEPS = """<script>
const settled = async (old) => { for (let i = 0; i < 200; i++) {
  await new Promise((next) => setTimeout(next, 50));
  if (!/^(|Looking.*)$/.test($("status").textContent) && $("status").textContent !== old) return;
} };
const dropped = (bytes, name) => {
  const data = new DataTransfer();
  data.items.add(new File([bytes], name));
  dispatchEvent(new DragEvent("drop", {dataTransfer: data}));
};
(async () => {
  const found = {};
  while (!models.length) await new Promise((next) => setTimeout(next, 20));
  found.names = [...$("model").options].map((option) => option.text);
  dropped(Uint8Array.from(atob("PICTURE"), (c) => c.charCodeAt(0)), "a.png");
  await settled("");
  await $("overlay").decode();
  found.summary = $("status").textContent;
  found.drawn = [$("overlay").naturalWidth, $("overlay").naturalHeight];
  found.fits = document.documentElement.scrollWidth <= innerWidth;
  $("score").value = 0.7; $("score").dispatchEvent(new Event("change"));
  await settled(found.summary);
  found.fewer = $("status").textContent;
  $("model").selectedIndex = 2; $("model").dispatchEvent(new Event("change"));
  await settled(found.fewer);
  found.other = $("status").textContent;
  found.score = !$("least").hidden;
  dropped(new TextEncoder().encode("no picture"), "<b>.png");
  await settled(found.other);
  found.error = [$("status").textContent, $("status").className, $("result").hidden];
  fetch("/steps", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


@pytest.fixture(scope="module")
def served(bundles, picture, listening):
    """A server of two versions of a detector, a segmenter, and raw bundles: /steps, its page being used, and
    a queue of what that tells in the end.
    """
    given = ["cells={}/detector", "cells:2={}/detector-dynamic", "{}/segmenter", "{}/raw", "{}/raw-image"]
    cards = cards_of([text.replace("{}", str(bundles)) for text in given])
    workers = [Worker(card.path, card.name, card.version, threads=1) for card in cards]
    app = application(Service([Served(card, one, 9) for card, one in zip(cards, workers, strict=True)]))

    @app.get("/steps")
    async def steps():
        page = next(route for route in app.routes if route.path == "/")
        text = (await page.endpoint()).body.decode()
        return HTMLResponse(
            text.replace("</body>", STEPS.replace("PICTURE", base64.b64encode(picture).decode()))
        )

    told = queue.Queue()

    @app.post("/steps")
    async def tell(request: Request):
        told.put(await request.json())

    with listening(app) as place:
        yield f"http://{place}/steps", told
    for worker in workers:
        worker.close()


@pytest.mark.parametrize("width", [500, 1280])
def test_a_dropped_picture_shows_what_was_found(served, picture, bundles, tmp_path, width):
    page, told = served
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    options = [
        "--enable-logging=stderr",
        "--remote-debugging-port=0",  # it stays until it is ended
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen([*command, *options, page], stderr=stderr)
        try:
            found = told.get(timeout=120)
        finally:
            process.terminate()
            process.wait()
    with Predictor(bundles / "detector") as predictor:
        result = predictor(picture)
    height, wide, _ = result.draw(picture).shape
    assert found["names"] == ["cells, version 1", "cells, version 2", "segmenter"]
    assert (found["summary"], found["drawn"]) == (repr(result), [wide, height])
    assert found["fewer"] == repr(result.filter(0.7)) != repr(result)
    with Predictor(bundles / "segmenter") as predictor:
        assert (found["other"], found["score"]) == (repr(predictor(picture)), False)
    why = "the given data is not an image that can be read; give a JPEG, PNG, WebP, TIFF, BMP or GIF file"
    assert found["error"] == [why, "bad", True]
    assert found["fits"]
    console = [line for line in log.read_text().splitlines() if "CONSOLE" in line]
    assert [line for line in console if "status of 422" not in line] == []
