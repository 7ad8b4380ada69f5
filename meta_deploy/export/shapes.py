"""The inputs of an ONNX file: types, open sizes, and what these are fixed to or may range over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from meta_deploy.bundle.manifest import Profile
from meta_deploy.errors import InputError
from meta_deploy.export.onnx_reader import numpy_name
from meta_deploy.export.options import MAX_INPUT_VALUES, Options

ANY = 65536  # the upper end of a size that nothing bounds
_ANY_BATCH, _ANY_EDGE, _ANY_LENGTH = (1, 2), (224, 448), (16, 24)  # what open sizes are tried at
_FLOATS = ("float16", "float32", "float64")
_TYPES = {
    *_FLOATS,
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
}
# Between an input of whole numbers and the table that they index.
_PASS_ON = ("Cast", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Flatten")
Range = tuple[int, int, int]


@dataclass(frozen=True)
class OpenInput:
    """An input of a graph.

    Attributes:
        name, dtype: as the graph has them; dtype is numpy's name.
        shape: a size is a number, or the name of an open one.
        ranges: open size -> (least, usual, most).
        trials: open size -> the two sizes that random inputs have.
        below: whole numbers are at least 0 and below this.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    below: int
    ranges: Mapping[str, Range]
    trials: Mapping[str, tuple[int, int]]

    @property
    def is_image(self) -> bool:
        """Whether it is float32 (N, 3, H, W)."""
        return self.dtype == "float32" and len(self.shape) == 4 and self.shape[1] == 3

    @property
    def static_but_batch(self) -> bool:
        return all(isinstance(size, int) for size in self.shape[1:])

    @property
    def shown(self) -> str:
        return f"[{', '.join(map(str, self.shape))}]"

    @property
    def profile(self) -> Profile:
        """Least, usual and largest shape."""
        least, usual, most = (
            tuple(size if isinstance(size, int) else self.ranges[size][which] for size in self.shape)
            for which in range(3)
        )
        return Profile(name=self.name, min=least, opt=usual, max=most)

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape can be given."""
        low, high = self.profile.min, self.profile.max
        return len(shape) == len(low) and all(
            a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
        )

    def random(self, generator: np.random.Generator, which: int) -> np.ndarray:
        """Numbers of its type: normal, or whole ones below `below`; its open sizes at their trial `which`."""
        shape = [size if isinstance(size, int) else self.trials[size][which] for size in self.shape]
        if self.dtype in _FLOATS:
            return generator.standard_normal(shape).astype(self.dtype)
        numbers = generator.integers(0, 2 if self.dtype == "bool" else self.below, shape)
        if self.below == 2 and numbers.size:
            numbers.flat[0] = 1  # a mask that leaves nothing has no meaning
        return numbers.astype(self.dtype)


def open_inputs(proto: onnx.ModelProto, path: Path) -> list[OpenInput]:
    """The inputs that a caller has to give. Unnamed open sizes get names, in `proto` too.

    Raises:
        InputError: one is no tensor (a sequence), or of a type that numpy lacks, or of unknown rank.
    """
    defaults = {tensor.name for tensor in proto.graph.initializer}
    inputs = []
    for given in proto.graph.input:
        if given.name in defaults:
            continue
        tensor = given.type.tensor_type
        if given.type.WhichOneof("value") != "tensor_type":
            raise InputError(f"'{path}' takes '{given.name}', which is not a tensor; that is not supported")
        dtype = numpy_name(tensor.elem_type)
        if dtype not in _TYPES or not tensor.HasField("shape"):
            what = "of unknown rank" if dtype in _TYPES else f"of type {dtype}"
            raise InputError(f"'{path}' takes '{given.name}' {what}; that is not supported")
        for axis, dim in enumerate(tensor.shape.dim):
            if dim.dim_value < 0 or (dim.WhichOneof("value") != "dim_value" and not dim.dim_param):
                dim.dim_param = "batch" if axis == 0 else f"{given.name}_{axis}"
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        inputs.append(OpenInput(given.name, dtype, shape, _below(proto.graph, given.name), {}, {}))
    if not inputs:
        raise InputError(f"'{path}' takes no inputs, so there is nothing to run")
    for output in proto.graph.output:
        tensor = output.type.WhichOneof("value") in (None, "tensor_type")
        if not tensor or numpy_name(output.type.tensor_type.elem_type) not in (*_TYPES, "unknown"):
            raise InputError(
                f"'{path}' gives '{output.name}', which is not a tensor of numbers; not supported"
            )
    return inputs


def _below(graph: onnx.GraphProto, name: str) -> int:
    """Whole numbers index a table: the rows of the smallest that an input reaches; 2, a mask, where none."""
    tables = {tensor.name: tensor.dims for tensor in graph.initializer}
    rows, reached = [], {name}
    for node in graph.node:
        if node.op_type == "Gather" and node.input[1] in reached and node.input[0] in tables:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            rows.append(tables[node.input[0]][axis])
        elif node.op_type in _PASS_ON and node.input[0] in reached:
            reached.update(node.output)
    return int(max(1, min(rows, default=2)))


def choose_shapes(
    proto: onnx.ModelProto, inputs: Sequence[OpenInput], options: Options, path: Path
) -> list[OpenInput]:
    """The inputs with what the user asked for; sizes that this fixes are fixed in `proto` too.

    Raises:
        InputError: the file does not take what was asked for.
    """
    fixed: dict[str, int] = {}
    ranges: dict[str, Range] = {}
    _apply_shapes(inputs, options, fixed, path)
    _apply_batch(inputs, options, fixed, ranges, path)
    _apply_size(inputs, options, fixed, ranges, path)
    if both := fixed.keys() & ranges.keys():
        raise InputError(f"the size '{min(both)}' of '{path}' is both fixed and a range; give one of them")
    _fix(proto, fixed)
    trials = _trials(inputs, ranges)
    usual = {name: ranges.get(name, (1, trials[name][0], ANY)) for name in trials}
    chosen = [
        replace(
            given,
            shape=tuple(fixed.get(size, size) if isinstance(size, str) else size for size in given.shape),
            ranges=usual,
            trials=trials,
        )
        for given in inputs
    ]
    for given in chosen:
        if math.prod(given.profile.opt) > MAX_INPUT_VALUES:
            raise InputError(f"an input of {given.shown} has over 2**31 numbers; take smaller sizes")
    return chosen


def _apply_shapes(inputs: Sequence[OpenInput], options: Options, fixed: dict[str, int], path: Path) -> None:
    known = {given.name: given for given in inputs}
    for name, shape in options.shapes.items():
        if name not in known:
            raise InputError(f"'{path}' has no input '{name}'; it takes {', '.join(known)}")
        given = known[name]
        agrees = len(shape) == len(given.shape) and all(
            isinstance(size, str) or wanted in (0, size)
            for size, wanted in zip(given.shape, shape, strict=False)
        )
        if not agrees:
            asked = "x".join(str(size or "?") for size in shape)
            raise InputError(f"'{path}' takes {name} as {given.shown}, and --shape asks for {asked}")
        for size, wanted in zip(given.shape, shape, strict=True):
            if isinstance(size, str) and wanted:
                _assign(fixed, size, wanted, path)


def _apply_batch(
    inputs: Sequence[OpenInput],
    options: Options,
    fixed: dict[str, int],
    ranges: dict[str, Range],
    path: Path,
) -> None:
    if options.batch is None and options.dynamic_batch is None:
        return
    batches = options.batches()
    if not any(given.shape for given in inputs):
        raise InputError(f"'{path}' has no input with a batch; leave out --batch and --dynamic-batch")
    for size in {given.shape[0] for given in inputs if given.shape}:
        if isinstance(size, int):
            if batches != (size,) * 3:
                option = "--dynamic-batch" if options.dynamic_batch else f"--batch {options.batch}"
                raise InputError(f"'{path}' has its batch fixed at {size}; leave out {option}")
        elif options.dynamic_batch:
            _assign(ranges, size, batches, path)
        else:
            _assign(fixed, size, batches[0], path)


def _apply_size(
    inputs: Sequence[OpenInput],
    options: Options,
    fixed: dict[str, int],
    ranges: dict[str, Range],
    path: Path,
) -> None:
    if options.input_size is None:
        if options.dynamic_size:
            raise InputError("--dynamic-size of an ONNX file needs --input-size H W, the largest")
        return
    images = [given for given in inputs if given.is_image]
    if not images:
        raise InputError(f"'{path}' has no input of (N, 3, H, W); leave out --input-size or use --shape")
    largest = max(options.input_size)
    for given in images:
        for size, wanted in zip(given.shape[2:], options.input_size, strict=True):
            if isinstance(size, int):
                if size != wanted or options.dynamic_size:
                    raise InputError(
                        f"'{path}' takes {given.name} as {given.shown} only; leave out --input-size"
                    )
            elif options.dynamic_size:
                _assign(ranges, size, (32, wanted, largest), path)
            else:
                _assign(fixed, size, wanted, path)


def _assign(fixed: dict[str, Any], size: str, value: Any, path: Path) -> None:
    if fixed.setdefault(size, value) != value:
        raise InputError(
            f"the options give the size '{size}' of '{path}' both as {fixed[size]} and as {value}"
        )


def _trials(inputs: Sequence[OpenInput], ranges: Mapping[str, Range]) -> dict[str, tuple[int, int]]:
    """Two sizes for each open one; height changes and width stays, so that one taken for the other shows."""
    trials: dict[str, tuple[int, int]] = {}
    for given in inputs:
        for axis, size in enumerate(given.shape):
            if isinstance(size, int) or size in trials:
                continue
            if size in ranges:
                trials[size] = ranges[size][0], ranges[size][2]
            elif axis == 0:
                trials[size] = _ANY_BATCH
            elif given.is_image:
                trials[size] = _ANY_EDGE if axis == 2 else (_ANY_EDGE[0],) * 2
            else:
                trials[size] = _ANY_LENGTH
    return trials


def _fix(proto: onnx.ModelProto, fixed: Mapping[str, int]) -> None:
    """Write sizes into the shapes that name them; what was inferred before is inferred again."""
    if not fixed:
        return
    del proto.graph.value_info[:]
    for info in (*proto.graph.input, *proto.graph.output):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in fixed:
                dim.dim_value = fixed[dim.dim_param]
