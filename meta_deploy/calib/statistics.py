"""What values tensors of a graph take on samples, gathered without keeping activations.

The graph itself takes the statistics: its outputs are each tensor's extremes and small samples, so that
memory does not grow with images, and hardly with their size. Knows graphs and ONNX Runtime; decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from meta_deploy import ort
from meta_deploy.calib.histogram import Histogram
from meta_deploy.errors import InputError
from meta_deploy.graph.precision.placement import Product
from meta_deploy.graph.precision.ranges import open_session
from meta_deploy.graph.precision.values import FLOAT, Names, set_constant

# Numbers of a tensor that are looked at: in a run, and about so many in all of them. Its extremes are of all.
MOST_VALUES, _FEWEST_VALUES, _ALL_VALUES = 1 << 16, 1 << 13, 1 << 22
BLOCKS = 4  # runs of which parts of tensors are kept
_SIDE, _ROWS = 12, 128  # of such a part: of a feature map, of a matrix
_PHASE = "calibration/run"
_END = np.iinfo(np.int64).max


@dataclass
class Statistics:
    """Of one tensor.

    Attributes:
        low, high: its least and largest value.
        histogram: of at most `values_a_run` values a run, spread over the tensor.
        blocks: parts of it as its first reader reads it, of some runs: rows (rows, C) for a matrix product,
            windows (B, C, H, W) for a convolution; values in no order where no product reads it.
    """

    low: float = np.inf
    high: float = -np.inf
    histogram: Histogram = field(default_factory=Histogram)
    blocks: list[np.ndarray] = field(default_factory=list)

    def add(self, low: float, high: float, values: np.ndarray) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.histogram.add(values)

    @property
    def whole(self) -> tuple[float, float]:
        """From the least to the largest value, and zero."""
        return min(self.low, 0.0), max(self.high, 0.0)


def values_a_run(runs: int) -> int:
    """The most numbers of a tensor that are looked at in each of so many runs."""
    return min(MOST_VALUES, max(_FEWEST_VALUES, _ALL_VALUES // runs))


def collect(
    model: ir.Model,
    readers: Mapping[str, list[Product]],
    feeds: Iterable[Mapping[str, np.ndarray]],
    runs: int,
    progress: Callable[[int], None] = lambda runs: None,
) -> dict[str, Statistics]:
    """Run a model on samples and gather the statistics of tensors.

    Args:
        model: in float32, its types and shapes inferred; not changed.
        readers: the tensors, by name, with the products that read each.
        feeds: inputs by name, one dictionary a run.
        runs: how many there are.
        progress: called with the runs that are done.

    Raises:
        InputError: a tensor has a value that is not finite.
    """
    watched = _Watched(model.clone(), readers, values_a_run(runs))
    session = open_session(watched.model)
    taken = [given.name for given in session.get_inputs() if given.name != _PHASE]
    found = {name: Statistics() for name in readers}
    kept = {int(i * runs / BLOCKS) for i in range(BLOCKS)}
    for run, feed in enumerate(feeds):
        values = ort.run(session, None, {**{name: feed[name] for name in taken}, _PHASE: np.array(run)})
        for i, (name, one) in enumerate(found.items()):
            low, high, total, sample, block = values[5 * i : 5 * i + 5]
            if not np.isfinite(total):
                raise InputError(
                    f"tensor '{name}' has values that are not finite (NaN or infinity) on calibration run "
                    f"{run + 1} of {runs}; leave that input out, or repair the model"
                )
            if sample.size:
                one.add(float(low), float(high), sample)
            if run in kept:
                one.blocks.append(block)
        progress(run + 1)
    return found


class _Watched:
    """A model whose outputs are, for each tensor: least, largest, sum of magnitudes, sample, part."""

    def __init__(self, model: ir.Model, readers: Mapping[str, list[Product]], most: int) -> None:
        self.model, self.graph, self.most = model, model.graph, most
        self.names = Names(self.graph)
        self._constants: dict[tuple[int, ...], ir.Value] = {}
        self.phase = ir.Value(name=_PHASE, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        values = {v.name: v for v in (*self.graph.inputs, *(v for n in self.graph for v in n.outputs))}
        self.graph.inputs.append(self.phase)
        self.graph.outputs[:] = [o for name, some in readers.items() for o in self._watch(values[name], some)]

    def _watch(self, value: ir.Value, products: list[Product]) -> list[ir.Value]:
        self.nodes: list[ir.Node] = []
        scalar = {"keepdims": ir.AttrInt64("keepdims", 0)}
        outputs = [self._op(op, [value], scalar) for op in ("ReduceMin", "ReduceMax", "ReduceL1")]
        flat = self._op("Reshape", [value, self._ints(-1)])
        sample = self._spread(flat, self.most)
        outputs += [sample, self._part(value, products, sample)]
        maker = value.producer()
        if maker is None:
            self.graph.insert_before(self.graph[0], self.nodes)
        else:
            self.graph.insert_after(maker, self.nodes)  # while the tensor is in memory anyway
        for output in outputs:
            output.dtype = FLOAT
        return outputs

    def _part(self, value: ir.Value, products: list[Product], sample: ir.Value) -> ir.Value:
        if not products:
            return self._op("Identity", [sample])
        node, weights = products[0].node, products[0].weights
        if node.op_type != "Conv":
            width = weights.size // weights.shape[products[0].axis]
            rows = self._op("Reshape", [value, self._ints(-1, width)])
            return self._spread(rows, _ROWS)
        for axis in range(2, weights.ndim):
            value = self._window(value, axis, _SIDE + weights.shape[axis] - 1)
        return value

    def _spread(self, value: ir.Value, most: int) -> ir.Value:
        """At most `most` entries of the first axis, all over it, and others in each run.

        The step divides by neither 2 nor 3, so that it does not fall in with a number of channels.
        """
        size = self._op("Gather", [self._op("Shape", [value]), self._ints(0)])
        times = self._op("Add", [self._op("Div", [size, self._ints(most)]), self._ints(5)])
        step = self._op("Mul", [self._op("Div", [times, self._ints(6)]), self._ints(6)])
        step = self._op("Add", [step, self._ints(1)])
        start = self._op("Mod", [self._op("Mul", [self.phase, self._ints(7919)]), step])
        return self._op("Slice", [value, start, self._ints(_END), self._ints(0), step])

    def _window(self, value: ir.Value, axis: int, side: int) -> ir.Value:
        """`side` places along an axis, elsewhere in each run."""
        size = self._op("Gather", [self._op("Shape", [value]), self._ints(axis)])
        room = self._op("Max", [self._op("Sub", [size, self._ints(side - 1)]), self._ints(1)])
        start = self._op("Mod", [self._op("Mul", [self.phase, self._ints(7919 * axis)]), room])
        end = self._op("Add", [start, self._ints(side)])
        return self._op("Slice", [value, start, end, self._ints(axis)])

    def _op(
        self, op: str, inputs: list[ir.Value], attributes: Mapping[str, ir.Attr] | None = None
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=self.names.fresh(f"calibration/{op}"))
        node.outputs[0].name = node.name
        self.nodes.append(node)
        return node.outputs[0]

    def _ints(self, *numbers: int) -> ir.Value:
        if numbers not in self._constants:
            value = ir.Value(name=self.names.fresh("calibration/numbers"))
            set_constant(value, np.array(numbers, np.int64), value.name)
            self.graph.register_initializer(value)
            self._constants[numbers] = value
        return self._constants[numbers]
