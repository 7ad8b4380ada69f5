"""The pipeline as a whole: models of ours and of others answer as before through ONNX Runtime."""

import functools
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

from meta_deploy.graph.graph import IdentitySet, to_graph, to_proto
from meta_deploy.graph.pipeline import PASSES, run_passes
from meta_deploy.targets import TARGETS
from tests.graph.rewriting import ops, shuffled
from tests.small_graphs import model, value
from tests.tiny_models import CHANGED, OTHERS, exported, other, pictures


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


class Before:
    """A graph before any pass, and what it gives for some inputs; each is computed once."""

    def __init__(self, proto, feeds):
        self.proto, self.feeds = proto, feeds

    @functools.cached_property
    def outputs(self):
        return run(self.proto, self.feeds)

    @functools.cached_property
    def nodes(self):
        """With initializers in place of constants, as every pass sees it."""
        return list(run_passes(self.proto, [])[0].graph.node)


def unharmed(proto, feeds, passes=TARGETS["onnxruntime"].passes, tolerance=1e-5, before=None):
    """The new graph, after asserting equal outputs, and that a second round changes nothing.

    A pass that says it changed nothing has to leave every node as it was.
    """
    before = before or Before(proto, feeds)
    after, results = run_passes(proto, [*passes, *passes])
    if any(result.changes for result in results):
        same(before.outputs, run(after, feeds), tolerance)
    else:
        assert list(after.graph.node) == before.nodes
    # Clean-up may fold more the second time, by the shapes that the first made known.
    assert not any(result.changes for result in results[len(passes) :] if result.name != "clean-up")
    return after


# --- models of ours ---

# In another order than export/test_trace.py, whose worker makes the same ones at the same time.
KINDS = {
    "detector, any size": {
        "kind": "detector",
        "size": (128, 64),  # as in export/test_trace.py: traced once
        "dynamic_size": True,
        "window": 5,
        "stripe_width": 4,
    },
    "segmenter on ViT-Adapter, any size": {"kind": "adapter segmenter", "dynamic_size": True},
    "detector, changed": {"kind": "detector", **CHANGED},
    "segmenter, every norm its own": {"kind": "segmenter", "shared_norm": False},
    "segmenter, two images": {"kind": "segmenter", "batch": 2},
    "segmenter": {"kind": "segmenter"},
    "detector, any batch": {"kind": "detector", "dynamic_batch": (1, 2, 4)},
    "detector": {"kind": "detector"},
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


@functools.cache
def literal(kind):
    return Before(made(kind).literal, inputs(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_of_a_model_answers_as_the_literal_graph(kind):
    e = made(kind)
    same(literal(kind).outputs, run(e.graph, inputs(kind)), 2e-5)
    changes = Counter()
    for result in e.passes:
        changes[result.name] += result.changes
    if "any size" not in kind:
        assert all(changes[name] for name in ("clean-up", "fuse-attention", "collapse-chains"))
    for before, after in zip(e.passes, e.passes[1:], strict=False):
        assert before.nodes_after == after.nodes_before
        assert before.moves_after == after.moves_before
    collapse = next(result for result in e.passes if result.name == "collapse-chains")
    assert collapse.moves_after <= collapse.moves_before
    _, again = run_passes(e.graph, list(TARGETS["onnxruntime"].passes))
    assert not any(result.changes for result in again if result.name != "clean-up")


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_each_pass_alone_does_no_harm(name):
    e = literal("detector, changed")
    unharmed(e.proto, e.feeds, [name], before=e)


# --- models of others ---


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("name", OTHERS)
def test_models_of_others_go_through_unharmed(name, opset):
    unharmed(*other(name, opset))


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_others_of_any_batch_go_through_unharmed(name):
    proto, feeds = other(name, dynamic=True)
    unharmed(proto, feeds)
    after, _ = run_passes(proto, list(TARGETS["onnxruntime"].passes))
    more = {"x": np.concatenate([feeds["x"], feeds["x"][:1] + 1])}
    same(run(proto, more), run(after, more), 1e-5)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("passes", [(name,) for name in PASSES], ids="".join)
def test_each_pass_alone_leaves_models_of_others_unharmed(name, passes):
    unharmed(*other(name), passes)


ATTENTION = ("Attention", "MultiHeadAttention")


def test_attention_of_a_packed_projection_is_one_operator():
    after = unharmed(*other("packed"))
    assert ops(after).count("Attention") == 1
    assert not {"Slice", "Split", "Squeeze", "Transpose", "Softmax"} & set(ops(after))


def test_a_bias_between_is_the_operators_sixth_input():
    def biases(name):
        nodes = unharmed(*other(name)).graph.node
        return [bool(list(n.input[5:])) for n in nodes if n.op_type in ATTENTION]

    assert biases("shifted windows") == [True]
    assert biases("shifted windows, no bias") == [False]


@pytest.mark.parametrize("name", ["packed", "shifted windows, no bias"])
@pytest.mark.parametrize("seed", range(3))
def test_names_and_order_of_nodes_do_not_matter(name, seed):
    proto, feeds = other(name)
    changed = scrambled(proto, seed)
    one, first = run_passes(proto, list(TARGETS["onnxruntime"].passes))
    two, second = run_passes(changed, list(TARGETS["onnxruntime"].passes))
    assert [r.changes for r in first] == [r.changes for r in second]
    assert sorted(ops(one)) == sorted(ops(two))
    expected, actual = run(one, feeds), run(two, {"t0": feeds["x"]})
    np.testing.assert_allclose(next(iter(actual.values())), next(iter(expected.values())), rtol=1e-5)


@pytest.mark.parametrize("name", PASSES)
def test_an_empty_graph_stays_empty(name):
    after, (result,) = run_passes(model([], [value("x", [3])], [value("x", [3])]), [name])
    assert result.changes == 0
    assert [output.name for output in after.graph.output] == ["x"]


def scrambled(proto, seed):
    """The same graph, its nodes in another topological order and its tensors called otherwise."""
    rng, copy = np.random.default_rng(seed), onnx.ModelProto.FromString(proto.SerializeToString())
    del copy.graph.node[:]
    copy.graph.node.extend(shuffled(proto.graph.node, seed + 1))
    graph = to_graph(copy)
    tensors = [*graph.inputs, *rng.permutation(np.array([*graph.tensors().values()], object))]
    for i, tensor in enumerate(IdentitySet(t for t in tensors if not t.is_empty())):
        tensor.name = f"t{i}"
    for n in graph.nodes:
        n.name = ""
    return onnx.ModelProto.FromString(to_proto(graph).SerializeToString())


def test_results_say_what_each_pass_did():
    proto, _ = other("packed")
    after, results = run_passes(proto, list(TARGETS["onnxruntime"].passes))
    assert [result.name for result in results] == list(TARGETS["onnxruntime"].passes)
    assert results[0].nodes_before >= len(to_graph(proto).nodes) > results[0].nodes_after
    assert results[-1].nodes_after == len(after.graph.node)
    assert results[-1].moves_after == sum(op in ("Transpose", "Reshape") for op in ops(after))
    assert set(results[0].to_dict()) >= {"name", "changes", "nodes_before", "nodes_after", "seconds"}
