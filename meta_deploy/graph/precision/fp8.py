"""8-bit floats of 4 bits of exponent and 3 of mantissa (E4M3), by the machinery of 8-bit integers.

They hold small numbers beside large ones better than integers do, and numbers of like size worse: rounding
costs 2.6 % of a number, whatever its scale (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
"""

from __future__ import annotations

from meta_deploy.graph.precision.int8 import INT8


class FP8(INT8):
    name = "fp8"
    title = "8-bit floats (E4M3) where they pay, by --calib-images"
