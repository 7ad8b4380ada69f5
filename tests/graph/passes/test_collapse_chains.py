"""collapse_chains: the same elements in the same places, in fewer moves, and never in more."""

import functools
import itertools
import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.graph.explain import explaining
from meta_deploy.graph.graph import BATCH
from meta_deploy.graph.passes.collapse_chains import MOVES, collapse_chains
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, TYPES, node, ops
from tests.small_graphs import any_batch, inferred, model, run, value


def moves(proto):
    return sum(op in MOVES for op in ops(proto))


collapsed = functools.partial(rewriting.rewritten, collapse_chains)


def numbers(shape, dtype="float32"):
    """Every element another one, as far as the type has that many."""
    return np.arange(1, math.prod(shape) + 1).reshape(shape).astype(dtype)


def same_bits(proto, after, **feeds):
    onnx.checker.check_model(after, full_check=True)
    expected, actual = run(proto, **feeds), run(after, **feeds)
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array, strict=True)


def unharmed(proto, **feeds):
    """The new model, after asserting equal outputs, no more moves, and that a second run does nothing."""
    after, removed = collapsed(proto)
    same_bits(proto, after, **feeds)
    assert len(after.graph.node) == len(proto.graph.node) - removed
    assert moves(after) <= moves(proto)
    again, more = collapsed(after)
    assert more == 0
    assert [n.SerializeToString() for n in again.graph.node] == [
        n.SerializeToString() for n in after.graph.node
    ]
    return after


