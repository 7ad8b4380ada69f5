"""Mask R-CNN: the second stage against MMDetection 2.x's test path in numpy, padding, batches, names."""

import functools

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch.nn import functional as F

from meta_deploy.models.backbones.meta import METAConfig
from meta_deploy.models.heads.mask_rcnn import BoxHead, MaskHead, MaskRCNNConfig, RoIHead, image_of
from meta_deploy.models.ops.boxes import INVALID
from meta_deploy.models.registry import build_model
from tests.models import references as ref

CLASSES = 5
TINY = MaskRCNNConfig(
    "tiny",
    METAConfig(16, 4, 2, inplanes=4, adapter_parts=2, pos_grid=4, window=4),
    num_classes=CLASSES,
    fpn_channels=8,
    fc_channels=16,
    mask_channels=6,
    rpn_pre_nms=60,
    proposals=40,
    max_detections=15,
)
STRIDES = (4, 8, 16, 32)


@functools.cache
def tiny(**changes):
    """A small float64 detector, its random heads scaled to detect several classes with varied scores."""
    torch.manual_seed(0)
    model = build_model(replace(TINY, **changes)).double()
    head = model.roi_head.bbox_head
    with torch.no_grad():
        for conv in (model.rpn_head.rpn_conv, model.rpn_head.rpn_cls, model.rpn_head.rpn_reg):
            conv.weight.normal_(std=0.15)
        features = model.extract_features(images(1, 3, 96, 160))
        proposals, _ = model.rpn_head.proposals(*model.rpn_head(features), (96, 160))
        for fc, spread in ((head.fc_cls, 1.5), (head.fc_reg, 1.0)):
            fc.weight.normal_()
            index = proposals.new_zeros(proposals.shape[1], dtype=torch.int64)
            out = head(model.roi_head.box_pool(features[:4], proposals[0], index))[fc is head.fc_reg]
            fc.weight.mul_(spread / out.std(dim=0)[:, None])
            fc.bias.copy_(-out.mean(dim=0) * spread / out.std(dim=0))
    return model


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- MMDetection, in numpy ---


def second_stage(head, features, proposals, image_size):
    """`StandardRoIHead.simple_test_bboxes` and `simple_test_mask` of one image's numpy maps and proposals."""
    state = ref.numpy_state(head)
    x = ref.pyramid_pool(features, proposals, 7).reshape(len(proposals), -1)
    for i in (0, 1):
        x = np.maximum(ref.linear(x, state, f"bbox_head.shared_fcs.{i}"), 0)
    scores = ref.softmax(ref.linear(x, state, "bbox_head.fc_cls"))[:, :-1]
    deltas = ref.linear(x, state, "bbox_head.fc_reg").reshape(len(proposals), -1, 4)
    boxes = np.array(
        [
            [ref.decode(p, d, (0.1, 0.1, 0.2, 0.2), image_size) for d in row]
            for p, row in zip(proposals, deltas, strict=True)
        ]
    )
    area = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    found = ref.multiclass_nms(
        boxes,
        np.where(area, scores, -1.0),  # MMDetection keeps empty boxes; this project drops them
        head.score_threshold,
        head.nms_threshold,
        head.max_detections,
    )
    masks = []
    for _, label, box in found:
        x = ref.pyramid_pool(features, [box], 14)[0]
        for i in range(4):
            x = np.maximum(ref.conv3x3(x, state, f"mask_head.convs.{i}.conv"), 0)
        up = np.einsum("iyx,iokl->oykxl", x, state["mask_head.upsample.weight"]).reshape(-1, 28, 28)
        x = np.maximum(up + state["mask_head.upsample.bias"][:, None, None], 0)
        masks.append(ref.sigmoid(ref.conv1x1(x, state, "mask_head.conv_logits"))[label])
    return found, masks


# --- claims ---


@pytest.mark.parametrize("size", [(32, 32), (96, 160)])
@pytest.mark.parametrize("score_threshold", [0.05, 0.6])
def test_detections_are_mmdetections(size, score_threshold):
    model = tiny(score_threshold=score_threshold)
    x = images(2, 3, *size)
    out = {k: v.detach().numpy() for k, v in model(x).items()}
    features = model.extract_features(x)
    proposals, proposal_logits = model.rpn_head.proposals(*model.rpn_head(features), size)
    for b in range(2):
        maps = [f[b].detach().numpy() for f in features[:4]]
        real = proposals[b][proposal_logits[b] > INVALID].detach().numpy()
        found, masks = second_stage(model.roi_head, maps, real, size)
        count = out["num_detections"][b]
        assert count == len(found) > 0
        scores, labels, boxes = zip(*found, strict=True)
        np.testing.assert_allclose(out["scores"][b, :count], scores, atol=1e-9)
        assert out["labels"][b, :count].tolist() == list(labels)
        np.testing.assert_allclose(out["boxes"][b, :count], boxes, atol=1e-4)
        np.testing.assert_allclose(out["masks"][b, :count], masks, atol=1e-6)


