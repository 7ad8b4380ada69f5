"""A nuclei model in 8 bits on ONNX Runtime's CPU: the search, the rules by each method, and quantize_static.

    python benchmarks/int8_methods.py [BUNDLE] --calib-images DIR [--count N] [--rounds N] [--threads N]

BUNDLE is a float32 one for onnxruntime, by default the detector in the package. Accuracy is as in
demo_accuracy.py; time against float32, interleaved; size of the file against float32's. Rows of contenders
are printed as they come.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx
from msgspec.structs import replace

from benchmarks.common import ASSETS, WORK, interleave, machine, open_session, parser, ratio, save, table
from benchmarks.demo_accuracy import ALL, DATA, SCORE, detection_rows, results_of, segmentation_rows
from benchmarks.quantize_static import quantize_static_of
from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.calib import METHOD_NAMES
from meta_deploy.calib.calibrate import Calibrator
from meta_deploy.export.pipeline import export
from meta_deploy.export.samples import ImageSamples, evenly
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.graph.precision.int8 import INT8, Quantization
from meta_deploy.imaging.sources import expand
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.targets import TARGETS
from meta_deploy.targets.target import MODEL
from meta_deploy.tasks.detection import Detections
from tools.training_data import evenly_chosen


def main(argv: Sequence[str] | None = None) -> None:
    p = parser(__doc__, "int8_methods")
    p.add_argument("bundle", nargs="?", type=Path, default=ASSETS / "nuclei")
    p.add_argument("--calib-images", type=Path, required=True)
    p.add_argument("--calib-count", type=int, default=64)
    p.add_argument("--data", type=Path, default=DATA)
    p.add_argument("--count", type=int, help="pictures of the validation set (default: all)")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--tile", type=int, help="as in demo_accuracy.py")
    p.add_argument("--methods", nargs="*", default=METHOD_NAMES, help="of calibration (default: all)")
    args = p.parse_args(argv)
    bundle = Bundle.open(args.bundle)
    paths = evenly([one.path for one in expand([str(args.calib_images)])], args.calib_count)
    samples = ImageSamples(paths, bundle.input, bundle.manifest.preprocess)
    # Weights that are float16 in the file become float32 ones.
    whole = run_passes(onnx.load_from_string(bundle.read(MODEL)), ["clean-up"], TARGETS["onnxruntime"].prices)
    graphs = {"fp32": whole[0]}
    graphs["search"] = searched(bundle, args.calib_images)
    for method in args.methods:
        graphs[f"rules, {method}"] = ruled(graphs["fp32"], samples, method)
    graphs |= quantize_static_of(graphs["fp32"], samples)
    truth = evenly_chosen(json.loads((args.data / "instances_val.json").read_text()), args.count)
    times = timed(graphs, next(iter(samples)), args.rounds, args.threads)
    rows = []
    for name, graph in graphs.items():
        out = WORK / "int8" / name.replace(", ", "-").replace(" ", "-")
        write_bundle(out, replace(bundle.manifest, files={}), {MODEL: graph.SerializeToString()})
        with Predictor(out, "onnxruntime", 0.0, args.threads, tile=args.tile) as predictor:
            found, _ = results_of(predictor, truth, args.data / "val")
        rows.append(
            {"": name}
            | accuracy(truth, found)
            | {"time / fp32": ratio(times[name], times["fp32"]), "ms": float(np.median(times[name]))}
            | {"size / fp32": graph.ByteSize() / graphs["fp32"].ByteSize()}
        )
        print(table(rows), end="\n\n", flush=True)
    save(args.json, machine=machine(), pictures=len(truth["images"]), calibrated_on=len(samples), rows=rows)


def accuracy(truth: dict[str, Any], found: dict[int, Any]) -> dict[str, float]:
    """The figures of all pictures together."""
    if isinstance(next(iter(found.values())), Detections):
        rows, keys = detection_rows(truth, found, SCORE), ["box AP", "mask AP", "TP/(TP+FP+FN)"]
    else:
        rows = segmentation_rows(truth, found)
        keys = [key for key in rows[0] if key.startswith("IoU")]
    whole = next(row for row in rows if row["pictures"] == ALL)
    return {key: whole[key] for key in keys}


def searched(bundle: Bundle, images: Path) -> onnx.ModelProto:
    """What `meta-export --int8` makes of the bundle's graph; float32 where nothing pays."""
    preprocess = bundle.preprocess
    made = export(
        bundle.path / MODEL,
        target="onnxruntime",
        precision="int8",
        calib_images=images,
        passes="clean-up",
        mean=preprocess.mean,
        std=preprocess.std,
        out=WORK / "int8" / "search",
        check=False,
    )
    print(PRECISIONS[made.precision].describe(made.manifest.conversion), end="\n\n", flush=True)
    return onnx.load_from_string(made.read(MODEL))


def ruled(graph: onnx.ModelProto, samples: ImageSamples, method: str) -> onnx.ModelProto:
    """All that the target's rules let, by one method of calibration."""
    rules = TARGETS["onnxruntime"].eight_bits["int8"]
    assert rules is not None
    return INT8().convert(graph, quantization=Quantization(rules, Calibrator(samples, rules, method)))[0]


def timed(
    graphs: dict[str, onnx.ModelProto], feed: dict[str, np.ndarray], rounds: int, threads: int
) -> dict[str, list[float]]:
    sessions = {name: open_session(graph, threads) for name, graph in graphs.items()}
    runs = {name: lambda turn, s=session: s.run(None, feed) for name, session in sessions.items()}
    interleave(runs, 1)
    return interleave(runs, rounds)


if __name__ == "__main__":
    main()
