"""Loading: what is saved comes back, class names, and what happens where not everything fits."""

from __future__ import annotations

import pytest
import torch

from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.class_names import ADE20K_CLASSES, COCO_CLASSES
from meta_deploy.models.registry import get_config
from tests.models.checkpoint.checkpoints import build, refusal, same, small


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("head", ["mask-rcnn", "upernet"])
def test_what_is_saved_comes_back_equal(tmp_path, head, suffix):
    config = small(head, 5, backbone={"window": 7, "stripe_width": 2})
    model = build(config)
    save_checkpoint(tmp_path / f"m{suffix}", model, config, ["a", "b", "c", "d", "e"])
    loaded = load_model(tmp_path / f"m{suffix}")
    assert same(loaded.model.state_dict(), model.state_dict())
    assert loaded.config == config
    assert loaded.class_names == ["a", "b", "c", "d", "e"]
    assert loaded.report.complete
    assert not loaded.model.training
    assert [p.name for p in tmp_path.iterdir()] == [f"m{suffix}"]


def test_a_loaded_model_computes_what_the_saved_one_did(path):
    config = small("upernet")
    model = build(config)
    save_checkpoint(path, model, config)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load_model(path).model(images)["logits"], model(images)["logits"])


def test_a_loaded_model_does_not_change_with_its_file(path, model, state):
    save_checkpoint(path, model, small())
    loaded = load_model(path)
    with path.open("r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    assert same(loaded.model.state_dict(), state)


def test_counters_of_batch_norm_may_be_missing(path, state):
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    loaded = load_model(path)
    assert loaded.report.complete
    assert not any(p.is_meta for p in loaded.model.state_dict().values())


def test_class_names_of_the_wrong_count_are_not_used(path, state):
    torch.save({"state_dict": state, "classes": ["x", "y"]}, path)
    notes: list[str] = []
    assert load_model(path, log=notes.append).class_names == ["class 0", "class 1", "class 2"]
    assert any("2 class names for 3 classes" in note for note in notes)


@pytest.mark.parametrize("bad", ["", "  ", "x" * 201, "a\nb", "\x1b[31m"])
def test_class_names_that_cannot_be_shown_are_not_used(path, state, bad):
    torch.save({"state_dict": state, "classes": ["x", "y", bad]}, path)
    notes: list[str] = []
    assert load_model(path, log=notes.append).class_names == ["class 0", "class 1", "class 2"]
    assert any("class names that are empty" in note for note in notes)


@pytest.mark.parametrize(
    ("head", "count", "names"), [("mask-rcnn", 80, COCO_CLASSES), ("upernet", 150, ADE20K_CLASSES)]
)
def test_missing_class_names_are_the_usual_data_sets(path, head, count, names):
    torch.save(build(small(head, count)).state_dict(), path)
    assert load_model(path).class_names == list(names)


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


def test_missing_tensors_are_listed_and_refused(path, state):
    gone = ["neck.fpn_convs.3.conv.bias", "rpn_head.rpn_reg.bias"]
    torch.save(without(state, *gone), path)
    message = refusal(path)
    assert "2 missing (neck.fpn_convs.3.conv.bias, rpn_head.rpn_reg.bias)" in message
    assert "--allow-partial" in message
    loaded = load_model(path, allow_partial=True)
    assert loaded.report.missing == gone
    assert not loaded.report.complete
    assert same(without(loaded.model.state_dict(), *gone), without(state, *gone))


def test_tensors_of_the_wrong_shape_or_type_are_listed_and_refused(path, state):
    wrong = {
        "rpn_head.rpn_reg.bias": torch.zeros(36),
        "rpn_head.rpn_cls.bias": torch.zeros(3, dtype=torch.int8),
    }
    torch.save({**state, **wrong}, path)
    message = refusal(path)
    assert "2 of the wrong shape" in message
    assert "rpn_head.rpn_reg.bias: 36 instead of 12" in message
    assert "torch.int8 instead of torch.float32" in message
    loaded = load_model(path, allow_partial=True)
    assert len(loaded.report.mismatched) == 2
    assert not any(tensor.is_meta for tensor in loaded.model.state_dict().values())


def test_unexpected_tensors_are_listed_and_refused(path, state):
    torch.save({**state, "roi_head.mask_iou_head.fc.weight": torch.ones(3)}, path)
    assert "1 unexpected (roi_head.mask_iou_head.fc.weight)" in refusal(path)
    loaded = load_model(path, allow_partial=True)
    assert loaded.report.unexpected == ["roi_head.mask_iou_head.fc.weight"]
    assert loaded.report.complete


def test_known_leftovers_of_training_are_only_noted(path, state):
    extra = {
        "backbone.vit.norm.weight": torch.ones(128),
        "backbone.vit.cls_token": torch.ones(1, 1, 128),
        "auxiliary_head.conv_seg.weight": torch.ones(3, 4, 1, 1),
        "data_preprocessor.mean": torch.ones(3, 1, 1),
    }
    torch.save({**state, **extra}, path)
    notes: list[str] = []
    loaded = load_model(path, log=notes.append)
    assert sorted(loaded.report.ignored) == sorted(extra)
    assert any("4 tensors not needed" in note for note in notes)


def test_a_backbone_alone_needs_a_name_and_consent(path, state):
    torch.save({n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}, path)
    assert "without a head" in refusal(path)
    assert "does not fit meta-nano-upernet" in refusal(path, "meta-nano-upernet")
    named = build(get_config("meta-nano-mask-rcnn")).state_dict()
    torch.save({n: t for n, t in named.items() if n.startswith("backbone.")}, path)
    loaded = load_model(path, "meta-nano-mask-rcnn", allow_partial=True)
    assert {n.split(".")[0] for n in loaded.report.missing} == {"neck", "rpn_head", "roi_head"}
    assert loaded.config.num_classes == 80
