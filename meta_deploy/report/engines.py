"""What a TensorRT engine consists of: its layers joined with the graph that it was built from.

Knows layers, ONNX graphs and TensorRT's conditions for fused attention; must not know how an engine is run.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx
from msgspec.structs import replace

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import TensorRTEngine, read_manifest
from meta_deploy.errors import BackendError, InputError, MetaDeployError
from meta_deploy.graph.modules import innermost, modules_of
from meta_deploy.report.operators import WrittenOut, classes, written_out
from meta_deploy.report.profile import by_module, sum_up
from meta_deploy.report.schema import AttentionRow, EngineRow, LayerRow, NodeRow, OperatorClass, Profile
from meta_deploy.targets.model_file import read_model
from meta_deploy.targets.tensorrt.backend import inspect
from meta_deploy.targets.tensorrt.layers import Layer, LayerTensor, read_json
from meta_deploy.targets.tensorrt.target import ENGINE, LAYERS

# What makes a layer's class, where it has nodes of several: the first of these that one of them has.
_ORDER: tuple[OperatorClass, ...] = (
    *("attention", "convolution", "matrix product", "post-processing", "resize", "normalization"),
    *("element-wise", "data movement"),
)
_PRODUCTS = ("convolution", "matrix product")
# Between its products and its softmax TensorRT-RTX 1.7 fuses attention with these, and with no others that
# were tried (Transpose, Relu, Tanh).
_FUSED_BETWEEN = (
    *("Add", "Sub", "Mul", "Div", "Where", "Cast", "Clip", "Min", "Max"),
    *("Reshape", "Squeeze", "Unsqueeze", "Identity"),
)
_LEAST_WIDTH, _MOST_WIDTH = 9, 256  # of a head; NVIDIA says 16 to 256, and narrower ones are padded to 16
_ALONE = (
    "an engine by itself tells its layers on its GPU alone; name its bundle, or the .json file that "
    "trtexec --exportLayerInfo writes"
)
_LOW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def holds_engine(path: str | os.PathLike[str]) -> bool:
    """Whether this is a bundle for TensorRT; what cannot be read is none."""
    try:
        content, _ = read_manifest(Path(path))
        return str(content["engine"]["library"]).startswith("tensorrt")
    except (MetaDeployError, KeyError, TypeError):
        return False


def of_bundle(bundle: Bundle) -> EngineRow:
    """The engine of a bundle, by its manifest, its layers' file and its graph.

    Raises:
        MetaDeployError: what it keeps of its layers tells none.
    """
    row = _of_manifest(bundle)
    if LAYERS not in bundle.manifest.files:
        return replace(row, no_layers="the bundle does not hold its engine's layers; export it again")
    layers = read_json(bundle.read(LAYERS), f"{LAYERS} of bundle '{bundle.path}'")
    return with_layers(row, layers, _graph(bundle))


def _of_manifest(bundle: Bundle) -> EngineRow:
    section = bundle.engine
    assert isinstance(section, TensorRTEngine)
    return EngineRow(
        library=section.library,
        version=section.version,
        gpu=section.gpu,
        compute_capabilities=section.compute_capabilities,
        layer_count=section.layers,
        generated_kernels=section.generated_kernels,
        fused_attentions=section.fused_attention,
        attention_count=section.attention,
        kinds=section.kernels,
        activation_mb=section.activation_mb,
        weights_mb=section.weights_mb,
        plan_mb=section.plan_mb,
        seconds=section.seconds,
    )


def _graph(bundle: Bundle) -> onnx.ModelProto:
    """The graph that the engine was built from, with nodes named as TensorRT's parser calls them."""
    model = onnx.load_model_from_string(read_model(bundle))
    for node in model.graph.node:
        node.name = node.name or f"node_of_{node.output[0]}"
    return model


