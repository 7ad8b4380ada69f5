"""How the operators that PyTorch's exporter does not translate read in ONNX: a table per form.

Those are the reference's own two, NMS and RoIAlign over a pyramid, and batch normalization.

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
# "native": by ONNX's NonMaxSuppression and RoiAlign; "lowered": by plain arithmetic.
TRANSLATIONS: dict[str, Table] = {
    form: {
        torch.ops.aten.batch_norm.default: batch_norm,
        torch.ops.meta_deploy.nms.default: module.nms,
        torch.ops.meta_deploy.pyramid_roi_align.default: module.pyramid_roi_align,
    }
    for form, module in (("native", native_operators), ("lowered", lowered_operators))
}
