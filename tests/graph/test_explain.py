"""Why a pass left a place as it is: the reason names what stands in the way, and costs nothing unasked."""

import dataclasses

import numpy as np
import pytest
from onnx import helper, numpy_helper

from meta_deploy.graph.explain import shown
from meta_deploy.graph.graph import BATCH, to_graph
from meta_deploy.graph.pipeline import PASSES, run_passes
from meta_deploy.graph.prices import Cost
from tests.graph.attention_maps import Map, Stripes
from tests.graph.rewriting import node
from tests.small_graphs import model, value

FREE = Cost(node=0, value=0)


def constants(**arrays):
    return [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]


def weights(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def reasons(proto, name, cost=FREE):
    """What a pass says about each place that it left: (operator, reason)."""
    _, (result,) = run_passes(proto, [name], cost, explain=True)
    return [(place.op, place.reason) for place in result.declined]


def after_conv(nodes, outputs=("y",), shape=(1, 4, 6, 6), **more):
    """A 1x1 convolution from x to h, and nodes behind; "one" is 1.0, "each" one value a channel."""
    each = np.arange(1, 5, dtype=np.float32)
    arrays = {"w": weights(4, 4, 1, 1), "one": np.float32(1), "each": each, **more}
    padding = {"pads": [1] * 4} if arrays["w"].shape[-1] == 3 else {}
    head = node("Conv", ["x", "w"], ["h"], **padding)
    return model([head, *nodes], [value("x", shape)], list(outputs), constants(**arrays))


def layer_norm(opset=17, square="centred", extra=()):
    nodes = [
        node("ReduceMean", ["x"], ["mean"], axes=[-1]),
        node("Sub", ["x", "mean"], ["centred"]),
        node("Pow", [square, "two"], ["squares"]),
        node("ReduceMean", ["squares"], ["variance"], axes=[-1]),
        node("Add", ["variance", "epsilon"], ["sum"]),
        node("Sqrt", ["sum"], ["std"]),
        node("Div", [square, "std"], ["y"]),
        *extra,
    ]
    outputs = ["y", *(name for n in extra for name in n.output)]
    arrays = constants(two=np.float32(2), epsilon=np.float32(1e-5))
    imports = [helper.make_opsetid("", opset)]
    return model(nodes, [value("x", [2, 3, 8])], outputs, arrays, opset_imports=imports)


def norm(y, name):
    return node("BatchNormalization", [y, "each", "each", "each", "each"], [name])


def two_norms(*readers, bias=0.0):
    """Norms n0 and n1 of x, each with its scale, that these operators read."""
    arrays = {"s0": weights(8), "s1": weights(8) + 1, "b0": weights(8) + np.float32(bias), "b1": weights(8)}
    arrays |= {"w": weights(8, 5)}
    nodes = [node("LayerNormalization", ["x", f"s{i}", f"b{i}"], [f"n{i}"], axis=-1) for i in range(2)]
    for i, op in enumerate(readers):
        nodes.append(node(op, [f"n{i}", "w"] if op == "MatMul" else [f"n{i}"], [f"y{i}"]))
    return model(nodes, [value("x", [2, 3, 8])], ["y0", "y1"], constants(**arrays))


def entries(count, of=3, extra=()):
    """`count` of the entries that axis 0 of x has."""
    nodes = []
    for i in range(count):
        nodes.append(node("Slice", ["x", f"i{i}", f"i{i + 1}", "i0"], [f"cut{i}"]))
        nodes.append(node("Squeeze", [f"cut{i}", "i0"], [f"y{i}"]))
    outputs = [*(f"y{i}" for i in range(count)), *(name for n in extra for name in n.output)]
    arrays = constants(**{f"i{i}": np.array([i]) for i in range(4)})
    return model([*nodes, *extra], [value("x", [of, 4, 5])], outputs, arrays)


def concats(*inner_readers):
    nodes = [node("Concat", ["x", "x"], ["inner"], axis=1), node("Concat", ["x", "inner"], ["y"], axis=1)]
    nodes += [node("Neg", ["inner"], [name]) for name in inner_readers]
    return model(nodes, [value("x", [2, 3])], ["y", *inner_readers])


SUM = [node("Conv", ["x", "w"], ["g"]), node("Add", ["h", "g"], ["s"]), node("Conv", ["s", "w"], ["y"])]
MASKED = [
    node("Reshape", ["h", "rows"], ["r"]),
    node("Where", ["keep", "r", "zero"], ["y"]),
]
ROWS = {"rows": np.array([1, 4, 6, 6]), "keep": np.ones((1, 4, 6, 6), bool), "zero": np.float32(0)}


@pytest.mark.parametrize(
    ("name", "proto", "op", "reason"),
    [
        (
            "fuse-attention",
            Map((Stripes(mask=True),), reader="masked0").proto(),
            "Softmax",
            "'masked0' (3, 1, 8, 8) comes from Add 'masked0', not from the product of q and k",
        ),
        (
            "fuse-attention",
            Map((Stripes(),), reader="weights0").proto(),
            "Softmax",
            "'weights0' is also read by Neg 'read'",
        ),
        (
            "fuse-attention",
            Map((Stripes(),), output="product0").proto(),
            "Softmax",
            "'product0' is an output of the graph",
        ),
        (
            "fuse-attention",
            Map((Stripes(softmax=2),)).proto(),
            "Softmax",
            "the softmax goes over axis 2, not over the last of four",
        ),
        ("fuse-attention", Map((Stripes(),), dtype="float64").proto(), "Softmax", "q is of type float64"),
        ("fuse-layer-norm", layer_norm(12), "Sqrt", "the graph is of opset 12"),
        (
            "fuse-layer-norm",
            layer_norm(square="x"),
            "Sqrt",
            "'x' (2, 3, 8) is an input of the graph, and is not",
        ),
        (
            "fuse-layer-norm",
            layer_norm(extra=[node("Neg", ["centred"], ["z"])]),
            "Sqrt",
            "'centred' is also read by Neg 'z'",
        ),
        (
            "share-norms",
            two_norms("Neg", "Relu"),
            "LayerNormalization",
            "is read by Relu 'y1', not a linear map",
        ),
        (
            "share-norms",
            two_norms("Neg", "MatMul", bias=1e6),
            "LayerNormalization",
            "rounding errors of MatMul 'y1' would grow more than 10 times",
        ),
        (
            "fold-batch-norm",
            after_conv([norm("h", "y")], ["y", "h"]),
            "BatchNormalization",
            "'h' is an output",
        ),
        (
            "fold-batch-norm",
            after_conv([node("Relu", ["h"], ["r"]), norm("r", "z"), node("Neg", ["z"], ["y"])]),
            "BatchNormalization",
            "'r' (1, 4, 6, 6) comes from Relu 'r', no linear map",
        ),
        (
            "merge-siblings",
            after_conv([node("Conv", ["x", "w"], ["g"]), node("Sub", ["h", "g"], ["y"])]),
            "Conv",
            "with Conv 'g' apart it is 0",
        ),
        (
            "collapse-chains",
            model(
                [node("Flatten", ["x"], ["f"]), node("Unsqueeze", ["f", "one"], ["y"])],
                [value("x", ["a", "b", 3])],
                initializers=constants(one=np.array([1])),
            ),
            "Unsqueeze",
            "'x' (batch, b, 3) is not of known shape",
        ),
        (
            "move-linears",
            model(
                [node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), node("MatMul", ["t", "w"], ["y"])],
                [value("x", ["a", "b", 4])],
                initializers=constants(w=weights(4, 4)),
            ),
            "MatMul",
            "Transpose 't' is in the way: 'x' (batch, b, 4) is not of known shape",
        ),
        (
            "fold-scales",
            after_conv([node("Mul", ["h", "map"], ["y"])], map=weights(1, 4, 6, 6)),
            "Mul",
            "a constant of shape (1, 4, 6, 6) is not one value for each channel of 'h' (1, 4, 6, 6)",
        ),
        (
            "fold-scales",
            after_conv([node("Mul", ["h", "one"], ["y"])], ["y", "h"]),
            "Mul",
            "'h' is an output",
        ),
        (
            "fold-branches",
            after_conv(
                [node("Conv", ["h", "wide"], ["y"])], wide=weights(64, 4, 1, 1), w=weights(4, 4, 3, 3)
            ),
            "Conv",
            "it is cheapest as it is: 1.44e+04 multiply-adds",
        ),
        (
            "distribute-sums",
            after_conv([*SUM, node("Neg", ["s"], ["z"])], ["y", "z"]),
            "Conv",
            "'s' is also read by Neg 'z'",
        ),
        (
            "slices-to-split",
            entries(2),
            "Squeeze",
            "'x' (3, 4, 5) apart: 2 of them take entries [0, 1] of axis 0",
        ),
        (
            "slices-to-split",
            entries(3, extra=[node("Neg", ["x"], ["z"])]),
            "Squeeze",
            "Neg 'z' does something else",
        ),
        ("flatten-concats", concats("z"), "Concat", "'inner' is also read by Neg 'z'"),
        (
            "discarded-rows",
            after_conv(MASKED, **ROWS),
            "Where",
            "'keep' (1, 4, 6, 6) does not keep or discard whole rows of 'h' (1, 4, 6, 6)",
        ),
        (
            "stack-attention",
            Map((Stripes(2, 4), Stripes(4, 2, d=8)), 1, 4, 4).proto(),
            "MatMul",
            "no other attention of the same source has the shapes and scale of 'packed0'",
        ),
        (
            "order-tokens",
            dataclasses.replace(Map((Stripes(axis=3),)), reader="q0").proto(),
            "MatMul",
            "'q0' is also read by Neg 'read'",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_near_miss_is_explained(name, proto, op, reason):
    told = reasons(proto, name)
    assert any(op == of and reason in why for of, why in told), told


@pytest.mark.parametrize(
    ("name", "proto"),
    [
        ("fuse-attention", Map((Stripes(),)).proto()),
        ("fuse-layer-norm", layer_norm()),
        ("fold-batch-norm", after_conv([norm("h", "y")])),
        ("fold-scales", after_conv([node("Mul", ["h", "one"], ["y"])])),
        ("fold-branches", after_conv([node("Conv", ["h", "w"], ["y"])])),
        ("slices-to-split", entries(3)),
        ("flatten-concats", concats()),
    ],
)
def test_a_place_that_is_rewritten_is_no_near_miss(name, proto):
    _, (result,) = run_passes(proto, [name], FREE, explain=True)
    assert result.changes
    assert result.declined == []


def test_the_norm_that_is_left_is_said_to_be_alone():
    _, (result,) = run_passes(two_norms("MatMul", "Relu"), ["share-norms"], FREE, explain=True)
    assert [place.reason for place in result.declined] == ["it is the only norm of 'x' (2, 3, 8)"]


def test_far_from_the_pattern_there_is_nothing_to_say():
    proto = model([node("Relu", ["x"], ["y"])], [value("x", [2, 3])])
    assert {name: reasons(proto, name) for name in PASSES} == {name: [] for name in PASSES}


@pytest.mark.parametrize("name", ["fuse-attention", "order-tokens", "fold-scales"])
def test_asking_does_not_change_the_graph(name):
    proto = Map((Stripes(axis=3), Stripes(mask=True))).proto()
    asked, (told,) = run_passes(proto, [name], explain=True)
    unasked, (silent,) = run_passes(proto, [name])
    assert asked.SerializeToString(deterministic=True) == unasked.SerializeToString(deterministic=True)
    assert silent.declined is None
    assert "declined" not in silent.to_dict()
    assert told.to_dict()["declined"] == [dataclasses.asdict(place) for place in told.declined]


def test_each_place_is_told_once_by_its_name():
    proto = Map((Stripes(softmax=2), Stripes(softmax=2))).proto()
    _, (result,) = run_passes(proto, ["fuse-attention"], explain=True)
    assert [place.node for place in result.declined] == ["weights0", "weights1"]


def test_shapes_are_shown_as_they_are_written_in_onnx():
    nodes = [node("Neg", ["x"], ["y"], name="minus")]
    graph = to_graph(model(nodes, [value("x", [BATCH, 3 * BATCH, "n", 4])], [value("y", None)], infer=False))
    x, y = graph.nodes[0].inputs[0], graph.nodes[0].outputs[0]
    assert shown(x) == "'x' (batch, 3*batch, n, 4)"
    y.shape = None
    assert shown(y) == "'y' (of unknown shape)"
    assert shown(graph.nodes[0]) == "Neg 'minus'"
