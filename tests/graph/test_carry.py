"""8 bits that go through what only picks or moves numbers: where, by whose range; no number changes."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from meta_deploy.graph.graph import normalized
from meta_deploy.graph.precision.carry import carrying, shared_ranges
from meta_deploy.graph.precision.lower import to_proto
from meta_deploy.graph.precision.placement import place
from meta_deploy.graph.precision.qdq import insert
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.targets import TARGETS
from tests.small_graphs import model, value

CARRIES = TARGETS["onnxruntime"].eight_bits["int8"].carries
RULES = EightBitRules(False, True, True, speedup=4, value=0, node=0, channels=2, carries=CARRIES)
OPSET = [helper.make_opsetid("", 20)]
RANGE = -3.0, 5.0
TWICE = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "twice")
FLAT = numpy_helper.from_array(np.array([1, 8, -1]), "flat")
SQUARE = numpy_helper.from_array(np.array([1, 8, 8, -1]), "square")
POOL = {"kernel_shape": [3, 3], "pads": [1] * 4}


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs, outputs, name=outputs[0], **attributes)


def conv(x, y, channels=8):
    """A 3x3 convolution to 8 channels; its weights are named after what it makes."""
    return node("Conv", [x, f"{y}/w"], [y], kernel_shape=[3, 3], pads=[1] * 4), weights(f"{y}/w", channels)


def weights(name, channels):
    numbers = np.random.default_rng(sum(map(ord, name))).normal(0, 0.2, (8, channels, 3, 3))
    return numpy_helper.from_array(numbers.astype(np.float32), name)


def between(*nodes, last="z", channels=8, branches=("b", "c"), outputs=(), constants=()):
    """`nodes` between 8-bit convolutions, which make `branches`, and one that reads `last`."""
    ends = [conv("x", "a", 3), *(conv("a", name) for name in branches), conv(last, "d", channels)]
    ends.append(conv("s", "y"))
    made = [one[0] for one in ends]
    every = [*made[:-2], *nodes, made[-2], node("Sigmoid", ["d"], ["s"]), made[-1]]
    constants = [one[1] for one in ends] + [TWICE, FLAT, SQUARE, *constants]
    return model(every, [value("x", [1, 3, 8, 8])], ["y", *outputs], constants, opset_imports=OPSET)


def placed(proto, rules=RULES):
    graph = normalized(proto)
    placement = carrying(graph.graph, place(graph.graph, rules, ["y"]), rules)
    return graph, placement


def carried(proto, rules=RULES):
    return [one.outputs[0].name for one in placed(proto, rules)[1].carried]


def quantized(proto, ranges=None, carries=True):
    """The graph in 8 bits, all tensors in one range unless others are given."""
    graph = normalized(proto)
    placement = place(graph.graph, RULES, ["y"])
    if carries:
        placement = carrying(graph.graph, placement, RULES)
    insert(graph.graph, placement, {**dict.fromkeys(placement.readers, RANGE), **(ranges or {})}, RULES)
    proto = to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto, feed, optimized_to=None):
    """The outputs; by default of the graph as it is written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if optimized_to:
        options.optimized_model_filepath = str(optimized_to)
    else:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"]).run(
        None, feed
    )


def images():
    return {"x": np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)}


