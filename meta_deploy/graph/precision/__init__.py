"""Precisions: one file each. To add one, write its file and name it here."""

from meta_deploy.graph.precision.bf16 import BF16
from meta_deploy.graph.precision.fp8 import FP8
from meta_deploy.graph.precision.fp16 import FP16
from meta_deploy.graph.precision.fp32 import FP32
from meta_deploy.graph.precision.int8 import INT8
from meta_deploy.graph.precision.precision import Precision

PRECISIONS: dict[str, Precision] = {
    precision.name: precision for precision in (FP32(), FP16(), BF16(), INT8(), FP8())
}

__all__ = ["PRECISIONS", "Precision"]
