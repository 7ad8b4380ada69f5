"""Where a run of PyTorch goes: operators by hand, and a model whose modules are known."""

import time

import pytest
import torch
from torch import nn

from meta_deploy.report.pytorch_profile import profile


class Block(nn.Module):
    """A convolution, then attention of two heads over its pixels, written out or not, and a norm."""

    def __init__(self, written_out=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.qkv = nn.Linear(8, 24, bias=False)
        self.norm = nn.LayerNorm(8)
        self.written_out = written_out

    def forward(self, images):
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        q, k, v = (part.view(1, 16, 2, 4).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1))
        if self.written_out:
            out = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
        else:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.norm(out.transpose(1, 2).reshape(1, 16, 8) + tokens)


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.blocks = nn.ModuleList([Block(**options)])

    def forward(self, images):
        return self.blocks[0](images)


def profiled(runs=2, **options):
    model, images = Net(**options).eval(), torch.ones(1, 3, 4, 4)

    def run():
        with torch.inference_mode():
            return model(images)

    return profile(run, runs)


@pytest.fixture(scope="module")
def found():
    return profiled()


def by_op(found):
    return {row.op: row for row in found.nodes}


def test_bytes_and_flops_are_those_counted_by_hand(found):
    conv, linear, attention = (
        by_op(found)[op] for op in ("conv2d", "linear", "scaled_dot_product_attention")
    )
    assert (conv.bytes_read, conv.bytes_written) == (4 * (3 * 16 + 8 * 27 + 8), 4 * 8 * 16)
    assert conv.flops == 8 * 16 * (2 * 27 + 1)
    assert linear.flops == 16 * 24 * 2 * 8
    assert attention.flops == 16 * 16 * (2 * 8 + 2 * 8 + 6 * 2)
    assert by_op(found)["layer_norm"].flops == 7 * 16 * 8
    assert by_op(found)["add"].bytes_read == 2 * 4 * 16 * 8


def test_views_move_nothing_and_copies_do(found):
    views = [row for row in found.nodes if row.op in ("transpose", "view", "chunk", "flatten")]
    assert len(views) > 5
    assert {(row.op_class, row.bytes_read, row.bytes_written) for row in views} == {("data movement", 0, 0)}
    copy = by_op(profiled(written_out=True))["reshape"]
    assert (copy.op_class, copy.bytes_read) == ("data movement", 4 * 16 * 8)


def test_classes_and_what_is_between_operators_add_up_to_the_run(found):
    assert sum(row.ms for row in found.classes) == pytest.approx(found.ms)
    assert {row.name: row.nodes for row in found.classes if row.name != "data movement"} == {
        "convolution": 1,
        "matrix product": 1,
        "attention": 1,
        "normalization": 1,
        "element-wise": 1,
        "between nodes": 0,
    }


def test_attention_that_is_written_out_is_one_with_all_in_it():
    found = profiled(written_out=True)
    inside = [row.op for row in found.nodes if row.op_class == "attention"]
    assert inside == ["matmul", "mul", "softmax", "matmul"]


def test_operators_lead_to_their_modules(found):
    rows = by_op(found)
    assert (rows["conv2d"].module, rows["linear"].module) == ("blocks.0.conv", "blocks.0.qkv")
    assert rows["add"].module == "blocks.0"
    assert {row.name: row.nodes for row in found.modules}["blocks"] == len(found.nodes)


def test_the_peak_of_live_activations_is_the_one_counted_by_hand():
    def run():
        x = torch.ones(1000)
        y = x + 1
        z = (y * 2).view(10, 100)
        del y
        return z.sum() + x[0]

    found = profile(run, 1).live_peak
    assert (found.bytes, {tensor.made_by for tensor in found.tensors}) == (
        12_000,
        {"ones_0", "add_1", "mul_2"},
    )


def test_times_are_the_operators_and_not_those_of_taking_them_down(monkeypatch):
    from meta_deploy.report import pytorch_profile

    note = pytorch_profile._Watch._note

    def slow(*args):
        time.sleep(0.02)
        note(*args)

    monkeypatch.setattr(pytorch_profile._Watch, "_note", slow)
    found = profiled(runs=1)
    assert found.ms < 0.5 * 20 * len(found.nodes)