class Chain:
    """Nodes in a row from x to y, written as calls: `Chain((2, 3)).reshape(3, 2).transpose(1, 0)`."""

    def __init__(self, shape, dtype="float32", opset=18, first="Identity", last="Identity"):
        self.shape, self.dtype, self.opset, self.last = shape, dtype, opset, last
        self.nodes, self.initializers, self.outputs, self.count = [], [], [], 0
        self.name = "x"
        if first:
            self.add(first)

    def add(self, op, values=None, **attributes):
        inputs = [self.name]
        if values is not None:
            inputs.append(f"c{self.count}")
            self.initializers.append(numpy_helper.from_array(np.array(values, np.int64), inputs[1]))
        self.count += 1
        self.name = f"t{self.count}"
        self.nodes.append(node(op, inputs, [self.name], **attributes))
        return self

    def reshape(self, *shape, **attributes):
        return self.add("Reshape", shape, **attributes)

    def transpose(self, *perm):
        return self.add("Transpose", **({"perm": perm} if perm else {}))

    def squeeze(self, *axes):
        return self.add("Squeeze", axes or None)

    def unsqueeze(self, *axes):
        return self.add("Unsqueeze", axes)

    def flatten(self, axis):
        return self.add("Flatten", axis=axis)

    def also_read(self, op="Identity"):
        """Another node reads the tensor as it is here."""
        self.outputs.append(f"read_{len(self.nodes)}")
        self.nodes.append(node(op, [self.name], [self.outputs[-1]]))
        return self

    def also_output(self):
        self.outputs.append(self.name)
        return self

    def proto(self, order=None, prefix=""):
        nodes = list(self.nodes)
        outputs = [*self.outputs, "y"]
        if self.last:
            nodes.append(node(self.last, [self.name], ["y"]))
        else:
            nodes[-1].output[0] = "y"
        imports = [helper.make_opsetid("", self.opset)]
        inputs = [value("x", list(self.shape), TYPES[self.dtype])]
        outputs = [helper.make_empty_tensor_value_info(name) for name in outputs]
        for out in outputs:
            out.type.tensor_type.elem_type = TYPES[self.dtype]
        # With propagation of data ONNX goes through a BATCH of numbers one by one.
        return model(nodes, inputs, outputs, self.initializers, opset_imports=imports, data_prop=False)

    def unharmed(self, sizes=None):
        return unharmed(self.proto(), x=numbers(sizes or self.shape, self.dtype))


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        (Chain((2, 3)).transpose(1, 0).transpose(1, 0), []),
        (Chain((2, 3)).transpose(1, 0), ["Transpose"]),
        (Chain((2, 3)).transpose(0, 1), []),
        (Chain((2, 3)).reshape(2, 3), []),
        (Chain((2, 3)).unsqueeze(0).squeeze(0), []),
        (Chain((1, 3)).transpose(1, 0), ["Reshape"]),  # of an axis of one: kept or a Reshape, not more
        (Chain((2, 3, 4)).transpose(1, 2, 0).transpose(1, 2, 0), ["Transpose"]),
        (Chain((2, 3, 4)).transpose(1, 2, 0).transpose(1, 2, 0).transpose(1, 2, 0), []),
        (Chain((4, 6)).reshape(24).reshape(6, 4), ["Reshape"]),
        (Chain((4, 6)).reshape(24).reshape(6, 4).reshape(4, 6), []),
        (
            Chain((2, 12)).reshape(2, 3, 4).transpose(1, 0, 2).reshape(3, 8),
            ["Reshape", "Transpose", "Reshape"],
        ),
        (
            Chain((2, 12)).reshape(2, 3, 4).transpose(1, 0, 2).unsqueeze(0).transpose(0, 2, 1, 3).squeeze(0),
            ["Reshape"],
        ),
        (Chain((2, 3, 4)).flatten(1).reshape(2, 3, 4).transpose(), ["Transpose"]),
        (Chain((2, 3, 4)).reshape(0, -1).reshape(2, 3, 4).transpose(2, 1, 0), ["Transpose"]),
        (Chain((2, 3, 4)).transpose(0, 2, 1).reshape(2, 2, 2, 3).transpose(0, 3, 1, 2).reshape(2, 3, 4), []),
        (Chain((1,)).squeeze(0).reshape(1, 1), ["Reshape"]),
        (Chain(()).reshape(1, 1).squeeze(), []),
        (Chain((1, 1)).squeeze(), ["Squeeze"]),
        (Chain((1, 2, 1)).squeeze().unsqueeze(-1, 0), []),
    ],
)
def test_a_chain_becomes_the_fewest_moves(chain, expected):
    after = chain.unharmed()
    left = [op for op in ops(after) if op != "Identity"]
    assert left == expected or (len(left) == len(expected) == 1)


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        (Chain((2, 5, 12)).reshape(2, 5, 3, 4).transpose(0, 2, 1, 3).transpose(0, 1, 3, 2), "RT"),  # keys
        (Chain((2, 12, 5)).transpose(0, 2, 1).reshape(2, 5, 3, 4).transpose(0, 2, 1, 3), "RT"),
        (Chain((2, 3, 4, 5)).reshape(2, 12, 5).transpose(0, 2, 1).reshape(10, 12), "TR"),  # only merged
        (Chain((2, 3, 5, 4)).transpose(0, 2, 1, 3).reshape(2, 5, 3, 4).reshape(2, 5, 12), "TR"),
    ],
)
def test_an_axis_is_cut_before_the_transpose_and_merged_after_it(chain, expected):
    assert "".join(op[0] for op in ops(chain.unharmed()) if op != "Identity") == expected


def test_window_partition_and_back_is_nothing():
    windows = Chain((1, 8, 8, 6)).reshape(1, 2, 4, 2, 4, 6).transpose(0, 1, 3, 2, 4, 5).reshape(4, 16, 6)
    back = windows.reshape(1, 2, 2, 4, 4, 6).transpose(0, 1, 3, 2, 4, 5).reshape(1, 8, 8, 6)
    assert moves(back.unharmed()) == 0


def test_a_reshape_across_axes_ends_a_part_and_the_rest_collapses():
    """4 x 6 to 6 x 4 cuts through both axes; before and after it are chains that reduce."""
    chain = Chain((4, 6)).transpose(1, 0).unsqueeze(0).squeeze(0).transpose(1, 0)
    chain.transpose(1, 0).reshape(4, 6).transpose(1, 0).transpose(1, 0).transpose(1, 0)
    after = chain.unharmed()
    assert moves(after) == 3


def test_what_another_node_reads_stays_and_what_undoes_it_goes():
    chain = Chain((2, 3, 4)).transpose(0, 2, 1).also_read().transpose(0, 2, 1)
    assert moves(chain.unharmed()) == 1


def test_what_another_move_reads_is_joined_to_it_once_it_alone_does():
    chain = Chain((2, 3, 4)).transpose(0, 2, 1).also_read("Transpose").transpose(0, 2, 1)
    assert moves(chain.unharmed()) == 1


