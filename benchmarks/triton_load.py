"""A Triton server on this machine: an image's latency beside one Predictor, and throughput by clients.

    python benchmarks/triton_load.py [--model BUNDLE] [--rounds N] [--seconds S] [--clients N …]

The bundle, and one whose model costs nothing (`free`: what Triton itself costs an image), go into a
repository as `meta-export --triton` writes it. Needs a tritonserver (NVIDIA's, or nvidia-pytriton) and
tritonclient[all]; where the server has no ONNX Runtime backend, one in Python stands in for it.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec
import numpy as np
from PIL import Image

from benchmarks.common import ASSETS, interleave, machine, parser, ratio, save, table
from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.bundle.manifest import TensorSpec
from meta_deploy.bundle.shipped import locate
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.triton.repository import write_models
from tests.bundles_by_hand import detector, manifest
from tests.triton.real_server import find, running

SIDE = 384  # the nuclei bundle's tile: one run of the model


def main() -> None:
    p = parser(__doc__ or "", "triton_load")
    p.add_argument("--model", default="nuclei", help="a bundle (default: nuclei)")
    p.add_argument("--rounds", type=int, default=30, help="of latency (default: 30)")
    p.add_argument("--seconds", type=float, default=10, help="of each throughput (default: 10)")
    p.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    args = p.parse_args()
    if (server := find()) is None:
        sys.exit("there is no tritonserver: pip install nvidia-pytriton 'tritonclient[all]'")
    data = picture()
    with tempfile.TemporaryDirectory(prefix="triton-load-") as scratch:
        work = Path(scratch)
        bundles = {"model": Bundle.open(locate(args.model)), "free": free(work / "free")}
        for name, bundle in bundles.items():
            write_models(bundle, work / "models", name)
        with running(server, work / "models", work) as addresses:
            latency = [
                row
                for name, bundle in bundles.items()
                for row in latencies(name, bundle, data, addresses, args.rounds)
            ]
            load = [
                throughput(name, data, addresses[1], clients, args.seconds)
                for name in bundles
                for clients in args.clients
            ]
    print(table(latency), table(load), sep="\n\n")
    save(args.json, machine=machine(), latency=latency, throughput=load)


def picture() -> bytes:
    """A nuclei picture that is one tile, as a PNG."""
    stream = io.BytesIO()
    Image.open(ASSETS / "images" / "fluorescence-1.png").crop((0, 0, SIDE, SIDE)).save(stream, "PNG")
    return stream.getvalue()


def free(folder: Path) -> Bundle:
    """A detector that computes next to nothing."""
    shapes = {
        "num_detections": ("int32", (1,)),
        "boxes": ("float32", (1, 5, 4)),
        "scores": ("float32", (1, 5)),
    }
    shapes |= {"labels": ("int32", (1, 5)), "masks": ("float32", (1, 5, 28, 28))}
    outputs = tuple(
        TensorSpec(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in shapes.items()
    )
    content = msgspec.structs.replace(manifest("instance-segmentation", (64, 64)), outputs=outputs)
    return write_bundle(folder, content, {"model.onnx": detector((64, 64))})


def asking(library: Any, address: str, model: str, data: bytes) -> Callable[[], Any]:
    """A client, that asks for one image and reads the answer."""
    client = library.InferenceServerClient(address)
    given = library.InferInput("image", [1], "BYTES")
    given.set_data_from_numpy(np.array([data], object))

    def ask() -> Any:
        return client.infer(model, [given]).as_numpy("masks")

    return ask


def latencies(
    name: str, bundle: Bundle, data: bytes, addresses: tuple[str, str], rounds: int
) -> list[dict[str, Any]]:
    """Milliseconds an image: a predictor in this process, and the server by each protocol, in turns."""
    from tritonclient import grpc, http

    with Predictor(bundle) as predictor:
        contenders: dict[str, Callable[[], Any]] = {
            "Predictor": lambda: [mask.rle() for mask in predictor(data).segments],
            "Triton, HTTP": asking(http, addresses[0], name, data),
            "Triton, gRPC": asking(grpc, addresses[1], name, data),
        }
        for contender in contenders.values():
            contender()
        times = interleave({who: lambda turn, run=run: run() for who, run in contenders.items()}, rounds)
    base = times["Predictor"]
    return [
        {
            "model": name,
            "": who,
            "ms": statistics.median(own),
            "p90 ms": sorted(own)[int(0.9 * len(own))],
            "over Predictor": ratio(own, base),
        }
        for who, own in times.items()
    ]


def throughput(name: str, data: bytes, address: str, clients: int, seconds: float) -> dict[str, Any]:
    """Images a second with so many clients over gRPC, and what each waits."""
    from tritonclient import grpc

    askers = [asking(grpc, address, name, data) for _ in range(clients)]
    began = time.perf_counter()

    def work(ask: Callable[[], Any]) -> list[float]:
        times = []
        while (start := time.perf_counter()) < began + seconds:
            ask()
            times.append(time.perf_counter() - start)
        return times

    with ThreadPoolExecutor(clients) as pool:
        times = sorted(value for own in pool.map(work, askers) for value in own)
    took = time.perf_counter() - began
    return {
        "model": name,
        "clients": clients,
        "images a second": len(times) / took,
        "p50 ms": 1000 * statistics.median(times),
        "p99 ms": 1000 * times[int(0.99 * len(times))],
    }


if __name__ == "__main__":
    main()
