"""On a real Ray: the command from start to end, with a replica killed on the way."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ray.serve", reason="Ray Serve is not installed (pip install 'meta-deploy[serve]')")
pytest.importorskip("fastapi_offline", reason="the extra [serve] is not installed")

from meta_deploy.batch.cluster import connected
from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.cli.infer import main as infer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


class Server:
    """meta-serve over two versions of a detector in two replicas, and what takes tensors."""

    def __init__(self, bundles, log, *options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        models = [f"cells={bundles}/detector", f"cells:2={bundles}/detector-dynamic", f"{bundles}/raw"]
        command = [sys.executable, "-m", "meta_deploy.cli.serve", *models, "--port", str(self.port)]
        command += ["--threads", "1", "--timeout", "20", *options]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._log = log.open("w")
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=self._log, stderr=self._log)
        end = time.monotonic() + 120
        while " ready at " not in log.read_text():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def replicas(self, name):
        """The processes of a deployment, by its name."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                title = (folder / "cmdline").read_text()
                if re.match(rf"ray::ServeReplica:meta-serve:\d+-{name}", title) and self._mine(folder.name):
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def _mine(self, pid):
        while pid != "0":
            if int(pid) == self.process.pid:
                return True
            pid = re.search(r"PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1]
        return False

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 200, (64, 96, 3), np.uint8)).save(path)
    return path


def test_the_server_answers_survives_a_killed_replica_and_drains(bundles, picture, tmp_path, capfd):
    log = tmp_path / "log"
    server = Server(bundles, log)
    try:
        infer([str(picture), "--model", str(bundles / "detector"), "--json"])
        expected = json.loads(capfd.readouterr().out)["images"][0]["detections"]
        body = picture.read_bytes()

        def found(path="/predict"):
            status, answer = server.ask("POST", path, body)
            return (
                (status, json.loads(answer)["images"][0]["detections"]) if status == 200 else (status, answer)
            )

        for path in ("/predict", "/predict/cells", "/predict/cells/versions/1"):
            assert found(path) == (200, expected)
        request = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}
        request["inputs"].append({"name": "k", "shape": [2], "datatype": "INT64", "data": [5, 6]})
        status, answer = server.ask("POST", "/v2/models/raw/infer", json.dumps(request))
        assert (status, json.loads(answer)["outputs"][0]["data"]) == (200, [2, 4, 6])
        assert server.ask("POST", "/predict", b"no picture")[0] == 422
        assert server.ask("POST", "/predict", body, **{"X-Session-Id": "\xff"})[0] == 200
        assert server.ask("GET", "/healthz", X="x" * 40_000)[0] == 431
        assert server.ask("GET", "/readyz")[0] == server.ask("GET", "/v2/models/cells/ready")[0] == 200

        (victim,) = server.replicas("cells-1")
        statuses = []
        stop = threading.Event()

        def load():
            while not stop.is_set():
                statuses.append(found("/predict/cells/versions/1")[0])

        thread = threading.Thread(target=load)
        thread.start()
        time.sleep(0.5)
        os.kill(victim, signal.SIGKILL)
        end = time.monotonic() + 60
        while not server.replicas("cells-1") and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(0.5)
        stop.set()
        thread.join()
        assert set(statuses) <= {200, 503, 504}
        assert found("/predict/cells/versions/1") == (200, expected)

        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as wire:
            head = f"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
            wire.sendall(head.encode() + body[:100])
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(1)
            assert server.ask("POST", "/predict", body)[0] == server.ask("GET", "/readyz")[0] == 503
            wire.sendall(body[100:])
            assert wire.recv(12) == b"HTTP/1.1 200"
        assert server.process.wait(60) == 0
        assert "Traceback" not in log.read_text()
    finally:
        server.close()


def test_a_cluster_that_is_there_is_used_and_left(bundles, picture, tmp_path):
    import ray

    with connected(None, cpus=4):
        log = tmp_path / "log"
        server = Server(bundles, log, "--ray", ray.get_runtime_context().gcs_address)
        try:
            assert server.ask("POST", "/predict", picture.read_bytes())[0] == 200
            second = [
                sys.executable,
                "-m",
                "meta_deploy.cli.serve",
                "--ray",
                ray.get_runtime_context().gcs_address,
            ]
            done = subprocess.run(second, cwd=ROOT, capture_output=True, text=True, timeout=120)
            assert (done.returncode, "Ray Serve runs at" in done.stderr) == (2, True), done.stderr
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
        finally:
            server.close()
        assert ray.cluster_resources()["CPU"] >= 4


def test_a_bundle_that_cannot_be_run_is_one_line(bundles, tmp_path):
    broken = tmp_path / "broken"
    write_bundle(broken, Bundle.open(bundles / "detector").manifest, {"model.onnx": b"no model"})
    command = [sys.executable, "-m", "meta_deploy.cli.serve", str(broken), "--threads", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("meta-serve: ")
    assert "model.onnx" in last
