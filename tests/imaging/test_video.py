"""Videos: every frame upright, with its number and time; what is cut is said; no other file is opened."""

import io
import os
from fractions import Fraction

import av
import numpy as np
import pytest

from meta_deploy.errors import ImageError
from meta_deploy.imaging.video import Video, VideoWriter
from tests.videos_by_hand import turned, write_clip


def frames_of(path):
    with Video(path) as video:
        return list(video)


def frames_and_problem(path):
    frames = []
    with Video(path) as video, pytest.raises(ImageError) as caught:  # noqa: PT012
        for frame in video:
            frames.append(frame)
    return frames, str(caught.value)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "mpeg4", "yuv420p"),
        ("a.mp4", "libx264", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.mov", "prores", "yuv422p10le"),
        ("a.mpg", "mpeg2video", "yuv420p"),
    ],
)
def test_a_video_gives_its_frames_as_rgb_with_numbers_and_times(tmp_path, name, codec, pix_fmt):
    frames = frames_of(write_clip(tmp_path / name, codec=codec, pix_fmt=pix_fmt, rate=25))
    assert [frame.index for frame in frames] == list(range(10))
    np.testing.assert_allclose([float(frame.time) for frame in frames], np.arange(10) / 25, atol=1e-3)
    for i, frame in enumerate(frames):
        assert (frame.image.shape, frame.image.dtype) == ((48, 64, 3), np.uint8)
        assert abs(frame.image[30:, 30:].mean() - 20 * i) < 6
        assert frame.image[4, 4, 0] > 200 > 80 > frame.image[4, 4, 2]  # red is red


@pytest.mark.parametrize(("angle", "corner"), [(90, (4, -4)), (180, (-4, -4)), (270, (-4, 4))])
def test_a_turned_video_is_upright(tmp_path, angle, corner):
    image = frames_of(turned(write_clip(tmp_path / "a.mp4"), angle))[0].image
    assert image.shape == ((48, 64, 3) if angle == 180 else (64, 48, 3))
    assert image[corner][0] > 200
    assert image[..., 0].mean() < 40


def test_a_variable_rate_keeps_its_times(tmp_path):
    times = [0, 10, 20, 300, 310, 900, 1000, 1500, 1501, 2000]
    frames = frames_of(write_clip(tmp_path / "a.mp4", codec="libx264", times=times))
    np.testing.assert_allclose([float(frame.time) for frame in frames], np.array(times) / 1000, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.avi", "mpeg4"), ("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")]
)
def test_of_a_cut_video_what_is_there_is_given_and_the_rest_is_told(tmp_path, name, codec):
    content = write_clip(tmp_path / name, 50, (240, 320), codec).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 7 // 10])
    frames, problem = frames_and_problem(tmp_path / name)
    assert 5 < len(frames) < 50
    assert [frame.index for frame in frames] == list(range(len(frames)))
    assert problem.startswith(
        f"{len(frames)} of 50 frames of '{tmp_path / name}' could be read: it is cut short"
    )


def test_lost_frames_are_counted_and_the_others_keep_their_numbers(tmp_path):
    write_clip(tmp_path / "a.mp4", 10, codec="mjpeg", pix_fmt="yuvj420p")
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    starts = [i for i in range(len(content) - 3) if content[i : i + 3] == b"\xff\xd8\xff"]
    content[starts[4] : starts[5]] = bytes(starts[5] - starts[4])
    (tmp_path / "a.mp4").write_bytes(content)
    frames, problem = frames_and_problem(tmp_path / "a.mp4")
    assert [frame.index for frame in frames] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert float(frames[4].time) == pytest.approx(0.5)
    assert "9 of 10 frames" in problem


