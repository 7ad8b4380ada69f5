"""A model that never ends, and what else runs outside of Python, ends with Ctrl-C and SIGTERM."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from meta_deploy.bundle.bundle import write_bundle
from meta_deploy.bundle.manifest import RawInput, TensorSpec
from meta_deploy.interrupts import interruptible
from tests.bundles_by_hand import raw_manifest

FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """An ONNX file whose loop goes on as long as there is no infinity in x."""

    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["go"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [value("i", INT64, []), value("c", BOOL, []), value("v", FLOAT, [2])],
        [value("go", BOOL, []), value("w", FLOAT, [2])],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Less", ["most", "large"], ["start"]),
        helper.make_node("Loop", ["", "start", "x"], ["y"], body=body),
    ]
    x, y = (value(name, FLOAT, [2]) for name in "xy")
    large = helper.make_tensor("large", FLOAT, [], [1e30])
    graph = helper.make_graph(nodes, "endless", [x], [y], [large])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path_factory.mktemp("endless") / "endless.onnx"
    onnx.save(model, path)
    np.savez(path.with_name("x.npz"), x=np.ones(2, np.float32))
    return path


def interrupted(number, *command, after=None, cwd):
    """The exit code and the last line of a command that gets a signal once it runs the model."""
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        time.sleep(after)
        assert process.poll() is None
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, output.splitlines()[-1]


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_inference_without_end_is_interrupted(endless, tmp_path, number, said):
    x = RawInput(name="x", dtype="float32", shape=(2,), min=(2,), opt=(2,), max=(2,))
    y = TensorSpec(name="y", dtype="float32", shape=(2,))
    write_bundle(
        tmp_path / "b", raw_manifest(inputs=(x,), outputs=(y,)), {"model.onnx": endless.read_bytes()}
    )
    command = ("meta_deploy.cli.infer", endless.with_name("x.npz"), "--model", "b", "--out", "out")
    code, line = interrupted(number, *command, after=3, cwd=tmp_path)
    assert code == 128 + number
    assert line == f"meta-infer: {said}"
    assert os.listdir(tmp_path) == ["b"]


def test_verification_without_end_is_interrupted(endless, tmp_path):
    command = ("meta_deploy.cli.export", "--onnx", endless, "--out", "b")
    code, line = interrupted(signal.SIGTERM, *command, after=8, cwd=tmp_path)
    assert code == 128 + signal.SIGTERM
    assert line == "meta-export: terminated"
    assert os.listdir(tmp_path) == []


def test_results_and_errors_come_through():
    assert interruptible(lambda: 7, lambda: None) == 7
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 / 0, lambda: None)


def test_what_does_not_stop_is_left(monkeypatch):
    monkeypatch.setattr("meta_deploy.interrupts.PATIENCE", 0.1)
    end = threading.Event()
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: end.wait(20), lambda: None)
    assert time.perf_counter() - began < 10
    end.set()


def test_a_second_signal_ends_what_python_has_not_heard():
    code = (
        "import hashlib, os, signal, threading\n"
        "from meta_deploy.interrupts import second_signal_ends\n"
        "for seconds in (0.5, 1):\n"
        "    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "with second_signal_ends():\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)\n"  # half an hour, and no step of Python
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert done.returncode == 130
