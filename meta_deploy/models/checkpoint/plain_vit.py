"""Plain ViTs as others publish them, brought to the names, patches and sizes of our backbones.

Of timm (DeiT, AugReg), MAE, DINO and DINOv2, and their forms in Hugging Face's transformers. Knows no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor
from torch.nn import functional as F

from meta_deploy.errors import InputError
from meta_deploy.models.backbones.backbone import BACKBONES, Backbone
from meta_deploy.models.backbones.vit import resize_pos_embed
from meta_deploy.models.checkpoint.file import first_few, refuse, shown
from meta_deploy.models.checkpoint.vit_names import timm_names, vit_prefix
from meta_deploy.models.registry import ModelConfig, backbone_of
from meta_deploy.models.shapes import State, size_of, without_prefix

PATCH = 16  # of our backbones
_LARGEST_PATCH = 64
_MAX_GRID = 1024
_SCALES = ("ls1.gamma", "ls2.gamma")
_SCALED = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}  # LayerScale, and the layer that it follows

_EMBEDDINGS = ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed")
# What only pretraining or classification needs, and what it is told as; what else is no block is "other".
_LEFT_OUT = (
    ("cls_token", "class token"),
    ("dist", "distillation token"),
    ("reg_token", "registers"),
    ("register_tokens", "registers"),
    ("mask_token", "mask token"),
    ("norm.", "final norm"),
    ("fc_norm.", "final norm"),
    ("decoder", "decoder"),
    ("head", "head"),
    ("classifier.", "head"),
    ("pooler.", "head"),
    ("pre_logits.", "head"),
)
# Layers before the blocks that we lack, so that the features would be others.
_STRANGE = ("norm_pre.", "ln_pre.", "patch_embed.", "rope", "pos_embed", "rel_pos")


def models_of_width(width: int | None) -> str:
    """ " (meta-t-...)": the models around a ViT of this width; empty where there is none."""
    found = ((b.name, b.size_of_width(width)) for b in BACKBONES.values() if b.vit is not None)
    names = [f"{name}-{size}-..." for name, size in found if size]
    return f" ({', '.join(names)})" if names else ""


@dataclass(frozen=True)
class PlainViT:
    """A plain ViT's weights.

    Attributes:
        path: where they came from.
        state: in timm's names, the patch embedding (D, 3, 16, 16), the position grid (1, G * G, D) and the
            blocks.
        patch: side of the patches that it was trained on.
        left_out: names of the tensors that no backbone has a place for.
        said: what was decided when the file was read, for the user.
    """

    path: Path
    state: dict[str, Tensor]
    patch: int
    left_out: tuple[str, ...]
    said: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return self.state["patch_embed.proj.weight"].shape[0]

    @property
    def depth(self) -> int:
        return _depth(self.state)

    @property
    def grid(self) -> int:
        """Side of the position grid."""
        return math.isqrt(self.state["pos_embed"].shape[1])

    @property
    def layer_scale(self) -> bool:
        return any(name.endswith(_SCALES) for name in self.state)

    @property
    def size(self) -> str:
        """What a model has to have in common with it."""
        return _size(self.width, self.depth, self.state["blocks.0.mlp.fc1.weight"].shape[0])

    @property
    def notes(self) -> list[str]:
        """What it is, and what was resampled or left out, for the user."""
        kind = f"patches of {self.patch}, {self.grid}x{self.grid} positions"
        scaled = ", LayerScale" if self.layer_scale else ""
        notes = [*self.said, f"{shown(self.path.name)} holds a ViT of {self.size}, {kind}{scaled}"]
        if self.patch != PATCH:
            notes.append(f"its patches are resampled from {self.patch} to {PATCH} pixels")
        if self.left_out:
            notes.append(f"not needed of it: {_told(self.left_out)}")
        return notes

    def named(self, backbone: Backbone) -> dict[str, Tensor]:
        """The weights as they are, in the names of a whole model with this backbone.

        Raises:
            InputError: there is no plain ViT in it.
        """
        _check_vit(backbone)
        return _named(self.state, backbone)

    def configure(self, config: ModelConfig) -> ModelConfig:
        """The configuration of a new model around these weights: LayerScale and grid are theirs.

        Raises:
            InputError: the model has no plain ViT.
        """
        _check_vit(backbone_of(config))
        own = {"pos_grid": self.grid} | ({"layer_scale": True} if self.layer_scale else {})
        return replace(config, backbone=replace(config.backbone, **own))

    def fitted(self, config: ModelConfig) -> tuple[dict[str, Tensor], list[str]]:
        """Weights for a model, in its names, and what was done to them, for the user.

        LayerScale that the model lacks is multiplied into the layers before it, which computes the same; one
        that only the model has is 1.

        Raises:
            CheckpointError: the model's ViT is of another size.
            InputError: it has none.
        """
        backbone, own, notes = backbone_of(config), self.state, []
        _check_vit(backbone)
        of: Any = config.backbone
        size = _size(of.embed_dim, of.depth, int(of.embed_dim * of.mlp_ratio))
        if size != self.size:
            refuse(
                self.path,
                f"holds a ViT of {self.size}, and that of {shown(config.name)} is of {size}; choose a model "
                f"around a ViT of that size{models_of_width(self.width)}",
            )
        if self.grid != of.pos_grid:
            if of.pos_grid > _MAX_GRID:
                refuse(self.path, f"does not fit {shown(config.name)}: a position grid of {of.pos_grid}")
            resized = resize_pos_embed(own["pos_embed"], (of.pos_grid, of.pos_grid))
            own = {**own, "pos_embed": resized.flatten(2).transpose(1, 2).contiguous()}
            notes.append(
                f"its positions are resized from {self.grid}x{self.grid} to {of.pos_grid}x{of.pos_grid}"
            )
        if self.layer_scale and not of.layer_scale:
            own = _without_scales(own)
            notes.append("its LayerScale, which the model lacks, is multiplied into the layers before it")
        if of.layer_scale and not self.layer_scale:
            own = {
                **own,
                **{f"blocks.{i}.{s}": torch.ones(self.width) for i in range(self.depth) for s in _SCALES},
            }
        return _named(own, backbone), notes


@dataclass(frozen=True)
class Classifier:
    """A pretrained classifier of the library that a backbone is from.

    Attributes:
        path: where it came from.
        state: its tensors.
        notes: what was decided when the file was read, for the user.
    """

    path: Path
    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def configure(self, config: ModelConfig) -> ModelConfig:
        """As `PlainViT.configure`."""
        return config

    def fitted(self, config: ModelConfig) -> tuple[dict[str, Tensor], list[str]]:
        """As `PlainViT.fitted`.

        Raises:
            CheckpointError: it is another network than the model's.
        """
        adopt = backbone_of(config).adopt
        assert adopt is not None
        try:
            own = adopt(config.backbone, self.state)
        except InputError as error:
            refuse(
                self.path, f"cannot be a backbone's weights: {error}; give those that are published", error
            )
        said = f"{len(own)} tensors of the backbone are of {shown(self.path.name)}"
        return {f"backbone.{name}": tensor for name, tensor in own.items()}, [said]


def _size(width: int, depth: int, hidden: int | None) -> str:
    mlp = "" if hidden == 4 * width else f", MLP width {hidden}"
    return f"width {width}, depth {depth}{mlp}"


def _check_vit(backbone: Backbone) -> None:
    """Refuse a backbone without a plain ViT.

    Raises:
        InputError: it has none.
    """
    if backbone.vit is None:
        titles = " and ".join(b.title for b in BACKBONES.values() if b.vit is not None)
        raise InputError(
            f"{backbone.title} has no plain ViT inside, for which --backbone-ckpt is; {titles} have one"
        )


def _named(state: State, backbone: Backbone) -> dict[str, Tensor]:
    """A ViT's tensors in the names of a whole model with this backbone."""
    named = {}
    for name, tensor in state.items():
        for old, new in backbone.vit_names.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        named[f"backbone.{backbone.vit}{name}"] = tensor
    return named


