"""Verification passes an export of a tiny model, catches what is off in it, and names the stage."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from meta_deploy.errors import CheckpointError, ImageError, VerificationError
from meta_deploy.export.samples import ImageSamples
from meta_deploy.export.sources.checkpoint import CheckpointSource, preprocess_rules
from meta_deploy.export.verify import OnnxRun, verify
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.tasks import get_task
from tests.tiny_models import exported


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for i, size in enumerate([(96, 128), (128, 96), (50, 200)]):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        paths.append(folder / f"{i}.png")
    return paths


class Source(CheckpointSource):
    """A tiny model as if it were loaded."""

    def __init__(self, e):
        self.loaded, self.spec, self.task = e, e.spec, get_task(e.config.task)
        self.original, self.reference = "PyTorch", f"PyTorch {torch.__version__} float32"
        self.score_threshold = getattr(e.config, "score_threshold", 0.0)


def run_verify(kind, images, fault=lambda graph: None, progress=lambda done, total: None):
    e = exported(kind)
    graph = onnx.ModelProto()
    graph.CopyFrom(e.graph)
    fault(graph.graph)
    samples = ImageSamples(images, e.spec, preprocess_rules(e.config, e.spec))
    return verify(Source(e), OnnxRun(graph), samples, PRECISIONS["fp32"].tolerances, progress)


def scaled(factor, at, consumer="Conv"):
    """A fault: the weight of one node, chosen by its place among those of one operator, is scaled."""

    def fault(graph):
        initializers = {i.name: i for i in graph.initializer}
        nodes = [n for n in graph.node if n.op_type == consumer and n.input[1] in initializers]
        weight = initializers[nodes[int(at * (len(nodes) - 1))].input[1]]
        weight.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name)
        )

    return fault


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_an_export_passes_and_its_figures_are_told(kind, images):
    done = []
    result = run_verify(kind, images, progress=lambda *counts: done.append(counts))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert result["passed"]
    assert result["images"] == 3
    stages = {"detector": ["maps", "proposals", "detections"], "segmenter": ["maps", "pixels"]}[kind]
    assert list(result["stages"]) == stages
    assert result["stages"]["maps"]["max_relative_error"] < 1e-4
    if kind == "detector":
        assert result["stages"]["detections"]["compared"] > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fault", "stage"),
    [
        ("detector", scaled(1.01, 0.0), "maps"),
        ("detector", scaled(1.1, 0.5), "maps"),  # a convolution of one adapter block among many
        ("detector", scaled(1.01, 0.9), "proposals"),
        ("detector", scaled(-1.0, 1.0), "detections"),  # the masks' logits
        ("segmenter", scaled(1.01, 0.1), "maps"),
        ("segmenter", scaled(1.01, 1.0), "maps"),
    ],
)
def test_a_weight_that_is_off_is_caught_and_the_stage_named(kind, fault, stage, images):
    with pytest.raises(VerificationError, match=f"on 3 images: {stage} are off .*no bundle was written"):
        run_verify(kind, images, fault)


@pytest.mark.slow
def test_what_failed_is_kept_in_figures(images):
    with pytest.raises(VerificationError) as caught:
        run_verify("detector", images, scaled(2.0, 0.0))
    assert not caught.value.figures["stages"]["maps"]["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_a_model_whose_own_features_are_not_finite_is_told_apart(kind, images):
    e = exported(kind)
    weight = e.model.backbone.norms[0].weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("inf"))
    try:
        with pytest.raises(CheckpointError, match="not finite"):
            run_verify(kind, images)
    finally:
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_named(images, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        run_verify("detector", [*images, tmp_path / "broken.jpg"])
