"""What a file is by its content, for those that are not read here or bear another format's suffix.

Knows the first bytes of formats; must not know how any of them is decoded.
"""

from __future__ import annotations

import re

HEAD = 512  # bytes that are enough to tell

_CONVERT = "convert it to PNG, TIFF or JPEG first"
_RAW = ("a camera's raw file", "develop it to TIFF or JPEG first, with rawpy")
_PLAYLIST = ("a playlist that names other files", "name those files themselves")
_PICTURE = "rename it, so that it is taken for a picture"
_VIDEO = "rename it with that suffix, so that it is taken for a video"

# (offset, first bytes, what it is, what to do)
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\xff\xd8\xff", "a JPEG picture", _PICTURE),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture", _PICTURE),
    (0, b"GIF8", "a GIF picture", _PICTURE),
    (8, b"WEBP", "a WebP picture", _PICTURE),
    (0, b"II\x55\x00", *_RAW),
    (0, b"IIRO", *_RAW),
    (0, b"IIRS", *_RAW),
    (0, b"FUJIFILMCCD-RAW", *_RAW),
    (8, b"CR\x02\x00", *_RAW),
    (0, b"II*\x00", "a TIFF picture", _PICTURE),
    (0, b"MM\x00*", "a TIFF picture", _PICTURE),
    (0, b"BM", "a BMP picture", _PICTURE),
    (0, b"\xff\x0a", "a JPEG XL picture", f"{_CONVERT}, with djxl"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture", f"{_CONVERT}, with djxl"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture", _CONVERT),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 picture", _CONVERT),
    (128, b"DICM", "a DICOM file", "export its pictures to 16-bit PNG or TIFF first, with pydicom"),
    (344, b"n+1\0", "a NIfTI volume", "export its slices to TIFF or PNG first, with nibabel"),
    (344, b"ni1\0", "a NIfTI header", "export the volume's slices to TIFF or PNG first, with nibabel"),
    (0, b"\x1f\x8b", "a gzip archive (.nii.gz, .svgz, .tar.gz)", "unpack it first"),
    (0, b"%PDF", "a PDF document", "turn its pages into PNG first, with pdftoppm"),
    (0, b"%!PS", "a PostScript file", "turn it into PNG first, with Ghostscript"),
    (0, b"8BPS", "a Photoshop document", _CONVERT),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR picture", _CONVERT),
    (0, b"#?RADIANCE", "a Radiance HDR picture", _CONVERT),
    (0, b"SIMPLE  =", "a FITS file", "convert it to TIFF first, with astropy"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", "export its pictures to TIFF or PNG first, with h5py"),
    (0, b"\x93NUMPY", "a NumPy array", "save it as a PNG or TIFF"),
    (0, b"PK\x03\x04", "a ZIP archive", "unpack it first"),
    (0, b"AT&TFORM", "a DjVu document", _CONVERT),
    (0, b"version https://git-lfs", "a Git LFS pointer and not the file itself", "run git lfs pull"),
    (0, b"ffconcat", *_PLAYLIST),
    (0, b"#EXTM3U", *_PLAYLIST),
    (0, b"v=0", *_PLAYLIST),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video (.mkv, .webm)", _VIDEO),
    (8, b"AVI ", "an AVI video (.avi)", _VIDEO),
    (0, b"\0\0\x01\xba", "an MPEG video (.mpg)", _VIDEO),
    (8, b"WAVE", "a sound file", "give a picture or a video"),
    (0, b"ID3", "a sound file", "give a picture or a video"),
    (0, b"OggS", "an Ogg file", "convert it to MP4 or MKV first"),
    (0, b"FLV\x01", "a Flash video", "convert it to MP4 or MKV first"),
)  # fmt: skip
# Major brands of ISO files (ISO/IEC 14496-12), which say what the "ftyp" box begins.
_BRANDS: tuple[tuple[str, str, str], ...] = (
    ("hei[cmsxf]|hev[cmsx]|mif[12]|msf1|mic1", "a HEIC picture", f"{_CONVERT}, with heif-convert"),
    ("avi[fso]", "an AVIF picture", f"{_CONVERT}, or install a Pillow with AVIF support"),
    ("crx ", *_RAW),
    ("M4[ABP] ", "a sound file", "give a picture or a video"),
    (".{4}", "an MP4 or QuickTime video (.mp4, .mov)", _VIDEO),
)  # fmt: skip
_TEXTS: tuple[tuple[str, str, str], ...] = (
    (r"(<\?xml[^>]*>|<!--.*?-->|<!DOCTYPE svg[^>]*>|\s)*<svg\b", "an SVG drawing", "turn it into PNG first"),
    (r"(<\?xml[^>]*>|\s)*<MPD\b", *_PLAYLIST),
    (r"<!DOCTYPE html|<html", "an HTML page", "get the picture itself"),
)  # fmt: skip


def described(head: bytes) -> str | None:
    """A file's kind by its first HEAD bytes, and what to do: "a HEIC picture; convert …". None: unknown."""
    if head[4:8] == b"ftyp" and len(head) >= 12:  # else it is cut short
        brand = head[8:12].decode("latin-1")
        if brand in ("mif1", "msf1") and b"avif" in head[16:64]:
            brand = "avif"
        return next(f"{what}; {remedy}" for form, what, remedy in _BRANDS if re.fullmatch(form, brand, re.S))
    for offset, magic, what, remedy in _SIGNATURES:
        if head.startswith(magic, offset):
            return f"{what}; {remedy}"
    text = head.decode("latin-1").removeprefix("\xef\xbb\xbf").lstrip()
    for form, what, remedy in _TEXTS:
        if re.match(form, text, re.I | re.S):
            return f"{what}; {remedy}"
    return None