def _without_scales(state: State) -> dict[str, Tensor]:
    """LayerScale's factors multiplied into the rows of the layers whose results they scale."""
    own = dict(state)
    for name in state:
        for scale, layer in _SCALED.items():
            if name.endswith("." + scale):
                gamma, before = own.pop(name), name.removesuffix(scale) + layer
                own[f"{before}.weight"] = gamma[:, None] * own[f"{before}.weight"]
                own[f"{before}.bias"] = gamma * own[f"{before}.bias"]
    return own


def plain_vit(state: State, path: Path, said: tuple[str, ...] = ()) -> PlainViT:
    """The plain ViT of a state dict, whatever stands before its names.

    Raises:
        CheckpointError: there is none, or one that computes in other ways than ours, or not all of it.
    """
    whole = timm_names(state)
    prefix = vit_prefix(whole)
    if prefix is None:
        refuse(
            path,
            f"holds no plain ViT in the names of timm, MAE, DINO or transformers, but {len(state)} tensors "
            f"({first_few(list(state))}); give such a one",
        )
    inside = without_prefix(whole, prefix)
    own = {name: t for name, t in inside.items() if name in _EMBEDDINGS or name.startswith("blocks.")}
    _check_kind(inside, path)
    _check_whole(own, path)
    own["pos_embed"] = _positions(inside, path)
    weight = own["patch_embed.proj.weight"]
    own["patch_embed.proj.weight"] = resample_patches(weight, PATCH)
    left_out = [name for name in inside if name not in own]
    left_out += [name for name in whole if not name.startswith(prefix)]
    return PlainViT(path, own, weight.shape[2], tuple(left_out), said)


