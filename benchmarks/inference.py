"""Inference from image to result: the parts of a call, images per second, and the model against PyTorch.

    python benchmarks/inference.py [CASE ...] [--threads N ...] [--photos DIR] [--count N]

CASE is as for export_time.py and is exported first. The model alone is also timed against PyTorch eager,
against the traced graph without passes, and against OpenVINO with a bundle made for it (where it is
installed), interleaved image by image; ratios are medians over the rounds.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cv2
import msgspec
import numpy as np
import onnx
import torch

from benchmarks.common import (
    Case,
    checkpoint,
    export,
    interleave,
    machine,
    open_session,
    parser,
    photos,
    ratio,
    save,
    table,
)
from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.errors import BackendError
from meta_deploy.export.trace import drop_outputs, export_onnx
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.imaging.images import read_image
from meta_deploy.imaging.preprocess import Preprocessor
from meta_deploy.imaging.sources import expand
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.runtime.stream import predict
from meta_deploy.targets import TARGETS, open_backend
from meta_deploy.targets.target import Backend, BuildOptions

CASES = ("demo", "meta-t-mask-rcnn@512", "meta-t-mask-rcnn@512+dynamic")


def main(argv: Sequence[str] | None = None) -> None:
    p = parser(__doc__, "inference")
    p.add_argument("cases", nargs="*", type=Case.parse, metavar="CASE", help=f"default: {' '.join(CASES)}")
    p.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    p.add_argument("--count", type=int, default=20, help="pictures (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="times over all pictures (default: %(default)s)")
    args = p.parse_args(argv)
    here = machine()
    pictures = photos(args.photos, args.count)
    parts, models = [], []
    for case in args.cases or map(Case.parse, CASES):
        folder, run = export(case)
        if run.code:
            sys.exit(f"the export of {case} failed with exit code {run.code}")
        bundle = Bundle.open(folder)
        model = load_model(checkpoint(case)).model
        literal = drop_outputs(export_onnx(model, bundle.input), list(bundle.output_names))
        for threads in args.threads:
            cv2.setNumThreads(threads)
            torch.set_num_threads(threads)
            head = {"bundle": str(case), "threads": threads}
            parts.append(head | end_to_end(bundle, pictures, threads, args.rounds))
            models.append(head | against(bundle, literal, model, pictures, threads))
    print(table(parts), table(models), sep="\n\n")
    save(args.json, machine=here, pictures=len(pictures), rounds=args.rounds, end_to_end=parts, model=models)


def end_to_end(bundle: Bundle, pictures: list[Path], threads: int, rounds: int) -> dict[str, Any]:
    """From files to results: one call per image, and with files read ahead as in meta-infer."""
    results: list[Any] = []
    sources = expand(map(str, pictures))
    with Predictor(bundle, score_threshold=0.0, threads=threads) as predictor:

        def plain(turn: int) -> None:
            results.extend(predictor(path) for path in pictures)

        def ahead(turn: int) -> None:
            results.extend(frame.result for frame in predict(predictor, sources))

        predictor(pictures[0])  # to warm up
        times = interleave({"plain": plain, "ahead": ahead}, rounds)
    columns: dict[str, Any] = {}
    for part in ("pre", "model", "post"):
        values = [getattr(result.timings, part) for result in results]
        columns[f"{part} ms"] = float(np.median(values))
        columns[f"{part} p90"] = float(np.quantile(values, 0.9))
    if hasattr(results[0], "scores"):
        columns["detections"] = float(np.mean([len(result) for result in results]))
    return columns | {
        "images/s, plain": 1000 * len(pictures) / float(np.median(times["plain"])),
        "images/s, read ahead": 1000 * len(pictures) / float(np.median(times["ahead"])),
        "gain": 1 / ratio(times["ahead"], times["plain"]),
    }


def against(
    bundle: Bundle, literal: onnx.ModelProto, model: torch.nn.Module, pictures: list[Path], threads: int
) -> dict[str, Any]:
    """Milliseconds of the model alone, image by image: the bundle, the traced graph, and PyTorch."""
    preprocess = Preprocessor(bundle.input, bundle.preprocess)
    batches = [preprocess([read_image(path)])[0] for path in pictures]
    plain = open_session(literal, threads)
    with (
        torch.inference_mode(),
        open_backend(bundle, "onnxruntime", threads) as ours,
        for_openvino(bundle, literal, threads) as openvino,
    ):
        contenders: dict[str, Callable[[int], Any]] = {
            "bundle": lambda turn: ours.run({"images": batches[turn]}),
            "literal": lambda turn: plain.run(None, {"images": batches[turn]}),
            "PyTorch": lambda turn: model(torch.from_numpy(batches[turn])),
        }
        if openvino is not None:
            contenders["OpenVINO"] = lambda turn: openvino.run({"images": batches[turn]})
        interleave(contenders, 1)  # to warm up
        times = interleave(contenders, len(batches))
    over = {}
    if "OpenVINO" in times:
        over["OpenVINO / bundle"] = ratio(times["OpenVINO"], times["bundle"])
    return {
        **{f"{name} ms": float(np.median(values)) for name, values in times.items()},
        "literal / bundle": ratio(times["literal"], times["bundle"]),
        "PyTorch / bundle": ratio(times["PyTorch"], times["bundle"]),
        **over,
    }


@contextlib.contextmanager
def for_openvino(bundle: Bundle, literal: onnx.ModelProto, threads: int) -> Iterator[Backend | None]:
    """The same model as a bundle for OpenVINO, opened; None where OpenVINO is not installed."""
    target = TARGETS["openvino"]
    try:
        target.check(BuildOptions())
    except BackendError as error:
        print(f"{error}: left out", file=sys.stderr)
        yield None
        return
    graph, _ = run_passes(literal, list(target.passes), target.prices)
    built = target.build(graph.SerializeToString(), [bundle.input.profile], BuildOptions())
    manifest = msgspec.structs.replace(bundle.manifest, target=target.name, engine=built.engine)
    with tempfile.TemporaryDirectory() as folder:
        made = write_bundle(Path(folder) / "openvino", manifest, built.files)
        with open_backend(made, "openvino", threads) as backend:
            yield backend


if __name__ == "__main__":
    main()