def test_moves_beyond_one_that_others_read_are_joined_if_that_is_fewer():
    chain = Chain((2, 12)).reshape(2, 3, 4).also_read().transpose(0, 2, 1).reshape(8, 3)
    assert moves(chain.unharmed()) == 3  # by itself the chain is as short as from the start
    chain = Chain((2, 12)).reshape(2, 3, 4).also_read().transpose(0, 2, 1).also_read().transpose(0, 2, 1)
    assert moves(chain.reshape(24).unharmed()) == 3


def test_an_output_in_the_middle_stays():
    chain = Chain((2, 3, 4)).transpose(0, 2, 1).also_output().transpose(0, 2, 1)
    after = chain.unharmed()
    assert moves(after) == 1
    assert [o.name for o in after.graph.output] == ["t2", "y"]


def test_what_stays_says_between_what():
    with explaining() as told:
        collapsed(Chain((2, 3, 4)).transpose(0, 2, 1).also_read().proto())
    (place,) = told
    assert place.op == "Transpose"
    assert place.reason == "no fewer than 1 lead from Identity 't1' to Identity 'read_2' and 1 more"


def test_parts_before_and_after_an_output_collapse():
    chain = Chain((2, 3, 4)).transpose(0, 2, 1).transpose(0, 2, 1).transpose(2, 1, 0).also_output()
    after = chain.reshape(2, 12).reshape(24).unharmed()
    assert ops(after).count("Transpose") == ops(after).count("Reshape") == 1


@pytest.mark.parametrize("first", ["Identity", None])
def test_nothing_left_at_an_output_keeps_its_name(first):
    chain = Chain((2, 3), first=first, last=None).transpose().transpose()
    after = chain.unharmed()
    assert moves(after) == 0
    assert ops(after)[-1] == "Identity"


def test_one_move_for_nothing_at_an_output_is_left():
    """An Identity in its place would be no fewer nodes."""
    assert ops(Chain((2, 3), first=None, last=None).reshape(2, 3).unharmed()) == ["Reshape"]


def test_two_outputs_of_one_tensor_keep_their_names():
    nodes = [
        *(node("Transpose", ["x"], [f"{name}0"]) for name in "ab"),
        *(node("Transpose", [f"{name}0"], [name]) for name in "ab"),
    ]
    after = unharmed(model(nodes, [value("x", [2, 3])], ["b", "a"]), x=numbers((2, 3)))
    assert [o.name for o in after.graph.output] == ["b", "a"]


def test_a_chain_that_ends_in_two_readers_collapses_for_both():
    chain = (
        Chain((2, 3, 4)).transpose(0, 2, 1).transpose(0, 2, 1).also_read("Transpose").also_read("Identity")
    )
    after = chain.transpose(2, 1, 0).unharmed()
    assert ops(after).count("Transpose") == 2


def test_a_tensor_that_one_node_reads_twice_is_read_by_two():
    nodes = [
        node("Transpose", ["x"], ["a"]),
        node("Transpose", ["a"], ["b"]),
        node("Add", ["b", "b"], ["y"]),
    ]
    assert ops(unharmed(model(nodes, [value("x", [2, 3])]), x=numbers((2, 3)))) == ["Add"]


@pytest.mark.parametrize("dtype", TYPES)
def test_any_type_of_element_moves(dtype):
    chain = Chain((2, 3, 4), dtype).transpose(0, 2, 1).reshape(2, 2, 6).transpose(1, 0, 2).reshape(4, 6)
    assert moves(chain.unharmed()) == 3


def test_a_chain_of_a_constant_collapses():
    nodes = [
        node("Transpose", ["c"], ["a"]),
        node("Transpose", ["a"], ["b"]),
        node("Add", ["x", "b"], ["y"]),
    ]
    constant = numpy_helper.from_array(numbers((2, 3)), "c")
    proto = model(nodes, [value("x", [2, 3])], initializers=[constant])
    assert ops(unharmed(proto, x=numbers((2, 3)))) == ["Add"]


@pytest.mark.parametrize("opset", [13, 18, 20])
def test_each_opset(opset):
    chain = Chain((2, 1, 12), opset=opset).squeeze(1).reshape(0, 3, -1).transpose(1, 0, 2).unsqueeze(-1)
    assert moves(chain.unharmed()) <= 3


