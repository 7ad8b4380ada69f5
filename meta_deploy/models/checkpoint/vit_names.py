"""Names of plain ViTs' tensors, as others have them, to timm's. Knows no sizes and no models of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from meta_deploy.models.shapes import State, size_of

# In the order in which they apply. Hugging Face's names are those of transformers 4 and 5.
_HUGGING_FACE = (
    (r"\bembeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"\bembeddings\.position_embeddings$", "pos_embed"),
    (r"\bembeddings\.(\w+)$", r"\1"),
    (r"\b(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(?:attention\.)?(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\bblocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\blayernorm\.", "norm."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)
_OTHERS = (
    (r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 trains blocks in chunks
    (r"\.gamma_?([12])$", r".ls\1.gamma"),  # older timm's names, and ViT-Adapter's
    (r"\.attn\.query\.", ".attn.q."),
    (r"\.attn\.key\.", ".attn.k."),
    (r"\.attn\.value\.", ".attn.v."),
)


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with a plain ViT's tensors in timm's names, and q, k and v in one."""
    theirs = any("embeddings.patch_embeddings.projection." in name for name in state)
    rules = (*_HUGGING_FACE, *_OTHERS) if theirs else _OTHERS
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return _fused(renamed)


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate projections of q, k and v (and BEiT's biases) as timm's `qkv`."""
    fused = dict(state)
    for name in state:
        block, _, last = name.rpartition(".attn.")
        attn = block + ".attn."
        for kind in ("weight", "bias"):
            parts = [attn + f"{part}.{kind}" for part in "qkv"]
            if last == f"q.{kind}" and all(part in fused for part in parts):
                fused[attn + f"qkv.{kind}"] = torch.cat([fused.pop(part) for part in parts])
        if last == "q_bias" and attn + "v_bias" in fused:
            q, v = fused.pop(attn + "q_bias"), fused.pop(attn + "v_bias")
            fused[attn + "qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return fused


def vit_prefix(state: State) -> str | None:
    """What stands before a ViT's names in timm's naming ("" for a plain one); None where there is no ViT."""
    end = "patch_embed.proj.weight"
    for name in sorted((n for n in state if n.endswith(end)), key=len):
        prefix = name.removesuffix(end)
        if any(n.startswith(prefix + "blocks.0.attn.") for n in state):
            return prefix
    return None


def width_of_vit(state: State) -> int | None:
    """The width of the plain ViT in a state dict, whosever names it has; None where there is none."""
    whole = timm_names(state)
    prefix = vit_prefix(whole)
    return None if prefix is None else size_of(whole, prefix + "patch_embed.proj.weight", 0)
