"""Checkpoints of other models: named for what they are, in one sentence, and refused."""

import json
from pathlib import Path

import pytest
import torch

from meta_deploy.errors import CheckpointError
from meta_deploy.models.checkpoint.foreign import foreign_adapter, foreign_detector
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.checkpoint.read import read_checkpoint

PUBLISHED = Path(__file__).resolve().parents[4] / "shared" / "data" / "vit-adapter" / "keys"
DETECTORS = {  # what the published configurations call their models
    "MaskRCNN": "Mask R-CNN",
    "CascadeRCNN": "Cascade Mask R-CNN",
    "HybridTaskCascade": "HTC++",
    "HybridTaskCascadeAug": "HTC++",
    "ATSS": "ATSS",
    "GFL": "GFL",
    "SparseRCNN": "Sparse R-CNN",
    "Mask2Former": "Mask2Former",
    "EncoderDecoderMask2Former": "Mask2Former",
    "EncoderDecoderMask2FormerAug": "Mask2Former",
    "EncoderDecoder": "UPerNet",
}
MASK_RCNN = {
    "neck.lateral_convs.0.conv.weight": (4, 4, 1, 1),
    "rpn_head.rpn_conv.weight": (4, 4, 3, 3),
    "roi_head.bbox_head.fc_cls.weight": (81, 4),
    "roi_head.mask_head.conv_logits.weight": (80, 4, 1, 1),
}
UPERNET = {
    "decode_head.psp_modules.0.1.conv.weight": (4, 4, 1, 1),
    "decode_head.conv_seg.weight": (150, 4, 1, 1),
}

SPARSE_RCNN = {
    "rpn_head.init_proposal_bboxes.weight": (100, 4),
    "roi_head.bbox_head.0.fc_cls.weight": (80, 4),
}
MASK2FORMER = {
    "decode_head.pixel_decoder.input_convs.0.conv.weight": (4, 4, 1, 1),
    "decode_head.cls_embed.weight": (151, 4),
}
BEIT = {"backbone.blocks.0.attn.q_bias": (4,), "backbone.blocks.0.attn.relative_position_bias_table": (9, 2)}


def vit(width):
    names = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight")
    return {
        "backbone.pos_embed": (1, 197, width),
        "backbone.patch_embed.proj.weight": (width, 3, 16, 16),
        **{f"backbone.blocks.{i}.{name}": (width, 4) for i in range(2) for name in names},
    }


def vit_adapter(width):
    return {
        **vit(width),
        "backbone.level_embed": (3, width),
        "backbone.spm.stem.0.weight": (64, 3, 3, 3),
        "backbone.interactions.0.injector.gamma": (width,),
        "backbone.interactions.0.injector.attn.sampling_offsets.weight": (144, width),
        "backbone.norm1.weight": (width,),
    }


def vit_comer(width):
    return {
        **{name: shape for name, shape in vit_adapter(width).items() if ".injector." not in name},
        "backbone.interactions.0.cti_tov.gamma": (width,),
    }


def swin(width, third_stage, official=False):
    if official:
        blocks = {f"backbone.layers.2.blocks.{i}.attn.qkv.weight": (4, 4) for i in range(third_stage)}
        first = "backbone.layers.0.blocks.0.attn.qkv.weight"
        return {"backbone.patch_embed.proj.weight": (width, 3, 4, 4), first: (4, 4), **blocks}
    blocks = {f"backbone.stages.2.blocks.{i}.attn.w_msa.qkv.weight": (4, 4) for i in range(third_stage)}
    first = "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight"
    return {"backbone.patch_embed.projection.weight": (width, 3, 4, 4), first: (4, 4), **blocks}


def resnet(third_stage, last="conv3"):
    blocks = {f"backbone.layer3.{i}.conv1.weight": (4, 4, 1, 1) for i in range(third_stage)}
    first = {f"backbone.layer1.0.{conv}.weight": (4, 4, 1, 1) for conv in ("conv1", last)}
    return {"backbone.conv1.weight": (64, 3, 7, 7), **first, **blocks}


