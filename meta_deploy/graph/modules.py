"""The PyTorch module that a node came from, as the first part of its name: "backbone.blocks.0.attn/MatMul_3".

A name costs few bytes and comes through every library into its profiles. Knows names and no operator.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable

import onnx

_SCOPES = (
    "pkg.torch.onnx.name_scopes"  # of PyTorch's exporter: the modules from the outside in, and the operator
)


def name_by_module(nodes: Iterable[onnx.NodeProto]) -> None:
    """Put the module that PyTorch's exporter tells of in front of each node's name."""
    for node in nodes:
        module = _told(node)
        if module:
            node.name = f"{module}/{node.name}"


def _told(node: onnx.NodeProto) -> str:
    """The innermost module in the exporter's metadata; empty where it tells of none."""
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    try:
        scopes = ast.literal_eval(text)
        return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ""


def module_of(name: str) -> str:
    """The module in a node's name; empty where there is none."""
    return name.partition("/")[0] if "/" in name[1:] and not name.startswith("/") else ""


def inherit_modules(before: onnx.GraphProto, after: onnx.GraphProto) -> None:
    """Name the nodes that passes made by the module of what they replace.

    That is what made a tensor of the same name before or, of new tensors, named after it ("x/norm"); else
    what makes the node's first input. The nodes of `before` keep their names.
    """
    modules = {output: module_of(node.name) for node in before.node for output in node.output}
    if not any(modules.values()):
        return
    old = {node.name for node in before.node}
    for node in after.node:
        if node.name not in old and node.output:
            output = node.output[0]
            heirs = (output, output.rpartition("/")[0], *node.input)
            module = next((modules[name] for name in heirs if modules.get(name)), "")
            if module:
                node.name = f"{module}/{(node.name or node.op_type).replace('/', '.')}"
        modules |= {output: module_of(node.name) for output in node.output if not modules.get(output)}
