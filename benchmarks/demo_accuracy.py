"""Accuracy of a nuclei model's bundle on annotated pictures, by kind of picture, run through `Predictor`.

    python benchmarks/demo_accuracy.py [BUNDLE ...] [--data DIR] [--tile SIDE] [--count N]

A detector gets box and mask AP as COCO defines it, with up to 400 detections a picture, and TP / (TP + FP +
FN) at mask IoU 0.5, which papers on nuclei give, of its detections and of the objects in tables (`apart`); a
segmentation model the IoU of each class.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.common import ROOT, machine, parser, save, table
from meta_deploy.bundle.shipped import SHIPPED
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.tasks.accuracy import coco_ap, match_counts
from meta_deploy.tasks.detection import Detections
from tools.segmentation_losses import class_target
from tools.training_data import decode, evenly_chosen, part_of, with_objects

DATA = ROOT.parent / "shared" / "data" / "nuclei"
MOST = 400  # detections a picture
SCORE = 0.5  # below it a detection does not count as one in TP / (TP + FP + FN)
ALL = "all"


def main(argv: Sequence[str] | None = None) -> None:
    p = parser(__doc__, "demo_accuracy")
    p.add_argument("bundles", nargs="*", metavar="BUNDLE", help="default: those in the package")
    p.add_argument("--data", type=Path, default=DATA, help="folder with instances_val.json and val/")
    p.add_argument("--tile", type=int, help="of tiles, 0 for none (default: as the bundle says)")
    p.add_argument("--count", type=int, help="pictures, evenly from all of them (default: all)")
    p.add_argument(
        "--score", type=float, default=SCORE, help="of detections that count (default: %(default)s)"
    )
    p.add_argument("--backend", default="auto")
    p.add_argument("--threads", type=int)
    args = p.parse_args(argv)
    truth = evenly_chosen(json.loads((args.data / "instances_val.json").read_text()), args.count)
    reports = []
    for bundle in args.bundles or SHIPPED:
        with Predictor(bundle, args.backend, 0.0, args.threads, tile=args.tile) as predictor:
            found, ms = results_of(predictor, truth, args.data / "val")
            detector = isinstance(next(iter(found.values())), Detections)
            rows = detection_rows(truth, found, args.score) if detector else segmentation_rows(truth, found)
            print(table(rows), end="\n\n")
            print(f"{bundle}: {predictor.runs_on}, {ms:.1f} ms a picture (median)")
            facts = {"tile": predictor.tile, "backend": predictor.backend, "ms_per_picture": ms}
            reports.append({"bundle": bundle, **facts, "rows": rows})
    save(args.json, machine=machine(), score=args.score, reports=reports)


def by_kind(truth: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The annotations of all pictures and of each kind of them."""
    kinds = sorted({image["kind"] for image in truth["images"] if "kind" in image})
    images = {kind: [i for i in truth["images"] if i.get("kind") == kind] for kind in kinds}
    return {ALL: truth} | {kind: part_of(truth, some) for kind, some in images.items()}


def results_of(predictor: Predictor, truth: dict[str, Any], folder: Path) -> tuple[dict[int, Any], float]:
    """Each picture's result by its id, and the median milliseconds a picture."""
    found, times = {}, []
    for image in truth["images"]:
        began = time.perf_counter()
        found[image["id"]] = predictor(folder / image["file_name"])
        times.append(1000 * (time.perf_counter() - began))
    return found, float(np.median(times))


def detection_rows(truth: dict[str, Any], found: dict[int, Detections], score: float) -> list[dict[str, Any]]:
    """A row for all pictures and for each kind."""
    records = [record for image_id, one in found.items() for record in one.to_coco(image_id)]
    counted = [r for image_id, one in found.items() for r in one.filter(score).apart().to_coco(image_id)]
    rows = []
    for kind, part in by_kind(truth).items():
        ids = {image["id"] for image in part["images"]}
        some = [record for record in records if record["image_id"] in ids]
        ap = coco_ap(part, some, MOST)
        counts = match_counts(part, [record for record in some if record["score"] >= score])
        tp, fp, fn = np.sum(list(counts.values()), axis=0).tolist()
        apart = match_counts(part, [record for record in counted if record["image_id"] in ids])
        each = [c[0] / sum(c) for c in counts.values() if sum(c)]
        rows.append(
            {
                "pictures": kind,
                "count": len(ids),
                "objects": tp + fn,
                "found": tp + fp,
                "TP/(TP+FP+FN)": _share(counts),
                "in tables": _share(apart),
                "mean over pictures": float(np.mean(each)) if each else None,
                "mask AP": ap["mask"]["AP"],
                "AP50": ap["mask"]["AP50"],
                "AP75": ap["mask"]["AP75"],
                "box AP": ap["box"]["AP"],
            }
        )
    return rows


def _share(counts: dict[int, tuple[int, int, int]]) -> float:
    tp, fp, fn = np.sum(list(counts.values()), axis=0).tolist()
    return tp / max(tp + fp + fn, 1)


def segmentation_rows(truth: dict[str, Any], found: dict[int, Any]) -> list[dict[str, Any]]:
    """A row for all pictures and for each kind: IoU over all their pixels, and the mean over pictures."""
    rows = []
    for kind, part in by_kind(truth).items():
        counts = np.array(
            [overlaps(image, objects, found[image["id"]]) for image, objects in with_objects(part)]
        )
        both, either = counts.sum(axis=0).T
        names = next(iter(found.values())).classes
        each = counts[:, 1, 0] / np.maximum(counts[:, 1, 1], 1)
        rows.append(
            {"pictures": kind, "count": len(counts)}
            | {f"IoU {name}": both[k] / max(either[k], 1) for k, name in enumerate(names)}
            | {f"{names[1]}, mean over pictures": float(each[counts[:, 1, 1] > 0].mean())}
        )
    return rows


def overlaps(image: dict[str, Any], objects: list[dict[str, Any]], found: Any) -> np.ndarray:
    """Pixels that both have and that either has, for each class: (classes, 2)."""
    height, width = image["height"], image["width"]
    masks = [decode(a["segmentation"], height, width) for a in objects]
    stacked = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
    wanted = class_target(stacked, np.zeros(len(masks), np.int64), 1, width=3)
    sides = [(found.labels == k, wanted == k) for k in range(len(found.classes))]
    return np.array([[(a & b).sum(), (a | b).sum()] for a, b in sides])


if __name__ == "__main__":
    main()
