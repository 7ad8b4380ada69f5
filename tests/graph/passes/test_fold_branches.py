"""fold_branches: the same outputs up to the borders, for less; near-misses left as they are."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.export.trace import quiet
from meta_deploy.graph.graph import to_graph, to_proto
from meta_deploy.graph.passes.clean_up import clean_up
from meta_deploy.graph.passes.collapse_chains import collapse_chains
from meta_deploy.graph.passes.fold_branches import fold_branches
from meta_deploy.graph.passes.slices_to_split import slices_to_split
from meta_deploy.graph.prices import CPU, GPU, Cost
from meta_deploy.models.backbones.mea import MEABlock
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, TYPES, feeds, form, node, ops, price, same
from tests.small_graphs import inferred, model, run, value

FEW_NODES = Cost(node=10**12, value=0)  # everything that folds is folded
FEW_MACS = Cost(node=0, value=0)
FEW_VALUES = Cost(node=0, value=10**9)
BIASES = ("none", "own", "add", "first")


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution to vary; `bias` is "none", its "own", in an "add" or there "first"."""

    out: int = 4
    k: int = 3
    group: int = 1
    bias: str = "own"
    attrs: dict = dataclasses.field(default_factory=dict)  # instead of the padding that keeps the size
    op: str = "Conv"


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of tokens with a matrix."""

    out: int = 4
    bias: str = "add"


@dataclasses.dataclass(frozen=True)
class Branch:
    """Layers one after another: linear maps; "last" and "first", which move the channels; other operators.

    `source` is a `Fuse`, the number of channels of an input of its own, or the name of one that is shared,
    of as many channels as letters.
    """

    layers: tuple = ("Relu", Conv())
    source: object = 4
    tokens: bool = False  # the source has its channels last


@dataclasses.dataclass(frozen=True)
class Fuse:
    """A convolution over a Concat of branches, or over a branch itself."""

    branches: tuple = (Branch(),)
    conv: Conv = Conv(6, 1)
    axis: int = 1


TOKENS = Branch(("Relu", Product(), "first"), tokens=True)
MIXED = (Branch(), TOKENS, Branch(("Relu",)), Branch(("Relu", Conv(3, 1, 1, "none")), 6))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of one or several convolutions and what makes their inputs, to vary.

    A branch's tensors are called after it and the layer that makes them: "0/1/2" is what the layer 2 of the
    branch 1 of the model's only convolution makes; products before their bias end in "p", weights in "w".
    """

    fuses: tuple = (Fuse(),)
    batch: int = 2
    size: tuple = (3, 4)
    end: str = "Identity"  # what reads a convolution; "" if it is the output itself
    dtype: str = "float32"
    prefix: str = ""

    def proto(self):
        self.__dict__.update(nodes=[], initializers=[], inputs=[], rng=np.random.default_rng(5))
        outputs = []
        for i, fuse in enumerate(self.fuses):
            y, _ = self._fuse(fuse, f"{i}")
            if self.end:
                self.nodes.append(node(self.end, [y], [self.n(f"y{i}")]))
                y = self.n(f"y{i}")
            outputs.append(y)
        return typed(self.nodes, self.inputs, outputs, self.initializers, self.dtype)

    def n(self, name):
        return self.prefix + name

    def _fuse(self, fuse, name):
        parts = [self._branch(branch, f"{name}/{i}") for i, branch in enumerate(fuse.branches)]
        x, channels = parts[0]
        if len(parts) > 1:
            x, channels = self.n(f"{name}/cat"), sum(part[1] for part in parts)
            self.nodes.append(node("Concat", [part[0] for part in parts], [x], axis=fuse.axis))
        return self._linear(fuse.conv, x, channels, f"{name}/y")

    def _branch(self, branch, name):
        x, channels = branch.source, branch.source
        if isinstance(branch.source, Fuse):
            x, channels = self._fuse(branch.source, f"{name}/in")
        else:
            x = self.n(f"x{name}" if isinstance(x, int) else x)
            channels = channels if isinstance(channels, int) else len(channels)
            shape = (
                [self.batch, *self.size, channels] if branch.tokens else [self.batch, channels, *self.size]
            )
            if all(x != known.name for known in self.inputs):
                self.inputs.append(value(x, shape, TYPES[self.dtype]))
        for i, layer in enumerate(branch.layers):
            out = f"{name}/{i}"
            if isinstance(layer, (Conv, Product)):
                x, channels = self._linear(layer, x, channels, out)
                continue
            perm = {"last": [0, 2, 3, 1], "first": [0, 3, 1, 2]}.get(layer)
            op, attrs = ("Transpose", {"perm": perm}) if perm else (layer, {})
            self.nodes.append(node(op, [x], [self.n(out)], **attrs))
            x = self.n(out)
        return x, channels

    def _constant(self, name, shape):
        array = self.rng.standard_normal(shape).astype(self.dtype)
        self.initializers.append(numpy_helper.from_array(array, self.n(name)))
        return self.n(name)

    def _linear(self, linear, x, channels, name):
        if isinstance(linear, Product):
            op, size, rank, attrs = "MatMul", [channels, linear.out], 1, {}
        else:
            op, rank = linear.op, 3
            size = [linear.out, channels // linear.group, linear.k, linear.k]
            if op == "ConvTranspose":
                size[:2] = [channels, linear.out // linear.group]
            attrs = dict(linear.attrs or {"pads": [linear.k // 2] * 4})
            if linear.group > 1:
                attrs["group"] = linear.group
        inputs = [x, self._constant(f"{name}w", size)]
        if linear.bias == "own":
            inputs.append(self._constant(f"{name}b", [linear.out]))
        apart = linear.bias in ("add", "first")
        self.nodes.append(node(op, inputs, [self.n(f"{name}p" if apart else name)], **attrs))
        if apart:
            terms = [self.n(f"{name}p"), self._constant(f"{name}a", [linear.out] + [1] * (rank - 1))]
            self.nodes.append(node("Add", terms[:: -1 if linear.bias == "first" else 1], [self.n(name)]))
        return self.n(name), linear.out


def typed(nodes, inputs, outputs, initializers, dtype="float32"):
    """A model whose outputs, given by name, have a type and get a shape."""
    outputs = [helper.make_empty_tensor_value_info(name) for name in outputs]
    for out in outputs:
        out.type.tensor_type.elem_type = TYPES[dtype]
    return model(nodes, inputs, outputs, initializers)


def rewritten(proto, cost=GPU, shuffle=0):
    return rewriting.rewritten(fold_branches, proto, cost, shuffle=shuffle)


def agree(proto, cost=GPU, changes=None):
    """As `rewriting.agree`, for less."""
    after = rewriting.agree(fold_branches, proto, None, changes, cost)
    assert (price(after, cost) < price(proto, cost)) == (form(after) != form(proto))
    return after


def declined(proto, cost=FEW_NODES, values=None, runs=True):
    rewriting.agree(fold_branches, proto, values, 0, cost, valid=False, runs=runs)


def convs(proto):
    """The sizes of all kernels: (out, in / group, k)."""
    sizes = {i.name: i.dims for i in proto.graph.initializer}
    return sorted(tuple(sizes[n.input[1]][:3]) for n in proto.graph.node if n.op_type == "Conv")


# --- what folds ---


@pytest.mark.parametrize("fuse_bias", BIASES)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    ("layers", "size"),
    [
        ((Conv(k=1),), 1),
        ((Conv(k=3),), 3),
        ((Conv(k=5),), 5),
        ((Conv(8, 3, 4),), 3),
        ((Conv(4, 3, 2), Conv(6, 1), Conv(4, 1, 2)), 3),
        (("last", Product(), "first"), 1),
        (("last", Product(3), Product(5), "first"), 1),
    ],
)
def test_linear_maps_become_one_convolution(layers, size, bias, fuse_bias):
    layers = [
        dataclasses.replace(layer, bias="add" if bias == "own" and isinstance(layer, Product) else bias)
        if not isinstance(layer, str)
        else layer
        for layer in layers
    ]
    fuse = Fuse((Branch(("Relu", *layers)),), Conv(6, 1, 1, fuse_bias))
    after = agree(Case((fuse,)).proto())
    assert convs(after) == [(6, 4, size)]
    assert ops(after).count("MatMul") == ops(after).count("Add") == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (4, 3), (9, 8)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_bias_is_seen_at_the_border_as_it_was(size, dtype):
    """The bias of what is padded by zeros stays where it is: beyond the border it would not be zero."""
    layers = (Conv(5, 1), Conv(4, 3), Conv(3, 5), Conv(6, 1))
    after = agree(Case((Fuse((Branch(layers),)),), size=size, dtype=dtype).proto(), FEW_NODES)
    assert convs(after) == [(4, 5, 3), (5, 4, 1), (6, 4, 5)]


@pytest.mark.parametrize("axis", [1, -3])
def test_branches_become_one_convolution(axis):
    after = agree(Case((Fuse(MIXED, axis=axis),)).proto(), GPU, 1)
    assert convs(after) == [(6, 18, 3)]
    assert Counter(ops(after)) == {"Relu": 4, "Transpose": 1, "Concat": 1, "Conv": 1, "Identity": 1}


def test_where_nodes_are_free_sizes_stay_apart():
    widening = (
        Branch(("Relu", Conv(12, 3))),
        Branch(("Relu",)),
        Branch(("Relu", Conv(12, 1))),
        Branch((Conv(8, 5),)),
    )
    after = agree(Case((Fuse(widening),)).proto(), FEW_MACS, 1)
    assert convs(after) == [(6, 4, 3), (6, 4, 5), (6, 8, 1)]
    assert Counter(ops(after)) == {"Relu": 3, "Concat": 1, "Conv": 3, "Add": 2, "Identity": 1}


def test_what_would_take_more_stays():
    """A bottleneck is no cheaper as one product; the other branch is."""
    narrow = Branch(("Relu", Conv(2, 3)), 20)
    after = agree(Case((Fuse((narrow, Branch(("Relu", Conv(12))))),)).proto(), FEW_MACS, 1)
    assert convs(after) == [(2, 20, 3), (6, 2, 1), (6, 4, 3)]
    declined(Case((Fuse((narrow,)),)).proto(), FEW_MACS)


@pytest.mark.parametrize(("out", "folds"), [(4, False), (5, True)])
def test_a_product_folds_where_that_takes_less(out, folds):
    """20 channels to 6 take 120 multiplications a place, by way of others 26 of each."""
    tokens = Branch(("Relu", Product(out), "first"), 20, tokens=True)
    after = agree(Case((Fuse((tokens,)),)).proto(), FEW_MACS, int(folds))
    assert ops(after).count("MatMul") == 1 - folds


def test_a_wider_map_to_transpose_is_paid_for():
    """A product that makes 40 channels 2 leaves little to be transposed."""
    branch = Branch(("Relu", Product(2), "first"), 40, tokens=True)
    cost = Cost(node=0, value=100)
    after = agree(Case((Fuse((branch,), Conv(1, 1)),)).proto(), cost)
    assert ops(after).count("MatMul") == 1


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_keep_their_type(dtype):
    after = agree(Case((Fuse(MIXED),), dtype=dtype).proto(), GPU, 1)
    assert {i.data_type for i in after.graph.initializer} == {TYPES[dtype]}


def test_what_float16_cannot_hold_is_left():
    proto = Case((Fuse((Branch(("Relu", Conv(4, 1, 1, "none"))),), Conv(6, 1)),), dtype="float16").proto()
    for tensor in proto.graph.initializer:
        if tensor.name.endswith("w"):
            factor = 1e3 if tensor.name == "0/yw" else 60
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float16(factor), tensor.name)
            )
    declined(proto, runs=False)


def test_shared_weights_stay_for_others():
    proto = Case((Fuse(MIXED),)).proto()
    proto.graph.node.append(node("Conv", ["x0/0", "0/0/1w", "0/0/1b"], ["z"], pads=[1] * 4))
    proto.graph.node.append(node("MatMul", ["x0/1", "0/1/1w"], ["t"]))
    proto.graph.output.extend([value("z", [2, 4, 3, 4]), value("t", [2, 3, 4, 4])])
    after = agree(proto, GPU, 1)
    kept = {i.name: numpy_helper.to_array(i) for i in after.graph.initializer}
    for tensor in proto.graph.initializer:
        if tensor.name in ("0/0/1w", "0/0/1b", "0/1/1w"):
            np.testing.assert_array_equal(kept[tensor.name], numpy_helper.to_array(tensor))


def test_one_weight_for_all():
    proto = Case((Fuse((Branch(("Relu", Conv(4, 1, 1, "none"), Conv(4, 1, 1, "none"))), Branch())),)).proto()
    for n in proto.graph.node:
        for i, name in enumerate(n.input):
            if name == "0/0/2w":
                n.input[i] = "0/0/1w"
    assert convs(agree(proto, FEW_NODES, None)) == [(6, 8, 3)]


def test_the_output_of_the_graph_keeps_its_name():
    after = agree(Case((Fuse(MIXED),), end="").proto(), GPU, 1)
    assert [output.name for output in after.graph.output] == ["0/y"]


def test_branches_of_one_source():
    layers = ((Conv(5, 3),), (Conv(3, 1),), (Conv(4, 5, 4),), ())
    after = agree(Case((Fuse(tuple(Branch(part, "four") for part in layers)),)).proto(), FEW_NODES, 1)
    assert convs(after) == [(6, 16, 5)]


def test_what_was_folded_is_folded_further():
    inner = Fuse((Branch((Conv(5, 3),)), Branch(("Relu",))), Conv(4, 1))
    after = agree(Case((Fuse((Branch((), inner), Branch())),)).proto(), FEW_NODES)
    assert convs(after) == [(6, 12, 3)]


def test_a_part_of_a_sum_takes_in_more_by_itself():
    """Beside the widest map the narrow one would cost a Concat; beside the other it cost one as it was."""
    branches = (Branch(("Relu", Conv(8, 3)), 40), Branch(("Relu",), 20), Branch(("Relu", Conv(8, 3))))
    after = agree(Case((Fuse(branches, Conv(1, 1)),)).proto(), Cost(node=0, value=100), 2)
    assert convs(after) == [(1, 4, 3), (1, 20, 1), (1, 40, 3)]
    assert ops(after).count("Concat") == 0


def test_dead_nodes_read_nothing():
    proto = Case().proto()
    proto.graph.node.append(node("Neg", ["0/0/1"], ["dead"]))
    assert convs(agree(proto, GPU, 1)) == [(6, 4, 3)]


# --- near-misses ---

CONVS, PRODUCT = Case().proto, Case((Fuse((TOKENS,)),)).proto


def made_by(proto, name):
    return next(n for n in proto.graph.node if name in n.output)


@pytest.mark.parametrize("name", ["0/0/1", "0/0/1p"])
@pytest.mark.parametrize("how", ["read", "output", "twice"])
def test_what_others_read_is_left(name, how):
    case = Case((Fuse((Branch(("Relu", Conv(bias="add"))),)),))
    proto = case.proto()
    if how == "output":
        proto.graph.output.append(value(name, [2, 4, 3, 4]))
    elif how == "read":
        proto.graph.node.append(node("Neg", [name], ["z"]))
        proto.graph.output.append(value("z", [2, 4, 3, 4]))
    else:
        proto.graph.node.append(node("Add", [name, name], ["z"]))
        proto.graph.output.append(value("z", [2, 4, 3, 4]))
    declined(proto)


@pytest.mark.parametrize("name", ["0/0/1", "0/0/1p", "0/0/2"])
@pytest.mark.parametrize("output", [True, False])
def test_tokens_that_others_read_are_left(name, output):
    proto = PRODUCT()
    shape = [2, 4, 3, 4] if name.endswith("2") else [2, 3, 4, 4]
    if output:
        proto.graph.output.append(value(name, shape))
    else:
        proto.graph.node.append(node("Neg", [name], ["z"]))
        proto.graph.output.append(value("z", shape))
    declined(proto)


@pytest.mark.parametrize("name", ["0/0/1w", "0/0/1b", "0/yw", "0/yb"])
def test_a_weight_that_is_computed_is_left(name):
    proto = CONVS()
    weight = next(i for i in proto.graph.initializer if i.name == name)
    proto.graph.input.append(value(name, list(weight.dims)))
    proto.graph.initializer.remove(weight)
    declined(proto)


@pytest.mark.parametrize(
    "conv",
    [
        Conv(attrs={"strides": [2, 2], "pads": [1] * 4}),
        Conv(attrs={"strides": [1, 2], "pads": [1] * 4}),
        Conv(k=1, attrs={"strides": [2, 2]}),
        Conv(attrs={"dilations": [2, 2], "pads": [2] * 4}),
        Conv(attrs={"dilations": [2, 2], "pads": [1] * 4}),
        Conv(attrs={"pads": [0, 0, 2, 2]}),
        Conv(attrs={"pads": [2, 2, 0, 0]}),
        Conv(attrs={"pads": [1, 0, 1, 0]}),
        Conv(attrs={"pads": [0] * 4}),
        Conv(attrs={"pads": [2] * 4}),
        Conv(attrs={"auto_pad": "VALID"}),
        Conv(attrs={"auto_pad": "SAME_UPPER"}),
        Conv(attrs={"auto_pad": "SAME_LOWER"}),
        Conv(k=1, attrs={"pads": [1] * 4}),
        Conv(k=2, attrs={"pads": [0, 0, 1, 1]}),
        Conv(k=2, attrs={"pads": [1] * 4}),
        Conv(k=4, attrs={"pads": [2, 2, 1, 1]}),
        Conv(k=9),
        Conv(op="ConvTranspose"),
        Conv(k=1, op="ConvTranspose"),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", ["none", "own"])
def test_a_convolution_of_another_kind_is_left(conv, bias):
    fuse = Fuse((Branch(("Relu", dataclasses.replace(conv, bias=bias))),))
    declined(Case((fuse,), size=(5, 4)).proto())


@pytest.mark.parametrize("size", [(1, 3), (3, 1)])
@pytest.mark.parametrize("pads", [None, [0] * 4, [1] * 4])
def test_an_oblong_kernel_is_left(size, pads):
    proto = CONVS()
    conv = made_by(proto, "0/0/1")
    conv.attribute[0].ints[:] = pads or [size[0] // 2, size[1] // 2] * 2
    weight = next(i for i in proto.graph.initializer if i.name == conv.input[1])
    weight.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(weight)[:, :, : size[0], : size[1]], weight.name)
    )
    declined(inferred(proto))


@pytest.mark.parametrize(
    "conv",
    [
        Conv(6, 3),
        Conv(6, 1, 2),
        Conv(6, 1, attrs={"strides": [2, 2]}),
        Conv(6, 1, attrs={"pads": [1] * 4}),
        Conv(6, 1, attrs={"pads": [0, 0, 1, 0]}),
        Conv(6, 1, attrs={"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        Conv(6, 1, op="ConvTranspose"),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("branches", [(Branch(),), MIXED])
def test_a_reader_of_another_kind_is_left(conv, bias, branches):
    if conv.group > 1 and len(branches) > 1:
        branches = (*branches[:3], Branch(("Relu", Conv(2, 1)), 6))
    declined(Case((Fuse(branches, dataclasses.replace(conv, bias=bias)),)).proto())


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
def test_a_reader_that_pads_nothing_is_taken(auto_pad):
    conv = Conv(6, 1, attrs={"auto_pad": auto_pad})
    agree(Case((Fuse(conv=conv),)).proto(), GPU, 1)


@pytest.mark.parametrize("perm", list(itertools.permutations(range(4))))
def test_tokens_in_another_order_are_left(perm):
    """All sizes alike: shapes don't tell."""
    proto = Case((Fuse((TOKENS,)),), batch=4, size=(4, 4)).proto()
    made_by(proto, "0/0/2").attribute[0].ints[:] = perm
    if perm == (0, 3, 1, 2):
        assert "MatMul" not in ops(agree(proto, GPU, 1))
    else:
        declined(proto)


@pytest.mark.parametrize("op", ["product", "convolution"])
def test_channels_elsewhere_are_left(op):
    """A product over the width, a convolution over tokens: all sizes alike, shapes don't tell."""
    layer = ("Relu", Product(), "last", "first") if op == "product" else ("Relu", Conv(k=1), "first")
    declined(Case((Fuse((Branch(layer),)),), batch=2, size=(4, 4)).proto())
    layer = ("Relu", Product()) if op == "product" else ("Relu", "last", Conv(k=1), "first")
    declined(Case((Fuse((Branch(layer),)),), batch=2, size=(4, 4)).proto())


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 4), (3, 1, 1), (4, 1), (1, 4, 1), (2, 3, 4, 4), (1, 1, 1, 1, 4), (2, 1, 1, 1)]
)
def test_what_is_no_bias_is_left(shape):
    proto = PRODUCT()
    bias = next(i for i in proto.graph.initializer if i.name == "0/0/1a")
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    bias.CopyFrom(numpy_helper.from_array(array, bias.name))
    if len(shape) == 5:
        made_by(proto, "0/0/2").input[0] = "flat"
        proto.graph.node.insert(3, node("Squeeze", ["0/0/1", "zero"], ["flat"]))
        proto.graph.initializer.append(numpy_helper.from_array(np.array([0]), "zero"))
    declined(inferred(proto))


@pytest.mark.parametrize("size", [(3, 4, 4), (1, 4, 4)])
def test_a_stack_of_matrices_is_left(size):
    proto = PRODUCT()
    weight = next(i for i in proto.graph.initializer if i.name == "0/0/1w")
    array = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    declined(proto)


def test_a_matrix_from_the_left_is_left():
    proto = Case((Fuse((TOKENS,)),), size=(4, 4)).proto()
    product = made_by(proto, "0/0/1p")
    product.input[:] = [product.input[1], product.input[0]]
    declined(proto)


@pytest.mark.parametrize("axis", [2, 3, -1, 0, -4])
def test_a_concat_along_another_axis_is_left(axis):
    proto = Case((Fuse((Branch(), Branch()), Conv(6, 1)),)).proto()
    made_by(proto, "0/cat").attribute[0].i = axis
    weight = next(i for i in proto.graph.initializer if i.name == "0/yw")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, :4], weight.name))
    declined(inferred(proto))


@pytest.mark.parametrize("output", [True, False])
def test_a_concat_that_others_read_is_left(output):
    proto = Case((Fuse(MIXED),)).proto()
    if not output:
        proto.graph.node.append(node("Neg", ["0/cat"], ["z"]))
    proto.graph.output.append(value("0/cat" if output else "z", [2, 15, 3, 4]))
    declined(proto)


def test_a_concat_with_a_constant_is_left():
    proto = Case((Fuse(MIXED),)).proto()
    made_by(proto, "0/cat").input[2] = "constant"
    array = np.random.default_rng(0).standard_normal((2, 4, 3, 4)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(array, "constant"))
    declined(proto)


def test_a_branch_that_is_there_twice_is_left():
    proto = Case((Fuse((Branch(), Branch())),)).proto()
    made_by(proto, "0/cat").input[1] = "0/0/1"
    declined(proto)


def test_beside_a_branch_that_is_there_twice_others_fold():
    proto = Case((Fuse((Branch(), Branch(), TOKENS)),)).proto()
    made_by(proto, "0/cat").input[1] = "0/0/1"
    after = agree(proto, GPU, 1)
    assert convs(after) == [(4, 4, 3), (6, 12, 1)]
    assert ops(after).count("MatMul") == 0


@pytest.mark.parametrize("branches", [(Branch(),), MIXED])
def test_a_size_that_is_not_known_is_left(branches):
    proto = Case((Fuse(branches),)).proto()
    for i in proto.graph.input:
        i.type.tensor_type.shape.dim[1 if i.name == "x0/1" else 2].dim_param = "n"
    declined(inferred(proto))


@pytest.mark.parametrize("cost", [GPU, FEW_NODES, FEW_MACS], ids=str)
@pytest.mark.parametrize("branches", [(Branch(),), MIXED])
def test_a_batch_of_any_size_is_priced_as_one_image(branches, cost):
    case = Case((Fuse(branches),), batch=1)
    proto = case.proto()
    for i in proto.graph.input:
        i.type.tensor_type.shape.dim[0].dim_param = "n"
    after, changes = rewritten(inferred(proto), cost)
    expected, made = rewritten(case.proto(), cost)
    assert (changes, ops(after)) == (made, ops(expected))
    for batch in (1, 3):
        same(proto, after, feeds(dataclasses.replace(case, batch=batch).proto()))


@pytest.mark.parametrize("branches", [(Branch(),), MIXED])
def test_shapes_that_are_not_known_are_left(branches):
    proto = Case((Fuse(branches),)).proto()
    for i in proto.graph.input:
        i.type.tensor_type.ClearField("shape")
    declined(inferred(proto), values=feeds(Case((Fuse(branches),)).proto()))


def test_nothing_to_convolve_is_left():
    declined(Case((Fuse(MIXED),), batch=0).proto(), runs=False)


def test_a_branch_without_channels_is_left():
    branches = (Branch(("Relu",), 0), Branch(("Relu", Conv(12)), 40))
    declined(Case((Fuse(branches),)).proto(), Cost(node=0, value=10))


def test_somebody_elses_operators_are_left():
    for name in ("0/0/1", "0/y", "0/cat"):
        proto = Case((Fuse((Branch(), Branch())),)).proto()
        made_by(proto, name).domain = "own"
        proto.opset_import.append(helper.make_opsetid("own", 1))
        if name == "0/0/1":
            made_by(proto, "0/1/1").domain = "own"
        declined(proto, runs=False)


@pytest.mark.parametrize("what", ["Relu", "Sigmoid", "Identity", "Neg"])
def test_something_between_is_left(what):
    declined(Case((Fuse((Branch((Conv(), what)),)),)).proto())


def branch_of(proto, taken, outputs):
    """The model with an If that reads tensors of it."""
    one, other = (helper.make_graph(nodes, name, [], [value(out)]) for nodes, name, out in taken)
    for out in (*one.output, *other.output):
        out.type.tensor_type.ClearField("shape")
    proto.graph.node.append(node("If", ["c"], ["z"], then_branch=one, else_branch=other))
    proto.graph.input.append(value("c", [], TensorProto.BOOL))
    proto.graph.output.extend(value(out) for out in outputs)
    return inferred(proto)


@pytest.mark.parametrize("name", ["0/0/1", "0/0/1p"])
def test_what_a_branch_of_an_if_reads_is_left(name):
    proto = Case((Fuse((Branch(("Relu", Conv(bias="add"))),)),)).proto()
    taken = [([node(op, [name], [op])], op, op) for op in ("Neg", "Abs")]
    proto = branch_of(proto, taken, ["z"])
    for c in (True, False):
        declined(proto, values={**feeds(proto), "c": np.array(c)})


@pytest.mark.parametrize("name", ["0/0/0", "0/y"])
def test_what_a_branch_of_an_if_reads_may_be_at_the_ends(name):
    proto = CONVS()
    taken = [([node(op, [name], [op])], op, op) for op in ("Neg", "Abs")]
    proto = branch_of(proto, taken, ["z"])
    after, changes = rewritten(proto)
    assert changes == 1
    for c in (True, False):
        same(proto, after, {**feeds(proto), "c": np.array(c)})


def test_a_bias_that_is_added_in_a_branch_of_an_if_stays_there():
    proto = Case((Fuse(conv=Conv(6, 1, 1, "none")),)).proto()
    del proto.graph.output[:]
    proto.graph.node.remove(made_by(proto, "y0"))
    bias = numpy_helper.from_array(np.ones((6, 1, 1), np.float32), "bias")
    proto.graph.initializer.append(bias)
    taken = [
        ([node("Add", ["0/y", "bias"], ["t"])], "then", "t"),
        ([node("Neg", ["x0/0"], ["e"])], "else", "e"),
    ]
    proto = branch_of(proto, taken, ["z"])
    after, _ = rewritten(proto)
    for c in (True, False):
        same(proto, after, {**feeds(proto), "c": np.array(c)})


def test_what_a_loop_reads_is_left():
    proto = CONVS()
    nodes = [node("Add", ["v", "0/0/1"], ["v_out"]), node("Identity", ["c_in"], ["c_out"])]
    inputs = [
        value("i", [], TensorProto.INT64),
        value("c_in", [], TensorProto.BOOL),
        value("v", [2, 4, 3, 4]),
    ]
    body = helper.make_graph(nodes, "body", inputs, [value("c_out", [], TensorProto.BOOL), value("v_out")])
    body.output[1].type.tensor_type.ClearField("shape")
    proto.graph.node.append(node("Loop", ["times", "", "0/0/0"], ["z"], body=body))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(3), "times"))
    proto.graph.output.append(value("z"))
    declined(inferred(proto))


