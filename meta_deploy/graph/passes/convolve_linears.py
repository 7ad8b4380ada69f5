"""Linear maps of tokens that are a convolution's map become 1x1 convolutions of it.

TensorRT then transposes where it multiplies queries by keys, and needs no kernel before the product for that.
All sizes but the batch must be known.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, read_elsewhere, shown
from meta_deploy.graph.graph import (
    fresh_names,
    is_op,
    own_nodes,
    producer,
    sole_consumer,
    static_shape,
    tidy,
)
from meta_deploy.graph.linear import Linear, linear_of
from meta_deploy.graph.moves import add_move, permutation


def convolve_linears(graph: gs.Graph) -> int:
    """Multiply the map by the weights, and make tokens of what comes out.

    Pattern: Conv (B, C, H, W), Reshape (B, C, H * W), Transpose (B, H * W, C), MatMul by a constant matrix
    and its bias' Add; each read by the next alone.
    Rewrite: Conv, 1x1 Conv with the bias, Reshape, Transpose; `collapse-chains` joins these with others.

    Returns:
        Products that are convolutions now.
    """
    fresh, inside = fresh_names(graph), own_nodes(graph)
    changes = 0
    for node in list(graph.nodes):
        linear = linear_of(graph, node) if is_op(node, "MatMul") else None
        if linear is None or (linear.add is not None and linear.add not in inside):
            continue
        if (image := _image(graph, linear)) is not None:
            _rewrite(graph, linear, image, fresh)
            changes += 1
    if changes:
        tidy(graph)
    return changes


def _image(graph: gs.Graph, linear: Linear) -> gs.Tensor | None:
    """The convolution's map that a linear map's tokens are; tells why not where others read them."""
    transpose = producer(linear.x, "Transpose")
    reshape = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or permutation(transpose) != [0, 2, 1]:
        return None
    image, rows = reshape.inputs[0], reshape.outputs[0]
    before, after = static_shape(image), static_shape(rows)
    if producer(image, "Conv") is None or not before or not after or len(before) != 4:
        return None
    if before[:2] != after[:2] or 0 in before:
        return None
    for tensor, reader in ((linear.x, linear.node), (rows, transpose), (image, reshape)):
        if not sole_consumer(graph, tensor):
            declined(linear.node, f"{shown(reader)} is not alone: {read_elsewhere(graph, tensor, reader)}")
            return None
    return image


def _rewrite(graph: gs.Graph, linear: Linear, image: gs.Tensor, fresh: Callable[[str], str]) -> None:
    out, channels = linear.y, linear.out_channels
    b, _, height, width = image.shape
    weight = np.ascontiguousarray(linear.weight[:, :, None, None])
    inputs = [image, gs.Constant(fresh(f"{out.name}/weight"), weight)]
    if linear.bias is not None:
        bias = np.ascontiguousarray(linear.bias, linear.weight.dtype)
        inputs.append(gs.Constant(fresh(f"{out.name}/bias"), bias))
    product = gs.Variable(fresh(f"{out.name}/map"), linear.weight.dtype, [b, channels, height, width])
    graph.nodes.append(gs.Node("Conv", product.name, {}, inputs, [product]))
    rows = gs.Variable(fresh(f"{out.name}/rows"), product.dtype, [b, channels, height * width])
    add_move(graph, "Reshape", list(rows.shape), product, rows, fresh)
    out.inputs.clear()
    add_move(graph, "Transpose", [0, 2, 1], rows, out, fresh)
