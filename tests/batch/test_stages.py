"""The stages of a batch run, called one after the other as Ray calls them, give what a predictor gives."""

import json

import numpy as np
import pytest
from PIL import Image

pa = pytest.importorskip("pyarrow")

from meta_deploy.batch.dataset import Model, _check_columns, checked, finish, options_of, prepare, read  # noqa: E402
from meta_deploy.batch.inputs import gather  # noqa: E402
from meta_deploy.batch.run import entries, open_parts, records  # noqa: E402
from meta_deploy.errors import BundleError, InputError  # noqa: E402
from meta_deploy.runtime.predictor import Predictor  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of several sizes, a.png to d.png, and bad.png."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, size in {"a": (64, 64), "b": (128, 96), "c": (40, 200), "d": (70, 70)}.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def through(table, options):
    return finish(Model(options)(prepare(read(table, options), options)), options)


def without_times(entry):
    return {**entry, "timings": None}


@pytest.mark.parametrize(
    ("bundle", "options"),
    [
        ("detector", {}),
        ("detector-batch", {"tile": 64}),
        ("detector-dynamic", {"score_threshold": 0.0}),
        ("segmenter", {"slide": 20}),
    ],
)
def test_rows_get_the_results_that_a_predictor_gives_for_each_image(bundles, folder, bundle, options):
    paths = sorted(str(path) for path in folder.iterdir())
    table = pa.table({"mark": list("vwxyz"), "path": paths})
    done = through(table, checked(options_of(bundles / bundle, **options), None))
    assert done.column_names == ["mark", "path", "result", "error"]
    with Predictor(bundles / bundle, **options) as predictor:
        for path, result, error in zip(
            paths, *map(pa.Table.__getitem__, [done] * 2, ["result", "error"]), strict=True
        ):
            if path.endswith("bad.png"):
                assert result.as_py() is None
                with pytest.raises(InputError) as raised:
                    predictor(path)
                assert error.as_py() == str(raised.value)
            else:
                assert without_times(result.as_py()) == without_times(predictor(path).to_dict())
                assert error.as_py() is None


def test_bytes_are_taken_as_files_are_and_not_kept(bundles, folder):
    options = checked(options_of(bundles / "detector", image="photo"), None)
    contents = [(folder / name).read_bytes() for name in ("a.png", "b.png")]
    done = through(pa.table({"photo": [*contents, None, b"x"]}), options)
    assert done.column_names == ["result", "error"]
    with Predictor(bundles / "detector") as predictor:
        for result, data in zip(done["result"].to_pylist(), contents, strict=False):
            assert without_times(result) == without_times(predictor(data).to_dict())
    assert done["error"].to_pylist()[2] == "there is no image: the value in its column is null"
    assert done["error"].to_pylist()[3].startswith("the given data is not an image")


def test_columns_of_any_kind_give_results_or_errors(bundles, folder):
    options = checked(options_of(bundles / "detector"), None)
    path = str(folder / "a.png")
    content = (folder / "a.png").read_bytes()
    expected = Predictor(bundles / "detector")(path).to_dict()

    def done(images, **columns):
        return through(pa.table({"path": images, **columns}), options)

    for images in (
        pa.array([path], pa.string_view()),
        pa.array([path]).dictionary_encode(),
        pa.array([content], pa.binary_view()),
        pa.array([{"bytes": content, "path": None}]),
    ):
        found = done(images)["result"][0].as_py()
        assert {**found, "timings": None, "path": None} == {**expected, "timings": None, "path": None}
    for images, why in (
        (pa.array([1, None]), "is of int64, and not of paths, encoded files or arrays"),
        (pa.array([{"a": 1}, None]), "is of struct"),
        (pa.nulls(2), "there is no image: the value in its column is null"),
        (pa.array([None, {"bytes": None}]), "there is no image: the value in its column is null"),
        (pa.array([None, None], pa.binary()), "there is no image: the value in its column is null"),
        (pa.array([None, ""]), "its path is empty"),
    ):
        table = done(images, mark=["x", "y"])
        assert table["mark"].to_pylist() == ["x", "y"]
        assert all(why in error for error in table["error"].to_pylist())


def test_a_row_without_an_image_is_told_by_its_name(bundles):
    options = checked(options_of(bundles / "detector", image="picture"), None)
    table = through(pa.table({"picture": pa.array([None], pa.binary()), "path": ["a.jpg"]}), options)
    assert table["error"].to_pylist() == ["'a.jpg' has no image: the value in its column is null"]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (["path", "id", "result"], "has a column 'result' already"),
        (["uri", "id"], "has no column 'path'; there are uri, id"),
        (["path", "key"], "has no column 'id'; there are path, key"),
    ],
)
def test_columns_that_are_there_already_or_not_at_all_are_told(bundles, columns, told):
    options = checked(options_of(bundles / "detector", coco_ids="id"), None)
    with pytest.raises(InputError, match=told):
        _check_columns(columns, options)
    _check_columns(["path", "id"], options)
    _check_columns(None, options)


def test_coco_records_are_those_of_the_result(bundles, folder):
    options = checked(options_of(bundles / "detector", score_threshold=0.0, coco_ids="id"), None)
    done = through(pa.table({"path": [str(folder / "b.png")], "id": [77]}), options)
    with Predictor(bundles / "detector", score_threshold=0.0) as predictor:
        assert done["result"][0].as_py() == predictor(folder / "b.png").to_coco(77)


def test_a_worker_with_another_bundle_says_so(bundles):
    options = checked(options_of(bundles / "detector"), None)
    other = type(options)(**{**vars(options), "bundle": str(bundles / "segmenter")})
    with pytest.raises(BundleError, match="is not the one that the run was started with"):
        Model(other)


@pytest.mark.parametrize("coco", [False, True])
def test_parts_hold_the_rows_in_order_and_list_the_failures(bundles, folder, tmp_path, coco):
    inputs = gather([str(folder)])
    options = checked(options_of(bundles / "detector", coco_ids="id" if coco else None), None)
    done = through(pa.table({"place": range(5), "path": inputs.names, "id": range(5)}), options)
    with open_parts(inputs, tmp_path, options, part_size=3) as parts:
        for place in (4, 0, 2, 1, 3):
            parts.add(place, done.slice(place, 1).drop_columns(["id"]))
        assert [part.images for part in parts] == [3, 2]
        bad = str(folder / "bad.png")
        assert [name for part in parts for name, _ in part.failed] == [bad]
        values = [value for value in done["result"].to_pylist() if value is not None]
        if not coco:
            assert list(entries(parts)) == values
            return
        found = [json.loads(record) for record in records(parts)]
        names = ["a.png", "b.png", "bad.png", "c.png", "d.png"]
        assert found == [{**r, "file_name": names[r["image_id"]]} for value in values for r in value]
        assert [r for p in sorted(tmp_path.glob("*.json")) for r in json.loads(p.read_text())] == found


def test_a_raw_bundle_and_a_batch_too_large_are_refused(bundles):
    with pytest.raises(InputError, match="gives plain arrays"):
        checked(options_of(bundles / "raw-image"), None)
    with pytest.raises(InputError, match="the batch must be from 1 to 4"):
        checked(options_of(bundles / "detector-batch"), 5)
