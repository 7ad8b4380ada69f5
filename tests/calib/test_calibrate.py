"""Calibration: statistics are those of the activations, the choice is the best, and nothing is done twice."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from meta_deploy.calib import calibrate as module
from meta_deploy.calib.calibrate import Calibrator
from meta_deploy.calib.statistics import MOST_VALUES, collect
from meta_deploy.errors import InputError
from meta_deploy.export.samples import Samples
from meta_deploy.graph.graph import normalized
from meta_deploy.graph.precision.placement import place
from meta_deploy.graph.precision.quantize import fake_quantized
from meta_deploy.graph.precision.rules import EightBitRules
from tests.small_graphs import model, run, value

RULES = EightBitRules(False, True, True, speedup=4, value=0, node=0, channels=2)
node = helper.make_node


def constant(name, *shape, seed=0, scale=0.3):
    return numpy_helper.from_array(
        np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32), name
    )


def network():
    """A first convolution, one that is quantized, a MatMul that is, and one that makes the output."""
    nodes = [
        node("Conv", ["x", "w0"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Conv", ["a", "w1"], ["b"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["b"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=[0, 2, 3, 1]),
        node("MatMul", ["t", "w2"], ["m"]),
        node("Gelu", ["m"], ["g"]),
        node("MatMul", ["g", "w3"], ["y"]),
    ]
    weights = [constant("w0", 8, 3, 3, 3), constant("w1", 8, 8, 3, 3, seed=1)]
    weights += [constant("w2", 8, 6, seed=2), constant("w3", 6, 4, seed=3)]
    opset = [helper.make_opsetid("", 20)]
    return model(nodes, [value("x", [1, 3, 24, 24])], ["y"], weights, opset_imports=opset)


def pictures(count, seed=0):
    generator = np.random.default_rng(seed)
    return [{"x": generator.normal(size=(1, 3, 24, 24)).astype(np.float32)} for _ in range(count)]


def placed(proto):
    graph = normalized(proto)
    return graph, place(graph.graph, RULES)


def activations(proto, names, feeds):
    """Every value of some tensors, of all runs, from the graph run as it is."""
    shown = model(
        proto.graph.node, proto.graph.input, names, proto.graph.initializer, opset_imports=proto.opset_import
    )
    runs = [run(shown, **feed) for feed in feeds]
    return {name: np.stack([one[name] for one in runs]) for name in names}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_statistics_are_those_of_the_activations():
    graph, placement = placed(network())
    feeds = pictures(5)
    found = collect(graph, placement.readers, feeds, 5)
    assert set(found) == {"a", "r", "t"}
    for name, values in activations(network(), list(found), feeds).items():
        one = found[name]
        np.testing.assert_allclose([one.low, one.high], [values.min(), values.max()], rtol=1e-5, atol=1e-6)
        assert one.histogram.counts.sum() == values.size  # all of them, as there are few
        middle = np.average(one.histogram.centres, weights=one.histogram.counts)
        assert middle == pytest.approx(values.mean(), abs=one.histogram.width)
    assert [block.shape for block in found["a"].blocks[:2]] == [(1, 8, 14, 14)] * 2
    assert found["t"].blocks[0].shape[1] == 8


def test_of_a_large_tensor_a_part_is_looked_at_and_its_extremes_are_exact():
    proto = model(
        [
            node("Relu", ["x"], ["r"]),
            node("MatMul", ["r", "w"], ["m"]),
            node("Softmax", ["m"], ["s"]),
            node("MatMul", ["s", "v"], ["y"]),
        ],
        [value("x", [1, 6000, 48])],
        ["y"],
        [constant("w", 48, 48), constant("v", 48, 4)],
    )
    graph, placement = placed(proto)
    feeds = [{"x": np.random.default_rng(i).normal(size=(1, 6000, 48)).astype(np.float32)} for i in (0, 1)]
    feeds[1]["x"][0, 5, 7] = 99
    one = collect(graph, placement.readers, feeds, 2)["r"]
    assert one.high == 99
    seen = one.histogram.counts.sum()
    assert MOST_VALUES / 8 < seen / 2 <= MOST_VALUES
    zeros = one.histogram.counts[len(one.histogram.counts) // 2] / seen
    assert zeros == pytest.approx(0.5, abs=0.05)  # as many as Relu makes: the sample is a fair one
    # Of as many runs as there may be each is looked at less, as their numbers add up.
    few = collect(graph, placement.readers, feeds, 500)["r"]
    assert few.high == 99
    assert few.histogram.counts.sum() < seen / 3


def test_auto_takes_the_range_that_the_reader_suffers_least_from():
    """Of outliers in a channel that is multiplied by zero nothing is lost; of others much is."""
    w = np.ones((8, 8), np.float32)
    w[0] = 0
    nodes = [
        node("Softplus", ["x"], ["a"]),
        node("MatMul", ["a", "w"], ["b"]),
        node("MatMul", ["b", "v"], ["y"]),
    ]

    def error_and_method(rows):
        initializers = [numpy_helper.from_array(rows, "w"), constant("v", 8, 3)]
        graph, placement = placed(model(nodes, [value("x", [1, 64, 8])], ["y"], initializers))
        generator = np.random.default_rng(0)
        feeds = [{"x": generator.normal(0, 1, (1, 64, 8)).astype(np.float32)} for _ in range(6)]
        for feed in feeds:
            feed["x"][0, :2, 0] = 500
        ranges, facts = Calibrator(Samples(feeds), RULES, kept=False)(graph, placement)
        a = np.log1p(np.exp(feeds[0]["x"].astype(np.float64)))
        off = {
            k: np.linalg.norm((fake_quantized(a, r, RULES) - a) @ rows)
            for k, r in {"found": ranges["a"], "whole": (0, 500)}.items()
        }
        return off, facts

    off, facts = error_and_method(w)
    assert off["found"] < 0.2 * off["whole"]
    assert facts["methods"].get("minmax", 0) == 0
    off, _ = error_and_method(np.ones((8, 8), np.float32))
    assert off["found"] <= 1.001 * off["whole"]


def test_a_calibration_is_reproducible_and_is_kept(monkeypatch):
    graph, placement = placed(network())
    lines = []
    first = Calibrator(Samples(pictures(3)), RULES, note=lines.append)(graph, placement)
    again = Calibrator(Samples(pictures(3)), RULES, kept=False)(*placed(network()))
    assert first == again
    monkeypatch.setattr(module, "collect", None)  # it is not to be called
    assert Calibrator(Samples(pictures(3)), RULES, note=lines.append)(*placed(network())) == first
    assert lines[-1] == "the calibration of this graph on these inputs is at hand from before"
    other, _ = Calibrator(Samples(pictures(3)), RULES, "minmax")(*placed(network()))  # of any method
    assert other != first[0]
    for changed in (pictures(3, seed=1), pictures(2)):
        with pytest.raises(TypeError, match="not callable"):
            Calibrator(Samples(changed), RULES)(graph, placement)


def test_a_damaged_cache_is_made_again(tmp_path):
    graph, placement = placed(network())
    first = Calibrator(Samples(pictures(2)), RULES)(graph, placement)
    (file,) = (tmp_path / "meta-deploy" / "calibration").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    assert Calibrator(Samples(pictures(2)), RULES)(graph, placement) == first


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_told_with_its_tensor(wrong):
    feeds = pictures(3)
    feeds[1]["x"][0, 0, 5, 5] = wrong
    with pytest.raises(InputError, match=r"^tensor 'a' has values that are not finite .* run 2 of 3; "):
        Calibrator(Samples(feeds), RULES, kept=False)(*placed(network()))


def test_few_samples_are_warned_of():
    def told(feeds):
        lines = []
        Calibrator(Samples(feeds), RULES, note=lines.append, kept=False)(*placed(network()))
        return lines

    assert told(pictures(33)) == []
    (line,) = told(pictures(2))
    assert line == "warning: calibrated on 2 inputs, fewer than 32; give more by --calib-images"
    nearly_black = [{"x": np.full((1, 3, 24, 24), tiny, np.float32)} for tiny in (0, 1e-30)]
    assert told(nearly_black)  # makes no scale of zero


@pytest.mark.parametrize(
    ("count", "message"), [(1, "there is one of the inputs"), (3, "all 3 inputs are the same")]
)
def test_samples_of_which_no_two_differ_are_refused(count, message):
    with pytest.raises(InputError, match=f"^{message}, from which nothing is learnt of others; give --calib"):
        Calibrator(Samples(pictures(1) * count), RULES, kept=False)(*placed(network()))


def test_no_samples_and_no_such_method_are_refused():
    with pytest.raises(InputError, match="nothing to calibrate on"):
        Calibrator(Samples(), RULES)
    with pytest.raises(InputError, match="'best' is not a calibration method; choose auto, minmax"):
        Calibrator(Samples(pictures(1)), RULES, "best")


def test_progress_counts_the_samples():
    seen = []
    Calibrator(Samples(pictures(3)), RULES, progress=lambda *now: seen.append(now), kept=False)(
        *placed(network())
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_graph_is_left_as_it_was():
    graph, placement = placed(network())
    before = ir.to_proto(graph).SerializeToString(deterministic=True)
    Calibrator(Samples(pictures(2)), RULES, kept=False)(graph, placement)
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before
