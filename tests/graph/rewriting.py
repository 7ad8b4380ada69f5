"""What the tests of the passes share: how a rewrite is run, and what has to be so afterwards."""

import math
import random
from collections import Counter

import numpy as np
import onnx
from hypothesis import HealthCheck, settings
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from meta_deploy.graph.graph import tidy, to_graph, to_proto
from meta_deploy.graph.passes.collapse_chains import collapse_chains
from tests.small_graphs import FLOAT, model, run, value

node = helper.make_node
TYPES = {
    "float32": FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "float64": 1e-13}
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
RANDOM = settings(deadline=None, suppress_health_check=list(HealthCheck))


# --- what is in a model ---


def ops(proto):
    return [n.op_type for n in proto.graph.node]


def contents(proto):
    """Everything that a pass may change, of a model or of a graph in it."""
    graph = getattr(proto, "graph", proto)
    return [*_written(graph), *(part.SerializeToString() for part in graph.initializer)]


def _written(graph):
    """The nodes of a graph, and of those inside, but not the shapes that are known there."""
    plain = [[a for a in n.attribute if a.type != onnx.AttributeProto.GRAPH] for n in graph.node]
    inner = [[_written(a.g) for a in n.attribute if a.type == onnx.AttributeProto.GRAPH] for n in graph.node]
    return [
        (n.op_type, *n.input, *n.output, [a.SerializeToString() for a in attributes], graphs)
        for n, attributes, graphs in zip(graph.node, plain, inner, strict=True)
    ]


def form(proto):
    """What is there, whatever the names and the order."""
    sizes = {i.name: tuple(i.dims) for i in proto.graph.initializer}
    return Counter((n.op_type, *(sizes.get(name, ()) for name in n.input)) for n in proto.graph.node)


def feeds(proto, batch=2):
    """Random numbers for each input of a model, `batch` for sizes that have a name."""
    rng, arrays = np.random.default_rng(3), {}
    for i in proto.graph.input:
        kind = helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type)
        size = [batch if d.dim_param else d.dim_value for d in i.type.tensor_type.shape.dim]
        arrays[i.name] = np.array(rng.standard_normal(size)).astype(kind)
    return arrays


# --- rewriting, and what has to be so ---


def rewritten(rewrite, proto, *args, shuffle=0):
    """The new model and the changes made; with a seed, from a graph whose nodes are in any order."""
    graph = to_graph(proto)
    if shuffle:
        random.Random(shuffle).shuffle(graph.nodes)
    changes = rewrite(graph, *args)
    if shuffle:
        tidy(graph)
    return to_proto(graph), changes


def same(proto, after, values=None, tolerance=None, floor=0.0):
    """Assert outputs alike in name, order, type and shape, and in value, relative to the largest.

    Args:
        tolerance: of the widest error; None for what the inputs' type allows.
        floor: what the largest value is taken for where it is less.
    """
    values = feeds(proto) if values is None else values
    dtype = next((str(a.dtype) for a in values.values() if a.dtype.kind == "f"), "float32")
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    expected, actual = _run(proto, values, dtype), _run(after, values, dtype)
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        if not tolerance or array.dtype.kind != "f":
            np.testing.assert_array_equal(actual[name], array)
            continue
        array, got = array.astype(np.float64), actual[name].astype(np.float64)
        scale = max(np.abs(array[np.isfinite(array)]).max(initial=0), floor)
        np.testing.assert_allclose(got, array, rtol=0, atol=tolerance * scale, err_msg=name)


def _run(proto, values, dtype):
    if dtype != "float64" or "Conv" not in "".join(ops(proto)):
        return run(proto, **values)
    names = [output.name for output in proto.graph.output]  # ONNX Runtime cannot convolve them
    return dict(zip(names, ReferenceEvaluator(proto).run(None, values), strict=True))


