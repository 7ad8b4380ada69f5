"""A Triton repository is written in whole models and versions, beside what others have in it."""

import json
import os
import shutil

import msgspec
import pytest

from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.bundle.files import scratch_folder
from meta_deploy.cli.export import main
from meta_deploy.errors import BundleError, InputError
from meta_deploy.triton import repository
from meta_deploy.triton.repository import write_models
from tests.bundles_by_hand import ENGINE, raw_model


def tree(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_becomes_a_graph_and_a_python_model(made, tmp_path):
    written = write_models(Bundle.open(made / "detector"), tmp_path / "models")
    assert (written.models, written.version) == (("detector-network", "detector"), 1)
    assert tree(tmp_path / "models") == {
        *("detector-network/config.pbtxt", "detector-network/1/manifest.json"),
        "detector-network/1/model.onnx",
        *("detector/config.pbtxt", "detector/labels.txt", "detector/1/manifest.json", "detector/1/model.py"),
    }
    assert (tmp_path / "models/detector/labels.txt").read_text() == "disc\nstar\nring\n"
    again = Bundle.open(tmp_path / "models/detector-network/1")  # a bundle as any
    assert again.manifest == Bundle.open(made / "detector").manifest
    assert os.listdir(tmp_path) == ["models"]


def test_arrays_need_no_python_model(made, tmp_path):
    assert write_models(Bundle.open(made / "raw"), tmp_path / "models").models == ("raw",)
    assert tree(tmp_path / "models") == {"raw/config.pbtxt", "raw/1/manifest.json", "raw/1/model.onnx"}


def test_the_next_version_stands_beside_the_first_and_leaves_the_settings(made, tmp_path):
    bundle = Bundle.open(made / "detector")
    write_models(bundle, tmp_path, "cells")
    config = tmp_path / "cells/config.pbtxt"
    config.write_text(config.read_text().replace("count: 2", "count: 16"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = msgspec.structs.replace(bundle.manifest, precision="fp16")
    write_bundle(tmp_path.parent / "other", other, {"model.onnx": bundle.path / "model.onnx"})
    assert write_models(Bundle.open(tmp_path.parent / "other"), tmp_path, "cells").version == 2
    assert {path: path.read_bytes() for path in before} == before
    assert tree(tmp_path / "cells/2") == {"manifest.json", "model.py"}
    assert Bundle.open(tmp_path / "cells-network/2").precision == "fp16"
    shutil.rmtree(tmp_path / "cells/1")  # whoever clears old ones away
    (tmp_path / "cells/2").rename(tmp_path / "cells/41")
    assert write_models(bundle, tmp_path, "cells").version == 42


def test_several_bundles_share_a_repository(made, tmp_path):
    for name in ("detector", "segmenter", "raw"):
        write_models(Bundle.open(made / name), tmp_path)
    write_models(Bundle.open(made / "detector"), tmp_path, "second")
    assert sorted(os.listdir(tmp_path)) == [
        *("detector", "detector-network", "raw", "second", "second-network"),
        *("segmenter", "segmenter-network"),
    ]


@pytest.mark.parametrize("name", ["cells", "cells-network"])
@pytest.mark.parametrize("files", [["config.pbtxt"], ["1/model.onnx"], ["1/manifest.json"], ["notes"]])
def test_a_model_of_another_is_not_touched(made, tmp_path, name, files):
    for file in files:
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("theirs")
    with pytest.raises(InputError, match=f"{name}' is there already, and meta-export did not write it"):
        write_models(Bundle.open(made / "detector"), tmp_path, "cells")
    assert tree(tmp_path) == {f"{name}/{file}" for file in files}


def test_another_kind_of_model_is_no_version(made, tmp_path):
    write_models(Bundle.open(made / "detector"), tmp_path, "cells")
    before = tree(tmp_path)
    for name in ("segmenter", "four", "raw", "boxes"):
        with pytest.raises(InputError, match="has other inputs, outputs or batches than this bundle"):
            write_models(Bundle.open(made / name), tmp_path, "cells")
    with pytest.raises(InputError, match="cells-network' is there already, as another kind of model"):
        write_models(Bundle.open(made / "detector"), tmp_path, "cells-network")
    bundle = Bundle.open(made / "detector")
    renamed = msgspec.structs.replace(bundle.manifest, classes=("a", "b", "c"))
    with pytest.raises(InputError, match=r"model 'cells' in .* has other classes than this bundle"):
        write_models(Bundle(bundle.path, renamed), tmp_path, "cells")
    assert tree(tmp_path) == before


def test_the_server_never_sees_a_part(made, tmp_path, monkeypatch):
    """Triton takes every folder of the repository for a model, and every number in one for a version."""
    root, seen = tmp_path / "models", []
    store = repository.store_file

    def watched(*arguments):
        seen.append(tree(root))
        assert all(not folder.name.startswith(".") for folder in root.rglob("*"))
        return store(*arguments)

    monkeypatch.setattr(repository, "store_file", watched)
    write_models(Bundle.open(made / "detector"), root)
    whole = tree(root)
    graph = {file for file in whole if file.startswith("detector-network/")}
    assert [set(files) for files in seen] == [set()] * 3 + [graph] * 4
    seen.clear()
    write_models(Bundle.open(made / "detector"), root)
    graph = {file for file in tree(root) if file.startswith("detector-network/2/")}
    assert [files - whole for files in seen] == [set()] * 2 + [graph] * 2


def test_what_fails_midway_leaves_nothing(made, tmp_path, monkeypatch):
    def full(source, folder, name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository, "store_file", full)
    with pytest.raises(InputError, match=r"cannot write to the Triton repository .*No space left"):
        write_models(Bundle.open(made / "detector"), tmp_path / "new" / "models")
    assert os.listdir(tmp_path) == []


def test_a_bundle_that_changes_meanwhile_is_not_taken(made, tmp_path):
    shutil.copytree(made / "detector", tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    with open(bundle.path / "model.onnx", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(BundleError, match="was altered while it was copied"):
        write_models(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_one_process_at_a_time_writes_to_a_repository(made, tmp_path):
    root = tmp_path / "models"
    root.mkdir()
    with (
        scratch_folder(tmp_path, owner=f"{root}.triton"),
        pytest.raises(InputError, match="another process is writing to the Triton repository"),
    ):
        write_models(Bundle.open(made / "detector"), root)


@pytest.mark.parametrize("name", ["a/b", "..", "-x", "é", "a b", "x" * 101])
def test_names_that_are_no_folders_or_urls_are_refused(made, tmp_path, name):
    with pytest.raises(InputError, match="is no name for a model"):
        write_models(Bundle.open(made / "detector"), tmp_path / "models", name)
    assert not (tmp_path / "models").exists()


def test_the_command_adds_a_bundle_that_is_there(made, tmp_path, capsys):
    arguments = ["--bundle", str(made / "detector"), "--triton", str(tmp_path / "models")]
    assert main([*arguments, "--triton-name", "cells"]) == 0
    out = capsys.readouterr().out
    assert "version 1 of cells, which runs cells-network" in out
    assert f"next: tritonserver --model-repository={tmp_path}/models" in out
    assert main([*arguments, "--triton-name", "cells", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bundle"] == str(made / "detector")
    assert document["triton"] == {
        "repository": str(tmp_path / "models"),
        "models": ["cells-network", "cells"],
        "version": 2,
    }


def test_the_command_refuses_what_has_no_effect_or_no_place(made, tmp_path, capsys):
    detector, models = str(made / "detector"), str(tmp_path / "models")
    (tmp_path / "file").write_text("")
    whole = Bundle.open(made / "detector")
    engine = msgspec.structs.replace(whole.manifest, target="tensorrt-rtx", engine=ENGINE)
    write_bundle(tmp_path / "rtx", engine, {"model.onnx": whole.path / "model.onnx"})
    for arguments, reason in (
        (["--bundle", detector], "--bundle is for --triton"),
        (["--ckpt", "x.pth", "--triton-name", "a"], "--triton-name is for --triton"),
        (["--bundle", detector, "--triton", models, "--fp16"], "--fp16 is for an export"),
        (["--bundle", detector, "--triton", models, "--explain", "clean-up"], "--explain is for an export"),
        (["--bundle", detector, "--triton", models, "--batch", "2"], "--batch is for an export"),
        (["--bundle", str(tmp_path), "--triton", models], "is not a bundle"),
        (["--bundle", str(tmp_path / "rtx"), "--triton", models], "Triton has no backend"),
        (["--ckpt", "x.pth", "--triton", models, "--target", "tensorrt-rtx"], "Triton has no backend"),
        (["--ckpt", "x.pth", "--triton", models, "--out", "a b"], "'a b' is no name for a model"),
        (["--onnx", "my model.onnx", "--triton", models], "'my model' is no name for a model"),
        (["--bundle", detector, "--triton", detector], "is a bundle, and not a repository"),
        (["--bundle", detector, "--triton", str(tmp_path / "file")], "is not a folder that can be"),
        (["--bundle", detector, "--triton", "s3://bucket/models"], "is not a folder"),
        (["--bundle", detector, "--triton", ""], "the path is empty"),
    ):
        try:
            code = main(arguments)
        except SystemExit as error:  # argparse's
            code = error.code
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), arguments
        assert reason in err
    assert not os.path.exists(models)


def test_an_export_ends_in_the_repository(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doubler.onnx").write_bytes(raw_model())
    quick = ["--target", "onnxruntime", "--no-verify", "--passes", "none"]
    assert main(["--onnx", "doubler.onnx", "--triton", "models", *quick]) == 0
    out = capsys.readouterr().out
    assert "next: meta-infer INPUTS.npz --model doubler-onnxruntime-fp32\n" in out
    assert "Triton: version 1 of doubler-onnxruntime-fp32\n" in out
    bundle, version = (
        Bundle.open("doubler-onnxruntime-fp32"),
        Bundle.open("models/doubler-onnxruntime-fp32/1"),
    )
    assert bundle.manifest == version.manifest