def test_convolutions_in_a_branch_of_an_if_are_left():
    """Passes go through the graph itself."""
    inner = CONVS()
    taken = [(list(inner.graph.node), "then", "y0"), ([node("Neg", ["x0/0"], ["e"])], "else", "e")]
    proto = model([], inner.graph.input, [value("x0/0")], inner.graph.initializer, infer=False)
    del proto.graph.output[:]
    proto = branch_of(proto, taken, ["z"])
    for c in (True, False):
        declined(proto, values={**feeds(proto), "c": np.array(c)})


# --- random branches ---


def biases(own=True):
    return st.sampled_from(BIASES if own else ("none", "add", "first"))


@st.composite
def layers(draw, channels, tokens, most=4):
    """Layers that end in channels first."""
    result = []
    for _ in range(draw(st.integers(0, most))):
        kind = draw(st.sampled_from(("linear", "linear", "linear", "move", "Relu")))
        out = draw(st.sampled_from((1, 2, 3, 4, 6, 12)))
        if kind == "move":
            result.append("first" if tokens else "last")
            tokens = not tokens
        elif kind == "Relu":
            result.append(kind)
        elif tokens:
            result.append(Product(out, draw(biases(own=False))))
            channels = out
        else:
            group = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
            out = group * draw(st.integers(1, 2)) if group > 1 else out
            k = draw(st.sampled_from((1, 1, 3, 3, 5)))
            odd = (
                draw(st.sampled_from([{}] * 9 + [{"dilations": [2, 2], "pads": [k - k % 2] * 4}]))
                if k > 1
                else {}
            )
            result.append(Conv(out, k, group, draw(biases()), odd))
            channels = out
    return (*result, "first") if tokens else tuple(result)


