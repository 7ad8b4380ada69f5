"""Small models whose every part says something, and their exports, made once: an export takes seconds."""

import functools
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from msgspec.structs import replace
from torch import nn

from meta_deploy.export.options import Options
from meta_deploy.export.sources.checkpoint import input_spec
from meta_deploy.export.trace import export_onnx, quiet
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.models.backbones.meta import METAConfig
from meta_deploy.models.backbones.vit_adapter import ViTAdapterConfig
from meta_deploy.models.heads.gfl import GFLConfig
from meta_deploy.models.heads.mask_rcnn import MaskRCNNConfig
from meta_deploy.models.heads.upernet import UPerNetConfig
from meta_deploy.models.registry import build_model
from meta_deploy.targets import TARGETS

SIZE = (96, 128)
BACKBONE = {"embed_dim": 16, "depth": 4, "num_heads": 2, "inplanes": 4, "adapter_parts": 1, "pos_grid": 4}
# Every setting of it changed.
CHANGED = {"window": 3, "stripe_width": 3, "layer_scale": True, "shared_norm": False, "adapter_parts": 2}


def detector(**backbone):
    return MaskRCNNConfig(
        "tiny-mask-rcnn",
        METAConfig(**{**BACKBONE, **backbone}),
        num_classes=5,
        fpn_channels=8,
        fc_channels=16,
        mask_channels=8,
        rpn_pre_nms=60,
        proposals=40,
        max_detections=100,
        input_size=SIZE,
    )


def adapter(**backbone):
    """A detector on a small ViT-Adapter with windows, two interactions and an extra extractor."""
    small = {"embed_dim": 16, "depth": 8, "num_heads": 2, "deform_heads": 2, "inplanes": 4, "pos_grid": 4}
    parts = {"window": 4, "interactions": 2, "extra_extractors": 1}
    return replace(detector(), backbone=ViTAdapterConfig(**{**small, **parts, **backbone}))


def dense(**backbone):
    """A detector without masks, that says of many places that something may be there."""
    backbone = METAConfig(**{**BACKBONE, **backbone})
    narrow = {"fpn_channels": 8, "channels": 64, "convs": 1}
    few = {"pre_nms": 40, "max_detections": 50, "score_threshold": 0.005}
    return GFLConfig("tiny-gfl", backbone, num_classes=5, input_size=SIZE, **narrow, **few)


def segmenter(**backbone):
    backbone = METAConfig(**{**BACKBONE, **backbone})
    return UPerNetConfig("tiny-upernet", backbone, num_classes=6, channels=8, input_size=SIZE)


def adapter_segmenter(**backbone):
    """A segmenter on the least of a ViT-Adapter."""
    small = {"embed_dim": 16, "depth": 4, "num_heads": 2, "deform_heads": 2, "inplanes": 4, "pos_grid": 4}
    least = {"interactions": 1, "extra_extractors": 0}
    return replace(segmenter(), backbone=ViTAdapterConfig(**{**small, **least, **backbone}))


def lively(config, seed=0):
    """A model with no weight and no statistic at its initialization, that detects several classes."""
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms, biases, gammas: much of it starts as 0 or 1
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith(("pos_embed", "level_embed")):
                parameter.normal_()
        for name, statistic in model.named_buffers():
            if name.endswith("running_mean"):
                statistic.normal_(std=0.3)
            elif name.endswith("running_var"):
                statistic.uniform_(0.5, 2.0)
        if isinstance(config, MaskRCNNConfig):
            _spread(model)
        if isinstance(config, GFLConfig):
            for conv in (model.bbox_head.gfl_cls, model.bbox_head.gfl_reg):
                conv.weight.normal_(std=0.3)
    return model


def _spread(model):
    """Scale the box head so that its outputs spread over the proposals of a picture, as trained ones do."""
    head = model.roi_head.bbox_head
    for conv in (model.rpn_head.rpn_conv, model.rpn_head.rpn_cls, model.rpn_head.rpn_reg):
        conv.weight.normal_(std=0.15)
    images = pictures(1)
    features = model.extract_features(images)
    proposals, _ = model.rpn_head.proposals(*model.rpn_head(features), images.shape[2:])
    index = torch.zeros(proposals.shape[1], dtype=torch.int64)
    for fc, spread in ((head.fc_cls, 2.0), (head.fc_reg, 1.0)):
        fc.weight.normal_()
        out = head(head_input := model.roi_head.box_pool(features[:4], proposals[0], index))[
            fc is head.fc_reg
        ]
        factor = spread / out.std(dim=0).clamp(min=1e-3)
        fc.weight.mul_(factor[:, None])
        fc.bias.copy_(-(out - fc.bias).mean(dim=0) * factor)
    assert head_input.any()


