"""Preprocessing is MMDetection's: the same sizes, the same pixels, padding at the right and the bottom."""

import cv2
import numpy as np
import pytest

from meta_deploy.bundle.manifest import Edges, Fit, Preprocess, Stretch
from meta_deploy.imaging.preprocess import Preprocessor
from tests.bundles_by_hand import input_spec

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def preprocessor(resize, largest=(64, 96), smallest=None, divisor=32, **rules):
    spec = input_spec(smallest or largest, largest, largest, batch=(1, 1, 8), divisor=divisor)
    return Preprocessor(spec, Preprocess(resize=resize, mean=MEAN, std=STD, **rules))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def mmcv_size(height, width, long, short):
    """mmcv.rescale_size with a (long, short) scale."""
    factor = min(long / max(height, width), short / min(height, width))
    return int(height * float(factor) + 0.5), int(width * float(factor) + 0.5)


@pytest.mark.parametrize(
    "size", [(480, 640), (640, 480), (427, 640), (1, 1), (3000, 17), (800, 1333), (33, 33)]
)
def test_edges_gives_the_sizes_of_mmcv(size):
    placed = preprocessor(Edges(long=1333, short=800), (1344, 1344), (32, 32)).place(*size)
    assert placed.resized == tuple(max(1, edge) for edge in mmcv_size(*size, 1333, 800))


def test_edges_never_exceeds_what_the_bundle_takes():
    placed = preprocessor(Edges(long=1333, short=800), (512, 1024), (32, 32)).place(480, 640)
    assert placed.resized == (512, 683)


def test_fit_keeps_the_ratio_within_the_size():
    place = preprocessor(Fit(size=(64, 96))).place
    assert place(100, 100).resized == (64, 64)
    assert place(50, 100).resized == (48, 96)
    assert place(10_000, 1).resized == (64, 1)
    assert place(1, 10_000).resized == (1, 96)


def test_pixels_are_resized_normalized_and_padded():
    image = noise(40, 100)
    batch, (placed,) = preprocessor(Fit(size=(64, 96)), pad_value=7)([image])
    assert batch.shape == (1, 3, 64, 96)
    assert batch.dtype == np.float32
    assert placed.resized == (38, 96)
    resized = cv2.resize(image, (96, 38), interpolation=cv2.INTER_LINEAR).astype(np.float64)
    expected = ((resized - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(batch[0, :, :38], expected, atol=1e-5)
    assert (batch[0, :, 38:] == 7).all()


def test_stretch_gives_exactly_its_size_and_a_scale_for_each_axis():
    image = noise(40, 100)
    batch, (placed,) = preprocessor(Stretch(size=(64, 96)))([image])
    assert (placed.resized, placed.scale) == ((64, 96), (0.96, 1.6))
    resized = cv2.resize(image, (96, 64), interpolation=cv2.INTER_LINEAR).astype(np.float64)
    np.testing.assert_allclose(batch[0], ((resized - MEAN) / STD).transpose(2, 0, 1), atol=1e-5)


def test_bgr_turns_the_channels_round_and_mean_and_std_are_in_its_order():
    image = noise(64, 96)
    batch, _ = preprocessor(Fit(size=(64, 96)), channels="bgr")([image])
    expected = (image[:, :, ::-1].astype(np.float64) - MEAN) / STD
    np.testing.assert_allclose(batch[0], expected.transpose(2, 0, 1), atol=1e-5)


def test_an_image_of_the_right_size_is_not_resampled():
    image = noise(64, 96)
    batch, (placed,) = preprocessor(Fit(size=(64, 96)))([image])
    np.testing.assert_allclose(batch[0], ((image - np.array(MEAN)) / STD).transpose(2, 0, 1), atol=1e-5)
    assert placed.scale == (1.0, 1.0)


def test_the_scale_is_what_the_rounded_size_makes_it():
    placed = preprocessor(Fit(size=(64, 96))).place(427, 640)
    assert placed.scale == (96 / 640, 64 / 427)


def test_a_dynamic_input_is_padded_to_the_divisor_and_at_least_to_its_least_size():
    dynamic = preprocessor(Fit(size=(256, 256)), (256, 256), (64, 64))
    assert dynamic([noise(256, 130)])[0].shape == (1, 3, 256, 160)
    assert dynamic([noise(10, 256)])[0].shape == (1, 3, 64, 256)


def test_a_batch_of_different_images_is_padded_to_a_common_size():
    dynamic = preprocessor(Fit(size=(256, 256)), (256, 256), (32, 32))
    images = [noise(256, 128), noise(100, 256, 1)]
    batch, placed = dynamic(images)
    assert batch.shape == (2, 3, 256, 256)
    alone, _ = dynamic(images[1:])
    np.testing.assert_array_equal(batch[1, :, :128], alone[0])
    assert (batch[1, :, 128:] == 0).all()
    assert [p.resized for p in placed] == [(256, 128), (100, 256)]


def test_the_input_image_is_left_as_it_was_even_with_odd_strides():
    image = noise(64, 96)
    before = image.copy()
    mirrored = image[:, ::-1]
    run = preprocessor(Fit(size=(32, 48)), (32, 64))
    np.testing.assert_array_equal(run([mirrored])[0], run([mirrored.copy()])[0])
    np.testing.assert_array_equal(image, before)
