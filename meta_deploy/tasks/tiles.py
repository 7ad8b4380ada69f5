"""A large image in overlapping tiles: where they lie, and how their results become one.

Knows arrays and results; must not know bundles, back ends or files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from meta_deploy.bundle.manifest import Size
from meta_deploy.errors import InputError
from meta_deploy.tasks.masks import Mask

MOST_TILES = 10_000
MOST_WINDOWS = 256  # that slide over one image; the outputs of all are kept
SAME = 0.5  # overlap, within what two tiles both see, from which two detections are one object
COVERED = 0.8  # of a cut detection, from which it is a part of a whole one of another class
AT_BORDER = 2.0  # pixels within which a box that ends at a tile's border counts as cut by it


@dataclass(frozen=True)
class Tile:
    """A rectangle of an image in pixels; the far edges are exclusive."""

    top: int
    left: int
    bottom: int
    right: int

    def of(self, image: np.ndarray) -> np.ndarray:
        """Its pixels, a view."""
        return image[self.top : self.bottom, self.left : self.right]

    def moved(self, down: int, right: int) -> Tile:
        """The same rectangle elsewhere."""
        return Tile(self.top + down, self.left + right, self.bottom + down, self.right + right)

    def common(self, other: Tile) -> Tile | None:
        """What both see, if anything."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Tile(top, left, bottom, right) if top < bottom and left < right else None


def tiles_of(size: Size, side: int, overlap: int) -> list[Tile]:
    """Tiles of `side` pixels that cover an image of `size` (height, width), rows first.

    They are evenly spaced, and neighbours share at least `overlap` pixels, which must be less than `side`. An
    image smaller than a tile gives smaller tiles.

    Raises:
        InputError: more than MOST_TILES.
    """
    rows, columns = (_starts(length, side, overlap) for length in size)
    if len(rows) * len(columns) > MOST_TILES:
        raise InputError(
            f"an image of {size[1]}x{size[0]} gives {len(rows) * len(columns)} tiles of {side} pixels, more "
            f"than {MOST_TILES}; take larger tiles or less overlap"
        )
    return [Tile(y, x, min(y + side, size[0]), min(x + side, size[1])) for y in rows for x in columns]


def windows_of(size: Size, window: Size, step: int) -> list[Tile]:
    """Windows that slide over an image of `size`, which is no smaller than one: (height, width), rows first.

    As MMSegmentation's `slide` mode places them: `step` pixels apart, the last ones ending with the image.

    Raises:
        InputError: more than MOST_WINDOWS.
    """
    rows, columns = (
        [min(i * step, length - side) for i in range(math.ceil((length - side) / step) + 1)]
        for length, side in zip(size, window, strict=True)
    )
    if len(rows) * len(columns) > MOST_WINDOWS:
        raise InputError(
            f"{len(rows) * len(columns)} windows of {window[1]}x{window[0]} would slide over an image "
            f"resized to {size[1]}x{size[0]}, more than {MOST_WINDOWS}; take a larger step"
        )
    return [Tile(y, x, y + window[0], x + window[1]) for y in rows for x in columns]


def _starts(length: int, side: int, overlap: int) -> list[int]:
    if length <= side:
        return [0]
    count = math.ceil((length - overlap) / (side - overlap))
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


# --- class maps -------------------------------------------------------------------------------------------


def join_maps(size: Size, tiles: Sequence[Tile], maps: Sequence[np.ndarray]) -> np.ndarray:
    """Class maps of the tiles to that of the image (H, W), same dtype.

    Where tiles overlap, each gives the half that is farther from its own border, where it knows more.
    """
    whole = np.empty(size, maps[0].dtype)
    tops = sorted({(tile.top, tile.bottom) for tile in tiles})
    lefts = sorted({(tile.left, tile.right) for tile in tiles})
    rows = dict(zip(tops, _shares(tops, size[0]), strict=True))
    columns = dict(zip(lefts, _shares(lefts, size[1]), strict=True))
    for tile, labels in zip(tiles, maps, strict=True):
        y0, y1 = rows[tile.top, tile.bottom]
        x0, x1 = columns[tile.left, tile.right]
        whole[y0:y1, x0:x1] = labels[y0 - tile.top : y1 - tile.top, x0 - tile.left : x1 - tile.left]
    return whole


