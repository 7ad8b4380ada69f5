"""Bytes moved are those of the arrays that flow when ONNX Runtime runs the graph with nothing left out."""

import itertools
import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.graph.graph import to_graph, to_proto
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.graph.traffic import bytes_known, bytes_moved
from meta_deploy.targets import TARGETS
from tests.graph.rewriting import node
from tests.small_graphs import calls, model, run, value
from tests.tiny_models import other


def ints(name, *numbers):
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


# --- the reference ---

# What an operator reads of its arrays (inputs, outputs); it writes its outputs.
READS = {
    **dict.fromkeys(["Slice", "Split"], lambda i, o: sum(a.nbytes for a in o)),
    **dict.fromkeys(["Gather", "GatherElements", "GatherND"], lambda i, o: i[1].nbytes + o[0].nbytes),
    **dict.fromkeys(["Concat", "ScatterND", "ScatterElements"], lambda i, o: sum(a.nbytes for a in i)),
    **dict.fromkeys(
        ["Transpose", "Pad", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"], lambda i, o: i[0].nbytes
    ),
    **dict.fromkeys(
        ["LayerNormalization", "BatchNormalization", "InstanceNormalization"], lambda i, o: i[0].nbytes
    ),
}


def by_running(proto, feeds):
    """The bytes by what ONNX Runtime computes, every tensor an output."""
    everything = onnx.ModelProto()
    everything.CopyFrom(proto)
    there = {output.name for output in proto.graph.output}
    names = [name for n in proto.graph.node for name in n.output if name and name not in there]
    everything.graph.output.extend(map(helper.make_empty_tensor_value_info, names))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    arrays |= feeds | run(everything, **feeds)
    total = 0
    for n in proto.graph.node:
        if n.op_type in READS and not n.domain:
            outputs = [arrays[name] for name in n.output if name]
            total += READS[n.op_type]([arrays[name] for name in n.input if name], outputs)
            total += sum(array.nbytes for array in outputs)
    return total


# --- graphs ---

START = {"x": ((2, 4, 6, 8), np.float32), "i": ((3, 5), np.int64)}


class Sketch:
    """A graph under construction, of steps that `data` draws."""

    def __init__(self, data):
        self.data = data
        self.nodes, self.constants = [], []
        self.tensors = dict(START)

    def draw(self, strategy):
        return self.data.draw(strategy)

    def add(self, op, inputs, shapes, dtype, **attributes):
        names = [f"t{len(self.tensors) + k}" for k in range(len(shapes))]
        self.nodes.append(node(op, inputs, names, **attributes))
        self.tensors |= {name: (tuple(s), dtype) for name, s in zip(names, shapes, strict=True)}

    def numbers(self, *values):
        self.constants.append(ints(f"c{len(self.constants)}", *values))
        return self.constants[-1].name

    def step(self):
        name = self.draw(st.sampled_from(list(self.tensors)))
        shape, dtype = self.tensors[name]
        if math.prod(shape) > 5000:
            return
        steps = ["transpose", "slice", "split", "concat", "pad", "gather", "expand", "tile"]
        steps += ["reshape", "cast"]
        if len(shape) == 4 and shape[1] % 4 == 0:
            steps.append("depth_to_space")
        if dtype == np.float32:
            steps += ["layer_norm", "relu"]
        getattr(self, self.draw(st.sampled_from(steps)))(name, shape, dtype)

    def axis(self, shape):
        return self.draw(st.integers(0, len(shape) - 1))

    def transpose(self, name, shape, dtype):
        perm = self.draw(st.permutations(range(len(shape))))
        self.add("Transpose", [name], [[shape[p] for p in perm]], dtype, perm=perm)

    def reshape(self, name, shape, dtype):
        op, new = self.draw(st.sampled_from([("Reshape", (-1, shape[-1])), ("Unsqueeze", (1, *shape))]))
        given = self.numbers(*(new if op == "Reshape" else [0]))
        self.add(op, [name, given], [(math.prod(shape[:-1]), shape[-1]) if op == "Reshape" else new], dtype)

    def slice(self, name, shape, dtype):
        axis = self.axis(shape)
        start = self.draw(st.integers(0, shape[axis] - 1))
        end = self.draw(st.integers(start + 1, shape[axis]))
        step = self.draw(st.integers(1, 2))
        cut = [self.numbers(k) for k in (start, end, axis, step)]
        new = (*shape[:axis], len(range(start, end, step)), *shape[axis + 1 :])
        self.add("Slice", [name, *cut], [new], dtype)

    def split(self, name, shape, dtype):
        axis = self.axis(shape)
        first = self.draw(st.integers(0, shape[axis]))
        parts = [(*shape[:axis], n, *shape[axis + 1 :]) for n in (first, shape[axis] - first)]
        if 0 not in parts[0] and 0 not in parts[1]:
            sizes = self.numbers(first, shape[axis] - first)
            self.add("Split", [name, sizes], parts, dtype, axis=axis)

    def concat(self, name, shape, dtype):
        axis, count = self.axis(shape), self.draw(st.integers(1, 3))
        new = (*shape[:axis], count * shape[axis], *shape[axis + 1 :])
        self.add("Concat", [name] * count, [new], dtype, axis=axis)

    def pad(self, name, shape, dtype):
        pads = self.draw(
            st.lists(st.integers(0, 2), min_size=2 * len(shape), max_size=2 * len(shape)).filter(any)
        )
        new = [s + a + b for s, a, b in zip(shape, pads[: len(shape)], pads[len(shape) :], strict=True)]
        self.add("Pad", [name, self.numbers(*pads)], [new], dtype)

    def gather(self, name, shape, dtype):
        axis = self.axis(shape)
        indices = self.draw(st.lists(st.integers(0, shape[axis] - 1), min_size=1, max_size=4))
        new = (*shape[:axis], len(indices), *shape[axis + 1 :])
        self.add("Gather", [name, self.numbers(*indices)], [new], dtype, axis=axis)

    def expand(self, name, shape, dtype):
        new = (self.draw(st.integers(1, 3)), *shape)
        self.add("Expand", [name, self.numbers(*new)], [new], dtype)

    def tile(self, name, shape, dtype):
        repeats = self.draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)))
        new = [s * r for s, r in zip(shape, repeats, strict=True)]
        self.add("Tile", [name, self.numbers(*repeats)], [new], dtype)

    def cast(self, name, shape, dtype):
        new = self.draw(st.sampled_from([np.float32, np.int64, np.int32, np.float64]))
        to = helper.np_dtype_to_tensor_dtype(np.dtype(new))
        self.add("Cast", [name], [shape], new, to=to)

    def relu(self, name, shape, dtype):
        self.add("Relu", [name], [shape], dtype)

    def depth_to_space(self, name, shape, dtype):
        if dtype == np.float32:
            b, c, h, w = shape
            self.add("DepthToSpace", [name], [(b, c // 4, 2 * h, 2 * w)], dtype, blocksize=2)

    def layer_norm(self, name, shape, dtype):
        scale = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ones(shape[-1], np.float32), scale))
        self.add("LayerNormalization", [name, scale], [shape], dtype, axis=-1)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_bytes_are_those_of_the_arrays_that_flow(data):
    sketch = Sketch(data)
    for _ in range(data.draw(st.integers(3, 10))):
        sketch.step()
    sketch.relu("x", *START["x"])
    inputs = [value(name, s, helper.np_dtype_to_tensor_dtype(np.dtype(t))) for name, (s, t) in START.items()]
    used = {name for n in sketch.nodes for name in n.input}
    inputs = [i for i in inputs if i.name in used]
    proto = model(sketch.nodes, inputs, [sketch.nodes[-1].output[0]], sketch.constants)
    feeds = {i.name: np.ones(*START[i.name]) for i in inputs}
    expected = by_running(proto, feeds)
    graph = to_graph(proto)
    assert bytes_moved(graph) == expected
    forget = st.lists(st.sampled_from([t for n in graph.nodes for t in n.outputs]), max_size=8)
    for tensor in data.draw(forget):
        tensor.shape = None
        tensor.dtype = data.draw(st.sampled_from([None, tensor.dtype]))
    assert bytes_moved(graph) == expected


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("name", ["packed", "shifted windows", "residual"])
def test_bytes_are_known_and_right_before_and_after_every_pass(name, target):
    proto, feeds = other(name)
    for step in TARGETS[target].passes:
        before = by_running(to_proto(to_graph(proto)), feeds)
        proto, [result] = run_passes(proto, [step], TARGETS[target].prices)
        assert (result.bytes_before, result.bytes_after) == (before, by_running(proto, feeds)), step


def test_results_go_on_from_each_other():
    _, results = run_passes(other("packed")[0], list(TARGETS["onnxruntime"].passes))
    for result, following in itertools.pairwise(results):
        assert result.bytes_after == following.bytes_before
    assert results[-1].bytes_after < results[0].bytes_before


# --- what counts ---


def moved(nodes, inputs, outputs=("y",), initializers=(), **more):
    return bytes_moved(to_graph(model(nodes, inputs, list(outputs), initializers, **more)))


def test_what_only_renames_is_free():
    nodes = [
        node("Reshape", ["x", "s"], ["a"]),
        node("Unsqueeze", ["a", "zero"], ["b"]),
        node("Squeeze", ["b", "zero"], ["c"]),
        node("Flatten", ["c"], ["d"]),
        node("Identity", ["d"], ["y"]),
    ]
    assert moved(nodes, [value("x", [2, 6])], initializers=[ints("s", 3, 4), ints("zero", 0)]) == 0


@pytest.mark.parametrize(
    ("kind", "size"),
    [(TensorProto.FLOAT16, 2), (TensorProto.BFLOAT16, 2), (TensorProto.DOUBLE, 8), (TensorProto.INT8, 1)],
)
def test_a_type_counts_by_its_size(kind, size):
    x = value("x", [3, 5], kind)
    y = value("y", [5, 3], kind)
    assert moved([node("Transpose", ["x"], ["y"])], [x], [y]) == 2 * 15 * size


def test_numbers_of_half_a_byte_count_as_such():
    x, y = (gs.Variable(name, TensorProto.INT4, [3, 5]) for name in "xy")
    assert bytes_moved(gs.Graph([gs.Node("Transpose", inputs=[x], outputs=[y])], [x], [y])) == 2 * 8


def test_indices_are_read_and_parameters_not_counted():
    table = numpy_helper.from_array(np.ones((10, 4), np.float32), "table")
    assert moved([node("Gather", ["table", "i"], ["y"])], [value("i", [3], 7)], initializers=[table]) == (
        3 * 8 + 2 * 3 * 4 * 4
    )
    scale = numpy_helper.from_array(np.ones(4, np.float32), "scale")
    norm = node("LayerNormalization", ["x", "scale"], ["y"])
    graph = to_graph(model([norm], [value("x", [3, 4])], initializers=[scale]))
    assert bytes_moved(graph) == 2 * 3 * 4 * 4


def test_operators_of_others_and_nodes_of_branches_are_not_counted():
    branch = helper.make_graph([node("Transpose", ["x"], ["t"])], "branch", [], [value("t", [5, 3])])
    nodes = [node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    inputs = [value("x", [3, 5]), value("c", [], TensorProto.BOOL)]
    assert moved(nodes, inputs) == 0
    nodes = [node("Transpose", ["x"], ["y"], domain="somebody")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("somebody", 1)]
    assert moved(nodes, inputs[:1], opset_imports=opsets) == 0


# --- what is known ---


def test_a_size_known_only_when_running_makes_the_sum_unknown():
    nodes = [node("Transpose", ["x"], ["t"]), node("Relu", ["t"], ["y"])]
    assert moved(nodes, [value("x", [4, "n"])]) is None
    assert moved(nodes, [value("x", [2, 4])]) == 64
    nodes = [node("NonZero", ["x"], ["i"]), node("Transpose", ["i"], ["y"])]
    assert moved(nodes, [value("x", [2, 4])]) is None


def test_of_a_batch_one_image_is_counted():
    nodes = [node("Transpose", ["x"], ["t"]), node("Concat", ["t", "t"], ["c"], axis=0)]
    assert moved(nodes, [value("x", ["n", 4])], ["c"]) == 4 * (4 + 4 + 4 + 4 + 8)
    nodes.append(node("Concat", ["x", "d"], ["y"], axis=0))
    assert moved(nodes, [value("x", ["n", 4]), value("d", [3, 4])]) is None  # n + 3


def test_what_is_known_is_counted_beside_what_is_not():
    nodes = [node("Transpose", ["x"], ["y"]), node("Transpose", ["u"], ["v"])]
    inputs = [value("x", [2, 4]), value("u", ["n", 4])]
    assert bytes_known(to_graph(model(nodes, inputs, ["y", "v"]))) == (64, False)
    assert bytes_known(to_graph(model(nodes[:1], inputs[:1]))) == (64, True)
    nodes.append(node("NonZero", ["x"], ["i"]))
    nodes.append(node("Transpose", ["i"], ["j"]))
    assert bytes_known(to_graph(model(nodes, inputs, ["y", "v", "j"]))) == (64, False)


def test_a_size_that_nothing_moved_has_does_not_matter():
    assert moved([node("Relu", ["x"], ["y"])], [value("x", ["batch", 4])]) == 0


def test_a_size_that_follows_from_a_weight_is_known():
    """PyTorch's exporter makes the bias of a Conv so: zeros, as many as the weight's first axis is long."""
    weight = numpy_helper.from_array(np.ones((64, 3, 3, 3), np.float32), "w")
    zero = numpy_helper.from_array(np.float32(0), "zero")
    nodes = [
        node("Shape", ["w"], ["length"], start=0, end=1),
        node("Expand", ["length", "one"], ["lengths"]),
        node("Expand", ["zero", "lengths"], ["bias"]),
        node("Conv", ["x", "w", "bias"], ["y"]),
    ]
    proto = model(nodes, [value("x", [1, 3, 8, 8])], initializers=[weight, zero, ints("one", 1)], infer=False)
    assert bytes_moved(to_graph(proto)) == by_running(proto, {"x": np.ones((1, 3, 8, 8), np.float32)})


def test_weights_are_not_copied_to_find_a_shape():
    weight = gs.Constant("w", np.broadcast_to(np.float32(0), (1 << 18, 1 << 18)))  # as if 256 GB
    x, y = gs.Variable("x", np.float32, [4, 1 << 18]), gs.Variable("y", np.float32, [1 << 18, 4])
    product = gs.Variable("product")
    nodes = [gs.Node("MatMul", inputs=[x, weight], outputs=[product])]
    nodes.append(gs.Node("Transpose", inputs=[product], outputs=[y], attrs={"perm": [1, 0]}))
    assert bytes_moved(gs.Graph(nodes, [x], [y], opset=18)) == 2 * (4 << 18) * 4


def test_counting_leaves_the_graph_alone():
    nodes = [node("Relu", ["x"], ["r"]), node("Transpose", ["r"], ["y"])]
    graph = to_graph(model(nodes, [value("x", [2, 4])], ["y"]))
    for tensor in graph.nodes[0].outputs:
        tensor.shape = None
    before = to_proto(graph).SerializeToString()
    assert bytes_moved(graph) == 64
    assert to_proto(graph).SerializeToString() == before


def test_work_is_linear_in_the_number_of_nodes_without_shapes():
    def work(count):
        x = gs.Variable("x", np.float32, [4, 5])
        nodes, tensor = [], x
        for i in range(count):
            out = gs.Variable(f"t{i}", np.float32)
            op = "Transpose" if i % 2 else "Relu"
            nodes.append(gs.Node(op, inputs=[tensor], outputs=[out]))
            tensor = out
        graph = gs.Graph(nodes, [x], [tensor], opset=18)
        moved = []
        made = calls(lambda: moved.append(bytes_moved(graph)))
        assert moved == [count // 2 * 2 * 20 * 4]
        return made

    # Ten times as many; the square would be a hundred.
    assert work(4000) < 15 * work(400)
