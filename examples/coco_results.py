"""Evaluate a bundle on COCO annotations: print AP and write the results as COCO JSON.

python examples/coco_results.py annotations.json images/ [BUNDLE]
"""

import json
import sys
from pathlib import Path

from meta_deploy import Predictor
from meta_deploy.tasks.accuracy import coco_ap


def main(annotations: str, images: str, bundle: str | None = None) -> None:
    truth = json.loads(Path(annotations).read_text())
    category = {entry["name"]: entry["id"] for entry in truth["categories"]}

    results = []
    # AP needs all detections, including those with low scores.
    with Predictor(bundle, score_threshold=0.0) as predictor:
        if unknown := set(predictor.bundle.classes) - set(category):
            sys.exit(f"The annotations have no category '{min(unknown)}', which the bundle knows.")
        ids = [category[name] for name in predictor.bundle.classes]
        for entry in truth["images"]:
            found = predictor(Path(images) / entry["file_name"])
            results += found.to_coco(entry["id"], ids)
    Path("results.json").write_text(json.dumps(results))

    for kind, ap in coco_ap(truth, results).items():
        print(f"{kind}: AP {ap['AP']:.3f}, AP50 {ap['AP50']:.3f}, AP75 {ap['AP75']:.3f}")
        for name, value in ap["per_class"].items():
            print(f"  {name:<12} {value:.3f}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