def _shares(spans: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Overlapping spans to spans that meet in the middle of each overlap."""
    middles = [(first[1] + second[0]) // 2 for first, second in itertools.pairwise(spans)]
    return list(zip([0, *middles], [*middles, length], strict=True))


# --- objects ----------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """An object as one tile sees it, in the image's pixels.

    Attributes:
        tile: the tile's number.
        box: (4,) float32 xyxy.
        score, label: of the detection.
        mask: its pixels, bool, and where they start, (pixels, top, left); None for a model without masks.
        cut: whether it ends at a border of the tile inside the image.
    """

    tile: int
    box: np.ndarray
    score: float
    label: int
    mask: tuple[np.ndarray, int, int] | None
    cut: bool


def is_cut(box: np.ndarray, tile: Tile, size: Size) -> bool:
    """Whether a box, in the image's pixels, ends at a border of the tile that is not the image's."""
    x0, y0, x1, y1 = box
    return bool(
        (tile.left > 0 and x0 <= tile.left + AT_BORDER)
        or (tile.top > 0 and y0 <= tile.top + AT_BORDER)
        or (tile.right < size[1] and x1 >= tile.right - AT_BORDER)
        or (tile.bottom < size[0] and y1 >= tile.bottom - AT_BORDER)
    )


def join_objects(tiles: Sequence[Tile], found: Sequence[Seen], size: Size) -> list[tuple[Seen, Mask | None]]:
    """The objects of an image of `size` from what its tiles see, each with its whole mask, by falling score.

    One that tiles see whole is as the surest of them sees it: how sure another is of a part tells nothing of
    it. One that all tiles cut is put together from what they see, at its best score.
    """
    joined = []
    for group in groups_of(tiles, found):
        parts = group if group[0].cut else group[:1]
        corners = np.array([part.box for part in parts]).reshape(-1, 2, 2)
        box = np.concatenate([corners[:, 0].min(axis=0), corners[:, 1].max(axis=0)])
        masks = [part.mask for part in parts if part.mask is not None]
        score = max(seen.score for seen in group if seen.cut == group[0].cut)
        joined.append((replace(parts[0], box=box, score=score), united(masks, size) if masks else None))
    return sorted(joined, key=lambda joint: joint[0].score, reverse=True)


def groups_of(tiles: Sequence[Tile], found: Sequence[Seen]) -> list[list[Seen]]:
    """The detections of each object, the one to start from first.

    Two tiles' detections of one class are one object where they overlap by `SAME` within what both tiles see:
    by intersection over the smaller, but over the union where there are only boxes and both are whole, since
    boxes may be nested. Each detection, whole ones first and then by falling score, joins the whole one that
    is most like it there, by intersection over union; a cut one also one of another class that covers
    `COVERED` of it, as a part tells its class badly. Cut ones for which there is none make objects among
    themselves, however many tiles they run through.
    """
    order = sorted(found, key=lambda seen: (seen.cut, -seen.score))
    pairs = _pairs(tiles, order)
    group_of = list(range(len(order)))  # the number of a group is that of its first detection
    for i, seen in enumerate(order):
        partners = pairs[i]
        whole = [(alike, -j) for j, alike in partners if not order[j].cut]
        if whole:
            group_of[i] = group_of[-max(whole)[1]]
        elif seen.cut:
            loose = {group_of[j] for j, _ in partners if order[group_of[j]].cut} | {i}
            group_of = [min(loose) if group in loose else group for group in group_of]
    groups: dict[int, list[Seen]] = {}
    for seen, group in zip(order, group_of, strict=True):
        groups.setdefault(group, []).append(seen)
    return list(groups.values())


def _pairs(tiles: Sequence[Tile], order: Sequence[Seen]) -> list[list[tuple[int, float]]]:
    """For each detection those before it that it overlaps by `SAME`, with how alike the two are."""
    boxes = np.array([seen.box for seen in order], np.float32).reshape(-1, 4)
    pairs: list[list[tuple[int, float]]] = []
    for i, seen in enumerate(order):
        x0, y0, x1, y1 = seen.box
        before = boxes[:i]
        near = (before[:, 0] < x1) & (before[:, 2] > x0) & (before[:, 1] < y1) & (before[:, 3] > y0)
        others = [j for j in np.flatnonzero(near).tolist() if order[j].tile != seen.tile]
        overlaps = [(j, *_overlap(seen, order[j], tiles)) for j in others]
        pairs.append(
            [
                (j, alike)
                for j, overlap, covered, alike in overlaps
                if (overlap >= SAME and order[j].label == seen.label)
                or (covered >= COVERED and seen.cut and not order[j].cut)
            ]
        )
    return pairs


def _overlap(a: Seen, b: Seen, tiles: Sequence[Tile]) -> tuple[float, float, float]:
    """Within what both tiles see: how far two detections are one, how much of `a` is covered by `b`, IoU."""
    window = tiles[a.tile].common(tiles[b.tile])
    if window is None:
        return 0.0, 0.0, 0.0
    if a.mask is not None and b.mask is not None:
        first, second = _within(a.mask, window), _within(b.mask, window)
        areas = [float(np.count_nonzero(pixels)) for pixels in (first, second)]
        shared = float(np.count_nonzero(first & second))
        nested = False
    else:
        low, high = (window.left, window.top), (window.right, window.bottom)
        corners = [np.clip(seen.box.reshape(2, 2), low, high) for seen in (a, b)]
        areas = [float(np.prod(corner[1] - corner[0])) for corner in corners]
        sides = np.minimum(corners[0][1], corners[1][1]) - np.maximum(corners[0][0], corners[1][0])
        shared = float(np.prod(np.maximum(sides, 0)))
        nested = not (a.cut or b.cut)
    if not min(areas):
        return 0.0, 0.0, 0.0
    union = sum(areas) - shared
    return shared / (union if nested else min(areas)), shared / areas[0], shared / union


def _within(mask: tuple[np.ndarray, int, int], window: Tile) -> np.ndarray:
    """A mask's pixels in a window: bool (h, w)."""
    pixels, top, left = mask
    out = np.zeros((window.bottom - window.top, window.right - window.left), bool)
    part = Tile(top, left, top + pixels.shape[0], left + pixels.shape[1]).common(window)
    if part is not None:
        part.moved(-window.top, -window.left).of(out)[:] = part.moved(-top, -left).of(pixels)
    return out


def united(masks: Sequence[tuple[np.ndarray, int, int]], size: Size) -> Mask:
    """Masks of one object in one: the pixels of any."""
    top, left = min(mask[1] for mask in masks), min(mask[2] for mask in masks)
    bottom = max(mask[1] + mask[0].shape[0] for mask in masks)
    right = max(mask[2] + mask[0].shape[1] for mask in masks)
    whole = np.zeros((bottom - top, right - left), bool)
    for pixels, y, x in masks:
        whole[y - top : y - top + pixels.shape[0], x - left : x - left + pixels.shape[1]] |= pixels
    return Mask.from_crop(whole, top, left, size)
