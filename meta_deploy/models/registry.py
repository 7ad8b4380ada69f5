"""Names to configurations, and configurations to models. A configuration round-trips through JSON.

To add a head: a configuration dataclass here, its module beside the others, one line in `_MODELS`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from meta_deploy.errors import InputError

if TYPE_CHECKING:
    from torch import nn

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's declared type; a whole number is a float too, but True is no number."""
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if isinstance(value, tuple) and kinds[1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) is (
        kind is bool
    )


def _check_fields(config: Any, may_be_zero: tuple[str, ...]) -> None:
    """Every field of its declared type, every number above zero (or zero, where that has a meaning)."""
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, kind = getattr(config, item.name), hints[item.name]
        if not _fits(value, kind):
            raise InputError(f"Bad model configuration: {item.name} {value!r} is not of type {item.type}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and kind is not bool:
                if item.name in may_be_zero and not number >= 0:
                    raise InputError(f"Bad model configuration: {item.name} {number} is negative.")
                if item.name not in may_be_zero and not number > 0:
                    raise InputError(f"Bad model configuration: {item.name} {number} is not positive.")


@dataclass(frozen=True)
class BackboneConfig:
    """A ViT and its META adapter.

    Attributes:
        embed_dim, depth, num_heads, patch_size, mlp_ratio, layer_scale, pos_grid: the ViT.
        window: attention window in patches, the last block of each quarter global; 0: global everywhere.
        inplanes: channels of the spatial prior's stem.
        adapter_ratio: cascade width d over D.
        adapter_parts: cascade parts n.
        adapter_heads: attention heads of one MEA block, an even number.
        stripe_width, ffn_ratio, shared_norm: of the MEA block.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    mlp_ratio: float = 4.0
    layer_scale: bool = False
    pos_grid: int = 14
    window: int = 0
    inplanes: int = 64
    adapter_ratio: float = 0.5
    adapter_parts: int = 4
    adapter_heads: int = 2
    stripe_width: int = 4
    ffn_ratio: float = 0.25
    shared_norm: bool = True

    def __post_init__(self) -> None:
        _check_fields(self, may_be_zero=("window",))
        hidden = int(self.embed_dim * self.adapter_ratio)
        part = hidden // self.adapter_parts
        for ok, rule in (
            (self.depth % 4 == 0, f"depth {self.depth} is not a multiple of 4"),
            (
                self.embed_dim % self.num_heads == 0,
                f"{self.num_heads} heads do not divide width {self.embed_dim}",
            ),
            (self.patch_size == 16, f"patch size {self.patch_size} is not 16"),
            (
                part > 0 and hidden % self.adapter_parts == 0,
                f"{self.adapter_parts} parts do not divide {hidden}",
            ),
            (
                self.adapter_heads % 2 == 0 and part % self.adapter_heads == 0,
                f"{self.adapter_heads} adapter heads are not an even divisor of {part} channels",
            ),
        ):
            if not ok:
                raise InputError(f"Bad backbone configuration: {rule}.")


@dataclass(frozen=True)
class MaskRCNNConfig:
    """Mask R-CNN with FPN, in the semantics of MMDetection 2.x's `mask_rcnn_*_fpn` test path.

    `input_size` (height, width) is what `meta-export` takes when it is not told another.
    """

    name: str
    backbone: BackboneConfig
    num_classes: int = 80
    fpn_channels: int = 256
    fc_channels: int = 1024
    mask_channels: int = 256
    rpn_pre_nms: int = 1000
    rpn_nms: float = 0.7
    proposals: int = 1000
    score_threshold: float = 0.05
    nms: float = 0.5
    max_detections: int = 100
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    input_size: tuple[int, int] = (512, 512)
    task: str = field(default="instance-segmentation", init=False)
    head: str = field(default="mask-rcnn", init=False)

    def __post_init__(self) -> None:
        _check_fields(self, may_be_zero=("score_threshold", "mean"))


@dataclass(frozen=True)
class UPerNetConfig:
    """UPerNet (Xiao et al., ECCV 2018) in the semantics of MMSegmentation's `UPerHead`."""

    name: str
    backbone: BackboneConfig
    num_classes: int = 150
    channels: int = 512
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    input_size: tuple[int, int] = (512, 512)
    task: str = field(default="semantic-segmentation", init=False)
    head: str = field(default="upernet", init=False)

    def __post_init__(self) -> None:
        _check_fields(self, may_be_zero=("mean",))


ModelConfig = MaskRCNNConfig | UPerNetConfig

_HEADS: dict[str, type[MaskRCNNConfig] | type[UPerNetConfig]] = {
    "mask-rcnn": MaskRCNNConfig,
    "upernet": UPerNetConfig,
}

# Detection uses 14x14 windows with the last block of each quarter global, segmentation global attention,
# as the published ViT-Adapter configurations do.
_BACKBONES: dict[str, dict[str, Any]] = {
    "nano": {"embed_dim": 128, "depth": 8, "num_heads": 4, "inplanes": 32},
    "t": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    # Narrower cascades than the usual half of D, with which these two would outweigh ViT-Adapter's adapters.
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "adapter_ratio": 1 / 3, "adapter_heads": 2},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "adapter_ratio": 0.375, "adapter_heads": 4},
}
_WINDOWS = {"mask-rcnn": 14, "upernet": 0}
# The nano is for the demo: narrow heads, so that checkpoint and bundle ship with the package.
_NANO_HEADS: dict[str, dict[str, Any]] = {
    "mask-rcnn": {
        "fpn_channels": 64,
        "fc_channels": 192,
        "mask_channels": 64,
        "window": 0,
        "input_size": (320, 320),
    },
    "upernet": {"channels": 64, "input_size": (320, 320)},
}

