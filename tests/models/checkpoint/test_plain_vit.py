"""Plain ViTs from elsewhere: their names, patches, positions and scales, and what they are not for."""

from __future__ import annotations

import argparse
import re

import pytest
import torch
from msgspec.structs import replace
from torch.nn import functional as F

from meta_deploy.errors import CheckpointError, InputError
from meta_deploy.models.checkpoint.load import load_model, load_vit_weights, read_vit
from meta_deploy.models.checkpoint.plain_vit import resample_patches
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.registry import build_model, get_config
from tests.models.checkpoint.checkpoints import build, prefixed, refusal, same, small


def timm_vit(width=128, depth=8, grid=12, extra_tokens=1, mlp_ratio=4):
    """A ViT's weights in timm's naming, class token, final norm and classifier included."""
    torch.manual_seed(1)

    def linear(name, inputs, outputs):
        return {f"{name}.weight": torch.randn(outputs, inputs), f"{name}.bias": torch.randn(outputs)}

    def norm(name):
        return {f"{name}.weight": torch.randn(width), f"{name}.bias": torch.randn(width)}

    state = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, grid * grid + extra_tokens, width),
        "patch_embed.proj.weight": torch.randn(width, 3, 16, 16),
        "patch_embed.proj.bias": torch.randn(width),
        **norm("norm"),
        **linear("head", width, 10),
    }
    if extra_tokens == 2:
        state["dist_token"] = torch.randn(1, 1, width)
        state |= linear("head_dist", width, 10)
    for i in range(depth):
        block = f"blocks.{i}."
        state |= norm(block + "norm1") | norm(block + "norm2")
        state |= linear(block + "attn.qkv", width, 3 * width) | linear(block + "attn.proj", width, width)
        state |= linear(block + "mlp.fc1", width, mlp_ratio * width)
        state |= linear(block + "mlp.fc2", mlp_ratio * width, width)
    return state


def dino(state):
    heads = {"head.mlp.0.weight": torch.ones(4, 4)}
    student = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {
        "student": prefixed(student, "module.backbone."),
        "teacher": {**prefixed(state, "backbone."), **heads},
        "args": argparse.Namespace(arch="vit_tiny"),
        "epoch": 100,
    }


@pytest.mark.parametrize("nest", [lambda s: s, lambda s: {"model": s}, dino], ids=["timm", "DeiT", "DINO"])
@pytest.mark.parametrize("extra_tokens", [0, 1, 2])
def test_a_plain_vit_loads_into_the_vit_part(path, nest, extra_tokens):
    vit = timm_vit(extra_tokens=extra_tokens)
    torch.save(nest(vit), path)
    model = build_model(get_config("meta-nano-upernet"))
    before = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("backbone.vit.")}
    report = load_vit_weights(model, path)
    after = model.state_dict()
    grid = vit["pos_embed"][:, extra_tokens:].reshape(1, 12, 12, 128).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(14, 14), mode="bicubic", align_corners=False)
    assert torch.equal(after["backbone.vit.pos_embed"], resized.flatten(2).transpose(1, 2))
    for name in model.backbone.vit.state_dict():
        if name != "pos_embed":
            assert torch.equal(after[f"backbone.vit.{name}"], vit[name])
    assert same(before, {n: after[n] for n in before})
    assert report.complete
    assert report.resized == ["backbone.vit.pos_embed"]
    assert not report.unexpected


def test_a_position_embedding_of_the_same_grid_is_taken_as_it_is(path):
    vit = timm_vit(grid=14)
    torch.save(vit, path)
    model = build_model(get_config("meta-nano-upernet"))
    assert load_vit_weights(model, path).resized == []
    assert torch.equal(model.backbone.vit.pos_embed, vit["pos_embed"][:, 1:])


def test_separate_q_k_v_are_fused(path):
    vit = timm_vit()
    split = {}
    for name, tensor in vit.items():
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace("qkv", part)] = piece.clone()
        else:
            split[name] = tensor
    torch.save(split, path)
    model = build_model(get_config("meta-nano-upernet"))
    load_vit_weights(model, path)
    for i, block in enumerate(model.backbone.vit.blocks):
        assert torch.equal(block.attn.qkv.weight, vit[f"blocks.{i}.attn.qkv.weight"])
        assert torch.equal(block.attn.qkv.bias, vit[f"blocks.{i}.attn.qkv.bias"])


