"""The one call from an image to its result: a bundle opened, with everything between in its order.

Knows the order of the runtime's parts; must not know how any of them does its work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import Size
from meta_deploy.errors import BackendError, BundleError, InputError
from meta_deploy.imaging.images import ImageLike, read_image
from meta_deploy.imaging.preprocess import Placement, Preprocessor
from meta_deploy.targets.backend import open_backend
from meta_deploy.tasks import postprocess
from meta_deploy.tasks.results import Detections, Segmentation, Timings

DEMO_BUNDLE = Path(__file__).parent.parent / "assets" / "demo"
MAX_THREADS = 1024
Result = Detections | Segmentation


class Predictor:
    """Runs a bundle on images. May be called from several threads; a context manager.

    >>> with Predictor("my-bundle") as predictor:
    ...     predictor("photo.jpg").save("overlay.png")
    """

    def __init__(
        self,
        bundle: Bundle | str | os.PathLike[str] | None = None,
        backend: str = "auto",
        score_threshold: float | None = None,
        threads: int | None = None,
    ):
        """Open a bundle (None: the demo bundle of the package) on a back end.

        `score_threshold` is the least score of a detection, 0 to 1 (None: the bundle's own); `threads` the
        CPU threads of the model, 1 to 1024 (None: the back end's choice).

        Raises:
            BundleError: not a bundle, or one altered or too new.
            BackendError: the back end is not installed, or cannot run this bundle here.
            InputError: a threshold or thread count out of range.
        """
        if score_threshold is not None and not 0 <= score_threshold <= 1:
            raise InputError(f"score_threshold must be from 0 to 1, not {score_threshold}")
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise InputError(f"threads must be from 1 to {MAX_THREADS}, not {threads}")
        bundle = DEMO_BUNDLE if bundle is None else bundle
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.score_threshold = self.bundle.score_threshold if score_threshold is None else score_threshold
        self._preprocess = Preprocessor(self.bundle.input, self.bundle.preprocess)
        self._classes = self.bundle.classes
        self._backend = open_backend(self.bundle, backend, threads)

    @property
    def backend(self) -> str:
        """The back end in use: onnxruntime, cuda or tensorrt."""
        return self._backend.name

    @property
    def runs_on(self) -> str:
        """Library and device in words, and in brackets why nothing better was there for `auto`."""
        note = f" ({self._backend.note})" if self._backend.note else ""
        return self._backend.runs_on + note

    def __call__(self, image: ImageLike) -> Result:
        """One image: a path, an encoded file's bytes, a Pillow image, or an RGB uint8 array (H, W, 3).

        Raises:
            ImageError: it cannot be read.
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[ImageLike]) -> list[Result]:
        """Several images, in groups as large as the bundle's batch takes; the results in the same order.

        Raises:
            ImageError: one of them cannot be read.
        """
        results: list[Result] = []
        size = self.bundle.input.batch.max
        for start in range(0, len(images), size):
            results.extend(self._group(images[start : start + size]))
        return results

    def _group(self, images: Sequence[ImageLike]) -> Iterator[Result]:
        pixels = [read_image(image) for image in images]
        started = perf_counter()
        batch, placements = self._preprocess(pixels)
        prepared = perf_counter()
        outputs = self._backend.infer(self._padded(batch))
        done = perf_counter()
        share = 1000 / len(images)
        for index, (image, placement) in enumerate(zip(images, placements, strict=True)):
            before = perf_counter()
            make: Any = (
                self._segmentation if self.bundle.task == "semantic-segmentation" else self._detections
            )
            result = make(outputs, index, placement, (batch.shape[2], batch.shape[3]))
            after = perf_counter()
            timings = Timings(
                (prepared - started) * share, (done - prepared) * share, (after - before) * 1000
            )
            path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
            yield replace(result, path=path, timings=timings)

    def _padded(self, batch: np.ndarray) -> np.ndarray:
        """The batch, filled up with zeros to the least that the graph takes."""
        lacking = self.bundle.input.batch.min - len(batch)
        if lacking <= 0:
            return batch
        return np.concatenate([batch, np.zeros((lacking, *batch.shape[1:]), np.float32)])

    def _detections(
        self, outputs: dict[str, np.ndarray], index: int, placement: Placement, padded: Size
    ) -> Detections:
        count = max(int(outputs["num_detections"][index]), 0)
        for name in ("boxes", "scores", "masks"):
            if name in outputs:
                self._check_finite(outputs[name][index, :count])
        found = postprocess.detections(
            outputs,
            index,
            placement,
            self.score_threshold,
            self.bundle.manifest.thresholds.mask,  # type: ignore[union-attr]
        )
        self._check_classes(int(found.labels.max(initial=-1)) + 1)
        return Detections(
            placement.original, found.boxes, found.scores, found.labels, self._classes, found.masks
        )

    def _segmentation(
        self, outputs: dict[str, np.ndarray], index: int, placement: Placement, padded: Size
    ) -> Segmentation:
        logits = outputs["logits"][index]
        self._check_classes(len(logits))
        self._check_finite(logits)
        return Segmentation(postprocess.segmentation(logits, placement, padded), self._classes)

    def _check_finite(self, values: np.ndarray) -> None:
        if values.size and not (np.isfinite(values.max()) and np.isfinite(values.min())):  # NaN gets through
            raise BackendError(
                f"the model of bundle '{self.bundle.path}' gave values that are not finite; export it again, "
                "or use another back end or precision"
            )

    def _check_classes(self, needed: int) -> None:
        if needed > len(self._classes):
            raise BundleError(
                f"the model of bundle '{self.bundle.path}' gives {needed} classes, and its manifest names "
                f"{len(self._classes)}; export it again"
            )

    def close(self) -> None:
        """Free the model."""
        self._backend.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