MOVES = {
    "pooled": [node("MaxPool", ["b"], ["z"], **POOL)],
    "nearest": [node("Resize", ["b", "", "twice"], ["z"], mode="nearest")],
    "there and back": [node("Reshape", ["b", "flat"], ["f"]), node("Reshape", ["f", "square"], ["z"])],
    "turned": [node("Transpose", ["b"], ["z"], perm=[0, 1, 3, 2])],
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_run_on_8_bit_numbers_and_change_none(name, tmp_path):
    proto = between(*MOVES[name], branches=("b",))
    assert carried(proto) == [one.output[0] for one in MOVES[name]]
    low = quantized(proto)
    np.testing.assert_array_equal(run(low, images())[0], run(quantized(proto, carries=False), images())[0])
    run(low, images(), tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    makers = {output: one.op_type for one in graph.node for output in one.output}
    moved = [one for one in graph.node if one.op_type.removeprefix("Nhwc") == MOVES[name][-1].op_type]
    assert moved
    assert all(makers[one.input[0]] != "DequantizeLinear" for one in moved)


def test_tensors_are_joined_and_added_in_8_bits_each_with_its_own_scale(tmp_path):
    proto = between(
        node("Add", ["b", "c"], ["t"]), node("Concat", ["t", "b"], ["z"], axis=1), channels=16
    )  # fmt: skip
    assert carried(proto) == ["t", "z"]
    low = quantized(proto, {"b": (-1.0, 2.0), "c": (-4.0, 1.0), "z": (-5.0, 3.0)})
    run(low, images(), tmp_path / "optimized.onnx")
    ops = [one.op_type for one in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert {"QLinearAdd", "QLinearConcat"} <= set(ops)
    assert not {"Add", "Concat"} & set(ops)


def test_what_is_in_float32_is_quantized_for_what_it_is_joined_with():
    proto = between(
        *(node("Sigmoid", ["b"], ["t"]), node("Concat", ["t", "c"], ["z"], axis=1)), channels=16
    )  # fmt: skip
    assert carried(proto) == ["z"]
    _, placement = placed(proto)
    ranges = shared_ranges(placement, {"z": (-2.0, 3.0), "c": (-1.0, 1.0)})
    assert ranges == {"z": (-2.0, 3.0), "c": (-1.0, 1.0), "t": (-2.0, 3.0)}
    low = run(quantized(proto), images())[0]
    np.testing.assert_array_equal(low, run(quantized(proto, carries=False), images())[0])


def test_what_is_made_of_one_tensor_has_its_range():
    moves = node("MaxPool", ["b"], ["p"], **POOL), node("Transpose", ["p"], ["z"], perm=[0, 1, 3, 2])
    _, placement = placed(between(*moves, branches=("b",)))
    assert shared_ranges(placement, {"b": (-1.0, 4.0), "z": (0.0, 3.0)}) == dict.fromkeys(
        "bpz", (-1.0, 4.0)
    )  # fmt: skip


LINEAR = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}


@pytest.mark.parametrize(
    ("nodes", "options"),
    [
        ([node("Sigmoid", ["b"], ["t"]), node("MaxPool", ["t"], ["z"], **POOL)], {}),  # no 8 bits before it
        ([node("MaxPool", ["b"], ["z", "which"], **POOL), node("Cast", ["which"], ["o"], to=1)],
         {"outputs": ["o"]}),  # places are no numbers of it
        ([node("AveragePool", ["b"], ["z"], **POOL)], {}),  # it computes new numbers
        ([node("Resize", ["b", "", "twice"], ["z"], mode="cubic")], {}),  # which may leave the range
        ([node("Resize", ["b", "", "twice"], ["z"], antialias=1, **LINEAR)], {}),
        ([node("MaxPool", ["b"], ["z"], **POOL)], {"outputs": ["z"]}),  # an output is float32
        # the upsampled tensor is read in float32 too, so that dequantizing it is more work than before
        ([node("Resize", ["b", "", "twice"], ["z"], mode="nearest"), node("Neg", ["z"], ["o"])],
         {"outputs": ["o"]}),
        # a sum that is read in float32 would be rounded for that
        ([node("Add", ["b", "c"], ["z"]), node("Neg", ["z"], ["o"])], {"outputs": ["o"]}),
        ([node("Sigmoid", ["b"], ["t"]), node("Add", ["t", "c"], ["z"])], {}),  # one side alone is in 8 bits
        ([node("Mul", ["b", "c"], ["z"])], {}),
    ],
)  # fmt: skip
def test_near_misses_stay_as_they_are(nodes, options):
    assert carried(between(*nodes, **options)) == []


@pytest.mark.parametrize(
    "nodes",
    [
        [node("MaxPool", ["b"], ["z"], **POOL), node("Neg", ["z"], ["o"])],
        [node("Transpose", ["b"], ["z"], perm=[0, 1, 3, 2]), node("Neg", ["z"], ["o"])],
    ],
)
def test_a_move_that_makes_no_more_numbers_is_taken_whoever_reads_it(nodes):
    proto = between(*nodes, outputs=["o"])
    assert carried(proto) == ["z"]
    for low, plain in zip(
        run(quantized(proto), images()), run(quantized(proto, carries=False), images()), strict=True
    ):
        np.testing.assert_array_equal(low, plain)


def test_a_target_that_carries_nothing_has_nothing_carried():
    rules = EightBitRules(False, True, True, speedup=4, value=0, node=0, channels=2)
    assert carried(between(*MOVES["pooled"]), rules) == []


OPS = ["MaxPool", "Resize", "Transpose", "Reshape", "Concat", "Sigmoid", "Neg"]


def drawn(data, ops):
    """Operators at random between two 8-bit branches and a last convolution."""
    tensors, nodes = {"b": 8, "c": 8}, []
    for i in range(data.draw(st.integers(1, 7))):
        op, name = data.draw(st.sampled_from(ops)), f"t{i}"
        first = data.draw(st.sampled_from(sorted(tensors)))
        channels = tensors[first]
        if op == "Concat":
            second = data.draw(st.sampled_from(sorted(tensors)))
            nodes.append(node(op, [first, second], [name], axis=1))
            channels += tensors[second]
        elif op == "Add":
            second = data.draw(st.sampled_from([one for one in sorted(tensors) if tensors[one] == channels]))
            nodes.append(node(op, [first, second], [name]))
        elif op == "Resize":  # rounds to the same size, which moves nothing
            same = numpy_helper.from_array(np.array([1, 1, 1, 1], np.float32), "same")
            nodes.append(node(op, [first, "", "same"], [name], mode="nearest"))
        elif op == "Reshape":
            nodes.append(node(op, [first, "keep"], [name]))
        else:
            attributes = POOL if op == "MaxPool" else {"perm": [0, 1, 3, 2]} if op == "Transpose" else {}
            nodes.append(node(op, [first], [name], **attributes))
        tensors[name] = channels
    last = f"t{len(nodes) - 1}"
    read = {name for one in nodes for name in one.input}
    loose = [one.output[0] for one in nodes if one.output[0] not in read and one.output[0] != last]
    same = numpy_helper.from_array(np.array([1, 1, 1, 1], np.float32), "same")
    keep = numpy_helper.from_array(np.array([0, 0, 0, 0]), "keep")
    return between(*nodes, last=last, channels=tensors[last], outputs=loose, constants=[same, keep])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_in_one_range_no_number_changes_whatever_is_between(data):
    proto = drawn(data, OPS)
    low, plain = quantized(proto), quantized(proto, carries=False)
    for one, other in zip(run(low, images()), run(plain, images()), strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_with_sums_numbers_stay_near(data):
    proto = drawn(data, [*OPS, "Add", "Add", "Add"])
    ranges = dict.fromkeys(place(normalized(proto).graph, RULES, ["y"]).readers, (-20.0, 20.0))
    low, plain = quantized(proto, ranges), quantized(proto, ranges, carries=False)
    for one, other in zip(run(low, images()), run(plain, images()), strict=True):
        assert np.linalg.norm(one - other) <= 0.1 * max(np.linalg.norm(other), 1)


def test_a_sum_of_sums_is_taken_as_far_as_there_are_ranges():
    """What is joined for a sum alone has the range of its parts; a sum for a sum alone has none."""
    three = node("Add", ["b", "c"], ["t"]), node("Add", ["t", "b"], ["z"])
    assert carried(between(*three)) == []
    joined = node("Concat", ["b", "c"], ["t"], axis=1), node("Add", ["t", "u"], ["z"])
    proto = between(node("Concat", ["c", "b"], ["u"], axis=1), *joined, channels=16)
    assert carried(proto) == ["u", "t", "z"]
    ranges = shared_ranges(placed(proto)[1], {"b": (-1.0, 2.0), "c": (-3.0, 1.0), "z": (-4.0, 3.0)})
    assert ranges["t"] == ranges["u"] == (-3.0, 2.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-6, 0), st.floats(0.1, 6)), min_size=3, max_size=3))
def test_a_linear_resize_is_one_step_off_at_most(ends):
    """What it makes is rounded by the scale of what it reads; both are shown."""
    proto = between(
        node("Resize", ["b", "", "twice"], ["r"], **LINEAR),
        node("Resize", ["c", "", "twice"], ["n"], mode="nearest"),
        node("Concat", ["r", "n"], ["z"], axis=1), channels=16,
    )  # fmt: skip
    assert carried(proto) == ["r", "n", "z"]
    named = dict(zip("bcz", map(tuple, ends), strict=True))
    low = quantized(proto, named)
    shown = onnx.ModelProto()
    shown.CopyFrom(low)
    made = {one.output[0]: one for one in low.graph.node}
    resize = made["r"]
    restored = next(name for name in made if name.startswith("r/restored"))
    del shown.graph.output[:]
    shown.graph.output.extend([helper.make_empty_tensor_value_info(n) for n in (resize.output[0], restored)])
    exact, rounded = run(shown, images())
    assert np.abs(exact - rounded).max() <= 0.501 * (named["b"][1] - named["b"][0]) / 255
