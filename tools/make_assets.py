"""Write the assets of the package: example images, the demo checkpoint, and the bundle exported from it.

    python tools/make_assets.py runs/demo/meta-nano-mask-rcnn.pth

The images are scenes that neither training nor tests use. The checkpoint is saved again with the registry's
configuration, so that both agree.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from meta_deploy.export.pipeline import export
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.registry import get_config
from tools.scenes import CALIBRATION_SEEDS, generate

ASSETS = Path(__file__).resolve().parents[1] / "meta_deploy" / "assets"
NAME = "meta-nano-mask-rcnn"


def write_images(folder: Path) -> None:
    """Write eight scenes of various sizes as JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [(480, 640), (640, 480), (480, 480), (360, 640)]  # (height, width)
    for i, seed in enumerate(CALIBRATION_SEEDS[:8]):
        scene = generate(seed, size=sizes[i % len(sizes)])
        Image.fromarray(scene.image).save(folder / f"scene-{i + 1}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="what tools/train.py wrote")
    args = parser.parse_args()
    write_images(ASSETS / "images")
    loaded = load_model(args.checkpoint)
    config = get_config(NAME, num_classes=len(loaded.class_names))
    save_checkpoint(ASSETS / f"{NAME}.pth", loaded.model, config, loaded.class_names)
    bundle = export(ASSETS / f"{NAME}.pth", target="onnxruntime", out=ASSETS / "demo")
    print(f"{bundle.path}: verified on {bundle.manifest.verification['images']} images")


if __name__ == "__main__":
    main()
