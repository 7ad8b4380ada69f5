"""How the reference's two own operators, NMS and RoIAlign over a pyramid, read in ONNX: a table per form.

Knows which function translates which operator.
"""

from collections.abc import Callable
from typing import Any

import torch

from meta_deploy.export import lowered_operators, native_operators
from meta_deploy.models.ops import boxes, roi_align  # noqa: F401  (they register the operators)

Table = dict[Callable[..., Any], Callable[..., Any]]
# "native": by ONNX's NonMaxSuppression and RoiAlign; "lowered": by plain arithmetic.
TRANSLATIONS: dict[str, Table] = {
    form: {
        torch.ops.meta_deploy.nms.default: module.nms,
        torch.ops.meta_deploy.pyramid_roi_align.default: module.pyramid_roi_align,
    }
    for form, module in (("native", native_operators), ("lowered", lowered_operators))
}