def of_file(path: str | os.PathLike[str]) -> EngineRow:
    """An engine by itself, of which without a GPU the size alone is known; or, from a .json file, the layers
    of one as `trtexec --exportLayerInfo` writes them.

    Raises:
        InputError: it cannot be read, or tells no layers.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}") from error
    if Path(path).suffix.lower() == ".json":
        return with_layers(EngineRow(), read_json(content, f"'{path}'"))
    row = EngineRow(plan_mb=len(content) / 1e6)
    try:
        library, version, layers = inspect(content, f"'{path}'")
    except BackendError as error:
        return replace(row, no_layers=f"{_ALONE} ({error})")
    return with_layers(replace(row, library=library, version=version), layers)


def bundle_around(path: str | os.PathLike[str]) -> str | None:
    """The folder of a bundle for TensorRT that this file is the engine of; None where there is none."""
    file = Path(os.path.abspath(path))
    return str(file.parent) if file.name == ENGINE and holds_engine(file.parent) else None


def with_layers(row: EngineRow, layers: Sequence[Layer], model: onnx.ModelProto | None = None) -> EngineRow:
    """The row with what its layers tell, and what the graph that it was built from makes of them."""
    launched = [layer for layer in layers if not layer.synchronizes]
    kinds = {} if model is None else classes(model.graph)
    made = _sizes(launched)
    named = (
        (name for layer in launched for name in layer.nodes)
        if model is None
        else (node.name for node in model.graph.node)
    )
    modules = modules_of(named)
    rows = tuple(_layer_row(layer, kinds, modules, made) for layer in launched)
    found = () if model is None else tuple(_attentions(model, launched, modules))
    counts: dict[str, Counter[str]] = {}
    for layer in launched:
        counts.setdefault(layer.kind, Counter())[layer.type] += 1
    return replace(
        row,
        layer_count=len(rows),
        generated_kernels=sum(layer.generated for layer in launched),
        reformats=sum(one.reformat for one in rows),
        fused_attentions=sum(one.fused for one in found) or sum(layer.attention for layer in launched),
        attention_count=len(found) if found else row.attention_count,
        kinds={kind: dict(sorted(counts[kind].items())) for kind in sorted(counts)},
        layers=rows,
        attentions=found,
    )


def profile(bundle: Bundle, layers: Sequence[Layer], runs: Sequence[Mapping[str, float]]) -> Profile:
    """Where a run goes, by the milliseconds of each layer in each run.

    The layers follow each other under the profiler, so that there is nothing between them.
    """
    engine = with_layers(_of_manifest(bundle), layers, _graph(bundle))
    known = {layer.name: layer for layer in engine.layers}
    means = {name: sum(run.get(name, 0.0) for run in runs) / len(runs) for name in runs[0]}
    rows = [_node_row(name, ms, known.get(name)) for name, ms in means.items()]
    total = sum(means.values())
    return Profile(
        by=f"{engine.library} {engine.version}'s profiler",
        runs=len(runs),
        ms=total,
        classes=sum_up(rows, total),
        nodes=tuple(rows),
        modules=by_module(rows, total),
    )


def _node_row(name: str, ms: float, layer: LayerRow | None) -> NodeRow:
    """A layer with its time; of one that the bundle does not tell of, that alone."""
    return NodeRow(
        name=name,
        op=layer.kind if layer else "",
        op_class=layer.op_class if layer else "other",
        calls=1.0,
        ms=ms,
        inputs=layer.inputs if layer else (),
        outputs=layer.outputs if layer else (),
        bytes_read=layer.bytes_read if layer else None,
        bytes_written=layer.bytes_written if layer else None,
        flops=None,
        module=innermost(layer.modules) if layer else "",
    )


# --- layers -------------------------------------------------------------------------------------------------


def _layer_row(
    layer: Layer, kinds: Mapping[str, OperatorClass], modules: Mapping[str, str], made: Mapping[str, int]
) -> LayerRow:
    asked = {kinds[name] for name in layer.nodes if name in kinds}
    kind = _class(layer, asked)
    return LayerRow(
        name=layer.name,
        kind=layer.kind,
        kernel=layer.kernel.partition("_0x")[0],
        type=layer.type,
        op_class=kind,
        reformat=kind == "data movement" and "data movement" not in asked,
        inputs=tuple(map(_shown, layer.inputs)),
        outputs=tuple(map(_shown, layer.outputs)),
        bytes_read=_bytes([*layer.inputs, *layer.constants], made),
        bytes_written=_bytes(layer.outputs, made),
        nodes=layer.nodes,
        modules=tuple(dict.fromkeys(filter(None, map(modules.get, layer.nodes)))),
    )


def _class(layer: Layer, asked: set[OperatorClass]) -> OperatorClass:
    """By its kernel where that tells, else by the nodes in it."""
    kind = layer.kind.lower()
    if layer.attention:
        return "attention"
    if layer.moves:
        return "data movement"
    if layer.generated:  # never a product: those have kernels of their own
        asked = asked.difference(_PRODUCTS)
    elif not asked & {"attention", *_PRODUCTS}:
        if "conv" in kind or "correlation" in kind:
            return "convolution"
        if any(word in kind for word in ("gemm", "matmul", "matrixmultiply")):
            return "matrix product"
    return next((name for name in _ORDER if name in asked), "element-wise")


def _shown(tensor: LayerTensor) -> str:
    return f"{tensor.type} {'x'.join(map(str, tensor.shape)) or 'scalar'}".strip()


def _sizes(layers: Sequence[Layer]) -> dict[str, int]:
    """Bytes of what layers make, by name."""
    pairs = ((tensor.name, tensor.bytes) for layer in layers for tensor in layer.outputs)
    return {name: size for name, size in pairs if size is not None}


def _bytes(tensors: Sequence[LayerTensor], made: Mapping[str, int]) -> int | None:
    """Each tensor once: of several views no more than the tensor has where its maker tells that."""
    views: Counter[str] = Counter()
    largest: dict[str, int] = {}
    for tensor in tensors:
        size = tensor.bytes
        if size is None:
            return None
        views[tensor.name] += size
        largest[tensor.name] = max(largest.get(tensor.name, 0), size)
    return sum(min(size, made.get(name, largest[name])) for name, size in views.items())


# --- attention ----------------------------------------------------------------------------------------------


class _Typed(NamedTuple):
    """Element type and sizes of a tensor; 0 where a size is open."""

    type: int
    shape: tuple[int, ...]


def _attentions(
    model: onnx.ModelProto, layers: Sequence[Layer], modules: Mapping[str, str]
) -> Iterator[AttentionRow]:
    """Every attention of the graph, whether a kernel holds it whole, and why not."""
    holders: dict[str, list[Layer]] = {}
    for layer in layers:
        for name in layer.nodes:
            holders.setdefault(name, []).append(layer)
    typed = _types(model)
    outputs = {output.name for output in model.graph.output}
    for found in written_out(model.graph):
        names = [found.above[-1].name, found.softmax.name, found.below[-1].name]
        within = {layer.name: layer for name in names for layer in holders.get(name, [])}
        fused = any(layer.attention for layer in within.values())
        yield AttentionRow(
            node=found.softmax.name,
            module=modules.get(found.softmax.name, ""),
            fused=fused,
            reason=None if fused else _why_not(found, typed.get, outputs),
            layers=tuple(within),
        )


def _why_not(found: WrittenOut, typed: Callable[[str], _Typed | None], outputs: set[str]) -> str:
    """What of TensorRT's conditions an attention that is not fused breaks."""
    q, v = typed(found.above[-1].input[0]), typed(found.below[-1].input[1])
    weights, softmax = typed(found.softmax.input[0]), found.softmax
    if q is not None and q.type not in _LOW:
        name = onnx.helper.tensor_dtype_to_np_dtype(q.type).name
        return f"it computes in {name}, and TensorRT fuses attention in float16 and bfloat16 alone"
    between = [n.op_type for n in (*found.above[:-1], *found.below[:-1]) if n.op_type not in _FUSED_BETWEEN]
    if between:
        return f"{' and '.join(dict.fromkeys(between))} stands between its products and its softmax"
    if set(softmax.output) & outputs:
        return "its weights are an output of the graph too"
    axis = next((a.i for a in softmax.attribute if a.name == "axis"), -1)
    if axis != -1 and (weights is None or axis != len(weights.shape) - 1):
        return f"its softmax runs along axis {axis} and not the last"
    widths = [one.shape[-1] for one in (q, v) if one is not None and one.shape]
    wrong = [width for width in widths if width and not _LEAST_WIDTH <= width <= _MOST_WIDTH]
    if wrong:
        return (
            f"its heads have {wrong[0]} channels, and TensorRT fuses those of {_LEAST_WIDTH} to {_MOST_WIDTH}"
        )
    return "no reason is known"


def _types(model: onnx.ModelProto) -> dict[str, _Typed]:
    """Types and shapes of the graph's tensors, by name; what inference cannot tell is missing."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if math.prod(tensor.dims) > 64:  # no shape: inference needs the sizes of weights alone
            tensor.ClearField("raw_data")
    graph = onnx.shape_inference.infer_shapes(light).graph
    found = {tensor.name: _Typed(tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        kind = value.type.tensor_type
        found[value.name] = _Typed(kind.elem_type, tuple(dim.dim_value for dim in kind.shape.dim))
    return found
