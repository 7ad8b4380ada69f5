"""Overlays: masks, boxes, names and scores on an image, legible at any size and on any background.

Knows pixels and arrays; must not know the results that they are parts of.
"""

from __future__ import annotations

import colorsys
import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from meta_deploy.imaging.images import is_large
from meta_deploy.tasks.masks import Mask

SMALLEST = 384  # an image whose longer side is less is enlarged before drawing, or no name could be read
TINT = 0.45
STRIP = 1 << 20  # pixels that are drawn on at a time
MOST_SHOWN = 1000  # characters of a name; a picture is some 200 wide
PALETTE = 96
BACKGROUND = "background"
CROWDED = 0.1  # of the picture: more labels would hide it
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
    picture: Image.Image,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    segments: Sequence[Mask] | None = None,
) -> Image.Image:
    """Masks, boxes (N, 4) xyxy, names and scores on an RGB picture, which is drawn on and given back.

    `labels` (N,) choose the colours. A picture whose longer side is under SMALLEST pixels is not: a copy
    that is larger by a whole factor comes back. Where names and scores would cover more than CROWDED of the
    picture, there is a count of each class instead, lines are thin, masks stand without their boxes, and
    objects of one class alone have colours of their own.
    """
    factor = _factor(picture)
    picture = _enlarged_picture(picture, factor)
    width = _line_width(picture)
    boxes = np.rint(boxes * factor).astype(int)
    texts = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    crowded = _room_for(texts, picture) > CROWDED * picture.width * picture.height
    colors = labels
    if crowded:
        width = max(1, width // 2)
        if segments is not None and len(set(labels.tolist())) == 1:
            colors = np.arange(len(labels))
    # The smallest last, on top of what surrounds them.
    order = np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")
    masks = _Masks(picture, width)
    for i in order if segments is not None else ():
        assert segments is not None
        masks.add(segments[i], colors[i], factor)
    boxed = () if crowded and segments is not None else order
    for top, strip in _strips(picture):
        masks.draw(strip, top)
        for i in boxed:
            _outline(strip, top, picture.size, boxes[i], class_color(labels[i]), width)
    if crowded:
        counts = Counter(zip(names, labels.tolist(), strict=True)).most_common()
        by_class = colors is labels
        _legend(
            picture,
            [
                (f"{count} {name}", class_color(label) if by_class else None)
                for (name, label), count in counts
            ],
        )
        return picture
    best_first = np.argsort(-scores, kind="stable")
    _label(picture, [(texts[i], _rect(boxes[i]), class_color(labels[i])) for i in best_first])
    return picture


def draw_segmentation(
    picture: Image.Image, labels: np.ndarray, classes: Sequence[str], shown: Sequence[int]
) -> Image.Image:
    """An RGB picture tinted by the classes of `labels` (H, W), borders drawn, with a legend of those `shown`.

    Drawn on or enlarged as in `draw_detections`. A class called "background" is not tinted.
    """
    factor = _factor(picture)
    picture = _enlarged_picture(picture, factor)
    labels = _enlarged(labels, factor)
    table = np.array([class_color(i) for i in range(len(classes))], np.uint8)
    background = next((i for i, name in enumerate(classes) if name.lower() == BACKGROUND), -1)
    width = _line_width(picture)
    kernel = np.ones((width, width), np.uint8)
    for top, strip in _strips(picture):
        first = max(0, top - width)  # borders just outside reach in
        near = labels[first : top + len(strip) + width]
        border = np.zeros(near.shape, np.uint8)
        border[:, 1:] |= near[:, 1:] != near[:, :-1]
        border[1:] |= near[1:] != near[:-1]
        within = slice(top - first, top - first + len(strip))
        colors, thick = table[near[within]], cv2.dilate(border, kernel)[within].view(bool)
        plain = near[within] == background
        colors[plain] = strip[plain]
        cv2.addWeighted(strip, 1 - TINT, colors, TINT, 0, dst=strip)
        thick &= ~plain
        strip[thick] = colors[thick]
    _legend(picture, [(classes[i], None if i == background else class_color(i)) for i in shown])
    return picture


def _strips(picture: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """The picture's rows from the top as RGB uint8 (h, W, 3), few at a time: what is drawn on them stays."""
    rows = max(1, STRIP // picture.width)
    for top in range(0, picture.height, rows):
        strip = np.array(picture.crop((0, top, picture.width, min(top + rows, picture.height))))
        yield top, strip
        picture.paste(Image.fromarray(strip), (0, top))


def _factor(picture: Image.Image) -> int:
    return max(1, -(-SMALLEST // max(picture.size)))


def _enlarged_picture(picture: Image.Image, factor: int) -> Image.Image:
    if factor == 1:
        return picture
    size = picture.width * factor, picture.height * factor
    return picture.resize(size, Image.Resampling.NEAREST)


def _enlarged(array: np.ndarray, factor: int) -> np.ndarray:
    """Each pixel repeated `factor` times both ways."""
    return array if factor == 1 else array.repeat(factor, axis=0).repeat(factor, axis=1)


def _line_width(picture: Image.Image) -> int:
    return max(2, round(min(picture.size) / 300))


def _font(picture: Image.Image) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(max(12, round(max(picture.size) / 52)))
    assert isinstance(font, ImageFont.FreeTypeFont)  # what Pillow gives for a size
    return font


def _rect(box: np.ndarray) -> Rect:
    return int(box[0]), int(box[1]), int(box[2]), int(box[3])


class _Masks:
    """Tints and contours of a picture; where masks overlap, a pixel has the colour of the last alone.

    On a large picture they are coarser, by less than a line is wide.
    """

    def __init__(self, picture: Image.Image, width: int):
        """`width` is that of lines."""
        self._step = max(1, width // 4) if is_large(picture.size) else 1
        self._width = max(1, width - 1)
        # At every pixel, or every step, the colour's number in the palette and 1; 0: no mask.
        shape = -(-picture.height // self._step), -(-picture.width // self._step)
        self._colors = np.zeros(shape, np.uint8)
        self._contours: list[tuple[Sequence[np.ndarray], tuple[int, int], Color]] = []

    def add(self, mask: Mask, label: int, factor: int) -> None:
        """Put a mask on those before it, enlarged by `factor`."""
        if not mask.area:
            return
        step, left, top = self._step, mask.left * factor, mask.top * factor
        crop = np.ascontiguousarray(_enlarged(mask.crop(), factor)[-top % step :: step, -left % step :: step])
        left, top = -(-left // step), -(-top // step)
        self._colors[top : top + crop.shape[0], left : left + crop.shape[1]][crop] = label % PALETTE + 1
        contours, _ = cv2.findContours(crop.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        scaled = [contour * step for contour in contours]
        self._contours.append((scaled, (left * step, top * step), class_color(label)))

    def draw(self, strip: np.ndarray, top: int) -> None:
        """Tint and contour the picture's rows from `top`."""
        if not self._contours:
            return
        rows, columns = (np.arange(n) for n in strip.shape[:2])
        colors = self._colors[(rows[:, None] + top) // self._step, columns // self._step]
        tinted = colors > 0
        layer = strip.copy()
        layer[tinted] = np.array(_palette(), np.uint8)[colors[tinted] - 1]
        cv2.addWeighted(strip, 1 - TINT, layer, TINT, 0, dst=strip)
        for contours, (left, first), color in self._contours:
            offset = left, first - top
            cv2.drawContours(strip, contours, -1, color, self._width, cv2.LINE_AA, offset=offset)


def _outline(
    strip: np.ndarray, top: int, size: tuple[int, int], box: np.ndarray, color: Color, width: int
) -> None:
    """A box in its colour between two thin dark lines, so that it shows on any background.

    `strip` are the rows from `top` of a picture of `size` (width, height).
    """
    right, bottom = size[0] - 1, size[1] - 1
    x0, y0, x1, y1 = (
        int(np.clip(v, 0, limit)) for v, limit in zip(box, (right, bottom, right, bottom), strict=True)
    )
    for line, ink in ((width + 2, (20, 20, 20)), (width, color)):
        cv2.rectangle(strip, (x0, y0 - top), (x1, y1 - top), ink, line)


def _room_for(texts: Sequence[str], picture: Image.Image) -> float:
    """Pixels that labels of these texts cover, if none covers another."""
    font = _font(picture)
    return sum(_label_height(font) * (font.getlength(text[:MOST_SHOWN]) + 2 * _pad(font)) for text in texts)


def _pad(font: ImageFont.FreeTypeFont) -> int:
    return max(2, round(font.size / 6))


def _label_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics()) + 2 * _pad(font)


def _label(picture: Image.Image, labels: list[tuple[str, Rect, Color]]) -> None:
    """Write each text at its box: inside the picture, and clear of the others where there is room."""
    draw = ImageDraw.Draw(picture)
    font = _font(picture)
    pad, height = _pad(font), _label_height(font)
    placed: list[tuple[str, Rect, Color]] = []
    for text, box, color in labels:
        text = _shortened(text, font, picture.width - 2 * pad)
        size = (round(font.getlength(text)) + 2 * pad, height)
        rect = _free_place(_places(box, size, picture.size), [other for _, other, _ in placed])
        placed.append((text, rect, color))
    for text, rect, color in reversed(placed):
        draw.rectangle((rect[0], rect[1], rect[2] - 1, rect[3] - 1), fill=color)
        draw.text((rect[0] + pad, rect[1] + pad), text, font=font, fill=_ink(color))


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


def _legend(picture: Image.Image, entries: Sequence[tuple[str, Color | None]]) -> None:
    """A panel in the top left corner: a swatch, if there is a colour, and a name for each of the entries."""
    font = ImageFont.load_default(max(12, round(max(picture.size) / 80)))
    assert isinstance(font, ImageFont.FreeTypeFont)
    pad = max(2, round(font.size / 4))
    line = sum(font.getmetrics()) + pad
    shown = entries[: max(1, (picture.height - 2 * pad) // line)]
    swatch = line if any(color for _, color in shown) else pad
    names = [_cut(name, font, picture.width - swatch - 3 * pad) for name, _ in shown]
    width = round(max(font.getlength(name) for name in names)) + swatch + 3 * pad
    panel = picture.crop((0, 0, width, line * len(shown) + pad))
    panel = Image.blend(panel, Image.new("RGB", panel.size, (16, 16, 16)), 0.75)
    draw = ImageDraw.Draw(panel)
    for row, (name, (_, color)) in enumerate(zip(names, shown, strict=True)):
        top = pad + row * line
        if color:
            draw.rectangle((pad, top, line, top + line - pad - 1), fill=color)
        draw.text((swatch + pad, top), name, font=font, fill=(255, 255, 255))
    picture.paste(panel, (0, 0))


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