def zeros(*parts):
    return {name: torch.zeros(shape) for part in parts for name, shape in part.items()}


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (zeros(vit_adapter(192), SPARSE_RCNN), "ViT-Adapter-T with Sparse R-CNN"),
        (zeros(vit_adapter(768), BEIT, MASK2FORMER), "ViT-Adapter-B (BEiT) with Mask2Former, 150 classes"),
        (zeros(vit_adapter(320), BEIT, MASK_RCNN), "ViT-Adapter (BEiT) with Mask R-CNN, 80 classes"),
        (zeros(vit_adapter(384), BEIT), "ViT-Adapter-S (BEiT)"),
        (zeros(vit_comer(384), UPERNET), "ViT-CoMer-S with UPerNet, 150 classes"),
        (zeros(vit(1024), MASK_RCNN), "a plain ViT-L with Mask R-CNN, 80 classes"),
        (zeros(swin(96, 6), MASK_RCNN), "Swin-T with Mask R-CNN, 80 classes"),
        (zeros(swin(96, 18), UPERNET), "Swin-S with UPerNet, 150 classes"),
        (zeros(swin(128, 18, official=True), UPERNET), "Swin-B with UPerNet, 150 classes"),
        (zeros(resnet(6), MASK_RCNN), "ResNet-50 with Mask R-CNN, 80 classes"),
        (zeros(resnet(6, "conv2"), MASK_RCNN), "ResNet-34 with Mask R-CNN, 80 classes"),
        (zeros(resnet(23), {"bbox_head.retina_cls.weight": (720, 4, 3, 3)}), "ResNet-101 with RetinaNet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("arguments", [(), ("meta-t-mask-rcnn",)])
def test_a_foreign_model_is_named_in_one_sentence(tmp_path, state, name, arguments):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": state, "meta": {}}, path)
    with pytest.raises(CheckpointError) as error:
        load_model(path, *arguments)
    message = str(error.value)
    assert message.startswith(f"checkpoint '{path}' is {name}")
    assert "; not supported, give a META" in message
    assert "--allow-partial" not in message
    assert "\n" not in message


def test_an_adapters_backbone_saved_alone_is_named(tmp_path):
    state = {name.removeprefix("backbone."): tensor for name, tensor in zeros(vit_comer(192)).items()}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"is ViT-CoMer-T; not supported"):
        load_model(tmp_path / "x.pth", "meta-t-mask-rcnn", allow_partial=True)


def published(pattern="*.json"):
    return sorted(path for path in PUBLISHED.glob(pattern) if path.name != "classes.json")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the names of the published checkpoints are not here")
def test_every_published_checkpoint_of_vit_adapter_is_named():
    assert len(published()) > 50
    for path in published():
        facts = json.loads(path.read_text())
        names = facts["state_dict"]
        state = {name: torch.empty(shape, device="meta") for name, (_, *shape) in names.items()}
        what = foreign_adapter(state) or foreign_detector(state) or ""
        backbone = "ViT-Adapter" if "adapter" in path.stem else "a plain ViT"
        size = next(s for s in ("tiny", "small", "base", "large") if s in path.stem)[0].upper()
        kind = {"BEiT": " (BEiT)", "UniP": " (Uni-Perceiver)"}.get(facts["backbone"]["type"][:4], "")
        start = f"{backbone}-{size}{kind} with {DETECTORS[facts['detector']]}"
        classes = f", {facts['classes']} classes"
        # Sparse R-CNN's classifier may or may not have a background.
        assert what.removesuffix(", 79 classes").removesuffix(classes) == start, path.name


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the files that mmcv wrote are not here")
@pytest.mark.parametrize("name", ["detection.pth", "segmentation.pth.tar", "segmentation-legacy.pth.tar"])
def test_files_that_mmcv_wrote_are_read_and_named(name):
    """They hold a few tensors of a backbone, in all that mmcv writes around them."""
    read = read_checkpoint(PUBLISHED / "checkpoint-structure" / name)
    assert len(read.state) == 6
    assert read.class_names[0] == ("person" if name.startswith("detection") else "wall")
    with pytest.raises(CheckpointError, match="holds a ViT-Adapter backbone of width 4 without a head"):
        load_model(PUBLISHED / "checkpoint-structure" / name)
