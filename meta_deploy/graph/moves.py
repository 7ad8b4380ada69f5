"""Moves, nodes that only rename where elements are: chains of them, and the fewest that do the same.

A chain of moves is a factorization of the axes and an order of the factors. Axes of length one have no part
in that. All sizes but the batch must be known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.graph import is_op, producer, sole_consumer, static_shape

MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
Move = tuple[str, list[int], list[int]]  # Transpose or Reshape, its permutation or shape, the shape it gives


def permutation(transpose: gs.Node) -> list[int]:
    """A Transpose's permutation; without one it reverses the axes, whose number is then to be known."""
    return list(transpose.attrs.get("perm", range(len(transpose.outputs[0].shape or ()))[::-1]))


def chain_before(graph: gs.Graph, tensor: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]]:
    """The moves that lead to a tensor, each read by the next alone, and what they start from."""
    chain: list[gs.Node] = []
    while (node := producer(tensor)) is not None and is_op(node, *MOVES):
        if chain and not sole_consumer(graph, tensor):
            break
        chain.append(node)
        tensor = node.inputs[0]
    return tensor, chain[::-1]


def chain_after(graph: gs.Graph, tensor: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]]:
    """The moves that follow a tensor, each read by the next alone, and what they end in."""
    chain: list[gs.Node] = []
    while sole_consumer(graph, tensor) and is_op(tensor.outputs[0], *MOVES):
        if tensor.outputs[0].inputs[0] is not tensor:
            break
        chain.append(tensor.outputs[0])
        tensor = chain[-1].outputs[0]
    return tensor, chain


def follow(start: gs.Tensor, chain: Sequence[gs.Node]) -> Factors | None:
    """Where the elements of `start` are after a chain of moves; None where the shapes don't tell."""
    shape, moves = static_shape(start), moves_of(start, chain)
    if shape is None or moves is None:
        return None
    factors = Factors(shape)
    return factors if all(factors.move(move) for move in moves) else None


def moves_of(start: gs.Tensor, chain: Sequence[gs.Node]) -> list[Move] | None:
    """What a chain does; None where a shape is not known or has no elements."""
    shape = static_shape(start)
    if shape is None or 0 in shape:
        return None
    moves: list[Move] = []
    for node in chain:
        target = static_shape(node.outputs[0])
        if target is None or math.prod(target) != math.prod(shape):
            return None
        if node.op == "Transpose":
            moves.append(("Transpose", permutation(node), target))
        else:
            moves.append(("Reshape", target, target))
    return moves


def add_move(
    graph: gs.Graph, op: str, values: list[int], x: gs.Tensor, out: gs.Tensor, fresh: Callable[[str], str]
) -> None:
    """A Transpose by the permutation `values`, or a Reshape to the shape `values`, from x to out."""
    if op == "Transpose":
        graph.nodes.append(gs.Node(op, out.name, {"perm": values}, [x], [out]))
    else:
        shape = gs.Constant(fresh(f"{out.name}/shape"), np.array(values, np.int64))
        graph.nodes.append(gs.Node(op, out.name, {}, [x, shape], [out]))


def fewest(shape: Sequence[int], moves: list[Move]) -> list[Move]:
    """The fewest moves found that do the same to a tensor of this shape."""
    while True:
        shorter = _joined(_shorter(shape, _joined(moves)))
        if len(shorter) >= len(moves):
            return moves
        moves = shorter


def _joined(moves: list[Move]) -> list[Move]:
    """Of Reshapes in a row only the last counts."""
    joined: list[Move] = []
    for move in moves:
        if joined and joined[-1][0] == move[0] == "Reshape":
            joined.pop()
        joined.append(move)
    return joined


def _shorter(shape: Sequence[int], moves: list[Move]) -> list[Move]:
    """The moves in parts whose factors fit together, each part in fewer moves.

    Factors don't fit where a Reshape cuts through two axes whose lengths have a common divisor only.
    """
    result: list[Move] = []
    factors, part = Factors(shape), list[Move]()
    for move in moves:
        if not factors.move(move):
            result += _shortest(part, factors.moves())
            factors, part = Factors(shape), []
            if not factors.move(move):  # alone, as it is
                factors = Factors(move[2])
                result.append(move)
                shape = move[2]
                continue
        part.append(move)
        shape = move[2]
    return result + _shortest(part, factors.moves())


def _shortest(*plans: list[Move]) -> list[Move]:
    return min(plans, key=lambda plan: len(plan))


