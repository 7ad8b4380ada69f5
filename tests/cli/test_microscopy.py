"""meta-infer on pictures as microscopes write them, and on such without anything in them.

Tables and label images are checked against each other, and against the picture as Pillow and numpy read it.
"""

import contextlib
import csv
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meta_deploy.cli.infer import main

WIDTH, HEIGHT = 96, 80
TILES = ((), ("--tile", "40", "--tile-overlap", "12"))
RNG = np.random.default_rng(0)


def cells(most):
    """Two bright discs on a dim noisy background, up to a number."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    discs = ((y - 30) ** 2 + (x - 30) ** 2 < 100) | ((y - 50) ** 2 + (x - 70) ** 2 < 64)
    return (0.1 + 0.8 * discs + RNG.uniform(0, 0.1, discs.shape)) * most


def write_all(folder):
    """Pictures by name, each name with another stem."""
    twelve, sixteen, dim = (cells(most).astype(np.uint16) for most in (4095, 65535, 700))
    one, counts = np.ones((HEIGHT, WIDTH), np.uint16), cells(3000).astype(np.float32)
    plain = {
        "black.png": one.astype(np.uint8) * 0,
        "white.png": one.astype(np.uint8) * 255,
        "black-16.tif": one * 0,
        "white-12.png": one * 4095,
        "white-16.tif": one * 65535,
        "noise-12.png": RNG.normal(110, 12, (HEIGHT, WIDTH)).astype(np.uint16),
        "12-bits.png": twelve,
        "12-bits-tiff.tif": twelve,
        "16-bits.png": sixteen,
        "16-bits-tiff.tif": sixteen,
        "dim-12.tif": dim,
        "one.png": one[:1, :1].astype(np.uint8) * 255,
        "one-16.tif": one[:1, :1] * 300,
        "row-16.png": sixteen[:1],
        "floats-to-1.tif": counts / 3000,
        "floats-counts.tif": counts,
        "floats-negative.tif": counts - 500,
        "floats-not-finite.tif": np.select([counts > 2500, counts < 320], [np.inf, np.nan], counts),
    }
    for name, array in plain.items():
        Image.fromarray(array).save(folder / name)
    pages = [Image.fromarray(array) for array in (dim, twelve, twelve)]
    pages[0].save(folder / "two-channels.tif", save_all=True, append_images=pages[1:2])
    pages[0].save(folder / "three-pages.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(np.stack([twelve >> 4, twelve >> 5], -1).astype(np.uint8), "LA").save(folder / "la.tif")


def run(folder, model, *options):
    """What meta-infer prints of the pictures in a folder; numpy's warnings are errors."""
    out = ("--out", f"{folder}/out", "--threads", "1")
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert main([f"{folder}/in", "--model", str(model), *out, *options]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module", params=TILES, ids=["whole", "tiles"])
def done(request, bundles, tmp_path_factory):
    """By model and name of the picture: (as Pillow reads it, result in JSON, rows, label image)."""
    made = {}
    for model in ("detector", "segmenter"):
        folder = tmp_path_factory.mktemp("microscopy")
        (folder / "in").mkdir()
        write_all(folder / "in")
        outputs = ("--label-image", "--csv", f"{folder}/t.csv", "--json", *request.param)
        shown = ("--score-threshold", "0.7") if model == "detector" else ()
        document = json.loads(run(folder, bundles / model, *shown, *outputs))
        assert "nan" not in (folder / "t.csv").read_text()
        with open(folder / "t.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        for one in document["images"]:
            path = Path(one["path"])
            with Image.open(path) as picture, Image.open(folder / f"out/{path.stem}-labels.png") as labels:
                own = [row for row in rows if row["file"] == one["path"]]
                made[model, path.name] = (np.asarray(picture), one, own, np.asarray(labels))
    return made


def test_every_picture_has_a_label_image_of_its_size_with_the_numbers_of_its_rows(done):
    assert len(done) == 2 * 21
    for (model, name), (pixels, one, rows, labels) in done.items():
        assert labels.dtype == np.uint16
        assert labels.shape == pixels.shape[:2] == tuple(one["size"]), name
        if model == "detector":
            assert [int(row["object"]) for row in rows] == list(range(1, len(one["detections"]) + 1))
            assert set(np.unique(labels)) - {0} == {int(row["object"]) for row in rows}, name


@pytest.mark.parametrize("name", ["black.png", "black-16.tif"])
def test_where_nothing_is_found_there_are_no_rows_and_no_numbers(done, name):
    _, one, rows, labels = done["detector", name]
    assert (one["detections"], rows) == ([], [])
    assert not labels.any()


def test_areas_centroids_and_boxes_are_those_of_the_label_image(done):
    names = [name for model, name in done if model == "detector"]
    assert sum(len(done["detector", name][2]) for name in names) > 10
    for name in names:
        _, _, rows, labels = done["detector", name]
        for row in rows:
            y, x = np.nonzero(labels == int(row["object"]))
            assert len(y) == int(row["area"]), (name, row)
            middle = [float(row["centroid_x"]), float(row["centroid_y"])]
            np.testing.assert_allclose(middle, [x.mean() + 0.5, y.mean() + 0.5], atol=1e-3)
            box = [float(row[edge]) for edge in ("x_min", "y_min", "x_max", "y_max")]
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]


@pytest.mark.parametrize(
    ("name", "shift"),
    [("12-bits.png", 4), ("12-bits-tiff.tif", 4), ("16-bits.png", 8), ("16-bits-tiff.tif", 8)],
)
def test_intensities_are_those_of_the_high_8_of_the_bits_that_there_are(done, name, shift):
    pixels, _, rows, labels = done["detector", name]
    assert rows
    for row in rows:
        seen = pixels[labels == int(row["object"])] >> shift
        assert float(row["mean_intensity"]) == pytest.approx(seen.mean(), abs=1e-3)


def test_a_detection_without_a_pixel_is_no_object(done):
    """In a picture of one pixel the left half of a box covers less than that."""
    _, one, rows, labels = done["detector", "one.png"]
    assert (one["detections"], rows) == ([], [])
    assert not labels.any()


def test_areas_of_class_maps_are_those_of_the_label_image(done):
    for (model, name), (pixels, _, rows, labels) in done.items():
        if model == "segmenter":
            counts = {int(row["label"]): int(row["area"]) for row in rows}
            values, areas = np.unique(labels, return_counts=True)
            assert counts == dict(zip(values.tolist(), areas.tolist(), strict=True)), name
            assert sum(counts.values()) == pixels.shape[0] * pixels.shape[1]


@pytest.mark.parametrize("tiles", TILES, ids=["whole", "tiles"])
def test_of_empty_pictures_alone_the_table_is_its_header(bundles, tmp_path, tiles):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(tmp_path / "in" / name)
    table = tmp_path / "t.csv"
    printed = run(tmp_path, bundles / "detector", "--score-threshold", "0.7", "--csv", str(table), *tiles)
    assert printed.count(" 0 objects;") == 2
    (header,) = table.read_text().splitlines()
    assert header.startswith("file,frame,object,class,score,area,")
