"""The search: groups are what goes together, what is chosen is the best there is, and nothing is lost."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from onnx import helper, numpy_helper

from meta_deploy.calib import timed as module
from meta_deploy.calib.costs import Row, Verdict
from meta_deploy.calib.groups import groups_of, kernels_of, part_of, shapes_of
from meta_deploy.calib.search import Search, by_worth, longest
from meta_deploy.calib.timed import Timed, gain_of
from meta_deploy.calib.timing import is_sure
from tests.calib.scripted import FEED, RULES, Scripted, constant, network, node, placed
from tests.small_graphs import model, run, value


def names(groups):
    return [[product.node.outputs[0].name for product in group.products] for group in groups]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def convolutions():
    """Two that read one tensor, one behind them both, and one behind a Gelu."""
    three = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        *(node("Conv", ["x", "stem"], ["a"], **three), node("Conv", ["a", "w1", "b1"], ["b"], **three)),
        *(node("Relu", ["b"], ["r"]), node("Conv", ["a", "w2"], ["c"], **three)),
        *(node("Conv", ["r", "w3"], ["d"], **three), node("Gelu", ["d"], ["g"])),
        *(node("Conv", ["g", "w4"], ["e"], **three), node("Add", ["e", "c"], ["s"])),
        node("Conv", ["s", "last"], ["y"], **three),
    ]
    constants = [constant("stem", 8, 3, 3, 3), constant("last", 8, 8, 3, 3), constant("b1", 8)]
    constants += [constant(f"w{i}", 8, 8, 3, 3) for i in (1, 2, 3, 4)]
    opset = [helper.make_opsetid("", 20)]
    return model(nodes, [value("x", [1, 3, 10, 10])], ["y"], constants, opset_imports=opset)


def test_a_group_is_what_shares_a_tensor_or_weights():
    assert names(groups_of(placed(convolutions())[1])) == [["b", "c", "d"], ["e"]]
    assert names(groups_of(placed(network())[1])) == [["p0"], ["p1"], ["p2"], ["p3"]]
    assert names(groups_of(placed(network(shared=True))[1])) == [["p0"], ["p1"], ["p2", "p3"]]


def clipped():
    """A convolution whose result is cut off at a bound that the graph computes."""
    nodes = [
        *(node("Sigmoid", ["x"], ["a"]), node("Conv", ["a", "w"], ["b"], kernel_shape=[1, 1])),
        *(node("ReduceMin", ["a"], ["least"], keepdims=0), node("ReduceMax", ["a"], ["most"], keepdims=0)),
        *(node("Clip", ["b", "least", "most"], ["c"]), node("Sigmoid", ["c"], ["d"])),
        node("Conv", ["d", "last"], ["y"], kernel_shape=[1, 1]),
    ]
    constants = [constant("stem", 8, 3, 1, 1), constant("w", 8, 8, 1, 1), constant("last", 4, 8, 1, 1)]
    nodes.insert(0, node("Conv", ["x0", "stem"], ["x"], kernel_shape=[1, 1]))
    opset = [helper.make_opsetid("", 20)]
    return model(nodes, [value("x0", [1, 3, 10, 10])], ["y"], constants, opset_imports=opset)


@pytest.mark.parametrize("proto", [convolutions(), network(shared=True), clipped()])
def test_a_group_alone_computes_what_it_does_in_the_graph(proto):
    graph, placement = placed(proto)
    groups = groups_of(placement)
    given = proto.graph.input[0]
    images = np.random.default_rng(1).normal(size=(1, 3, 10, 10)).astype(np.float32)
    feed = {given.name: images} if len(given.type.tensor_type.shape.dim) == 4 else FEED
    every = [name for n in proto.graph.node for name in n.output]
    shown = model(
        proto.graph.node, proto.graph.input, every, proto.graph.initializer, opset_imports=proto.opset_import
    )
    truth = {**run(shown, **feed), **feed}
    kernels = [kernels_of(group) for group in groups]
    shapes = shapes_of(graph, kernels, feed)
    assert shapes == {name: truth[name].shape for name in shapes}
    ranges = {name: (float(truth[name].min()), float(truth[name].max())) for name in placement.readers}
    for group, nodes in zip(groups, kernels, strict=True):
        one = part_of(nodes, group.products, shapes, ranges, RULES, graph.opset_imports)
        inputs = {given.name: truth[given.name] for given in one.float32.graph.input}
        assert {name: array.shape for name, array in one.feed.items()} == {n: shapes[n] for n in inputs}
        full, low = run(one.float32, **inputs), run(one.int8, **inputs)
        for name, expected in full.items():
            np.testing.assert_allclose(expected, truth[name], rtol=1e-4, atol=1e-5)
            assert 0 < np.linalg.norm(low[name] - expected) < 0.05 * np.linalg.norm(expected)


def rows(gains, errors):
    return [
        Row(None, 1.0, 1.0, gain, 15, 15, 0, error=error) for gain, error in zip(gains, errors, strict=True)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_set_gains_more_for_its_error(seed):
    """Every set of the order's first rows, against all sets there are."""
    generator = np.random.default_rng(seed)
    ordered = by_worth(rows(generator.uniform(0.1, 3, 7), generator.uniform(0, 1, 7)))
    sets = [s for n in range(8) for s in itertools.combinations(ordered, n)]
    for count in range(8):
        first = ordered[:count]
        budget = sum(row.error**2 for row in first)
        most = max(
            sum(row.gain_ms for row in s) for s in sets if sum(r.error**2 for r in s) <= budget * (1 + 1e-9)
        )
        assert sum(row.gain_ms for row in first) == pytest.approx(most)


