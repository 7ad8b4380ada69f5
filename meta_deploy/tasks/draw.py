"""Overlays: masks, boxes, names and scores on an image, legible at any size and on any background.

Knows pixels and arrays; must not know the results that they are parts of.
"""

from __future__ import annotations

import colorsys
import functools
import itertools
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from meta_deploy.tasks.masks import Mask

SMALLEST = 384  # an image whose longer side is less is enlarged before drawing, or no name could be read
TINT = 0.45
MOST_SHOWN = 1000  # characters of a name; a picture is some 200 wide
PALETTE = 96
FIRST = (0.15, 0.55, 1.0)  # the colour of class 0: a blue that shows on skin, grass and asphalt
Color = tuple[int, int, int]
Rect = tuple[int, int, int, int]


def class_color(label: int) -> Color:
    """The RGB colour of a class: always the same for a label, and far from those of the labels before it."""
    return _palette()[label % PALETTE]


@functools.cache
def _palette() -> tuple[Color, ...]:
    """Vivid colours, each as far as can be from all before it (in CIELAB, where distance is as seen)."""
    shades = itertools.product(range(0, 360, 6), (0.55, 0.8, 1.0), (0.65, 0.85, 1.0))
    rgb = np.array([colorsys.hsv_to_rgb(hue / 360, s, v) for hue, s, v in shades], np.float32)
    lab = cv2.cvtColor(rgb[None], cv2.COLOR_RGB2LAB)[0]
    chosen = [int(np.argmin(np.abs(rgb - FIRST).sum(1)))]
    nearest = np.full(len(rgb), np.inf)
    while len(chosen) < PALETTE:
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(nearest)))
    red, green, blue = np.rint(rgb[chosen] * 255).astype(int).T.tolist()
    return tuple(zip(red, green, blue, strict=True))


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    segments: Sequence[Mask] | None = None,
) -> np.ndarray:
    """Masks, boxes (N, 4) xyxy, names and scores on a copy of an RGB uint8 image (H, W, 3).

    `labels` (N,) choose the colours. The copy is larger by a whole factor where the image's longer side is
    under SMALLEST pixels.
    """
    factor = _factor(image)
    canvas = _enlarged(image, factor)
    width = _line_width(canvas)
    boxes = np.rint(boxes * factor).astype(int)
    # The smallest last, on top of what surrounds them.
    order = np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")
    if segments is not None:
        masks = ((segments[i], class_color(labels[i])) for i in order)
        canvas = _draw_masks(canvas, masks, factor, width)
    for i in order:
        _outline(canvas, boxes[i], class_color(labels[i]), width)
    texts = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    best_first = np.argsort(-scores, kind="stable")
    return _label(
        canvas,
        [(texts[i], _rect(boxes[i]), class_color(labels[i])) for i in best_first],
    )