def test_axes_of_squeeze_as_an_attribute():
    """As they were before opset 13."""
    nodes = [
        node("Unsqueeze", ["x"], ["a"], axes=[0]),
        node("Squeeze", ["a"], ["b"], axes=[0]),
        node("Neg", ["b"], ["y"]),
    ]
    proto = model(nodes, [value("x", [2, 3])], opset_imports=[helper.make_opsetid("", 11)])
    assert ops(unharmed(proto, x=numbers((2, 3)))) == ["Neg"]


@pytest.mark.parametrize("allowzero", [0, 1])
def test_no_elements_stay_where_they_are(allowzero):
    chain = Chain((2, 0, 3)).transpose(0, 2, 1).transpose(0, 2, 1)
    chain.reshape(*((0, 3, 2) if allowzero else (2, 0, 3)), allowzero=allowzero).transpose(2, 1, 0)
    assert moves(chain.unharmed()) == 4


@pytest.mark.parametrize("size", [1, 3])
def test_an_axis_known_at_run_time_only_is_declined(size):
    chain = Chain((3, "n", 4)).transpose(0, 2, 1).transpose(0, 2, 1).unsqueeze(0).squeeze(0)
    assert moves(chain.unharmed((3, size, 4))) == 4


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_batch_of_any_size_is_an_axis_like_others(batch):
    chain = Chain((BATCH, 3, 4)).transpose(2, 0, 1).reshape(2, 2 * BATCH, 3).transpose(1, 0, 2)
    chain.reshape(BATCH * 12).reshape(1, 4 * BATCH, 3).transpose(0, 2, 1)
    proto = any_batch(chain.proto())
    after = unharmed(proto, x=numbers((batch, 3, 4)))
    targets = [numpy_helper.to_array(i).tolist() for i in after.graph.initializer]
    assert targets
    assert all(min(target) == -1 for target in targets)
    assert moves(after) == moves(collapsed(of_batch(chain.proto(), 5))[0])


def test_a_batch_cut_across_is_left():
    """What a Reshape cuts from three axes to a batch hangs on the batch."""
    chain = Chain((BATCH, 6)).transpose(1, 0).reshape(BATCH, 6).transpose(1, 0).reshape(3, 2 * BATCH)
    for batch in (1, 2, 3, 4):
        assert moves(unharmed(any_batch(chain.proto()), x=numbers((batch, 6)))) >= 3


def test_shapes_that_are_not_known_are_declined():
    proto = Chain((2, 3), first=None).transpose(1, 0).transpose(1, 0).proto()
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    after, removed = collapsed(proto)
    assert removed == 0
    assert moves(after) == 2


def test_a_shape_computed_at_run_time_is_declined():
    nodes = [
        node("Reshape", ["x", "s"], ["a"]),
        node("Reshape", ["a", "s"], ["b"]),
        node("Identity", ["b"], ["y"]),
    ]
    proto = model(nodes, [value("x", [2, 3]), value("s", [2], TensorProto.INT64)])
    assert moves(unharmed(proto, x=numbers((2, 3)), s=np.array([3, 2]))) == 2


def test_a_chain_of_sizes_that_a_reshape_takes_collapses():
    """The Reshape reads the end of the chain as its shape: it does not go on from it."""
    nodes = [
        node("Unsqueeze", ["s", "zero"], ["a"]),
        node("Squeeze", ["a", "zero"], ["b"]),
        node("Reshape", ["x", "b"], ["y"]),
    ]
    proto = model(
        nodes,
        [value("x", [2, 3]), value("s", [2], TensorProto.INT64)],
        initializers=[numpy_helper.from_array(np.array([0]), "zero")],
    )
    assert ops(unharmed(proto, x=numbers((2, 3)), s=np.array([3, 2]))) == ["Reshape"]


def test_somebody_elses_operator_of_that_name_is_not_a_move():
    nodes = [
        node("Transpose", ["x"], ["a"], domain="own"),
        node("Transpose", ["a"], ["b"], domain="own"),
        node("Neg", ["b"], ["y"]),
    ]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    proto = model(nodes, [value("x", [2, 2])], opset_imports=imports)
    proto.graph.value_info.extend([value("a", [2, 2]), value("b", [2, 2])])
    assert collapsed(proto)[1] == 0


