"""Videos made by hand: frame i is grey of 20 i (or as told), at the times that are told."""

from fractions import Fraction

import av
import numpy as np


def write_clip(
    path,
    frames=10,
    size=(48, 64),
    codec="mpeg4",
    rate=10,
    pix_fmt="yuv420p",
    times=None,
    options=None,
):
    """Write a video of `size` (height, width). `times` are milliseconds."""
    height, width = size
    rate = Fraction(rate).limit_denominator(100_000)
    with av.open(
        str(path), "w", container_options={"movflags": "faststart"} if "mp4" in str(path) else {}
    ) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        base = Fraction(1, 1000) if times else 1 / rate
        if times:
            stream.codec_context.time_base = base
        for i in range(frames):
            pixels = np.full((height, width, 3), 20 * i % 256, np.uint8)
            pixels[: height // 4, : width // 4] = 255, 0, 0  # which corner is the first
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = (times[i] if times else i), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def turned(path, angle):
    """Give an MP4 file a display matrix that turns it by 90, 180 or 270 degrees clockwise."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of other fields
    one = 1 << 16
    a, b = {90: (0, one), 180: (-one, 0), 270: (0, -one)}[angle]
    for place, value in enumerate((a, b, 0, -b, a, 0, 0, 0, 1 << 30)):
        content[at + 4 * place : at + 4 * place + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    return path
