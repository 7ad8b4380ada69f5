"""Tiles cover an image, and what they see of it joins into what is there."""

import itertools
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meta_deploy.errors import InputError
from meta_deploy.tasks import get_task
from meta_deploy.tasks.detection import Detections
from meta_deploy.tasks.masks import Mask
from meta_deploy.tasks.semantic_segmentation import Segmentation
from meta_deploy.tasks.tiles import Tile, tiles_of

DETECTION, INSTANCES = get_task("detection"), get_task("instance-segmentation")
CLASSES = ("a", "b")


@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    side=st.integers(2, 40),
    overlap=st.integers(0, 39),
)
@settings(max_examples=200, deadline=None)
def test_tiles_cover_every_pixel_and_neighbours_share_the_overlap(size, side, overlap):
    overlap = min(overlap, side - 1)
    tiles = tiles_of(size, side, overlap)
    seen = np.zeros(size, int)
    for tile in tiles:
        assert tile.of(seen).shape == (min(side, size[0]), min(side, size[1]))
        tile.of(seen)[:] += 1
    assert seen.min() == 1
    for spans in ({(t.top, t.bottom) for t in tiles}, {(t.left, t.right) for t in tiles}):
        for first, second in itertools.pairwise(sorted(spans)):
            assert first[1] - second[0] >= overlap


def test_millions_of_tiles_are_refused():
    with pytest.raises(InputError, match="49000000 tiles of 16 pixels, more than 10000"):
        tiles_of((7015, 7015), 16, 15)


@given(seed=st.integers(0, 10**6), side=st.integers(3, 20), overlap=st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_class_maps_of_tiles_join_into_the_whole_map(seed, side, overlap):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 40, 2).tolist())
    labels = rng.integers(0, 9, size).astype(np.int16)
    tiles = tiles_of(size, side, min(overlap, side - 1))
    parts = [Segmentation(tile.of(labels), CLASSES) for tile in tiles]
    joined = get_task("semantic-segmentation").join(size, tiles, parts)
    assert joined.labels.dtype == np.int16
    assert np.array_equal(joined.labels, labels)


def test_in_an_overlap_each_tile_gives_the_half_far_from_its_border():
    tiles = tiles_of((4, 16), 10, 4)
    parts = [Segmentation(np.full((4, 10), k, np.int16), CLASSES) for k in (1, 2)]
    joined = get_task("semantic-segmentation").join((4, 16), tiles, parts)
    assert joined.labels[0].tolist() == [1] * 8 + [2] * 8