def branching(inner, outer):
    """An If whose one branch reads `h` through the nodes `inner`."""
    then = helper.make_graph(inner, "then", [], [value(inner[-1].output[0], None)])
    other = helper.make_graph([node("Relu", ["x"], ["e"])], "else", [], [value("e", None)])
    nodes = [*outer, node("If", ["c"], ["y"], then_branch=then, else_branch=other)]
    return model(nodes, [value("x", [2, 3]), value("c", [], TensorProto.BOOL)])


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("op", ["Neg", "Transpose"])
def test_what_a_branch_reads_is_found_in_its_new_place(op, taken):
    outer = [node("Transpose", ["x"], ["a"]), node("Transpose", ["a"], ["h"])]
    proto = branching([node(op, ["h"], ["t"])], outer)
    unharmed(proto, x=numbers((2, 3)), c=np.array(taken))


def test_names_already_taken_are_not_used_again():
    """Of the tensors around, and of those in a branch."""
    inner = [node("Neg", ["x"], ["y/move"]), node("Neg", ["y/move"], ["t"])]
    chain = [
        node("Reshape", ["x", "s0"], ["t0"]),
        node("Transpose", ["t0"], ["t1"], perm=[0, 2, 1]),
        node("Reshape", ["t1", "s1"], ["t2"]),
        node("Reshape", ["t2", "s2"], ["z"]),
    ]
    then = helper.make_graph(inner, "then", [], [value("t", None)])
    other = helper.make_graph([node("Neg", ["z/move"], ["e"])], "else", [], [value("e", None)])
    nodes = [
        *chain,
        node("Abs", ["x"], ["z/move"]),
        node("Abs", ["x"], ["z/shape"]),
        node("Add", ["z/move", "z/shape"], ["z/move/shape"]),
        node("If", ["c"], ["i"], then_branch=then, else_branch=other),
        node("Add", ["i", "z/move/shape"], ["y"]),
    ]
    shapes = {"s0": [2, 2, 3], "s1": [12], "s2": [3, 4]}
    proto = model(
        nodes,
        [value("x", [4, 3]), value("c", [], TensorProto.BOOL)],
        ["y", "z"],
        [numpy_helper.from_array(np.array(v), k) for k, v in shapes.items()],
    )
    for taken in (True, False):
        assert moves(unharmed(proto, x=numbers((4, 3)), c=np.array(taken))) == 3


def test_a_graph_that_is_collapsed_grown_and_collapsed_again():
    """The names of the first time are still there at the second."""
    proto = Chain((2, 12)).reshape(2, 3, 4).transpose(2, 1, 0).unsqueeze(0).reshape(24).unharmed()
    names = [n.output[0] for n in proto.graph.node if n.op_type in MOVES]
    out = next(n for n in proto.graph.node if n.output[0] == names[-1])
    proto.graph.node.remove(out)
    grown = onnx.ModelProto.FromString(proto.SerializeToString())
    shapes = {"g0": [4, 3, 2, 1], "g1": [2, 2, 6]}
    initializers = [numpy_helper.from_array(np.array(v), k) for k, v in shapes.items()]
    grown.graph.initializer.extend(initializers)
    nodes = [
        node("Abs", [names[0]], ["read"]),
        node("Transpose", [names[1]], ["g_t"], perm=[1, 2, 0]),
        node("Reshape", ["g_t", "g0"], ["g_r"]),
        node("Reshape", ["g_r", "g1"], ["g_s"]),
        node("Transpose", ["g_s"], [out.output[0]], perm=[1, 0, 2]),
    ]
    where = len(grown.graph.node) - 1
    tail = list(grown.graph.node)[where:]
    del grown.graph.node[where:]
    grown.graph.node.extend([*nodes, *tail])
    grown.graph.output.append(value("read", None))
    for graph_output in grown.graph.output:
        graph_output.type.tensor_type.ClearField("shape")
        graph_output.type.tensor_type.elem_type = TensorProto.FLOAT
    del grown.graph.value_info[:]
    unharmed(onnx.shape_inference.infer_shapes(grown), x=numbers((2, 12)))


def test_a_long_row_of_chains_does_not_exhaust_the_stack():
    chain = Chain((2, 12))
    for _ in range(600):
        chain.reshape(2, 3, 4).transpose(2, 1, 0).unsqueeze(0).reshape(2, 12).also_output()
    proto = chain.proto()
    # The last reader first, as far as the format allows; the pass may not count on an order.
    after, removed = collapsed(proto)
    assert removed == 600
    same_bits(proto, after, x=numbers((2, 12)))


