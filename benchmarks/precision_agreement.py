"""How well a lower precision finds what float32 finds: AP of its detections with float32's as ground truth.

Runs the graphs of TensorRT engines on the CPU, with products in float32 and each node's result rounded to its
type, as a GPU's tensor cores do. Both precisions start from the same graph, so that nothing else differs.

python benchmarks/precision_agreement.py [--case CASE ...] [--precision fp16 bf16] [--count 40] [--data DIR]

--exact MODULE ... leaves results of these PyTorch modules unrounded, to see where rounding costs agreement.
With --data, a folder of annotated pictures as tools/train.py takes it, these are the photos, and AP with the
annotations as ground truth is given too, of float32 and of the lower precision.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import WORK, Case, export, machine, parser, photos, save, table
from meta_deploy.bundle.bundle import Bundle, write_bundle
from meta_deploy.graph.precision.emulate import emulated
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.tasks.accuracy import coco_ap
from tools.training_data import evenly_chosen

CASES = ("demo", "meta-t-mask-rcnn@512")
GOAL = 0.99
MOST = 400  # detections a picture; models with a limit of their own give fewer
SURE = 0.3  # objects that float32 gives at least this score are counted by themselves, too


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__ or "", Path(__file__).stem)
    p.add_argument("--case", nargs="+", type=Case.parse, metavar="CASE", help=f"default: {' '.join(CASES)}")
    p.add_argument("--precision", nargs="+", choices=("fp16", "bf16"), default=("fp16",))
    p.add_argument("--count", type=int, default=40, help="photos (default: %(default)s)")
    p.add_argument("--exact", nargs="+", default=[], metavar="MODULE", help="such as rpn_head")
    p.add_argument("--data", type=Path, metavar="DIR", help="annotated pictures: val/, instances_val.json")
    args = p.parse_args(argv)
    annotations = None
    if args.data is None:
        paths = photos(args.photos, args.count)
    else:
        annotations = evenly_chosen(json.loads((args.data / "instances_val.json").read_text()), args.count)
        paths = [args.data / "val" / image["file_name"] for image in annotations["images"]]
    rows = []
    for case in args.case or map(Case.parse, CASES):
        truth = detections(exported(case, "fp32"), paths)
        for precision in args.precision:
            found = detections(exported(case, precision, args.exact), paths)
            rows.append(row(case, precision, truth, found) | against(annotations, truth, found))
            print(rows[-1], file=sys.stderr)
    print(table(rows))
    save(args.json, machine=machine(), photos=len(paths), exact=args.exact, goal=GOAL, rows=rows)
    return 0


def exported(case: Case, precision: str, exact: Sequence[str] = ()) -> Bundle:
    """A bundle whose model.onnx rounds like an engine of that precision, but for the modules `exact`."""
    folder, _ = export(case, "--target", "tensorrt-rtx", f"--{precision}", "--no-verify")
    bundle = Bundle.open(folder)
    if precision == "fp32":
        return bundle
    graph = emulated(onnx.load_from_string(bundle.read("model.onnx")), exact)
    files = {"model.onnx": graph.SerializeToString(), "model.engine": bundle.read("model.engine")}
    return write_bundle(WORK / f"{folder.name}-emulated", bundle.manifest, files)


def detections(bundle: Bundle, paths: Sequence[Path]) -> list[list[dict[str, Any]]]:
    """COCO results of each photo, all that the model gives."""
    with Predictor(bundle, "onnxruntime", 0.0) as predictor:
        return [predictor(path).to_coco(i) for i, path in enumerate(paths, 1)]


def row(case: Case, precision: str, truth: list[list[dict]], found: list[list[dict]]) -> dict[str, Any]:
    """Box and mask AP with all of float32's detections as ground truth, and with the confident ones only.

    Where a model reaches its maximum number of detections or its score threshold, rounding decides which are
    last.
    """
    results = [entry for entries in found for entry in entries]
    report = coco_ap(as_truth(truth), results, MOST)
    confident = [[entry for entry in entries if entry["score"] >= SURE] for entries in truth]
    sure = coco_ap(as_truth(confident), results, MOST)
    return {
        "model": str(case),
        "precision": precision,
        "photos": len(truth),
        "float32 found": sum(map(len, truth)),
        "found": sum(map(len, found)),
        "box AP": report["box"]["AP"],
        "mask AP": report["mask"]["AP"] if "mask" in report else None,
        f"box AP, score {SURE}": sure["box"]["AP"],
        f"mask AP, score {SURE}": sure["mask"]["AP"] if "mask" in sure else None,
        "goal": GOAL,
    }


def against(
    annotations: dict[str, Any] | None, float32: list[list[dict]], found: list[list[dict]]
) -> dict[str, Any]:
    """Mask AP of both with annotations as ground truth, if there are any."""
    if annotations is None:
        return {}
    values = {}
    for name, results in (("float32", float32), ("", found)):
        numbered = [
            {**entry, "image_id": image["id"]}
            for image, entries in zip(annotations["images"], results, strict=True)
            for entry in entries
        ]
        ap = coco_ap(annotations, numbered, MOST)["mask"]
        values[f"{name} mask AP, annotations".strip()] = ap["AP"]
    return values


def as_truth(results: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """COCO results as COCO annotations."""
    entries = [entry for part in results for entry in part]
    annotations = [
        {**entry, "id": i, "iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3]}
        for i, entry in enumerate(entries, 1)
    ]
    classes = sorted({entry["category_id"] for entry in entries})
    return {
        "images": [image(i, part) for i, part in enumerate(results, 1)],
        "categories": [{"id": c, "name": str(c)} for c in classes],
        "annotations": annotations,
    }


def image(number: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """A photo's COCO record; its size does not matter if nothing was found in it."""
    height, width = results[0]["segmentation"]["size"] if results else (1, 1)
    return {"id": number, "height": height, "width": width}


if __name__ == "__main__":
    sys.exit(main())
