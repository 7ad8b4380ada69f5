"""Names to configurations, and configurations to models. A configuration round-trips through JSON.

Knows no head and no backbone by name: each is a file in `heads/` or `backbones/` that registers itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Union

import msgspec
from torch import nn

from meta_deploy.errors import InputError
from meta_deploy.models.backbones.backbone import BACKBONES, Backbone
from meta_deploy.models.config import explain, import_all
from meta_deploy.models.heads.head import HEADS, Head
from meta_deploy.models.heads.head import HeadConfig as ModelConfig

import_all("meta_deploy.models.heads")

_MODELS: dict[str, tuple[Backbone, str, Head]] = {
    f"{backbone.name}-{size}-{head.name}": (backbone, size, head)
    for backbone in BACKBONES.values()
    for size in backbone.sizes
    for head in HEADS.values()
}
MODEL_NAMES = tuple(_MODELS)
# All of them in a line of a message.
NAMES_IN_SHORT = (
    " or ".join(
        f"{backbone.name}:NAME-HEAD"
        if backbone.settings
        else f"{backbone.name}-{{{','.join(backbone.sizes)}}}-HEAD"
        for backbone in BACKBONES.values()
    )
    + f", where HEAD is {', '.join(sorted(HEADS))}, such as meta-t-mask-rcnn"
)
_UNSAID = "meta"  # the backbone of configurations that name none


def get_config(name: str, num_classes: int | None = None) -> ModelConfig:
    """The configuration of a model.

    Args:
        name: one of `MODEL_NAMES`, such as "meta-t-mask-rcnn", or, of a backbone with any number of sizes,
            such as "timm:convnext_tiny-mask-rcnn".
        num_classes: overrides the default (80 for COCO, 150 for ADE20K).

    Raises:
        InputError: no such model, or a number of classes that is not positive.
    """
    found = _MODELS.get(name) or _of_any_size(name)
    if found is None:
        raise InputError(f"No model is named '{name}'; choose {NAMES_IN_SHORT}.")
    backbone, size, head = found
    options = dict(head.by_size.get(size, {}))
    if num_classes is not None:
        options["num_classes"] = num_classes
    return head.config(name=name, backbone=backbone.configure(size, head.task), **options)


def _of_any_size(name: str) -> tuple[Backbone, str, Head] | None:
    """The parts of a name such as timm:convnext_tiny-mask-rcnn."""
    start, colon, rest = name.partition(":")
    size, _, head = rest.partition("-")
    backbone = BACKBONES.get(start)
    if not colon or head not in HEADS or backbone is None or backbone.settings is None:
        return None
    return backbone, size, HEADS[head]


def build_model(config: ModelConfig) -> nn.Module:
    """The PyTorch model of a configuration, freshly initialized, in evaluation mode."""
    backbone = backbone_of(config).model(config.backbone)
    return HEADS[config.head].model(config, backbone).eval()


def backbone_of(config: ModelConfig) -> Backbone:
    """The entry of a configuration's backbone."""
    return BACKBONES[str(config.backbone.__struct_config__.tag)]


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """A configuration as JSON-ready data; `config_from_dict` reads it back equal."""
    data = msgspec.json.decode(msgspec.json.encode(config))
    if data["backbone"]["type"] == _UNSAID:
        del data["backbone"]["type"]
    return data


def config_from_dict(data: Mapping[str, Any]) -> ModelConfig:
    """Read what `config_to_dict` wrote.

    Raises:
        InputError: an unknown head, or a field that is unknown, missing, of the wrong type or out of range.
    """
    if isinstance(data, Mapping) and isinstance(data.get("backbone"), Mapping):
        data = {**data, "backbone": {"type": _UNSAID, **data["backbone"]}}
    try:
        return msgspec.convert(data, Union[tuple(head.config for head in HEADS.values())])  # noqa: UP007
    except msgspec.ValidationError as error:
        raise InputError(explain(error, data)) from error
