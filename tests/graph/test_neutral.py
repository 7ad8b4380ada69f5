"""Dropping what does nothing: only where value and shape stay, and padding goes into convolutions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from meta_deploy.graph.passes.clean_up import clean_up
from tests.graph.rewriting import RANDOM, node, ops, rewritten, same
from tests.small_graphs import model, value

RNG = np.random.default_rng(0)


def cleaned(nodes, constants, shape, out=None):
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    proto = model(nodes, [value("x", shape)], [value("y", out)], initializers)
    after, _ = rewritten(clean_up, proto)
    same(proto, after)
    return ops(after)


@settings(RANDOM, max_examples=40)
@given(
    op=st.sampled_from(["Add", "Sub", "Mul", "Div"]),
    number=st.sampled_from([0, 1, 2]),
    ones=st.integers(0, 4),
    swap=st.booleans(),
)
def test_plus_0_and_times_1_go_where_the_rank_stays(op, number, ones, swap):
    if op == "Div" and not number:
        return
    constant = np.full((1,) * ones, number, np.float32)
    pair = ["c", "a"] if swap and op != "Div" else ["a", "c"]
    nodes = [node("Relu", ["x"], ["a"]), node(op, pair, ["b"]), node("Exp", ["b"], ["y"])]
    neutral = number == (op in ("Mul", "Div")) and ones <= 3 and not (op == "Sub" and swap)
    assert (op not in cleaned(nodes, {"c": constant}, [2, 3, 4], [1] * (ones - 3) + [2, 3, 4])) == neutral


def test_a_constant_that_broadcasts_stays():
    nodes = [node("Mul", ["x", "c"], ["a"]), node("Relu", ["a"], ["y"])]
    assert "Mul" in cleaned(nodes, {"c": np.ones((5, 1), np.float32)}, [1, 4], [5, 4])


@pytest.mark.parametrize(
    ("sizes", "number", "goes"),
    [((4,), 0, True), ((3, 4), 0, True), ((1, 4), 0, True), ((2, 3, 4), 0, True), ((3, 4), 1, False)],
)
def test_a_tensor_of_zeros_goes(sizes, number, goes):
    constant = np.zeros(sizes, np.float32)
    constant.flat[-1] = number
    nodes = [node("Relu", ["x"], ["a"]), node("Add", ["c", "a"], ["b"]), node("Exp", ["b"], ["y"])]
    assert ("Add" not in cleaned(nodes, {"c": constant}, [2, 3, 4])) == goes


def guarded(mask=None, number=0.0, of="weights", axis=-1, computed=False, hidden=None):
    """Attention's weights as PyTorch writes them: where they are not a number, another stands for them."""
    constants = {"w": RNG.standard_normal((4, 3)).astype(np.float32), "number": np.float32(number)}
    nodes = [node("MatMul", ["x", "w"], ["scores"])]
    if computed:
        nodes += [node("Log", ["scores"], ["logs"]), node("Identity", ["logs"], ["masked"])]
    elif mask is not None:
        constants["mask"] = np.array(mask, np.float32)
        if hidden is not None:
            constants["hidden"] = np.float32(hidden)
            nodes.append(node("Cast", ["scores"], ["hides"], to=9))
            nodes += [node("Where", ["hides", "hidden", "mask"], ["chosen"])]
        nodes.append(node("Add", ["scores", "mask" if hidden is None else "chosen"], ["masked"]))
    nodes += [
        node("Softmax", ["scores" if mask is None and not computed else "masked"], ["weights"], axis=axis),
        node("IsNaN", [of], ["nan"]),
        node("Where", ["nan", "number", "weights"], ["safe"]),
        node("Exp", ["safe"], ["y"]),
    ]
    return cleaned(nodes, constants, [2, 4])


@pytest.mark.parametrize("mask", [None, [0.0, 0.0, 0.0], [[0.0, -np.inf, 1.0], [-np.inf, -np.inf, 2.0]]])
def test_a_softmax_of_finite_scores_needs_no_other_number(mask):
    assert "Where" not in guarded(mask)


def test_a_mask_chosen_from_finite_numbers_is_finite():
    after = guarded([0.0, 1.0, 2.0], hidden=np.finfo(np.float32).min)
    assert after.count("Where") == 1
    assert "IsNaN" not in after


@pytest.mark.parametrize(
    "case",
    [
        {"mask": [[0.0, 0.0, 0.0], [-np.inf, -np.inf, -np.inf]]},  # a row without keys
        {"mask": [np.inf, 0.0, 0.0]},
        {"mask": [np.nan, 0.0, 0.0]},
        {"mask": [0.0, 0.0, 0.0], "hidden": -np.inf},
        {"mask": [0.0, -np.inf, 0.0], "hidden": 0.0},
        {"of": "scores"},
        {"axis": 0},
        {"computed": True},
    ],
    ids=str,
)
def test_a_softmax_that_may_be_no_number_keeps_the_other(case):
    assert "IsNaN" in guarded(**case)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_a_pad_of_width_zero_goes(mode):
    nodes = [node("Pad", ["x", "p"], ["a"], mode=mode), node("Relu", ["a"], ["y"])]
    assert cleaned(nodes, {"p": np.zeros(4, np.int64)}, [3, 4], [3, 4]) == ["Relu"]


