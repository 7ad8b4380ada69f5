"""The steps of a prediction, apart as a pipeline has them, give what one call of a predictor gives."""

from itertools import chain

import numpy as np
import pytest

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.errors import ImageError
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.runtime.processor import Processor

HOWS = {
    "detector": {},
    "detector-batch": {"tile": 64, "tile_overlap": 20},
    "detector-dynamic": {"tile": 64},
    "segmenter": {"slide": 20},
    "segmenter-dynamic": {"tile": 64},
}


@pytest.mark.parametrize("name", HOWS)
def test_images_in_steps_and_in_common_batches_give_what_each_gives_alone(bundles, name):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (*size, 3), np.uint8) for size in ((128, 96), (40, 64), (150, 70))]
    options = HOWS[name]
    with Predictor(bundles / name, **options) as predictor:
        steps = Processor(Bundle.open(bundles / name), **options)
        pictures = [steps.read(image) for image in images]
        pieces = [steps.pieces(picture) for picture in pictures]
        sizes = [steps.sizes(picture.size) for picture in pictures]
        outputs = iter(predictor.outputs([*chain(*pieces)], [*chain(*sizes)]))
        for image, own in zip(images, pieces, strict=True):
            result = steps.result(image.shape[:2], [next(outputs) for _ in own])
            one, other = result.to_dict(), predictor(image).to_dict()
            assert {**one, "timings": None} == {**other, "timings": None}
    assert max(map(len, pieces)) > 1 or not options  # or there was nothing to put together


def test_bytes_are_called_by_the_name_that_they_were_read_under(detector_bundle):
    with pytest.raises(ImageError, match=r"^'s3://photos/a\.jpg' is not an image"):
        Processor(detector_bundle).read(b"no image", "s3://photos/a.jpg")
