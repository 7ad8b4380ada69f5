"""The pipeline as a whole: models of ours and of others answer as before through ONNX Runtime."""

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from meta_deploy.export.trace import quiet
from meta_deploy.graph.graph import to_graph, to_proto
from meta_deploy.graph.pipeline import PASSES, PIPELINES, run_passes
from tests.tiny_models import exported, pictures


def ops(proto):
    return [n.op_type for n in proto.graph.node]


def run(proto, feeds):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


# What follows a box's coordinates is as sharp as the picture at its edges: rounding shows more.
SHARP = {"masks": 30, "scores": 10, "boxes": 10}


def same(expected, actual, tolerance):
    """Outputs alike in name, order, type and shape, and in value relative to the largest."""
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape), name
        scale = 1.0 if array.dtype.kind in "bi" else max(float(np.abs(array).max(initial=0)), 1e-6)
        np.testing.assert_allclose(
            actual[name] / scale, array / scale, rtol=0, atol=tolerance * SHARP.get(name, 1), err_msg=name
        )


def unharmed(proto, feeds, passes=PIPELINES["onnxruntime"], tolerance=1e-5):
    """The new graph, after asserting equal outputs, and that a second round changes nothing."""
    after, _ = run_passes(proto, list(passes))
    same(run(proto, feeds), run(after, feeds), tolerance)
    _, again = run_passes(after, list(passes))
    # Clean-up may fold more the second time, by the shapes that the first made known.
    assert not any(result.changes for result in again if result.name != "clean-up")
    return after


# --- models of ours ---

KINDS = {
    "detector": {"kind": "detector"},
    "detector, windows": {"kind": "detector", "window": 5},
    "detector, every norm its own": {"kind": "detector", "shared_norm": False},
    "detector, any batch": {"kind": "detector", "dynamic_batch": (1, 2, 4)},
    "detector, any size": {
        "kind": "detector",
        "size": (128, 64),  # as in test_onnx_export.py: traced once
        "dynamic_size": True,
        "window": 5,
        "stripe_width": 4,
    },
    "segmenter": {"kind": "segmenter"},
    "segmenter, windows": {"kind": "segmenter", "window": 4},
    "segmenter, every norm its own": {"kind": "segmenter", "shared_norm": False},
    "segmenter, two images": {"kind": "segmenter", "batch": 2},
    "segmenter, any size": {"kind": "segmenter", "dynamic_size": True},
}


def made(kind):
    arguments = dict(KINDS[kind])
    return exported(arguments.pop("kind"), **arguments)


def inputs(kind):
    """Some pictures for each: more than one, and not of the size traced, where that may be."""
    arguments = KINDS[kind]
    batch = arguments.get("batch", 3 if "dynamic_batch" in arguments else 1)
    size = (64, 128) if arguments.get("dynamic_size") else (96, 128)
    return {"images": pictures(batch, size).numpy()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_of_a_model_answers_as_the_literal_graph(kind):
    e = made(kind)
    same(run(e.literal, inputs(kind)), run(e.graph, inputs(kind)), 2e-5)
    changes = {result.name: result.changes for result in e.passes}
    if "any size" not in kind:
        assert all(changes[name] for name in ("clean-up", "fuse-attention", "collapse-chains"))
    for before, after in zip(e.passes, e.passes[1:], strict=False):
        assert before.nodes_after == after.nodes_before
        assert before.moves_after == after.moves_before
    collapse = next(result for result in e.passes if result.name == "collapse-chains")
    assert collapse.moves_after <= collapse.moves_before
    _, again = run_passes(e.graph, list(PIPELINES["onnxruntime"]))
    assert not any(result.changes for result in again if result.name != "clean-up")


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("kind", ["detector", "segmenter, windows"])
def test_each_pass_alone_does_no_harm(kind, name):
    unharmed(made(kind).literal, inputs(kind), [name])


# --- models of others ---


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)))


