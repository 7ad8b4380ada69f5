"""Detectors without a second stage and without masks: their graphs answer as PyTorch does on each runtime."""

import numpy as np
import pytest
import torch

from meta_deploy.graph.pipeline import run_passes
from meta_deploy.targets import TARGETS
from meta_deploy.targets.target import BuildOptions
from tests.tiny_models import exported, pictures

pytestmark = pytest.mark.slow


def same(expected, actual):
    assert expected["num_detections"].tolist() == actual["num_detections"].tolist()
    assert expected["num_detections"].min() > 5
    np.testing.assert_array_equal(actual["labels"], expected["labels"])
    np.testing.assert_allclose(actual["scores"], expected["scores"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(actual["boxes"], expected["boxes"], rtol=0, atol=1e-3)


def test_onnx_runtime_agrees():
    e = exported("dense")
    assert [o.name for o in e.graph.graph.output][:4] == ["num_detections", "boxes", "scores", "labels"]
    same(*e.both(pictures(1)))


def test_openvino_agrees():
    pytest.importorskip("openvino")
    e, target, images = exported("dense"), TARGETS["openvino"], pictures(1)
    graph, _ = run_passes(e.literal, list(target.passes), target.prices)
    built = target.build(graph.SerializeToString(), [e.spec.profile], BuildOptions("fp32"))
    outputs = target.runner(built, [e.spec.profile], "fp32")({"images": images.numpy()})
    with torch.inference_mode():
        same({name: value.numpy() for name, value in e.model(images).items()}, outputs)