def _check_kind(inside: State, path: Path) -> None:
    """Refuse layers that a plain ViT has not.

    Raises:
        CheckpointError: there are some.
    """
    usual = (*_layers(1, 1, 1), *(f"blocks.0.{scale}" for scale in _SCALES))
    strange = [
        name
        for name in inside
        if name.startswith((*_STRANGE, "blocks."))
        and re.sub(r"^blocks\.\d+\.", "blocks.0.", name) not in usual
    ]
    if strange:
        refuse(
            path,
            f"holds a ViT of another kind, which has {first_few(strange)}; give a plain one, such as DeiT's, "
            "MAE's or DINOv2's",
        )
    if "pos_embed" not in inside:
        refuse(path, "holds a ViT without a position embedding; give one that has it, such as DeiT's")


def _check_whole(own: State, path: Path) -> None:
    """Refuse a ViT that lacks tensors or has some of odd shapes.

    Raises:
        CheckpointError: it does.
    """
    weight = own["patch_embed.proj.weight"]
    side = weight.shape[-1]
    if weight.ndim != 4 or weight.shape[1:] != (3, side, side) or not 0 < side <= _LARGEST_PATCH:
        shape = "x".join(map(str, weight.shape))
        refuse(path, f"holds a ViT with a patch embedding of {shape}, and ours are Dx3xPxP; give another")
    width, depth = weight.shape[0], min(_depth(own), len(own))  # names may claim any number of blocks
    expected = _layers(width, depth, size_of(own, "blocks.0.mlp.fc1.weight", 0) or 0)
    if any(name.endswith(_SCALES) for name in own):
        expected |= {f"blocks.{i}.{scale}": (width,) for i in range(depth) for scale in _SCALES}
    odd = [name for name, shape in expected.items() if name not in own or own[name].shape != shape]
    odd = [name for name in odd if name not in ("patch_embed.proj.weight", "pos_embed")]
    if odd:
        refuse(
            path,
            f"holds a ViT without {first_few(odd)}, or with other shapes than the rest; give a whole one",
        )


def _layers(width: int, depth: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a plain ViT without LayerScale; those that vary are empty."""
    layers = {
        "norm1": (width,),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "norm2": (width,),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (), "patch_embed.proj.bias": (width,)}
    shapes["pos_embed"] = ()
    for i in range(depth):
        for name, shape in layers.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    return shapes


def _depth(state: State) -> int:
    """Blocks up to the last one that there is."""
    return 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d{1,6})\.", name)))


def _positions(inside: State, path: Path) -> Tensor:
    """The grid (1, G * G, D) of a position embedding, which may begin with class token and registers.

    Raises:
        CheckpointError: it is no square grid.
    """
    embed, width = inside["pos_embed"], inside["patch_embed.proj.weight"].shape[0]
    registers = max((size_of(inside, name, 1) or 0 for name in ("reg_token", "register_tokens")), default=0)
    if embed.ndim == 3 and embed.shape[0] == 1 and embed.shape[2] == width:
        for extra in range(3 + registers):
            side = math.isqrt(max(embed.shape[1] - extra, 0))
            if side and side**2 == embed.shape[1] - extra:
                return embed[:, extra:]
    shape = "x".join(map(str, embed.shape))
    refuse(path, f"holds a ViT with a position embedding of {shape}, which is no square grid; give another")


def resample_patches(weight: Tensor, side: int) -> Tensor:
    """A patch embedding (D, C, P, P) for patches of another side, (D, C, side, side).

    By the pseudoinverse of the bicubic resize, so that a resized patch gives what the patch gave (Beyer et
    al., "FlexiViT: One Model for All Patch Sizes", CVPR 2023, section 3.4).
    """
    old = weight.shape[-1]
    if old == side:
        return weight
    basis = torch.eye(old * old, dtype=torch.float64).reshape(old * old, 1, old, old)
    resize = F.interpolate(basis, size=(side, side), mode="bicubic", antialias=True).flatten(1)
    flat = weight.double().flatten(2) @ torch.linalg.pinv(resize).T
    return flat.reshape(*weight.shape[:2], side, side).to(weight.dtype)


def _told(names: Sequence[str]) -> str:
    """What was left out, in words; what has none by its name."""
    words, others = [], []
    for name in names:
        word = next((word for start, word in _LEFT_OUT if name.startswith(start)), None)
        if word is None:
            others.append(name)
        elif word not in words:
            words.append(word)
    if others:
        words.append(f"{len(others)} other tensor{'s' * (len(others) > 1)} ({first_few(others)})")
    return ", ".join(words)
