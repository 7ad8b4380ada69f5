"""The training tool: it goes on where it stopped, and what it writes can be exported."""

import json

import numpy as np
import torch
from msgspec.structs import replace

from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.registry import build_model, get_config
from tools.train import Training, freeze_batch_norm, pack, parse, train, unpack
from tools.training_data import Sample, Scenes

SMALL = ["meta-nano-upernet", "--sizes", "64", "--batch", "2", "--workers", "0", "--no-bf16"]


def test_a_resumed_training_is_the_uninterrupted_one_and_can_be_loaded(tmp_path, monkeypatch):
    def run(out, *more):
        train(parse([*SMALL, "--out", str(tmp_path / out), "--steps", "4", "--validate", "1", *more]))
        return load_model(tmp_path / out / "meta-nano-upernet.pth")

    whole = run("whole")

    class Stopped(Exception):
        pass

    def stop_at_two(self, *batch, step=Training.train_step):
        if self.step == 2:
            self.save(tmp_path / "parts")
            raise Stopped
        return step(self, *batch)

    monkeypatch.setattr(Training, "train_step", stop_at_two)
    try:
        run("parts")
    except Stopped:
        monkeypatch.undo()
    resumed = run("parts", "--resume")

    assert whole.class_names[0] == "background"
    assert whole.class_names[-1] == "boundary"
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(value, resumed.model.state_dict()[name], rtol=0, atol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4
    assert set(lines[-1]["validation"]) >= {"IoU background", "IoU boundary"}


def test_a_training_starts_from_a_plain_vit(tmp_path):
    torch.manual_seed(0)
    config = get_config("meta-nano-upernet")
    config = replace(config, backbone=replace(config.backbone, layer_scale=True, pos_grid=3))
    vit = build_model(config).backbone.vit.state_dict()
    torch.save(vit, tmp_path / "vit.pth")
    given = ["--out", str(tmp_path), "--steps", "1", "--backbone-ckpt", str(tmp_path / "vit.pth")]
    training = Training(parse([*SMALL, *given]), Scenes())
    assert (training.config.backbone.layer_scale, training.config.backbone.pos_grid) == (True, 3)
    for name, value in training.model.backbone.vit.state_dict().items():
        assert torch.equal(value, vit[name]), name


def test_objects_arrive_as_they_were_sent():
    samples = [Scenes().sample(k, 52) for k in range(3)]  # 52 is no multiple of 8
    nothing = Sample(
        samples[0].image, *(x[:0] for x in (samples[0].boxes, samples[0].labels, samples[0].masks))
    )
    for sample, truth in zip(
        [*samples, nothing], unpack(pack([*samples, nothing]), 52, torch.device("cpu")), strict=True
    ):
        for name in ("boxes", "labels", "masks"):
            np.testing.assert_array_equal(getattr(truth, name).numpy(), getattr(sample, name))


def test_frozen_batch_norm_has_the_averages_and_keeps_them():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).train()
    ema = {name: torch.full_like(value, 2) for name, value in model.state_dict().items()}
    freeze_batch_norm(model, ema)
    norm = model[1]
    x = torch.randn(2, 3, 5, 5)
    expected = (model[0](x) - 2) / (2 + norm.eps) ** 0.5
    torch.testing.assert_close(model(x), expected)
    assert norm.running_mean.eq(2).all()
    assert norm.weight.requires_grad
