"""From RGB images to the network's input: resize, normalize, pad, as MMDetection's test pipelines do.

Knows the manifest's rules; must not read files, nor know what the network gives back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from meta_deploy.bundle.manifest import Fit, InputSpec, Preprocess, Size, Stretch


@dataclass(frozen=True)
class Placement:
    """Where one image lies in the network's input: (height, width) before and after the resize.

    The resized image is at the top left; what is right of it and below is padding.
    """

    original: Size
    resized: Size

    @property
    def scale(self) -> tuple[float, float]:
        """Input pixels for one original pixel: (x, y)."""
        return self.resized[1] / self.original[1], self.resized[0] / self.original[0]


def resized(image: np.ndarray, size: Size) -> np.ndarray:
    """An image (H, W, 3) uint8 at `size` (height, width), bilinear; itself where it has that."""
    if image.shape[:2] == size:
        return image
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def covering(size: Size, window: Size) -> Size:
    """`size` (height, width) scaled so that it just covers a window: one side is the window's."""
    scale = max(window[0] / size[0], window[1] / size[1])
    return max(window[0], int(size[0] * scale + 0.5)), max(window[1], int(size[1] * scale + 0.5))


class Preprocessor:
    """Makes a batch of images into one float32 array (B, 3, H, W), with their placements."""

    def __init__(self, spec: InputSpec, rules: Preprocess):
        """`spec` gives the sizes the network takes; `rules` are the manifest's `preprocess`."""
        self.spec = spec
        self.resize = rules.resize
        self.pad_value = rules.pad_value
        self.order = (0, 1, 2) if rules.channels == "rgb" else (2, 1, 0)
        self.mean = np.array(rules.mean, np.float32)
        self.inverse_std = np.float32(1) / np.array(rules.std, np.float32)

    def __call__(
        self, images: Sequence[np.ndarray], sizes: Sequence[Size] | None = None
    ) -> tuple[np.ndarray, list[Placement]]:
        """RGB uint8 images (H, W, 3) of any sizes, to the batch and one placement an image.

        `sizes` are the (height, width) that they had before they were reduced; None: they were not.
        """
        if sizes is None:
            sizes = [(image.shape[0], image.shape[1]) for image in images]
        placements = [self.place(height, width) for height, width in sizes]
        height, width = self.padded_size(placements)
        batch = np.empty((len(images), 3, height, width), np.float32)
        for image, placement, out in zip(images, placements, batch, strict=True):
            self._fill(image, placement, out)
        return batch, placements

    def place(self, height: int, width: int) -> Placement:
        """Where an image of this size would lie."""
        rule, largest = self.resize, self.spec.size.max
        if isinstance(rule, Stretch):
            return Placement((height, width), rule.size)
        if isinstance(rule, Fit):
            scale = min(rule.size[0] / height, rule.size[1] / width)
        else:
            scale = min(rule.long / max(height, width), rule.short / min(height, width))
            scale = min(scale, largest[0] / height, largest[1] / width)
        resized = tuple(max(1, int(edge * scale + 0.5)) for edge in (height, width))
        return Placement((height, width), (resized[0], resized[1]))

    def padded_size(self, placements: Sequence[Placement]) -> Size:
        """The input size (H, W) that holds all: the static one, or the next multiple of the divisor."""
        if self.spec.static_size:
            return self.spec.size.max
        needed = [max(p.resized[i] for p in placements) for i in (0, 1)]
        rounded = [-(-edge // self.spec.divisor) * self.spec.divisor for edge in needed]
        return max(rounded[0], self.spec.size.min[0]), max(rounded[1], self.spec.size.min[1])

    def _fill(self, image: np.ndarray, placement: Placement, out: np.ndarray) -> None:
        """Write one image into its (3, H, W) part of the batch."""
        height, width = placement.resized
        image = resized(image, placement.resized)
        for channel, source in enumerate(self.order):
            plane = out[channel, :height, :width]
            np.subtract(image[:, :, source], self.mean[channel], out=plane, dtype=np.float32)
            plane *= self.inverse_std[channel]
        out[:, height:] = self.pad_value
        out[:, :height, width:] = self.pad_value
