"""infer_open_sizes: the sizes that it writes down are those of a run, for each batch; others stay open."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.graph.sizes import infer_open_sizes
from tests.graph.rewriting import RANDOM, node
from tests.small_graphs import calls, model, run, value


def constants(**arrays):
    return [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]


def told(proto):
    """What is written after inference: value -> sizes, of all graphs; and what inference says it told of."""
    learned = infer_open_sizes(proto)
    found = {}
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        for info in (*graph.value_info, *graph.output):
            dims = info.type.tensor_type.shape.dim
            found[info.name] = [
                d.dim_param or (d.dim_value if d.HasField("dim_value") else None) for d in dims
            ]
        graphs += [a.g for each in graph.node for a in each.attribute if a.HasField("g")]
    return found, learned


def computed_target(sizes, batch="n"):
    """Reshape of x (batch, 4, 6) to sizes that nodes make of numbers and of x's own size s."""
    nodes = [node("Shape", ["x"], ["all"]), node("Gather", ["all", "zero"], ["s"], axis=0), *sizes]
    nodes.append(node("Reshape", ["x", "target"], ["y"]))
    numbers = constants(zero=[0], two=[2], three=[3], four=[4], six=[6], minus=[-1])
    return model(nodes, [value("x", [batch, 4, 6])], [value("y")], numbers, infer=False)


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        (["s", "four", "six"], ["n", 4, 6]),
        (["s", "two", "minus"], ["n", 2, 12]),
        (["minus", "six"], ["4*n", 6]),
        (["four", "minus"], [4, "6*n"]),
    ],
)
def test_sizes_of_any_batch(parts, sizes):
    proto = computed_target([node("Concat", parts, ["target"], axis=0)])
    found, learned = told(proto)
    assert found["y"] == sizes
    assert "y" in learned


def test_a_number_for_the_batch_is_a_number():
    proto = computed_target([node("Concat", ["minus", "six"], ["target"], axis=0)], batch=3)
    assert told(proto)[0]["y"] == [12, 6]


def test_one_more_than_the_batch_stays_open_and_what_was_told_of_it_stays():
    nodes = [node("Concat", ["x", "row"], ["more"], axis=0), node("Relu", ["more"], ["y"])]
    more = value("y", ["many", 6])
    proto = model(
        nodes, [value("x", ["n", 6])], [more], constants(row=np.ones((1, 6), np.float32)), infer=False
    )
    found, learned = told(proto)
    assert found["y"] == ["many", 6]
    assert found["more"] == [None, 6]
    assert learned == {"more"}


