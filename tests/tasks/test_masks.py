"""Masks are pasted as MMDetection pastes them; run lengths hold them exactly, and give pycocotools' RLE."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from meta_deploy.tasks.masks import Mask, paste_mask


def reference_rle(mask):
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(bool, st.tuples(st.integers(0, 6), st.integers(0, 6))),
    *[st.integers(0, 3) for _ in range(4)],
)
def test_any_crop_anywhere_is_kept_and_encoded_as_pycocotools_does(crop, top, left, below, right):
    size = (top + crop.shape[0] + below or 1, left + crop.shape[1] + right or 1)
    mask = Mask.from_crop(crop, top, left, size)
    whole = np.zeros(size, bool)
    whole[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    np.testing.assert_array_equal(mask.crop(), crop)
    np.testing.assert_array_equal(mask.full(), whole)
    assert mask.area == whole.sum()
    assert mask.rle() == reference_rle(whole)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 8), st.integers(1, 8))))
def test_a_whole_mask_comes_back(whole):
    np.testing.assert_array_equal(Mask.from_full(whole).full(), whole)


def test_a_large_mask_is_small_in_memory():
    rows, columns = np.ogrid[:2000, :3000]
    disc = (rows - 1000) ** 2 + (columns - 1500) ** 2 < 900**2
    assert Mask.from_full(disc).runs.nbytes < disc.nbytes / 300


@pytest.mark.parametrize("value", [True, False])
def test_a_uniform_mask_is_encoded(value):
    whole = np.full((5, 7), value)
    assert Mask.from_crop(whole, 0, 0, (5, 7)).rle() == reference_rle(whole)


def mmdet_paste(mask, box, height, width):
    """MMDetection's _do_paste_mask (skip_empty=True, as on the CPU), whole image, before the threshold."""
    x0, y0, x1, y1 = (torch.tensor(float(edge)) for edge in box)
    x0_int, y0_int = (torch.clamp(edge.floor() - 1, min=0).int().item() for edge in (x0, y0))
    x1_int = torch.clamp(x1.ceil() + 1, max=width).int().item()
    y1_int = torch.clamp(y1.ceil() + 1, max=height).int().item()
    if x1_int <= x0_int or y1_int <= y0_int:
        return np.zeros((height, width), np.float32)
    img_y = (torch.arange(y0_int, y1_int, dtype=torch.float32) + 0.5 - y0) / (y1 - y0) * 2 - 1
    img_x = (torch.arange(x0_int, x1_int, dtype=torch.float32) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack(torch.meshgrid(img_y, img_x, indexing="ij")[::-1], dim=-1)
    pasted = F.grid_sample(torch.from_numpy(mask)[None, None], grid[None], align_corners=False)[0, 0]
    whole = np.zeros((height, width), np.float32)
    whole[y0_int:y1_int, x0_int:x1_int] = pasted.numpy()
    return whole


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(-20, 80),
    st.floats(-20, 60),
    st.floats(0.5, 120),
    st.floats(0.5, 120),
    st.sampled_from([0.5, 0.3]),
)
def test_masks_are_pasted_as_mmdetection_pastes_them(seed, x0, y0, width, height, threshold):
    mask = np.random.default_rng(seed).random((28, 28), np.float32)
    box = np.array([x0, y0, x0 + width, y0 + height], np.float32)
    reference = mmdet_paste(mask, box, 64, 96)
    ours = paste_mask(mask, box, (64, 96), threshold).full()
    sure = np.abs(reference - threshold) > 1e-4
    np.testing.assert_array_equal(ours[sure], reference[sure] >= threshold)


def test_a_full_mask_fills_its_box():
    ours = paste_mask(np.ones((28, 28), np.float32), np.array([10, 5, 30, 25]), (64, 96), 0.5)
    assert ours.area == 20 * 20
    assert ours.full()[5:25, 10:30].all()
