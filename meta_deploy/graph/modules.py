"""The PyTorch module that a node came from, as the first part of its name: "backbone.blocks.0.attn/MatMul_3".

A name costs few bytes and comes through every library into its profiles. Knows names and no operator.
"""

from __future__ import annotations

import ast
import posixpath
from collections.abc import Iterable, Sequence

import onnx

_SCOPES = (
    "pkg.torch.onnx.name_scopes"  # of PyTorch's exporter: the modules from the outside in, and the operator
)


def name_by_module(nodes: Iterable[onnx.NodeProto]) -> None:
    """Put the module that PyTorch's exporter tells of in front of each node's name, once."""
    for node in nodes:
        module = _told(node)
        if module and not node.name.startswith(f"{module}/"):
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
    """The module in a node's name; empty where there is none.

    PyTorch's older exporter writes it as a path, "/blocks/blocks.0/attn/MatMul_3", in which a list comes
    before each of its items.
    """
    if not name.startswith("/"):
        return name.partition("/")[0] if "/" in name else ""
    path: list[str] = []
    for part in name.split("/")[1:-1]:
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        path.append(part)
    return ".".join(path)


def are_modules(found: Sequence[str]) -> bool:
    """Whether `module_of` gives modules of a graph's nodes, or parts of names with slashes of other meaning.

    They are modules where most nodes have one, or where most of them are paths ("blocks.0"), as in graphs to
    which a library has added many nodes.
    """
    known = [module for module in found if module]
    return 2 * len(known) >= len(found) or 2 * sum("." in module for module in known) >= len(known)


def modules_of(names: Iterable[str]) -> dict[str, str]:
    """The module of each of a graph's nodes that tells one, by the node's name."""
    found = {name: module_of(name) for name in names}
    return found if are_modules(list(found.values())) else {}


def innermost(modules: Sequence[str]) -> str:
    """The innermost module that holds all of these; empty where there is none."""
    common = posixpath.commonpath([name.replace(".", "/") for name in modules]) if modules else ""
    return common.replace("/", ".")


def in_order(module: str) -> list[tuple[int, str]]:
    """A key that sorts modules with what is in them behind them, and blocks.10 behind blocks.9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]


def inherit_modules(before: onnx.GraphProto, after: onnx.GraphProto) -> None:
    """Name the nodes that passes made by the module of what they replace, and the rest without a module.

    That is what made a tensor of the same name before or, of new tensors, named after it ("x/norm"); else
    what makes the node's inputs; of what has none, such as the quantization of a weight, what reads it. The
    nodes of `before` keep their names.
    """
    modules = {output: module_of(node.name) for node in before.node for output in node.output}
    old = {node.name for node in before.node}
    found = []
    for node in after.node:
        output = node.output[0] if node.output else ""
        heirs = () if node.name in old else (output, output.rpartition("/")[0], *node.input)
        module = next((modules[name] for name in heirs if modules.get(name)), "")
        found.append(module_of(node.name) if node.name in old else module)
        modules |= {output: found[-1] for output in node.output if not modules.get(output)}
    read_by: dict[str, str] = {}
    for node, module in zip(reversed(after.node), reversed(found), strict=True):
        module = module or next((read_by[name] for name in node.output if name in read_by), "")
        if node.name not in old:
            name = (node.name or node.op_type).replace("/", ".")
            node.name = f"{module}/{name}" if module else name
        read_by |= dict.fromkeys(node.input, module) if module else {}
