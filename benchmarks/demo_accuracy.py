"""Box and mask AP of a demo model's bundle on unseen scenes, run through `Predictor`.

python benchmarks/demo_accuracy.py [BUNDLE] [--scenes 200] [--json accuracy.json]
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import save
from meta_deploy.report.accuracy import coco_ap
from meta_deploy.runtime.predictor import DEMO_BUNDLE, Predictor
from tools.scenes import CLASSES, TEST_SEEDS, coco_dataset, generate


def measure(bundle: Path, seeds: range, backend: str = "auto", threads: int | None = None) -> dict[str, Any]:
    """AP of a bundle on the scenes of `seeds`, and the mean milliseconds per image."""
    results: list[dict[str, Any]] = []
    seconds = 0.0
    # Every detection that the graph gives counts for AP, also those too unsure to be shown.
    with Predictor(bundle, backend=backend, score_threshold=0.0, threads=threads) as predictor:
        for seed in seeds:
            image = generate(seed).image
            began = time.perf_counter()
            detections = predictor(image)
            seconds += time.perf_counter() - began
            results += detections.to_coco(seed)
        used = predictor.backend
    return {
        "bundle": str(bundle),
        "backend": used,
        "scenes": len(seeds),
        "ms_per_image": 1000 * seconds / len(seeds),
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        **coco_ap(coco_dataset(seeds), results),
    }


def table(report: dict[str, Any]) -> str:
    """A Markdown table with a row for all classes and one per class."""
    box, mask = report["box"], report["mask"]
    rows = ["| | box AP | AP50 | AP75 | mask AP | AP50 | AP75 |", "|---|---|---|---|---|---|---|"]
    values = " | ".join(f"{part[key]:.3f}" for part in (box, mask) for key in ("AP", "AP50", "AP75"))
    rows.append(f"| all | {values} |")
    rows += [
        f"| {name} | {box['per_class'][name]:.3f} | | | {mask['per_class'][name]:.3f} | | |"
        for name in CLASSES
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Box and mask AP of the demo model's bundle on unseen scenes."
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=DEMO_BUNDLE)
    parser.add_argument("--scenes", type=int, default=len(TEST_SEEDS), help="the first so many test scenes")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    if not 1 <= args.scenes <= len(TEST_SEEDS):
        parser.error(f"--scenes must be 1 to {len(TEST_SEEDS)}, not {args.scenes}")
    report = measure(args.bundle, TEST_SEEDS[: args.scenes], args.backend, args.threads)
    print(table(report))
    print(f"{report['scenes']} scenes, {report['backend']}, {report['ms_per_image']:.1f} ms an image")
    if args.json:
        save(args.json, **report)


if __name__ == "__main__":
    main()
