"""The same network with other operators: tensors are found by their products, and ranges are the same."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import helper, numpy_helper

from meta_deploy.calib.calibrate import Calibrator
from meta_deploy.calib.search import Whole
from meta_deploy.calib.twin import twin_of
from meta_deploy.export.samples import Samples
from meta_deploy.graph.graph import normalized
from meta_deploy.graph.precision.placement import place
from meta_deploy.graph.precision.rules import EightBitRules
from tests.small_graphs import model, run, value

RULES = EightBitRules(False, True, True, speedup=4, value=0, node=0, channels=2)
node = helper.make_node


def constant(name, *shape):
    numbers = np.random.default_rng(sum(map(ord, name))).normal(0, 0.3, shape)
    return numpy_helper.from_array(numbers.astype(np.float32), name)


def network(prefix="", gelu=True, left_out=None, sizes=(12, 6), widths=8):
    """Two heads of the same weights on tensors of two sizes, as an RPN's, and a product that joins them.

    Args:
        prefix: of all names that nodes make.
        gelu: Gelu as one operator; else as arithmetic.
        left_out: a product that is not there.
        sizes: rows of both inputs.
        widths: numbers a row.
    """
    nodes = []

    def made(op, inputs, output, **attributes):
        nodes.append(node(op, inputs, [output], **attributes))
        return output

    def activated(x, output):
        if gelu:
            return made("Gelu", [x], output)
        erf = made("Erf", [made("Mul", [x, "root"], f"{output}/a")], f"{output}/b")
        both = made("Mul", [x, made("Add", [erf, "one"], f"{output}/c")], f"{output}/d")
        return made("Mul", [both, "half"], output)

    ends = []
    for i in range(2):
        x = activated(f"x{i}", f"{prefix}g{i}")
        if left_out != f"p{i}":
            x = made("Relu", [made("MatMul", [x, "shared"], f"{prefix}p{i}")], f"{prefix}r{i}")
        ends.append(activated(x, f"{prefix}h{i}"))
    joined = made("Concat", ends, f"{prefix}j", axis=1)
    made("MatMul", [made("Tanh", [made("MatMul", [joined, "w"], f"{prefix}q")], f"{prefix}t"), "last"], "y")
    constants = [constant("shared", widths, widths), constant("w", widths, 6), constant("last", 6, 4)]
    for name, number in (("root", 2**-0.5), ("one", 1.0), ("half", 0.5)):
        constants.append(numpy_helper.from_array(np.float32(number), name))
    inputs = [value(f"x{i}", [1, rows, widths]) for i, rows in enumerate(sizes)]
    opset = [helper.make_opsetid("", 20)]
    return model(nodes, inputs, ["y"], constants, opset_imports=opset)


def found(one, other, rules=RULES, without=()):
    graph = normalized(one).graph
    products = [p for p in place(graph, rules).products if p.node.outputs[0].name not in without]
    return twin_of(products, graph, normalized(other).graph, rules)


@pytest.mark.parametrize("results", [True, False])
def test_each_tensor_is_found_whatever_the_names_and_operators_between(results):
    twin = found(network(), network("other/", gelu=False), replace(RULES, results=results))
    names = ["g0", "g1", "j", *(["r0", "r1"] if results else [])]
    assert twin.names == {name: f"other/{name}" for name in names}
    readers = {name: [p.node.outputs[0].name for p in products] for name, products in twin.readers.items()}
    expected = {"other/g0": ["other/p0"], "other/g1": ["other/p1"], "other/j": ["other/q"]}
    assert readers == expected | ({"other/r0": [], "other/r1": []} if results else {})


def test_products_that_are_not_quantized_count_where_several_are_alike():
    twin = found(network(sizes=(6, 6)), network("other/", sizes=(6, 6)), without=["p0"])
    assert twin.names["g1"] == "other/g1"


@pytest.mark.parametrize("other", [network(left_out="p1"), network(sizes=(12, 7)), network(widths=10)])
def test_a_graph_without_the_same_products_is_none(other):
    assert found(network(), other) is None


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("chosen", [{0}, {2}, {0, 1, 2}])
def test_the_same_products_are_quantized_in_the_same_way(chosen, factors):
    rules = replace(RULES, signed=factors, results=not factors, biases=not factors, factors=factors)
    graph, other = normalized(network(gelu=False)), normalized(network("other/"))
    placement = place(graph.graph, rules)
    ranges = {name: (-0.5 - i, 1.0 + i) for i, name in enumerate(placement.readers)}
    whole = Whole(graph, placement, ranges, rules)
    twin = whole.twin(other)
    feed = next(iter(Feeds()))
    low, full = (run(one.quantized(chosen), **feed)["y"] for one in (twin, whole))
    np.testing.assert_allclose(low, full, rtol=1e-4, atol=1e-5)
    assert np.abs(low - run(network(), **feed)["y"]).max() > 1e-3
    assert whole.twin(normalized(network(left_out="p1"))) is None


class Feeds(Samples):
    def __init__(self):
        generator = np.random.default_rng(0)
        super().__init__(
            [
                {f"x{i}": generator.normal(size=(1, n, 8)).astype(np.float32) for i, n in enumerate((12, 6))}
                for _ in range(40)
            ]
        )


def test_ranges_are_measured_on_the_faster_graph_and_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    graph = normalized(network(gelu=False))
    placement = place(graph.graph, RULES)
    asked = []

    def faster(other):
        return lambda: asked.append(other) or other

    plain, _ = Calibrator(Feeds(), RULES, kept=False)(graph, placement)
    fast, _ = Calibrator(Feeds(), RULES, kept=False)(graph, placement, faster(network("other/")))
    assert fast.keys() == plain.keys()
    for name, ends in plain.items():
        np.testing.assert_allclose(fast[name], ends, rtol=1e-4, atol=1e-6)
    # Of a graph with other numbers it shows that this one was run; one that has not the same products is not.
    doubled = network("other/")
    next(n for n in doubled.graph.node if n.output[0] == "other/g0").op_type = "Identity"
    other, _ = Calibrator(Feeds(), RULES, kept=False)(graph, placement, faster(doubled))
    assert other["g0"][0] < 3 * plain["g0"][0]
    unlike, _ = Calibrator(Feeds(), RULES, kept=False)(graph, placement, faster(network(left_out="p1")))
    assert unlike == plain
    assert len(asked) == 3
    for _ in range(2):  # what is at hand from before needs no graph
        Calibrator(Feeds(), RULES)(graph, placement, faster(network("other/")))
    assert len(asked) == 4