def test_the_longest_that_holds_is_found_with_few_questions():
    for count in range(40):
        for most in range(count + 1):
            asked = []

            def holds(number, most=most, asked=asked):
                asked.append(number)
                return number <= most

            assert longest(count, holds) == most
            assert len(asked) <= 6
            assert 0 not in asked


@pytest.mark.parametrize("rounds", [5, 8, 11, 15])
def test_a_gain_is_sure_if_chance_makes_so_many_wins_in_one_case_of_twenty(rounds):
    wins = np.random.default_rng(0).integers(0, 2, (40_000, rounds)).sum(axis=1)
    for count in range(rounds + 1):
        chance = (wins >= count).mean()
        if abs(chance - 0.05) > 0.005:
            assert is_sure(count, rounds) == (chance < 0.05)


def test_other_work_on_the_machine_hides_no_gain():
    """Of two rounds in three both take ten times as long, each by chance of another length."""
    generator = np.random.default_rng(0)
    load = np.where(generator.random(15) < 0.6, 10 + 5 * generator.random(15), 1)
    for low, gains, loses in ((0.5, True, False), (1.0, False, False), (2.0, False, True)):
        noise = generator.normal(1, 0.1, (15, 2))
        found = Row(
            None, *gain_of([(full * a, full * low * b) for full, (a, b) in zip(load, noise, strict=True)])
        )
        assert (found.gains, found.loses) == (gains, loses)


def searched(trial, max_drop=None, count=4, note=lambda line: None, faster=None):
    graph, placement = placed(network(count))
    ranges = dict.fromkeys(placement.readers, (-1.0, 1.0))
    found, facts = Search(Timed(trial, RULES, note), max_drop)(graph, placement, ranges, faster)
    return [product.node.outputs[0].name for product in found.products], found, facts


@pytest.fixture
def different_sizes(monkeypatch):
    """Groups of one structure are timed once; here each has a time of its own."""
    monkeypatch.setattr(module, "structure", lambda proto: proto.graph.node[0].output[0])


@pytest.mark.parametrize("seed", range(4))
def test_the_fastest_set_within_the_limit_is_near_the_best_of_all(seed, monkeypatch, different_sizes):
    """Never over the limit, and within one group of the best of all subsets."""
    generator = np.random.default_rng(seed)
    products = [f"p{i}" for i in range(6)]
    times = {name: (2.0, float(generator.uniform(0.2, 1.8))) for name in products}
    errors = {name: float(generator.uniform(0.01, 0.2)) for name in products}
    limit = 6 * sum(error**2 for error in errors.values()) ** 0.5  # 10 for all of them
    trial = Scripted(times, errors, monkeypatch=monkeypatch)
    chosen, _, facts = searched(trial, limit, 6)

    def drop(names):
        return 10 * sum(errors[name] ** 2 for name in names) ** 0.5

    def gain(names):
        return sum(times[name][0] - times[name][1] for name in names)

    every = [s for n in range(7) for s in itertools.combinations(products, n) if drop(s) <= limit]
    best = max(map(gain, every))
    assert drop(chosen) <= limit
    assert facts["drop"] == pytest.approx(drop(chosen), abs=1e-3)
    assert gain(chosen) >= best - max(gain([name]) for name in products)
    errors_told = [row["error"] for row in facts["groups"]]
    assert errors_told == [pytest.approx(errors[row["group"]], abs=1e-6) for row in facts["groups"]]