@st.composite
def fuses(draw, depth=1):
    branches = []
    for _ in range(draw(st.integers(1, 4))):
        tokens = draw(st.booleans())
        if depth and draw(st.sampled_from((0, 0, 1))):
            source, tokens = draw(fuses(depth - 1)), False
            channels = source.conv.out
        else:
            source = draw(st.sampled_from((1, 3, 4, 8, "abc", "wide__")))
            channels = source if isinstance(source, int) else len(source)
            tokens = tokens and isinstance(source, int)
        branches.append(Branch(draw(layers(channels, tokens)), source, tokens))
    conv = Conv(draw(st.sampled_from((1, 2, 5, 9))), 1, 1, draw(biases()))
    return Fuse(tuple(branches), conv, draw(st.sampled_from((1, -3))))


COSTS = st.one_of(
    st.sampled_from((CPU, GPU, FEW_NODES, FEW_MACS, FEW_MACS, FEW_VALUES)),
    st.builds(Cost, st.sampled_from((0, 1, 10, 100, 1000)), st.sampled_from((0, 0.3, 1, 10, 100))),
)


@st.composite
def cases(draw):
    batch, size = draw(st.integers(1, 3)), (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    return Case(
        tuple(draw(fuses()) for _ in range(draw(st.sampled_from((1, 1, 1, 2))))),
        batch,
        size,
        draw(st.sampled_from(("Identity", ""))),
        # What a few numbers add up to may be far less than each of them.
        draw(st.sampled_from(("float32", "float32", "float64"))) if math.prod(size) > 5 else "float64",
    )


@settings(RANDOM, max_examples=100)
@given(cases(), COSTS)
def test_random_branches_give_the_same_for_less(case, cost):
    agree(case.proto(), cost)


@settings(RANDOM, max_examples=40)
@given(cases(), COSTS, st.integers(1, 1000), st.sampled_from(("", "0/", "0/y/", "z")))
def test_names_and_order_do_not_matter(case, cost, shuffle, prefix):
    expected, changes = rewritten(case.proto(), cost)
    other = dataclasses.replace(case, prefix=prefix).proto()
    actual, made = rewritten(other, cost, shuffle=shuffle)
    assert (made, form(actual)) == (changes, form(expected))
    same(other, actual)


def left(layers):
    """What is left of layers before a 1x1 convolution if all is folded that can be, and its kernel's size."""
    rest, size = list(layers), 1
    while rest and size == 1:
        i = len(rest) - 1 - (rest[-1] == "first")
        layer = rest[i] if i >= 0 else None
        if isinstance(layer, Conv if i == len(rest) - 1 else Product) and not getattr(layer, "attrs", {}):
            size = getattr(layer, "k", 1)
            del rest[i]
        else:
            break
    return rest, size


def fewest(fuse):
    """The linear maps that are left in the cheapest form where nodes are dear, the last one with its size."""
    maps, sizes = 0, []
    for branch in fuse.branches:
        rest = []
        for layer in branch.layers:
            if isinstance(layer, Conv) and layer.k == layer.group == 1:
                before, size = left(rest)
                layer, rest = Conv(layer.out, size), before
            rest.append(layer)
        rest, size = left(rest)
        maps += sum(isinstance(layer, (Conv, Product)) for layer in rest)
        sizes.append(size)
    return maps + 1, max(sizes)


@settings(RANDOM, max_examples=40)
@given(st.builds(Case, st.tuples(fuses(depth=0))))
def test_where_nodes_are_dear_all_that_can_be_is_folded(case):
    after = agree(case.proto(), FEW_NODES)
    maps, size = fewest(case.fuses[0])
    assert ops(after).count("Conv") + ops(after).count("MatMul") == maps
    constants = {i.name: i.dims for i in after.graph.initializer}
    last = next(n for n in reversed(after.graph.node) if n.op_type == "Conv")
    assert constants[last.input[1]][2] == size


# --- the real thing ---


@pytest.fixture(scope="module")
def block():
    """A META block and its export."""
    torch.manual_seed(0)
    block = MEABlock(dim=8, num_heads=2, stripe_width=2, ffn_ratio=0.5).eval()
    x = torch.randn(2, 8, 4, 6)
    with torch.no_grad(), quiet():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)
        program = torch.onnx.export(
            block, (x,), dynamo=True, opset_version=20, optimize=False, input_names=["x"], verbose=False
        )
        y = block(x).numpy()
    graph = to_graph(program.model_proto)
    for step in (clean_up, slices_to_split, collapse_chains):
        step(graph)
    return to_proto(graph), x.numpy(), y


def test_a_block_of_the_model_ends_in_one_convolution(block):
    proto, x, y = block
    assert sorted(convs(proto)) == [(4, 8, 3), (8, 1, 3), (8, 4, 3), (8, 8, 1), (8, 24, 1), (16, 8, 1)]
    after, changes = rewritten(proto, GPU)
    assert changes >= 1
    assert convs(after) == [(4, 8, 3), (8, 8 + 4 + 8, 3), (16, 8, 1)]  # conv1, fuse, expand
    assert ops(after).count("MatMul") == ops(proto).count("MatMul") - 1  # the attention's projection
    assert made_by(after, after.graph.output[0].name).op_type == "Conv"
    (actual,) = run(after, x=x).values()
    np.testing.assert_allclose(actual, y, rtol=0, atol=1e-5 * np.abs(y).max())
    assert rewritten(after, GPU)[1] == 0
