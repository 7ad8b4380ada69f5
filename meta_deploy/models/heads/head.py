"""What a head is to the rest: its configuration and module, and how a state dict shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

import msgspec
from torch import nn

from meta_deploy.models.backbones.backbone import BACKBONES, BackboneConfig, BackboneModule
from meta_deploy.models.config import Config, Count, NotNegative, Positive, TileSide, import_all
from meta_deploy.models.shapes import State

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

import_all("meta_deploy.models.backbones")
if TYPE_CHECKING:
    AnyBackboneConfig = BackboneConfig
else:
    AnyBackboneConfig = Union[tuple(backbone.config for backbone in BACKBONES.values())]  # noqa: UP007


class HeadConfig(Config, frozen=True, tag_field="head"):
    """A whole model's configuration; a subclass for each head, whose `tag` is the head's name.

    Attributes:
        name: of the model, such as "meta-t-upernet".
        backbone: the backbone's configuration.
        num_classes: classes, a detector's background not counted.
        task: what the model is for; decides its outputs.
        mean, std: of the input's channels, RGB, in units of 0..255.
        input_size: (height, width) in pixels that an export takes when it is not told another.
        tile: side in pixels of the tiles that larger images are run in, unless told otherwise; None: as a
            whole. For models of small objects, which the resize to the input would lose.
    """

    name: str
    backbone: AnyBackboneConfig
    num_classes: Count
    task: str
    mean: tuple[NotNegative, NotNegative, NotNegative] = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    input_size: tuple[Count, Count] = (512, 512)
    tile: TileSide | None = None

    @property
    def head(self) -> str:
        """The head's name."""
        return str(self.__struct_config__.tag)


@dataclass(frozen=True)
class Head:
    """A head's entry. State dicts are those of the whole model.

    Attributes:
        config: the configuration of a model with this head.
        model: configuration and backbone -> module. `module(images, stages=False)` maps (B, 3, H, W) to a
            dict of the task's outputs; with `stages`, also of what verification compares on the way.
        recognise: whether a state dict, complete or not, has this head; no other head may say so too.
        num_classes: how many classes the last layers of a state dict have.
        measure: configuration and state dict -> the other settings that shapes tell.
        class_names: of the usual data set; taken where a checkpoint has as many classes and no names.
        by_size: size of the backbone -> settings for it.
    """

    config: type[HeadConfig]
    model: Callable[[Any, BackboneModule], nn.Module]
    recognise: Callable[[State], bool]
    num_classes: Callable[[State], int | None]
    measure: Callable[[Any, State], dict[str, Any]]
    class_names: tuple[str, ...] = ()
    by_size: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The tag of its configuration."""
        return str(self.config.__struct_config__.tag)

    @property
    def task(self) -> str:
        """The task of its models."""
        return next(str(f.default) for f in msgspec.structs.fields(self.config) if f.name == "task")


HEADS: dict[str, Head] = {}


def register(head: Head) -> None:
    """Make a head known under its name; there is then a model of it for each size of each backbone."""
    HEADS[head.name] = head
