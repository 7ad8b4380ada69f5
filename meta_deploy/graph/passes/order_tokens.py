"""Tokens of an attention come in the order that takes the fewest moves: attention does not care for theirs.

Permute the tokens of q, k and v alike, and the output's are permuted alike (Vaswani et al. 2017, eq. 1); the
batch axis is as free. A vertical stripe is then a transposed map cut across.

All sizes but the batch must be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations, product

import onnx_graphsurgeon as gs

from meta_deploy.graph.attention import Attention, find_attention, packed_input
from meta_deploy.graph.explain import declined, shown
from meta_deploy.graph.graph import IdentitySet, is_op, own_nodes, replace, sole_consumer, until_done
from meta_deploy.graph.moves import Factors, Move, add_move, chain_after, chain_before, follow

BATCH_AXIS, TOKEN_AXIS = 0, 2
MOST_ORDERS = 720  # a tenth of a second
Axes = tuple[int, ...]


def order_tokens(graph: gs.Graph) -> int:
    """Reorder tokens and batch of attentions whose q, k and v are parts of one tensor.

    Pattern: moves, Split along heads or channels, attention, moves.
    Check: the moves before and after cut tokens (batch) into the same factors.
    Rewrite: the factors in the order with which there are fewest moves, if those are fewer than now.

    Returns:
        Changes to an attention.
    """
    return until_done(graph, _reorder_all)  # moves behind one attention may be those before the next


def _reorder_all(graph: gs.Graph, fresh: Callable[[str], str]) -> int:
    inside = own_nodes(graph)
    softmaxes = [node for node in graph.nodes if is_op(node, "Softmax")]
    found = (find_attention(graph, node) for node in softmaxes)
    return sum(_reorder(graph, each, inside, fresh) for each in found if each is not None)


def _reorder(graph: gs.Graph, found: Attention, inside: IdentitySet, fresh: Callable[[str], str]) -> bool:
    split = packed_input(graph, found)
    out = found.last.outputs[0]
    if split is None or split.attrs.get("axis", 0) % 4 in (BATCH_AXIS, TOKEN_AXIS):
        return False
    packed = split.inputs[0]
    start, before = chain_before(graph, packed)
    end, after = chain_after(graph, out)
    if not before or not after or not sole_consumer(graph, packed):
        return False
    if any(node not in inside for node in (*before, *after)):
        return False
    into, back = follow(start, before), follow(out, after)
    if into is None or back is None:
        unknown = start if into is None else end
        declined(
            found.last, f"the moves between {shown(unknown)} and the attention do not fit in their factors"
        )
        return False
    for axis in (BATCH_AXIS, TOKEN_AXIS):
        cuts = [into.sizes[f] for f in into.axes[axis]], [back.sizes[f] for f in back.origin[axis]]
        if cuts[0] != cuts[1]:
            cut = f"axis {axis} of {shown(packed)} is made of factors {cuts[0]}"
            declined(found.last, f"{cut}, and that of {shown(out)} taken apart as {cuts[1]}")
            return False
    best: list[list[Move]] | None = None
    for orders in _orders(into):
        plans = [_reordered_end(into, orders).moves(), _reordered_start(back, orders).moves()]
        if best is None or sum(map(len, plans)) < sum(map(len, best)):
            best = plans
    if best is None or sum(map(len, best)) >= len(before) + len(after):
        return False
    packed.inputs.clear()
    end.inputs.clear()
    _write(graph, start, best[0], packed, fresh)
    _write(graph, out, best[1], end, fresh)
    return True


def _orders(into: Factors) -> Iterator[dict[int, Axes]]:
    """For each way to order the factors of batch and tokens: axis -> places in the present order.

    None if there are too many: of some of them the best would depend on where they start.
    """
    counts = [len(into.axes[axis]) for axis in (BATCH_AXIS, TOKEN_AXIS)]
    if math.prod(map(math.factorial, counts)) <= MOST_ORDERS:
        for orders in product(*(permutations(range(count)) for count in counts)):
            yield dict(zip((BATCH_AXIS, TOKEN_AXIS), orders, strict=True))


def _reordered_end(factors: Factors, orders: dict[int, Axes]) -> Factors:
    """The same start, with an end whose axes have their factors in another order."""
    result = factors.copy()
    for axis, order in orders.items():
        result.axes[axis] = [factors.axes[axis][i] for i in order]
    return result


def _reordered_start(factors: Factors, orders: dict[int, Axes]) -> Factors:
    """The same end, from a start whose axes have their factors in another order."""
    origin = [list(axis) for axis in factors.origin]
    for axis, order in orders.items():
        origin[axis] = [factors.origin[axis][i] for i in order]
    old = [factor for axis in origin for factor in axis]
    number = {factor: i for i, factor in enumerate(old)}

    def renumbered(axes: Sequence[Sequence[int]]) -> list[list[int]]:
        return [[number[factor] for factor in axis] for axis in axes]

    result = factors.copy()
    result.sizes = [factors.sizes[factor] for factor in old]
    result.origin, result.axes = renumbered(origin), renumbered(factors.axes)
    return result


def _write(
    graph: gs.Graph, x: gs.Tensor, plan: list[Move], out: gs.Tensor, fresh: Callable[[str], str]
) -> None:
    """The moves of a plan from x to `out`, which x stands for if there are none."""
    if not plan:
        replace(graph, out, x)
    for i, (op, values, shape) in enumerate(plan, 1):
        end = out if i == len(plan) else gs.Variable(fresh(f"{out.name}/ordered"), x.dtype, shape)
        add_move(graph, op, values, x, end, fresh)
        x = end