def draw_segmentation(image: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """An RGB uint8 image (H, W, 3) tinted by the classes of `labels` (H, W), borders drawn, with a legend.

    Enlarged as in `draw_detections`.
    """
    factor = _factor(image)
    canvas = _enlarged(image, factor)
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    labels = _enlarged(labels, factor)
    table = np.array([class_color(i) for i in range(len(classes))], np.uint8)
    mixed = cv2.addWeighted(canvas, 1 - TINT, table[labels], TINT, 0)
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    thick = cv2.dilate(border.view(np.uint8), np.ones((_line_width(canvas),) * 2, np.uint8)).view(bool)
    mixed[thick] = table[labels[thick]]
    largest_first = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
    return _legend(mixed, [(classes[i], class_color(i)) for i in largest_first])


def _factor(image: np.ndarray) -> int:
    return max(1, -(-SMALLEST // max(image.shape[:2])))


def _enlarged(array: np.ndarray, factor: int) -> np.ndarray:
    """A contiguous copy, each pixel repeated `factor` times both ways."""
    if factor == 1:
        return np.array(array, order="C")
    return np.ascontiguousarray(array.repeat(factor, axis=0).repeat(factor, axis=1))


def _line_width(canvas: np.ndarray) -> int:
    return max(2, round(min(canvas.shape[:2]) / 300))


def _font(canvas: np.ndarray) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(max(12, round(max(canvas.shape[:2]) / 52)))
    assert isinstance(font, ImageFont.FreeTypeFont)  # what Pillow gives for a size
    return font


def _rect(box: np.ndarray) -> Rect:
    return int(box[0]), int(box[1]), int(box[2]), int(box[3])


def _draw_masks(
    canvas: np.ndarray, masks: Iterable[tuple[Mask, Color]], factor: int, width: int
) -> np.ndarray:
    """The canvas tinted and contoured; where masks overlap, a pixel has the colour of the last alone."""
    layer = canvas.copy()
    outlines: list[tuple[Sequence[np.ndarray], tuple[int, int], Color]] = []
    for mask, color in masks:
        if not mask.area:
            continue
        crop = _enlarged(mask.crop(), factor)
        top, left = mask.top * factor, mask.left * factor
        layer[top : top + crop.shape[0], left : left + crop.shape[1]][crop] = color
        contours, _ = cv2.findContours(crop.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        outlines.append((contours, (left, top), color))
    mixed = cv2.addWeighted(canvas, 1 - TINT, layer, TINT, 0)
    for contours, offset, color in outlines:
        cv2.drawContours(mixed, contours, -1, color, max(1, width - 1), cv2.LINE_AA, offset=offset)
    return mixed


def _outline(canvas: np.ndarray, box: np.ndarray, color: Color, width: int) -> None:
    """A box in its colour between two thin dark lines, so that it shows on any background."""
    height, right = canvas.shape[0] - 1, canvas.shape[1] - 1
    x0, y0, x1, y1 = (
        int(np.clip(v, 0, limit)) for v, limit in zip(box, (right, height, right, height), strict=True)
    )
    cv2.rectangle(canvas, (x0, y0), (x1, y1), (20, 20, 20), width + 2)
    cv2.rectangle(canvas, (x0, y0), (x1, y1), color, width)


def _label(canvas: np.ndarray, labels: list[tuple[str, Rect, Color]]) -> np.ndarray:
    """Write each text at its box: inside the picture, and clear of the others where there is room."""
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    font = _font(canvas)
    pad = max(2, round(font.size / 6))
    ascent, descent = font.getmetrics()
    height = ascent + descent + 2 * pad
    placed: list[tuple[str, Rect, Color]] = []
    for text, box, color in labels:
        text = _shortened(text, font, picture.width - 2 * pad)
        size = (round(font.getlength(text)) + 2 * pad, height)
        rect = _free_place(_places(box, size, picture.size), [other for _, other, _ in placed])
        placed.append((text, rect, color))
    for text, rect, color in reversed(placed):
        draw.rectangle((rect[0], rect[1], rect[2] - 1, rect[3] - 1), fill=color)
        draw.text((rect[0] + pad, rect[1] + pad), text, font=font, fill=_ink(color))
    return np.array(picture)


def _places(box: Rect, size: tuple[int, int], picture: tuple[int, int]) -> Iterable[Rect]:
    """Where a label of this size may stand, the best first, all within the picture."""
    x0, y0, x1, y1 = box
    width, height = size
    rows = (y0 - height, y0, y1 - height, y1, (y0 + y1 - height) // 2)
    columns = (x0, x1 - width, (x0 + x1 - width) // 2)
    spots = [(x, y) for x in columns for y in rows]
    away = (sign * step * height for step in range(1, 9) for sign in (1, -1))  # stacked, ever farther
    spots += [(x, y0 + step) for step in away for x in (x0, x0 - width, x1)]
    for x, y in spots:
        left = min(max(x, 0), max(picture[0] - width, 0))
        top = min(max(y, 0), max(picture[1] - height, 0))
        yield left, top, left + width, top + height


def _free_place(places: Iterable[Rect], taken: list[Rect]) -> Rect:
    """The first place that covers no other label, else the one that covers least."""
    best: tuple[int, Rect] | None = None
    for place in places:
        covered = sum(_common_area(place, other) for other in taken)
        if best is None or covered < best[0]:
            best = covered, place
        if covered == 0:
            break
    assert best is not None
    return best[1]


def _common_area(a: Rect, b: Rect) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _shortened(text: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """The text on one line, its name cut with an ellipsis where it is wider than `room` pixels."""
    text = " ".join(text.split())
    name, _, score = text.rpartition(" ")
    if len(name) <= 1 or font.getlength(text) <= room:
        return text
    return _longest(name[:-1], f"… {score}", font, room)


def _ink(color: Color) -> Color:
    """Black or white, whichever reads better on the colour."""
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return (0, 0, 0) if luminance > 120 else (255, 255, 255)


def _legend(canvas: np.ndarray, entries: list[tuple[str, Color]]) -> np.ndarray:
    """A panel in the top left corner: a swatch and the name of each class, the largest areas first."""
    picture = Image.fromarray(canvas)
    font = _font(canvas)
    pad = max(2, round(font.size / 4))
    line = sum(font.getmetrics()) + pad
    shown = entries[: max(1, (picture.height - 2 * pad) // line)]
    names = [_cut(name, font, picture.width - line - 3 * pad) for name, _ in shown]
    width = round(max(font.getlength(name) for name in names)) + line + 3 * pad
    panel = picture.crop((0, 0, width, line * len(shown) + pad))
    panel = Image.blend(panel, Image.new("RGB", panel.size, (16, 16, 16)), 0.75)
    draw = ImageDraw.Draw(panel)
    for row, (name, (_, color)) in enumerate(zip(names, shown, strict=True)):
        top = pad + row * line
        draw.rectangle((pad, top, pad + line - pad, top + line - pad - 1), fill=color)
        draw.text((line + pad, top), name, font=font, fill=(255, 255, 255))
    picture.paste(panel, (0, 0))
    return np.array(picture)


def _cut(name: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    name = " ".join(name.split())
    if font.getlength(name) <= room:
        return name
    return _longest(name, "…", font, room)


def _longest(name: str, end: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """The most of the name's start, one character at least, that with `end` fits `room` pixels."""
    least, most = 1, min(len(name), MOST_SHOWN)
    while least < most:
        middle = (least + most + 1) // 2
        if font.getlength(name[:middle].rstrip() + end) <= room:
            least = middle
        else:
            most = middle - 1
    return name[:least].rstrip() + end
