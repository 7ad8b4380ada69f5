"""Where nothing can be timed, engines of parts are priced; neighbours that only pay together are found."""

import itertools

import numpy as np
import pytest
from onnx import helper

from meta_deploy.calib import estimated
from meta_deploy.calib.costs import Row
from meta_deploy.calib.estimated import Estimated, cheapest
from meta_deploy.calib.groups import Group
from meta_deploy.calib.search import Search
from meta_deploy.calib.surroundings import surroundings
from meta_deploy.errors import EngineError
from tests.calib.scripted import FEED, RULES, Scripted, constant, network, placed
from tests.small_graphs import model, value

node = helper.make_node


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def price(chosen, changes):
    return sum(change for key, change in changes.items() if set(key) <= set(chosen))


@pytest.mark.parametrize("seed", range(20))
def test_no_number_and_no_pair_makes_the_set_cheaper(seed):
    generator = np.random.default_rng(seed)
    changes = {(i,): generator.normal(0.2, 1) for i in range(7)}
    changes |= {pair: generator.normal(-0.2, 1) for pair in itertools.combinations(range(7), 2)}
    changes = {key: change for key, change in changes.items() if len(key) == 1 or generator.random() < 0.4}
    found = cheapest(7, changes)
    for flipped in changes:
        assert price(found, changes) <= price(found.symmetric_difference(flipped), changes) + 1e-9


def test_two_that_only_pay_together_are_found():
    changes = {(0,): 1.0, (1,): 1.0, (2,): 0.5, (0, 1): -2.5, (1, 2): -0.2}
    assert cheapest(3, changes) == {0, 1}
    assert cheapest(3, {**changes, (0, 1): -1.5}) == set()
    assert cheapest(0, {}) == set()


def block():
    """A transformer block: qkv, attention, projection, residual; norm, fc1, GELU, fc2, residual."""
    nodes = [
        node("MatMul", ["x", "embed"], ["x0"]),
        node("LayerNormalization", ["x0", "one"], ["n1"]),
        node("MatMul", ["n1", "wqkv"], ["qkv"]),
        node("Split", ["qkv"], ["q", "k", "v"], axis=-1, num_outputs=3),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"]),
        node("Softmax", ["s"], ["p"]),
        node("MatMul", ["p", "v"], ["o"]),
        node("MatMul", ["o", "wp"], ["proj"]),
        node("Add", ["proj", "x0"], ["x1"]),
        node("LayerNormalization", ["x1", "one"], ["n2"]),
        node("MatMul", ["n2", "w1"], ["fc1"]),
        node("Gelu", ["fc1"], ["g"]),
        node("MatMul", ["g", "w2"], ["fc2"]),
        node("Add", ["fc2", "x1"], ["x2"]),
        node("LayerNormalization", ["x2", "one"], ["n3"]),
        node("MatMul", ["n3", "last"], ["y"]),
    ]
    constants = [constant("one", 8), constant("wqkv", 8, 24), constant("wp", 8, 8), constant("w1", 8, 16)]
    constants += [constant("w2", 16, 8), constant("last", 8, 4), constant("embed", 8, 8)]
    opset = [helper.make_opsetid("", 20)]
    return model(nodes, [value("x", [2, 12, 8])], ["y"], constants, opset_imports=opset)


def test_surroundings_reach_to_the_next_products_and_norms():
    _, placement = placed(block())
    around = {
        product.node.name or product.node.outputs[0].name: {
            name for one in surroundings([product.node]) for name in (output.name for output in one.outputs)
        }
        for product in placement.products
    }
    attention = {"q", "k", "v", "kt", "s", "p", "o", "proj"}
    assert around["fc1"] == {"n2", "fc1", "g", "fc2"}
    assert around["fc2"] >= {"fc1", "g", "fc2", "x2", "n3"}
    assert not around["fc2"] & {"x0", "x1", "proj", "n2", "y"}
    assert around["qkv"] >= {"n1", "qkv"} | attention
    assert around["proj"] >= attention | {"qkv", "proj", "x1", "n2"}
    assert "fc1" not in around["proj"]  # a norm is where kernels end


class Priced(Scripted):
    """A product in 8 bits saves 1; to quantize a tensor costs `cost`, unless a product in 8 bits made it."""

    def __init__(self, cost, errors=0.01, refuses=()):
        self.cost, self.asked, self.built, self.refuses = cost, [], 0, refuses
        self.errors = {f"p{i}": errors for i in range(9)}

    def price(self, proto):
        self.built += 1
        low = self.low(proto)
        if set(low) & set(self.refuses):
            raise EngineError("no")
        made = {name: n for n in proto.graph.node for name in n.output}
        total = 3.0 * sum(one.op_type == "MatMul" for one in proto.graph.node) - len(low)
        for one in proto.graph.node:
            if one.op_type == "QuantizeLinear":
                before = made.get(made[one.input[0]].input[0]) if one.input[0] in made else None
                total += 0 if before is not None and before.output[0] in low else self.cost
        return {"ms": total}


