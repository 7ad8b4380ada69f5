"""An unknown batch where no pass would look for one: the same answers, and its number nowhere."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from meta_deploy.graph.graph import BATCH
from meta_deploy.graph.pipeline import PASSES, run_passes
from meta_deploy.graph.prices import Cost
from meta_deploy.targets import TARGETS
from tests.graph.rewriting import node
from tests.small_graphs import model, run, value

FREE = Cost(node=0, value=0)


def constants(**arrays):
    return [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]


def weights(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def numbers(proto):
    """All sizes and integers that a model holds."""
    yield from (size for tensor in proto.graph.initializer for size in tensor.dims)
    for tensor in proto.graph.initializer:
        if tensor.data_type in (TensorProto.INT32, TensorProto.INT64):
            yield from numpy_helper.to_array(tensor).reshape(-1).tolist()
    for info in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
        yield from (dim.dim_value for dim in info.type.tensor_type.shape.dim)
    for each in proto.graph.node:
        for attribute in each.attribute:
            yield from (attribute.i, *attribute.ints)


def unharmed(nodes, inputs, shapes, initializers=(), cost=FREE, outputs=("y",)):
    """Each pass alone and the pipelines answer as before, for every batch.

    Args:
        inputs: name -> shape; "n" is the batch.
        shapes: the same for what nodes make, as PyTorch tells them.
    """
    made = [value(name, shape) for name, shape in inputs.items()]
    wanted = [value(name, shapes[name]) for name in outputs]
    proto = model(nodes, made, wanted, initializers, infer=False)
    proto.graph.value_info.extend(value(k, shape) for k, shape in shapes.items() if k not in outputs)
    onnx.checker.check_model(proto, full_check=True)
    for names in (*([name] for name in PASSES), *dict.fromkeys(t.passes for t in TARGETS.values())):
        after, _ = run_passes(proto, list(names), cost)
        assert not any(number > 0 and number % BATCH == 0 for number in numbers(after)), names
        for batch in (1, 2, 3):
            rng = np.random.default_rng(batch)
            sizes = {name: [batch if s == "n" else s for s in shape] for name, shape in inputs.items()}
            feeds = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
            expected, actual = run(proto, **feeds), run(after, **feeds)
            assert list(actual) == list(expected)
            for name, array in expected.items():
                np.testing.assert_allclose(actual[name], array, rtol=0, atol=1e-4, err_msg=str(names))


@pytest.mark.parametrize(("axes", "shape"), [([0, 1], ["n", 4]), ([0], ["n"]), ([0], ["n", 4])])
def test_a_norm_over_the_batch(axes, shape):
    nodes = [
        node("ReduceMean", ["x", "axes"], ["mean"]),
        node("Sub", ["x", "mean"], ["centred"]),
        node("Mul", ["centred", "centred"], ["square"]),
        node("ReduceMean", ["square", "axes"], ["variance"]),
        node("Add", ["variance", "epsilon"], ["stable"]),
        node("Sqrt", ["stable"], ["deviation"]),
        node("Div", ["centred", "deviation"], ["y"]),
    ]
    few = [1 if axis in axes else size for axis, size in enumerate(shape)]
    shapes = dict.fromkeys(("centred", "square", "y"), shape)
    shapes |= dict.fromkeys(("mean", "variance", "stable", "deviation"), few)
    unharmed(nodes, {"x": shape}, shapes, constants(axes=axes, epsilon=np.float32(1e-5)))


def test_norms_along_the_batch():
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0]),
        node("LayerNormalization", ["t", "one"], ["a"], axis=-1, epsilon=0.1),
        node("LayerNormalization", ["t", "other"], ["b"], axis=-1, epsilon=0.1),
        node("Add", ["a", "b"], ["y"]),
    ]
    scales = constants(one=np.float32([2]), other=np.float32([3]))
    unharmed(nodes, {"x": ["n", 4]}, {key: [4, "n"] for key in "taby"}, scales)


@pytest.mark.parametrize("perm", [(0, 1, 2, 3), (1, 0, 2, 3), (1, 2, 0, 3), (1, 2, 3, 0)], ids=str)
def test_attention_with_the_batch_on_any_axis(perm):
    """Images, heads, tokens or channels of the attention."""
    shape = [["n", 4, 5, 8][p] for p in perm]
    b, h, tokens, d = shape
    nodes = [node("Transpose", [f"{name}0"], [name], perm=perm) for name in "qkv"]
    nodes += [
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "kt"], ["products"]),
        node("Softmax", ["products"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["y"]),
    ]
    shapes = dict.fromkeys("qkvy", shape) | {"kt": [b, h, d, tokens]}
    shapes |= {key: [b, h, tokens, tokens] for key in ("products", "weights")}
    unharmed(nodes, {f"{name}0": ["n", 4, 5, 8] for name in "qkv"}, shapes)


def test_a_sum_of_maps_as_high_as_the_batch():
    nodes = [
        node("Unsqueeze", ["x", "zero"], ["x1"]),
        node("Transpose", ["x1"], ["small"], perm=[0, 2, 1, 3]),
        node("Unsqueeze", ["z", "zero"], ["z1"]),
        node("Transpose", ["z1"], ["large"], perm=[0, 2, 1, 3]),
        node("Shape", ["large"], ["sizes"]),
        node("Resize", ["small", "", "", "sizes"], ["resized"], mode="nearest"),
        node("Add", ["large", "resized"], ["sum"]),
        node("Conv", ["sum", "weight"], ["y"], kernel_shape=[1, 1]),
    ]
    small, large = [1, 8, "n", 4], [1, 8, "n", 8]
    shapes = {"x1": [1, "n", 8, 4], "small": small, "z1": [1, "n", 8, 8], "large": large}
    shapes |= {"resized": large, "sum": large, "y": [1, 2, "n", 8]}
    initializers = constants(zero=[0], weight=weights(2, 8, 1, 1))
    unharmed(nodes, {"x": ["n", 8, 4], "z": ["n", 8, 8]}, shapes, initializers)


def test_rows_as_long_as_the_batch():
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 2, 0]),
        node("Gather", ["t", "index"], ["rows"], axis=0),
        node("Conv", ["rows", "weight"], ["flat"], kernel_shape=[1]),
        node("Reshape", ["flat", "apart"], ["values"]),
        node("Greater", ["k", "zero"], ["keep"]),
        node("Where", ["keep", "values", "zero"], ["y"]),
    ]
    shapes = {"t": [6, 4, "n"], "rows": [6, 4, "n"], "flat": [6, 1, "n"]}
    shapes |= {"values": [2, 3, "n"], "y": [2, 3, "n"]}
    initializers = constants(index=[5, 4, 3, 2, 1, 0], weight=weights(1, 4, 1), apart=[2, 3, -1])
    initializers += constants(zero=np.float32(0))
    unharmed(nodes, {"x": ["n", 6, 4], "k": [2, 3, 1]}, shapes, initializers)


def test_channels_that_get_among_the_images():
    """Each Reshape alone could be of any batch; both in a row put other channels first for each."""
    nodes = [
        node("Gemm", ["x", "weight"], ["g"]),
        node("Transpose", ["g"], ["t"], perm=[1, 0]),
        node("Reshape", ["t", "flat"], ["f"]),
        node("Reshape", ["f", "apart"], ["r"]),
        node("Split", ["r"], ["a", "z"], axis=1, num_outputs=2),
        node("Mul", ["a", "two"], ["y"]),
    ]
    shapes = {"g": ["n", 4], "t": [4, "n"], "f": ["4*n"], "r": ["n", 4]}
    shapes |= {key: ["n", 2] for key in ("a", "y", "z")}
    initializers = constants(weight=weights(3, 4), flat=[-1], apart=[-1, 4], two=np.float32(2))
    unharmed(nodes, {"x": ["n", 3]}, shapes, initializers, outputs=("y", "z"))


def test_nothing_of_every_image():
    nodes = [
        node("MatMul", ["x", "weight"], ["g"]),
        node("Slice", ["g", "zero", "zero", "one"], ["s"]),
        node("Reshape", ["s", "keep"], ["r"]),
        node("Mul", ["r", "two"], ["y"]),
    ]
    shapes = {"g": ["n", 4, 4], "s": ["n", 0, 4], "r": ["n", 0], "y": ["n", 0]}
    initializers = constants(weight=weights(3, 4), zero=[0], one=[1], keep=[0, 0], two=np.float32(2))
    unharmed(nodes, {"x": ["n", 4, 3]}, shapes, initializers)


def test_one_target_of_two_reshapes_and_an_expand():
    nodes = [
        node("Shape", ["x"], ["sizes"]),
        node("Neg", ["x"], ["h"]),
        node("Transpose", ["h"], ["t"], perm=[0, 2, 1]),
        node("Reshape", ["t", "sizes"], ["a"]),
        node("Reshape", ["x", "sizes"], ["b"]),
        node("Expand", ["row", "sizes"], ["c"]),
        node("Sum", ["a", "b", "c"], ["y"]),
    ]
    shapes = {key: ["n", 2, 3] for key in "habcy"} | {"t": ["n", 3, 2]}
    unharmed(nodes, {"x": ["n", 2, 3]}, shapes, constants(row=np.float32([1, 2, 3])))
