"""Many inputs: in order, each once, errors in their place, and only a few read before they are needed."""

import threading
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from meta_deploy import Predictor
from meta_deploy.errors import ImageError
from meta_deploy.imaging import images
from meta_deploy.imaging.sources import Source
from meta_deploy.imaging.video import TimedFrame
from meta_deploy.runtime import stream
from meta_deploy.runtime.stream import predict, read_ahead


@pytest.fixture
def sources(tmp_path):
    """Twelve images of rising brightness, the fourth of which is broken."""
    paths = [tmp_path / f"{i:02}.png" for i in range(12)]
    for i, path in enumerate(paths):
        Image.new("RGB", (64, 64), (100 + 10 * i,) * 3).save(path)
    paths[3].write_bytes(b"broken")
    return [Source(path, False) for path in paths]


@pytest.mark.parametrize("batch", [1, 3, 4, 20])
def test_results_come_in_order_with_errors_in_their_place(bundles, sources, batch):
    with Predictor(bundles / "detector-dynamic") as predictor:
        frames = list(predict(predictor, sources, batch))
    assert [frame.source for frame in frames] == sources
    assert [i for i, frame in enumerate(frames) if frame.error] == [3]
    for i, frame in enumerate(frames):
        if i != 3:
            assert frame.result.path == str(sources[i].path)
            assert round(float(frame.result.scores[0]) * 255) == 100 + 10 * i


def test_only_a_few_images_are_held_at_a_time(sources):
    read = []
    frames = read_ahead(sources, depth=2, read=read.append)
    next(frames)
    assert len(read) <= 3
    frames.close()
    assert len(read) <= 3


def test_stopping_early_leaves_no_thread(sources):
    frames = read_ahead(sources, depth=2)
    next(frames)
    frames.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


def test_a_video_that_breaks_off_gives_its_frames_and_then_the_error(monkeypatch, tmp_path):
    class Broken:
        fps, warning = 5.0, None

        def __init__(self, path):
            pass

        def __iter__(self):
            yield TimedFrame(np.zeros((8, 8, 3), np.uint8), 0, Fraction(0), None)
            raise ImageError("the rest is missing")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(stream, "Video", Broken)
    frames = list(read_ahead([Source(tmp_path / "a.mp4", True)], depth=2))
    assert [(frame.index, frame.result) for frame in frames] == [(0, None), (0, None)]
    assert "missing" in str(frames[1].error)


def test_a_large_image_is_held_reduced_and_read_again_for_its_pixels(bundles, tmp_path, monkeypatch):
    ramp = np.linspace(0, 900, 640 * 640).reshape(640, 640).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "LARGE", 1000)
    with Predictor(bundles / "detector-dynamic", depth=10) as predictor:
        (frame,) = predict(predictor, [Source(tmp_path / "a.png")])
    assert frame.picture.reduced
    assert frame.picture.size == frame.result.size == (640, 640)
    assert frame.notes == ()
    np.testing.assert_array_equal(frame.image[..., 0], ramp >> 2)