@settings(RANDOM, max_examples=60)
@given(
    pads=st.lists(st.integers(-1, 2), min_size=4, max_size=4),
    own=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    dilation=st.integers(1, 2),
    channels=st.sampled_from([0, 0, 0, 1]),
    filling=st.sampled_from([None, 0, 0, 1]),
    mode=st.sampled_from(["constant", "constant", "edge"]),
    again=st.sampled_from([False, False, True]),
)
def test_padding_with_zeros_goes_into_the_convolution(pads, own, dilation, channels, filling, mode, again):
    top, left, bottom, right = pads
    constants = {
        "p": np.array([0, channels, top, left, 0, 0, bottom, right]),
        "w": RNG.standard_normal((2, 3 + channels, 3, 3)).astype(np.float32),
    }
    if filling is not None:
        constants["f"] = np.float32(filling)
    nodes = [
        node("Pad", ["x", "p"] + ["f"] * (filling is not None), ["a"], mode=mode),
        node("Conv", ["a", "w"], ["b"], pads=own, dilations=[dilation] * 2),
        node("ReduceMax", ["a"] if again else ["b"], ["m"], keepdims=0),
        node("Add", ["b", "m"], ["y"]),
    ]
    total = [width + more for width, more in zip(pads, own, strict=True)]
    fits = min(pads) >= 0 and max(total) <= 2 * dilation and not channels
    taken = fits and not again and mode == "constant" and not filling
    if not any(pads) and not channels:
        taken = True
    assert ("Pad" not in cleaned(nodes, constants, [1, 3, 7, 8])) == taken


@settings(RANDOM, max_examples=30)
@given(
    start=st.integers(-1, 1),
    end=st.sampled_from([2, 3, 4, -1, 2**40]),
    axis=st.integers(-1, 1),
    step=st.sampled_from([1, 1, 1, -1, 2]),
)
def test_a_slice_of_all_goes(start, end, axis, step):
    taken = np.arange(4 if axis else 3)[start:end:step]
    if len(taken) == 0:
        return
    numbers = {"s": start, "e": end, "a": axis, "st": step}
    constants = {name: np.array([number]) for name, number in numbers.items()}
    nodes = [node("Relu", ["x"], ["r"]), node("Slice", ["r", *constants], ["b"]), node("Exp", ["b"], ["y"])]
    shape = [3, len(taken)] if axis else [len(taken), 4]
    same_as_before = list(taken) == list(range(4 if axis else 3))
    assert ("Slice" not in cleaned(nodes, constants, [3, 4], shape)) == same_as_before


@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Where"])
@pytest.mark.parametrize(
    ("size", "other", "computed", "stays"),
    [
        ((1, 3), (), False, False),
        ((3,), (1, 3), False, False),
        ((1, 1), (3,), False, False),
        ((1, 1), (4, 1, 3), False, True),  # to another shape than the Expand's
        ((1, 3), (), True, True),
    ],
)
def test_expanded_constants_are_computed_before_the_expand(op, size, other, computed, stays):
    """What is the same for each image of any batch; not where something computed is expanded."""
    constants = {"c": RNG.standard_normal(size), "d": RNG.standard_normal(other)}
    initializers = [numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in constants.items()]
    nodes = [
        node("Shape", ["x"], ["to"]),
        node("ReduceMax", ["x"], ["m"]),
        node("Add", ["c", "m" if computed else "c"], ["start"]),
        node("Expand", ["start", "to"], ["e"]),
        node("Cast", ["e"], ["chosen"], to=9),
        node(op, ["chosen", "d", "e"] if op == "Where" else ["e", "d"], ["f"]),
        node("Mul", ["x", "f"], ["y"]),
    ]
    out = ["b", 3] if len(other) < 3 else [4, "b", 3]
    proto = model(nodes, [value("x", ["b", 3])], [value("y", out)], initializers)
    after, _ = rewritten(clean_up, proto)
    same(proto, after)
    assert ("Expand" in ops(after)) == stays


