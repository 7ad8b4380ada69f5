"""Procedural scenes of overlapping, textured shapes: the demo model's training and test data.

A scene is a pure function of its seed and size. Knows numpy and OpenCV, but no models and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import cv2
import numpy as np

CLASSES = ("disc", "ring", "triangle", "square", "star", "cross", "heart", "crescent")

# Who uses which scenes. Nothing that is judged on a range may have learned from it.
TEST_SEEDS = range(200)
VALIDATION_SEEDS = range(1_000, 1_050)
CALIBRATION_SEEDS = range(2_000, 2_200)
TRAINING_SEEDS = range(1_000_000, 2**31)

DIAMETER = (30.0, 150.0)  # of a shape, in pixels of a 320-pixel picture
MIN_VISIBLE = 0.3  # a shape's part that must stay uncovered and inside the picture
MAX_SHAPES = 8
SUBPIXEL_BITS = 4  # fixed-point bits of the coordinates handed to OpenCV


@dataclass(frozen=True)
class Scene:
    """An image and its ground truth, shapes ordered from back to front.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        labels: (N,) int64, indices into `CLASSES`.
        masks: (N, H, W) bool, each shape's visible pixels.
        boxes: (N, 4) float32, xyxy in pixels, tight around the visible pixels (right and bottom exclusive).
    """

    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray


def generate(seed: int, size: tuple[int, int] = (320, 320)) -> Scene:
    """Generate the scene of a seed.

    Args:
        seed: non-negative integer; the same seed and size always give the same scene.
        size: (height, width) in pixels.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    canvas = _background(rng, height, width)
    owner = np.full(size, -1, np.int16)  # which shape is seen at each pixel
    labels: list[int] = []
    areas: list[int] = []  # whole, as if nothing covered them

    scale = min(size) / 320
    for _ in range(rng.integers(1, MAX_SHAPES + 1)):
        label = int(rng.integers(len(CLASSES)))
        alpha = _shape_alpha(rng, CLASSES[label], scale * np.exp(rng.uniform(*np.log(DIAMETER))))
        corner = _free_place(rng, owner, alpha >= 0.5, areas)
        if corner is not None:
            _paint(rng, canvas, alpha, corner)
            areas.append(int((alpha >= 0.5).sum()))
            labels.append(label)

    masks = owner[None] == np.arange(len(labels), dtype=np.int16)[:, None, None]
    boxes = np.array([_tight_box(mask) for mask in masks], np.float32).reshape(-1, 4)
    return Scene(_camera(rng, canvas), np.array(labels, np.int64), masks, boxes)


def coco_dataset(seeds: Iterable[int], size: tuple[int, int] = (320, 320)) -> dict:
    """Ground truth of the scenes of `seeds` as a COCO dictionary: RLE masks, image id = seed, category id =
    label + 1, as the runtime's `to_coco` has it."""
    from pycocotools import mask as rle

    images, annotations = [], []
    for seed in seeds:
        scene = generate(seed, size)
        images.append({"id": seed, "file_name": f"{seed}.png", "height": size[0], "width": size[1]})
        for label, mask, box in zip(scene.labels, scene.masks, scene.boxes, strict=True):
            encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": seed,
                    "category_id": int(label) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(mask.sum()),
                    "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


# --- outlines -------------------------------------------------------------------------------------


def _shape_alpha(rng: np.random.Generator, name: str, diameter: float) -> np.ndarray:
    """Coverage (S, S) float32 in 0..1 of a randomly rotated and slightly squeezed shape."""
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    squeeze = np.array([1.0, rng.uniform(0.78, 1.0)])
    side = int(np.ceil(diameter)) + 6

    def coverage(outline: np.ndarray) -> np.ndarray:
        points = (outline * squeeze) @ turn.T * (diameter / 2) + (side - 1) / 2
        fixed = np.round(points * (1 << SUBPIXEL_BITS)).astype(np.int32)
        alpha = np.zeros((side, side), np.uint8)
        return cv2.fillPoly(alpha, [fixed], 255, cv2.LINE_AA, SUBPIXEL_BITS).astype(np.float32) / 255

    alpha = coverage(_OUTLINES[name](rng))
    if name == "ring":
        alpha -= np.minimum(alpha, coverage(_circle(rng.uniform(0.48, 0.62))))
    return alpha


def _circle(radius: float = 1.0) -> np.ndarray:
    return radius * _polar(np.linspace(0, 2 * np.pi, 64, endpoint=False))


def _polar(angles: np.ndarray, radii: np.ndarray | float = 1.0) -> np.ndarray:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _regular(corners: int) -> np.ndarray:
    return _polar(np.arange(corners) * (2 * np.pi / corners))