def agree(
    rewrite,
    proto,
    values=None,
    changes=None,
    *args,
    shuffle=0,
    collapse=False,
    valid=True,
    runs=True,
    **alike,
):
    """The new model, after asserting that it is valid, answers as before, and is left alone by a second run.

    Args:
        values: of the inputs; None for random ones.
        changes: to be made; None for any number.
        args: for the rewrite, behind the graph.
        shuffle: a seed for the order of the graph's nodes.
        collapse: whether collapsing chains afterwards must not change anything either.
        valid: whether ONNX's checker knows all operators.
        runs: whether the model can be run, or is not worth it.
        alike: for `same`.
    """
    after, made = rewritten(rewrite, proto, *args, shuffle=shuffle)
    assert changes in (None, made)
    if valid:
        onnx.checker.check_model(after, full_check=True)
    if runs:
        same(proto, after, values, **alike)
    if collapse and made:
        same(proto, rewritten(collapse_chains, after)[0], values, **alike)
    again, more = rewritten(rewrite, after, *args)
    assert more == 0
    assert contents(again) == contents(after)
    if not made:
        untouched = [rewritten(nothing, proto, shuffle=shuffle)[0] for nothing in (lambda graph: 0, tidy)]
        assert contents(after) in map(contents, untouched)
    return after


def agree_among_moves(rewrite, proto, values, changes=None, dtype="float32"):
    """As `agree`; and collapsing chains first, or afterwards, leaves nothing to do either."""
    tolerance = {"float32": 1e-5, "float16": 4e-3}[dtype]
    after = agree(rewrite, proto, values, changes, collapse=True, tolerance=tolerance, floor=1e-6)
    graph = to_graph(proto)
    for step in (collapse_chains, rewrite, collapse_chains):
        step(graph)
    assert rewrite(graph) == 0
    return after


def shuffled(nodes, seed):
    """The nodes in another order in which each still follows what it reads; 0 leaves it."""
    rng, left, order, made = np.random.default_rng(seed), list(nodes), [], set()
    outputs = {name for n in nodes for name in n.output}
    while left:
        ready = [
            i for i, n in enumerate(left) if all(name in made or name not in outputs for name in read(n))
        ]
        order.append(left.pop(ready[rng.integers(len(ready)) if seed else 0]))
        made.update(order[-1].output)
    return order


def read(n):
    """The names that a node reads, in its branches, too."""
    inner = [a.g for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*n.input, *(name for graph in inner for each in graph.node for name in read(each))]


def both_branches(names, condition, out):
    """An If that reads tensors from outside: the sum of all their elements, or its negative."""
    branches = []
    for side in ("then", "else"):
        nodes, sums = [], []
        for i, name in enumerate(names):
            sums.append(f"{out}/{side}{i}")
            nodes.append(node("Cast", [name], [f"{sums[-1]}/cast"], to=FLOAT))
            nodes.append(node("ReduceSum", [f"{sums[-1]}/cast"], [sums[-1]], keepdims=0))
        nodes.append(node("Sum", sums, [f"{out}/{side}"]))
        if side == "else":
            nodes.append(node("Neg", [f"{out}/else"], [f"{out}/negative"]))
        branches.append(helper.make_graph(nodes, side, [], [value(nodes[-1].output[0], [])]))
    return node("If", [condition], [out], then_branch=branches[0], else_branch=branches[1])


def put_inside(proto, tensors):
    """The same model with all that needs these tensors inside of an If, whose other side is zeros."""
    late, inside, outside = set(tensors), [], []
    for n in proto.graph.node:
        if late.intersection(n.input):
            inside.append(n)
            late.update(n.output)
        else:
            outside.append(n)
    (out,) = proto.graph.output
    shape = [d.dim_value for d in out.type.tensor_type.shape.dim]
    known = [info for info in proto.graph.value_info if info.name in late]
    then = helper.make_graph(inside, "then", [], [out], value_info=known)
    zeros = node("Expand", ["zero", "shape"], ["zeros"])
    other = helper.make_graph([zeros], "else", [], [value("zeros", shape)])
    outside.append(node("If", ["c"], ["z"], then_branch=then, else_branch=other))
    constants = {"zero": np.float32(0), "shape": np.array(shape)}
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    inputs = [*proto.graph.input, value("c", [], TensorProto.BOOL)]
    return model(outside, inputs, [value("z", shape)], [*proto.graph.initializer, *constants])


