"""Why a pass left a place near its pattern as it is, in words. Passes tell it; `explaining` listens.

Names tensors, nodes and shapes, and knows no pattern.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.graph import BATCH, BATCH_NAME, is_batch, is_output, producer


@dataclass(frozen=True)
class Declined:
    """A place that a pass leaves as it is: a node's name, its operator, and why."""

    node: str
    op: str
    reason: str


_listener: ContextVar[dict[Declined, None] | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def explaining() -> Iterator[Collection[Declined]]:
    """Collect what passes decline meanwhile, each once and in order."""
    told: dict[Declined, None] = {}
    token = _listener.set(told)
    try:
        yield told
    finally:
        _listener.reset(token)


def declined(node: gs.Node, reason: str) -> None:
    """Tell that the pattern around a node stays as it is, and why: a clause that names what is in the way."""
    told = _listener.get()
    if told is not None:
        told[Declined(node.name or node.outputs[0].name, node.op, reason)] = None


def shown(what: gs.Tensor | gs.Node) -> str:
    """A node as "Add 'name'", a tensor as "'name' (batch, 4, ?)"."""
    if isinstance(what, gs.Node):
        return f"{what.op} '{what.name or what.outputs[0].name}'"
    if what.shape is None:
        return f"'{what.name}' (of unknown shape)"
    return f"'{what.name}' ({', '.join(map(_size, what.shape))})"


def _size(size: object) -> str:
    if is_batch(size):
        times = int(size) // BATCH  # type: ignore[call-overload]
        return BATCH_NAME if times == 1 else f"{times}*{BATCH_NAME}"
    return str(size) if isinstance(size, (int, np.integer)) or size else "?"


def made_by(tensor: gs.Tensor) -> str:
    """Where a tensor comes from: "'x' (1, 4) comes from Add 'sum'"."""
    maker = producer(tensor)
    kind = "a constant" if isinstance(tensor, gs.Constant) else "an input of the graph"
    return f"{shown(tensor)} is {kind}" if maker is None else f"{shown(tensor)} comes from {shown(maker)}"


def read_elsewhere(graph: gs.Graph, tensor: gs.Tensor, *readers: gs.Node) -> str:
    """Who else wants a tensor that nothing but these readers should: the graph, or another node."""
    if is_output(graph, tensor):
        return f"'{tensor.name}' is an output of the graph"
    others = [node for node in tensor.outputs if all(node is not reader for reader in readers)]
    if not others:
        return (
            f"{shown(readers[0])} reads '{tensor.name}' twice"
            if readers
            else f"nothing reads '{tensor.name}'"
        )
    return f"'{tensor.name}' is also read by {shown(others[0])}"
