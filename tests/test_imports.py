"""Who may import whom, read from the sources; and what importing must not load."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "meta_deploy"
BELOW_ALL = {"bundle", "graph", "models"}  # import nothing of ours but the errors
ALLOWED = {
    **{part: {part} for part in BELOW_ALL},
    "imaging": {"imaging", "bundle"},
    "calib": {"calib", "graph", "targets", "bundle"},
    "tasks": {"tasks", "imaging", "bundle"},
    "targets": {"targets", "tasks", "graph", "bundle"},
    "runtime": {"runtime", "targets", "tasks", "imaging", "bundle"},
    "batch": {"batch", "runtime", "targets", "tasks", "imaging", "bundle"},
    "serve": {"serve", "batch", "runtime", "targets", "tasks", "imaging", "bundle"},
    "triton": {"triton", "runtime", "targets", "bundle"},
    "export": {"export", "models", "calib", "graph", "targets", "tasks", "imaging", "bundle"},
    "report": {"report", "export", "runtime", "models", "graph", "targets", "tasks", "imaging", "bundle"},
}
EVERYTHING = {*ALLOWED, "cli"}
ALLOWED["cli"] = EVERYTHING
TORCH = {"torch", "torchvision", "safetensors"}
ONNX = {"onnx", "onnxscript", "onnx_graphsurgeon", "onnx_ir", "onnxslim", "polygraphy"}
FORBIDDEN = {
    **dict.fromkeys(("bundle", "imaging", "tasks", "runtime", "batch", "serve", "triton"), TORCH | ONNX),
    "graph": TORCH,
    "calib": TORCH,
    "targets": TORCH,
    "models": ONNX | {"onnxruntime", "tensorrt", "tensorrt_rtx", "cv2"},
}


def imported(path):
    """Every module that a file imports, at its top or inside a function, as an absolute dotted name."""
    package = (PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            base = (above + (node.module or "")).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_it_may(part):
    for path in (PACKAGE / part).rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "meta_deploy" and len(parts) > 1 and parts[1] in EVERYTHING:
                assert parts[1] in ALLOWED[part], f"{path.relative_to(PACKAGE)} imports {name}"
            assert parts[0] not in FORBIDDEN.get(part, ()), f"{path.relative_to(PACKAGE)} imports {name}"


def test_graph_knows_no_models():
    for path in (PACKAGE / "graph").rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] not in TORCH, f"{path.name} imports {name}"
            assert not name.startswith("meta_deploy.models"), f"{path.name} imports {name}"


def test_no_pass_imports_another():
    for path in (PACKAGE / "graph" / "passes").glob("*.py"):
        for name in imported(path):
            assert not name.startswith("meta_deploy.graph.passes"), f"{path.name} imports {name}"


def test_no_test_module_imports_another():
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in getattr(node, "names", ())] if isinstance(node, ast.Import) else []
            )
            names += (
                [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
            )
            for name in names:
                found = name.startswith("tests.") and re.search(r"\.test_\w+", name)
                assert not found, f"{path.name} imports {name}"


def test_every_folder_has_its_rule():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(ALLOWED)


def loaded_by(code):
    """The top-level modules that a fresh interpreter holds after running `code`."""
    script = f"import sys\n{code}\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy():
    heavy = TORCH | ONNX | {"numpy", "cv2", "PIL", "onnxruntime", "tqdm", "pycocotools"}
    assert not loaded_by("import meta_deploy, meta_deploy.runtime") & heavy


def test_the_whole_runtime_loads_without_torch_and_onnx():
    parts = ("bundle", "imaging", "tasks", "targets", "runtime")
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for part in parts
        for path in (PACKAGE / part).rglob("*.py")
        if path.name != "__init__.py"
    ]
    code = "import " + ", ".join([*modules, "meta_deploy.cli.outputs"])
    loaded = loaded_by(code + "\nfrom meta_deploy import Predictor, Bundle, Detections, Segmentation")
    assert not loaded & (TORCH | ONNX)
    assert "cv2" in loaded  # or this test looks at nothing


@pytest.mark.parametrize("command", ["infer", "report", "serve"])
def test_help_loads_nothing_heavy(command):
    code = f"from meta_deploy.cli.{command} import main"
    code += "\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert not loaded_by(code) & {"numpy", "cv2", "PIL", "onnxruntime", "tqdm", "torch", "onnx"}
