"""Random checkpoints: deterministic, and lively enough that a wrong export would show."""

from functools import partial

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.ops.deformable_attention import DeformableAttention
from meta_deploy.models.registry import get_config
from tools.random_checkpoint import _standardize, lively_model, main, noise

SIZE = (128, 128)


@pytest.fixture(scope="module")
def detector():
    return lively_model(get_config("meta-nano-mask-rcnn"), noise(SIZE), seed=3)


def test_weights_depend_on_the_seed_alone(detector):
    config = detector[0].config
    torch.manual_seed(99)
    again, other = (lively_model(config, noise(SIZE), seed)[0].state_dict() for seed in (3, 4))
    assert all(torch.equal(again[name], value) for name, value in detector[0].state_dict().items())
    assert not all(torch.equal(other[name], value) for name, value in again.items())


def test_activations_are_of_order_one_everywhere_also_on_other_pictures(detector):
    spreads = {}

    def note(name, module, inputs, output):
        spreads[name] = output.std().item()

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm)
    layers = [(name, module) for name, module in detector[0].named_modules() if isinstance(module, kinds)]
    hooks = [module.register_forward_hook(partial(note, name)) for name, module in layers]
    with torch.inference_mode():
        detector[0](noise(SIZE, seed=5))
    for hook in hooks:
        hook.remove()
    assert len(spreads) == len(layers)
    assert {name: s for name, s in spreads.items() if not 0.1 < s < 10} == {}


def test_the_injectors_are_on(detector):
    assert all(interaction.gamma.abs().mean() > 0.1 for interaction in detector[0].backbone.interactions)


def test_objects_of_several_classes_scores_and_shapes_are_found(detector):
    _, outputs = detector
    found = outputs["scores"] > 0
    assert outputs["num_detections"].sum() >= 30
    assert outputs["scores"][found].min() < 0.1
    assert outputs["scores"].max() > 0.5
    assert len(outputs["labels"][found].unique()) > 10
    inside = (outputs["masks"][found] > 0.5).float().mean(dim=(1, 2))
    assert ((inside > 0.02) & (inside < 0.98)).float().mean() > 0.9


def test_a_dense_detector_finds_objects_of_several_scores():
    _, outputs = lively_model(replace(get_config("meta-nano-gfl"), max_detections=30), noise(SIZE, count=2))
    scores = outputs["scores"][outputs["scores"] > 0]
    assert len(scores) > 20
    assert scores.max() > 2 * scores.min()


def test_deformable_attention_chooses_its_points_and_weighs_them():
    layer = DeformableAttention(16, heads=2, levels=1, points=2)
    for part, spread in ((layer.sampling_offsets, 2.0), (layer.attention_weights, 1.0)):
        assert not part.weight.any()
        x = torch.randn(1, 50, 16)
        with torch.no_grad():
            _standardize(spread, 0.0, part, x, part(x))
            assert part(x).std(dim=1).square().mean().sqrt().item() == pytest.approx(spread, rel=0.1)


def test_what_the_calibrating_pass_gave_is_what_the_model_gives(detector):
    model, outputs = detector
    with torch.inference_mode():
        again = model(noise(SIZE))
    assert torch.allclose(again["scores"], outputs["scores"], atol=1e-3)


def test_the_command_writes_a_checkpoint_that_loads(tmp_path, capsys):
    path = tmp_path / "random.safetensors"
    main(["meta-nano-upernet", str(path)])
    assert "classes" in capsys.readouterr().out
    loaded = load_model(path)
    assert loaded.config == get_config("meta-nano-upernet")
    with torch.inference_mode():
        labels = loaded.model(noise(SIZE))["logits"].argmax(dim=1)
    assert len(labels.unique()) > 30
