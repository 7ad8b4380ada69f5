"""ViT-Adapter-T against outputs of the original code, with weights that a rule makes from the tensors' names.

The vectors and the rule are described beside them, in `shared/data/vit-adapter/parity`.
"""

import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from meta_deploy.models.checkpoint.load import _load
from meta_deploy.models.checkpoint.read import Checkpoint
from meta_deploy.tasks.semantic_segmentation import averaged_class_map
from meta_deploy.tasks.tiles import windows_of

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "vit-adapter"
DETECTOR = "mask_rcnn_deit_adapter_tiny_fpn_3x_coco"
SEGMENTER = "upernet_deit_adapter_tiny_512_160k_ade20k"
TOLERANCE = 1e-5  # of a map's largest value
GAINS = (
    *(("lateral_convs", 0.3), ("fpn_convs", 1.0), ("rpn_cls", 0.5), ("rpn_reg", 0.3)),
    *(("atss_cls", 1.0), ("atss_reg", 0.3), ("gfl_cls", 1.0), ("fc_cls", 2.5)),
)

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the original's outputs are not here")


def weight(name, shape):
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    last = name.rsplit(".", 1)[-1]
    if last == "running_mean":
        made = 0.1 * noise
    elif last == "running_var":
        made = 1 + 0.1 * np.abs(noise)
    elif last in ("pos_embed", "level_embed", "cls_token", "relative_position_bias_table"):
        made = 0.2 * noise
    elif name.endswith("sampling_offsets.bias"):
        made = 2 * noise
    elif last.startswith("gamma"):
        made = 0.5 + 0.1 * noise
    elif last == "scale":
        made = 1 + 0.1 * noise
    elif len(shape) >= 2:
        usual = math.sqrt(2) if len(shape) == 4 else 1.0
        gain = next((g for part, g in GAINS if part in name), usual)
        made = noise * (gain / math.sqrt(np.prod(shape[1:])))
    else:
        made = 1 + 0.1 * noise if last == "weight" else 0.02 * noise
    return torch.from_numpy(np.asarray(made, dtype=np.float64).astype(np.float32))


