"""Small models, and what tests of checkpoints do with them again and again."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from meta_deploy.errors import CheckpointError
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.registry import build_model, get_config


def small(head="mask-rcnn", num_classes=3, backbone=None, **options):
    """A nano with everything narrow but the width, by which the zoo knows it."""
    config = get_config(f"meta-nano-{head}", num_classes)
    narrow = {"fpn_channels": 16, "fc_channels": 24, "mask_channels": 8} if head == "mask-rcnn" else {}
    narrow = narrow or {"channels": 16}
    sizes = {"depth": 4, "mlp_ratio": 1.0, "adapter_ratio": 0.125, "adapter_parts": 2, "inplanes": 4}
    return replace(
        config,
        backbone=replace(config.backbone, **{**sizes, **(backbone or {})}),
        **{**narrow, **options},
    )


def build(config):
    torch.manual_seed(0)
    return build_model(config)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refusal(path, *args, **kwargs):
    """The message with which loading fails; one line that names the file."""
    with pytest.raises(CheckpointError) as error:
        load_model(path, *args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 1200
    return message


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}
