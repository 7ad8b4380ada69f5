"""The accuracy of a PyTorch model while it trains: AP of detectors, IoU of segmentation models.

Each picture is resized to fit the model's input, as an exported bundle does it by default.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch

from meta_deploy.models.registry import ModelConfig
from meta_deploy.tasks.accuracy import coco_ap, match_counts
from meta_deploy.tasks.masks import paste_mask
from tools.segmentation_losses import class_target
from tools.training_data import Source, decode, evenly_chosen, with_objects

SCORE = 0.5  # detections below it don't count in TP / (TP + FP + FN)


@torch.no_grad()
def run(
    model: torch.nn.Module, config: ModelConfig, image: np.ndarray
) -> tuple[dict[str, np.ndarray], float]:
    """A model's outputs for one picture (H, W, 3) uint8, and the factor by which it was resized."""
    height, width = config.input_size
    scale = min(height / image.shape[0], width / image.shape[1])
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)[:height, :width]
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    pixels = np.zeros((height, width, 3), np.float32)
    pixels[: small.shape[0], : small.shape[1]] = (small - mean) / std
    device = next(model.parameters()).device
    outputs = model(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device))
    return {name: value[0].float().cpu().numpy() for name, value in outputs.items()}, scale


def chosen(source: Source, count: int) -> tuple[dict[str, Any], list[tuple[int, np.ndarray]]]:
    """Ground truth and pictures of `count` validation pictures, evenly from all of them."""
    truth, pictures = source.validation()
    truth = evenly_chosen(truth, count)
    pixels = dict(pictures)
    return truth, [(image["id"], pixels[image["id"]]) for image in truth["images"]]


def validate_detections(
    model: torch.nn.Module, config: ModelConfig, source: Source, count: int
) -> dict[str, float]:
    """Box and mask AP, and TP / (TP + FP + FN) of masks at IoU 0.5 and score 0.5."""
    truth, pictures = chosen(source, count)
    categories = sorted(category["id"] for category in truth["categories"])
    results = []
    for image_id, image in pictures:
        out, scale = run(model, config, image)
        for k in range(int(out["num_detections"])):
            box = out["boxes"][k] / scale
            x1, y1, x2, y2 = box.tolist()
            results.append(
                {
                    "image_id": image_id,
                    "category_id": categories[int(out["labels"][k])],
                    "score": float(out["scores"][k]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": paste_mask(out["masks"][k], box, image.shape[:2], 0.5).rle(),
                }
            )
    report = coco_ap(truth, results, config.max_detections)
    found = [result for result in results if result["score"] >= SCORE]
    counts = np.array(list(match_counts(truth, found).values())).sum(axis=0)
    return {
        "box AP": round(report["box"]["AP"], 4),
        "mask AP": round(report["mask"]["AP"], 4),
        "mask AP50": round(report["mask"]["AP50"], 4),
        "TP/(TP+FP+FN)": round(float(counts[0] / max(counts.sum(), 1)), 4),
    }


def validate_segmentation(
    model: torch.nn.Module, config: ModelConfig, source: Source, count: int
) -> dict[str, float]:
    """Each class's IoU over all pixels of the validation pictures."""
    truth, pictures = chosen(source, count)
    label_of = {c["id"]: k for k, c in enumerate(sorted(truth["categories"], key=lambda c: c["id"]))}
    names = ("background", *(c["name"] for c in truth["categories"]), "boundary")
    both, either = np.zeros(len(names)), np.zeros(len(names))
    for (_, objects), (_, image) in zip(with_objects(truth), pictures, strict=True):
        height, width = image.shape[:2]
        masks = [decode(a["segmentation"], height, width) for a in objects]
        labels = np.array([label_of[a["category_id"]] for a in objects], np.int64)
        stacked = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
        wanted = class_target(stacked, labels, len(label_of), width=3)
        out, scale = run(model, config, image)
        logits = cv2.resize(out["logits"].transpose(1, 2, 0), config.input_size[::-1])
        part = logits[: round(height * scale), : round(width * scale)]
        found = cv2.resize(part, (width, height)).argmax(axis=2)
        for label in range(len(names)):
            is_found, is_wanted = found == label, wanted == label
            both[label] += (is_found & is_wanted).sum()
            either[label] += (is_found | is_wanted).sum()
    iou = both / np.maximum(either, 1)
    return {f"IoU {name}": round(float(value), 4) for name, value in zip(names, iou, strict=True)}
