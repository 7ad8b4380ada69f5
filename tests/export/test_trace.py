"""Exported graphs answer as PyTorch does: static, batched, any batch, any size, each kind of backbone."""

import numpy as np
import onnx
import pytest
import torch

from meta_deploy.export.trace import OPSET, drop_outputs
from tests.small_graphs import FLOAT, model, run, value
from tests.tiny_models import CHANGED, assert_same, exported, pictures

DETECTIONS = ["num_detections", "boxes", "scores", "labels", "masks"]


def agree(e, images):
    expected, actual = e.both(images)
    assert_same(expected, actual)
    return actual


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_detector_agrees_and_detects(seed):
    out = agree(exported("detector"), pictures(1, seed=seed))
    assert out["num_detections"][0] > 5
    assert len(set(out["labels"][0].tolist())) > 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_segmenter_agrees(seed):
    out = agree(exported("segmenter"), pictures(1, seed=seed))
    assert len(np.unique(out["logits"].argmax(1))) > 1


@pytest.mark.slow
def test_a_detector_agrees_on_a_picture_of_nothing():
    agree(exported("detector"), torch.zeros(1, 3, 96, 128))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 3])
def test_a_detector_agrees_where_the_list_is_not_full(seed):
    """The padding is part of the answer: zeros, label -1."""
    out = agree(exported("detector"), pictures(1, seed=seed))
    found = out["num_detections"][0]
    assert 0 < found < out["scores"].shape[1]
    assert not out["scores"][0, found:].any()
    assert not out["masks"][0, found:].any()
    assert set(out["labels"][0, found:].tolist()) == {-1}


@pytest.mark.slow
def test_a_batch_of_two_agrees_and_images_do_not_mix():
    e = exported("segmenter", batch=2)
    images = pictures(2)
    both = agree(e, images)["logits"]
    np.testing.assert_allclose(agree(e, images.flip(0))["logits"], both[::-1], atol=1e-5)
    with pytest.raises(Exception, match="Got invalid dimensions"):
        e.session.run(None, {"images": pictures(1).numpy()})


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_a_dynamic_batch_agrees_at_every_size(batch):
    out = agree(exported("detector", dynamic_batch=(1, 2, 4)), pictures(batch, seed=batch))
    assert out["boxes"].shape[0] == batch


@pytest.mark.slow
def test_a_dynamic_batch_gives_each_image_what_it_gets_alone():
    e = exported("detector", dynamic_batch=(1, 2, 4))
    images = pictures(3)
    together, alone = e.both(images)[1], [e.both(image[None])[1] for image in images]
    assert_same({k: np.concatenate([one[k] for one in alone]) for k in together}, together)


@pytest.mark.slow
def test_a_backbone_with_every_setting_changed_agrees():
    agree(exported("detector", **CHANGED), pictures(1))


SIZES = [(96, 128), (32, 32), (32, 128), (128, 64), (96, 96), (128, 128), (64, 96)]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_dynamic_size_agrees_at_every_size(size):
    """Also where the stripes' width, 4 patches, and the windows', 5, do not divide the map.

    At the usual size of this bundle, 64 pixels wide, there is one vertical stripe: that is no constant.
    """
    bundle = exported("detector", size=(128, 64), dynamic_size=True, window=5, stripe_width=4)
    agree(bundle, pictures(1, size))


@pytest.mark.slow
def test_the_graph_is_standard_onnx_with_the_names_of_the_contract():
    e = exported("detector")
    onnx.checker.check_model(e.literal)
    assert [o.name for o in e.literal.graph.output][:5] == DETECTIONS
    onnx.checker.check_model(e.graph, full_check=True)
    assert {o.version for o in e.graph.opset_import if o.domain == ""} == {OPSET}
    assert {node.domain for node in e.graph.graph.node} <= {"", "com.microsoft"}
    (images,) = e.graph.graph.input
    assert (images.name, images.type.tensor_type.elem_type) == ("images", FLOAT)
    kinds = {
        o.name: onnx.helper.tensor_dtype_to_np_dtype(o.type.tensor_type.elem_type).name
        for o in e.graph.graph.output
    }
    assert [kinds[name] for name in DETECTIONS] == ["int32", "float32", "float32", "int32", "float32"]


@pytest.mark.slow
def test_nothing_in_the_graph_tells_where_it_was_made():
    for proto in (exported("detector").literal, exported("detector").graph):
        text = proto.SerializeToString()
        assert b"/meta_deploy/" not in text
        assert b".py" not in text


@pytest.mark.slow
def test_the_passes_fire_on_a_detector():
    for e in (exported("detector"), exported("detector", dynamic_batch=(1, 2, 4))):
        changes = {result.name: result.changes for result in e.passes}
        assert changes["clean-up"] > 500
        assert changes["discarded-rows"] == 1


def three_outputs():
    nodes = [
        onnx.helper.make_node(op, ["x"], [name]) for op, name in (("Relu", "a"), ("Abs", "b"), ("Neg", "c"))
    ]
    return model(nodes, [value("x", [2])], ["a", "b", "c"])


def test_dropped_outputs_keep_their_tensor_and_the_rest_their_order():
    proto = three_outputs()
    dropped = drop_outputs(proto, ["c", "a"])
    assert [o.name for o in dropped.graph.output] == ["a", "c"]
    assert [o.name for o in proto.graph.output] == ["a", "b", "c"]
    onnx.checker.check_model(dropped, full_check=True)
    assert list(run(dropped, x=np.ones(2, np.float32))) == ["a", "c"]
    assert "b" in {v.name for v in dropped.graph.value_info}
