"""Where a run of PyTorch goes: each operator is timed as it is dispatched, for a profile like ONNX Runtime's.

Knows ATen's names of operators; must not know bundles or tasks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from meta_deploy.report.operators import Tensor
from meta_deploy.report.profile import Event, assemble
from meta_deploy.report.schema import Profile

# ATen's names of operators, as ONNX has them: for their class and cost. What works element by element, and
# what gives another view of its input, needs no name here.
_ONNX = {
    **dict.fromkeys(("convolution", "conv1d", "conv2d", "conv3d"), "Conv"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "ConvTranspose"),
    **dict.fromkeys(("addmm", "linear"), "Gemm"),
    **dict.fromkeys(("mm", "bmm", "matmul", "baddbmm"), "MatMul"),
    "einsum": "Einsum",
    **dict.fromkeys(("native_layer_norm", "layer_norm"), "LayerNormalization"),
    **dict.fromkeys(("native_batch_norm", "batch_norm", "cudnn_batch_norm"), "BatchNormalization"),
    **dict.fromkeys(("native_group_norm", "group_norm"), "GroupNormalization"),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax"), "Softmax"),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d"), "Resize"),
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d"), "GridSample"),
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices"), "MaxPool"),
    "avg_pool2d": "AveragePool",
    **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d"), "GlobalAveragePool"),
    **dict.fromkeys(("glu", "where", "and", "or", "xor"), "Add"),
    **dict.fromkeys(("clone", "contiguous", "copy", "to", "_to_copy", "reshape", "flatten", "item"), "Cast"),
    **dict.fromkeys(("cat", "concat", "stack"), "Concat"),
    **dict.fromkeys(("constant_pad_nd", "pad"), "Pad"),
    **dict.fromkeys(("index", "index_select", "gather", "embedding", "take_along_dim"), "Gather"),
    **dict.fromkeys(("index_put", "scatter", "masked_scatter"), "ScatterND"),
    **dict.fromkeys(("roll", "flip", "repeat", "tile", "repeat_interleave"), "Tile"),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "arange", "linspace", "meshgrid"), "Range"),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_full"), "Range"),
    **dict.fromkeys(
        ("new_ones", "new_empty", "fill", "zero", "tensor", "lift_fresh", "scalar_tensor"), "Range"
    ),
    **dict.fromkeys(("topk", "sort", "argsort"), "TopK"),
    **dict.fromkeys(("nonzero", "masked_select"), "NonZero"),
    "argmax": "ArgMax",
    "argmin": "ArgMin",
    "nms": "NonMaxSuppression",
    "roi_align": "RoiAlign",
    **dict.fromkeys(("sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all"), "ReduceSum"),
    **dict.fromkeys(("norm", "linalg_vector_norm", "var", "std", "cumsum"), "ReduceSum"),
}
_MODES = {"upsample_bilinear2d": "linear", "upsample_bicubic2d": "cubic", "upsample_nearest2d": "nearest"}
_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.bool: "bool",
}
_KINDS = dict(onnx.TensorProto.DataType.items())


def profile(run: Callable[[], object], runs: int) -> Profile:
    """Time each operator of a model on the CPU.

    Args:
        run: runs the model once.
        runs: that are counted, after one that is not.
    """
    spans, calls = [], []
    with _modules() as current:
        for _ in range(1 + runs):
            watch = _Watch(current)
            began = time.perf_counter()
            with watch:
                run()
            spans.append(1e6 * (time.perf_counter() - began - watch.noting))
            calls.append(watch.events)
    return assemble(spans[1:], calls[1:], watch.graph, f"PyTorch {torch.__version__}, timed by operator")


@contextlib.contextmanager
def _modules() -> Iterator[Callable[[], str]]:
    """A function that names the module whose forward is running; empty outside of any."""
    stack: list[str] = []
    names: dict[torch.nn.Module, str] = {}

    def enter(module: torch.nn.Module, _: object) -> None:
        if not stack:  # the whole model
            names.update({inner: name for name, inner in module.named_modules()})
        stack.append(names.get(module) or (stack[-1] if stack else ""))

    def leave(*_: object) -> None:
        stack.pop()

    hooks = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True))
    try:
        yield lambda: stack[-1] if stack else ""
    finally:
        for hook in hooks:
            hook.remove()


class _Watch(TorchDispatchMode):
    """Times the operators of one run, and puts down the graph that they make.

    Attributes:
        events: the operators in their order; graph: with a node for each.
        noting: the seconds that this took, which are no part of the run.
    """

    def __init__(self, module: Callable[[], str]) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.graph = onnx.GraphProto()
        self.noting = 0.0
        self._module = module
        self._names = WeakTensorKeyDictionary()
        self._tensors = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        began = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        ended = time.perf_counter()
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if made or given:
            self._note(func, args, given, made, 1e6 * (ended - began))
        self.noting += time.perf_counter() - ended
        return result

    def _note(
        self,
        func: Any,
        args: Sequence[Any],
        given: list[torch.Tensor],
        made: list[torch.Tensor],
        micros: float,
    ) -> None:
        plain = func.overloadpacket.__name__
        word = _word(func, plain.strip("_") if plain not in _ONNX else plain, given, made)
        if plain in ("addmm", "baddbmm"):
            given = [*given[1:], given[0]]  # ONNX has the sum last
        if plain == "convolution" and args[6]:
            word = "ConvTranspose"
        module = self._module()
        name = f"{module}/{plain}_{len(self.events)}" if module else f"{plain}_{len(self.events)}"
        node = self.graph.node.add(name=name, op_type=word)
        node.input.extend(map(self._name, given))
        node.output.extend(self._new(tensor) for tensor in made)
        if plain in _MODES:
            node.attribute.append(onnx.helper.make_attribute("mode", _MODES[plain]))
        if word in ("MaxPool", "AveragePool"):
            window = args[1] if isinstance(args[1], (list, tuple)) else (args[1], args[1])
            node.attribute.append(onnx.helper.make_attribute("kernel_shape", list(window)))
        inputs, outputs = tuple(map(_tensor, given)), tuple(map(_tensor, made))
        self.events.append(Event(name, plain, micros, inputs, outputs, module))

    def _name(self, tensor: torch.Tensor) -> str:
        """A tensor's name; one that no operator made is a weight, or comes from outside."""
        if tensor not in self._names:
            name = self._new(tensor)
            if isinstance(tensor, torch.nn.Parameter) or tensor.dim() == 0:
                kind = _KINDS[_type(tensor).upper()]
                self.graph.initializer.add(name=name, dims=tensor.shape, data_type=kind)
            else:
                self.graph.input.add(name=name)
        return str(self._names[tensor])

    def _new(self, tensor: torch.Tensor) -> str:
        self._tensors += 1
        self._names[tensor] = f"t{self._tensors}"
        return f"t{self._tensors}"


def _word(func: Any, plain: str, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> str:
    """ONNX's name of an operator, or one of the same class and cost."""
    if (plain == "detach" or not func._schema.is_mutable) and given and made and _share(given[0], made[0]):
        return "Reshape"  # a view
    if "scaled_dot_product" in plain:
        return "Attention"
    if plain in _ONNX:
        return _ONNX[plain]
    return "Add" if torch.Tag.pointwise in func.tags else plain


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _type(tensor: torch.Tensor) -> str:
    return _TYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def _tensor(tensor: torch.Tensor) -> Tensor:
    return Tensor(_type(tensor), tuple(tensor.shape))
