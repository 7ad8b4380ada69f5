"""A low-precision graph in float32 arithmetic, every result rounded: to check it on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from meta_deploy.graph.modules import module_of
from meta_deploy.graph.precision.lower import to_proto
from meta_deploy.graph.precision.ranges import EXACT
from meta_deploy.graph.precision.values import (
    FLOAT,
    LOW,
    Names,
    cast_node,
    is_constant,
    numbers_of,
    set_constant,
    set_fill,
)


def emulated(proto: onnx.ModelProto, exact: Sequence[str] = ()) -> onnx.ModelProto:
    """The same numbers in float32 arithmetic: what a low-precision node makes is rounded to its type.

    For checking a graph where a runtime has no such kernels (bfloat16 on a CPU), or where it would skip the
    rounding between two of them. A GPU's products accumulate in float32 likewise. What nodes of the PyTorch
    modules `exact`, such as "rpn_head", make is not rounded: this shows where rounding costs accuracy.
    """
    model = ir.from_proto(proto)
    graph = model.graph
    if any(
        value.dtype in LOW for node in graph.all_nodes() if node.graph is not graph for value in node.outputs
    ):
        return proto  # branches and loops stay as they are, and so does what they read
    names = Names(graph)
    exempt = tuple(f"{module}." for module in exact)
    for value in graph.inputs:
        if value.dtype in LOW:
            readers = list(value.uses())
            cast = cast_node(value, FLOAT, names.fresh(f"{value.name}/float"))
            graph.insert_before(graph[0], cast)
            for reader, place in readers:
                reader.replace_input_with(place, cast.outputs[0])
    for value in list(graph.initializers.values()):
        if value.dtype in LOW and is_constant(value):
            set_constant(value, numbers_of(value).astype(np.float32))
    for node in list(graph):
        if node.op_type == "ConstantOfShape" and node.outputs[0].dtype in LOW:
            set_fill(node, FLOAT)
        for output in node.outputs:
            kind = output.dtype
            if kind is None or kind not in LOW:
                continue
            output.dtype = FLOAT
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", kind)
                output.dtype = kind
                _insert_casts(graph, names, node, output, FLOAT)
            elif node.op_type not in EXACT and not f"{module_of(node.name or '')}.".startswith(exempt):
                _insert_casts(graph, names, node, output, kind, FLOAT)
    return to_proto(model)


def _insert_casts(graph: ir.Graph, names: Names, node: ir.Node, value: ir.Value, *kinds: ir.DataType) -> None:
    """Casts behind a node's output, for all that read it."""
    readers = list(value.uses())
    last, last_node = value, node
    for kind in kinds:
        cast = cast_node(last, kind, names.fresh(f"{value.name}/{kind.name.lower()}"))
        graph.insert_after(last_node, cast)
        last, last_node = cast.outputs[0], cast
    for reader, place in readers:
        reader.replace_input_with(place, last)