def moves_of(proto):
    """Moves that are left when chains of them are collapsed, also those that end in an output."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    for out in proto.graph.output:
        proto.graph.node.append(node("Identity", [out.name], [f"{out.name}/end"]))
        out.name += "/end"
    return sum(op in MOVES for op in ops(rewritten(collapse_chains, proto)[0]))


def loop(inner, outputs, reads):
    """A Loop of three rounds whose body is `inner`, a graph of what it scans out."""
    names = [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL)]
    body = helper.make_graph(
        [node("Identity", ["go"], ["going"]), *inner],
        "body",
        names,
        [value("going", [], TensorProto.BOOL), *outputs],
    )
    return node("Loop", ["rounds", ""], reads, body=body)


def sizes_of(proto):
    """The shapes of all tensors but constants."""
    proto = onnx.shape_inference.infer_shapes(proto)
    infos = [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in infos}


def price(proto, cost):
    """What a whole model costs, node by node; weights and biases are not counted as read."""
    constants = {i.name: list(i.dims) for i in proto.graph.initializer}
    shapes = {**constants, **sizes_of(proto)}
    total = 0
    for n in proto.graph.node:
        if n.op_type == "If":
            continue
        ys, x = [shapes[name] for name in n.output], shapes[n.input[0]]
        read, macs = [x], 0
        if n.op_type == "Add":
            read = [s for s in (shapes[name] for name in n.input) if s == ys[0]]
        elif n.op_type in ("Conv", "ConvTranspose"):
            macs = math.prod(ys[0] if n.op_type == "Conv" else x) * math.prod(shapes[n.input[1]][1:])
        elif n.op_type in ("MatMul", "Gemm"):
            macs = math.prod(ys[0]) * x[-1]
        total += cost.of(macs, *read, *ys)
    return total


class Writer:
    """A model that is being written, of a case that has a dtype, an opset, and `n` that gives names."""

    def __init__(self, case, seed=5):
        self.case, self.n, self.kind = case, case.n, TYPES[case.dtype]
        self.nodes, self.initializers, self.inputs = [], [], []
        self.rng = np.random.default_rng(seed)

    def input(self, name, shape, kind=None):
        self.inputs.append(value(self.n(name), shape and list(shape), kind or self.kind))
        return self.n(name)

    def constant(self, name, array, dtype=None):
        """A constant of the case's type, or another; a name that is there already stays as it is."""
        name = self.n(name)
        if all(name != known.name for known in self.initializers):
            array = np.asarray(array, dtype or self.case.dtype)
            self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def numbers(self, name, shape):
        return self.constant(name, self.rng.standard_normal(shape))

    def floats(self, array):
        return self.constant(f"c{len(self.initializers)}", array)

    def integers(self, values):
        return self.constant(f"c{len(self.initializers)}", values, np.int64)

    def add(self, op, inputs, out, **attrs):
        self.nodes.append(node(op, inputs, [self.n(out)], **attrs))
        return self.n(out)

    def model(self, outputs, reader="", output="", branch="", shuffle=0):
        """The model, where another node reads a tensor, one is an output as well, one is read in an If."""
        outputs, inputs, nodes = list(outputs), list(self.inputs), list(self.nodes)
        if reader:
            nodes.append(node("Neg", [reader], [self.n("read")]))
            outputs.append(self.n("read"))
        if output and output not in outputs:
            outputs.insert(0, output)
        if branch:
            inputs.append(value(self.n("c"), [], TensorProto.BOOL))
            nodes.append(both_branches([branch], self.n("c"), self.n("branch")))
            outputs.append(self.n("branch"))
        infos = [helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(outputs)]
        for info in infos:
            info.type.tensor_type.elem_type = FLOAT if info.name == self.n("branch") else self.kind
        imports = [helper.make_opsetid("", self.case.opset)]
        nodes = shuffled(nodes, shuffle)
        return model(nodes, inputs, infos, self.initializers, opset_imports=imports)
