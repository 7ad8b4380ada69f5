"""Products that go to 8 bits together, and parts of a graph around them as graphs. Knows graphs alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from meta_deploy import ort
from meta_deploy.graph.graph import IR_VERSION
from meta_deploy.graph.precision.lower import to_proto
from meta_deploy.graph.precision.placement import Placement, Product
from meta_deploy.graph.precision.qdq import insert
from meta_deploy.graph.precision.quantize import Range
from meta_deploy.graph.precision.ranges import open_session
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.graph.precision.values import FLOAT, is_constant


@dataclass(frozen=True)
class Group:
    """Products of which one in 8 bits alone would pay for what all of them share.

    They read one tensor, or one what the other makes, or have the same weights.
    """

    products: tuple[Product, ...]

    @property
    def name(self) -> str:
        """That of the first product's output, which is like no other."""
        return str(self.products[0].node.outputs[0].name)


def groups_of(placement: Placement) -> list[Group]:
    """The groups of a placement, in the graph's order."""
    sets: list[tuple[set[ir.Value], list[Product]]] = []
    for product in placement.products:
        touched = {value for value in (*product.node.inputs[:2], product.result) if value is not None}
        near = [one for one in sets if one[0] & touched]
        rest = [one for one in sets if not one[0] & touched]
        values = touched.union(*(one[0] for one in near))
        sets = [*rest, (values, [*(p for one in near for p in one[1]), product])]
    order = {product.node: i for i, product in enumerate(placement.products)}
    groups = [Group(tuple(sorted(products, key=lambda p: order[p.node]))) for _, products in sets]
    return sorted(groups, key=lambda group: order[group.products[0].node])


def shapes_of(
    model: ir.Model, parts: Iterable[Collection[ir.Node]], feed: Mapping[str, np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """The shapes that tensors which parts of the graph read have in a run, by name."""
    names = list(dict.fromkeys(value.name for part in parts for value in _read(part)))
    model = model.clone()
    values = {v.name: v for v in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs))}
    nodes = [ir.node("Shape", [values[name]], name=f"search/shape_{i}") for i, name in enumerate(names)]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype = node.name, ir.DataType.INT64
    model.graph.extend(nodes)
    model.graph.outputs[:] = [node.outputs[0] for node in nodes]
    session = open_session(model)
    found = ort.run(session, None, {given.name: feed[given.name] for given in session.get_inputs()})
    return {str(name): tuple(map(int, shape)) for name, shape in zip(names, found, strict=True)}


@dataclass(frozen=True)
class Part:
    """Nodes of a graph between tensors in float32: in float32, with 8 bits, and inputs for both."""

    float32: onnx.ModelProto
    int8: onnx.ModelProto
    feed: dict[str, np.ndarray]


def part_of(
    nodes: Sequence[ir.Node],
    products: Sequence[Product],
    shapes: Mapping[str, tuple[int, ...]],
    ranges: Mapping[str, Range],
    rules: EightBitRules,
    opsets: Mapping[str, int],
) -> Part:
    """Nodes, in the graph's order, as a graph of their own; `products` of them are to be in 8 bits.

    Its inputs are random numbers in the tensors' ranges.
    """
    made = {output: ir.Value(name=output.name, type=output.type) for n in nodes for output in n.outputs}
    inputs: dict[ir.Value, ir.Value] = {}
    constants: dict[ir.Value, ir.Value] = {}

    def moved(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in made:
            return None if value is None else made[value]
        if is_constant(value):
            return constants.setdefault(value, ir.Value(name=value.name, const_value=value.const_value))
        assert value.name
        shape = ir.Shape(shapes[value.name])
        kind = ir.TensorType(value.dtype or FLOAT)
        return inputs.setdefault(value, ir.Value(name=value.name, type=kind, shape=shape))

    copies = {
        n: ir.Node(
            n.domain,
            n.op_type,
            [moved(value) for value in n.inputs],
            n.attributes.values(),
            outputs=[made[o] for o in n.outputs],
            name=n.name,
        )
        for n in nodes
    }
    graph = ir.Graph(
        list(inputs.values()),
        [made[value] for node in nodes for value in node.outputs if _read_outside(value, copies)],
        nodes=list(copies.values()),
        initializers=list(constants.values()),
        opset_imports=dict(opsets),
        name="part",
    )
    placement = Placement(list(products)).moved(copies, made)
    model = ir.Model(graph, ir_version=IR_VERSION)
    float32 = to_proto(model)
    insert(graph, placement, ranges, rules)
    generator = np.random.default_rng(0)
    feed = {}
    for name in (str(value.name) for value in inputs):
        low, high = ranges.get(name, (0.0, 1.0))
        feed[name] = generator.uniform(low, high, shapes[name]).astype(np.float32)
    return Part(float32, to_proto(model), feed)


def kernels_of(group: Group) -> list[ir.Node]:
    """A group's products, and what goes into the kernel of each: bias and ReLU."""
    return list(dict.fromkeys(node for product in group.products for node in _kernel(product)))


def _read_outside(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Whether a value that nodes make is read by others, or by none."""
    uses = value.uses()
    return not uses or value.is_graph_output() or any(use.node not in nodes for use in uses)


def _read(nodes: Collection[ir.Node]) -> list[ir.Value]:
    """What nodes read and none of them makes: activations, and bounds that are computed."""
    made = {output for node in nodes for output in node.outputs}
    read = (value for node in nodes for value in node.inputs if value is not None)
    return [value for value in read if value not in made and not is_constant(value)]


def _kernel(product: Product) -> list[ir.Node]:
    """A product, its bias and its ReLU."""
    nodes = [product.node]
    if product.bias is not None and product.bias[0] is not product.node:
        nodes.append(product.bias[0])
    maker = None if product.result is None else product.result.producer()
    if maker is not None and maker not in nodes:
        nodes.append(maker)
    return nodes