class Factors:
    """Where the elements of a tensor come from: the original axes' factors, in their present order.

    Attributes:
        sizes: of every factor, in the original order; none is 1.
        origin: for each original axis its factors, as indices into `sizes`.
        axes: the same for each present axis.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.sizes = [size for size in shape if size != 1]
        numbers = iter(range(len(self.sizes)))
        self.origin = [[next(numbers)] if size != 1 else [] for size in shape]
        self.axes = [list(axis) for axis in self.origin]

    def copy(self) -> Factors:
        """Another of the same, to change."""
        return copy.deepcopy(self)

    def move(self, move: Move) -> bool:
        """Do a Transpose or a Reshape; False where the factors don't allow it."""
        op, values, _ = move
        if op == "Reshape":
            return self.reshape(values)
        self.transpose(values)
        return True

    def transpose(self, perm: Sequence[int]) -> None:
        self.axes = [self.axes[p] for p in perm]

    def reshape(self, target: Sequence[int]) -> bool:
        """Regroup the factors into new axes, splitting those that an axis ends in; False where that fails."""
        axes: list[list[int]] = []
        taken = 0
        for size in target:
            axis: list[int] = []
            while size != 1:
                order = [factor for axis in self.axes for factor in axis]
                factor = order[taken]
                if size % self.sizes[factor]:
                    if self.sizes[factor] % size:
                        return False
                    split = self._split(factor, size)
                    axes, axis = [split(a) for a in axes], split(axis)
                size //= self.sizes[factor]
                axis.append(factor)
                taken += 1
            axes.append(axis)
        self.axes = axes
        return True

    def _split(self, factor: int, outer: int) -> Callable[[list[int]], list[int]]:
        """Split a factor in two, the first of size `outer`; returns what renumbers a list of factors."""
        self.sizes[factor : factor + 1] = [outer, self.sizes[factor] // outer]

        def renumbered(axis: list[int]) -> list[int]:
            return [n for f in axis for n in ([f, f + 1] if f == factor else [f + (f > factor)])]

        self.origin = [renumbered(axis) for axis in self.origin]
        self.axes = [renumbered(axis) for axis in self.axes]
        return renumbered

    def moves(self) -> list[Move]:
        """At most one Reshape, one Transpose and one Reshape from the original shape to the present one.

        Of equals, axes are cut before they are permuted, and merged after: TensorRT's products read through a
        Transpose right before them, as that of the keys (0, 2, 3, 1), and not through a Reshape.
        """
        order = [factor for axis in self.axes for factor in axis]
        if order == sorted(order):
            return self._between(self.origin, list(range(len(self.origin))))
        starts = [self._whole(), self._runs(), self._groups(order)]
        if sum(map(bool, self.axes)) > sum(map(bool, self.origin)):
            starts[:2] = starts[1::-1]
        return _shortest(*(self._between(*start) for start in starts if start))

    def _between(self, start: list[list[int]], perm: list[int]) -> list[Move]:
        """Reshape to `start`, permute, reshape to the present axes; what does nothing is left out."""
        split, target = self._shape(start), self._shape(self.axes)
        moved = [split[p] for p in perm]
        moves: list[Move] = []
        if split != self._shape(self.origin):
            moves.append(("Reshape", split, split))
        if perm != sorted(perm):
            moves.append(("Transpose", perm, moved))
        if moved != target:
            moves.append(("Reshape", target, target))
        return moves

    def _shape(self, axes: list[list[int]]) -> list[int]:
        return [math.prod(self.sizes[f] for f in axis) for axis in axes]

    def _whole(self) -> tuple[list[list[int]], list[int]] | None:
        """Permute the original axes as they are, if each stayed whole."""
        order = [factor for axis in self.axes for factor in axis]
        filled = sorted(
            (a for a, axis in enumerate(self.origin) if axis), key=lambda a: order.index(self.origin[a][0])
        )
        if [factor for a in filled for factor in self.origin[a]] != order:
            return None
        # Axes of length one go where the result has such, if that spares the Reshape; else they stay.
        ones, rest = [a for a, axis in enumerate(self.origin) if not axis], list(filled)
        perm: list[int] = []
        for axis in self.axes:
            if not axis and ones:
                perm.append(ones.pop(0))
            elif axis and rest and self.origin[rest[0]][0] == axis[0]:
                perm.append(rest.pop(0))
                while rest and self.origin[rest[0]][0] in axis:
                    perm.append(rest.pop(0))
        perm += rest + ones
        shape = self._shape(self.origin)
        if [shape[p] for p in perm] != self._shape(self.axes):
            places = iter(filled)
            perm = [next(places) if axis else a for a, axis in enumerate(self.origin)]
        return self.origin, perm

    def _runs(self) -> tuple[list[list[int]], list[int]] | None:
        """Reshape to the present axes in their original order, if each is one run of factors."""
        if any(axis != list(range(axis[0], axis[0] + len(axis))) for axis in self.axes if axis):
            return None
        places = sorted(range(len(self.axes)), key=lambda i: self.axes[i][0] if self.axes[i] else -1)
        return [self.axes[i] for i in places], [places.index(i) for i in range(len(self.axes))]

    def _groups(self, order: list[int]) -> tuple[list[list[int]], list[int]]:
        """Factors that stay neighbours, in order, travel as one axis."""
        groups: list[list[int]] = []
        for factor in order:
            if groups and groups[-1][-1] + 1 == factor:
                groups[-1].append(factor)
            else:
                groups.append([factor])
        start = sorted(groups)
        return start, [start.index(group) for group in groups]
