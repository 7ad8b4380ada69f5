"""Seconds and memory of an export, its agreement with PyTorch, and meta-infer with it on a folder.

    python benchmarks/export_time.py [CASE ...] [--photos DIR] [--no-infer]

CASE is MODEL@SIDE or MODEL@HxW, optionally followed by +dynamic, or demo. Weights come from
tools/random_checkpoint.py. Exit code 1 if a command failed or a goal was missed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.common import Case, Run, export, machine, parser, photo_folder, run_command, save, table

CASES = ("meta-t-mask-rcnn@512", "meta-b-mask-rcnn@1024", "meta-t-upernet@512")
# On two cores: seconds, and MB at the peak.
GOALS = {"meta-t-mask-rcnn@512x512": (60, None), "meta-b-mask-rcnn@1024x1024": (240, 8000)}


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__, "export_time")
    p.add_argument("cases", nargs="*", type=Case.parse, metavar="CASE", help=f"default: {' '.join(CASES)}")
    p.add_argument("--no-infer", dest="infer", action="store_false", help="leave meta-infer out")
    args = p.parse_args(argv)
    folder = args.photos or photo_folder()
    here = machine()
    exports, inferences = {}, {}
    for case in args.cases or map(Case.parse, CASES):
        bundle, run = export(case, "--calib-images", folder)
        exports[str(case)] = export_numbers(case, bundle, run)
        if args.infer and run.code == 0:
            overlays = bundle.with_name(f"{bundle.name}-overlays")
            run = run_command("infer", folder, "--model", bundle, "--out", overlays)
            inferences[str(case)] = infer_numbers(run)

    for rows in (cost_rows(exports), agreement_rows(exports), infer_rows(inferences)):
        if rows:
            print(table(rows), end="\n\n")
    save(args.json, machine=here, photos=folder, exports=exports, meta_infer=inferences)
    failed = [name for name, numbers in (exports | inferences).items() if numbers["exit_code"]]
    missed = [name for name, numbers in exports.items() if not numbers.get("goal_met", True)]
    for names, what in ((failed, "failed"), (missed, "missed the goal")):
        if names:
            print(f"{what}: {', '.join(names)}", file=sys.stderr)
    return 1 if failed or missed else 0


def export_numbers(case: Case, bundle: Path, run: Run) -> dict[str, Any]:
    """The numbers of one export for the JSON file."""
    numbers: dict[str, Any] = {"exit_code": run.code, "seconds": run.seconds, "peak_mb": run.peak_mb}
    if run.document is None:
        return numbers
    most_seconds, most_mb = GOALS.get(str(case), (None, None))
    if most_seconds:
        numbers["goal"] = {"seconds": most_seconds, "peak_mb": most_mb}
        numbers["goal_met"] = run.seconds < most_seconds and run.peak_mb < (most_mb or np.inf)
    keys = ("parameters", "nodes", "passes", "verification")
    return numbers | {
        "stages": run.document["seconds"],
        "bundle_mb": sum(file.stat().st_size for file in bundle.iterdir()) / 1e6,
        **{key: run.document[key] for key in keys},
    }


def infer_numbers(run: Run) -> dict[str, Any]:
    """The numbers of one run over the folder for the JSON file."""
    numbers: dict[str, Any] = {"exit_code": run.code, "seconds": run.seconds, "peak_mb": run.peak_mb}
    if run.document is None:
        return numbers
    images = run.document["images"]
    parts = {part: [image["timings"][f"{part}_ms"] for image in images] for part in ("pre", "model", "post")}
    return numbers | {
        "images": len(images),
        "errors": len(run.document["errors"]),
        "score_threshold": run.document["score_threshold"],
        "found": sum(len(image.get("detections", image.get("segments"))) for image in images),
        "median_ms": {part: float(np.median(values)) for part, values in parts.items()},
    }


def cost_rows(exports: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The cost of each export. Seconds are for the whole command, including imports."""
    rows = []
    for name, numbers in exports.items():
        stages, nodes = numbers.get("stages", {}), numbers.get("nodes", {})
        goal = numbers.get("goal", {})
        rows.append(
            {
                "meta-export": name,
                "exit": numbers["exit_code"],
                "seconds": numbers["seconds"],
                "goal s": goal.get("seconds"),
                **{stage: stages.get(stage) for stage in ("load", "export", "passes", "verify", "write")},
                "peak MB": round(numbers["peak_mb"]),
                "goal MB": goal.get("peak_mb"),
                "parameters": numbers.get("parameters"),
                "literal nodes": nodes.get("before"),
                "nodes": nodes.get("after"),
                "bundle MB": numbers.get("bundle_mb"),
            }
        )
    return rows


def agreement_rows(exports: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The export's own comparison of ONNX Runtime with PyTorch."""
    rows = []
    for name, numbers in exports.items():
        if not (verification := numbers.get("verification")):
            continue
        stages = verification["stages"]
        found = stages.get("detections", {})
        rows.append(
            {
                "ONNX Runtime against PyTorch": name,
                "images": verification["images"],
                "maps, largest relative error": stages["maps"]["max_relative_error"],
                "proposals agree": stages.get("proposals", {}).get("agreement"),
                "pixels agree": stages.get("pixels", {}).get("agreement"),
                "detections": found.get("compared"),
                "agree": found.get("agreement"),
                "largest score difference": found.get("max_score_difference"),
                "mean mask IoU": found.get("mean_mask_iou"),
            }
        )
    return rows


def infer_rows(inferences: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """meta-infer on the folder, with overlays."""
    rows = []
    for name, numbers in inferences.items():
        rows.append(
            {
                "meta-infer": name,
                "exit": numbers["exit_code"],
                "images": numbers.get("images"),
                "errors": numbers.get("errors"),
                "found": numbers.get("found"),
                "seconds": numbers["seconds"],
                **{f"{part} ms": ms for part, ms in numbers.get("median_ms", {}).items()},
                "peak MB": round(numbers["peak_mb"]),
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
