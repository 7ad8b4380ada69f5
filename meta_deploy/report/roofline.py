"""What this machine does at best, measured: bytes a second of a copy, FLOPs a second of a matrix product.

And where operators are under that roof (Williams, Waterman and Patterson, 2009). Knows no models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from msgspec.structs import replace
from onnx import TensorProto, helper

from meta_deploy.ort import onnxruntime
from meta_deploy.report.schema import NodeRow, Profile, Roofline

_REPEATS = 10
_COPIED = 64 << 20  # bytes, more than caches hold
_SIDE = 768


def measure(threads: int) -> Roofline:
    """Both, with this many threads; the best of a few runs, as nothing is faster than the machine."""
    return Roofline(bandwidth_gb_s=_bandwidth(threads) / 1e9, peak_gflop_s=_peak(threads) / 1e9)


def _bandwidth(threads: int) -> float:
    """Bytes read and written a second by a copy, its parts in threads (numpy copies outside of the lock)."""
    source = np.ones(_COPIED // 4, np.float32)
    target = np.empty_like(source)
    target.fill(0)  # the system gives memory when it is touched
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best(lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)))
    return 2 * source.nbytes / seconds


def _peak(threads: int) -> float:
    """FLOPs a second of a float32 matrix product on ONNX Runtime."""
    shape = [_SIDE, _SIDE]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "aby"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["y"])], "peak", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = dict.fromkeys("ab", np.ones(shape, np.float32))
    return 2 * _SIDE**3 / _best(lambda: session.run(None, feed))


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def under_roof(profile: Profile, roof: Roofline) -> Profile:
    """The profile with each node's place under the roof, where its bytes and FLOPs are known."""
    return replace(profile, nodes=tuple(_placed(row, roof) for row in profile.nodes))


def _placed(row: NodeRow, roof: Roofline) -> NodeRow:
    if row.bytes_read is None or row.bytes_written is None or row.flops is None:
        return row
    moved = row.bytes_read + row.bytes_written
    if not moved and not row.flops:
        return row
    by_memory, by_arithmetic = moved / roof.bandwidth_gb_s / 1e6, row.flops / roof.peak_gflop_s / 1e6  # ms
    return replace(
        row,
        intensity=row.flops / moved if moved else None,
        bound="memory" if by_memory >= by_arithmetic else "arithmetic",
        share_of_roof=max(by_memory, by_arithmetic) / row.ms if row.ms else None,
    )
