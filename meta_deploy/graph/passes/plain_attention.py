"""The operator Attention, of opset 23, is written out: other passes then know it as any other attention.

TensorRT has kernels for some of its shapes and types only, and fails on others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import constant_value, fresh_names, is_op, static_shape, tidy
from meta_deploy.graph.moves import add_move

_FLOATS = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.float16): onnx.TensorProto.FLOAT16}


def plain_attention(graph: gs.Graph) -> int:
    """Replace Attention by MatMul, Softmax and MatMul.

    Check: q, k and v are of known sizes and as many heads; no mask, or a constant one that hides no query's
    keys altogether; not causal, without a cache and other extras.

    Returns:
        Nodes replaced.
    """
    fresh, changes = fresh_names(graph), 0
    for node in list(graph.nodes):
        if not is_op(node, "Attention"):
            continue
        mask = _mask(node)
        reason = mask if isinstance(mask, str) else _against(node)
        if reason is not None:
            declined(node, reason)
            continue
        assert not isinstance(mask, str)
        _write(graph, node, mask, fresh)
        changes += 1
    if changes:
        tidy(graph)
    return changes


def _heads(node: gs.Node) -> list[list[int]] | None:
    """(B, heads, N, d) of q, k and v; None where these are not known."""
    sizes = []
    for tensor, heads in zip(node.inputs[:3], ("q_num_heads", "kv_num_heads", "kv_num_heads"), strict=True):
        shape, count = static_shape(tensor), int(node.attrs.get(heads, 0))
        if shape is not None and len(shape) == 3 and count:
            shape = [shape[0], count, shape[1], shape[2] // count]
        if shape is None or len(shape) != 4 or 0 in shape:
            return None
        sizes.append(shape)
    return sizes


def _against(node: gs.Node) -> str | None:
    """Why a node is left as it is, if it is."""
    sizes, dtype = _heads(node), node.inputs[0].dtype
    if sizes is None:
        return f"q, k and v of {shown(node)} are not of known sizes"
    (b, h, _, d), (*outer, m, width), values = sizes
    if (
        outer != [b, h]
        or width != d
        or values[:3] != [b, h, m]
        or len({len(t.shape) for t in node.inputs[:3]}) > 1
    ):
        return f"q, k and v of {shown(node)} are not of one batch, heads and width"
    if any(not tensor.is_empty() for tensor in (*node.inputs[4:], *node.outputs[1:])):
        return f"{shown(node)} has a cache, or more than one output"
    if node.attrs.get("is_causal", 0) or node.attrs.get("softcap", 0.0):
        return f"{shown(node)} is causal, or caps its products"
    if dtype is None or np.dtype(dtype) not in _FLOATS:
        return f"q is of type {dtype}, not float32 or float16"
    if node.attrs.get("softmax_precision", 0) not in (0, _FLOATS[np.dtype(dtype)]):
        return f"the softmax of {shown(node)} is of another type"
    return None


def _mask(node: gs.Node) -> np.ndarray | str | None:
    """What is added to the products; None for nothing, or why it is not known."""
    if len(node.inputs) < 4 or node.inputs[3].is_empty():
        return None
    mask = constant_value(node.inputs[3])
    if mask is None:
        return f"the mask of {shown(node)} is computed"
    if mask.dtype == bool:
        mask = np.where(mask, 0, -np.inf)
    if np.isneginf(mask).all(-1).any():
        return f"the mask of {shown(node)} hides all keys from a query"
    return mask


def _write(graph: gs.Graph, node: gs.Node, mask: np.ndarray | None, fresh: Callable[[str], str]) -> None:
    out, dtype, sizes = node.outputs[0], node.inputs[0].dtype, _heads(node) or []
    (b, h, n, d), (_, _, m, _), (_, _, _, width) = sizes

    def new(name: str, shape: Sequence[int]) -> gs.Variable:
        return gs.Variable(fresh(f"{out.name}/{name}"), dtype, list(shape))

    def add(op: str, inputs: list[gs.Tensor], made: gs.Variable, **attributes: int) -> gs.Variable:
        graph.nodes.append(gs.Node(op, made.name, attributes, inputs, [made]))
        return made

    def parted(x: gs.Tensor, name: str, shape: list[int]) -> gs.Tensor:
        if len(x.shape) == 4:
            return x
        batch, heads, tokens, channels = shape
        split = new(f"{name}/split", [batch, tokens, heads, channels])
        moved = new(name, shape)
        add_move(graph, "Reshape", list(split.shape), x, split, fresh)
        add_move(graph, "Transpose", [0, 2, 1, 3], split, moved, fresh)
        return moved

    joined = len(node.inputs[0].shape) == 3
    q, k, v = (parted(x, name, size) for x, name, size in zip(node.inputs[:3], "qkv", sizes, strict=True))
    scale = gs.Constant(fresh(f"{out.name}/scale"), np.array(node.attrs.get("scale") or d**-0.5, dtype))
    keys = new("keys", [b, h, d, m])
    add_move(graph, "Transpose", [0, 1, 3, 2], k, keys, fresh)
    products = add(
        "MatMul", [add("Mul", [q, scale], new("scaled", [b, h, n, d])), keys], new("products", [b, h, n, m])
    )
    if mask is not None:
        constant = gs.Constant(fresh(f"{out.name}/mask"), mask.astype(dtype))
        products = add("Add", [products, constant], new("masked", [b, h, n, m]))
    weights = add("Softmax", [products], new("weights", [b, h, n, m]), axis=-1)
    node.outputs.clear()
    if not joined:
        add("MatMul", [weights, v], out)
        return
    attended, moved = new("attended", [b, h, n, width]), new("attended/moved", [b, n, h, width])
    add("MatMul", [weights, v], attended)
    add_move(graph, "Transpose", [0, 2, 1, 3], attended, moved, fresh)
    add_move(graph, "Reshape", [b, n, h * width], moved, out, fresh)