def test_a_size_is_taken_of_what_is_known_in_part():
    """Where the other sizes are open: they come from an input."""
    nodes = [
        node("Reshape", ["x", "asked"], ["part"]),
        node("Shape", ["part"], ["first"], start=0, end=1),
        node("Concat", ["first", "minus"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["y"]),
    ]
    inputs = [value("x", [4, 6]), value("asked", [2], TensorProto.INT64)]
    proto = model(nodes, inputs, [value("y")], constants(minus=[-1]), infer=False)
    proto.graph.value_info.append(value("part", [3, None]))
    assert told(proto)[0]["y"] == [3, 8]


def test_an_initializer_that_is_an_input_too_may_be_another():
    nodes = [node("Reshape", ["x", "asked"], ["y"])]
    inputs = [value("x", [4, 6]), value("asked", [2], TensorProto.INT64)]
    proto = model(nodes, inputs, [value("y")], constants(asked=[8, 3]), infer=False)
    assert told(proto)[0]["y"] == [None, None]


def test_what_is_random_is_no_size():
    nodes = [
        node("RandomUniform", [], ["random"], shape=[1], low=1.0, high=1.0),
        node("Cast", ["random"], ["count"], to=TensorProto.INT64),
        node("Concat", ["count", "minus"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["y"]),
    ]
    proto = model(nodes, [value("x", [4, 6])], [value("y")], constants(minus=[-1]), infer=False)
    assert told(proto)[0]["y"] == [None, None]


def branches(then, other):
    """An If whose branches reshape x (n, 4, 6) to these; each calls what it makes alike."""
    graphs = {}
    for name, sizes in (("then_branch", then), ("else_branch", other)):
        nodes = [node("Reshape", ["x", "target"], ["made"]), node("Relu", ["made"], [f"{name}/y"])]
        target = constants(target=sizes)
        graphs[name] = helper.make_graph(nodes, name, [], [value(f"{name}/y")], target)
    nodes = [node("If", ["condition"], ["joined"], **graphs), node("Neg", ["joined"], ["y"])]
    inputs = [value("x", ["n", 4, 6]), value("condition", [], TensorProto.BOOL)]
    return model(nodes, inputs, [value("y")], infer=False)


def test_branches_tell_the_size_that_both_make():
    found, learned = told(branches([-1, 24], [-1, 24]))
    assert found["y"] == ["n", 24]
    assert {"made", "joined", "y"} <= learned


def test_branches_of_different_sizes_tell_none():
    found, _ = told(branches([-1, 24], [-1, 12]))
    assert found.get("y") in (None, [])


def test_an_operator_that_is_not_known_is_passed_over():
    nodes = [node("Own", ["x"], ["h"], domain="own"), node("Relu", ["h"], ["r"]), node("Neg", ["x"], ["y"])]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    proto = model(nodes, [value("x", ["n", 4])], [value("y")], opset_imports=imports, infer=False)
    learned = infer_open_sizes(proto)
    assert learned == {"y"}


def test_time_grows_with_the_nodes():
    def chain(count):
        nodes = []
        for i in range(count):
            x, y = f"x{i}", f"x{i + 1}"
            nodes += [
                node("Shape", [x], [f"all{i}"]),
                node("Gather", [f"all{i}", "zero"], [f"s{i}"], axis=0),
                node("Concat", [f"s{i}", "four", "minus"], [f"target{i}"], axis=0),
                node("Reshape", [x, f"target{i}"], [y]),
            ]
        numbers = constants(zero=[0], four=[4], minus=[-1])
        return model(nodes, [value("x0", ["n", 4, 6])], [value(f"x{count}")], numbers, infer=False)

    short, long = chain(10), chain(20)
    few, many = calls(lambda: infer_open_sizes(short)), calls(lambda: infer_open_sizes(long))
    assert many < 2.2 * few


ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min")


@st.composite
def shape_arithmetic(draw):
    """Cuts and repetitions by numbers that come from sizes of x (n, 4, 6), doubled again and again."""
    nodes, x = [], "x"
    for i in range(draw(st.integers(1, 3))):
        nodes += [
            node("Shape", [x], [f"all{i}"]),
            node("Gather", [f"all{i}", draw(st.sampled_from(("zero", "one")))], [f"size{i}"], axis=0),
        ]
        size = f"size{i}"
        if (op := draw(st.sampled_from((None, *ARITHMETIC)))) is not None:
            number = draw(st.sampled_from(("one", "two", "three")))
            nodes.append(node(op, [size, number], [size := f"computed{i}"]))
        nodes += [
            node("Slice", ["table", "zero", size], [f"rows{i}"]),
            node("Shape", [f"rows{i}"], [f"count{i}"], start=0, end=1),
            node("Concat", [x, x], [f"twice{i}"], axis=0),
            node("Expand", ["row", f"count{i}"], [f"wide{i}"]),
        ]
        x = f"twice{i}"
    names = [each.output[0] for each in nodes]
    shown = [name for name in names if name.startswith(("rows", "twice", "wide"))]
    numbers = constants(zero=[0], one=[1], two=[2], three=[3])
    numbers += constants(table=np.zeros((5000, 1), np.float32), row=np.zeros(1, np.float32))
    return model(nodes, [value("x", ["n", 4, 6])], [value(name) for name in shown], numbers, infer=False)


@settings(RANDOM, max_examples=60)
@given(shape_arithmetic())
def test_sizes_of_random_arithmetic_are_those_of_a_run(proto):
    found, _ = told(onnx.ModelProto.FromString(proto.SerializeToString()))
    for batch in (1, 2, 3, 5):
        outputs = run(proto, x=np.zeros((batch, 4, 6), np.float32))
        for name, array in outputs.items():
            for known, actual in zip(found[name], array.shape, strict=True):
                if isinstance(known, str) and known.endswith("n"):
                    known = int(known.removesuffix("n").removesuffix("*") or 1) * batch
                assert known in (None, actual) or isinstance(known, str), name
