"""Class maps with boundaries, against a look around every pixel; and losses that can be trained on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.segmentation_losses import class_names, class_target, segmentation_losses


def slowly(masks, labels, categories, width):
    """The definition, pixel by pixel."""
    _, height, columns = masks.shape
    owner = np.zeros((height, columns), int)
    for number, mask in enumerate(masks, 1):
        owner[mask > 0] = number
    target = np.zeros((height, columns), int)
    reach = width // 2
    for y in range(height):
        for x in range(columns):
            around = owner[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
            if len(set(around[around > 0].tolist())) > 1:
                target[y, x] = categories + 1
            elif owner[y, x]:
                target[y, x] = labels[owner[y, x] - 1] + 1
    return target


@given(seed=st.integers(0, 10**6), objects=st.integers(0, 5), width=st.sampled_from([1, 3, 5]))
@settings(max_examples=40, deadline=None)
def test_the_class_map_is_what_a_look_around_every_pixel_gives(seed, objects, width):
    rng = np.random.default_rng(seed)
    masks = np.zeros((objects, 14, 17), np.uint8)
    for mask in masks:
        y, x = rng.integers(0, 12), rng.integers(0, 15)
        mask[y : y + rng.integers(1, 8), x : x + rng.integers(1, 8)] = 1
    labels = rng.integers(0, 2, objects)
    assert np.array_equal(class_target(masks, labels, 2, width), slowly(masks, labels, 2, width))


def test_classes_are_background_categories_and_boundary():
    assert class_names(("nucleus",)) == ("background", "nucleus", "boundary")


def test_losses_fall_to_nothing_where_the_model_is_right():
    target = torch.zeros(1, 16, 16, dtype=torch.int64)
    target[:, 4:12, 4:12] = 1
    target[:, 8, 4:12] = 2
    right = torch.nn.functional.one_hot(target, 3).permute(0, 3, 1, 2).float() * 30

    def model(logits):
        return lambda images: {"logits": logits}

    good = segmentation_losses(model(right), torch.zeros(1, 3, 16, 16), target)
    bad = segmentation_losses(model(-right), torch.zeros(1, 3, 16, 16), target)
    assert float(sum(good.values())) == pytest.approx(0, abs=0.02)
    assert float(sum(bad.values())) > 1
