"""bfloat16: float32's range with 8 bits of precision, so nothing has to be measured."""

from __future__ import annotations

from meta_deploy.graph.precision.precision import Precision


class BF16(Precision):
    name = "bf16"
    title = "bfloat16"
    tolerances = {  # noqa: RUF012
        "maps_rms": 0.1,
        "agreement": 0.85,
        "proposals": 0.75,
        "logits": 0.25,
        "scores": 5e-2,
        "box_iou": 0.95,
        "mask_iou": 0.9,
    }

    def convert(self, proto, feeds=(), float32_operators=(), note=lambda line: None, quantization=None):
        import onnx_ir as ir

        from meta_deploy.graph.graph import normalized
        from meta_deploy.graph.precision.lower import apply, plan, to_proto

        model = normalized(proto)
        done = apply(model, plan(model, ir.DataType.BFLOAT16, None, float32_operators))
        return to_proto(model), done
