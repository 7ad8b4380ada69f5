"""Write the assets of the package: annotated pictures, checkpoints, and the bundles exported from them.

    python tools/make_assets.py --data DIR RUN/meta-nano-mask-rcnn.pth RUN/meta-nano-upernet.pth

The pictures are some of DIR's validation set. Checkpoints are stored in float16; `--set` changes settings of
the configurations that need no training; the ones that ship have {"nms": 0.3, "tile": 384}.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from meta_deploy.bundle.shipped import ASSETS, SHIPPED
from meta_deploy.export.pipeline import export
from meta_deploy.models.checkpoint.load import load_model
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.registry import config_from_dict, config_to_dict
from tools.training_data import part_of

# Of BBBC038's stage 1, as split in DIR: name in the package -> the start of its name there.
PICTURES = {
    "fluorescence-1": "4ee5850b6354",
    "fluorescence-2": "6b61ab2e3ff0",
    "fluorescence-3": "c3bec1066aae",
    "fluorescence-4": "5b2ccfb94ded",
    "fluorescence-5": "08151b19806e",
    "stained-1": "b214800de5ed",
    "stained-2": "6ab24e7e1f6c",
    "stained-3": "87ea72894f65",
}


def write_pictures(data: Path, folder: Path) -> None:
    """Copy the pictures, and write their annotations as `instances.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    truth = json.loads((data / "instances_val.json").read_text())
    chosen = []
    for name, start in PICTURES.items():
        (image,) = [image for image in truth["images"] if image["file_name"].startswith(start)]
        shutil.copy(data / "val" / image["file_name"], folder / f"{name}.png")
        chosen.append({**image, "file_name": f"{name}.png"})
    (folder / "instances.json").write_text(json.dumps(part_of(truth, chosen)))


def write_checkpoint(path: Path, settings: dict[str, Any]) -> Path:
    """Store a trained checkpoint in float16; settings of its kind of model are changed."""
    loaded = load_model(path)
    config = config_to_dict(loaded.config)
    config |= {name: value for name, value in settings.items() if name in config}
    out = ASSETS / f"{loaded.config.name}.pth"
    save_checkpoint(out, loaded.model, config_from_dict(config), loaded.class_names, torch.float16)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoints", type=Path, nargs=2, help="what tools/train.py wrote: detector, segmenter"
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder that they were trained on")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help='such as {"nms": 0.3}')
    args = parser.parse_args()
    write_pictures(args.data, ASSETS / "images")
    for name, path in zip(SHIPPED, args.checkpoints, strict=True):
        checkpoint = write_checkpoint(path, args.set)
        bundle = export(checkpoint, target="onnxruntime", out=ASSETS / name)
        print(f"{bundle.path}: verified on {bundle.manifest.verification['images']} images")


if __name__ == "__main__":
    main()
