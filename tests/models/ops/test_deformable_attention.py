"""Deformable attention against the paper's equation in numpy, float64, one sample at a time."""

import math

import numpy as np
import pytest
import torch

from meta_deploy.models.ops.deformable_attention import DeformableAttention, reference_points
from tests.models import references as ref


def bilinear(image, x, y):
    """A map (d, H, W) at pixel coordinates, the centre of pixel 0 at 0; zero outside."""
    _, H, W = image.shape
    total = np.zeros(image.shape[0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < H and 0 <= column < W:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[:, row, column]
    return total


def attend(state, query, centres, feature, sizes, heads, points):
    """Deformable DETR, eq. 3: (Q, C), reference points (Q, 2) from 0 to 1, (N, C) -> (Q, C)."""
    levels = len(sizes)
    offsets = ref.linear(query, state, "sampling_offsets").reshape(-1, heads, levels, points, 2)
    weights = ref.linear(query, state, "attention_weights").reshape(-1, heads, levels * points)
    weights = ref.softmax(weights).reshape(-1, heads, levels, points)
    values = ref.linear(feature, state, "value_proj").reshape(len(feature), heads, -1)
    out = np.zeros((len(query), heads, values.shape[2]))
    start = 0
    for level, (h, w) in enumerate(sizes):
        maps = values[start : start + h * w].reshape(h, w, heads, -1)
        start += h * w
        for q, head, point in np.ndindex(len(query), heads, points):
            x, y = centres[q] * (w, h) + offsets[q, head, level, point] - 0.5
            sample = bilinear(maps[:, :, head].transpose(2, 0, 1), x, y)
            out[q, head] += weights[q, head, level, point] * sample
    return ref.linear(out.reshape(len(query), -1), state, "output_proj")


def centres(sizes):
    return np.concatenate(
        [[((x + 0.5) / w, (y + 0.5) / h) for y in range(h) for x in range(w)] for h, w in sizes]
    )


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize(
    ("queries", "sizes"),
    [([(2, 3)], [(4, 6), (2, 3), (1, 1)]), ([(4, 2), (2, 1), (1, 1)], [(2, 1)]), ([(3, 5)], [(5, 2)])],
    ids=["injector", "extractor", "odd sizes"],
)
def test_deformable_attention_is_the_papers_equation(queries, sizes, ratio):
    torch.manual_seed(0)
    model = DeformableAttention(8, heads=2, levels=len(sizes), points=3, ratio=ratio).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
        model.sampling_offsets.bias.mul_(4)  # many samples lie partly or wholly outside
    query = torch.randn(2, sum(h * w for h, w in queries), 8, dtype=torch.float64)
    feature = torch.randn(2, sum(h * w for h, w in sizes), 8, dtype=torch.float64)
    actual = model(query, reference_points(queries, query), feature, sizes).detach().numpy()
    state = ref.numpy_state(model)
    for b in range(2):
        expected = attend(state, query[b].numpy(), centres(queries), feature[b].numpy(), sizes, 2, 3)
        np.testing.assert_allclose(actual[b], expected, rtol=0, atol=1e-12)


def test_reference_points_are_the_centres_of_pixels():
    sizes = [(2, 3), (1, 4)]
    points = reference_points(sizes, torch.zeros(1, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(points, 2 * centres(sizes) - 1, atol=1e-15)


def test_a_new_layer_averages_pixels_around_the_query():
    """Offsets on a square of growing radius, equal weights: a constant map stays what it is inside."""
    model = DeformableAttention(8, heads=4, levels=1, points=2).double()
    offsets = model.sampling_offsets.bias.detach().reshape(4, 2, 2)
    assert offsets.abs().amax(dim=-1).flatten().tolist() == pytest.approx([1, 2] * 4)
    sizes = [(7, 7)]
    feature = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 49, 8)
    out = model(torch.zeros(1, 49, 8).double(), reference_points(sizes, feature), feature, sizes)
    expected = model.output_proj(model.value_proj(feature[:, :1]))
    torch.testing.assert_close(out[:, 24:25], expected)  # the middle one; at the border samples are outside


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = DeformableAttention(8, heads=2, levels=1, points=2)
    query = torch.randn(1, 6, 8)
    model(query, reference_points([(2, 3)], query), torch.randn(1, 6, 8), [(2, 3)]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
