"""On a real Ray: what meta-infer says of each image, also where a worker is killed, and gone on with."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ray", reason="Ray is not installed (pip install 'meta-deploy[ray]')")

import pyarrow as pa
import pyarrow.parquet as pq

from meta_deploy.batch import dataset
from meta_deploy.cli.infer import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, for all tests: its start takes seconds."""
    from meta_deploy.batch.cluster import connected

    with connected(None):
        import ray

        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of six photos of two sizes, and one that is none."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(6):
        size = (64, 64) if i % 2 else (128, 96)
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def infer(bundles, capfd, cluster, monkeypatch):
    """Run meta-infer on the detector, with --ray on the cluster; gives exit code, stdout, stderr."""
    import ray

    monkeypatch.setattr(ray, "init", lambda *arguments, **options: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)

    def call(*arguments, model="detector"):
        code = main([*map(str, arguments), "--model", str(bundles / model)])
        return code, *capfd.readouterr()

    return call


def without_times(document):
    return [{**entry, "timings": None} for entry in json.loads(document)["images"]]


def test_json_is_that_of_meta_infer_and_a_second_run_does_nothing_again(infer, photos, tmp_path):
    alone = infer(photos, "--json")
    first = infer(photos, "--json", "--ray", "--out", tmp_path / "found", "--part-size", 3)
    assert first[0] == alone[0] == 2  # of bad.png
    assert without_times(first[1]) == without_times(alone[1])
    assert json.loads(first[1])["errors"] == json.loads(alone[1])["errors"]
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "found").glob("part-*")}
    assert len(parts) == 3
    sorted(parts)[1].unlink()
    again = infer(photos, "--json", "--ray", "--out", tmp_path / "found")
    assert without_times(again[1]) == without_times(alone[1])
    assert "4 of 7 images are done already" in again[2]
    same = [path.stat().st_mtime_ns == before for path, before in sorted(parts.items())]
    assert same == [True, False, True]


def test_coco_results_are_those_of_meta_infer(infer, photos, tmp_path):
    infer(photos, "--coco-json", tmp_path / "alone.json")
    infer(photos, "--coco-json", tmp_path / "ray.json", "--ray", "--out", tmp_path / "found")
    assert (tmp_path / "ray.json").read_bytes() == (tmp_path / "alone.json").read_bytes()


def test_images_in_a_parquet_file_are_found_as_the_files_are(infer, photos, tmp_path):
    paths = sorted(map(str, photos.glob("?.png")))
    table = pa.table({"image": [open(path, "rb").read() for path in paths], "path": paths})  # noqa: SIM115
    pq.write_table(table, tmp_path / "photos.parquet", row_group_size=4)
    alone = infer(*paths, "--json")
    found = infer(tmp_path / "photos.parquet", "--json", "--ray", "--out", tmp_path / "found")
    assert found[0] == 0
    assert without_times(found[1]) == without_times(alone[1])


def killing(table, mark):
    """A stage that kills its worker at image 2, once, and fails at image 4."""
    if 2 in table["place"].to_pylist() and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if 4 in table["place"].to_pylist():
        raise RuntimeError("a fault")
    return table


def test_a_killed_worker_costs_no_image_and_a_fault_only_its_own(infer, photos, tmp_path, monkeypatch):
    alone = infer(photos, "--json")
    staged = dataset.staged

    def deadly(ds, *rest, **more):
        ds = ds.map_batches(
            killing, fn_args=(str(tmp_path / "mark"),), batch_format="pyarrow", batch_size=None
        )
        return staged(ds, *rest, **more)

    monkeypatch.setattr("meta_deploy.batch.run.staged", deadly)
    found = infer(photos, "--json", "--ray", "--out", tmp_path / "found")
    assert (tmp_path / "mark").exists()
    assert found[0] == 2
    expected = without_times(alone[1])
    del expected[4]
    assert without_times(found[1]) == expected
    failed = [os.path.basename(error["path"]) for error in json.loads(found[1])["errors"]]
    assert failed == ["4.png", "bad.png"]


def test_a_fault_of_the_bundle_on_a_worker_is_one_line(infer, photos, tmp_path):
    code, _, err = infer(photos, "--ray", "--backend", "tensorrt", "--out", tmp_path / "found")
    assert code == 2
    assert "has no TensorRT" in err.splitlines()[-1]
