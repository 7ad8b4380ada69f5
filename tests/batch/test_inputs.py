"""What a run is over: every kind of source names its images once, in order, and leads to their bytes."""

import pytest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from meta_deploy.batch import remote  # noqa: E402
from meta_deploy.batch.inputs import gather, images_of  # noqa: E402
from meta_deploy.errors import ImageError, InputError  # noqa: E402


@pytest.fixture
def store(monkeypatch):
    """A store of pyarrow's for tests, under mock://photos/, with whatever query."""
    system, root = remote._opened("mock", "photos", "")
    monkeypatch.setattr(remote, "_opened", lambda scheme, place, query: (system, root))
    for name in ("b.jpg", "a.jpg", "a.txt", "c.png", "more/d.jpg"):
        system.create_dir("more")
        with system.open_output_stream(name) as stream:
            stream.write(name.encode())


def test_a_folder_and_a_pattern_of_a_store_are_its_images(store):
    assert gather(["mock://photos/"]).names == [f"mock://photos/{n}" for n in ("a.jpg", "b.jpg", "c.png")]
    assert gather(["mock://photos/*.jpg"]).names == ["mock://photos/a.jpg", "mock://photos/b.jpg"]
    asked = "?endpoint_override=host:1&scheme=http"
    assert gather([f"mock://photos/?.png{asked}"]).names == [f"mock://photos/c.png{asked}"]
    assert gather(["mock://photos/more"]).names == ["mock://photos/more/d.jpg"]
    assert remote.content("mock://photos/more/d.jpg") == b"more/d.jpg"
    with pytest.raises(ImageError, match=r"there is no file 'mock://photos/e\.jpg'"):
        remote.content("mock://photos/e.jpg")
    with pytest.raises(InputError, match=r"no image in 'mock://photos/\*.gif'"):
        gather(["mock://photos/*.gif"])


def test_a_file_uri_is_the_file(tmp_path):
    (tmp_path / "a b.jpg").write_bytes(b"a b")
    uri = f"file://{tmp_path}/a%20b.jpg"
    assert remote.content(uri) == b"a b"
    assert gather([f"file://{tmp_path}"]).names == [uri]


def test_lists_folders_and_files_name_an_image_once(tmp_path, small_images, monkeypatch):
    monkeypatch.chdir(small_images)
    (tmp_path / "list.txt").write_text("220.png\ns3://far/x y.jpg\n\n220.png\n[odd].png\n")
    inputs = gather([str(tmp_path / "list.txt"), str(small_images)])
    assert inputs.names == ["220.png", "s3://far/x y.jpg", "[odd].png", str(small_images / "60.png")]
    assert inputs.places[0] == str(small_images / "220.png")
    assert inputs.image_ids() == [1, 2, 3, 4]
    assert gather([str(small_images)]).image_ids() == [220, 60]


def test_a_list_is_of_lines_as_any_editor_writes_them(tmp_path):
    odd = ("/a\x0bb.jpg", "/a\x0cb.jpg", "/a\x85b.jpg", "/a\u2028b.jpg", " /a.jpg ", "/é.jpg")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*odd, "", " ", odd[0]]).encode())
    assert gather([str(tmp_path / "list.txt")]).names == list(odd)


@pytest.mark.parametrize("kind", [None, "large_string", "string_view", "dictionary"])
def test_a_table_of_paths_is_a_list(tmp_path, kind):
    paths = pa.array(["/a.jpg", "gs://b/c.jpg"])
    if kind == "dictionary":  # pandas' categories
        paths = paths.dictionary_encode()
    elif kind:
        paths = paths.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"id": [1, 2], "path": paths}), tmp_path / "t.parquet")
    inputs = gather([str(tmp_path / "t.parquet")])
    assert inputs.places == ["/a.jpg", "gs://b/c.jpg"]
    assert not inputs.groups


@pytest.mark.parametrize("kind", ["binary", "binary_view", "struct"])
def test_images_in_a_table_are_found_by_their_places(tmp_path, kind):
    contents = [f"image {i}".encode() for i in range(10)]
    if kind == "struct":
        images = pa.array([{"bytes": c, "path": None} for c in contents])
    else:
        images = pa.array(contents, getattr(pa, kind)())
    table = pa.table({"image": images, "file_name": [f"{i}.jpg" for i in range(9)] + [None]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=4)
    inputs = gather(["/first.jpg", str(tmp_path / "*.parquet"), "/last.jpg"])
    unnamed = f"{tmp_path / 't.parquet'}#9"
    assert inputs.names == ["/first.jpg", *(f"{i}.jpg" for i in range(9)), unnamed, "/last.jpg"]
    assert [places for places, _ in inputs.files([range(12)], 5)] == [[0], [11]]
    spans = [range(2, 4), range(6, 12)]
    found = {
        place: image
        for group, places in inputs.tables(spans)
        for own, images in images_of(group, places, 3)
        for place, image in zip(own, images, strict=True)
    }
    assert found == {place: contents[place - 1] for place in (2, 3, 6, 7, 8, 9, 10)}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("clip.mp4", "'clip.mp4' is a video; with --ray only images are run"),
        ("x.npz", "'x.npz' is arrays"),
        ("none.txt", "cannot read the list 'none.txt'"),
        ("none.parquet", "cannot read the Parquet file 'none.parquet'"),
        ("nope://x/y/", "Unrecognized filesystem type"),
        ("a\udcff.jpg", "is not UTF-8"),
        ("nul.txt", "'b\0.jpg' has a NUL character"),
    ],
)
def test_what_cannot_be_a_source_is_told(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nul.txt").write_bytes(b"a.jpg\nb\0.jpg\n")
    with pytest.raises(InputError, match=told):
        gather([name])


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"path": ["/a.jpg", None]}, "a row without a path in column path"),
        ({"path": ["/a.jpg", ""]}, "a row without a path in column path"),
        ({"path": [1], "n": ["x"]}, r"no column of images, paths or URIs, only path \(int64\), n \(string\)"),
    ],
)
def test_a_table_without_names_is_refused(tmp_path, columns, told):
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=told):
        gather([str(tmp_path / "t.parquet")])


def test_other_inputs_or_another_order_have_another_digest(small_images):
    digests = [gather(arguments).digest for arguments in (["/a", "/b"], ["/b", "/a"], ["/a"], ["/a", "/b"])]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]
