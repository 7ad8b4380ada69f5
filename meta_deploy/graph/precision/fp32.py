"""float32: the graph as it is."""

from __future__ import annotations

from meta_deploy.graph.precision.precision import Precision


class FP32(Precision):
    name = "fp32"
    title = "float32"
    tolerances = {  # noqa: RUF012
        "maps": 2e-4,
        "agreement": 0.99,
        "proposals": 0.99,
        "logits": 5e-3,
        "scores": 1e-3,
        "box_iou": 0.995,
        "mask_iou": 0.99,
    }

    def convert(self, proto, feeds=(), float32_operators=(), note=lambda line: None, quantization=None):
        return proto, None
