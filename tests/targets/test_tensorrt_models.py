"""The zoo's models as TensorRT-RTX engines, whole and for real: they build, and attention is fused.

The graphs have random weights: what is built, and out of what, hangs on shapes alone.
"""

import functools
import platform

import onnx
import pytest
from msgspec.structs import replace

from meta_deploy.export.options import Options
from meta_deploy.export.sources.checkpoint import input_spec
from meta_deploy.export.trace import drop_outputs, export_onnx
from meta_deploy.graph.attention import attention_count
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.models.registry import build_model, get_config
from meta_deploy.targets import TARGETS
from meta_deploy.targets.tensorrt.build import build_engine
from meta_deploy.tasks import get_task

RTX = "tensorrt-rtx"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"),
        reason="elsewhere the dev extra does not bring tensorrt-rtx",
    ),
]
# benchmarks/README.md: backbone and pyramid in float16, and what the heads add.
LAYERS = {"meta-t-mask-rcnn": 424 + 145, "meta-t-upernet": 440}
ACTIVATION_MB = {"meta-t-mask-rcnn": 70, "meta-t-upernet": 126}


@functools.cache
def graph(name, kind=""):
    """The float32 graph as meta-export would ship it, and the input's dimensions.

    Of some kind: "shallow", for any "batch", for any "batch and size". Symbolic shapes take their time to
    trace, so these have a few of the blocks only, which are alike.
    """
    config = get_config(name)
    if kind:
        config = replace(config, backbone=replace(config.backbone, depth=4, adapter_parts=1))
    spec = input_spec(
        config.input_size,
        Options(dynamic_batch=(1, 2, 4) if "batch" in kind else None, dynamic_size="size" in kind),
    )
    literal = export_onnx(build_model(config).eval(), spec, "lowered")
    proto, _ = run_passes(literal, list(TARGETS[RTX].passes), TARGETS[RTX].prices)
    return drop_outputs(proto, list(get_task(config.task).outputs)), spec


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """The graphs are large, and nothing after this file needs them."""
    yield
    graph.cache_clear()
    engine.cache_clear()


@functools.cache
def engine(name, precision, kind=""):
    proto, spec = graph(name, kind)
    if precision != "fp32":
        proto, _ = PRECISIONS[precision].convert(proto, (), TARGETS[RTX].float32_operators[precision])
    assert not {node.op_type for node in proto.graph.node} & {"NonMaxSuppression", "RoiAlign", "NonZero"}
    onnx.checker.check_model(proto)
    return build_engine(proto.SerializeToString(), RTX, [spec.profile]).section(), attention_count(proto)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_model_builds_whole_and_its_attention_is_fused(name, precision):
    section, attention = engine(name, precision)
    assert attention == 44  # 12 in the ViT, 32 over stripes, both directions of which are one
    assert section.fused_attention == (0 if precision == "fp32" else attention)
    if precision == "fp16":
        assert section.layers <= 1.1 * LAYERS[name]
        assert section.activation_mb <= 1.1 * ACTIVATION_MB[name]


# How sizes that are open change an engine hangs neither on the precision nor, for the backbone, on the head.


def test_a_segmenter_builds_for_any_batch():
    section, attention = engine("meta-t-upernet", "fp16", "batch")
    assert attention == section.fused_attention == 4 + 8
    known, _ = engine("meta-t-upernet", "fp16", "shallow")
    assert section.layers <= 1.1 * known.layers


def test_a_detector_builds_for_any_batch_and_size():
    section, attention = engine("meta-t-mask-rcnn", "fp16", "batch and size")
    assert attention == section.fused_attention == 4 + 16  # the directions of stripes are not stacked here