def test_a_video_that_breaks_off_in_the_middle_is_told(tmp_path):
    content = bytearray(write_clip(tmp_path / "a.mkv", 100, (96, 128), "libx264").read_bytes())
    for i in range(len(content) // 2, len(content) * 6 // 10):
        content[i] = content[i] * 7 % 256
    (tmp_path / "a.mkv").write_bytes(content)
    frames, problem = frames_and_problem(tmp_path / "a.mkv")
    assert f"{len(frames)} of 100 frames" in problem


def boxes(*kinds):
    return b"".join((8 + 100).to_bytes(4, "big") + kind + bytes(100) for kind in kinds)


JPEG = b"\xff\xd8\xff\xe0" + bytes(500)
PLAYLIST = "a playlist that names other files, not a video"
BAD = {
    "empty.mp4": (b"", "is empty"),
    "text.mp4": (b"hello " * 100, "not a video that can be read"),
    "cut.mp4": (boxes(b"ftyp", b"mdat"), "the moov box, is missing"),
    "short.mp4": (boxes(b"ftyp", b"mdat")[:150], "66 bytes are missing at the end"),
    "still.mp4": (JPEG, "a JPEG picture, not a video; rename it"),
    "concat.mp4": (b"ffconcat version 1.0\nfile 'a.mp4'\n", PLAYLIST),
    "list.mp4": (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n", PLAYLIST),
    "session.mp4": (b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n", PLAYLIST),
    "dash.mp4": (b"<?xml version='1.0'?>\n<MPD type='static'><BaseURL>a.mp4</BaseURL></MPD>", PLAYLIST),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_video_is_named_and_opens_no_other_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "a.mp4")
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=said) as caught:
        Video(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_video_is_refused(tmp_path):
    for path in (
        tmp_path / "none.mp4",
        tmp_path,
        "http://127.0.0.1:1/a.mp4",
        "concat:a.mp4|b.mp4",
        "nul\0.mp4",
    ):
        with pytest.raises(ImageError, match=r"no file|cannot read"):
            Video(path)


def test_sound_alone_and_a_codec_without_decoder_are_named(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        sound.sample_rate = 44100
        out.mux(stream.encode(sound))
        out.mux(stream.encode(None))
    with pytest.raises(ImageError, match="holds no video, only sound"):
        Video(tmp_path / "sound.mp4")
    content = write_clip(tmp_path / "a.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(content.replace(b"FMP4", b"QQQQ"))
    with pytest.raises(ImageError, match="codec 'QQQQ' that no decoder is there for"):
        Video(tmp_path / "a.avi")


@pytest.mark.parametrize("name", ["a:b.mp4", "a%04d.mp4", "-a.mp4", "file:a.mp4", "pipe:0.mp4", "[a]*.mp4"])
def test_a_name_is_only_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.rename(write_clip(tmp_path / "plain.mp4", 3), name)
    assert len(frames_of(name)) == 3


def test_a_name_that_is_no_text_is_read(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.mp4")
    os.rename(write_clip(tmp_path / "plain.mp4", 3), name)
    assert len(frames_of(name)) == 3


@pytest.mark.parametrize("rate", [66.667, 100.123, 24000 / 1001, 1000, 0.5])
def test_any_rate_is_written_and_read_again(tmp_path, rate):
    step = 1 / Fraction(rate).limit_denominator(100_000)
    stream = io.BytesIO()
    writer = VideoWriter(stream, rate)
    for i in range(8):
        writer.write(np.full((48, 64, 3), 20 * i, np.uint8), i * step, step)
    writer.close()
    (tmp_path / "a.mp4").write_bytes(stream.getvalue())
    with Video(tmp_path / "a.mp4") as video:
        frames = list(video)
        assert video.fps == pytest.approx(rate, rel=1e-5)
    assert [frame.time for frame in frames] == [i * step for i in range(8)]
    assert abs(frames[5].image.mean() - 100) < 6


def test_times_and_the_last_frames_duration_stay(tmp_path):
    times = [Fraction(t, 1000) for t in (0, 10, 500, 2000)]
    stream = io.BytesIO()
    writer = VideoWriter(stream, 25)
    for time in times:
        writer.write(np.zeros((48, 64, 3), np.uint8), time, Fraction(1, 2))
    writer.close()
    (tmp_path / "a.mp4").write_bytes(stream.getvalue())
    with Video(tmp_path / "a.mp4") as video:
        assert [frame.time for frame in video] == times
        assert video._promised() == 2.5


@pytest.mark.parametrize("size", [(1, 1), (33, 97), (16, 9000), (2, 17000)])
def test_any_size_is_written(tmp_path, size):
    stream = io.BytesIO()
    writer = VideoWriter(stream, 10)
    for i in range(2):
        writer.write(np.full((*size, 3), 100, np.uint8), Fraction(i, 10))
    writer.close()
    (tmp_path / "a.mp4").write_bytes(stream.getvalue())
    shape = frames_of(tmp_path / "a.mp4")[1].image.shape
    shrink = -(-max(size) // 16384)
    assert all(0 <= made - max(1, edge // shrink) <= 1 for made, edge in zip(shape, size, strict=False))


@pytest.mark.parametrize("room", [50, 3000])
def test_a_full_disk_is_an_error(room):
    class Full(io.BytesIO):
        def write(self, content):
            if self.tell() + len(content) > room:
                raise OSError(28, "No space left on device")
            return super().write(content)

    noise = np.random.default_rng(0)
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012
        writer = VideoWriter(Full(), 10)
        for i in range(30):
            writer.write(noise.integers(0, 256, (240, 320, 3), np.uint8), Fraction(i, 10))
        writer.close()


def test_high_dynamic_range_is_said(tmp_path):
    options = {"x265-params": "transfer=16:colorprim=9:colormatrix=9:log-level=none"}
    path = write_clip(tmp_path / "a.mkv", 2, codec="libx265", pix_fmt="yuv420p10le", options=options)
    with Video(path) as video:
        assert "HDR (PQ)" in video.warning
        assert len(list(video)) == 2


@pytest.mark.parametrize("gap", [3600, 86_400])
def test_a_time_lapse_keeps_its_times(gap):
    stream = io.BytesIO()
    writer = VideoWriter(stream, 1 / gap)
    for k in range(4):
        writer.write(np.full((16, 16, 3), 50 * k, np.uint8), Fraction(k * gap), Fraction(gap))
    writer.close()
    with av.open(io.BytesIO(stream.getvalue())) as container:
        times = [float(frame.time) for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, [0, gap, 2 * gap, 3 * gap], rtol=1e-3)
