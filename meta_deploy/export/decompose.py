"""The few operators of our models that PyTorch's exporter does not translate, written as those that it does.

`torch.onnx.export` decomposes every program by tracing it a second time, which is nearly half of an export.
Knows ATen's operators; must not know models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten


def translated(program: ExportedProgram, **options: Any) -> torch.onnx.ONNXProgram:
    """The program in ONNX, by `torch.onnx.export` with these options; its graph is rewritten on the way.

    Raises:
        torch.onnx.OnnxExporterError: it holds an operator that has neither a translation nor a decomposition.
    """
    try:
        exported = torch.onnx.export(decomposed(program), **options)
    except torch.onnx.OnnxExporterError:  # perhaps an operator that is translated in parts alone
        vars(program).pop("run_decompositions", None)
        exported = torch.onnx.export(program, **options)
    assert exported is not None
    return exported


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """The program, rewritten in place, and spared the second trace unless it changes tensors in place."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target in _REWRITES:
            _REWRITES[node.target](node)
    program.graph_module.recompile()
    if not any(_mutates(node) for node in graph.nodes):
        program.run_decompositions = lambda *args, **kwargs: program  # type: ignore[method-assign]
    return program


def _mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _drop(node: Node) -> None:
    """A check of what was true when tracing."""
    node.graph.erase_node(node)


def _pass_on(node: Node) -> None:
    """An operator that gives what it was given."""
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def _cast(node: Node) -> None:
    node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.args[1]}


def _and(node: Node) -> None:
    node.target = aten.bitwise_and.Tensor


def _split(node: Node) -> None:
    """chunk(x, count, dim): by the size of the parts."""
    x, count, *dim = node.args
    axis = dim[0] if dim else 0
    length = x.meta["val"].shape[axis]  # type: ignore[union-attr]
    node.target, node.args = aten.split.Tensor, (x, -(-length // count), axis)  # type: ignore[operator]


def _transposed_convolution(node: Node) -> None:
    """conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)."""
    defaults = (None, None, None, [1, 1], [0, 0], [0, 0], 1, [1, 1])
    given = (*node.args, *defaults[len(node.args) :])
    x, weight, bias, stride, padding, output_padding, groups, dilation = given
    node.target = aten.convolution.default
    node.args = (x, weight, bias, stride, padding, dilation, True, output_padding, groups)


_REWRITES: dict[object, Callable[[Node], None]] = {
    aten._assert_tensor_metadata.default: _drop,
    aten.detach.default: _pass_on,
    aten.detach_.default: _pass_on,
    aten.to.dtype: _cast,
    aten.__and__.Tensor: _and,
    aten.chunk.default: _split,
    aten.conv_transpose2d.input: _transposed_convolution,
}
