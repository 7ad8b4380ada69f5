"""Windows of a map and back: against loops over single tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meta_deploy.models.backbones.windows import count, divides, merge, partition

shapes = st.tuples(*[st.integers(1, 3)] + [st.integers(1, 11)] * 2 + [st.integers(1, 3)])
windows = st.tuples(st.integers(1, 7), st.integers(1, 7))


def brute_force_partition(x, window):
    """Every token looked up by its place; what lies outside the map is zero."""
    B, H, W, C = x.shape
    h, w = window
    out = []
    for b in range(B):
        for top in range(0, H, h):
            for left in range(0, W, w):
                places = [(y, x_) for y in range(top, top + h) for x_ in range(left, left + w)]
                out.append([x[b, y, x_] if y < H and x_ < W else np.zeros(C) for y, x_ in places])
    return np.array(out)


def numbered(shape):
    return torch.arange(1, np.prod(shape) + 1, dtype=torch.float64).reshape(*shape)


@settings(max_examples=60, deadline=None)
@given(shapes, windows)
def test_partition_puts_every_token_in_its_place_and_zeros_elsewhere(shape, window):
    x = numbered(shape)
    np.testing.assert_array_equal(partition(x, window).numpy(), brute_force_partition(x.numpy(), window))


@settings(max_examples=60, deadline=None)
@given(shapes, windows)
def test_merge_undoes_partition(shape, window):
    x = numbered(shape)
    assert torch.equal(merge(partition(x, window), window, shape[:3]), x)


def test_windows_come_row_by_row():
    x = torch.arange(16).reshape(1, 4, 4, 1)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert partition(x, (2, 2))[..., 0].tolist() == expected


def test_stripes_are_windows_as_long_as_the_map():
    x = torch.arange(12).reshape(1, 3, 4, 1)
    assert partition(x, (1, 4))[..., 0].tolist() == x[0, ..., 0].tolist()
    assert partition(x, (3, 1))[..., 0].tolist() == x[0, ..., 0].T.tolist()


def test_a_window_larger_than_the_map_holds_all_of_it_and_padding():
    tokens = partition(torch.ones(2, 2, 3, 5), (4, 4))
    assert tokens.shape == (2, 16, 5)
    assert tokens.sum() == 2 * 2 * 3 * 5


def test_merge_drops_what_the_padding_became():
    tokens = partition(torch.zeros(1, 3, 5, 1), (2, 4)) + 7
    assert torch.equal(merge(tokens, (2, 4), (1, 3, 5)), torch.full((1, 3, 5, 1), 7.0))


@pytest.mark.parametrize(
    ("size", "window", "answer"), [(8, 4, True), (8, 3, False), (2, 4, False), (5, 1, True)]
)
def test_divides(size, window, answer):
    assert divides(size, window) is answer


def test_of_a_size_known_only_at_run_time_it_is_told_what_always_divides_it():
    answers = []

    class Probe(torch.nn.Module):
        def forward(self, x):
            n = 4 * x.shape[1]
            if not isinstance(n, int):
                rows = [count(n, window) for window in (1, 4, 8, n)]
                assert [isinstance(row, int) for row in rows] == [False, False, False, rows[3] == 1]
                answers.append([divides(n, window) for window in (1, 4, 8, 3, n)])
            return x + 1

    dynamic = {"x": {1: torch.export.Dim("n", min=2, max=64)}}
    program = torch.export.export(Probe(), (torch.zeros(1, 6),), dynamic_shapes=dynamic, strict=False)
    assert answers
    assert all(answer == [True, True, False, False, True] for answer in answers)
    program.module()(torch.zeros(1, 7))  # asking has not narrowed what it takes


def test_gradients_of_padding_are_dropped():
    x = torch.rand(1, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: merge(partition(x, (2, 4)) ** 2, (2, 4), (1, 3, 5)), x)
