"""Models of timm and transformers with random weights, exported by PyTorch; nothing is downloaded.

Knows PyTorch and the models' names; must not know what is measured on their graphs.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from benchmarks.foreign_graphs import BATCH
from meta_deploy.errors import InputError
from meta_deploy.export.trace import quiet
from meta_deploy.models.backbones.timm_features import import_timm

TORCHSCRIPT_OPSET = 17  # the newest that it writes layer norms for

Made = tuple[nn.Module, tuple[int, ...]]  # a model and its input's shape


def timm_model(name: str, side: int = 224, **settings: Any) -> Made:
    """One of timm's models by its name."""
    import timm

    return timm.create_model(name, **settings), (1, 3, side, side)


class Outputs(nn.Module):
    """A model of transformers that returns some of its outputs, as tensors."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images)
        return tuple(getattr(outputs, name) for name in self.names)


def transformers_model(
    model: str, config: str, outputs: Sequence[str], side: int = 224, **settings: Any
) -> Made:
    """One of transformers' models by the names of its class and its configuration's."""
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return Outputs(made, outputs), (1, 3, side, side)


def mask2former() -> Made:
    """Mask2Former on a small Swin."""
    from transformers import Mask2FormerConfig, SwinConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = SwinConfig(
        embed_dim=96, depths=[2, 2, 2, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=stages
    )
    sizes = Mask2FormerConfig(
        backbone_config=backbone, num_labels=20, decoder_layers=2, encoder_layers=1, num_queries=50
    ).to_dict()
    names = ["class_queries_logits", "masks_queries_logits"]
    return transformers_model(
        *("Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", names, 256),
        **{**sizes, "backbone_config": backbone},
    )


def rtdetr() -> Made:
    """RT-DETR on a small ResNet."""
    from transformers import RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        layer_type="basic",
        embedding_size=64,
        out_features=["stage2", "stage3", "stage4"],
    )
    return transformers_model(
        *("RTDetrForObjectDetection", "RTDetrConfig", ["logits", "pred_boxes"], 320),
        backbone_config=backbone,
        encoder_in_channels=[128, 256, 512],
        num_labels=20,
        decoder_layers=2,
        anchor_image_size=None,
    )


_SMALL = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
MODELS: dict[str, Callable[[], Made]] = {
    "vit": partial(timm_model, "vit_tiny_patch16_224"),
    "deit": partial(timm_model, "deit_tiny_distilled_patch16_224"),
    "beit": partial(timm_model, "beit_base_patch16_224", depth=3),
    "eva02": partial(timm_model, "eva02_tiny_patch14_224", depth=4),
    "dinov3": partial(timm_model, "vit_small_patch16_dinov3", 256, depth=4),
    "swin": partial(timm_model, "swin_tiny_patch4_window7_224"),
    "swinv2": partial(timm_model, "swinv2_tiny_window8_256", 256, depths=(2, 2, 2, 2)),
    "sam": partial(timm_model, "samvit_base_patch16", 256, depth=3, img_size=256),
    "davit": partial(timm_model, "davit_tiny", depths=(1, 1, 2, 1)),
    "maxvit": partial(timm_model, "maxvit_tiny_tf_224"),
    "mvitv2": partial(timm_model, "mvitv2_tiny"),
    "pvtv2": partial(timm_model, "pvt_v2_b1"),
    "xcit": partial(timm_model, "xcit_nano_12_p16_224"),
    "levit": partial(timm_model, "levit_128s"),
    "mobilevit": partial(timm_model, "mobilevit_s", 256),
    "edgenext": partial(timm_model, "edgenext_x_small", 256),
    "efficientvit": partial(timm_model, "efficientvit_m2"),
    "convnext": partial(timm_model, "convnext_tiny", depths=(2, 2, 3, 2)),
    "cvt": partial(transformers_model, "CvtModel", "CvtConfig", ["last_hidden_state"], depth=[1, 2, 3]),
    "segformer": partial(
        *(transformers_model, "SegformerForSemanticSegmentation", "SegformerConfig", ["logits"], 256),
        depths=[1, 1, 1, 1],
    ),
    "dinov2": partial(
        transformers_model, "Dinov2Model", "Dinov2Config", ["last_hidden_state"], image_size=224, **_SMALL
    ),
    "sam-small": partial(
        *(transformers_model, "SamVisionModel", "SamVisionConfig", ["last_hidden_state"], 256),
        **_SMALL,
        image_size=256,
        window_size=7,
        global_attn_indexes=[1, 3],
        output_channels=64,
    ),
    "vitpose": partial(
        *(transformers_model, "VitPoseBackbone", "VitPoseBackboneConfig", ["feature_maps"]),
        **_SMALL,
        image_size=[224, 224],
        out_features=["stage4"],
    ),
    "dpt": partial(
        *(transformers_model, "DPTForDepthEstimation", "DPTConfig", ["predicted_depth"]),
        **_SMALL,
        image_size=224,
        intermediate_size=768,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[32, 64, 128, 128],
        fusion_hidden_size=64,
    ),
    "mask2former": mask2former,
    "rtdetr": rtdetr,
}


def exported(name: str, exporter: str) -> tuple[onnx.ModelProto, np.ndarray]:
    """A model's graph as PyTorch writes it, and random images for it; two where the batch is open."""
    with contextlib.suppress(InputError):
        import_timm()  # beside any torchvision, which transformers imports too
    torch.manual_seed(0)
    model, shape = MODELS[name.removesuffix(BATCH)]()
    enlivened(model.eval())
    any_batch = name.endswith(BATCH)
    images = torch.randn(1 + any_batch, *shape[1:])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), quiet(), silent():
        file = str(Path(folder) / "model.onnx")
        if exporter == "dynamo":
            sizes = ({0: torch.export.Dim("batch", min=1, max=8)},) if any_batch else None
            torch.onnx.export(
                model, (images,), file, dynamo=True, input_names=["x"], dynamic_shapes=sizes, verbose=False
            )
        else:
            axes = {"x": {0: "batch"}} if any_batch else None
            torch.onnx.export(
                *(model, (images,), file),
                dynamo=False,
                opset_version=TORCHSCRIPT_OPSET,
                input_names=["x"],
                dynamic_axes=axes,
            )
        return onnx.load(file), images.numpy()


def enlivened(model: nn.Module) -> None:
    """Random weights that keep values of order one, so that every path counts; many start as zero or one."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                fan = max(weight[0].numel(), 1)
                weight.copy_(torch.randn(weight.shape) / math.sqrt(fan))
            elif weight.numel() > 1:
                weight.copy_(weight.mean().round() * ("bias" not in name) + 0.2 * torch.randn(weight.shape))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep the exporters' remarks away."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
