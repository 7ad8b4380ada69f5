"""What 8 bits gain in time, measured with the kernels of the library that runs the bundle. Knows clocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from meta_deploy.calib.costs import PAYS, Costs, Kept, Row, structure
from meta_deploy.calib.groups import groups_of, kernels_of, part_of, shapes_of
from meta_deploy.calib.timing import facts_of_each, interleaved
from meta_deploy.graph.precision.placement import Placement
from meta_deploy.graph.precision.quantize import Range

_ROUNDS, _SECONDS = 15, 5.0  # that a group is timed


class Timed(Costs):
    """Each group alone in turns with and without 8 bits; of groups that are alike one is timed."""

    by, where, margin = "time", "on this machine", PAYS

    def rows(
        self, model: ir.Model, placement: Placement, ranges: Mapping[str, Range], kept: Kept
    ) -> list[Row]:
        groups = groups_of(placement)
        kernels = [kernels_of(group) for group in groups]
        shapes = shapes_of(model, kernels, self.trial.feed)
        times = kept.table("times")
        known = f", {len(times)} times at hand from before" if times else ""
        self.note(f"timing {len(groups)} groups of products in float32 and in 8 bits{known}")
        rows = []
        for done, (group, nodes) in enumerate(zip(groups, kernels, strict=True)):
            one = part_of(nodes, group.products, shapes, ranges, self.rules, model.opset_imports)
            alike = structure(one.float32)
            if alike not in times:
                runs = [self.trial.open(proto) for proto in (one.float32, one.int8)]
                times[alike] = gain_of(interleaved(runs, one.feed, _ROUNDS, _SECONDS))
                kept.write()
            rows.append(Row(group, *times[alike]))
            self.progress(done + 1, len(groups))
        return rows

    def near(self, chosen: list[Row], rows: list[Row]) -> list[list[Row]]:
        """One with those that seem to lose no time, and one with all there are: alone, a group pays for
        numbers that it would share with its neighbours.
        """
        return [[row for row in rows if row in chosen or not row.loses], rows]

    def compare(self, protos: Sequence[onnx.ModelProto]) -> list[dict[str, Any]]:
        runs = [self.trial.open(proto) for proto in protos]
        return facts_of_each(interleaved([*runs, self.trial.baseline()], self.trial.feed))


def gain_of(times: Sequence[Sequence[float]]) -> list[float]:
    """Of rounds of (float32, 8 bits) in seconds, the figures of a `Row`."""
    full, low = (1000 * float(np.median(one)) for one in zip(*times, strict=True))
    gains = [1000 * (a - b) for a, b in times]
    counts = len(gains), sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return [full, low, float(np.median(gains)), *counts]
