"""Class maps come back to the original image as MMSegmentation brings them back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from meta_deploy.errors import InputError
from meta_deploy.imaging.preprocess import Placement
from meta_deploy.tasks.semantic_segmentation import averaged_class_map, class_map
from meta_deploy.tasks.tiles import windows_of


@pytest.mark.parametrize(
    ("original", "resized", "padded"),
    [
        ((100, 150), (64, 96), (64, 96)),
        ((37, 21), (64, 36), (64, 64)),
        ((64, 64), (64, 64), (64, 64)),
        ((1, 1), (64, 64), (64, 64)),
    ],
)
def test_class_maps_are_those_of_torch_interpolate(original, resized, padded):
    logits = np.random.default_rng(0).normal(size=(5, padded[0] // 4, padded[1] // 4)).astype(np.float32)
    up = F.interpolate(torch.from_numpy(logits)[None].double(), padded, mode="bilinear", align_corners=False)
    up = up[:, :, : resized[0], : resized[1]]
    scores = F.interpolate(up, original, mode="bilinear", align_corners=False)[0].numpy()
    ours = class_map(logits, Placement(original, resized), padded)
    assert ours.shape == original
    best = np.sort(scores, axis=0)
    sure = best[-1] - best[-2] > 1e-4
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(ours[sure], scores.argmax(0)[sure])


def test_equal_logits_give_the_first_class():
    assert (
        class_map(np.zeros((3, 16, 16), np.float32), Placement((100, 200), (50, 100)), (64, 64)) == 0
    ).all()


@pytest.mark.parametrize(
    ("resized", "original", "step"),
    [
        ((64, 150), (128, 300), 43),
        ((64, 64), (64, 64), 43),
        ((64, 65), (30, 31), 64),
        ((90, 64), (90, 64), 1),
    ],
)
def test_windows_are_averaged_as_by_torch(resized, original, step):
    """MMSegmentation's `slide_inference`, written out: windows' logits padded into place, summed, divided."""
    windows = windows_of(resized, (64, 64), step)
    rng = np.random.default_rng(1)
    logits = [rng.normal(size=(3, 16, 16)).astype(np.float32) for _ in windows]
    total, count = torch.zeros(1, 3, *resized).double(), torch.zeros(*resized)
    given = iter(logits)
    for y in range(-(-(resized[0] - 64) // step) + 1):
        for x in range(-(-(resized[1] - 64) // step) + 1):
            bottom, right = min(y * step + 64, resized[0]), min(x * step + 64, resized[1])
            crop = torch.from_numpy(next(given))[None].double()
            up = F.interpolate(crop, (64, 64), mode="bilinear", align_corners=False)
            total += F.pad(up, (right - 64, resized[1] - right, bottom - 64, resized[0] - bottom))
            count[bottom - 64 : bottom, right - 64 : right] += 1
    scores = F.interpolate(total / count, original, mode="bilinear", align_corners=False)[0].numpy()
    best = np.sort(scores, axis=0)
    sure = best[-1] - best[-2] > 1e-4
    assert sure.mean() > 0.99
    ours = averaged_class_map(logits, windows, resized, original)
    assert ours.shape == original
    np.testing.assert_array_equal(ours[sure], scores.argmax(0)[sure])


def test_a_long_image_has_no_more_windows_than_memory_bears():
    assert [window.left for window in windows_of((512, 704), (512, 512), 341)] == [0, 192]
    assert [window.left for window in windows_of((512, 1194), (512, 512), 341)] == [0, 341, 682]
    with pytest.raises(InputError, match=r"293 windows of 512x512 .* resized to 100000x512"):
        windows_of((512, 100_000), (512, 512), 341)
