"""Which pass makes results differ? The shortest run of passes that does ends with it. Knows graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx

from meta_deploy.errors import VerificationError
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.graph.prices import Cost

Check = Callable[[onnx.ModelProto], Any]  # raises VerificationError where a graph's results differ


def at_fault(original: onnx.ModelProto, passes: Sequence[str], prices: Cost, check: Check) -> str | None:
    """The pass after which results differ, and before which they do not.

    Found by bisection, so of several that are at fault it is one, and where errors of all of them add up, the
    one that takes them over the limit.

    Args:
        original: the graph before all passes.
        passes: that were run, in order.
        prices: the target's.
        check: what compares a graph's results with the original's.

    Returns:
        Its name; None where results differ without passes too, or do not differ after all of them.
    """

    def differs(count: int) -> bool:
        graph = run_passes(original, passes[:count], prices)[0]
        try:
            check(graph)
        except VerificationError:
            return True
        return False

    if not passes or not differs(len(passes)) or differs(0):
        return None
    sound, faulty = 0, len(passes)
    while faulty - sound > 1:
        middle = (sound + faulty) // 2
        if differs(middle):
            faulty = middle
        else:
            sound = middle
    return passes[faulty - 1]