def test_what_gains_no_time_stays_and_says_so(monkeypatch, different_sizes):
    times = {"p0": (2.0, 1.0), "p1": (2.0, 2.5), "p2": (2.0, 2.0), "p3": (3.0, 1.0)}
    trial = Scripted(times, dict.fromkeys(times, 0.1), monkeypatch=monkeypatch)
    chosen, found, facts = searched(trial)
    assert chosen == ["p0", "p3"]
    assert found.reasons()["it gains no time on this machine"] == 2
    assert facts["speed"]["ratio"] == pytest.approx(6 / 9, abs=1e-3)
    assert facts["declined"] == ""
    assert len(trial.asked) == 1  # nothing of errors has to be known where all that gains may stay


@pytest.mark.parametrize(
    ("low", "error", "max_drop", "why"),
    [
        (2.0, 0.1, None, "no group of products gains time that is more than noise"),
        (1.0, 3.0, None, "no set of the groups that gain time stays within the limit"),
        (1.0, 0.2, 1.0, "no set of the groups that gain time stays within the limit"),
        (1.96, 0.1, None, "8 bits take 0.98 of float32's time on this machine"),
    ],
)
def test_it_says_no_where_8_bits_do_not_pay(low, error, max_drop, why, monkeypatch):
    times = dict.fromkeys(["p0", "p1", "p2", "p3"], (2.0, low))
    trial = Scripted(times, dict.fromkeys(times, error), monkeypatch=monkeypatch)
    chosen, found, facts = searched(trial, max_drop)
    assert (chosen, found.readers, facts["declined"]) == ([], {}, why)
    assert [row["chosen"] for row in facts["groups"]] == [False] * 4
    assert len(found.declined) == 5


@pytest.mark.parametrize(
    ("seconds", "error", "expected"),
    [
        ({2: 0.005, 3: 0.0049, 4: 0.004}, 0.1, ["p0", "p1", "p2", "p3"]),
        ({2: 0.005, 3: 0.004, 4: 0.0042}, 0.1, ["p0", "p2", "p3"]),
        ({2: 0.005, 3: 0.004, 4: 0.003}, 0.6, ["p0", "p3"]),  # three lose too much
        ({2: 0.005, 3: 0.0049, 4: 0.0049}, 0.1, ["p0", "p3"]),  # that is no more than noise
    ],
)
def test_a_set_that_is_faster_as_a_whole_than_its_groups_alone_is_taken(
    seconds, error, expected, monkeypatch, different_sizes
):
    """Neighbours share what each pays for alone: p1 seems to lose time, and p2 to gain none."""
    times = {"p0": (2.0, 1.0), "p1": (2.0, 2.1), "p2": (2.0, 2.0), "p3": (2.0, 1.0)}
    trial = Scripted(times, dict.fromkeys(times, error), monkeypatch=monkeypatch)
    alone = trial.seconds

    def whole(proto):
        return (lambda feed: seconds[len(trial.low(proto))]) if len(trial.low(proto)) > 1 else alone(proto)

    trial.seconds = whole
    chosen, _, facts = searched(trial)
    assert chosen == expected
    assert facts["speed"]["ratio"] == pytest.approx(seconds[len(expected)] / 0.008, abs=1e-3)


@pytest.mark.parametrize(
    ("seconds", "error", "expected"),
    [(0.003, 0.1, ["t"]), (0.0049, 0.1, ["t"]), (0.0051, 0.1, []), (0.003, 2.0, [])],
)
def test_8_bits_are_carried_between_products_where_the_whole_is_faster_for_it(
    seconds, error, expected, monkeypatch, different_sizes
):
    nodes = [
        *(node("Gelu", ["x"], ["g"]), node("MatMul", ["g", "w0"], ["p0"]), node("Relu", ["p0"], ["r"])),
        *(node("Transpose", ["r"], ["t"], perm=[1, 0, 2]), node("MatMul", ["t", "w1"], ["p1"])),
        *(node("Gelu", ["p1"], ["h"]), node("MatMul", ["h", "last"], ["y"])),
    ]
    constants = [constant("w0", 8, 8), constant("w1", 8, 8), constant("last", 8, 4)]
    opset = [helper.make_opsetid("", 20)]
    proto = model(nodes, [value("x", ["n", 12, 8])], ["y"], constants, opset_imports=opset)
    times = {"p0": (4.0, 2.5), "p1": (4.0, 2.5)}
    trial = Scripted(times, {"p0": 0.1, "p1": 0.1}, monkeypatch=monkeypatch)
    alone, judge = trial.seconds, trial.judge

    def carries(proto):
        numbers = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        return {"r/scale", "t/scale"} <= set(numbers) and numbers["t/scale"] == numbers["r/scale"]

    trial.seconds = lambda proto: (lambda feed: seconds) if carries(proto) else alone(proto)
    trial.judge = lambda proto: Verdict(0, error) if carries(proto) else judge(proto)
    graph, placement = placed(proto)
    ranges = {**dict.fromkeys(placement.readers, (-1.0, 1.0)), "t": (0.0, 0.9)}
    rules = replace(RULES, carries=("Transpose",))
    found, facts = Search(Timed(trial, rules))(graph, placement, ranges)
    assert [one.outputs[0].name for one in found.carried] == expected
    assert [product.node.outputs[0].name for product in found.products] == ["p0", "p1"]
    assert facts["speed"]["ratio"] == pytest.approx((seconds if expected else 0.005) / 0.008, abs=1e-3)


