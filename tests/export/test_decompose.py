"""Operators that the exporter does not translate, rewritten before it: the same values, no second trace."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from meta_deploy.export.decompose import decomposed, translated
from meta_deploy.export.operators import TRANSLATIONS
from meta_deploy.export.trace import quiet


class Module(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def trace(module, x):
    with torch.no_grad(), quiet():
        return torch.export.export(module.eval(), (x,), strict=False)


def run(program, x, export=torch.onnx.export):
    with quiet():
        exported = export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=20,
            custom_translation_table=TRANSLATIONS["native"],
            verbose=False,
        )
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def batch_norm():
    norm = nn.BatchNorm2d(8, eps=0.1)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


CASES = {
    "chunk": lambda m, x: tuple(part * i for i, part in enumerate(x.chunk(3, dim=-1), 1)),
    "chunk of the first axis": lambda m, x: x.chunk(2)[0] + 1,
    "cast": lambda m, x: ((x > 0).to(torch.float32) * x).to(torch.int64),
    "and": lambda m, x: ((x > 0) & (x < 1)).int(),
    "detached": lambda m, x: x.detach() * 2 + torch.ones(3).detach()[0],
    "batch norm": lambda m, x: m.norm(x),
    "transposed convolution": lambda m, x: m.up(x),
}
MODULES = {
    "batch norm": lambda: {"norm": batch_norm()},
    "transposed convolution": lambda: {
        "up": nn.ConvTranspose2d(8, 6, 3, stride=(2, 1), padding=1, output_padding=(1, 0), groups=2)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_rewritten_has_the_same_values_and_is_traced_once(name):
    torch.manual_seed(0)
    module, x = Module(CASES[name], **MODULES.get(name, dict)()), torch.randn(2, 8, 5, 7)
    program = decomposed(trace(module, x))
    assert program.run_decompositions() is program
    expected = module(x)
    for got, want in zip(
        run(program, x), expected if isinstance(expected, tuple) else [expected], strict=True
    ):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [lambda m, x: x.std(dim=1), lambda m, x: nn.functional.adaptive_avg_pool2d(x.half(), 3).float()],
)
def test_an_operator_that_is_translated_in_parts_alone_is_decomposed(function):
    x = torch.rand(2, 8, 5, 7)
    (got,) = run(trace(Module(function), x), x, translated)
    np.testing.assert_allclose(got, function(None, x).numpy(), rtol=1e-3, atol=1e-6)


def test_an_operator_that_nothing_translates_is_the_exporters_error():
    with pytest.raises(torch.onnx.OnnxExporterError):
        run(trace(Module(lambda m, x: torch.cdist(x[0], x[0])), torch.rand(2, 8, 5, 7)), None, translated)


def test_a_program_that_changes_tensors_in_place_is_left_to_the_exporter():
    def function(module, x):
        y = x * 2
        y[:, 0].add_(1)
        return y

    x = torch.randn(2, 8, 5, 7)
    program = decomposed(trace(Module(function), x))
    assert program.run_decompositions({}) is not program
    np.testing.assert_allclose(run(program, x)[0], Module(function)(x).numpy())
