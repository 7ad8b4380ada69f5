"""ONNX Runtime's own quantization, as what ours is held against."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

PRODUCTS = ["Conv", "MatMul", "Gemm"]


def quantize_static_of(
    graph: onnx.ModelProto, feeds: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, onnx.ModelProto]:
    """A graph by its defaults, and with its best settings, for all operators and for products alone.

    The best are unsigned activations and int8 weights by channel. `feeds` are iterated three times.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self):
            return next(self.feeds, None)

    best: dict[str, Any] = {
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
    }
    settings: dict[str, dict[str, Any]] = {
        "defaults": {},
        "best, all": best,
        "best, products": {**best, "op_types_to_quantize": PRODUCTS},
    }
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(graph, source)
        for name, options in settings.items():
            quantize_static(source, out, Reader(), **options)
            made[f"quantize_static, {name}"] = onnx.load(out)
    return made
