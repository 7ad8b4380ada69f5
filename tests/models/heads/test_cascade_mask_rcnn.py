"""Cascade Mask R-CNN against MMDetection 2.x's test path in numpy: three stages, averaged."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from meta_deploy.models.backbones.meta import METAConfig
from meta_deploy.models.heads.cascade_mask_rcnn import (
    CascadeMaskRCNNConfig,
    CascadeRoIHead,
    measure,
    recognise,
)
from meta_deploy.models.heads.head import HEADS
from meta_deploy.models.registry import build_model
from tests.models import references as ref

CLASSES = 3
SIZE = (64, 96)
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
TINY = CascadeMaskRCNNConfig(
    "tiny",
    METAConfig(16, 4, 2, inplanes=4, adapter_parts=2, pos_grid=4),
    num_classes=CLASSES,
    fpn_channels=4,
    fc_channels=12,
    mask_channels=4,
    box_convs=1,
    box_channels=4,
    max_detections=8,
    score_threshold=0.1,
)


def lively(config):
    torch.manual_seed(0)
    head = CascadeRoIHead(config).double().eval()
    with torch.no_grad():
        for name, value in head.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif name.endswith(("fc_cls.weight", "fc_reg.weight", "conv_logits.weight")):
                value.normal_(std=1.0)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.2)
    return head


def inputs():
    g = torch.Generator().manual_seed(1)
    maps = [torch.randn(1, 4, SIZE[0] // s, SIZE[1] // s, generator=g).double() for s in (4, 8, 16, 32)]
    corner = torch.rand(1, 6, 2, generator=g).double() * torch.tensor([60.0, 40.0])
    side = 8 + torch.rand(1, 6, 2, generator=g).double() * 24
    return maps, torch.cat([corner, corner + side], dim=-1)


def box_head(state, x, stage):
    name = f"bbox_head.{stage}."
    hidden = []
    for roi in x:
        weight = {"c.weight": state[f"{name}shared_convs.0.conv.weight"], "c.bias": np.zeros(4)}
        bn = {k: state[f"{name}shared_convs.0.bn.{k}"][:, None, None] for k in BN}
        y = ref.conv3x3(roi, weight, "c")
        y = (y - bn["running_mean"]) / np.sqrt(bn["running_var"] + 1e-5) * bn["weight"] + bn["bias"]
        hidden.append(np.maximum(y, 0).reshape(-1))
    y = np.maximum(ref.linear(np.array(hidden), state, f"{name}shared_fcs.0"), 0)
    deltas = ref.linear(y, state, f"{name}fc_reg").reshape(len(x), -1, 4)
    return ref.linear(y, state, f"{name}fc_cls"), deltas


BN = ("running_mean", "running_var", "weight", "bias")


def cascade(head, maps, proposals):
    """`CascadeRoIHead.simple_test` of one image: class logits averaged, boxes by the best class."""
    state, rois, logits = ref.numpy_state(head), proposals, []
    for stage, stds in enumerate(STDS):
        scores, deltas = box_head(state, ref.pyramid_pool(maps, rois, 7), stage)
        logits.append(scores)
        boxes = np.array(
            [[ref.decode(r, d, stds, SIZE) for d in row] for r, row in zip(rois, deltas, strict=True)]
        )
        best = scores[:, :-1].argmax(axis=1) * (boxes.shape[1] > 1)
        rois = boxes[np.arange(len(rois)), best]
    probabilities = ref.softmax(sum(logits) / 3)[:, :-1]
    boxes = np.broadcast_to(boxes, (len(boxes), CLASSES, 4))
    found = ref.multiclass_nms(boxes, probabilities, 0.1, 0.5, 8)
    return found, [mask(state, maps, box, label) for _, label, box in found]


def mask(state, maps, box, label):
    """The mean of the three stages' sigmoids."""
    total = 0
    for stage in range(3):
        name, x = f"mask_head.{stage}.", ref.pyramid_pool(maps, [box], 14)[0]
        for i in range(4):
            x = np.maximum(ref.conv3x3(x, state, f"{name}convs.{i}.conv"), 0)
        up = np.einsum("iyx,iokl->oykxl", x, state[f"{name}upsample.weight"]).reshape(-1, 28, 28)
        x = np.maximum(up + state[f"{name}upsample.bias"][:, None, None], 0)
        total = total + ref.sigmoid(ref.conv1x1(x, state, f"{name}conv_logits"))[label] / 3
    return total


@pytest.mark.parametrize("class_agnostic", [False, True])
@torch.no_grad()
def test_detections_and_masks_are_mmdetections(class_agnostic):
    head = lively(replace(TINY, class_agnostic=class_agnostic))
    maps, proposals = inputs()
    boxes, scores, labels = head.detect(maps, proposals, torch.zeros(1, 6), SIZE)
    probabilities = head.masks(maps, boxes, labels)
    found, masks = cascade(head, [m[0].numpy() for m in maps], proposals[0].numpy())
    assert len({label for _, label, _ in found}) > 1
    count = int((scores[0] > 0).sum())
    assert count == len(found)
    np.testing.assert_allclose(scores[0, :count].numpy(), [f[0] for f in found], atol=1e-9)
    assert labels[0, :count].tolist() == [f[1] for f in found]
    np.testing.assert_allclose(boxes[0, :count].numpy(), [f[2] for f in found], atol=1e-7)
    np.testing.assert_allclose(probabilities[0, :count].numpy(), masks, atol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [{}, {"class_agnostic": True}, {"box_norm": False}, {"box_convs": 0, "box_fcs": 2, "box_norm": False}],
)
def test_tensors_tell_the_configuration(changes):
    config = replace(TINY, **changes)
    with torch.device("meta"):
        state = build_model(config).state_dict()
    other = CascadeMaskRCNNConfig("tiny", TINY.backbone, num_classes=CLASSES)
    told = replace(other, **measure(other, state))
    kept = ("max_detections", "score_threshold", *(("box_channels",) if not config.box_convs else ()))
    assert replace(told, **{name: getattr(config, name) for name in kept}) == config
    assert [head.name for head in HEADS.values() if head.recognise(state)] == ["cascade-mask-rcnn"]
    assert not recognise({**state, "roi_head.semantic_head.conv_seg.weight": torch.zeros(1)})