def pictures(batch, size=SIZE, seed=1):
    """Smooth noise, normalized: (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 6, 6, generator=generator)
    fine = torch.randn(batch, 3, *size, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic") + 0.3 * fine


def made_once(key, make):
    """What `make()` gives, made by the first worker that asks for it; kept in the folder `$MADE_ONCE`."""
    kept = Path(os.environ["MADE_ONCE"]) / hashlib.sha256(key.encode()).hexdigest()
    if kept.exists():
        return pickle.loads(kept.read_bytes())
    made = make()
    begun = kept.with_suffix(f".{os.getpid()}")
    begun.write_bytes(pickle.dumps(made))
    begun.rename(kept)
    return made


class Exported:
    """A model, its graph with all stages as outputs, and a session of it after the passes."""

    def __init__(
        self, config, size=None, batch=1, dynamic_batch=None, dynamic_size=False, operators="native"
    ):
        self.config = config
        self.model = lively(config)
        options = Options(batch=batch, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
        self.spec = input_spec(size or config.input_size, options)
        target = TARGETS["onnxruntime" if operators == "native" else "tensorrt"]

        def make():
            literal = export_onnx(self.model, self.spec, operators)
            return literal, *run_passes(literal, list(target.passes), target.prices)

        self.literal, self.graph, self.passes = made_once(f"{config}{self.spec}{operators}", make)

    def literal_copy(self):
        copy = onnx.ModelProto()
        copy.CopyFrom(self.literal)
        return copy

    @functools.cached_property
    def session(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(
            self.graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def both(self, images):
        """What PyTorch and ONNX Runtime give: two dicts of arrays."""
        with torch.inference_mode():
            expected = {k: v.numpy() for k, v in self.model(images, stages=True).items()}
        names = [output.name for output in self.session.get_outputs()]
        actual = dict(zip(names, self.session.run(None, {"images": images.numpy()}), strict=True))
        return expected, actual


@functools.cache
def exported(
    kind="detector",
    size=None,
    batch=1,
    dynamic_batch=None,
    dynamic_size=False,
    operators="native",
    **backbone,
):
    """Made once for each set of arguments."""
    kinds = {
        "detector": detector,
        "adapter": adapter,
        "dense": dense,
        "segmenter": segmenter,
        "adapter segmenter": adapter_segmenter,
    }
    config = kinds[kind](**backbone)
    return Exported(config, size, batch, dynamic_batch, dynamic_size, operators)


def assert_same(expected, actual):
    """Every output alike in name, order, type and shape; maps in value, boxes as sets.

    Rounding may swap two boxes of nearly one score, and once in a while keep one that overlaps just enough.
    """
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        if name.startswith(("feature_", "logits")):
            scale = np.abs(array).max()
            np.testing.assert_allclose(actual[name] / scale, array / scale, rtol=0, atol=1e-4, err_msg=name)
    if "boxes" not in expected:
        return
    for b in range(len(expected["boxes"])):
        proposals = ("proposals", "proposal_logits")
        assert _partners(*({name: side[name][b] for name in proposals} for side in (expected, actual))) > 0.95
        found = [side["num_detections"][b] for side in (expected, actual)]
        assert abs(int(found[0]) - int(found[1])) <= 1
        names = ("boxes", "scores", "labels", "masks")
        lists = [
            {name: side[name][b, : side["num_detections"][b]] for name in names}
            for side in (expected, actual)
        ]
        assert _partners(*lists) > 0.95
        rest = {name: actual[name][b, found[1] :] for name in names}
        assert not any(rest[name].any() for name in ("boxes", "scores", "masks"))
        assert (rest["labels"] == -1).all()


def _partners(expected, actual):
    """The share of the expected entries that have one in `actual` that is the same in every respect."""
    near = np.array(True)
    for name, array in expected.items():
        difference = np.abs(array[:, None].astype(np.float32) - actual[name][None])
        near = near & (difference.reshape(*difference.shape[:2], -1).max(axis=-1) <= NEAR[name])
    return near.any(axis=1).mean() if len(near) else 1.0


NEAR = {"boxes": 0.05, "scores": 1e-3, "labels": 0, "masks": 5e-3, "proposals": 0.05, "proposal_logits": 1e-3}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)))


class Shifted(nn.Module):
    """A block of windowed attention, shifted, with a bias for each place and a mask (as in Swin)."""

    def __init__(self, bias=True):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(4, 16, 16)) if bias else None

    def forward(self, x):
        B, H, W, C = x.shape
        t = torch.roll(self.norm(x), (-2, -2), (1, 2))
        t = t.view(B, H // 4, 4, W // 4, 4, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, C)
        q, k, v = self.qkv(t).reshape(-1, 16, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * 0.5) @ k.transpose(-2, -1)
        if self.bias is not None:
            weights = weights + self.bias
        t = self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, C))
        t = t.view(B, H // 4, W // 4, 4, 4, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        return x + torch.roll(t, (2, 2), (1, 2))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.layers(x)


class Packed(nn.Module):
    """Attention as a ViT of timm has it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 4, C // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(B, N, C))


OTHERS = {
    "residual": (Residual, (2, 3, 32, 32)),
    "encoder": (Encoder, (2, 7, 16)),
    "packed": (Packed, (2, 7, 16)),
    "shifted windows": (Shifted, (2, 8, 12, 16)),
    "shifted windows, no bias": (lambda: Shifted(bias=False), (2, 8, 12, 16)),
}


@functools.cache
def other(name, opset=20, dynamic=False):
    make, shape = OTHERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            make().eval(),
            (x,),
            dynamo=True,
            optimize=False,
            opset_version=opset,
            input_names=["x"],
            dynamic_shapes=({0: torch.export.Dim("b", min=1)},) if dynamic else None,
            verbose=False,
        )
    return program.model_proto, {"x": x.numpy()}
