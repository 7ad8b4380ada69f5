"""How operators read in ONNX that PyTorch's exporter does not translate, or not so: a table per form.

Those are the reference's own two, NMS and RoIAlign over a pyramid, batch normalization, and sampling.

Knows which function translates which operator.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op

from meta_deploy.export import lowered_operators, native_operators
from meta_deploy.models.ops import boxes, roi_align  # noqa: F401  (they register the operators)


def batch_norm(x, weight, bias, mean, variance, training, momentum, epsilon, cudnn_enabled):
    """`aten::batch_norm` of a model in evaluation mode."""
    assert not training
    return op.BatchNormalization(x, weight, bias, mean, variance, epsilon=epsilon)


Table = dict[Callable[..., Any], Callable[..., Any]]
aten, own = torch.ops.aten, torch.ops.meta_deploy
# "native": by ONNX's NonMaxSuppression, RoiAlign and GridSample; "lowered": without these, but for RoIAlign,
# which is one GridSample of many points then.
TRANSLATIONS: dict[str, Table] = {
    "native": {
        aten.batch_norm.default: batch_norm,
        own.nms.default: native_operators.nms,
        own.pyramid_roi_align.default: native_operators.pyramid_roi_align,
    },
    "lowered": {
        aten.batch_norm.default: batch_norm,
        aten.grid_sampler.default: lowered_operators.grid_sample,
        aten.grid_sampler_2d.default: lowered_operators.grid_sample,
        own.nms.default: lowered_operators.nms,
        own.pyramid_roi_align.default: lowered_operators.pyramid_roi_align,
    },
}
