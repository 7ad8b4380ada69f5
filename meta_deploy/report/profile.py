"""Where a run goes, node by node, by ONNX Runtime's profiler: its JSON joined with the graph that it runs.

Knows the profiler's events and ONNX graphs; must not know bundles or tasks.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from msgspec.structs import asdict

from meta_deploy.graph.graph import bodies
from meta_deploy.graph.modules import are_modules, in_order, module_of, modules_of
from meta_deploy.graph.traffic import RENAMES
from meta_deploy.ort import onnxruntime
from meta_deploy.report.operators import Call, Tensor, class_of, classes, cost
from meta_deploy.report.schema import (
    CLASSES,
    ClassRow,
    Cost,
    LivePeak,
    LiveTensor,
    ModuleRow,
    NodeRow,
    Profile,
)

_END = "_kernel_time"
_INSERTED = "InsertedPrecisionFreeCast_"


@dataclass(frozen=True)
class Event:
    """One call of one node. `micros` is its own time, without that of nodes in its subgraphs.

    It is None where there was nothing to do, as for a Reshape. `module` is where it came from.
    """

    name: str
    op: str
    micros: float | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    module: str = ""


def profile(
    model: bytes, feed: Mapping[str, np.ndarray], options: Any, folder: Path, runs: int, best: bool = False
) -> Profile:
    """Run a model under ONNX Runtime's profiler on the CPU.

    Args:
        model: the ONNX file, complete in itself.
        feed: its inputs by name.
        options: the session's; the profiler is set in them.
        folder: for the files on the way.
        runs: that are counted, after one that is not.
        best: have only the fastest of them count, which other work on the machine disturbed least.
    """
    named = onnx.load_model_from_string(model)
    _name_nodes(named.graph)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(
        named.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    for _ in range(1 + runs):
        session.run(None, dict(feed))
    events = json.loads(Path(session.end_profiling()).read_text())
    graph = onnx.load(folder / "optimized.onnx").graph
    by = f"ONNX Runtime {onnxruntime.__version__}'s profiler"
    return interpret(events, graph, by, best, modules_as_run(named.graph, graph))


def modules_as_run(given: onnx.GraphProto, run: onnx.GraphProto) -> dict[str, str]:
    """The module of each node of the graph that ONNX Runtime made of the one that it was given.

    A node without the name of one that was given has the module of what made the tensor that it makes or is
    called by; else of what makes its inputs.
    """
    known = modules_of(node.name for node in given.node)
    made = {output: known.get(node.name, "") for node in given.node for output in node.output}
    modules, found = set(known.values()), {}
    for node in run.node:
        own = module_of(node.name)
        # Of its own nodes some are called by the tensor that they make: "relu_nchwc".
        tensors = (name.removesuffix("_nchwc").removeprefix(_INSERTED) for name in (node.name, *node.output))
        heirs = (made[name] for name in (*tensors, *node.input) if made.get(name))
        found[node.name] = own if own in modules else next(heirs, "")
        made |= {name: found[node.name] for name in node.output if name not in made}
    return found


def interpret(
    events: Sequence[dict[str, Any]],
    graph: onnx.GraphProto,
    by: str,
    best: bool = False,
    modules: Mapping[str, str] | None = None,
) -> Profile:
    """What the profiler's events say of the graph that ran; the first run is not counted.

    With `best` the fastest alone is. `modules` has the nodes' modules, where their names do not tell.
    """
    spans, calls = read_events(events)
    spans, calls = spans[1:], calls[1:]
    if best:
        fastest = spans.index(min(spans))
        spans, calls = [spans[fastest]], [calls[fastest]]
    if modules is not None:
        calls = [[replace(event, module=modules.get(event.name, "")) for event in run] for run in calls]
    return assemble(spans, calls, graph, by)


def assemble(
    spans: Sequence[float], calls: Sequence[Sequence[Event]], graph: onnx.GraphProto, by: str
) -> Profile:
    """The profile of runs that took `spans` microseconds, in which nodes of the graph were called."""
    runs = len(spans)
    nodes = {node.name: node for node in _all_nodes(graph)}
    kinds, weights = classes(graph), _weights(graph)
    met: dict[str, list[Event]] = defaultdict(list)
    for event in itertools.chain(*calls):
        if event.micros is not None:
            met[event.name].append(event)
    rows = [_row(name, found, nodes.get(name), kinds, weights, runs) for name, found in met.items()]
    if not are_modules([row.module for row in rows]):
        rows = [msgspec.structs.replace(row, module="") for row in rows]
    ms = sum(spans) / runs / 1000
    return Profile(
        by=by,
        runs=runs,
        ms=ms,
        classes=sum_up(rows, ms),
        nodes=tuple(rows),
        live_peak=live_peak(calls[-1], graph),
        modules=by_module(rows, ms),
    )


def read_events(events: Sequence[dict[str, Any]]) -> tuple[list[float], list[list[Event]]]:
    """Microseconds of each run, and the calls in it in the order in which they began.

    A node with subgraphs is told of as a whole and node by node; here each has its own time alone.
    """
    spans = sorted(
        ((e["ts"], e["dur"]) for e in events if e.get("name") == "model_run"), key=lambda span: span[0]
    )
    # Of equal times, the longer one is around the other.
    nodes = sorted(
        (e for e in events if e.get("cat") == "Node" and e["name"].endswith(_END)),
        key=lambda e: (e["ts"], -e["dur"]),
    )
    own = [float(e["dur"]) for e in nodes]
    around: dict[Any, list[int]] = defaultdict(list)
    for i, event in enumerate(nodes):
        stack = around[event["tid"]]
        while stack and nodes[stack[-1]]["ts"] + nodes[stack[-1]]["dur"] < event["ts"] + event["dur"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= event["dur"]
        stack.append(i)
    calls: list[list[Event]] = [[] for _ in spans]
    for event, micros in zip(nodes, own, strict=True):
        run = sum(start <= event["ts"] for start, _ in spans) - 1
        if run >= 0:
            calls[run].append(_event(event, max(micros, 0.0)))
    return [float(duration) for _, duration in spans], calls


def _event(event: dict[str, Any], micros: float) -> Event:
    args = event["args"]
    inputs, outputs = (
        tuple(Tensor(kind, tuple(shape)) for one in args.get(key, ()) for kind, shape in one.items())
        for key in ("input_type_shape", "output_type_shape")
    )
    name = event["name"].removesuffix(_END)
    return Event(name, args["op_name"], micros, inputs, outputs, module_of(name))


def _row(
    name: str,
    found: Sequence[Event],
    node: onnx.NodeProto | None,
    kinds: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    runs: int,
) -> NodeRow:
    first = found[0]
    counts = Counter(_shapes(event) for event in found)
    costs = [_cost_of(shapes, node, weights, count) for shapes, count in counts.items()]
    return NodeRow(
        name=name,
        op=first.op,
        op_class=kinds.get(name) or class_of(first.op),  # ONNX Runtime writes some nodes without their name
        calls=len(found) / runs,
        ms=sum(event.micros or 0 for event in found) / runs / 1000,
        inputs=tuple(map(str, first.inputs)),
        outputs=tuple(map(str, first.outputs)),
        bytes_read=_mean([one.bytes_read for one in costs], runs),
        bytes_written=_mean([one.bytes_written for one in costs], runs),
        flops=_mean([one.flops for one in costs], runs),
        module=first.module,
    )


def _shapes(event: Event) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return event.inputs, event.outputs


def _mean(values: Sequence[int | None], runs: int) -> int | None:
    return None if None in values else round(sum(filter(None, values)) / runs)


def _cost_of(
    shapes: tuple[Any, Any], node: onnx.NodeProto | None, weights: Mapping[str, Tensor], count: int
) -> Cost:
    """The cost of `count` calls; unknown where the profiler's shapes do not fit the node."""
    told, outputs = shapes
    inputs = _aligned(node, told, weights) if node is not None else None
    if node is None or inputs is None:
        return Cost(bytes_read=None, bytes_written=None, flops=None)
    attributes = {
        a.name: onnx.helper.get_attribute_value(a)
        for a in node.attribute
        if a.type != onnx.AttributeProto.GRAPH
    }
    text = {key: value.decode() if isinstance(value, bytes) else value for key, value in attributes.items()}
    one = cost(Call(node.op_type, inputs, outputs, text))
    return Cost(**{key: None if value is None else value * count for key, value in asdict(one).items()})