def test_detections_are_of_several_classes_and_cut_at_k():
    """Otherwise the comparison above would show little."""
    out = tiny()(images(2, 3, 96, 160))
    assert out["num_detections"].tolist() == [15, 15]
    assert len(out["labels"].unique()) >= 3
    few = tiny(score_threshold=0.6)(images(2, 3, 96, 160))["num_detections"]
    assert ((few > 0) & (few < 15)).all()


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 160)])
def test_outputs_have_the_documented_shapes_and_types(size):
    out = tiny().float()(images(2, 3, *size).float())
    tiny().double()
    assert {k: (tuple(v.shape), v.dtype) for k, v in out.items()} == {
        "num_detections": ((2,), torch.int32),
        "boxes": ((2, 15, 4), torch.float32),
        "scores": ((2, 15), torch.float32),
        "labels": ((2, 15), torch.int32),
        "masks": ((2, 15, 28, 28), torch.float32),
    }


def test_padded_entries_are_zero_boxes_and_scores_and_label_minus_one():
    out = tiny(score_threshold=0.6)(images(2, 3, 64, 96))
    for b, count in enumerate(out["num_detections"].tolist()):
        assert count < 15
        assert (out["scores"][b, :count] > 0.6).all()
        assert (out["labels"][b, :count] >= 0).all()
        assert out["boxes"][b, count:].abs().sum() == 0
        assert out["scores"][b, count:].abs().sum() == 0
        assert out["masks"][b, count:].abs().sum() == 0
        assert (out["labels"][b, count:] == -1).all()


def test_an_image_without_detections_is_all_padding():
    out = tiny(score_threshold=1.0)(images(1, 3, 32, 32))
    assert out["num_detections"].tolist() == [0]
    assert (out["labels"] == -1).all()
    assert sum(out[k].abs().sum() for k in ("boxes", "scores", "masks")) == 0


def test_detections_come_best_first_and_lie_inside_the_image():
    out = tiny()(images(2, 3, 96, 160))
    scores, boxes = out["scores"], out["boxes"]
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    assert (boxes >= 0).all()
    assert (boxes[..., [0, 2]] <= 160).all()
    assert (boxes[..., [1, 3]] <= 96).all()
    assert ((out["masks"] >= 0) & (out["masks"] <= 1)).all()


@pytest.mark.parametrize("size", [(32, 32), (96, 160)])
def test_a_batch_of_two_is_two_batches_of_one(size):
    model, x = tiny(score_threshold=0.6), images(2, 3, *size)
    together = model(x)
    for b in range(2):
        for name, value in model(x[b : b + 1]).items():
            torch.testing.assert_close(together[name][b], value[0], msg=lambda m, name=name: f"{name}: {m}")


