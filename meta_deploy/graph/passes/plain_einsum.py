"""An Einsum that is a product of matrices becomes one: other passes then know attention and linear maps.

Knows ONNX's notation of sums and no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import constant_value, fresh_names, is_batch, is_op, static_shape, tidy
from meta_deploy.graph.moves import add_move

MOST_MOVES = 2


@dataclass(frozen=True)
class Sum:
    """An Einsum of two operands, axis by axis, each a letter.

    Attributes:
        a, b, out: the axes of the operands and of the result.
        batch: axes that all three have.
        left, right: those of the result that only the first, or the second, operand has.
        summed: those that both operands have, and the result has not.
        sizes: of each axis.
    """

    a: str
    b: str
    out: str
    batch: str
    left: str
    right: str
    summed: str
    sizes: dict[str, int]

    def shape(self, *groups: str) -> list[int]:
        """One axis for each group of axes."""
        return [math.prod(self.sizes[letter] for letter in group) for group in groups]


def plain_einsum(graph: gs.Graph) -> int:
    """Replace Einsum of two operands by MatMul, with the Transposes and Reshapes that it takes.

    Check: no axis is repeated in an operand, or summed in one alone; some are summed; sizes but the batch are
    known, and none is broadcast; it takes no more than two moves, else the operator does as well.

    Returns:
        Nodes replaced.
    """
    fresh, changes = fresh_names(graph), 0
    for node in list(graph.nodes):
        if not is_op(node, "Einsum"):
            continue
        found = _read(node)
        if isinstance(found, str):
            declined(node, found)
            continue
        if (count := _moves(node, found)) > MOST_MOVES:
            declined(node, f"as a product it takes {count} moves")
            continue
        _write(graph, node, found, fresh)
        changes += 1
    if changes:
        tidy(graph)
    return changes


def _read(node: gs.Node) -> Sum | str:
    """What an Einsum does; or why it is no product of matrices that is understood."""
    text = node.attrs["equation"]
    equation = "".join((text.decode() if isinstance(text, bytes) else text).split())
    operands, arrow, out = equation.partition("->")
    a, comma, b = operands.partition(",")
    if len(node.inputs) != 2 or not comma or not (a + b + out).isalpha():
        return f"'{equation}' is not of two operands whose axes are all named"
    if not arrow:
        out = "".join(sorted(letter for letter in set(a + b) if (a + b).count(letter) == 1))
    if any(len(set(axes)) < len(axes) for axes in (a, b, out)):
        return f"'{equation}' has an axis twice in one place"
    batch = "".join(letter for letter in out if letter in a and letter in b)
    left = "".join(letter for letter in out if letter in a and letter not in b)
    right = "".join(letter for letter in out if letter in b and letter not in a)
    summed = "".join(letter for letter in a if letter in b and letter not in out)
    if set(a) != set(batch + left + summed) or set(b) != set(batch + right + summed) or not summed:
        return f"'{equation}' sums an axis of one operand, or none of both"
    sizes: dict[str, int] = {}
    for axes, tensor in ((a, node.inputs[0]), (b, node.inputs[1])):
        shape = static_shape(tensor)
        if shape is None or len(shape) != len(axes) or 0 in shape or not _is_float(tensor):
            return f"{shown(tensor)} is not of known sizes, or of no floating point type"
        for letter, size in zip(axes, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                return f"axis '{letter}' of '{equation}' is broadcast"
    groups = (left, right, summed)
    if sum(map(is_batch, sizes.values())) > 1 or any(is_batch(sizes[letter]) for letter in summed):
        return f"'{equation}' sums over the batch, or has it twice"
    if batch and any(is_batch(sizes[letter]) for letter in left + right):
        return f"the batch is an axis of one operand of '{equation}' alone"
    return Sum(a, b, out, batch, *groups, sizes)


def _is_float(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.issubdtype(tensor.dtype, np.floating)


def _groups(found: Sum) -> tuple[list[str], list[str], list[str]]:
    """The axes of both operands of the product, and of its result, each of these letters.

    left * summed times summed * right, for each of the batch; without one, the left axes stay apart.
    """
    rows = [found.left] if found.batch or not found.left else list(found.left)
    left, right = [*found.batch, *rows], [*found.batch, found.summed, found.right]
    return [*left, found.summed], right, [*left, found.right]


def _moves(node: gs.Node, found: Sum) -> int:
    """Transposes and Reshapes that the product takes."""
    first, second, made = _groups(found)
    pairs = [(found.a, first, node.inputs[0]), (found.b, second, node.inputs[1]), (found.out, made, None)]
    return sum(
        (axes != "".join(groups)) + any(len(group) != 1 for group in groups)
        for axes, groups, tensor in pairs
        if not isinstance(tensor, gs.Constant)
    )


def _write(graph: gs.Graph, node: gs.Node, found: Sum, fresh: Callable[[str], str]) -> None:
    (a, b), y = node.inputs, node.outputs[0]
    batch, left, right = found.batch, found.left, found.right
    of_a, of_b, made = _groups(found)
    first = _arranged(graph, a, found.a, of_a, found, fresh)
    second = _arranged(graph, b, found.b, of_b, found, fresh)
    y.inputs.clear()
    shape = found.shape(*made)
    axes = batch + left + right
    whole = [found.sizes[letter] for letter in axes]
    permuted = axes != found.out
    apart = gs.Variable(fresh(f"{y.name}/apart"), y.dtype, whole) if permuted else y
    product = gs.Variable(fresh(f"{y.name}/product"), y.dtype, shape) if shape != whole else apart
    graph.nodes.append(gs.Node("MatMul", node.name, {}, [first, second], [product]))
    if product is not apart:
        add_move(graph, "Reshape", whole, product, apart, fresh)
    if permuted:
        add_move(graph, "Transpose", [axes.index(letter) for letter in found.out], apart, y, fresh)


def _arranged(
    graph: gs.Graph,
    x: gs.Tensor,
    axes: str,
    groups: Sequence[str],
    found: Sum,
    fresh: Callable[[str], str],
) -> gs.Tensor:
    """x with its axes in the order of these groups, each of them one axis."""
    wanted = "".join(groups)
    perm, target = [axes.index(letter) for letter in wanted], found.shape(*groups)
    value = constant_value(x)
    if value is not None:
        return gs.Constant(
            fresh(f"{x.name}/arranged"), np.ascontiguousarray(value.transpose(perm)).reshape(target)
        )
    shape = [found.sizes[letter] for letter in wanted]
    if wanted != axes:
        permuted = gs.Variable(fresh(f"{x.name}/permuted"), x.dtype, shape)
        add_move(graph, "Transpose", perm, x, permuted, fresh)
        x = permuted
    if shape != target:
        merged = gs.Variable(fresh(f"{x.name}/merged"), x.dtype, target)
        add_move(graph, "Reshape", target, x, merged, fresh)
        x = merged
    return x
