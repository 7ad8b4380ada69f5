"""float16. Its range ends at 65504, so what comes near that on the user's inputs stays in float32."""

from __future__ import annotations

from meta_deploy.graph.precision.precision import Precision

# An activation may be this much larger on other inputs than on those it was measured on.
HEADROOM = 4.0
LARGEST = 65504.0
FLOAT32_MAX = 3.4028235e38  # stands for infinity, which JSON has no number for


class FP16(Precision):
    name = "fp16"
    title = "float16"
    measures = True
    tolerances = {  # noqa: RUF012
        "maps_rms": 0.02,
        "agreement": 0.95,
        "proposals": 0.9,
        "logits": 5e-2,
        "scores": 1e-2,
        "box_iou": 0.98,
        "mask_iou": 0.97,
    }

    def convert(self, proto, feeds=(), float32_operators=(), note=lambda line: None, quantization=None):
        import onnx_ir as ir

        from meta_deploy.graph.graph import normalized
        from meta_deploy.graph.precision.lower import apply, plan, to_proto
        from meta_deploy.graph.precision.ranges import activation_maxima

        model = normalized(proto)
        made = plan(model, ir.DataType.FLOAT16, None, float32_operators)
        overflow = overflowing(activation_maxima(model, feeds, made.tensors())) if feeds else {}
        if overflow:
            most = max(overflow.values())
            note(f"{len(overflow)} tensors come near float16's range (up to {most:.3g}) and stay in float32")
            made = plan(model, ir.DataType.FLOAT16, overflow, float32_operators)
        done = apply(model, made)
        return to_proto(model), done


def overflowing(maxima: dict[str, float], headroom: float = HEADROOM) -> dict[str, float]:
    """Those of tensors' largest magnitudes that come within `headroom` times of float16's limit."""
    largest = LARGEST / headroom
    return {name: min(value, FLOAT32_MAX) for name, value in maxima.items() if not value <= largest}