def _star(rng: np.random.Generator) -> np.ndarray:
    return _polar(np.arange(10) * (np.pi / 5), np.tile([1.0, rng.uniform(0.40, 0.50)], 5))


def _square(_: np.random.Generator) -> np.ndarray:
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.71


def _cross(rng: np.random.Generator) -> np.ndarray:
    arm = rng.uniform(0.26, 0.36)
    quarter = np.array([[arm, arm], [arm, 0.95], [-arm, 0.95]])
    turn = np.array([[0, -1], [1, 0]])
    return np.concatenate([quarter, *(quarter @ np.linalg.matrix_power(turn, k).T for k in (1, 2, 3))])


def _heart(_: np.random.Generator) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 17


def _crescent(rng: np.random.Generator) -> np.ndarray:
    """The unit disc minus a disc of radius r centred at (m, 0)."""
    moved, radius = rng.uniform(0.42, 0.55), rng.uniform(0.74, 0.84)
    horn_x = (1 - radius**2 + moved**2) / (2 * moved)  # where the circles cross
    outer, inner = np.arccos(horn_x), np.arccos((horn_x - moved) / radius)
    back = _polar(np.linspace(outer, 2 * np.pi - outer, 48))
    front = _polar(np.linspace(2 * np.pi - inner, inner, 40)[1:-1], radius) + np.array([moved, 0])
    return np.concatenate([back, front])


_OUTLINES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "disc": lambda rng: _circle(),
    "ring": lambda rng: _circle(),
    "triangle": lambda rng: _regular(3),
    "square": _square,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "crescent": _crescent,
}


# --- placing and painting ---------------------------------------------------------------------------