def test_a_plain_vit_is_no_whole_model(path):
    torch.save(timm_vit(), path)
    for arguments in ((), ("meta-nano-mask-rcnn",), (None, True)):
        message = refusal(path, *arguments)
        assert "without an adapter and a head" in message
        assert "--backbone-ckpt" in message
    loaded = load_model(path, "meta-nano-mask-rcnn", allow_partial=True)
    assert len(loaded.report.loaded) == len(loaded.model.backbone.vit.state_dict())
    assert "roi_head.bbox_head.fc_cls.weight" in loaded.report.missing
    assert not any(name.startswith("backbone.vit.") for name in loaded.report.missing)


def scaled(vit, width=128):
    """The same with LayerScale."""
    torch.manual_seed(2)
    depth = len({name.split(".")[1] for name in vit if name.startswith("blocks.")})
    return vit | {f"blocks.{i}.ls{j}.gamma": torch.rand(width) + 0.5 for i in range(depth) for j in (1, 2)}


def mae(vit):
    """With its decoder, and a class position of zeros."""
    state = {name: t for name, t in vit.items() if not name.startswith("head.")}
    state |= {"mask_token": torch.zeros(1, 1, 64), "decoder_pos_embed": torch.zeros(1, 145, 64)}
    return {"model": state | {f"decoder_{n}": t for n, t in vit.items() if n.startswith("blocks.0.")}}