def searched(trial, proto=None, max_drop=None):
    graph, placement = placed(network(4) if proto is None else proto)
    ranges = dict.fromkeys(placement.readers, (-1.0, 1.0))
    found, facts = Search(Estimated(trial, RULES), max_drop)(graph, placement, ranges)
    return [product.node.outputs[0].name for product in found.products], facts


def test_neighbours_go_to_8_bits_together_where_one_alone_would_cost_more():
    """Alone each saves 1 and pays 1.5; four in a row pay once."""
    trial = Priced(1.5)
    chosen, facts = searched(trial)
    assert chosen == ["p0", "p1", "p2", "p3"]
    (row,) = facts["groups"]
    assert (row["products"], row["chosen"], row["rounds"]) == (4, True, 0)
    assert row["gain_ms"] == pytest.approx(4 - 1.5)
    assert facts["speed"]["ratio"] == pytest.approx((15 - 4 + 1.5) / 15, abs=1e-3)
    assert (facts["by"], facts["speed"]["rest_engine"]) == ("estimate", {"ms": 15.0})


class OnGpu(Priced):
    """Whole engines run here, and take what is written down for so many products in 8 bits."""

    def __init__(self, ms, monkeypatch, **given):
        super().__init__(0.5, **given)
        self.ms = ms
        monkeypatch.setattr(estimated, "interleaved", lambda runs, *_: [[run(FEED) for run in runs]] * 5)

    def engine(self, proto):
        price, low = self.price(proto), len(self.low(proto))
        return price, lambda feed: self.ms[low] / 1000


def test_whole_engines_that_run_here_are_timed(monkeypatch):
    chosen, facts = searched(OnGpu({0: 10.0, 4: 7.0}, monkeypatch))
    assert len(chosen) == 4
    speed = facts["speed"]
    assert (speed["ratio"], speed["ms"], speed["rest_ms"]) == (0.7, 7.0, 10.0)
    assert speed["engine"]["ms"] != 7.0  # the estimate


def test_what_only_prices_make_faster_is_declined(monkeypatch):
    chosen, facts = searched(OnGpu({0: 10.0, 4: 9.9}, monkeypatch))
    assert chosen == []
    assert facts["declined"] == "8 bits take 0.99 of float32's time on this machine"


def test_an_engine_that_cannot_be_built_is_not_timed(monkeypatch):
    class Refuses(OnGpu):
        def engine(self, proto):
            if len(self.low(proto)) == 4:
                raise EngineError("no")
            return super().engine(proto)

    chosen, facts = searched(Refuses({0: 10.0}, monkeypatch))
    assert (chosen, facts["speed"]["ratio"] > 1000) == ([], True)


def test_what_saves_nothing_even_together_stays():
    chosen, facts = searched(Priced(4.5))
    assert (chosen, facts["speed"]) == ([], None)
    assert facts["declined"] == "no group of products gains time that is more than noise"


def test_a_group_that_the_library_refuses_stays_and_stops_nothing(monkeypatch):
    monkeypatch.setattr(estimated, "structure", lambda proto: proto.SerializeToString().hex())
    chosen, facts = searched(Priced(0.5, refuses=["p1"]))
    assert chosen == ["p0", "p2", "p3"]
    assert facts["declined"] == ""


def test_parts_that_are_alike_are_built_once_and_not_again_after_an_interrupt():
    first = Priced(1.5)
    searched(first, network(6))
    assert first.built < 6 + 5 + 6  # of six groups and five pairs most are alike
    again = Priced(1.5)
    assert searched(again, network(6))[0] == [f"p{i}" for i in range(6)]
    assert again.built <= 3  # whole engines alone


def test_the_whole_is_also_tried_without_what_gains_least():
    """Alike rows go together; the rest of the engines are as the parts said."""
    gains = [0.3, 0.1, 0.2, 0.1, 0.1 + 1e-9]
    rows = [Row(Group((i,)), 1.0, 1.0 - gain, gain, estimated=True) for i, gain in enumerate(gains)]
    one, two = Estimated(Priced(1.0), RULES).near(rows, rows)
    assert [row.gain_ms for row in one] == [0.3, 0.2]
    assert [row.gain_ms for row in two] == [0.3]
    assert Estimated(Priced(1.0), RULES).near(rows[:1], rows) == [rows[:1], rows[:1]]


class Misled(Priced):
    """In the whole graph a set costs the more the more is in it."""

    def price(self, proto):
        low = self.low(proto)
        whole = sum(one.op_type == "MatMul" for one in proto.graph.node) == 6
        return {"ms": 15.0 + 2 * len(low) - 9 * bool(low)} if whole else super().price(proto)


def test_what_only_seems_to_gain_in_a_part_is_left_out_of_the_whole():
    proto = network(5)
    proto.graph.node[4].op_type = "Sinh"  # where kernels end: two groups on either side
    chosen, facts = searched(Misled(0.5), proto)
    assert 0 < len(chosen) < 5
    assert facts["speed"]["engine"]["ms"] == 15 + 2 * len(chosen) - 9


def test_the_error_of_what_goes_together_is_measured_together():
    trial = Priced(1.5, errors=0.6)
    chosen, facts = searched(trial)
    assert chosen == []
    assert facts["declined"] == "no set of the groups that gain time stays within the limit"
