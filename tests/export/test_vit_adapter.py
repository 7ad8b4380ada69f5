"""ViT-Adapter's graphs: as PyTorch on each runtime, and as short as deformable attention can be written."""

import collections

import onnx_graphsurgeon as gs
import pytest
import torch

from meta_deploy.graph.pipeline import run_passes
from meta_deploy.targets import TARGETS
from meta_deploy.targets.target import BuildOptions
from tests.tiny_models import assert_same, exported, pictures

INJECTORS, EXTRACTORS, LEVELS = 2, 3, 3

pytestmark = pytest.mark.slow


def made(operators="native"):
    """Of any batch: the tests of single images run it too, for an export takes seconds."""
    return exported("adapter", dynamic_batch=(1, 2, 4), operators=operators)


@pytest.mark.parametrize("operators", ["native", "lowered"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_detector_on_it_agrees_and_detects(batch, operators):
    expected, actual = made(operators).both(pictures(batch))
    assert_same(expected, actual)
    assert (expected["num_detections"] > 5).all()


def test_openvino_agrees():
    pytest.importorskip("openvino")
    e, target, images = made(), TARGETS["openvino"], pictures(2)
    graph, _ = run_passes(e.literal, list(target.passes), target.prices)
    built = target.build(graph.SerializeToString(), [e.spec.profile], BuildOptions("fp32"))
    outputs = target.runner(built, [e.spec.profile], "fp32")({"images": images.numpy()})
    with torch.inference_mode():
        expected = {name: value.numpy() for name, value in e.model(images, stages=True).items()}
    assert_same(expected, {name: outputs[name] for name in expected})


def test_each_level_of_each_layer_is_one_sampling_at_folded_reference_points():
    graph = gs.import_onnx(made().graph)
    samplings = [node for node in graph.nodes if node.op == "GridSample"]
    assert len(samplings) == INJECTORS * LEVELS + EXTRACTORS
    for node in samplings:
        chain = []
        while node.op != "MatMul":  # from the grid up to the layer of the offsets
            node = node.inputs[node.op == "GridSample"].inputs[0]
            chain.append(node.op)
        counts = collections.Counter(chain)
        assert counts["Add"] == 2, chain  # the layer's bias and the reference points
        assert counts["Transpose"] == 1, chain
        assert not {"Mul", "Div", "Sub", "Slice"} & counts.keys(), chain


def test_the_lowered_form_samples_by_gathers_from_one_table_a_level():
    graph = gs.import_onnx(made("lowered").graph)
    samplings = [node.name for node in graph.nodes if node.op == "GridSample"]  # RoIAlign's
    assert not [name for name in samplings if name.startswith("backbone")]
    rims = [
        node for node in graph.nodes if node.op == "Pad" and node.name.startswith("backbone.interactions")
    ]
    assert len(rims) == INJECTORS * LEVELS + EXTRACTORS


def test_norms_of_one_tensor_are_computed_once_and_gammas_are_folded():
    """The ViT's tokens are normalized for the extractor, the one after it and the next injector."""
    graph = gs.import_onnx(made().graph)
    norms = collections.Counter(id(n.inputs[0]) for n in graph.nodes if n.op == "LayerNormalization")
    assert max(norms.values()) == 1
    names = {t.name for n in graph.nodes for t in n.inputs if isinstance(t, gs.Constant)}
    assert not any("gamma" in name for name in names)
