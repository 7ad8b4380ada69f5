"""What 8 or 6 bits cost the products of a graph, simulated: ranges, and remedies that are not built in.

    python benchmarks/int8_simulation.py FILE.onnx [--input-size H W] [--photos DIR] [--count N] [--bits 8 6]

Each product with constant weights is computed on rows of its input that photos gave, in float64 and from
quantized numbers. The error is the norm of the difference over the norm, on rows that nothing was fitted to;
the table has its root mean square over the products. Remedies, each on top of the best range:

- bias correction: the mean difference of each output channel goes into the bias;
- smoothing: input channels are divided, and weights multiplied, by sqrt(max |x| / max |w|), as SmoothQuant
  does (Xiao et al., ICML 2023), where a LayerNorm in front takes the division;
- NoisyQuant (Liu et al., CVPR 2023): a fixed uniform noise on the input, taken off in the bias.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx

from benchmarks.common import machine, parser, photos, save, table
from benchmarks.foreign_graph import IMAGENET
from meta_deploy.calib.choice import ranges_of
from meta_deploy.calib.methods import METHODS
from meta_deploy.calib.statistics import Statistics, collect
from meta_deploy.export.options import Options
from meta_deploy.export.sources import open_source
from meta_deploy.graph.graph import normalized
from meta_deploy.graph.precision.placement import Product, place
from meta_deploy.graph.precision.quantize import Range, fake_quantized
from meta_deploy.graph.precision.rules import EightBitRules

NOISE = (0.25, 0.5, 1.0, 2.0)  # of NoisyQuant, in steps of the grid


@dataclass(frozen=True)
class Rules(EightBitRules):
    """Unsigned numbers of any bits."""

    bits: int = 8

    @property
    def most(self) -> int:
        return 2**self.bits - 1


@dataclass
class Case:
    """A product: rows to fit on and rows to measure on, (rows, C), weights (C, outputs), and its ranges."""

    fit: np.ndarray
    test: np.ndarray
    weights: np.ndarray
    ranges: dict[str, Range]
    rules: Rules
    normed: bool


def main(argv: Sequence[str] | None = None) -> None:
    p = parser(__doc__ or "", "int8_simulation")
    p.add_argument("file", type=Path)
    p.add_argument("--input-size", nargs=2, type=int, metavar=("H", "W"))
    p.add_argument("--count", type=int, default=32, help="photos (default: %(default)s)")
    p.add_argument("--bits", nargs="+", type=int, default=[8, 6])
    args = p.parse_args(argv)
    size = tuple(args.input_size) if args.input_size else None
    source = open_source(args.file, Options(input_size=size, batch=1, **IMAGENET), print)
    samples = source.samples(photos(args.photos, args.count))
    proto = source.graph("native")
    columns = {}
    for bits in args.bits:
        rules = Rules(False, False, False, speedup=4, value=0, node=0, bits=bits)
        columns[bits] = simulated(proto, samples, rules)
    rows = [
        {"": name} | {f"{bits} bits": columns[bits][name] for bits in args.bits}
        for name in columns[args.bits[0]]
    ]
    print(table(rows))
    save(args.json, machine=machine(), file=args.file.name, photos=len(samples), rows=rows)


def simulated(proto: onnx.ModelProto, samples: Any, rules: Rules) -> dict[str, float]:
    """The error of each way, a root mean square over the products."""
    model = normalized(proto)
    placement = place(model.graph, rules)
    found = collect(model, placement.readers, samples, samples.runs())
    cases = [
        case_of(product, found[name], rules)
        for name, products in placement.readers.items()
        for product in products
        if product.node.op_type != "Conv"
    ]
    ways: dict[str, Callable[[Case], float]] = {
        name: lambda case, name=name: error(case, case.ranges[name])  # type: ignore[misc]
        for name in METHODS
    }
    ways |= {"best range": plain, "bias correction": corrected, "smoothing": smoothed, "NoisyQuant": noisy}
    return {name: float(np.sqrt(np.mean([way(case) ** 2 for case in cases]))) for name, way in ways.items()}


def case_of(product: Product, statistics: Statistics, rules: Rules) -> Case:
    rows = [block.reshape(-1, block.shape[-1]).astype(np.float64) for block in statistics.blocks]
    half = max(len(rows) // 2, 1)
    weights = product.weights if product.axis == 1 else product.weights.T
    maker = product.node.inputs[0].producer() if product.node.inputs[0] is not None else None
    normed = maker is not None and maker.op_type == "LayerNormalization"
    ranges = ranges_of(statistics, rules)
    fit, test = np.concatenate(rows[:half]), np.concatenate(rows[half:] or rows)
    return Case(fit, test, weights.astype(np.float64), ranges, rules, normed)


def quantized_weights(weights: np.ndarray, bits: int) -> np.ndarray:
    """As they come back, symmetric by output channel."""
    most = 2 ** (bits - 1) - 1
    scales = np.maximum(np.abs(weights).max(axis=0), 1e-30) / most
    return np.rint(weights / scales) * scales


def difference(case: Case, rows: np.ndarray, ends: Range) -> np.ndarray:
    low = fake_quantized(rows, ends, case.rules) @ quantized_weights(case.weights, case.rules.bits)
    return low - rows @ case.weights


def relative(case: Case, off: np.ndarray) -> float:
    return float(np.linalg.norm(off) / np.linalg.norm(case.test @ case.weights))


def error(case: Case, ends: Range) -> float:
    return relative(case, difference(case, case.test, ends))


def chosen(case: Case) -> Range:
    """The range that is best on the rows to fit on."""
    return min(case.ranges.values(), key=lambda ends: float(np.linalg.norm(difference(case, case.fit, ends))))


def plain(case: Case) -> float:
    return error(case, chosen(case))


def corrected(case: Case) -> float:
    ends = chosen(case)
    shift = difference(case, case.fit, ends).mean(axis=0)
    return relative(case, difference(case, case.test, ends) - shift)


def smoothed(case: Case) -> float:
    """Where a LayerNorm takes the division and it is better on the rows to fit on."""
    if not case.normed:
        return plain(case)
    inputs = np.maximum(np.abs(case.fit).max(axis=0), 1e-5)
    outputs = np.maximum(np.abs(case.weights).max(axis=1), 1e-5)
    factors = np.sqrt(inputs / outputs)
    fit, test = case.fit / factors, case.test / factors
    # Extremes are of all photos, as those of the other ranges.
    whole = float(min(fit.min(), test.min())), float(max(fit.max(), test.max()))
    ranges = {f"{part}": (whole[0] * part, whole[1] * part) for part in np.linspace(1, 0.5, 11)}
    changed = Case(fit, test, case.weights * factors[:, None], ranges, case.rules, case.normed)
    before, after = (np.linalg.norm(difference(one, one.fit, chosen(one))) for one in (case, changed))
    return plain(changed if after < before else case)


def noisy(case: Case) -> float:
    """The size of the noise, none included, is the best on the rows to fit on."""
    ends = chosen(case)
    step = (ends[1] - ends[0]) / case.rules.most
    uniform = np.random.default_rng(0).uniform(-1, 1, case.fit.shape[1])
    weights = quantized_weights(case.weights, case.rules.bits)

    def off(rows: np.ndarray, size: float) -> np.ndarray:
        noise = size * step * uniform
        return (fake_quantized(rows + noise, ends, case.rules) - noise) @ weights - rows @ case.weights

    size = min((0.0, *NOISE), key=lambda size: float(np.linalg.norm(off(case.fit, size))))
    return relative(case, off(case.test, size))


if __name__ == "__main__":
    main()
