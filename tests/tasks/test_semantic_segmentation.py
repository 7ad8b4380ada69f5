"""Class maps come back to the original image as MMSegmentation brings them back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from meta_deploy.imaging.preprocess import Placement
from meta_deploy.tasks.semantic_segmentation import class_map


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
