"""Nothing that runs here is reported, and nothing is written below the home folder."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "meta_deploy/assets/images/fluorescence-4.png"


def test_nothing_else_imports_onnx_runtime():
    for path in (ROOT / "meta_deploy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if path.name != "ort.py":
                assert not any(name.split(".")[0] == "onnxruntime" for name in names), path


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_inference_leaves_the_home_folder_alone(tmp_path, detector_bundle, backend):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "ORT_"))}
    places = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {**places, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "meta_deploy.cli.infer", PICTURE, "--model", detector_bundle.path]
    done = subprocess.run([*command, "--backend", backend, "--json"], env=environment, capture_output=True)
    if backend == "openvino" and b"pip install openvino" in done.stderr:
        pytest.skip("OpenVINO is not installed")
    assert done.returncode == 0
    assert not (tmp_path / "home").exists()
    kept = os.listdir(tmp_path / "cache") if backend == "openvino" else []  # its compiled model, by us
    assert kept in ([], ["meta-deploy"])
    assert os.listdir(tmp_path) == (["cache"] if kept else [])
