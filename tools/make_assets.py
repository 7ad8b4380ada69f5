"""Write the assets of the package: annotated pictures, checkpoints, and the bundles exported from them.

    python tools/make_assets.py --data DIR --set '{"nms": 0.3, "tile": 384, "shown_score": 0.5}' \
        --class-bias '[0.5, 0, -0.4]' RUN/meta-nano-mask-rcnn.pth RUN/meta-nano-upernet.pth

The pictures are some of DIR's validation set. Checkpoints are stored in float16. `--set` and `--class-bias`
choose what needs no training; the values above were chosen on the validation set, and ship.
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


def write_checkpoint(path: Path, settings: dict[str, Any], class_bias: list[float] | None = None) -> Path:
    """Store a trained checkpoint in float16.

    Args:
        path: what tools/train.py wrote.
        settings: changes to the configuration, those that its kind of model has.
        class_bias: added to a segmenter's logits, class by class.
    """
    loaded = load_model(path)
    if class_bias is not None:
        with torch.no_grad():
            loaded.model.decode_head.conv_seg.bias += torch.tensor(class_bias)
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
    parser.add_argument(
        "--class-bias",
        type=json.loads,
        metavar="JSON",
        help="added to the segmenter's logits: [0.5, 0, -0.4]",
    )
    args = parser.parse_args()
    write_pictures(args.data, ASSETS / "images")
    for name, path, bias in zip(SHIPPED, args.checkpoints, (None, args.class_bias), strict=True):
        checkpoint = write_checkpoint(path, args.set, bias)
        bundle = export(checkpoint, target="onnxruntime", out=ASSETS / name)
        print(f"{bundle.path}: verified on {bundle.manifest.verification['images']} images")


if __name__ == "__main__":
    main()
