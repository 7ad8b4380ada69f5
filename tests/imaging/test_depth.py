"""Samples of more than 8 bits come out at the brightness that is meant, or it is said that nobody knows."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from meta_deploy.errors import ImageError, InputError
from meta_deploy.imaging.images import ImageWarning, load, read_image

RAMP = np.linspace(0, 1, 20 * 30).reshape(20, 30)
EIGHT = np.round(RAMP * 255).astype(int)


def tiff(array, **tags):
    """An uncompressed TIFF of one strip, tags by number: `t262=0`."""
    kinds = {"u": 1, "i": 2, "f": 3}
    samples = array.shape[2] if array.ndim == 3 else 1
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    entries = {256: array.shape[1], 257: array.shape[0], 259: 1, 262: 2 if samples > 1 else 1, 273: 0,
               277: samples, 278: array.shape[0], 279: len(data), 258: 8 * array.itemsize,
               339: kinds[array.dtype.kind]}  # fmt: skip
    entries |= {int(name[1:]): value for name, value in tags.items()}
    directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\x00\x08\x00\x00\x00")
    for tag, value in entries.items():
        directory[tag] = (value,) * samples if tag in (258, 339) else value
    # Pillow makes of the strip's offset 0 the end of the directory.
    return b"II*\x00\x08\x00\x00\x00" + directory.tobytes(8) + data


def png(array, significant=None):
    content = cv2.imencode(".png", array)[1].tobytes()
    if significant is None:
        return content
    chunk = b"sBIT" + bytes([significant] * (1 if array.ndim == 2 else 3))
    return (
        content[:33]
        + struct.pack(">I", len(chunk) - 4)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + content[33:]
    )


def check(content, said, expected=EIGHT, atol=1, **options):
    picture = load(content, **options)
    assert picture.pixels.dtype == np.uint8
    grey = picture.pixels[..., 0].astype(int)
    np.testing.assert_allclose(grey, expected, atol=atol)
    assert [note.value for note in picture.notes] == ([said] if said else [])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("form", [png, tiff])
def test_the_range_of_the_values_tells_the_depth(bits, form):
    values = np.floor(RAMP * (2**bits - 1)).astype(np.uint16)
    check(form(values), f"{bits} bits")
    check(form(np.dstack([values] * 3)), f"{bits} bits")


def test_a_few_hot_pixels_do_not_make_a_picture_dark():
    values = np.tile(np.floor(RAMP * 4095).astype(np.uint16), (20, 20))
    values[5, 7:10] = 65535
    picture = load(png(values))
    assert [note.value for note in picture.notes] == ["12 bits"]
    values[5, 7:10] = 4095
    np.testing.assert_array_equal(picture.pixels[..., 0], values >> 4)


def test_a_picture_that_pillow_has_opened_is_the_file(tmp_path):
    values = np.floor(RAMP * 4095).astype(np.uint16)
    for name, content in (("a.png", png(values)), ("a.tif", tiff(values))):
        (tmp_path / name).write_bytes(content)
        with Image.open(tmp_path / name) as opened:
            np.testing.assert_array_equal(load(opened).pixels, load(tmp_path / name).pixels)


@pytest.mark.parametrize("depth", [1, 17])
def test_a_depth_that_the_samples_cannot_have_is_refused(depth):
    with pytest.raises(ImageError, match=f"16-bit integers, which a depth of {depth}"):
        load(png(np.floor(RAMP * 4095).astype(np.uint16)), depth)


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_keep_their_order(channels):
    values = np.zeros((20, 30, channels), np.uint16)
    values[..., 2], values[..., 1] = 4000, 2000  # OpenCV's order: red is last
    assert load(png(values)).pixels[0, 0].tolist() == [4000 >> 4, 2000 >> 4, 0]


def test_a_declared_depth_is_taken():
    dark = np.floor(RAMP * 900).astype(np.uint16)
    check(png(dark, significant=12), "12 bits", dark >> 4)
    check(tiff(dark, t281=4095), "12 bits", dark >> 4)
    check(tiff(dark, t281=65535), None, dark >> 8)
    check(tiff(dark), "10 bits", dark >> 2)
    full = np.floor(RAMP * 65535).astype(np.uint16)  # as PNG wants significant bits: at the top
    check(png(full, significant=12), None, full >> 8)


def test_depth_can_be_set():
    dark = np.floor(RAMP * 900).astype(np.uint16)
    check(tiff(dark, t281=4095), None, dark >> 2, depth=10)
    check(png(dark), None, dark >> 8, depth=16)
    check(png(dark), "8 bits", np.minimum(dark, 255), depth=8)
    assert "of its samples above 8 bits" in load(png(dark), 8).notes[0].text
    for depth in (0, 33, True, 12.0, "12"):
        with pytest.raises(InputError, match="depth must be"):
            read_image(png(dark), depth)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_may_be_zero(dtype):
    most = 255 if dtype == np.uint8 else 4095
    values = np.floor(RAMP * most).astype(dtype)
    check(tiff(values, t262=0), None if dtype == np.uint8 else "12 bits", 255 - EIGHT)


def test_signed_and_wide_integers():
    check(tiff((RAMP * 4000 - 1000).astype(np.int16)), "its own range")
    check(tiff(np.floor(RAMP * 4095).astype(np.int16)), "12 bits")
    check(tiff(np.floor(RAMP * 65535).astype(np.int32)), "16 bits")
    check(tiff(np.floor(RAMP * (2**24 - 1)).astype(np.uint32)), "24 bits")
    check(tiff((RAMP * 65535 - 32768).astype(np.int16)), None, depth=16)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("most", "said"), [(1, "0 to 1"), (255, "8 bits"), (65535, "16 bits"), (2, "its own range")]
)
def test_floats(dtype, most, said):
    check(tiff((RAMP * most).astype(dtype)), said)


def test_floats_that_are_no_numbers_are_black_and_said():
    values = (RAMP * 0.9).astype(np.float32)
    values[0, 0], values[0, 1], values[0, 2] = np.nan, np.inf, -np.inf
    picture = load(tiff(values))
    assert picture.pixels[0, :3].max() == 0
    assert picture.pixels[-1, -1, 0] == 229
    assert "not finite (NaN or infinite)" in picture.notes[0].text


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(2, np.uint8), (2, np.uint16), (3, np.uint8), (3, np.int16), (4, np.uint16), (5, np.float32)],
)
def test_channels_that_are_no_colours_are_refused(channels, dtype):
    content = tiff(np.stack([EIGHT] * channels, -1).astype(dtype), t262=1)
    with pytest.raises(ImageError, match=f"has {channels} channels and is not RGB; save one of them, or an"):
        load(content)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_planes_are_not_taken_for_interleaved_samples(dtype):
    planes = np.stack([EIGHT, EIGHT[::-1], 255 - EIGHT]).astype(dtype)
    content = tiff(planes.reshape(20, 30, 3), t284=2)
    with pytest.raises(ImageError, match=r"stores 3 channels one after the other, .* save them interleaved"):
        load(content)
    load(tiff(planes[0], t284=2))  # one plane is one plane


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_floats_without_a_number_are_refused(value):
    with pytest.raises(ImageError, match="no finite number"):
        load(tiff(np.full((4, 4), value, np.float32)))


@pytest.mark.parametrize("step", [257, 256])
@pytest.mark.parametrize("form", [png, tiff])
@pytest.mark.parametrize("most", [255, 60, 3])
def test_8_bits_scaled_up_to_16_come_back_however_dim(step, form, most):
    grey = np.round(RAMP * most).astype(np.uint16)
    check(form(grey * step), None, grey, atol=0)


def test_the_line_of_a_depth_names_the_option():
    for values in (RAMP * 4095).astype(np.uint16), RAMP.astype(np.float32), (RAMP - 0.5).astype(np.float32):
        (note,) = load(tiff(values)).notes
        assert "--depth (in Python depth=)" in note.text


@pytest.mark.parametrize("form", [png, tiff])
def test_deep_pictures_that_are_cut_short_are_said_to_be(form):
    content = form(np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16))
    for share in (0.5, 0.9):
        with pytest.raises(ImageError, match="is cut short; get the file again"):
            load(content[: int(share * len(content))])


def test_what_cannot_be_read_is_named():
    with pytest.raises(ImageError, match="16-bit float samples"):
        read_image(tiff(RAMP.astype(np.float16)))


def test_8_bits_are_left_alone():
    grey = EIGHT.astype(np.uint8)
    check(tiff(grey // 8), None, grey // 8, atol=0)
    check(png(grey // 8), None, grey // 8, atol=0)


def test_a_page_is_chosen_and_said():
    pages = [Image.fromarray((EIGHT + i).astype(np.uint8)) for i in (0, 0, 0)]
    out = io.BytesIO()
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:])
    check(out.getvalue(), "first", atol=0)


def test_read_image_warns_with_the_files_name(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(np.floor(RAMP * 4095).astype(np.uint16)))
    with pytest.warns(
        ImageWarning, match=r"a\.tif' holds 16-bit data taken as 12 bits, by its values up to 4095"
    ):
        read_image(tmp_path / "a.tif")


NAMED = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "AVIF": b"\0\0\0\x18ftypavis\0\0\0\0mif1avis",
    "JPEG XL": b"\xff\x0a" + bytes(50),
    "DICOM": bytes(128) + b"DICM",
    "NIfTI": bytes(344) + b"n+1\0",
    "SVG": b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PDF": b"%PDF-1.7\n",
    "raw file": b"II*\x00\x10\x00\x00\x00CR\x02\x00" + bytes(100),
    "Photoshop": b"8BPS\0\1" + bytes(30),
    "OpenEXR": b"\x76\x2f\x31\x01" + bytes(30),
    "MP4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "HTML": b"\n<!DOCTYPE html><html></html>",
}


@pytest.mark.parametrize("kind", NAMED)
def test_a_file_of_another_kind_is_named_by_its_content(tmp_path, kind):
    (tmp_path / "a.jpg").write_bytes(NAMED[kind])
    with pytest.raises(ImageError, match=rf"a\.jpg' is an? .*{kind}.*; \w+"):
        read_image(tmp_path / "a.jpg")


def test_a_raw_files_thumbnail_is_not_taken_for_the_picture():
    grey = EIGHT.astype(np.uint8)
    for tags in ({"t254": 1, "t330": 8}, {"t50706": b"\1\4\0\0"}):
        with pytest.raises(ImageError, match="camera's raw file"):
            read_image(tiff(grey, **tags))


def test_decoders_print_nothing(tmp_path):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)).save(
        out, "TIFF", compression="tiff_lzw"
    )
    content = bytearray(out.getvalue())
    content[100:5000] = bytes(4900)
    (tmp_path / "a.tif").write_bytes(content)
    code = "import sys\nfrom meta_deploy.imaging.images import read_image\nread_image(sys.argv[1])"
    process = subprocess.run([sys.executable, "-c", code, tmp_path / "a.tif"], capture_output=True, text=True)
    assert "LZW" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith("meta_deploy.errors.ImageError")


def stored(upright, orientation):
    """What is stored of a picture, so that turning it as the orientation says gives it."""
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, *range(2, upright.ndim)),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, *range(2, upright.ndim)),
        8: np.rot90(upright, -1),
    }
    return np.ascontiguousarray(turned[orientation])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once(orientation, dtype):
    most = {np.uint8: 255, np.uint16: 4095, np.float32: 1.0}[dtype]
    for colour in (False, True):
        values = (RAMP * most).astype(dtype)
        values = np.dstack([values] * 3) if colour else values
        picture = load(tiff(stored(values, orientation), t274=orientation))
        assert picture.size == (20, 30)
        np.testing.assert_allclose(picture.pixels[..., 0], EIGHT, atol=1)


def test_a_declared_depth_that_cannot_be_says_nothing():
    values = np.floor(RAMP * 4095).astype(np.uint16)
    for content in (png(values, significant=20), png(values, significant=255), tiff(values, t341=1e30)):
        check(content, "12 bits", values >> 4)


def test_the_sign_is_no_bit_of_what_is_not_negative():
    check(tiff(np.floor(RAMP * 32767).astype(np.int16)), "15 bits")


def test_floats_beyond_all_integers_are_stretched():
    check(tiff((RAMP * 1e30).astype(np.float32)), "its own range")


def test_of_many_pages_only_the_second_is_looked_for(monkeypatch):
    stream = io.BytesIO()
    pages = [Image.fromarray(np.full((4, 4), k, np.uint8)) for k in range(5)]
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(
        TiffImagePlugin.TiffImageFile, "n_frames", property(lambda self: pytest.fail("counted"))
    )
    picture = load(stream.getvalue())
    assert [note.kind for note in picture.notes] == ["pages"]
    assert not picture.pixels.any()
