"""What a backbone is to the rest: its configuration, its sizes, and how a state dict shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from meta_deploy.models.config import Config
from meta_deploy.models.shapes import State


class BackboneConfig(Config, frozen=True, tag_field="type"):
    """Base of the backbones' configurations; a subclass's `tag` is the backbone's name."""

    part: ClassVar[str] = "backbone"

    @property
    def width(self) -> int:
        """The number of channels that tells the backbone's sizes apart."""
        raise NotImplementedError

    @property
    def blocks(self) -> int:
        """The longest list of layers: a state dict has at least as many tensors."""
        raise NotImplementedError


class BackboneModule(nn.Module):
    """Base of the backbones: images (B, 3, H, W) to a list of maps, the largest first.

    Map i is (B, out_channels[i], H / strides[i], W / strides[i]).
    """

    out_channels: Sequence[int]
    strides: Sequence[int]


@dataclass(frozen=True)
class Backbone:
    """A backbone's entry.

    State dicts are given to the functions without the leading `backbone.` of the names.

    Attributes:
        title: its name in messages.
        config: its configuration.
        model: configuration -> module.
        sizes: name of a size -> settings of the configuration; models are `<backbone>-<size>-<head>`.
        settings: the same as a function, of a backbone with any number of sizes, whose models are
            `<backbone>:<size>-<head>`; raises InputError for a name that is none.
        recognise: whether a state dict, complete or not, is of this backbone.
        width: `BackboneConfig.width` from a state dict.
        measure: configuration and state dict -> the settings that shapes tell.
        by_task: task -> settings that go before those of the size.
        normalization: `mean` and `std` of the input by a state dict, where its ViT was not pretrained on
            images normalized as ImageNet's usually are; empty where it was.
        vit: what stands before the names of a plain ViT inside of it, whose weights can then come from a
            file of their own; None where there is none. The configuration then has `embed_dim`, `depth`,
            `mlp_ratio`, `pos_grid` and `layer_scale`.
        vit_names: ends of timm's names of that ViT's tensors -> its own, where they differ.
        fixed_size: whether it is exported for one input size only.
        adopt: configuration and state dict of the same network as a classifier, from a file of its own -> the
            backbone's; raises InputError where it is another. None: there is no such network, or a `vit`.
    """

    title: str
    config: type[BackboneConfig]
    model: Callable[[Any], BackboneModule]
    sizes: Mapping[str, Mapping[str, Any]]
    recognise: Callable[[State], bool]
    width: Callable[[State], int | None]
    measure: Callable[[Any, State], dict[str, Any]]
    by_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    normalization: Callable[[State], dict[str, tuple[float, ...]]] = lambda state: {}
    vit: str | None = None
    vit_names: Mapping[str, str] = field(default_factory=dict)
    settings: Callable[[str], Mapping[str, Any]] | None = None
    fixed_size: bool = False
    adopt: Callable[[Any, State], dict[str, Tensor]] | None = None

    @property
    def name(self) -> str:
        """The tag of its configuration."""
        return str(self.config.__struct_config__.tag)

    def configure(self, size: str, task: str) -> BackboneConfig:
        """The configuration of one of `sizes`, or of what `settings` takes."""
        own = self.settings(size) if self.settings else self.sizes[size]
        return self.config(**{**own, **self.by_task.get(task, {})})

    def size_of_width(self, width: int | None) -> str | None:
        """The first of `sizes` that has this width."""
        return next((size for size in self.sizes if self.configure(size, "").width == width), None)


BACKBONES: dict[str, Backbone] = {}


def register(backbone: Backbone) -> None:
    """Make a backbone known under its name."""
    BACKBONES[backbone.name] = backbone