def image(h, w):
    rng = np.random.default_rng(0)
    fine = rng.standard_normal((1, 3, h, w))
    coarse = rng.standard_normal((1, 3, h // 32, w // 32))
    return torch.from_numpy((fine + 2 * coarse.repeat(32, 2).repeat(32, 3)).astype(np.float32))


@functools.cache
def model(config):
    """The model of a checkpoint with the names and shapes of the published one."""
    names = json.loads((DATA / "keys" / f"{config}.json").read_text())["state_dict"]
    counter = torch.zeros((), dtype=torch.int64)
    state = {
        name: counter if name.endswith("num_batches_tracked") else weight(name, tuple(shape))
        for name, (_, *shape) in names.items()
        if not name.startswith("auxiliary_head.")
    }
    return _load(Checkpoint(state, None, None, Path("x.pth")), None, False).model


def expected(config, height, width):
    return np.load(DATA / "parity" / f"{config}.{height}x{width}.npz")


def near(actual, wanted, scale, name):
    np.testing.assert_allclose(actual / scale, wanted / scale, rtol=0, atol=TOLERANCE, err_msg=name)


def same_map(vectors, name, tensor):
    """Values, where they are stored, and the means over all positions and channels."""
    array = tensor.numpy()
    assert tuple(vectors[f"{name}.shape"]) == array.shape, name
    wide = array.astype(np.float64)
    scale = np.abs(array).max()
    if name in vectors:
        near(array, vectors[name], scale, name)
    else:
        s = int(vectors[f"{name}.stride"])
        near(array[:, ::s, ::s, ::s], vectors[f"{name}.sub"], scale, name)
    near(wide.mean(axis=(0, 2, 3)), vectors[f"{name}.channel_mean"], scale, name)
    near(np.sqrt((wide**2).mean(axis=(0, 2, 3))), vectors[f"{name}.channel_rms"], scale, name)
    near(wide.mean(axis=(0, 1)), vectors[f"{name}.position_mean"], scale, name)


def as_tokens(x):
    return x if x.ndim == 3 else x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("config", [DETECTOR, SEGMENTER])
@torch.no_grad()
def test_the_backbone_is_the_originals_station_by_station(config):
    vectors, backbone = expected(config, 64, 96), model(config).backbone
    seen = {}
    backbone.patch_embed.register_forward_hook(lambda m, given, out: seen.update(patch_embed=as_tokens(out)))
    backbone.spm.register_forward_hook(lambda m, given, out: seen.update(spm=out))
    for i, interaction in enumerate(backbone.interactions):
        interaction.register_forward_hook(lambda m, given, out, i=i: seen.update({i: out}))
    maps = backbone(image(64, 96))
    taps = {"patch_embed": seen["patch_embed"], "spm_c1": seen["spm"][0]}
    taps |= {f"spm_c{i}": as_tokens(seen["spm"][i - 1]) for i in (2, 3, 4)}
    taps |= {f"interaction{i}_vit": seen[i][0] for i in range(4)}
    taps |= {f"interaction{i}_spatial": seen[i][1] for i in range(4)}
    for name, tensor in taps.items():
        wanted = vectors[f"tap.{name}"]
        near(tensor.numpy(), wanted, np.abs(wanted).max(), name)
    for i, tensor in enumerate(maps):
        same_map(vectors, f"f{i + 1}", tensor)


@pytest.mark.slow
@torch.no_grad()
def test_mask_rcnn_is_the_originals_to_the_last_detection_and_mask():
    vectors, detector, x = expected(DETECTOR, 256, 320), model(DETECTOR), image(256, 320)
    maps = detector.backbone(x)
    features = detector.neck(maps)
    for i, tensor in enumerate(maps):
        same_map(vectors, f"f{i + 1}", tensor)
    for i, (feature, logits, deltas) in enumerate(zip(features, *detector.rpn_head(features), strict=True)):
        same_map(vectors, f"neck{i}", feature)
        same_map(vectors, f"rpn_cls{i}", logits)
        same_map(vectors, f"rpn_bbox{i}", deltas)

    out = {name: value[0].numpy() for name, value in detector(x, stages=True).items()}
    scores = 1 / (1 + np.exp(-out["proposal_logits"].astype(np.float64)))
    proposals = np.concatenate([out["proposals"], scores[:, None]], axis=1)
    wanted = vectors["proposals"]
    gap = np.abs(proposals[:, None] - wanted[None])  # near ties change places
    alike = (gap[..., :4].max(axis=-1) < 0.01) & (gap[..., 4] < 1e-5)
    assert alike.any(axis=0).all()
    assert alike.any(axis=1).all()

    assert out["num_detections"] == len(vectors["det_scores"])
    np.testing.assert_allclose(out["boxes"], vectors["det_boxes"], rtol=0, atol=0.01)
    np.testing.assert_allclose(out["scores"], vectors["det_scores"], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(out["labels"], vectors["det_labels"])
    np.testing.assert_allclose(out["masks"][:12], vectors["mask_prob"], rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_upernet_is_the_originals_to_the_last_pixel():
    vectors, segmenter, x = expected(SEGMENTER, 512, 512), model(SEGMENTER), image(512, 512)
    out = segmenter(x, stages=True)
    for i in range(4):
        same_map(vectors, f"f{i + 1}", out[f"feature_{i}"])
    same_map(vectors, "logits", out["logits"])
    sure = vectors["margin_quarter"] > 1e-4
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(
        out["logits"][0].argmax(dim=0).numpy()[sure], vectors["argmax_quarter"][sure]
    )


@pytest.mark.slow
@torch.no_grad()
def test_upernet_over_windows_is_the_originals_slide_mode():
    vectors, segmenter, x = expected(SEGMENTER, 512, 704), model(SEGMENTER), image(512, 704)
    windows = windows_of((512, 704), (512, 512), 341)
    logits = [
        segmenter(window.of(x[0].permute(1, 2, 0)).permute(2, 0, 1)[None])["logits"] for window in windows
    ]
    labels = averaged_class_map([one[0].numpy() for one in logits], windows, (512, 704), (512, 704))
    # Where the best two are as good as one, rounding decides.
    assert (labels != vectors["slide_argmax"]).mean() < 1e-4
