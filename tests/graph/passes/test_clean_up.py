"""Clean-up keeps every graph's function, its outputs' names and order; it removes what need not be there."""

import tracemalloc

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from meta_deploy.graph.graph import BATCH, to_graph, to_proto
from meta_deploy.graph.passes.clean_up import clean_up
from tests.graph.rewriting import RANDOM, node, ops
from tests.small_graphs import FLOAT, calls, model, run, value

RNG = np.random.default_rng(0)


def cleaned(proto):
    graph = to_graph(proto)
    changes = clean_up(graph)
    return to_proto(graph), changes


def unharmed(proto, tolerance=1e-5, **feeds):
    """The cleaned model, after asserting that it answers as before and that a second run changes nothing."""
    after, _ = cleaned(proto)
    onnx.checker.check_model(after)
    expected, actual = run(proto, **feeds), run(after, **feeds)
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        assert actual[name].shape == array.shape
        scale = max(np.abs(array).max(initial=0), 1e-12) if array.dtype.kind == "f" else 0
        np.testing.assert_allclose(actual[name], array, rtol=0, atol=tolerance * scale)
    again, changes = cleaned(after)
    assert changes == 0
    assert ops(again) == ops(after)
    return after


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def constant(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def test_constants_are_folded_duplicates_merged_identities_and_dead_nodes_dropped():
    nodes = [
        node("Add", ["a", "b"], ["ab"]),
        node("Mul", ["x", "ab"], ["p"]),
        node("Mul", ["x", "ab"], ["q"]),
        node("Identity", ["q"], ["i"]),
        node("Add", ["p", "i"], ["y"]),
        node("Neg", ["x"], ["dead"]),
    ]
    after = unharmed(
        model(nodes, [value("x", [3])], initializers=[constant("a", floats(3)), constant("b", floats(3))]),
        x=floats(3),
    )
    assert ops(after) == ["Mul", "Add"]
    assert len(after.graph.initializer) == 1


def test_nodes_removed_are_counted():
    nodes = [node("Identity", ["x"], ["i"]), node("Relu", ["i"], ["y"]), node("Abs", ["x"], ["dead"])]
    assert cleaned(model(nodes, [value("x", [3])]))[1] == 2


def test_a_large_constant_is_folded_without_a_word(capfd):
    """graph-surgeon warns of large constants on standard output, which belongs to --json."""
    big = constant("big", np.zeros((512, 1024), np.float32))
    nodes = [node("Exp", ["big"], ["e"]), node("Add", ["x", "e"], ["y"])]
    after = unharmed(model(nodes, [value("x", [1])], initializers=[big]), x=floats(1))
    assert ops(after) == ["Add"]
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_folded_is_left_without_a_word(capfd):
    """A Reshape of constants that fails when run: dead code that a model may carry behind an If."""
    bad = node("Reshape", ["five", "shape"], ["z"])
    branches = {
        "then_branch": helper.make_graph([bad], "t", [], [value("z", None)]),
        "else_branch": helper.make_graph([node("Relu", ["x"], ["e"])], "e", [], [value("e", None)]),
    }
    five, shape = constant("five", floats(5)), constant("shape", np.array([2, 2]))
    proto = model(
        [node("If", ["c"], ["y"], **branches)],
        [value("x", [3]), value("c", [], TensorProto.BOOL)],
        [value("y", None)],
        [five, shape],
        infer=False,
    )
    after, _ = cleaned(proto)
    feeds = {"x": floats(3), "c": np.array(False)}
    np.testing.assert_array_equal(run(after, **feeds)["y"], run(proto, **feeds)["y"])
    assert capfd.readouterr().out == ""


def test_float_list_constants_stay_float32():
    nodes = [
        node("Constant", [], ["c"], value_floats=[0.1, 0.2]),
        node("Constant", [], ["d"], value_floats=[3.0]),
        node("Mul", ["c", "d"], ["cd"]),
        node("Add", ["x", "cd"], ["y"]),
    ]
    after = unharmed(model(nodes, [value("x", [2])]), x=floats(2))
    assert [i.data_type for i in after.graph.initializer] == [FLOAT]


def test_local_functions_are_cleaned_inside():
    body = [
        node("Constant", [], ["one"], value_floats=[1.0]),
        node("Identity", ["a"], ["i"]),
        node("Add", ["i", "one"], ["b"]),
    ]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Next", ["a"], ["b"], body, imports[:1])
    nodes = [node("Next", ["x"], ["h"], domain="own"), node("Next", ["h"], ["y"], domain="own")]
    after = unharmed(
        model(nodes, [value("x", [2])], opset_imports=imports, functions=[function]), x=floats(2)
    )
    assert ops(after) == ["Add", "Add"]


def if_model(condition_inputs, condition_initializers, then_nodes, else_nodes):
    branches = {
        f"{name}_branch": helper.make_graph(nodes, name, [], [value(nodes[-1].output[0], [3])])
        for name, nodes in (("then", then_nodes), ("else", else_nodes))
    }
    nodes = [node("Relu", ["x"], ["h"]), node("If", ["c"], ["y"], **branches), node("Neg", ["y"], ["z"])]
    return model(
        nodes,
        [value("x", [3]), *condition_inputs],
        [value("y", [3]), value("z", [3])],
        condition_initializers,
        infer=False,
    )


THEN = [
    node("Constant", [], ["k"], value_floats=[2.5]),
    node("Mul", ["h", "k"], ["t0"]),
    node("Identity", ["t0"], ["t"]),
]
ELSE = [node("Add", ["h", "x"], ["e"])]


@pytest.mark.parametrize("taken", [True, False])
def test_an_if_works_as_before(taken):
    proto = if_model([value("c", [], TensorProto.BOOL)], [], THEN, ELSE)
    after = unharmed(proto, x=floats(3), c=np.array(taken))
    assert "If" in ops(after)


@pytest.mark.parametrize("taken", [True, False])
def test_an_if_of_a_constant_works_as_before(taken):
    unharmed(if_model([], [constant("c", np.array(taken))], THEN, ELSE), x=floats(3))


@pytest.mark.parametrize("taken", [True, False])
def test_an_if_of_a_constant_that_passes_an_outer_tensor_on_works_as_before(taken):
    """The branch is one Identity of a tensor made outside: nothing in it makes the output."""
    proto = if_model(
        [],
        [constant("c", np.array(taken))],
        [node("Identity", ["h"], ["t"])],
        [node("Identity", ["x"], ["e"])],
    )
    unharmed(proto, x=floats(3))


def test_a_loop_works_as_before():
    body = helper.make_graph(
        [
            node("Constant", [], ["half"], value_floats=[0.5]),
            node("Mul", ["v", "half"], ["v0"]),
            node("Add", ["v0", "h"], ["v_out"]),
            node("Identity", ["cond"], ["cond_out"]),
            node("Identity", ["v_out"], ["scan"]),
        ],
        "body",
        [value("i", [], TensorProto.INT64), value("cond", [], TensorProto.BOOL), value("v", [3])],
        [value("cond_out", [], TensorProto.BOOL), value("v_out", [3]), value("scan", [3])],
    )
    proto = model(
        [node("Relu", ["x"], ["h"]), node("Loop", ["n", "", "x"], ["y", "all"], body=body)],
        [value("x", [3]), value("n", [], TensorProto.INT64)],
        [value("y", [3]), value("all", ["n", 3])],
    )
    after = unharmed(proto, x=floats(3), n=np.array(4))
    assert run(after, x=floats(3), n=np.array(0))["all"].shape == (0, 3)


def test_an_output_that_is_an_input_stays():
    after = unharmed(model([node("Identity", ["x"], ["y"])], [value("x", [3])]), x=floats(3))
    assert [o.name for o in after.graph.output] == ["y"]


def test_a_constant_output_stays():
    nodes = [
        node("Constant", [], ["y"], value_floats=[1.0, 2.0]),
        node("Add", ["a", "a"], ["z"]),
        node("Neg", ["x"], ["w"]),
    ]
    proto = model(nodes, [value("x", [3])], ["y", "z", "w"], [constant("a", floats(3))])
    unharmed(proto, x=floats(3))


def test_equal_outputs_keep_their_names():
    nodes = [
        node("Relu", ["x"], ["b"]),
        node("Relu", ["x"], ["a"]),
        node("Identity", ["b"], ["c"]),
        node("Abs", ["c"], ["d"]),
    ]
    after = unharmed(model(nodes, [value("x", [3])], ["d", "b", "a", "c"]), x=floats(3))
    assert [o.name for o in after.graph.output] == ["d", "b", "a", "c"]


def test_an_unused_input_stays():
    after, _ = cleaned(model([node("Relu", ["x"], ["y"])], [value("x", [3]), value("unused", [2])]))
    assert [i.name for i in after.graph.input] == ["x", "unused"]


@pytest.mark.parametrize("op", ["RandomNormal", "RandomUniform"])
def test_random_numbers_are_drawn_anew_each_run(op):
    nodes = [
        node(op, [], ["r"], shape=[8]),
        node(op, [], ["s"], shape=[8]),
        node("Add", ["x", "r"], ["y"]),
        node("Add", ["x", "s"], ["z"]),
    ]
    after, _ = cleaned(model(nodes, [value("x", [8])], ["y", "z"]))
    outputs = run(after, x=np.zeros(8, np.float32))
    assert not np.array_equal(outputs["y"], outputs["z"])
    assert ops(after).count(op) == 2


def test_random_numbers_in_the_shape_of_a_constant_are_not_folded():
    nodes = [node("RandomNormalLike", ["a"], ["r"]), node("Add", ["x", "r"], ["y"])]
    after, _ = cleaned(model(nodes, [value("x", [8])], initializers=[constant("a", floats(8))]))
    assert ops(after) == ["RandomNormalLike", "Add"]


@pytest.mark.parametrize(("op", "factor"), [("Mul", 0.5), ("Div", 1.5), ("Mul", 2.5)])
def test_a_fraction_of_a_size_keeps_its_fraction(op, factor):
    """graph-surgeon's cast elision would turn 0.5 into a whole number."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Cast", ["s"], ["f"], to=FLOAT),
        node(op, ["f", "c"], ["p"]),
        node("Cast", ["p"], ["y"], to=TensorProto.INT64),
    ]
    proto = model(
        nodes,
        [value("x", ["n", 4])],
        [value("y", [2], TensorProto.INT64)],
        [constant("c", np.float32([factor]))],
    )
    after = unharmed(proto, x=floats(7, 4))
    assert run(after, x=floats(7, 4))["y"].tolist() == [
        int(7 * factor) if op == "Mul" else int(7 / factor),
        int(4 * factor) if op == "Mul" else int(4 / factor),
    ]


@pytest.mark.parametrize("span", [{"start": 1}, {"end": 2}, {"start": 1, "end": -1}, {"start": -2}])
def test_a_part_of_a_shape_is_folded_to_that_part(span):
    proto = model(
        [node("Shape", ["x"], ["y"], **span)], [value("x", [2, 3, 4])], [value("y", None, TensorProto.INT64)]
    )
    after = unharmed(proto, x=floats(2, 3, 4))
    assert ops(after) == []


def from_torch(module, *inputs, dynamic=None):
    names = [f"x{i}" for i in range(len(inputs))]
    proto = torch.onnx.export(
        module.eval(),
        inputs,
        dynamo=True,
        optimize=False,
        input_names=names,
        dynamic_shapes=dynamic,
        verbose=False,
    ).model_proto
    return proto, {name: array.numpy() for name, array in zip(names, inputs, strict=True)}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, N, 3, 4, C // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(B, N, C))


def test_a_residual_network_is_unharmed():
    torch.manual_seed(0)
    proto, feeds = from_torch(Residual(), torch.randn(2, 3, 32, 32))
    assert len(ops(unharmed(proto, **feeds))) < len(ops(proto))


def test_a_transformer_of_any_length_is_unharmed():
    torch.manual_seed(0)
    sizes = {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("n")}}
    proto, feeds = from_torch(Attention(), torch.randn(2, 5, 16), dynamic=sizes)
    after = unharmed(proto, **feeds)
    longer = torch.randn(3, 9, 16).numpy()
    (name,) = feeds
    np.testing.assert_allclose(
        *(next(iter(run(p, **{name: longer}).values())) for p in (proto, after)), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("shape", "left"), [(["n", 4, 6], False), (["n", 4, "m"], True), ([2, 4, "m"], True)]
)
def test_a_shape_that_is_computed_but_known_is_written(shape, left):
    """PyTorch's sizes of what is not known in advance; of these, only the batch."""
    nodes = [
        node("Shape", ["x"], ["sizes"]),
        node("Slice", ["sizes", "zero", "one"], ["batch"]),
        node("Slice", ["sizes", "two", "three"], ["last"]),
        node("Mul", ["batch", "two"], ["twice"]),
        node("Concat", ["twice", "two", "last"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["y"]),
    ]
    numbers = {"zero": [0], "one": [1], "two": [2], "three": [3]}
    initializers = [constant(name, np.array(value)) for name, value in numbers.items()]
    twice = "2*n" if shape[0] == "n" else 4
    proto = model(nodes, [value("x", shape)], [value("y", [twice, 2, shape[2]])], initializers)
    after = unharmed(proto, x=floats(2, 4, 6))
    assert ("Shape" in ops(after)) == left
    for batch in (1, 3) if shape[0] == "n" else ():
        x = floats(batch, 4, 6)
        np.testing.assert_array_equal(run(after, x=x)["y"], run(proto, x=x)["y"])


@pytest.mark.parametrize("batch", [1, 2])
def test_sizes_behind_an_expand_to_computed_sizes_are_known(batch):
    """A class token as an older exporter of PyTorch writes it: its -1 are replaced as the graph runs."""
    nodes = [
        node("Shape", ["x"], ["sizes"]),
        node("Gather", ["sizes", "zero"], ["batch"]),
        node("Concat", ["batch", "minus", "minus"], ["asked"], axis=0),
        node("Shape", ["asked"], ["rank"]),
        node("ConstantOfShape", ["rank"], ["ones"], value=constant("one", np.ones(1, np.int64))),
        node("Mul", ["ones", "minus"], ["kept"]),
        node("Equal", ["asked", "kept"], ["keep"]),
        node("Where", ["keep", "ones", "asked"], ["target"]),
        node("Expand", ["token", "target"], ["tokens"]),
        node("Concat", ["tokens", "x"], ["joined"], axis=1),
        node("Relu", ["joined"], ["positive"]),
        node("Shape", ["positive"], ["after"]),
        node("Gather", ["after", "two"], ["width"]),
        node("Concat", ["minus", "width"], ["flat"], axis=0),
        node("Reshape", ["positive", "flat"], ["y"]),
    ]
    numbers = {"zero": [0], "two": [2], "minus": [-1]}
    constants = [constant(name, np.array(number)) for name, number in numbers.items()]
    constants.append(constant("token", floats(1, 1, 6)))
    proto = model(nodes, [value("x", [batch, 4, 6])], initializers=constants)
    after = unharmed(proto, x=floats(batch, 4, 6))
    assert ops(after) == ["Concat", "Relu", "Reshape"]


def test_sizes_that_an_unknown_batch_does_not_change_are_known():
    """Patches to tokens, and back by the sizes that come out."""
    nodes = [
        node("Shape", ["x"], ["sizes"]),
        node("Slice", ["sizes", "zero", "two"], ["kept"]),
        node("Concat", ["kept", "minus"], ["flat"], axis=0),
        node("Reshape", ["x", "flat"], ["patches"]),
        node("Transpose", ["patches"], ["tokens"], perm=[0, 2, 1]),
        node("Relu", ["tokens"], ["positive"]),
        node("Shape", ["positive"], ["after"]),
        node("Gather", ["after", "zero"], ["batch"]),
        node("Gather", ["after", "one"], ["count"]),
        node("Concat", ["batch", "count", "two", "two"], ["target"], axis=0),
        node("Reshape", ["positive", "target"], ["y"]),
    ]
    numbers = {"zero": [0], "one": [1], "two": [2], "minus": [-1]}
    constants = [constant(name, np.array(number)) for name, number in numbers.items()]
    proto = model(nodes, [value("x", ["n", 4, 3, 5])], initializers=constants)
    after = unharmed(proto, x=floats(2, 4, 3, 5))
    assert ops(after) == ["Reshape", "Transpose", "Relu", "Reshape"]
    assert to_graph(after).tensors()["positive"].shape == [BATCH, 15, 4]
    for batch in (1, 3):
        x = floats(batch, 4, 3, 5)
        np.testing.assert_array_equal(run(after, x=x)["y"], run(proto, x=x)["y"])


@pytest.mark.parametrize("few", [3, 100])
def test_a_size_that_is_the_batch_up_to_some_number_stays_open(few):
    nodes = [
        node("Slice", ["x", "zero", "few"], ["first"]),
        node("Concat", ["first", "one_more"], ["some"], axis=0),
        node("Shape", ["some"], ["sizes"]),
        node("Slice", ["sizes", "zero", "one"], ["count"]),
        node("Concat", ["count", "two", "three"], ["target"], axis=0),
        node("Reshape", ["some", "target"], ["y"]),
    ]
    numbers = {"zero": [0], "one": [1], "two": [2], "three": [3], "few": [few]}
    constants = [constant(name, np.array(number)) for name, number in numbers.items()]
    proto = model(
        nodes, [value("x", ["n", 6])], initializers=[*constants, constant("one_more", floats(1, 6))]
    )
    after = unharmed(proto, x=floats(2, 6))
    for batch in (1, 5):
        x = floats(batch, 6)
        np.testing.assert_array_equal(run(after, x=x)["y"], run(proto, x=x)["y"])


def windows(depth, batch):
    """Rows cut into windows and put together again, by sizes that come from the windows before."""
    numbers = {"zero": [0], "one": [1], "two": [2], "six": [6]}
    nodes, x = [], "x"
    for i in range(depth):
        nodes += [
            node("Shape", [x], [f"sizes{i}"]),
            node("Gather", [f"sizes{i}", "zero"], [f"batch{i}"]),
            node("Gather", [f"sizes{i}", "one"], [f"rows{i}"]),
            node("Div", [f"rows{i}", "two"], [f"count{i}"]),
            node("Concat", [f"batch{i}", f"count{i}", "two", "six"], [f"cut{i}"], axis=0),
            node("Reshape", [x, f"cut{i}"], [f"windows{i}"]),
            node("Relu", [f"windows{i}"], [f"positive{i}"]),
            node("Mul", [f"count{i}", "two"], [f"whole{i}"]),
            node("Concat", [f"batch{i}", f"whole{i}", "six"], [f"back{i}"], axis=0),
            node("Reshape", [f"positive{i}", f"back{i}"], [x := f"rows_again{i}"]),
        ]
    constants = [constant(name, np.array(number)) for name, number in numbers.items()]
    return model(nodes, [value("x", [batch, 8, 6])], [x], constants)


@pytest.mark.parametrize("batch", [3, "n"])
def test_sizes_that_come_from_sizes_before_are_known_in_time_that_grows_with_the_depth_alone(batch):
    made = []
    for depth in (3, 6):
        proto = windows(depth, batch)
        assert ops(unharmed(proto, x=floats(3, 8, 6))) == ["Reshape", "Relu", "Reshape"] * depth
        graph = to_graph(proto)
        made.append(calls(lambda graph=graph: clean_up(graph)))
    assert made[1] < 2.2 * made[0]


def test_a_constant_for_each_image_is_not_made_to_infer_sizes():
    nodes = [
        node("Shape", ["x"], ["batch"], start=0, end=1),
        node("Div", ["batch", "one"], ["images"]),
        node("Concat", ["images", "rest"], ["sizes"], axis=0),
        node("Expand", ["token", "sizes"], ["tokens"]),
        node("Add", ["tokens", "x"], ["y"]),
    ]
    constants = [constant("rest", np.array([64, 32])), constant("token", floats(1, 1, 32))]
    constants.append(constant("one", np.array([1])))
    graph = to_graph(model(nodes, [value("x", ["n", 64, 32])], initializers=constants))
    tracemalloc.start()
    clean_up(graph)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6  # for a thousand images it would be 8 MB


@settings(RANDOM, max_examples=12)
@example("Mod", 3)
@example("Min", 7)
@given(st.sampled_from(("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max")), st.integers(1, 13))
def test_a_size_that_depends_on_the_batch_in_any_way_is_not_taken_for_a_constant(op, number):
    nodes = [
        node("Shape", ["x"], ["batch"], start=0, end=1),
        node(op, ["batch", "number"], ["result"]),
        node("Max", ["result", "one"], ["count"]),
        node("Slice", ["table", "zero", "count"], ["rows"]),
        node("Shape", ["rows"], ["sizes"]),
        node("Slice", ["sizes", "zero", "one"], ["length"]),
        node("Concat", ["three", "length"], ["target"], axis=0),
        node("Reshape", ["rows", "target"], ["turned"]),
        node("ReduceMean", ["x"], ["mean"], keepdims=0),
        node("Add", ["turned", "mean"], ["y"]),
    ]
    numbers = {"zero": [0], "one": [1], "three": [3], "number": [number]}
    constants = [constant(name, np.array(value)) for name, value in numbers.items()]
    table = constant("table", np.arange(3 * 60, dtype=np.float32).reshape(60, 3))
    proto = model(nodes, [value("x", ["n", 2])], initializers=[*constants, table])
    after, _ = cleaned(proto)
    for batch in (1, 2, 4):
        x = floats(batch, 2)
        np.testing.assert_allclose(run(after, x=x)["y"], run(proto, x=x)["y"], rtol=1e-5)


# --- random graphs ---

UNARY = ("Relu", "Neg", "Sigmoid", "Tanh", "Identity", "Softmax")
BINARY = ("Add", "Sub", "Mul", "Max")


@st.composite
def graphs(draw):
    """A random DAG of (4, 4) tensors, some of them constant, some outputs named twice over by Identity."""
    tensors = ["x", *(f"c{i}" for i in range(draw(st.integers(0, 3))))]
    initializers = [constant(name, floats(4, 4)) for name in tensors[1:]]
    shapes = {"to_flat": [2, 8], "to_square": [4, 4]}
    initializers += [constant(name, np.array(shape)) for name, shape in shapes.items()]
    nodes = []
    for i in range(draw(st.integers(1, 14))):
        kind = draw(
            st.sampled_from(("unary", "binary", "matmul", "transpose", "reshape", "float_list", "where"))
        )
        a, b, out = draw(st.sampled_from(tensors)), draw(st.sampled_from(tensors)), f"t{i}"
        if kind == "unary":
            nodes.append(node(draw(st.sampled_from(UNARY)), [a], [out]))
        elif kind == "binary":
            nodes.append(node(draw(st.sampled_from(BINARY)), [a, b], [out]))
        elif kind == "matmul":
            nodes += [node("MatMul", [a, b], [f"m{i}"]), node("Tanh", [f"m{i}"], [out])]
        elif kind == "transpose":
            nodes.append(node("Transpose", [a], [out], perm=draw(st.sampled_from(([1, 0], [0, 1])))))
        elif kind == "reshape":
            nodes += [
                node("Reshape", [a, "to_flat"], [f"f{i}"]),
                node("Relu", [f"f{i}"], [f"g{i}"]),
                node("Reshape", [f"g{i}", "to_square"], [out]),
            ]
        elif kind == "where":
            nodes += [node("Greater", [a, b], [f"w{i}"]), node("Where", [f"w{i}", b, a], [out])]
        else:
            numbers = [float(v) for v in floats(4)]
            nodes += [
                node("Constant", [], [f"k{i}"], value_floats=numbers),
                node("Mul", [a, f"k{i}"], [out]),
            ]
        tensors.append(out)
    made = [name for name in tensors if name.startswith("t")]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=4, unique=True))
    return model(nodes, [value("x", draw(st.sampled_from(([4, 4], ["n", 4]))))], outputs, initializers)


@settings(RANDOM, max_examples=80)
@given(graphs())
def test_random_graphs_are_unharmed(proto):
    unharmed(proto, x=floats(4, 4))