def test_an_interrupted_search_goes_on_where_it_was(monkeypatch, different_sizes):
    times = dict.fromkeys(["p0", "p1", "p2", "p3"], (2.0, 1.0))
    errors = {"p0": 0.9, "p1": 0.8, "p2": 0.7, "p3": 0.1}

    class Interrupted(Scripted):
        def quick(self, proto):
            if len(self.asked) == 3:
                raise KeyboardInterrupt
            return super().quick(proto)

    first = Interrupted(times, errors, monkeypatch=monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        searched(first)
    again = Scripted(times, errors, monkeypatch=monkeypatch)
    lines = []
    whole = searched(again, note=lines.append)[0]
    assert lines[0].endswith("4 groups of products in float32 and in 8 bits, 4 times at hand from before")
    assert first.asked[1:] == [["p0"], ["p1"]]
    assert again.asked[:2] == [["p2"], ["p3"]]
    assert whole == ["p2", "p3"]
    once_more = Scripted(times, errors, monkeypatch=monkeypatch)
    assert searched(once_more)[0] == whole
    assert once_more.asked == []


def test_errors_are_measured_on_the_faster_graph_with_the_same_products(monkeypatch, different_sizes):
    times = dict.fromkeys(["p0", "p1", "p2", "p3"], (2.0, 1.0))
    errors = {"p0": 0.9, "p1": 0.8, "p2": 0.7, "p3": 0.1}
    other, made = prefixed(network(), "other/"), []
    trial = Scripted(times, {f"other/{name}": error for name, error in errors.items()}, None, monkeypatch)
    whole, _, facts = searched(trial, faster=lambda: made.append(other) or other)
    assert whole == ["p2", "p3"]
    assert [row["error"] for row in facts["groups"]] == list(errors.values())
    assert {name for low in trial.asked for name in low} == {f"other/{name}" for name in errors}
    assert trial.low(trial.expected) == []
    assert trial.expected.graph.node[0].output[0] == "other/g0"
    # Where all is at hand from before it is not even made, and one without these products is not taken.
    assert searched(Scripted(times, {}, None, monkeypatch), faster=lambda: made.append(other))[0] == whole
    assert len(made) == 1
    plain = Scripted(times, errors, None, monkeypatch)
    assert searched(plain, count=3, faster=lambda: network(2))[0] == ["p2"]
    assert plain.expected.graph.node[0].output[0] == "g0"


def prefixed(proto, prefix):
    """A copy whose nodes make values of other names, but for the graph's output."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    names = {name: name if name == "y" else prefix + name for n in copy.graph.node for name in n.output}
    for one in copy.graph.node:
        one.input[:] = [names.get(name, name) for name in one.input]
        one.output[:] = [names[name] for name in one.output]
    return copy


def test_progress_counts_groups(monkeypatch):
    counts = []
    graph, placement = placed(network())
    times = dict.fromkeys(["p0", "p1", "p2", "p3"], (2.0, 1.0))
    trial = Scripted(times, dict.fromkeys(times, 0.0), monkeypatch=monkeypatch)
    ranges = dict.fromkeys(placement.readers, (-1.0, 1.0))
    Search(Timed(trial, RULES, progress=lambda *at: counts.append(at)))(graph, placement, ranges)
    assert counts == [(i, 4) for i in (1, 2, 3, 4)]


def test_groups_of_one_structure_are_timed_once(monkeypatch):
    opened = []
    times = dict.fromkeys(["p0", "p1", "p2", "p3"], (2.0, 1.0))
    trial = Scripted(times, dict.fromkeys(times, 0.0), monkeypatch=monkeypatch)
    seconds = trial.seconds
    trial.seconds = lambda proto: opened.append(proto) or seconds(proto)
    searched(trial)
    assert len(opened) == 2 + 2  # one group in both forms, the whole graph in both