class Shifted(nn.Module):
    """A block of windowed attention, shifted, with a bias for each place and a mask (as in Swin)."""

    def __init__(self, bias=True):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(4, 16, 16)) if bias else None

    def forward(self, x):
        B, H, W, C = x.shape
        t = torch.roll(self.norm(x), (-2, -2), (1, 2))
        t = t.view(B, H // 4, 4, W // 4, 4, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, C)
        q, k, v = self.qkv(t).reshape(-1, 16, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * 0.5) @ k.transpose(-2, -1)
        if self.bias is not None:
            weights = weights + self.bias
        t = self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, C))
        t = t.view(B, H // 4, W // 4, 4, 4, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        return x + torch.roll(t, (2, 2), (1, 2))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.layers(x)


class Packed(nn.Module):
    """Attention as a ViT of timm has it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 4, C // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(B, N, C))


OTHERS = {
    "residual": (Residual, (2, 3, 32, 32)),
    "encoder": (Encoder, (2, 7, 16)),
    "packed": (Packed, (2, 7, 16)),
    "shifted windows": (Shifted, (2, 8, 12, 16)),
    "shifted windows, no bias": (lambda: Shifted(bias=False), (2, 8, 12, 16)),
}


@functools.cache
def other(name, opset=20, dynamic=False):
    make, shape = OTHERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            make().eval(),
            (x,),
            dynamo=True,
            optimize=False,
            opset_version=opset,
            input_names=["x"],
            dynamic_shapes=({0: torch.export.Dim("b", min=1)},) if dynamic else None,
            verbose=False,
        )
    return program.model_proto, {"x": x.numpy()}


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("name", OTHERS)
def test_models_of_others_go_through_unharmed(name, opset):
    unharmed(*other(name, opset))


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_others_of_any_batch_go_through_unharmed(name):
    proto, feeds = other(name, dynamic=True)
    unharmed(proto, feeds)
    after, _ = run_passes(proto, list(PIPELINES["onnxruntime"]))
    more = {"x": np.concatenate([feeds["x"], feeds["x"][:1] + 1])}
    same(run(proto, more), run(after, more), 1e-5)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("passes", [(name,) for name in PASSES], ids="".join)
def test_each_pass_alone_leaves_models_of_others_unharmed(name, passes):
    unharmed(*other(name), passes)


def test_attention_of_a_packed_projection_is_a_split_and_one_operator():
    after = unharmed(*other("packed"))
    assert sorted(ops(after)).count("MultiHeadAttention") == 1
    assert not {"Slice", "Squeeze", "Transpose", "Softmax"} & set(ops(after))


def test_a_bias_between_is_not_lost():
    assert "MultiHeadAttention" not in ops(unharmed(*other("shifted windows")))
    assert "MultiHeadAttention" in ops(unharmed(*other("shifted windows, no bias")))


@pytest.mark.parametrize("name", ["packed", "shifted windows, no bias"])
@pytest.mark.parametrize("seed", range(3))
def test_names_and_order_of_nodes_do_not_matter(name, seed):
    proto, feeds = other(name)
    changed = scrambled(proto, seed)
    one, first = run_passes(proto, list(PIPELINES["onnxruntime"]))
    two, second = run_passes(changed, list(PIPELINES["onnxruntime"]))
    assert [r.changes for r in first] == [r.changes for r in second]
    assert sorted(ops(one)) == sorted(ops(two))
    expected, actual = run(one, feeds), run(two, {"t0": feeds["x"]})
    np.testing.assert_allclose(next(iter(actual.values())), next(iter(expected.values())), rtol=1e-5)


def scrambled(proto, seed):
    """The same graph, its nodes in another topological order and its tensors called otherwise."""
    graph = to_graph(proto)
    rng = np.random.default_rng(seed)
    left, order, made = list(graph.nodes), [], set()
    produced = {id(tensor) for n in left for tensor in n.outputs}
    while left:
        ready = [
            i for i, n in enumerate(left) if all(id(t) in made or id(t) not in produced for t in n.inputs)
        ]
        order.append(left.pop(ready[rng.integers(len(ready))]))
        made.update(id(tensor) for tensor in order[-1].outputs)
    graph.nodes = order
    tensors = [*graph.inputs, *rng.permutation(np.array([*graph.tensors().values()], object))]
    for i, tensor in enumerate({id(t): t for t in tensors if not t.is_empty()}.values()):
        tensor.name = f"t{i}"
    for n in graph.nodes:
        n.name = ""
    return onnx.ModelProto.FromString(to_proto(graph).SerializeToString())


def test_results_say_what_each_pass_did():
    proto, _ = other("packed")
    after, results = run_passes(proto, list(PIPELINES["onnxruntime"]))
    assert [result.name for result in results] == list(PIPELINES["onnxruntime"])
    assert results[0].nodes_before >= len(to_graph(proto).nodes) > results[0].nodes_after
    assert results[-1].nodes_after == len(after.graph.node)
    assert results[-1].moves_after == sum(op in ("Transpose", "Reshape") for op in ops(after))
    assert set(results[0].to_dict()) >= {"name", "changes", "nodes_before", "nodes_after", "seconds"}


def test_every_pipeline_is_of_passes_that_there_are():
    assert all(name in PASSES for names in PIPELINES.values() for name in names)
