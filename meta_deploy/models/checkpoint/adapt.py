"""Tensors of a checkpoint to a model's layout, and which of them fit. Knows ViTs' names, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from meta_deploy.models.backbones.vit import pos_grid_of, resize_pos_embed
from meta_deploy.models.checkpoint.file import first_few

COUNTER = "num_batches_tracked"  # of batch norms; nothing at inference depends on it
# What trainers and classifiers leave beside the weights of interest; dropped without an error.
HARMLESS_IN_MODEL = ("auxiliary_head.", "data_preprocessor.", "ema_", "head.", "norm.", "fc_norm.")
HARMLESS_IN_VIT = (
    *("cls_token", "dist_token", "mask_token", "norm.", "fc_norm.", "head.", "head_dist.", "pre_logits."),
)
MAX_GRID = 1024


@dataclass(frozen=True)
class LoadReport:
    """What of a checkpoint went where; lists hold every name.

    Attributes:
        loaded: names in model and checkpoint, of the same shape.
        missing: in the model only; these stay at their initialization.
        mismatched: of another shape or type, as "name: 80x4 instead of 81x4"; initialization, too.
        unexpected: in the checkpoint only, and not known to be harmless.
        ignored: in the checkpoint only, known to be harmless.
        resized: position embeddings fitted to the model's grid.
        notes: decisions, for the user.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every tensor of the model was loaded."""
        return not self.missing and not self.mismatched

    def problems(self) -> str:
        """Counts and first names of what does not match, in one line; empty where everything does."""
        kinds = (
            ("missing", self.missing),
            ("of the wrong shape", self.mismatched),
            ("unexpected", self.unexpected),
        )
        return ", ".join(f"{len(names)} {kind} ({first_few(names)})" for kind, names in kinds if names)


def compare(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], harmless: tuple[str, ...], vit: str = ""
) -> LoadReport:
    """Which tensors of `state` a model with the state dict `expected` can take.

    Args:
        expected: of the model; only shapes and types matter.
        state: of the checkpoint.
        harmless: starts of names that need not be expected.
        vit: what stands before the names of the ViT, in which `HARMLESS_IN_VIT` need not be expected.
    """
    report = LoadReport()
    for name, wanted in expected.items():
        if name not in state:
            if not name.endswith(COUNTER):
                report.missing.append(name)
        elif name.endswith(COUNTER) and not _alike(state[name], wanted):
            report.ignored.append(name)
        elif state[name].shape != wanted.shape:
            report.mismatched.append(f"{name}: {_dims(state[name])} instead of {_dims(wanted)}")
        elif state[name].is_floating_point() != wanted.is_floating_point():
            report.mismatched.append(f"{name}: {state[name].dtype} instead of {wanted.dtype}")
        else:
            report.loaded.append(name)
    for name, tensor in state.items():
        if name not in expected:
            known = name.startswith(harmless) or name.removeprefix(vit).startswith(HARMLESS_IN_VIT)
            (report.ignored if known or tensor.ndim == 0 else report.unexpected).append(name)
    return report


def _alike(tensor: Tensor, wanted: Tensor) -> bool:
    return tensor.shape == wanted.shape and tensor.is_floating_point() == wanted.is_floating_point()


def _dims(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"


def fit_pos_embed(
    state: dict[str, Tensor], expected: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Drop the class token's position and resize the grid (1, G * G, D) to the model's.

    Args:
        state: of the checkpoint.
        expected: of the model.
        prefix: what stands before `pos_embed`, in both.

    Returns:
        The state dict, in which what can't be fitted is as it was, and the names that were resized.
    """
    name = prefix + "pos_embed"
    embed, own = state.get(name), pos_grid_of(state, prefix)
    if embed is None or embed.ndim != 3 or embed.shape[0] != 1 or not own or name not in expected:
        return state, []
    grid = round(expected[name].shape[1] ** 0.5)
    positions = embed[:, embed.shape[1] - own**2 :]
    if own == grid:
        return {**state, name: positions}, []
    if grid > MAX_GRID or not embed.is_floating_point():
        return state, []
    resized = resize_pos_embed(positions, (grid, grid)).flatten(2).transpose(1, 2).contiguous()
    return {**state, name: resized}, [name]