def test_what_only_computed_a_shape_is_no_reader():
    """As PyTorch's attention has it: the last Reshape takes its shape from a tensor in the chain."""
    nodes = [
        node("Transpose", ["x"], ["a"], perm=[0, 2, 1]),
        node("Shape", ["a"], ["s"]),
        node("Reshape", ["a", "flat"], ["b"]),
        node("Transpose", ["b"], ["c"], perm=[1, 0]),
        node("Transpose", ["c"], ["d"], perm=[1, 0]),
        node("Reshape", ["d", "s"], ["e"]),
        node("Transpose", ["e"], ["f"], perm=[0, 2, 1]),
        node("Identity", ["f"], ["y"]),
    ]
    flat = numpy_helper.from_array(np.array([2, 12]), "flat")
    proto = model(nodes, [value("x", [2, 3, 4])], initializers=[flat])
    after, _ = collapsed(proto)
    same_bits(proto, after, x=numbers((2, 3, 4)))
    assert ops(after) == ["Identity"]


def test_dead_moves_do_not_matter():
    nodes = [
        node("Transpose", ["x"], ["a"]),
        node("Transpose", ["a"], ["b"]),
        node("Transpose", ["a"], ["dead"]),
        node("Identity", ["b"], ["y"]),
    ]
    proto = model(nodes, [value("x", [2, 3])])
    after, _ = collapsed(proto)
    same_bits(proto, after, x=numbers((2, 3)))
    assert collapsed(after)[1] == 0


# --- random chains ---


def splits(draw, total):
    """Sizes, ones among them, whose product is `total`."""
    shape = []
    while total > 1 and len(shape) < 4:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        shape.append(draw(st.sampled_from(divisors)))
        total //= shape[-1]
    return [*shape, total] if total > 1 or draw(st.booleans()) else shape


