"""Boxes with a class, a score and a mask.

Knows arrays; must not know files, back ends or how a result is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import InstanceSegmentationManifest, Size
from meta_deploy.tasks.detection import Detection
from meta_deploy.tasks.masks import Mask, paste_mask
from meta_deploy.tasks.task import Output, check_finite


class InstanceSegmentation(Detection):
    """Boxes with masks. A mask is pasted by its box before clipping, in which the network drew it."""

    name = "instance-segmentation"
    outputs: ClassVar[Mapping[str, Output]] = {
        **Detection.outputs,
        "masks": Output("float32", ("batch", "most", "cells", "cells")),
    }

    def masks(
        self,
        bundle: Bundle,
        outputs: Mapping[str, np.ndarray],
        index: int,
        keep: np.ndarray,
        boxes: np.ndarray,
        size: Size,
    ) -> tuple[Mask, ...]:
        assert isinstance(bundle.manifest, InstanceSegmentationManifest)
        masks, threshold = outputs["masks"][index, : len(boxes)], bundle.manifest.thresholds.mask
        check_finite(bundle, masks)
        return tuple(paste_mask(masks[i], boxes[i], size, threshold) for i in keep)
