"""ATSS and GFL: decoding and selection against MMDetection 2.x's test path in numpy, pair by pair."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch.nn import functional as F

from meta_deploy.errors import InputError
from meta_deploy.models.backbones.meta import METAConfig
from meta_deploy.models.heads.atss import ATSSConfig
from meta_deploy.models.heads.dense import STRIDES
from meta_deploy.models.heads.gfl import GFLConfig, Integral
from meta_deploy.models.heads.head import HEADS
from meta_deploy.models.registry import build_model
from tests.models import references as ref

CLASSES, SIZE = 3, (64, 96)
BACKBONE = METAConfig(16, 4, 2, inplanes=4, adapter_parts=2, pos_grid=4)
CONFIGS = {
    kind: kind("tiny", BACKBONE, num_classes=CLASSES, fpn_channels=8, channels=32, convs=1, max_detections=20)
    for kind in (ATSSConfig, GFLConfig)
}


def raw(outputs, batch=2):
    """What a head may give: levels of maps, each of so many channels."""
    g = torch.Generator().manual_seed(0)
    sizes = [(-(-SIZE[0] // s), -(-SIZE[1] // s)) for s in STRIDES]
    return [
        tuple(torch.randn(batch, n, *size, generator=g, dtype=torch.float64) * 2 for n in outputs)
        for size in sizes
    ]


def atss_box(level, y, x, stride):
    """The anchor of 8 strides around (x, y) * stride, moved."""
    anchor = [
        x * stride - 4 * stride,
        y * stride - 4 * stride,
        x * stride + 4 * stride,
        y * stride + 4 * stride,
    ]
    return ref.decode(anchor, level[1][:, y, x], (0.1, 0.1, 0.2, 0.2), SIZE)


def gfl_box(level, y, x, stride):
    """Four distances, each the mean of a distribution over 0 .. 16, in strides."""
    left, top, right, bottom = (
        stride * sum(i * p for i, p in enumerate(ref.softmax(bins)))
        for bins in level[1][:, y, x].reshape(4, 17)
    )
    H, W = SIZE
    corners = (x * stride - left, y * stride - top, x * stride + right, y * stride + bottom)
    return [min(max(corner, 0), limit) for corner, limit in zip(corners, (W, H, W, H), strict=True)]


def reference(levels, box, config):
    """`BaseDenseHead._get_bboxes_single` and `_bbox_post_process` of one image."""
    found = []
    for level, stride in zip(levels, STRIDES, strict=True):
        scores = ref.sigmoid(level[0])
        pairs = [(scores[c, y, x], c, y, x) for c, y, x in np.ndindex(scores.shape)]
        pairs = sorted((p for p in pairs if p[0] > config.score_threshold), key=lambda p: -p[0])
        for score, c, y, x in pairs[: config.pre_nms]:
            factor = ref.sigmoid(level[2][0, y, x]) if len(level) > 2 else 1.0
            found.append((score * factor, c, box(level, y, x, stride)))
    found = [f for f in found if f[2][2] > f[2][0] and f[2][3] > f[2][1]]
    scores, labels = np.array([f[0] for f in found]), np.array([f[1] for f in found])
    boxes, kept = np.array([f[2] for f in found]), []
    for c in range(CLASSES):
        of_class = np.flatnonzero(labels == c)
        kept += [of_class[i] for i in ref.greedy_nms(boxes[of_class], scores[of_class], config.nms)]
    kept = sorted(kept, key=lambda i: -scores[i])[: config.max_detections]
    return boxes[kept], scores[kept], labels[kept]


@pytest.mark.parametrize(
    ("kind", "outputs", "box"),
    [(ATSSConfig, (CLASSES, 4, 1), atss_box), (GFLConfig, (CLASSES, 68), gfl_box)],
    ids=["atss", "gfl"],
)
@pytest.mark.parametrize("changes", [{}, {"pre_nms": 15, "score_threshold": 0.3}, {"score_threshold": 0.99}])
def test_detections_are_mmdetections(kind, outputs, box, changes, monkeypatch):
    config = replace(CONFIGS[kind], **changes)
    model, levels = build_model(config).double(), raw(outputs)
    monkeypatch.setattr(model.bbox_head, "forward", lambda features: levels)
    out = {name: value.detach().numpy() for name, value in model(torch.zeros(2, 3, *SIZE).double()).items()}
    for b in range(2):
        image = [tuple(part[b].numpy() for part in level) for level in levels]
        boxes, scores, labels = reference(image, box, config)
        count = out["num_detections"][b]
        assert count == len(scores)
        np.testing.assert_allclose(out["scores"][b, :count], scores, atol=1e-12)
        np.testing.assert_allclose(out["boxes"][b, :count], boxes, atol=1e-9)
        assert out["labels"][b, :count].tolist() == labels.tolist()
        assert (out["labels"][b, count:] == -1).all()
        assert not out["boxes"][b, count:].any()
    assert changes.get("score_threshold") == 0.99 or set(out["labels"][0].tolist()) >= set(range(CLASSES))


def test_centerness_comes_after_the_threshold(monkeypatch):
    """A pair of score 0.5 stays where its centerness brings it below the threshold."""
    config = replace(CONFIGS[ATSSConfig], score_threshold=0.4)
    model = build_model(config).double()
    levels = [tuple(torch.full_like(part, -20.0) for part in level) for level in raw((CLASSES, 4, 1), 1)]
    levels[1][0][0, 2, 1, 1] = 0.0  # a sigmoid of 0.5
    levels[1][1].zero_()
    levels[1][2].zero_()
    monkeypatch.setattr(model.bbox_head, "forward", lambda features: levels)
    out = model(torch.zeros(1, 3, *SIZE).double())
    assert out["num_detections"].tolist() == [1]
    assert out["scores"][0, 0].item() == pytest.approx(0.25)
    assert out["labels"][0, 0].item() == 2


@pytest.mark.parametrize("kind", CONFIGS, ids=["atss", "gfl"])
def test_towers_are_convolution_group_norm_and_relu(kind):
    torch.manual_seed(0)
    head = build_model(CONFIGS[kind]).double().bbox_head
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    state = head.state_dict()
    tag = kind.__struct_config__.tag
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)

    def tower(name):
        hidden = F.conv2d(x, state[f"{name}.0.conv.weight"], padding=1).reshape(2, 32, 1, 4, 6)
        mean, var = (
            hidden.mean(dim=(2, 3, 4), keepdim=True),
            hidden.var(dim=(2, 3, 4), keepdim=True, correction=0),
        )
        normal = ((hidden - mean) / (var + 1e-5).sqrt()).reshape(2, 32, 4, 6)
        weight, bias = (state[f"{name}.0.gn.{k}"][:, None, None] for k in ("weight", "bias"))
        return (normal * weight + bias).clamp(min=0)

    def conv(name, given):
        return F.conv2d(given, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    logits, boxes, *rest = head([x] * 5)[2]
    torch.testing.assert_close(logits, conv(f"{tag}_cls", tower("cls_convs")))
    expected = conv(f"{tag}_reg", tower("reg_convs")) * state["scales.2.scale"]
    torch.testing.assert_close(boxes, expected)
    if rest:
        torch.testing.assert_close(rest[0], conv("atss_centerness", tower("reg_convs")))


def test_the_pyramids_last_maps_are_convolutions_of_stride_two():
    torch.manual_seed(0)
    neck = build_model(CONFIGS[ATSSConfig]).double().neck
    maps = [torch.randn(1, 16, *size, dtype=torch.float64) for size in ((12, 20), (6, 10), (3, 5))]
    *_, third, fourth, fifth = neck(maps)
    for before, after, i in ((third, fourth, 3), (fourth, fifth, 4)):
        conv = neck.fpn_convs[i].conv
        torch.testing.assert_close(after, F.conv2d(before, conv.weight, conv.bias, stride=2, padding=1))
    assert [tuple(m.shape[2:]) for m in (third, fourth, fifth)] == [(3, 5), (2, 3), (1, 2)]


def test_the_integral_is_the_mean_of_the_bins():
    logits = torch.full((1, 1, 68), -50.0, dtype=torch.float64).reshape(1, 1, 4, 17)
    for side, bins in enumerate(([0], [16], [3, 4], [0, 16])):
        logits[0, 0, side, bins] = 0.0
    out = Integral(16).double()(logits.flatten(2))
    assert out[0, 0].tolist() == pytest.approx([0.0, 16.0, 3.5, 8.0])


@pytest.mark.parametrize("kind", CONFIGS, ids=["atss", "gfl"])
def test_tensors_tell_the_configuration(kind):
    config = replace(CONFIGS[kind], **({"reg_max": 7} if kind is GFLConfig else {}))
    with torch.device("meta"):
        state = build_model(config).state_dict()
    (head,) = [head for head in HEADS.values() if head.recognise(state)]
    other = kind("tiny", BACKBONE, num_classes=head.num_classes(state), max_detections=20)
    assert replace(other, **head.measure(other, state)) == config


def test_channels_that_the_norm_cannot_group_are_refused():
    with pytest.raises(InputError, match="40 channels are not a multiple of 32"):
        replace(CONFIGS[GFLConfig], channels=40)