def dinov2(vit):
    """As it is trained: blocks in chunks, registers that have no position."""
    state = {re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", name): t for name, t in scaled(vit).items()}
    state |= {"register_tokens": torch.zeros(1, 4, 128), "mask_token": torch.zeros(1, 128)}
    return {"teacher": {**prefixed(state, "backbone."), "dino_head.mlp.0.weight": torch.ones(4, 4)}}


HUGGING_FACE = {  # the names of transformers 4 and 5, by what timm calls them
    4: {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"},
    5: {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
}
LISTS = {4: "vit.encoder.layer", 5: "vit.layers"}
Q_K_V = {4: "attention.attention.{}", 5: "attention.{}_proj"}


def hugging_face(vit, version):
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", **HUGGING_FACE[version]}
    state = {
        "vit.embeddings.cls_token": vit["cls_token"],
        "vit.embeddings.position_embeddings": vit["pos_embed"],
        "vit.embeddings.patch_embeddings.projection.weight": vit["patch_embed.proj.weight"],
        "vit.embeddings.patch_embeddings.projection.bias": vit["patch_embed.proj.bias"],
        "vit.layernorm.weight": vit["norm.weight"],
        "vit.layernorm.bias": vit["norm.bias"],
        "classifier.weight": vit["head.weight"],
    }
    for name, tensor in vit.items():
        if match := re.match(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            block, layer, kind = match.groups()
            start = f"{LISTS[version]}.{block}."
            if layer == "attn.qkv":
                for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    called = part if version == 4 else part[0]
                    state[f"{start}{Q_K_V[version].format(called)}.{kind}"] = piece.clone()
            else:
                state[f"{start}{names[layer]}.{kind}"] = tensor
    return state


@pytest.mark.parametrize(
    ("publish", "said"),
    [
        (mae, "class token, final norm, mask token, decoder"),
        (
            dinov2,
            "class token, final norm, head, registers, mask token, 1 other tensor (dino_head.mlp.0.weight)",
        ),
        (lambda vit: hugging_face(vit, 4), "class token, final norm, head"),
        (lambda vit: hugging_face(vit, 5), "class token, final norm, head"),
    ],
    ids=["MAE", "DINOv2", "transformers 4", "transformers 5"],
)
def test_other_names_are_the_same_vit(path, publish, said):
    published = timm_vit()
    torch.save(publish(published), path)
    vit = read_vit(path)
    published = scaled(published) if vit.layer_scale else published
    assert vit.state.keys() == {n for n in published if n.startswith(("patch_embed", "pos_embed", "blocks"))}
    for name, tensor in vit.state.items():
        assert torch.equal(tensor, published[name][:, 1:] if name == "pos_embed" else published[name]), name
    assert vit.notes[-1] == f"not needed of it: {said}"
    assert vit.layer_scale == (publish is dinov2)


def test_resampled_patches_give_for_a_resized_patch_what_the_patch_gave():
    torch.manual_seed(0)
    weight, patches = torch.randn(5, 3, 14, 14), torch.randn(7, 3, 14, 14)
    resized = F.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)
    expected = F.conv2d(patches, weight)
    torch.testing.assert_close(F.conv2d(resized, resample_patches(weight, 16)), expected, rtol=0, atol=1e-4)


def features(state, images, heads):
    """A plain ViT in PyTorch's own terms, without class token: (B, N, D)."""
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    grid = round(state["pos_embed"].shape[1] ** 0.5)
    pos = state["pos_embed"].transpose(1, 2).reshape(1, -1, grid, grid)
    x = x + F.interpolate(pos, size=x.shape[2:], mode="bicubic", align_corners=False)
    x, dim, i = x.flatten(2).transpose(1, 2), x.shape[1], 0
    while (block := f"blocks.{i}.") + "norm1.weight" in state:
        of = {name.removeprefix(block): t for name, t in state.items() if name.startswith(block)}
        y = F.layer_norm(x, (dim,), of["norm1.weight"], of["norm1.bias"], 1e-6).transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            *(y, y, y, dim, heads, of["attn.qkv.weight"], of["attn.qkv.bias"], None, None, False, 0.0),
            *(of["attn.proj.weight"], of["attn.proj.bias"]),
            need_weights=False,
        )
        x = x + y.transpose(0, 1) * of.get("ls1.gamma", 1)
        y = F.layer_norm(x, (dim,), of["norm2.weight"], of["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, of["mlp.fc1.weight"], of["mlp.fc1.bias"]))
        x = x + F.linear(y, of["mlp.fc2.weight"], of["mlp.fc2.bias"]) * of.get("ls2.gamma", 1)
        i += 1
    return x


def features_of(model, images):
    """Those of the ViT inside of META or of ViT-Adapter."""
    backbone = model.backbone
    if hasattr(backbone, "vit"):
        x = backbone.vit.embed(images)
        for quarter in range(4):
            x = backbone.vit.run_quarter(x, quarter)
        return x.flatten(2).transpose(1, 2)
    x = backbone.patch_embed(images)
    grid = round(backbone.pos_embed.shape[1] ** 0.5)
    pos = backbone.pos_embed.transpose(1, 2).reshape(1, -1, grid, grid)
    x = x + F.interpolate(pos, size=x.shape[2:], mode="bicubic", align_corners=False)
    size, x = x.shape[2:], x.flatten(2).transpose(1, 2)
    for block in backbone.blocks:
        x = block(x, size)
    return x


def mild(vit):
    """Weights of trained ones' size, so that attention is no choice of one token."""
    return {n: t * 0.05 if t.ndim > 1 and n.startswith(("blocks", "patch")) else t for n, t in vit.items()}


@pytest.mark.parametrize("model_has", [False, True])
@pytest.mark.parametrize("vit_has", [False, True])
@pytest.mark.parametrize("name", ["meta-t-upernet", "vit-adapter-t-upernet"])
def test_features_are_those_of_the_published_vit(path, name, vit_has, model_has):
    """With LayerScale in either of the two or in both; segmentation has no windows."""
    published = mild(timm_vit(192, 12, grid=4))
    published = scaled(published, 192) if vit_has else published
    torch.save(published, path)
    config = get_config(name, 3)
    backbone = replace(config.backbone, layer_scale=model_has, pos_grid=4)
    model = build_model(replace(config, backbone=backbone, channels=8))
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        load_vit_weights(model, path)
        expected = features({**published, "pos_embed": published["pos_embed"][:, 1:]}, images, heads=3)
        torch.testing.assert_close(features_of(model, images), expected, rtol=1e-4, atol=1e-4)


def test_a_new_model_takes_grid_and_layer_scale_from_the_vit(path):
    vit = scaled(timm_vit(grid=5))
    vit["patch_embed.proj.weight"] = torch.randn(128, 3, 14, 14)
    torch.save(vit, path)
    said: list[str] = []
    loaded = load_model(None, "meta-nano-mask-rcnn", log=said.append, backbone_ckpt=path)
    assert (loaded.config.backbone.pos_grid, loaded.config.backbone.layer_scale) == (5, True)
    assert torch.equal(loaded.model.backbone.vit.pos_embed, vit["pos_embed"][:, 1:])
    assert said[0] == (
        "model.pth holds a ViT of width 128, depth 8, patches of 14, 5x5 positions, LayerScale"
    )
    assert said[1] == "its patches are resampled from 14 to 16 pixels"
    assert said[-1].startswith("warning: of meta-nano-mask-rcnn only the ViT has weights; the rest, ")
    assert "M parameters, is random, " in said[-1]
    assert "roi_head.bbox_head.fc_cls.weight" in loaded.report.missing


def without_vit(state):
    """What is saved where the ViT is frozen."""
    return {n: t for n, t in state.items() if not n.startswith("backbone.vit.")}


@pytest.fixture
def vit_path(tmp_path, state):
    vit = {n.removeprefix("backbone.vit."): t for n, t in state.items() if n.startswith("backbone.vit.")}
    torch.save(vit, tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


@pytest.mark.parametrize("embedded", [False, True])
def test_a_checkpoint_without_its_vit_is_completed(path, state, vit_path, model, embedded):
    if embedded:
        save_checkpoint(path, model, small())
        content = torch.load(path)
        torch.save({**content, "model": without_vit(content["model"])}, path)
    else:
        torch.save(without_vit(state), path)
    assert "give the ViT that it was trained with by --backbone-ckpt" in refusal(path)
    said: list[str] = []
    loaded = load_model(path, log=said.append, backbone_ckpt=vit_path)
    assert same({n: t for n, t in loaded.model.state_dict().items() if n in state}, state)
    assert loaded.report.complete
    assert any("51 of the ViT's 51 tensors are taken from it" in note for note in said), said


def test_a_vit_adapter_without_its_vit_is_completed(path, tmp_path):
    config = get_config("vit-adapter-t-upernet", 3)
    config = replace(config, channels=8, backbone=replace(config.backbone, layer_scale=False))
    state = build(config).state_dict()
    ours = ("backbone.blocks.", "backbone.patch_embed.", "backbone.pos_embed")
    torch.save({n: t for n, t in state.items() if not n.startswith(ours)}, path)
    vit = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith(ours)}
    torch.save(vit, tmp_path / "vit.pth")
    loaded = load_model(path, backbone_ckpt=tmp_path / "vit.pth")
    assert loaded.config.name == config.name
    assert same({n: t for n, t in loaded.model.state_dict().items() if n in state}, state)


def test_a_whole_checkpoint_and_another_ones_vit_are_refused(path, state, vit_path, tmp_path):
    torch.save(state, path)
    assert "has the whole ViT" in refusal(path, backbone_ckpt=vit_path)
    torch.save(without_vit(state), path)
    torch.save(timm_vit(192), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"ViT of width 192.* is a META model of width 128"):
        load_model(path, backbone_ckpt=tmp_path / "other.pth")


def test_a_vit_alone_needs_a_model_with_a_vit(path):
    torch.save(timm_vit(192, 12), path)
    with pytest.raises(CheckpointError, match=r"--model \(meta-t-\.\.\., vit-adapter-t-\.\.\.\)"):
        load_model(None, backbone_ckpt=path)
    with pytest.raises(InputError, match="there is no checkpoint to load"):
        load_model(None)


def test_layer_scale_of_a_plain_vit_is_kept(path):
    scales = {f"blocks.{i}.ls{j}.gamma": torch.full((128,), 0.5) for i in range(8) for j in (1, 2)}
    torch.save({**timm_vit(), **scales}, path)
    loaded = load_model(path, "meta-nano-mask-rcnn", allow_partial=True)
    assert loaded.config.backbone.layer_scale
    assert torch.equal(loaded.model.backbone.vit.blocks[3].ls2.gamma, scales["blocks.3.ls2.gamma"])


def changed(**tensors):
    return timm_vit() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("vit", "says"),
    [
        (
            timm_vit(width=192),
            "of width 192, depth 8, and that of meta-nano-mask-rcnn is of width 128, depth 8",
        ),
        (timm_vit(width=192), "(meta-t-..., vit-adapter-t-...)"),
        (timm_vit(depth=4), "of width 128, depth 4, and"),
        (timm_vit(mlp_ratio=2), "of width 128, depth 8, MLP width 256, and"),
        (
            changed(blocks__0__attn__q_norm__weight=torch.ones(32)),
            "of another kind, which has blocks.0.attn.q_norm",
        ),
        (changed(norm_pre__weight=torch.ones(128)), "of another kind, which has norm_pre.weight"),
        (
            changed(pos_embed=torch.randn(1, 30, 128)),
            "a position embedding of 1x30x128, which is no square grid",
        ),
        ({n: t for n, t in timm_vit().items() if n != "pos_embed"}, "without a position embedding"),
        (changed(patch_embed__proj__weight=torch.ones(128, 4, 16, 16)), "a patch embedding of 128x4x16x16"),
        ({n: t for n, t in timm_vit().items() if "5.norm2" not in n}, "without blocks.5.norm2.weight"),
        (changed(blocks__999999__norm1__bias=torch.ones(128)), "without blocks.8.norm1.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_vit_of_another_size_or_kind_is_refused(path, vit, says):
    torch.save(vit, path)
    assert says in refusal(path, "meta-nano-mask-rcnn", allow_partial=True)
    with pytest.raises(CheckpointError) as error:
        load_model(None, "meta-nano-mask-rcnn", backbone_ckpt=path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_training_starts_from_the_vit_of_our_own_checkpoint(path, model, state):
    save_checkpoint(path, model, small())
    other = build_model(small("upernet"))
    load_vit_weights(other, path)
    assert torch.equal(
        other.backbone.vit.blocks[1].mlp.fc1.weight, state["backbone.vit.blocks.1.mlp.fc1.weight"]
    )