def _free_place(
    rng: np.random.Generator, owner: np.ndarray, shape: np.ndarray, areas: list[int]
) -> tuple[int, int] | None:
    """Place a shape in front of the others so that every shape, itself included, stays visible enough.

    Marks its pixels in `owner` and returns its (top, left) corner, or None if every try failed.
    """
    height, width = owner.shape
    side, area = shape.shape[0], shape.sum()
    seen = np.bincount(owner[owner >= 0], minlength=len(areas))
    for _ in range(10):
        top, left = (int(rng.integers(-side // 3, extent - 2 * side // 3)) for extent in (height, width))
        inside, part = _overlap(owner.shape, side, top, left)
        covers = shape[part]
        under = owner[inside][covers]
        hidden = np.bincount(under[under >= 0], minlength=len(areas))
        if covers.sum() >= MIN_VISIBLE * area and np.all(seen - hidden >= MIN_VISIBLE * np.array(areas)):
            owner[inside][covers] = len(areas)
            return top, left
    return None


def _overlap(
    size: tuple[int, ...], side: int, top: int, left: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The overlap of the image and a (side, side) patch at (top, left), as slices of both."""
    y1, x1 = max(top, 0), max(left, 0)
    y2, x2 = min(top + side, size[0]), min(left + side, size[1])
    return (slice(y1, y2), slice(x1, x2)), (slice(y1 - top, y2 - top), slice(x1 - left, x2 - left))


def _paint(rng: np.random.Generator, canvas: np.ndarray, alpha: np.ndarray, corner: tuple[int, int]) -> None:
    """Paint a textured shape, usually with a soft shadow, onto the float canvas in place."""
    side = alpha.shape[0]
    if rng.random() < 0.6:
        reach = int(rng.integers(2, 7))
        shadow = cv2.GaussianBlur(
            cv2.copyMakeBorder(alpha, *[reach] * 4, cv2.BORDER_CONSTANT), (0, 0), reach / 2
        )
        dy, dx = rng.integers(-reach, reach + 1, 2)
        inside, part = _overlap(
            canvas.shape, side + 2 * reach, corner[0] - reach + dy, corner[1] - reach + dx
        )
        canvas[inside] *= 1 - rng.uniform(0.2, 0.6) * shadow[part][..., None]
    inside, part = _overlap(canvas.shape, side, *corner)
    cover = alpha[part][..., None]
    around = canvas[inside].mean(axis=(0, 1))
    canvas[inside] += cover * (_texture(rng, side, side, _colour(rng, unlike=around))[part] - canvas[inside])


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


# --- colours and textures -----------------------------------------------------------------------------


def _colour(rng: np.random.Generator, unlike: np.ndarray | None = None) -> np.ndarray:
    """A random colour (3,) in 0..255, whatever the class; not close to `unlike`, so that shapes stand out."""
    for _ in range(20):
        hue, saturation, value = rng.uniform(0, 6), rng.uniform(0.1, 0.95), rng.uniform(50, 250)
        ramp = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
        colour = value * (1 - saturation + saturation * ramp)
        if unlike is None or np.linalg.norm(colour - unlike) > 80:
            break
    return colour.astype(np.float32)


def _texture(rng: np.random.Generator, height: int, width: int, colour: np.ndarray) -> np.ndarray:
    """A texture (height, width, 3) float32: `colour` mixed with another by a random pattern, then shaded."""
    kind = rng.choice(["flat", "flat", "gradient", "stripes", "checks", "clouds", "dots"])
    if kind == "flat":
        picture = np.broadcast_to(colour, (height, width, 3))
    else:
        # Fine patterns stay near the shape's colour, so that they don't break its outline up.
        strength = 1.0 if kind in ("gradient", "clouds") else 0.6
        other = colour + strength * (_colour(rng) - colour)
        amount = _pattern(rng, kind, height, width)[..., None]
        picture = colour + amount * (other - colour)
    light = 1 + rng.uniform(0, 0.25) * (2 * _ramp(rng, height, width) - 1)
    return picture * light.astype(np.float32)[..., None]


def _pattern(rng: np.random.Generator, kind: str, height: int, width: int) -> np.ndarray:
    """A random pattern (height, width) float32 in 0..1."""
    if kind == "gradient":
        return _ramp(rng, height, width)
    if kind == "clouds":
        return _clouds(rng, height, width)
    u, v = _turned_grid(rng, height, width)
    period = rng.uniform(7, 22)
    u, v = np.sin(u * (2 * np.pi / period)), np.sin(v * (2 * np.pi / period))
    if kind == "stripes":
        return np.clip(2 * u + 0.5, 0, 1)
    if kind == "checks":
        return np.clip(4 * u * v + 0.5, 0, 1)
    return np.clip(4 * (u + v) - 3, 0, 1)  # dots


def _turned_grid(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates (height, width) float32 along two perpendicular axes, randomly rotated."""
    angle, shift = rng.uniform(0, np.pi), rng.uniform(0, 50)
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y + np.float32(shift), cos * y - sin * x + np.float32(shift)


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A linear gradient (height, width) float32 from 0 to 1 in a random direction."""
    u, _ = _turned_grid(rng, height, width)
    low, high = u.min(), u.max()
    ramp = (u - low) / max(high - low, 1.0)
    return ramp if rng.random() < 0.5 else 1 - ramp


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise of several scales, (height, width) float32 in 0..1."""
    total = np.zeros((height, width), np.float32)
    cells = int(rng.integers(3, 7))
    for octave in range(3):
        coarse = rng.random((cells << octave, cells << octave), dtype=np.float32) - 0.5
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    return np.clip(total + 0.5, 0, 1)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A background (height, width, 3) float32: blended textures, sometimes with soft blobs.

    Painted at half size, which saves three quarters of the work and puts it out of focus.
    """
    h, w = height // 2, width // 2
    first, second = _colour(rng), _colour(rng)
    picture = first + _clouds(rng, h, w)[..., None] * (second - first)
    if rng.random() < 0.7:
        layer = _texture(rng, h, w, _colour(rng))
        picture += np.float32(rng.uniform(0.1, 0.55)) * (layer - picture)
    for _ in range(rng.integers(0, 5)):
        soft = np.zeros((h // 2, w // 2), np.float32)
        centre = (int(rng.integers(w // 2)), int(rng.integers(h // 2)))
        axes = tuple(int(a) for a in rng.integers(3, 18, 2))
        cv2.ellipse(soft, centre, axes, float(rng.uniform(0, 180)), 0, 360, float(rng.uniform(0.2, 0.6)), -1)
        soft = cv2.resize(cv2.GaussianBlur(soft, (0, 0), 2.5), (w, h))
        picture += soft[..., None] * (_colour(rng) - picture)
    return cv2.resize(np.asarray(picture, np.float32), (width, height))


def _camera(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Camera effects: exposure, slight blur, sensor noise. Returns (H, W, 3) uint8."""
    canvas = canvas * np.float32(rng.uniform(0.75, 1.2))
    if rng.random() < 0.7:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 0.9))
    # The difference of two bytes stands for a normal variable: bytes are much cheaper to draw.
    one, other = rng.integers(0, 256, (2, *canvas.shape), np.uint8)
    noise = cv2.subtract(one, other, dtype=cv2.CV_32F)
    strength = rng.uniform(0.5, 8.0) / (256 / np.sqrt(6))
    return cv2.add(cv2.scaleAdd(noise, strength, canvas), 0, dtype=cv2.CV_8U)
