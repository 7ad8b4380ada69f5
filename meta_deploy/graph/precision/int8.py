"""8 bits: QuantizeLinear and DequantizeLinear around the products that a target computes so.

Weights are in 8 bits in the file. Ranges of activations come from a calibration, which this is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from meta_deploy.errors import InputError
from meta_deploy.graph.precision.fp16 import FP16
from meta_deploy.graph.precision.precision import Precision
from meta_deploy.graph.precision.rules import EightBitRules
from meta_deploy.text import escaped

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from meta_deploy.graph.precision.lower import Conversion
    from meta_deploy.graph.precision.placement import Placement
    from meta_deploy.graph.precision.quantize import Range

_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")
_ROWS = 12  # of a search's table that are printed
# DequantizeLinear with a scale for each channel; what float16 scales can be had from (`raise_opset`).
_LEAST_OPSET, _LEAST_LOW_OPSET = 13, 18
TITLES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Quantization:
    """What an 8-bit conversion is given.

    Attributes:
        rules: the target's.
        calibrate: from a float32 model and what is to be quantized in it to each tensor's range, and facts
            for people of how these were found.
        outputs: names of the outputs that ship; None: all.
        search: from the same and the ranges to what of it is worth it, and the facts for people, of which
            `declined` is why nothing is, or empty. None: all that the rules let is quantized.
        rest: the precision of what is not in 8 bits: one that the library computes in what is float32 in the
            graph. None: that of the rules.
    """

    rules: EightBitRules
    calibrate: Callable[[ir.Model, Placement], tuple[Mapping[str, Range], dict[str, Any]]]
    outputs: Collection[str] | None = None
    search: Callable[[ir.Model, Placement, Mapping[str, Range]], tuple[Placement, dict[str, Any]]] | None = (
        None
    )
    rest: str | None = None


@dataclass(frozen=True)
class Quantized:
    """What was quantized.

    Attributes:
        products: convolutions and matrix products of the graph.
        quantized: of these, those in 8 bits.
        kept: why the others are not, and how many each.
        tensors: activations that are quantized.
        calibration: how their ranges were found.
        search: what was measured to choose them; None: they were not searched for.
        declined: why nothing is in 8 bits. Otherwise empty.
        rest: the precision of all that is not in 8 bits.
        lowered: what was done to the graph for that; None where it is float32 there.
        carried: nodes between products that pass 8-bit numbers on.
    """

    products: int
    quantized: int
    kept: dict[str, int]
    tensors: int
    calibration: dict[str, Any] | None
    search: dict[str, Any] | None = None
    declined: str = ""
    rest: str = "fp32"
    lowered: Conversion | None = None
    carried: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class INT8(Precision):
    name = "int8"
    title = "8-bit integers where they pay, by --calib-images"
    measures = True
    calibrates = True
    tolerances = {  # noqa: RUF012
        "maps_rms": 0.15,
        "agreement": 0.8,
        "proposals": 0.75,
        "logits": 0.3,
        "scores": 6e-2,
        "box_iou": 0.95,
        "mask_iou": 0.9,
    }

    def check(self, proto):
        found = {node.op_type for node in proto.graph.node}
        ops = sorted(op for op in found if op in _QUANTIZED or op.startswith(("QLinear", "QGemm")))
        if ops:
            raise InputError(
                f"the graph is quantized already ({', '.join(ops)}); export it without --{self.name}"
            )

    def convert(self, proto, feeds=(), float32_operators=(), note=lambda line: None, quantization=None):
        assert quantization is not None
        proto, done = self._quantized(proto, quantization)
        done = replace(done, rest=quantization.rest or quantization.rules.rest)
        if quantization.rules.rest == "fp32":
            return proto, done
        proto, lowered = FP16().convert(proto, feeds, float32_operators, note)
        return proto, replace(done, lowered=lowered)

    def _quantized(
        self, proto: onnx.ModelProto, quantization: Quantization
    ) -> tuple[onnx.ModelProto, Quantized]:
        """The graph with 8 bits where they are worth it, and float32 elsewhere."""
        from meta_deploy.graph.graph import normalized
        from meta_deploy.graph.precision.carry import carrying
        from meta_deploy.graph.precision.lower import LOW_SCALES_OPSET, raise_opset, to_proto
        from meta_deploy.graph.precision.placement import place
        from meta_deploy.graph.precision.qdq import insert

        rules = quantization.rules
        if rules.rest == "fp32":
            model = normalized(_of_opset(proto, _LEAST_OPSET))
        else:
            model = normalized(_of_opset(proto, _LEAST_LOW_OPSET))
            raise_opset(model, LOW_SCALES_OPSET)
        placement = place(model.graph, rules, quantization.outputs)
        count = len(placement.products) + len(placement.declined)
        if not placement.products:
            why = ", ".join(f"{reason} ({n})" for reason, n in placement.reasons().items())
            why = f"no product of the graph gains from 8 bits: {why or 'it has none'}"
            return proto, Quantized(count, 0, placement.reasons(), 0, None, declined=why)
        ranges, calibration = quantization.calibrate(model, placement)
        found = None
        if quantization.search is not None:
            placement, found = quantization.search(model, placement, ranges)
        else:
            placement = carrying(model.graph, placement, rules)
        products, tensors = len(placement.products), len(placement.readers)
        why = found["declined"] if found else ""
        carried = len(placement.carried)
        done = Quantized(
            count, products, placement.reasons(), tensors, calibration, found, why, carried=carried
        )
        if not products:
            return proto, done
        insert(model.graph, placement, ranges, rules)
        return to_proto(model), done

    def describe(self, conversion):
        calibration, reasons = conversion["calibration"], conversion["kept"]
        how = ", ".join(f"{n} by {name}" for name, n in calibration["methods"].items())
        line = f"{conversion['quantized']} of {conversion['products']} products in {self.name}, ranges of "
        line += f"{conversion['tensors']} tensors from {calibration['samples']} {calibration['noun']} ({how})"
        if conversion["carried"]:
            line += f"; {conversion['carried']} nodes between them pass 8 bits on"
        rest = TITLES[conversion["rest"]]
        why = "".join(f"\n  {n} in {rest}: {reason}" for reason, n in reasons.items())
        return line + why + searched(conversion["search"])


def declined(conversion: Mapping[str, Any]) -> str:
    """Why a graph has nothing in 8 bits, for people."""
    rest = TITLES[conversion["rest"]]
    return f"in {rest}, as {conversion['declined']}{searched(conversion['search'])}"


def searched(search: Mapping[str, Any] | None) -> str:
    """What a search measured, as lines: a row a group, those that take the most time first."""
    if search is None:
        return ""
    alike: dict[tuple, list[dict[str, Any]]] = {}
    for row in sorted(search["groups"], key=lambda row: -row["rest_ms"]):
        alike.setdefault((row["rest_ms"], row["low_ms"], row["error"], row["chosen"]), []).append(row)
    title = "groups of products" if search["by"] == "time" else "groups of products (estimated)"
    lines = [f"{title:<44}{'ms':>9}{'8 bits':>9}{'error':>8}  8 bits"]
    for (full, low, error, chosen), rows in list(alike.items())[:_ROWS]:
        name = rows[0]["group"] if len(rows[0]["group"]) < 30 else "…" + rows[0]["group"][-28:]
        more = f" and {len(rows) - 1} alike" if len(rows) > 1 else ""
        shown = "" if error is None else f"{error:.3f}"
        lines.append(
            f"{escaped(name) + more:<44}{full:>9.3f}{low:>9.3f}{shown:>8}  {'yes' if chosen else 'no'}"
        )
    if len(alike) > _ROWS:
        lines.append(f"and {len(alike) - _ROWS} more, which the manifest lists")
    return "".join(f"\n  {line}" for line in lines)


def _of_opset(proto: onnx.ModelProto, wanted: int) -> onnx.ModelProto:
    """The model at an opset in which DequantizeLinear takes the scales that are wanted.

    Raises:
        InputError: an older one that ONNX cannot convert.
    """
    import onnx

    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset >= wanted:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, wanted)
    except Exception as error:  # of a foreign file, anything
        raise InputError(
            f"the graph is of opset {opset}, and 8 bits need {wanted}; export it with a newer opset"
        ) from error
