"""Any model of timm that gives maps at 1/4, 1/8, 1/16 and 1/32: Swin, PVT v2, ConvNeXt, MaxViT, ResNet, ...

The model is the one that timm's `create_model(..., features_only=True)` gives, and its weights are under
`timm.`. timm is imported where a model is named or built, and downloads nothing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from meta_deploy.errors import InputError
from meta_deploy.models.backbones.backbone import Backbone, BackboneConfig, BackboneModule, register
from meta_deploy.models.shapes import State, any_starts_with

# Nothing else: timm takes names of folders, and of repositories that it downloads, for models too.
_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)
STRIDES = (4, 8, 16, 32)
Side = Annotated[int, msgspec.Meta(gt=0, le=8192)]
_INSTALL = "pip install 'meta-deploy[timm]'"

_kept: list[torch.library.Library] = []  # definitions live as long as their library


class TimmConfig(BackboneConfig, frozen=True, tag="timm"):
    """A model of timm.

    Attributes:
        model: its name there, such as "swin_tiny_patch4_window7_224".
        image_size: (height, width) in pixels that windows and position tables are made for, where it has any.
    """

    model: str
    image_size: tuple[Side, Side] = (512, 512)

    def __post_init__(self) -> None:
        super().__post_init__()
        named = _NAME.fullmatch(self.model) is not None
        self.require(named, f"model {self.model!r} is no name of a timm model")

    @property
    def width(self) -> int:
        return 0  # tells nothing apart

    @property
    def blocks(self) -> int:
        return 1


def import_timm() -> Any:
    """timm, also beside a torchvision that was built for another PyTorch.

    timm imports torchvision, which wants operators of its own to be there although neither is used: where its
    binaries do not load, their names are defined.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    with contextlib.suppress(ImportError):
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            _kept.append(torch.library.Library("torchvision", "FRAGMENT"))
            for name in ("nms", "qnms"):
                _kept[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        import timm
    except ImportError as error:
        raise InputError(
            f"backbones of timm need it, and it cannot be imported ({error}); {_INSTALL}"
        ) from error
    return timm


def settings(name: str) -> Mapping[str, Any]:
    """The configuration of a model of timm.

    Raises:
        InputError: timm is not installed, or has no model of this name.
    """
    if _NAME.fullmatch(name) is None or not import_timm().is_model(name):
        raise InputError(
            f"timm has no model '{name}'; choose one of timm.list_models(), such as convnext_tiny"
        )
    return {"model": name}


class TimmFeatures(BackboneModule):
    """Image (B, 3, H, W) to four maps at 1/4, 1/8, 1/16, 1/32; H and W multiples of 32.

    Raises:
        InputError: timm is not installed, or the model has no maps at these strides.
    """

    strides = STRIDES

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.config = config
        self.timm = create(config)
        info: Any = self.timm.feature_info
        strides, channels = info.reduction(), info.channels()
        if not set(STRIDES) <= set(strides):
            raise InputError(
                f"timm's {config.model} gives maps at strides {', '.join(map(str, strides))}, and not at 4, "
                "8, 16 and 32; choose another, such as swin_tiny_patch4_window7_224"
            )
        # Of several at one stride the last, which saw most.
        self._taken = [max(i for i, s in enumerate(strides) if s == stride) for stride in STRIDES]
        self.out_channels = tuple(channels[i] for i in self._taken)
        self._channels_last = str(getattr(self.timm, "output_fmt", "")).endswith("NHWC")

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps (B, out_channels[i], H/s, W/s), s of `strides`.

        Raises:
            InputError: the model takes no images of this size.
        """
        try:
            with _written_out(self.timm) if torch.compiler.is_exporting() else contextlib.nullcontext():
                every = self.timm(images)
        except (AssertionError, RuntimeError, ValueError) as error:
            height, width = images.shape[2:]
            if (height, width) == self.config.image_size:
                raise
            made = "x".join(map(str, self.config.image_size))
            raise InputError(
                f"timm's {self.config.model}, made for images of {made}, does not take {height}x{width} "
                f"({_line(error)}); give it that size"
            ) from error
        maps = [every[i] for i in self._taken]
        return [x.permute(0, 3, 1, 2) for x in maps] if self._channels_last else maps


@contextlib.contextmanager
def _written_out(model: nn.Module) -> Iterator[None]:
    """With attention in plain operators, which the graph passes know, and which any shape can have."""
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def create(config: TimmConfig, weights: State | None = None) -> nn.Module:
    """timm's model, told as much of the input's size as it takes.

    Args:
        config: which.
        weights: of the classifier; timm brings them to its present names and to the input's size. None: it
            is freshly initialized.

    Raises:
        InputError: timm is not installed, this model gives no maps, or the weights are not its own.
    """
    timm, size = import_timm(), {"img_size": config.image_size}
    given: dict[str, Any] = {"pretrained": False}
    if weights is not None:
        given = {"pretrained": True, "num_classes": 0, "pretrained_cfg_overlay": _only(weights, timm, config)}
    for told in ({**size, "dynamic_img_size": True}, size, {}):
        try:
            return timm.create_model(config.model, features_only=True, **given, **told)
        except (TypeError, AssertionError, AttributeError, RuntimeError) as error:
            if weights is not None and isinstance(error, RuntimeError):
                raise InputError(f"it does not fit timm's {config.model}: {_line(error)}") from error
            refusal = error
    raise InputError(
        f"timm's {config.model} gives no maps ({_line(refusal)}); choose another, such as convnext_tiny"
    ) from refusal


def _only(weights: State, timm: Any, config: TimmConfig) -> dict[str, Any]:
    """What makes timm take these weights, all but the classifier's last layer, and ask for none."""
    classifier = timm.get_pretrained_cfg(config.model).classifier or ()
    layers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    last = tuple(f"{layer}." for layer in layers)
    state = {name: tensor for name, tensor in weights.items() if not name.startswith(last)}
    return {"state_dict": state, "num_classes": 0, "source": "", "custom_load": False}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def adopt(config: TimmConfig, state: State) -> dict[str, Tensor]:
    """The backbone's tensors out of a classifier's, as timm publishes it.

    Raises:
        InputError: they are not of this model.
    """
    return {f"timm.{name}": tensor for name, tensor in create(config, state).state_dict().items()}


register(
    Backbone(
        title="timm",
        config=TimmConfig,
        model=TimmFeatures,
        sizes={},
        settings=settings,
        recognise=any_starts_with("timm."),
        width=lambda state: 0,
        measure=lambda config, state: {},
        fixed_size=True,
        adopt=adopt,
    )
)