def view(owner, tile, masks=True):
    """What a perfect model gives for one tile of a map of objects: parts of at least four pixels."""
    part = tile.of(owner)
    boxes, segments, labels = [], [], []
    for k in np.unique(part[part > 0]):
        mask = part == k
        if mask.sum() >= 4:
            rows, columns = np.nonzero(mask)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            segments.append(Mask.from_full(mask))
            labels.append(int(k) % 2)
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    scores = np.linspace(0.9, 0.5, len(boxes)).astype(np.float32)
    kept = tuple(segments) if masks else None
    return Detections(part.shape, boxes, scores, np.array(labels, np.int32), CLASSES, kept)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_objects_of_tiles_join_into_the_objects_of_the_image(seed):
    """Blobs of all sizes, larger than a tile too, apart from each other by two pixels at least."""
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(30, 120, 2).tolist())
    noise = cv2.GaussianBlur(rng.standard_normal(size), (0, 0), rng.uniform(2, 6))
    blobs = (noise > np.quantile(noise, 0.7)).astype(np.uint8)
    blobs = cv2.morphologyEx(blobs, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    owner = cv2.connectedComponents(blobs)[1]
    tiles = tiles_of(size, 40, 16)
    joined = INSTANCES.join(size, tiles, [view(owner, tile) for tile in tiles])
    expected = {mask.tobytes() for mask in view(owner, Tile(0, 0, *size)).masks}
    assert {mask.tobytes() for mask in joined.masks} == expected
    assert len(joined) == len(expected)
    for box, mask in zip(joined.boxes, joined.masks, strict=True):
        rows, columns = np.nonzero(mask)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert (np.diff(joined.scores) <= 0).all()


def test_an_object_seen_twice_is_kept_as_the_tile_that_sees_it_whole():
    tiles = [Tile(0, 0, 40, 40), Tile(0, 30, 40, 70)]
    whole = Detections((40, 40), np.array([[22, 5, 36, 20]], np.float32), *arrays([0.6], [0]))
    cut = Detections((40, 40), np.array([[0, 5, 7, 20]], np.float32), *arrays([0.9], [0]))
    joined = DETECTION.join((40, 70), tiles, [whole, cut])
    assert joined.boxes.tolist() == [[22, 5, 36, 20]]
    assert joined.scores.tolist() == pytest.approx([0.6])  # how sure the other is of a part tells nothing


def test_a_part_joins_the_whole_object_that_is_most_like_it_and_lifts_no_other():
    """Something unsure and large around an object covers its part best, and is not the object for it."""
    tiles = [Tile(0, 0, 40, 40), Tile(0, 30, 40, 70)]
    boxes = np.array([[22, 4, 36, 19], [20, 0, 38, 30]], np.float32)
    whole = Detections((40, 40), boxes, *arrays([0.55, 0.1], [0, 0]))
    cut = Detections((40, 40), np.array([[0, 5, 7, 20]], np.float32), *arrays([0.9], [0]))
    joined = DETECTION.join((40, 70), tiles, [whole, cut])
    assert joined.boxes.tolist() == boxes.tolist()
    assert joined.scores.tolist() == pytest.approx([0.55, 0.1])


def test_other_classes_and_neighbours_stay_apart():
    tiles = [Tile(0, 0, 40, 40), Tile(0, 30, 40, 70)]
    first = Detections((40, 40), np.array([[31, 5, 38, 12]], np.float32), *arrays([0.9], [0]))
    second = Detections(
        (40, 40), np.array([[1, 5, 8, 12], [1, 14, 8, 21]], np.float32), *arrays([0.8, 0.7], [1, 0])
    )
    assert len(DETECTION.join((40, 70), tiles, [first, second])) == 3


def test_a_part_of_a_whole_object_is_dropped_though_it_was_taken_for_another_class():
    tiles = [Tile(0, 0, 40, 40), Tile(0, 30, 40, 70)]
    whole = Detections((40, 40), np.array([[22, 5, 37, 20]], np.float32), *arrays([0.6], [0]))
    part = Detections((40, 40), np.array([[0, 5, 7, 20]], np.float32), *arrays([0.9], [1]))
    joined = DETECTION.join((40, 70), tiles, [whole, part])
    assert joined.labels.tolist() == [0]
    assert joined.boxes.tolist() == [[22, 5, 37, 20]]
    inner = Detections((40, 40), np.array([[33, 8, 37, 12]], np.float32), *arrays([0.6], [0]))
    assert len(DETECTION.join((40, 70), tiles, [inner, part])) == 2  # what is small on it stays


def arrays(scores, labels):
    return np.array(scores, np.float32), np.array(labels, np.int32), CLASSES


def test_tiles_without_objects_join_into_none():
    tiles = tiles_of((50, 50), 30, 10)
    nothing = [view(np.zeros((50, 50), int), tile) for tile in tiles]
    joined = INSTANCES.join((50, 50), tiles, nothing)
    assert (len(joined), joined.boxes.shape, joined.segments) == (0, (0, 4), ())


def test_an_object_through_very_many_tiles_takes_the_memory_of_one_image():
    size = (1200, 1200)
    tiles = tiles_of(size, 100, 20)
    whole = np.ones(size, int)
    parts = [view(whole, tile) for tile in tiles]
    tracemalloc.start()
    joined = INSTANCES.join(size, tiles, parts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [mask.area for mask in joined.segments] == [1200 * 1200]
    assert peak < 8 * 1200 * 1200  # of 225 tiles