@settings(RANDOM, max_examples=20)
@given(
    axes=st.lists(st.integers(-3, 2), min_size=2, max_size=3),
    starts=st.lists(st.integers(-2, 1), min_size=3, max_size=3),
    steps=st.lists(st.sampled_from([1, 1, 2, -1]), min_size=3, max_size=3),
    small=st.booleans(),
    again=st.sampled_from([None, None, 0, 1]),
)
def test_slices_along_other_axes_are_one(axes, starts, steps, small, again):
    """Not along the same axis, nor where something else reads what one of them takes (`again`)."""
    x, constants, nodes, kind = "x", {}, [], np.int32 if small else np.int64
    ends = [2**31 - 1 if step > 0 else -(2**31) for step in steps]
    for i, (axis, start, end, step) in enumerate(zip(axes, starts, ends, steps, strict=False)):
        names = [f"{name}{i}" for name in "seat"]
        constants.update(zip(names, (np.array([n], kind) for n in (start, end, axis, step)), strict=True))
        nodes.append(node("Slice", [x, *names], [f"c{i}"]))
        x = f"c{i}"
    nodes += [node("Exp", [x], ["e"]), node("ReduceMax", [f"c{again}" if again is not None else "e"], ["m"])]
    taken = np.zeros((4, 5, 6))
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=False):
        taken = taken.take(range(*slice(start, end, step).indices(taken.shape[axis])), axis)
    if not taken.size:
        return
    after = cleaned([*nodes, node("Add", ["e", "m"], ["y"])], constants, [4, 5, 6], list(taken.shape))
    joined = len({axis % 3 for axis in axes}) == len(axes) and (again is None or again >= len(axes) - 1)
    if joined:
        assert after.count("Slice") <= 1
    elif len(axes) == 2 and 1 in starts[:1] and 1 in starts[1:2]:
        assert after.count("Slice") == 2


@pytest.mark.parametrize(("to", "stays"), [([3, 4], False), ([1, 1], False), ([2, 3, 4], True), ([4], False)])
def test_an_expand_to_the_same_shape_goes(to, stays):
    nodes = [node("Relu", ["x"], ["r"]), node("Expand", ["r", "to"], ["b"]), node("Exp", ["b"], ["y"])]
    out = list(np.broadcast_shapes((3, 4), tuple(to)))
    assert ("Expand" in cleaned(nodes, {"to": np.array(to)}, [3, 4], out)) == stays


@pytest.mark.parametrize("count", [1, 2])
def test_a_concat_of_one_tensor_goes(count):
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Concat", ["r"] * count, ["b"], axis=0),
        node("Exp", ["b"], ["y"]),
    ]
    assert ("Concat" in cleaned(nodes, {}, [3, 4], [3 * count, 4])) == (count > 1)


@pytest.mark.parametrize(
    ("op", "other", "stays"),
    [("Div", [3, 4], False), ("Add", [3, 4], False), ("Mul", [1, 4], True), ("Pow", [3, 4], True)],
)
@pytest.mark.parametrize("swap", [False, True])
def test_what_broadcasts_itself_reads_no_expand(op, other, stays, swap):
    nodes = [
        node("ReduceMax", ["x"], ["m"], keepdims=1),
        node("Exp", ["m"], ["e"]),
        node("Expand", ["e", "to"], ["b"]),
        node("Exp", ["x" if other[0] == 3 else "c"], ["o"]),
        node(op, ["b", "o"] if swap else ["o", "b"], ["s"]),
        node("Exp", ["s"], ["y"]),
    ]
    constants = {"to": np.array([3, 4]), "c": RNG.standard_normal(other).astype(np.float32)}
    if other[0] == 1:
        nodes[3] = node("ReduceMean", ["x", "zero"], ["o"], keepdims=1)
        constants = {"to": np.array([3, 4]), "zero": np.array([0])}
    else:
        del constants["c"]
    assert ("Expand" in cleaned(nodes, constants, [3, 4], [3, 4])) == stays


@pytest.mark.parametrize("by", ["sizes", "scales"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("place", ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"])
def test_a_resize_to_the_size_that_is_there_goes(mode, place, by):
    resize = node(
        *("Resize", ["a", "", "s"] if by == "scales" else ["a", "", "", "s"], ["b"]),
        mode=mode,
        coordinate_transformation_mode=place,
    )
    nodes = [node("Relu", ["x"], ["a"]), resize, node("Exp", ["b"], ["y"])]
    sizes = np.ones(4, np.float32) if by == "scales" else np.array([1, 2, 4, 5])
    assert cleaned(nodes, {"s": sizes}, [1, 2, 4, 5], [1, 2, 4, 5]) == ["Relu", "Exp"]


@pytest.mark.parametrize(
    ("constants", "attributes", "out"),
    [
        ({"s": np.array([1, 1, 1.05, 1], np.float32)}, {}, [1, 2, 4, 5]),  # other places, as many
        ({"s": np.array([1, 1, 1, 2], np.float32)}, {}, [1, 2, 4, 10]),
        (
            {"r": np.array([0, 0, 0, 0, 1, 1, 0.5, 1], np.float32), "s": np.ones(4, np.float32)},
            {"coordinate_transformation_mode": "tf_crop_and_resize"},
            [1, 2, 2, 5],
        ),
    ],
    ids=range(3),
)
def test_a_resize_to_other_places_stays(constants, attributes, out):
    resize = node("Resize", ["a", "r" if "r" in constants else "", "s"], ["b"], mode="linear", **attributes)
    nodes = [node("Relu", ["x"], ["a"]), resize, node("Exp", ["b"], ["y"])]
    assert "Resize" in cleaned(nodes, constants, [1, 2, 4, 5], None)
