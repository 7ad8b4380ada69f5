"""Run lengths hold a mask exactly, and give the RLE that pycocotools gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from meta_deploy.tasks.masks import Mask


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