def _aligned(
    node: onnx.NodeProto, told: Sequence[Tensor], weights: Mapping[str, Tensor]
) -> list[Tensor | None] | None:
    """The tensors of a node's inputs, in their places; None where they cannot be told apart.

    The profiler passes over inputs that are left out, and over weights that ONNX Runtime has repacked.
    """
    left = list(told)
    inputs: list[Tensor | None] = []
    for name in node.input:
        weight = weights.get(name)
        if weight is None and name:
            if not left:
                return None
            inputs.append(left.pop(0))
            continue
        inputs.append(weight)
        if weight is not None and left and left[0] == weight:
            left.pop(0)
    return None if left else inputs


def _weights(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """The constants of a graph and of those in it, by name."""
    found = {
        tensor.name: Tensor(_type_name(tensor.data_type), tuple(tensor.dims)) for tensor in graph.initializer
    }
    for node in graph.node:
        for body in bodies(node):
            found |= _weights(body)
    return found


def _type_name(kind: int) -> str:
    """ONNX Runtime's name of a type: float, double, int64, …"""
    return onnx.TensorProto.DataType.Name(kind).lower()


def sum_up(rows: Sequence[NodeRow], ms: float) -> tuple[ClassRow, ...]:
    """The rows by class, by falling time, and what of `ms` is in none of them."""
    found = []
    for name in CLASSES[:-1]:
        of_class = [row for row in rows if row.op_class == name]
        if of_class:
            found.append(_class_row(name, of_class, sum(row.ms for row in of_class), ms))
    left = ms - sum(row.ms for row in found)
    found.append(_class_row("between nodes", [], left, ms))
    return tuple(sorted(found, key=lambda row: -row.ms))


def _class_row(name: Any, rows: Sequence[NodeRow], took: float, ms: float) -> ClassRow:
    return ClassRow(name=name, nodes=len(rows), ms=took, share=took / ms, **_sums(rows))


def _sums(rows: Sequence[NodeRow]) -> dict[str, int]:
    """Bytes and FLOPs of the rows that tell theirs."""
    return {key: sum(filter(None, (getattr(row, key) for row in rows))) for key in Cost.__struct_fields__}


def by_module(rows: Sequence[NodeRow], ms: float) -> tuple[ModuleRow, ...]:
    """The rows by module, each in all that hold it, and those of none under ""; empty where all are."""
    within: dict[str, list[NodeRow]] = defaultdict(list)
    for row in rows:
        parts = row.module.split(".")
        for end in range(1, len(parts) + 1):
            within[".".join(parts[:end])].append(row)
    if not within.keys() - {""}:
        return ()
    took = {name: sum(row.ms for row in inner) for name, inner in within.items()}
    return tuple(
        ModuleRow(
            name=name,
            nodes=len(within[name]),
            ms=took[name],
            share=took[name] / ms,
            **_sums(within[name]),
        )
        for name in sorted(within, key=in_order)
    )


def live_peak(calls: Sequence[Event], graph: onnx.GraphProto) -> LivePeak | None:
    """The most bytes of activations alive at once, in the order of these calls; None without any.

    Of nodes with subgraphs only what goes in and comes out is counted. Reshape and its like give their
    input another name, and no memory.
    """
    nodes = {node.name: node for node in graph.node}
    order = [(event, nodes[event.name]) for event in calls if event.name in nodes]
    alias, sizes, made_by = _tensors(order, graph)
    last: dict[str, float] = {alias.get(output.name, output.name): math.inf for output in graph.output}
    for i, (_, node) in enumerate(order):
        for name in _read_by(node):
            whole = alias.get(name, name)
            last[whole] = max(last.get(whole, 0), i)
    alive = {given.name: sizes[given.name] for given in graph.input if given.name in sizes}
    best: tuple[int, str, dict[str, int]] = (0, "", {})
    for i, (event, node) in enumerate(order):
        for name in node.output:
            if name and name in sizes and name not in alias:
                alive[name] = sizes[name]
        if (total := sum(alive.values())) > best[0]:
            best = total, event.name, dict(alive)
        alive = {name: size for name, size in alive.items() if last.get(name, i) > i}
    if not best[0]:
        return None
    tensors = sorted(best[2].items(), key=lambda item: -item[1])
    return LivePeak(
        bytes=best[0],
        node=best[1],
        tensors=tuple(LiveTensor(name=n, made_by=made_by.get(n, "input"), bytes=size) for n, size in tensors),
    )


def _tensors(
    order: Sequence[tuple[Event, onnx.NodeProto]], graph: onnx.GraphProto
) -> tuple[dict[str, str], dict[str, int], dict[str, str]]:
    """Names that stand for another's memory, bytes of tensors by name, and the nodes that make them."""
    weights = _weights(graph)
    inputs = {given.name for given in graph.input} - weights.keys()
    alias: dict[str, str] = {}
    sizes: dict[str, int] = {}
    made_by: dict[str, str] = {}
    for event, node in order:
        written = [name for name in node.output if name]
        given = _aligned(node, event.inputs, weights) or []
        if len(written) == len(event.outputs):
            made = zip(written, event.outputs, strict=True)
            sizes |= {name: tensor.bytes or 0 for name, tensor in made}
        pairs = zip(node.input, given, strict=False)
        sizes |= {name: tensor.bytes or 0 for name, tensor in pairs if tensor is not None and name in inputs}
        made_by |= dict.fromkeys(written, node.name)
        if node.op_type in RENAMES and node.input[0] not in weights:
            alias[node.output[0]] = alias.get(node.input[0], node.input[0])
    return alias, sizes, made_by


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, by the graphs in it too."""
    yield from filter(None, node.input)
    for body in bodies(node):
        for each in body.node:
            yield from _read_by(each)
        yield from (output.name for output in body.output)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from _all_nodes(body)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """A name of its own for every node, by which the profiler tells of it."""
    met: set[str] = {""}
    counter = itertools.count()
    for node in _all_nodes(graph):
        while node.name in met:
            node.name = f"{node.op_type}_{next(counter)}"
        met.add(node.name)
