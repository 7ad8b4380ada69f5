"""Model to ONNX: the literal program of the reference, with static or dynamic inputs.

Knows the models' interface and ONNX; no graph pass runs here. PyTorch's own graph optimizer is switched off:
it takes most of an export's time and grows faster than the graph (benchmarks/README.md).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import nn

from meta_deploy.bundle.manifest import InputSpec
from meta_deploy.export.decompose import translated
from meta_deploy.export.operators import TRANSLATIONS
from meta_deploy.graph.modules import name_by_module

OPSET = 20
DIVISOR = 32
# What there is one of while tracing (an image, a stripe, a window) would be taken for a constant. So a batch
# is traced with at least two images, and a dynamic size at one that has several of everything, no two alike.
TRACED_SIZE = (9 * DIVISOR, 11 * DIVISOR)


def export_onnx(model: nn.Module, spec: InputSpec, operators: str = "native") -> onnx.ModelProto:
    """Trace the model and translate it, operator by operator.

    Args:
        model: a zoo model in evaluation mode.
        spec: the input's dimensions.
        operators: how NMS, RoIAlign and sampling are written, a key of `operators.TRANSLATIONS`.

    Returns:
        The literal graph. After the task's outputs come the intermediate stages that
        `model(images, stages=True)` adds, for verification; `drop_outputs` removes them.
    """
    batch = spec.batch.opt if spec.static_batch else max(spec.batch.opt, 2)
    height, width = spec.size.opt if spec.static_size else TRACED_SIZE
    images = torch.zeros(batch, 3, height, width)
    with torch.no_grad(), quiet():
        program = torch.export.export(
            model, (images,), {"stages": True}, dynamic_shapes=_dynamic_shapes(spec), strict=False
        )
        outputs = program.call_spec.out_spec
        assert outputs is not None
        exported = translated(
            program,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(outputs.unflatten([None] * outputs.num_leaves)),
            custom_translation_table=TRANSLATIONS[operators],
            verbose=False,
        )
    proto = exported.model_proto
    name_by_module(proto.graph.node)
    for node in proto.graph.node:
        # Where each node came from in the Python source is of no use in a bundle, and it leaks paths.
        del node.metadata_props[:]
        node.ClearField("doc_string")
    del proto.graph.metadata_props[:], proto.metadata_props[:]
    return proto


def _dynamic_shapes(spec: InputSpec):
    dims: dict[int, object] = {}
    if not spec.static_batch:
        dims[0] = torch.export.Dim("batch", min=1, max=spec.batch.max)
    if not spec.static_size:
        for axis, name, largest in ((2, "height", spec.size.max[0]), (3, "width", spec.size.max[1])):
            unit = torch.export.Dim(f"{name}_units", min=1, max=max(largest, *TRACED_SIZE) // DIVISOR)
            dims[axis] = DIVISOR * unit
    return {"images": dims, "stages": None} if dims else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep PyTorch's notes about itself away from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def drop_outputs(proto: onnx.ModelProto, keep: list[str]) -> onnx.ModelProto:
    """A copy that returns only `keep`; the tensors of the other outputs stay in the graph, by their names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    outputs = [output for output in copy.graph.output if output.name in keep]
    dropped = [output for output in copy.graph.output if output.name not in keep]
    del copy.graph.output[:]
    copy.graph.output.extend(outputs)
    copy.graph.value_info.extend(dropped)
    return copy