def test_equal_boxes_of_two_classes_are_both_detected():
    """Suppression is within a class: zero deltas make every class's box the proposal."""
    head = RoIHead(TINY).eval()
    with torch.no_grad():
        head.bbox_head.fc_cls.weight.zero_()
        head.bbox_head.fc_reg.weight.zero_()
        head.bbox_head.fc_cls.bias.copy_(torch.tensor([2.0, 1, -9, -9, -9, 0]))
    features = [torch.randn(1, 8, 64 // s, 64 // s) for s in STRIDES]
    proposals = torch.tensor([[[4.0, 4, 40, 40], [5, 4, 41, 40], [50, 50, 60, 62]]])
    boxes, scores, labels = head.detect(features, proposals, torch.tensor([[0.9, 0.8, 0.7]]), (64, 64))
    assert labels[0, :4].tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(boxes[0, :4], proposals[0, [0, 2, 0, 2]])
    assert (scores[0, 4:] == INVALID).all()


def test_missing_proposals_detect_nothing():
    head = RoIHead(TINY).eval()
    features = [torch.randn(1, 8, 64 // s, 64 // s) for s in STRIDES]
    proposals = torch.tensor([[[4.0, 4, 40, 40], [20, 20, 60, 60]]])
    _, alone, _ = head.detect(features, proposals[:, :1], torch.tensor([[0.9]]), (64, 64))
    _, padded, _ = head.detect(features, proposals, torch.tensor([[0.9, INVALID]]), (64, 64))
    torch.testing.assert_close(padded, alone)
    _, nothing, _ = head.detect(features, proposals, torch.tensor([[INVALID, INVALID]]), (64, 64))
    assert (nothing == INVALID).all()


def test_a_box_pushed_out_of_the_image_is_no_detection():
    head = RoIHead(TINY).eval()
    with torch.no_grad():
        head.bbox_head.fc_reg.weight.zero_()
        head.bbox_head.fc_reg.bias.reshape(CLASSES, 4)[:, 0] = 100.0  # ten widths to the right
    features = [torch.randn(1, 8, 64 // s, 64 // s) for s in STRIDES]
    proposals = torch.tensor([[[4.0, 4, 40, 40]]])
    assert (head.detect(features, proposals, torch.tensor([[0.9]]), (64, 64))[1] == INVALID).all()


def test_mask_is_of_the_label_and_the_box():
    torch.manual_seed(0)
    head = RoIHead(TINY).eval()
    features = [torch.randn(2, 8, 64 // s, 64 // s) for s in STRIDES]
    boxes = torch.tensor([[[4.0, 4, 40, 40], [10, 20, 50, 60]], [[0, 0, 64, 64], [30, 30, 45, 41]]])
    labels = torch.tensor([[3, 0], [1, 4]])
    masks = head.masks(features, boxes, labels)
    for b in range(2):
        for k in range(2):
            alone = head.mask_pool([f[b : b + 1] for f in features], boxes[b, k : k + 1], torch.tensor([0]))
            expected = head.mask_head(alone)[0, labels[b, k]].sigmoid()
            torch.testing.assert_close(masks[b, k], expected)


def test_box_head_flattens_channels_first():
    torch.manual_seed(0)
    head = BoxHead(replace(TINY, fpn_channels=3, fc_channels=10)).double()
    x = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    state = ref.numpy_state(head)
    y = np.array([[p[c, i, j] for c in range(3) for i in range(7) for j in range(7)] for p in x.numpy()])
    for i in (0, 1):
        y = np.maximum(ref.linear(y, state, f"shared_fcs.{i}"), 0)
    logits, deltas = head(x)
    np.testing.assert_allclose(logits.detach().numpy(), ref.linear(y, state, "fc_cls"), atol=1e-12)
    np.testing.assert_allclose(deltas.detach().numpy(), ref.linear(y, state, "fc_reg"), atol=1e-12)
    assert logits.shape == (4, CLASSES + 1)
    assert deltas.shape == (4, 4 * CLASSES)


def test_box_head_can_have_convolutions_with_batch_norms_and_one_linear_layer():
    torch.manual_seed(0)
    config = replace(
        TINY, fpn_channels=3, fc_channels=10, box_convs=2, box_channels=4, box_fcs=1, box_norm=True
    )
    head = BoxHead(config).double().eval()
    state = head.state_dict()
    for name, value in state.items():
        if name.endswith(("running_mean", "bn.bias")):
            value.normal_()
        elif name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 2.0)
    x = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    y = x
    for i in (0, 1):
        bn = {k: state[f"shared_convs.{i}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")}
        y = F.conv2d(y, state[f"shared_convs.{i}.conv.weight"], padding=1)
        y = F.batch_norm(y, **bn).clamp(min=0)
    y = F.linear(y.flatten(1), state["shared_fcs.0.weight"], state["shared_fcs.0.bias"]).clamp(min=0)
    torch.testing.assert_close(head(x)[0], F.linear(y, state["fc_cls.weight"], state["fc_cls.bias"]))
    assert "shared_fcs.1.weight" not in state


def test_mask_head_doubles_fourteen_to_twenty_eight():
    assert MaskHead(8, 6, CLASSES)(torch.randn(3, 8, 14, 14)).shape == (3, CLASSES, 28, 28)


def test_image_of_numbers_the_flattened_rows():
    assert image_of(torch.zeros(3, 2, 4)).tolist() == [0, 0, 1, 1, 2, 2]


def test_state_dict_names_of_neck_and_heads_are_mmdetections():
    names = {n for n in build_model(TINY).state_dict() if not n.startswith("backbone.")}
    neck = [f"neck.{k}.{i}.conv" for k in ("lateral_convs", "fpn_convs") for i in range(4)]
    rpn = [f"rpn_head.rpn_{k}" for k in ("conv", "cls", "reg")]
    box = [f"roi_head.bbox_head.{k}" for k in ("shared_fcs.0", "shared_fcs.1", "fc_cls", "fc_reg")]
    mask = [f"roi_head.mask_head.convs.{i}.conv" for i in range(4)]
    mask += [f"roi_head.mask_head.{k}" for k in ("upsample", "conv_logits")]
    assert names == {f"{n}.{p}" for n in neck + rpn + box + mask for p in ("weight", "bias")}


def test_every_trained_parameter_gets_a_gradient_from_the_heads():
    model = build_model(TINY).double()
    for interaction in model.backbone.interactions:
        interaction.gamma.data.fill_(0.1)
    features = model.extract_features(images(1, 3, 64, 64))
    rois, index = torch.tensor([[4.0, 4, 40, 40], [0, 0, 60, 50]]).double(), torch.zeros(2, dtype=torch.int64)
    head = model.roi_head
    outputs = [t for level in model.rpn_head(features) for t in level]
    outputs += head.bbox_head(head.box_pool(features[:4], rois, index))
    outputs.append(head.mask_head(head.mask_pool(features[:4], rois, index)))
    sum((F.softplus(t) * torch.randn_like(t)).sum() for t in outputs).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