MODEL_NAMES = tuple(f"meta-{size}-{head}" for size in _BACKBONES for head in _HEADS)


def get_config(name: str, num_classes: int | None = None) -> ModelConfig:
    """The configuration of a zoo model.

    Args:
        name: one of `MODEL_NAMES`, such as "meta-t-mask-rcnn".
        num_classes: overrides the default (80 for COCO, 150 for ADE20K).

    Raises:
        InputError: no such model.
    """
    if name not in MODEL_NAMES:
        raise InputError(f"No model is named '{name}'; choose one of {', '.join(MODEL_NAMES)}.")
    _, size, head = name.split("-", 2)
    options = dict(_NANO_HEADS[head]) if size == "nano" else {}
    backbone = BackboneConfig(**_BACKBONES[size], window=options.pop("window", _WINDOWS[head]))
    if num_classes is not None:
        options["num_classes"] = num_classes
    return _HEADS[head](name=name, backbone=backbone, **options)


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """A configuration as JSON-ready data; `config_from_dict` reads it back equal."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }


def config_from_dict(data: dict[str, Any]) -> ModelConfig:
    """Read what `config_to_dict` (or `dataclasses.asdict`) wrote.

    Raises:
        InputError: an unknown head, or a field that is unknown, missing or of the wrong type.
    """
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        head = fields.pop("head")
        task = fields.pop("task", None)
        fields["backbone"] = BackboneConfig(**fields["backbone"])
        config = _HEADS[head](**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"Not a model configuration of this version: {error}.") from error
    if task not in (None, config.task):
        raise InputError(f"Not a model configuration of this version: task '{task}' for head '{head}'.")
    return config


def build_model(config: ModelConfig) -> nn.Module:
    """The PyTorch model of a configuration, freshly initialized, in evaluation mode."""
    from meta_deploy.models.heads.mask_rcnn import MaskRCNN
    from meta_deploy.models.heads.upernet import UPerNet

    model: nn.Module
    model = MaskRCNN(config) if isinstance(config, MaskRCNNConfig) else UPerNet(config)
    return model.eval()
