"""Whatever an image file holds comes out as RGB uint8, or is refused in one sentence that names it."""

import io
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from meta_deploy.errors import ImageError, InputError
from meta_deploy.imaging.images import read_image
from meta_deploy.imaging.sources import expand

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


PNG = encoded(Image.fromarray(RGB))


def test_a_path_bytes_a_pillow_image_and_an_array_are_read_alike(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), PNG, Image.fromarray(RGB), RGB):
        image = read_image(source)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, RGB)


def test_the_suffix_does_not_matter(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PNG)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), RGB)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode):
    image = Image.fromarray(RGB).convert("L" if mode in ("LA", "PA") else "RGB").convert(mode)
    result = read_image(image)
    assert result.shape == (20, 30, 3)
    np.testing.assert_array_equal(result, np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_and_the_colours_below_it_stay():
    alpha = np.dstack([RGB, np.zeros(RGB.shape[:2], np.uint8)])
    np.testing.assert_array_equal(read_image(encoded(Image.fromarray(alpha))), RGB)


def test_a_cmyk_jpeg_is_read():
    cmyk = Image.new("CMYK", (30, 20), (0, 255, 255, 0))
    red = read_image(encoded(cmyk, "JPEG", quality=95)).reshape(-1, 3).mean(0)
    assert red[0] > 240
    assert red[1:].max() < 15


def test_16_bit_grey_keeps_its_high_byte():
    deep = (np.arange(600, dtype=np.uint32).reshape(20, 30) * 109).astype(np.uint16)
    for form in ("PNG", "TIFF"):
        image = read_image(encoded(Image.fromarray(deep), form))
        np.testing.assert_array_equal(image[..., 0], deep >> 8)
        np.testing.assert_array_equal(image[..., 2], deep >> 8)


def test_16_bit_colour_is_read(tmp_path):
    deep = RGB.astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "a.png"), deep[:, :, ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    # What must be stored, so that turning it as the orientation says gives the picture.
    stored = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, 1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB, -1),
    }[orientation]
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(read_image(data), RGB)


def test_of_an_animation_the_first_frame_is_read():
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(read_image(data), RGB)


def png_header(width, height):
    """A PNG that claims a size and has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 100) + b"IDAT" + bytes(100)


BAD = {
    "empty.jpg": (b"", "is empty"),
    "text.jpg": (b"hello, I am not an image", "not an image"),
    "zeros.png": (bytes(1000), "not an image"),
    "bare.png": (b"\x89PNG\r\n\x1a\n", "a PNG picture, which is damaged"),
    "cut.png": (PNG[: len(PNG) // 2], "damaged or cut short"),
    "cut.jpg": (encoded(Image.fromarray(RGB), "JPEG")[:-200], "damaged or cut short"),
    "huge.png": (png_header(50_000, 50_000), "178 million"),
    "postscript.png": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "a PostScript file, which is not read here",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_sentence_that_names_it(tmp_path, name):
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=said) as caught:
        read_image(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=said):
        read_image(content)


def test_an_image_above_the_limit_is_refused_even_where_pillows_own_is_off(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="50000x50000"):
        read_image(png_header(50_000, 50_000))


def test_a_damaged_exif_block_does_not_spoil_the_image():
    data = encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\x00\x00" + b"\xff" * 40)
    assert read_image(data).shape == RGB.shape


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path / "none.jpg", "no file"),
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "regular"),
    ):
        with pytest.raises(ImageError, match=said):
            read_image(path)
    with pytest.raises(ImageError):
        read_image("nul\0byte")
    with pytest.raises(ImageError):
        read_image("x" * 5000)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_an_array_of_another_kind_is_refused(array):
    with pytest.raises(ImageError, match="RGB uint8"):
        read_image(array)


def names(sources):
    return [source.path.name for source in sources]


def test_arguments_are_expanded_in_order_and_each_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.jpg", "clip.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.png").write_bytes(b"x")
    assert names(expand(["."])) == ["a.png", "b.JPG"]
    assert names(expand(["b.JPG", ".", str(tmp_path / "a.png")])) == ["b.JPG", "a.png"]
    assert names(expand(["*"])) == ["a.png", "b.JPG", "clip.mp4"]
    assert names(expand(["**/*.png"])) == ["a.png", "c.png"]
    assert [source.video for source in expand(["clip.mp4", "a.png"])] == [True, False]
    assert names(expand(["missing.jpg"])) == ["missing.jpg"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    (tmp_path / "a[1].png").write_bytes(b"x")
    assert names(expand([str(tmp_path / "a[1].png")])) == ["a[1].png"]


def test_a_folder_without_images_gives_its_arrays(tmp_path):
    for name in ("b.npz", "a.NPZ", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    sources = expand([str(tmp_path)])
    assert [(source.path.name, source.arrays, source.video) for source in sources] == [
        ("a.NPZ", True, False),
        ("b.npz", True, False),
    ]
    (tmp_path / "c.png").write_bytes(b"")
    assert [source.path.name for source in expand([str(tmp_path)])] == ["c.png"]


def test_a_folder_or_pattern_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="no image in the folder"):
        expand([str(tmp_path)])
    with pytest.raises(InputError, match="matches"):
        expand([str(tmp_path / "*.jpg")])


@pytest.mark.parametrize("length", range(1, 20))
def test_a_file_of_a_few_bytes_is_no_image(length):
    for start in (
        b"\0\0\0\x1cftypavif\0\0\0\0avif",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"II*\0\x08\0\0\0\x01\0",
        b"\x89PNG\r\n\x1a\n",
    ):
        with pytest.raises(ImageError):
            read_image(start[:length])