def of_batch(proto, size):
    """A model that was written for a batch of BATCH, now for one of this size."""
    for i in proto.graph.initializer:
        target = numpy_helper.to_array(i)
        i.CopyFrom(numpy_helper.from_array(np.where(target % BATCH, target, target // BATCH * size), i.name))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    return inferred(proto)


@st.composite
def chains(draw, batch=None):
    """Random moves; with a batch, that comes first, and no Reshape is told to find a size itself."""
    shape = draw(st.lists(st.sampled_from((1, 1, 2, 2, 3, 4, 6)), max_size=5))
    shape = [batch, *shape] if batch else shape
    dtype = draw(st.sampled_from(("float32", "float32", *TYPES)))
    opset = draw(st.sampled_from((13, 18, 20)))
    ends = st.sampled_from(("Identity", "Identity", None))
    chain = Chain(shape, dtype, opset, draw(ends), draw(ends))
    for _ in range(draw(st.integers(1, 9))):
        op = draw(st.sampled_from(("reshape", "reshape", "transpose", "transpose", *MOVES)))
        ones = [i for i, size in enumerate(shape) if size == 1]
        if batch and op == "Squeeze" and not ones:
            op = "Transpose"  # nothing to name
        if op.lower() == "reshape":
            new = splits(draw, math.prod(shape) // (batch or 1))
            if batch:
                place = draw(st.integers(0, len(new)))
                new[place:place] = [batch]
                if place and draw(st.booleans()):
                    new[place - 1 : place + 1] = [new[place - 1] * batch]
            target = list(new)
            kept = [i for i, (a, b) in enumerate(zip(shape, new, strict=False)) if a == b]
            if kept and draw(st.booleans()):
                target[draw(st.sampled_from(kept))] = 0
            free = [i for i, size in enumerate(target) if size]
            if free and not batch and draw(st.booleans()):
                target[draw(st.sampled_from(free))] = -1
            chain.reshape(*target, **({"allowzero": 0} if opset > 13 and draw(st.booleans()) else {}))
        elif op.lower() == "transpose":
            perm = draw(st.permutations(range(len(shape))))
            default = draw(st.booleans())
            perm = list(range(len(shape)))[::-1] if default else perm
            chain.transpose(*([] if default else perm))
            new = [shape[p] for p in perm]
        elif op == "Squeeze":
            axes = draw(st.lists(st.sampled_from(ones), unique=True, max_size=3)) if ones else []
            axes = axes or (ones if batch else [])  # named: the batch is one at times
            chosen = axes or ones
            chain.squeeze(*(a - len(shape) if draw(st.booleans()) else a for a in axes))
            new = [size for i, size in enumerate(shape) if i not in chosen]
        elif op == "Unsqueeze":
            count = draw(st.integers(1, 2))
            rank = len(shape) + count
            axes = sorted(
                draw(st.lists(st.integers(0, rank - 1), min_size=count, max_size=count, unique=True))
            )
            rest = iter(shape)
            new = [1 if i in axes else next(rest) for i in range(rank)]
            chain.unsqueeze(*(a - rank if draw(st.booleans()) else a for a in axes))
        else:
            axis = draw(st.integers(0, len(shape)))
            new = [math.prod(shape[:axis]), math.prod(shape[axis:])]
            chain.flatten(axis)
        shape = new
        aside = draw(st.sampled_from(("",) * 6 + ("read", "output", "move")))
        if aside == "output" and chain.name not in chain.outputs:
            chain.also_output()
        elif aside:
            chain.also_read("Transpose" if aside == "move" else "Identity")
    if chain.nodes[-1].output[0] != chain.name or chain.name in chain.outputs:
        chain.last = "Identity"
    return chain


@settings(RANDOM, max_examples=400)
@given(chains())
def test_random_chains_move_elements_to_the_same_places(chain):
    after = chain.unharmed()
    if not chain.outputs:
        fits = all(len(part) <= 3 for part in runs(after))
        assert fits or mixes(after)


@settings(RANDOM, max_examples=200)
@given(chains(BATCH))
def test_random_chains_are_the_same_for_any_batch(chain):
    """And in as few moves as if its size were known, a prime that is in no other size."""
    proto, shape = any_batch(chain.proto()), chain.shape[1:]
    for batch in (1, 2, 3):
        after = unharmed(proto, x=numbers((batch, *shape), chain.dtype))
    assert moves(after) == moves(collapsed(of_batch(chain.proto(), 7))[0])


def runs(proto):
    """The operators between those that are not moves."""
    return [list(g) for is_move, g in itertools.groupby(ops(proto), lambda op: op in MOVES) if is_move]


def mixes(proto):
    """Whether a Reshape cuts through axes, so that a chain may be longer than three."""
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.value_info}
    shapes |= {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input}
    shapes |= {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.output}

    def ends(shape):
        return set(itertools.accumulate(shape, lambda a, b: a * b))

    def chain_of(a, b):
        ordered = sorted(ends(a) | ends(b))
        return all(y % x == 0 for x, y in itertools.pairwise(ordered))

    reshapes = [n for n in proto.graph.node if n.op_type in MOVES and n.op_type != "Transpose"]
    return not all(chain_of(shapes[n.input[0]], shapes[n.output[0]]) for n in reshapes)


@settings(RANDOM, max_examples=60)
@given(chains(), st.integers(0, 99))
def test_names_and_order_of_nodes_do_not_matter(chain, seed):
    proto = chain.proto()
    other = renamed(shuffled(proto, seed))
    after, removed = collapsed(proto)
    again, as_many = collapsed(other)
    assert removed == as_many
    assert sorted(ops(again)) == sorted(ops(after))
    same_bits(other, again, **{other.graph.input[0].name: numbers(chain.shape, chain.dtype)})


def shuffled(proto, seed):
    """A copy whose nodes are in another order that is topological too."""
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    del copy.graph.node[:]
    copy.graph.node.extend(rewriting.shuffled(proto.graph.node, seed + 1))
    return copy


def renamed(proto):
    """A copy with other names, some of which the pass would choose itself."""
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    names = {out for n in copy.graph.node for out in n.output} | {v.name for v in copy.graph.input}
    new = {name: f"y{'/move' * i}" for i, name in enumerate(sorted(names))}
    for n in copy.graph.node:
        for field in (n.input, n.output):
            field[:] = [new.get(name, name) for name in field]
    for field in (copy.graph.input, copy.graph.output, copy.graph.value_info):
        for info in field:
            info.name = new.get(info.name, info.name)
    return copy
